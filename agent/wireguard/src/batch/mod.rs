//! Parts of the batch engine: WireGuard's handshake and transport sessions of our own, which seal
//! and open batches with [`towline_aead`].
//!
//! # Files
//!
//! | file | owns |
//! |---|---|
//! | `noise` | the messages of the handshake, and the keys of a session |
//! | `replay` | which counters were received |
//! | `transport` | the sessions of one peer, and their counters |
//! | `pending` | messages in a send buffer that are not sealed yet |

mod noise;
mod pending;
mod replay;
mod transport;
