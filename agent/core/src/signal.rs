//! What two nodes tell each other to find a path, sealed end to end for the pair.
//!
//! A signal goes through the controller, or as a frame of its own over a path that works already
//! (a relay channel), so that two nodes meet also while the controller is away.

use towline_types::node::Candidate;

/// A word to one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signal {
    /// "Call me at these addresses now; I am calling you at yours."
    CallMe {
        /// Of the sender's boot: it grows with every signal of that boot, so one that is replayed or
        /// overtaken is told by it.
        boot_epoch: u64,
        /// See `boot_epoch`.
        number: u64,
        /// Where the sender might be reached now; at most `limits::CANDIDATES`.
        candidates: Vec<Candidate>,
    },
}
