//! Requests, their bytes, and parsers of single answers, for fuzzing and tests. Not part of the public
//! API.

pub use crate::address::parse as address;
pub use crate::link::parse as link;
pub use crate::route::{message as route_request, parse as route};
pub use crate::rule::{message as rule_request, parse as rule};
pub use crate::socket_owner::parse as socket_user;

use crate::codec::Message;

/// Returns the bytes of a message as they are sent.
pub fn bytes(mut message: Message) -> Vec<u8> {
    message.finish(1).to_vec()
}
