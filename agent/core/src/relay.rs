//! What a node and a relay say to each other.
//!
//! A relay is a node whose record says that it relays. Requests and answers are sealed under the
//! key of the pair of node and relay, as probes are, so a relay serves nodes of its mesh alone.

use std::time::Duration;

use towline_types::id::WireguardKey;

use crate::path::{ChannelId, Path};

/// How long a relay keeps a channel on which neither end sends.
pub const CHANNEL_LIFETIME: Duration = Duration::from_secs(120);

/// A request to a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayRequest {
    /// "I can be reached through you, at the address that this comes from." Repeated before the
    /// lifetime of [`RelayAnswer::Registered`] is over. It moves the node's end of its channels
    /// too, as far as they were bound to the address of the registration before.
    Register {
        /// Which relay.
        relay: WireguardKey,
        /// Where it is.
        to: Path,
        /// To find in the answer.
        transaction: u64,
    },
    /// "Give me a channel to this node." The relay answers [`RelayAnswer::Opened`], and tells the
    /// other node [`RelayAnswer::Incoming`], if that one is registered. Asking again for the same
    /// pair gives the same channel, bound to where the request came from.
    Open {
        /// Which relay.
        relay: WireguardKey,
        /// Where it is.
        to: Path,
        /// The node at the other end.
        peer: WireguardKey,
        /// To find in the answer.
        transaction: u64,
    },
}

/// What a relay says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayAnswer {
    /// To [`RelayRequest::Register`].
    Registered {
        /// The request's.
        transaction: u64,
        /// For how long.
        lifetime: Duration,
    },
    /// To [`RelayRequest::Open`].
    Opened {
        /// The request's.
        transaction: u64,
        /// Its number.
        channel: ChannelId,
    },
    /// To either request: not registered, over a limit, or shutting down.
    Refused {
        /// The request's.
        transaction: u64,
    },
    /// Another node opened a channel to us. The relay says it a few times; it is not answered but
    /// by what travels on the channel.
    Incoming {
        /// Who.
        peer: WireguardKey,
        /// Its number.
        channel: ChannelId,
    },
}
