//! The WireGuard engine: admits initiations, runs handshakes, and seals and opens data messages.
//! The only package that depends on boringtun.
//!
//! # Contract
//!
//! - The engine does no I/O. It seals into a [`Sink`] and opens into space that comes with each
//!   message, so the caller owns all buffers. It decides neither when to start a handshake nor where
//!   a message goes.
//! - Batches cross this seam ([`Session::seal`], [`Session::open`]), so that another engine can
//!   replace it. The sink and the segments are generic: nothing is called indirectly per packet.
//! - No message from outside causes a panic. Each that is not used has a [`Refusal`], which the
//!   caller counts. boringtun logs handshakes at `debug` and timers up to `error`, so a subscriber
//!   should disable the target `boringtun`.
//! - boringtun reads the clock by itself, so the engine cannot be part of the core.
//!
//! # Files
//!
//! | file | owns |
//! |---|---|
//! | `admission` | the node's key, and which initiations are processed |
//! | `session` | the handshake and the sessions with one peer |
//! | `message` | lengths and kinds of messages |
//! | `seam` | how the caller supplies plaintext, and space for sealed messages |
//! | `refusal` | why a message is not used |
//! | `internals` | established sessions, for tests and benchmarks |

#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing)]

mod admission;
mod batch;
#[cfg(test)]
mod defects;
#[doc(hidden)]
pub mod internals;
mod message;
mod refusal;
mod seam;
mod session;

pub use admission::{Admission, Secrets};
pub use message::{DATA_HEADER, DATA_OVERHEAD, HANDSHAKE_BYTES, MessageKind, PADDING};
pub use refusal::Refusal;
pub use seam::{Segments, Single, Sink};
pub use session::{Answered, Opened, Sealed, Session, Tick};
