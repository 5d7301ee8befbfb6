//! Removals of nodes that come from elsewhere than the watch, and the map on the disk.

use prost::Message as _;
use tokio::time::Instant;
use towline_proto::{pb, signed};

use super::Discovery;
use super::session::{Ended, Session};
use crate::map_journal;

/// Bytes that the journal of a small map may have before the map is written again.
const JOURNAL_BYTES: usize = 64 * 1024;

/// Size of the journal of the stored map.
#[derive(Debug, Default)]
pub(super) struct Journal {
    /// Epoch and revision of the stored map.
    position: map_journal::Position,
    /// Bytes in the journal.
    bytes: usize,
    /// Bytes from which on the whole map is written again; 0 if no map was stored since the start.
    limit: usize,
}

impl Journal {
    /// Creates the empty journal of a map that was stored in `bytes` bytes.
    fn of(position: map_journal::Position, bytes: usize) -> Self {
        Self { position, bytes: 0, limit: bytes.max(JOURNAL_BYTES) }
    }

    /// Adds an entry of this size. Returns whether it is the first one; `None` if the whole map has to be written.
    fn grow(&mut self, bytes: usize) -> Option<bool> {
        if self.bytes + bytes > self.limit {
            return None;
        }
        let is_first = self.bytes == 0;
        self.bytes += bytes;
        Some(is_first)
    }
}

impl Discovery {
    /// Takes the tombstone with which the controller refuses a removed node.
    pub(super) async fn take_tombstone(&mut self, status: &tonic::Status) -> Result<(), Ended> {
        if status.code() != tonic::Code::PermissionDenied || status.details().is_empty() {
            return Ok(());
        }
        let Ok(tombstone) = pb::Signed::decode(status.details()) else { return Ok(()) };
        if let Err(error) = signed::tombstone(Some(&tombstone), &self.membership.ca_key) {
            tracing::warn!(%error, "invalid tombstone of the controller ignored");
            return Ok(());
        }
        self.keep_removal(tombstone).await
    }

    /// Takes a tombstone that a peer sent, if the CA signed it and it is new.
    pub(super) async fn learn_removal(&mut self, tombstone: pb::Signed) -> Result<(), Ended> {
        let verified = match signed::tombstone(Some(&tombstone), &self.membership.ca_key) {
            Ok(verified) if verified.mesh_id == self.membership.grant.mesh_id => verified,
            Ok(_) | Err(_) => {
                tracing::debug!("invalid tombstone of a peer ignored");
                return Ok(());
            }
        };
        if self.map.is_removed(verified.node_id) {
            return Ok(());
        }
        tracing::info!(node = %verified.name, "removal of a node learned from a peer");
        self.keep_removal(tombstone).await
    }

    /// Applies a tombstone, and stores it immediately, so that it survives a restart.
    async fn keep_removal(&mut self, tombstone: pb::Signed) -> Result<(), Ended> {
        let tombstone = pb::change::Kind::Tombstone(tombstone);
        self.take_changes(pb::Changes::of([tombstone], 0)).await?;
        self.store_changes().await;
        Ok(())
    }

    /// Stores the map if a session changed it.
    pub(super) async fn save_map(&mut self, session: &mut Session) {
        session.map_saved = Instant::now();
        if std::mem::take(&mut session.map_dirty) {
            self.store_changes().await;
        }
    }

    /// Stores what changed in the map since it was stored last, on a blocking thread: in its journal, or with the
    /// whole map. Tombstones are on the disk afterwards. A failure is logged; the map in memory stays.
    async fn store_changes(&mut self) {
        let state = self.state.clone();
        if let Some((entry, has_tombstone)) = self.map.take_entry()
            && let Some(is_first) = self.journal.grow(entry.len())
        {
            let bytes = if is_first {
                [map_journal::begin(self.journal.position), entry].concat()
            } else {
                entry
            };
            let appending = move || state.append_map(&bytes, is_first, has_tombstone);
            match tokio::task::spawn_blocking(appending).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => tracing::debug!(%error, "map's journal not written"),
                Err(error) => tracing::debug!(%error, "map's journal not written"),
            }
        }
        let (state, encoded) = (self.state.clone(), self.map.take_whole());
        self.journal = Journal::of(self.map.position(), encoded.len());
        let written = tokio::task::spawn_blocking(move || state.store_map(&encoded)).await;
        if let Ok(Err(error)) = written {
            // Without the whole map on the disk, the journal would belong to nothing.
            self.journal = Journal::default();
            tracing::warn!(%error, "map not stored");
        }
    }
}
