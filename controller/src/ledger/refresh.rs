//! Changes that another controller stored: only the changed records are verified and decoded.

use towline_registry::{Key, Now, Refreshed};

use super::{Ledger, LedgerChanges, ReadError, Statements, later};
use crate::map::MapChange;
use crate::store::Write;
use crate::stored::{self, key_text};

impl Ledger {
    /// Takes over records that another controller wrote, and returns what watchers and operators see of them. A
    /// deleted record has no value. All changes of this ledger must have been taken and stored before.
    ///
    /// # Errors
    ///
    /// If a record is invalid, or if the records are not all that changed: the sum over all records tells. The
    /// ledger must be loaded again then.
    pub fn refresh(&mut self, written: &[Write], now: Now) -> Result<LedgerChanges, ReadError> {
        let authority = self.authority.clone();
        let secret = authority.store_secret();
        let (mut refreshed, mut keys) = (Refreshed::default(), Vec::new());
        let mut sum = None;
        for (name, value) in written {
            let invalid = |why: String| ReadError::Invalid { key: name.clone(), why };
            let key =
                stored::parse_key(name).ok_or_else(|| invalid("its key is unknown".into()))?;
            self.count(name, value.as_deref());
            keys.push(key);
            let Some(value) = value else {
                match key {
                    Key::Node(id) => refreshed.absent.push(id),
                    Key::Token(id) => refreshed.tokens.push((id, None)),
                    Key::Admin(key) => refreshed.admins.push((key, None)),
                    Key::Counters | Key::Mesh | Key::LastSeen | Key::RemovedNode(_) => {
                        return Err(invalid("it was deleted".into()));
                    }
                }
                continue;
            };
            let opened = secret.open(name, value).map_err(|error| invalid(error.to_string()))?;
            // The sum is under the current key.
            self.must_rewrite |= opened.key != Some(secret.current());
            let body = opened.body;
            match key {
                Key::Counters => {
                    let (counters, stored_sum) = stored::decode_counters(body).map_err(invalid)?;
                    refreshed.counters = Some(counters);
                    sum = Some(stored_sum);
                }
                Key::Mesh => {
                    let (mesh, signed) = stored::decode_mesh(&authority, body).map_err(invalid)?;
                    refreshed.mesh = Some(mesh);
                    self.mesh = signed;
                }
                Key::LastSeen => {
                    for (node, time) in stored::decode_last_seen(body).map_err(invalid)? {
                        later(&mut self.last_seen, node, time);
                    }
                }
                Key::Node(id) => {
                    let node = stored::decode_node(&authority, id, body, now).map_err(invalid)?;
                    refreshed.members.push(node.member);
                    self.nodes.insert(id, Statements { grant: node.grant, record: node.record });
                }
                Key::RemovedNode(id) => {
                    let (removed, signed) =
                        stored::decode_removed_node(&authority, id, body).map_err(invalid)?;
                    refreshed.removed_nodes.push(removed);
                    self.tombstones.insert(id, signed);
                    // A reader of what changed may not see the deleted record of the node.
                    self.count(&key_text(Key::Node(id)), None);
                    keys.push(Key::Node(id));
                }
                Key::Token(id) => {
                    let token = stored::decode_token(id, body).map_err(invalid)?;
                    refreshed.tokens.push((id, Some(token)));
                }
                Key::Admin(key) => {
                    let admin = stored::decode_admin(key, body).map_err(invalid)?;
                    refreshed.admins.push((key, Some(admin)));
                }
            }
        }
        // Every commit writes the counters.
        if !written.is_empty() && sum != Some(self.sum) {
            return Err(ReadError::Mixed);
        }
        self.registry.refresh(refreshed)?;
        for key in &keys {
            if let Key::Node(id) = key
                && self.registry.member(*id).is_err()
            {
                self.nodes.remove(id);
                self.last_seen.remove(id);
            }
        }
        if keys.contains(&Key::LastSeen) {
            let nodes = &self.nodes;
            self.last_seen.retain(|node, time| *time > 0 && nodes.contains_key(node));
        }
        let mut changes = LedgerChanges::default();
        for key in keys {
            changes.map.extend(self.map_change(key));
            changes.view.extend(self.view_change(key));
        }
        let noted = self.registry.take_changes().problems;
        changes.view.extend(noted.into_iter().filter_map(|node| self.view_change(Key::Node(node))));
        changes.map.sort_by_key(MapChange::revision);
        Ok(changes)
    }
}
