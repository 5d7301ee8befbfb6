//! Messages of the map, whose changes are encoded one by one.

use bytes::Bytes;
use prost::Message;

use crate::convert::Invalid;
use crate::pb::{Change, Changes, change};

impl Change {
    /// Encodes a change.
    pub fn encoded(kind: change::Kind) -> Bytes {
        Self { kind: Some(kind) }.encode_to_vec().into()
    }
}

impl Changes {
    /// Creates the message with these changes. It is marked as synced.
    pub fn of(kinds: impl IntoIterator<Item = change::Kind>, revision: u64) -> Self {
        let changes = kinds.into_iter().map(Change::encoded).collect();
        Self { changes, revision, synced: true, head: None }
    }

    /// Decodes the changes one by one. Changes of an unknown kind are skipped, so that a newer
    /// controller can send them.
    pub fn kinds(&self) -> impl Iterator<Item = Result<change::Kind, Invalid>> {
        self.changes.iter().filter_map(|change| {
            let change = Change::decode(change.clone());
            change.map(|change| change.kind).map_err(|_| Invalid::Malformed("change")).transpose()
        })
    }
}
