//! Reasons for which a message is refused.

use boringtun::noise::errors::WireGuardError;

/// Reason why a message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A message with an impossible length.
    Malformed,
    /// A handshake message whose first MAC is wrong: it is not meant for this node's key.
    WrongMac,
    /// An initiation under load without a valid cookie.
    UnderLoad,
    /// An initiation that is not newer than the last one of that peer.
    StaleHandshake,
    /// A handshake message that does not match the state of its tunnel, or does not decrypt.
    InvalidHandshake,
    /// Data of a session that does not exist.
    NoSession,
    /// Data that was received before, or is older than the replay window.
    Replayed,
    /// Data that does not decrypt.
    NotAuthentic,
    /// Data whose counter is past Reject-After-Messages.
    CounterExhausted,
    /// Authentic data that contains no IP packet.
    NoPacket,
}

impl From<&WireGuardError> for Refusal {
    fn from(error: &WireGuardError) -> Self {
        match error {
            WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => Self::Replayed,
            WireGuardError::WrongIndex | WireGuardError::NoCurrentSession => Self::NoSession,
            WireGuardError::InvalidMac => Self::WrongMac,
            WireGuardError::UnderLoad => Self::UnderLoad,
            WireGuardError::WrongTai64nTimestamp => Self::StaleHandshake,
            WireGuardError::InvalidAeadTag => Self::NotAuthentic,
            WireGuardError::UnexpectedPacket | WireGuardError::WrongKey => Self::InvalidHandshake,
            _ => Self::Malformed,
        }
    }
}
