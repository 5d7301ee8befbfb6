//! Return of what a store lost: nodes that joined after the backup from which it was restored, or all nodes if
//! it is empty, and the newest configuration of the mesh.
//!
//! The CA signed the grants and the configuration, so who returns them can withhold, but not forge. A tombstone
//! always wins.

use towline_types::id::TokenId;
use towline_types::limits;
use towline_types::node::{Grant, MeshConfig};

use super::{Event, Key, Member, Mesh, NodeAbsent, Now, ReadmitError, Registry, Unsigned};

/// Token of a node that was readmitted: nobody knows with which one it joined.
const NO_TOKEN: TokenId = TokenId([0; 8]);

impl Registry {
    /// Adds a node that the registry does not know, with the grant that the CA signed for it earlier. The
    /// caller has verified the signature, and that the caller has the grant's identity key. Does nothing if
    /// the node is known.
    pub fn readmit(&mut self, grant: Grant, now: Now) -> Result<(), ReadmitError> {
        let id = grant.node_id;
        if self.members.contains(id) {
            return Ok(());
        }
        let removed = self.removed_identities.get(&grant.identity_key).copied();
        let removed = removed.or_else(|| self.removed_nodes.contains_key(&id).then_some(id));
        if removed.is_some() {
            return Err(NodeAbsent::Removed { node: id, name: grant.name }.into());
        }
        let config = &self.mesh.config;
        if grant.mesh_id != config.mesh_id {
            return Err(ReadmitError::OtherMesh);
        }
        if self.members.len() >= limits::NODES {
            return Err(ReadmitError::MeshFull);
        }
        let is_inside = config.overlay_v4.contains(&grant.overlay.v4)
            && config.overlay_v6.contains(&grant.overlay.v6);
        if !is_inside {
            return Err(ReadmitError::OutsideOverlay { name: grant.name });
        }
        // Nodes that join next get addresses after those of the nodes that returned.
        let offset = u32::from(grant.overlay.v4) - u32::from(config.overlay_v4.network());
        let name = grant.name.clone();
        let member = Member {
            joined_at: grant.issued_at,
            grant,
            record: None,
            withheld: Vec::new(),
            revision: 0,
            token: NO_TOKEN,
            known_since: now.mono,
        };
        if !self.members.insert(member) {
            return Err(ReadmitError::Taken { name });
        }
        self.counters.v4_cursor = self.counters.v4_cursor.max(offset);
        self.unsigned.insert(Unsigned::Grant(id));
        self.touch(id);
        self.events.push(Event::Readmitted { name, node: id });
        Ok(())
    }

    /// Takes over a configuration of the mesh that is newer than the registry's; any one while the mesh has no
    /// node, because then the registry's own is that of an empty store. The caller has verified the signature.
    /// Returns whether it was taken over. Overlay ranges in which nodes have addresses do not change.
    pub fn adopt_mesh(&mut self, config: MeshConfig) -> bool {
        let ours = &self.mesh.config;
        if config.mesh_id != ours.mesh_id {
            return false;
        }
        let is_empty = self.members.len() == 0;
        let same_overlays =
            (config.overlay_v6, config.overlay_v4) == (ours.overlay_v6, ours.overlay_v4);
        let is_ahead = config.is_ahead_of(ours);
        let config = MeshConfig {
            generation: config.generation.max(ours.generation),
            epoch: config.epoch.max(ours.epoch),
            ..config
        };
        if config == *ours || !(is_empty || is_ahead && same_overlays) {
            return false;
        }
        let generation = config.generation;
        let revision = self.next_revision();
        self.mesh = Mesh { config, revision };
        self.dirty.insert(Key::Mesh);
        self.unsigned.insert(Unsigned::Mesh);
        self.events.push(Event::MeshReturned { generation });
        true
    }
}
