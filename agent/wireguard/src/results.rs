//! Results of the calls of a session.

use crate::Refusal;

/// Result of [`crate::Session::seal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sealed {
    /// Length of all sealed messages, in bytes.
    pub bytes: usize,
    /// Number of segments that could not be sealed: the session has just ended, or they did not fit in their
    /// space.
    pub lost: usize,
}

/// Result of opening one data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// A packet, truncated to the length that its header claims.
    Packet {
        /// Position of the first byte in the buffer.
        start: usize,
        /// Length in bytes.
        len: usize,
    },
    /// A keepalive: authentic and empty.
    Keepalive,
    /// The message is refused for this reason.
    Refused(Refusal),
}

/// Result of a handshake message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// An authentic initiation was answered. The new session is used once the first datagram for
    /// `receiver` arrives, which confirms it.
    Response {
        /// Length of the response in bytes.
        len: usize,
        /// Receiver index of the new session.
        receiver: u32,
    },
    /// The initiation of this node was answered: the session is established, and a keepalive
    /// confirms it.
    Established {
        /// Length of the keepalive in bytes.
        len: usize,
    },
    /// A cookie for the next initiation of this node.
    Cookie,
    /// The message is refused for this reason.
    Refused(Refusal),
}

/// Result of [`crate::Session::tick`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tick {
    /// No message is due now.
    Quiet,
    /// An initiation of this number of bytes must be sent.
    Initiation(usize),
    /// A keepalive of this number of bytes must be sent.
    Keepalive(usize),
    /// The session expired, or the handshake was given up. Nothing happens until the next
    /// initiation.
    Expired,
}
