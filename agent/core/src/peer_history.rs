//! What happened to a peer lately: its changes of state and of path, with the reason of each.

use std::collections::VecDeque;
use std::time::Instant;

use towline_types::codes;

use crate::path::Path;
use crate::status::PeerState;

/// Number of changes that are kept for each peer, the newest ones.
const KEPT: usize = 32;

/// One change of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerChange {
    /// Time of the change.
    pub at: Instant,
    /// What changed.
    pub what: Changed,
}

/// What changed about a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// Its state.
    State {
        /// State until then.
        from: PeerState,
        /// State from then on.
        to: PeerState,
    },
    /// The path that its traffic takes while it is up.
    Path {
        /// Path until then; `None`: none was known.
        from: Option<Path>,
        /// Path from then on; `None`: none is known.
        to: Option<Path>,
        /// Reason of the change.
        reason: PathChange,
    },
}

/// Reason why the traffic of a peer takes another path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathChange {
    /// A handshake completed on the path: while there was none, or since the peer chose it.
    Handshake,
    /// A handshake completed on a path that is of a better kind, or clearly faster, or was when it began.
    Better,
    /// Datagrams of the peer arrive from there.
    Roamed,
    /// The path before did not answer, and this one does.
    Silent,
    /// The path before left from an address that this host no longer has.
    AddressGone,
    /// Datagrams leave from another UDP port.
    PortChanged,
    /// The peer has another WireGuard key, so nothing of its old tunnel holds.
    KeyChanged,
}

codes! {
    PathChange {
        Handshake => "path-by-handshake",
        Better => "path-better",
        Roamed => "path-by-roaming",
        Silent => "path-silent",
        AddressGone => "path-address-gone",
        PortChanged => "path-port-changed",
        KeyChanged => "path-key-changed",
    }
}

impl std::fmt::Display for PathChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Handshake => "a handshake completed there",
            Self::Better => "it is better than the previous path",
            Self::Roamed => "datagrams of the peer arrive from there",
            Self::Silent => "the previous path did not answer",
            Self::AddressGone => "the previous path left from an address that is gone",
            Self::PortChanged => "datagrams leave from another UDP port",
            Self::KeyChanged => "the peer has another WireGuard key",
        })
    }
}

/// The newest changes of one peer, the oldest first. At most [`KEPT`].
#[derive(Debug, Default)]
pub(crate) struct PeerHistory {
    changes: VecDeque<PeerChange>,
}

impl PeerHistory {
    /// Adds a change, and forgets the oldest one if there are too many.
    pub(crate) fn add(&mut self, at: Instant, what: Changed) {
        if self.changes.len() == KEPT {
            self.changes.pop_front();
        }
        self.changes.push_back(PeerChange { at, what });
    }

    /// Returns the changes, the oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &PeerChange> {
        self.changes.iter()
    }
}
