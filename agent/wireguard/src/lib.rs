//! The WireGuard engines: admit initiations, run handshakes, and seal and open data messages.
//! The only package that depends on boringtun.
//!
//! # Engines
//!
//! | engine | handshake and sessions | data messages |
//! |---|---|---|
//! | `batch` | ours (`batch`) | everything that one read of the TUN returned is sealed together, and everything that was received together is opened together, in place |
//! | `boringtun` | boringtun (`single`) | one at a time, through a copy |
//!
//! Both are behind [`Session`], and a node uses one of them for all its peers ([`Engine`]). boringtun
//! judges initiations for both ([`Secrets::admit`]), and is what the batch engine is tested against.
//!
//! # Contract
//!
//! - An engine does no I/O. It seals into a [`Sink`] and opens in [`Buffers`] that the caller owns. It
//!   decides neither when to start a first handshake nor where a message goes.
//! - Batches cross this seam ([`Session::seal`], [`Session::open`]). The sink and the segments are
//!   generic: nothing is called indirectly per packet.
//! - The batch engine only notes in [`Unsealed`] what must be sealed. The owner of the send buffer
//!   calls [`Unsealed::seal`] before it sends, and sends nothing if that fails.
//! - No message from outside causes a panic. Each that is not used has a [`Refusal`], which the
//!   caller counts. boringtun logs handshakes at `debug` and timers up to `error`, so a subscriber
//!   should disable the target `boringtun`.
//! - Time and randomness are arguments ([`Inputs`]). boringtun reads the clock by itself, so this
//!   package cannot be part of the core.
//!
//! # Files
//!
//! | file | owns |
//! |---|---|
//! | `admission` | the node's key, and which initiations are processed |
//! | `engine` | the choice of the engine |
//! | `session` | the seam: the handshake and the sessions with one peer |
//! | `single` | the engine on boringtun |
//! | `batch` | the batch engine |
//! | `inputs` | time and randomness of a call |
//! | `message` | lengths and kinds of messages |
//! | `seam` | how the caller supplies plaintext, space for messages, and received messages |
//! | `unsealed` | messages in a send buffer that are not sealed yet |
//! | `refusal` | why a message is not used |
//! | `results` | results of the calls of a session |
//! | `internals` | established sessions, for tests and benchmarks |
//! | `conformance`, `differential`, `defects` | tests of both engines |

#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing)]

mod admission;
mod batch;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod defects;
#[cfg(test)]
mod differential;
mod engine;
mod inputs;
#[doc(hidden)]
pub mod internals;
mod message;
mod refusal;
mod results;
mod seam;
mod session;
mod single;
mod unsealed;

pub use admission::{Admission, Secrets};
pub use batch::timestamp::InitiationHistory;
pub use engine::{Engine, EngineChoice};
pub use inputs::Inputs;
pub use message::{DATA_HEADER, DATA_OVERHEAD, HANDSHAKE_BYTES, MessageKind, PADDING};
pub use refusal::Refusal;
pub use results::{Answered, Opened, Sealed, Tick};
pub use seam::{Buffers, Message, Scratch, Segments, Single, Sink};
pub use session::Session;
pub use towline_aead::Aead;
pub use unsealed::Unsealed;
