//! The batch engine: WireGuard's handshake and transport sessions of our own, which seal and open
//! batches in place with [`towline_aead`]. Time and randomness are arguments.
//!
//! # Files
//!
//! | file | owns |
//! |---|---|
//! | `session` | the state of one peer: what is sent when, and what is accepted |
//! | `noise` | the messages of the handshake, and the keys of a session |
//! | `symmetric` | hash and chaining key of a handshake |
//! | `macs` | the MACs of handshake messages, and cookies |
//! | `invalid` | why a handshake message is not used |
//! | `timestamp` | timestamps of initiations |
//! | `transport` | the sessions of one peer, and their counters |
//! | `replay` | which counters were received |
//! | `timers` | what was sent and received without an answer |

mod invalid;
mod macs;
mod noise;
mod replay;
pub(crate) mod session;
mod symmetric;
#[cfg(test)]
mod tests;
mod timers;
pub(crate) mod timestamp;
mod transport;
