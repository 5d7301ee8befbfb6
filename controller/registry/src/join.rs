//! Admission of a node with a join token.

use towline_types::id::{IdentityKey, NodeId, NodeName, TokenId, WireguardKey};
use towline_types::limits;
use towline_types::node::{Grant, OverlayAddresses};

use super::problems::NodeProblem;
use super::sessions::Sessions;
use super::token::SecretHash;
use super::{Event, JoinError, Key, Member, Now, Registry, TokenUnknown, Unsigned, address};

/// A request to join. The caller has verified that the machine holds both private keys.
#[derive(Debug, Clone)]
pub struct Join {
    /// Id of the token.
    pub token: TokenId,
    /// Hash of the secret that the machine has.
    pub secret_hash: SecretHash,
    /// Name that the node requests.
    pub name: NodeName,
    /// Key that will sign the node's records.
    pub identity_key: IdentityKey,
    /// Public key of the node's WireGuard tunnel.
    pub wireguard_key: WireguardKey,
    /// Random id that the node gets if it is admitted.
    pub node_id: NodeId,
}

impl Registry {
    /// Admits a node and returns its id. A repeated request with the same token, keys and name
    /// returns the same node, for an agent that was killed before it could save the response.
    pub fn join(
        &mut self,
        join: &Join,
        sessions: &Sessions,
        now: Now,
    ) -> Result<NodeId, JoinError> {
        let id = join.token;
        let token = self.tokens.get(&id).ok_or(TokenUnknown { token: id })?;
        if token.secret_hash != join.secret_hash {
            return Err(JoinError::TokenSecret { token: id });
        }
        if token.revoked {
            return Err(JoinError::TokenRevoked { token: id });
        }
        if let Some(member) = self.joined_before(join) {
            return Ok(member.grant.node_id);
        }
        token.admits(&join.name, now.unix)?;
        let terms = token.terms.clone();
        let replaced = terms.replace.as_ref().and_then(|name| self.members.by_name(name));
        self.check_unique(join, replaced)?;
        let freed = usize::from(replaced.is_some());
        if self.members.len() - freed >= limits::NODES {
            return Err(JoinError::MeshFull);
        }
        let (overlay, v4_cursor) = match replaced.and_then(|node| self.members.get(node)) {
            // The machine is installed again, and files on it and elsewhere name its addresses.
            Some(member) => (member.grant.overlay, self.counters.v4_cursor),
            None => self.allocate(join.node_id)?,
        };

        // All checks have passed; nothing below can fail.
        if let Some(replaced) = replaced {
            let _ = self.remove(replaced, "replaced", sessions, now);
        }
        self.counters.v4_cursor = v4_cursor;
        if let Some(token) = self.tokens.get_mut(&id) {
            token.used += 1;
            self.dirty.insert(Key::Token(id));
        }
        let grant = Grant {
            mesh_id: self.mesh.config.mesh_id,
            node_id: join.node_id,
            name: join.name.clone(),
            identity_key: join.identity_key,
            wireguard_keys: vec![join.wireguard_key],
            overlay,
            allowed_prefixes: terms.allowed_prefixes,
            pod_ranges: terms.pod_ranges,
            shared: terms.shared,
            site: terms.site,
            labels: terms.labels,
            issued_at: now.unix,
            ephemeral: terms.ephemeral,
            ephemeral_after: terms.ephemeral_after,
            relay: terms.relay,
            control_plane: terms.control_plane,
        };
        self.members.insert(Member {
            grant,
            record: None,
            withheld: Vec::new(),
            revision: 0,
            token: id,
            joined_at: now.unix,
            known_since: now.mono,
        });
        self.unsigned.insert(Unsigned::Grant(join.node_id));
        self.touch(join.node_id);
        let name = join.name.clone();
        self.events.push(Event::Joined { name, node: join.node_id, token: id });
        Ok(join.node_id)
    }

    /// Returns the node that an earlier, identical request created.
    fn joined_before(&self, join: &Join) -> Option<&Member> {
        let member = self.members.get(self.members.by_identity(&join.identity_key)?)?;
        let same = member.token == join.token
            && member.grant.name == join.name
            && member.grant.wireguard_keys == [join.wireguard_key];
        same.then_some(member)
    }

    /// Checks that no node except the replaced one has the requested name or keys.
    fn check_unique(&mut self, join: &Join, replaced: Option<NodeId>) -> Result<(), JoinError> {
        if let Some(removed) = self.removed_identities.get(&join.identity_key) {
            let name =
                self.removed_nodes.get(removed).map(|removed| removed.tombstone.name.clone());
            return Err(JoinError::IdentityRemoved { name: name.unwrap_or(join.name.clone()) });
        }
        // Who took over the removed machine has the private key too, which opens what is sent to it.
        if let Some(removed) = self.removed_wireguard_keys.get(&join.wireguard_key) {
            let name =
                self.removed_nodes.get(removed).map(|removed| removed.tombstone.name.clone());
            return Err(JoinError::WireguardKeyRemoved { name: name.unwrap_or(join.name.clone()) });
        }
        if let Some(holder) = self.members.by_identity(&join.identity_key) {
            // This includes the replaced node: its identity key cannot join again.
            let name = self.members.get(holder).map(|member| member.grant.name.clone());
            let holder = name.unwrap_or(join.name.clone());
            return Err(JoinError::IdentityTaken { key: join.identity_key, holder });
        }
        let other = |holder: &NodeId| Some(*holder) != replaced;
        if let Some(holder) = self.members.by_name(&join.name).filter(other) {
            self.note(holder, NodeProblem::NameRequested { name: join.name.clone() });
            return Err(JoinError::NameTaken { name: join.name.clone(), holder });
        }
        if let Some(holder) = self.members.by_wireguard_key(&join.wireguard_key) {
            // As above: the replaced node is removed, and its key with it.
            self.note(holder, NodeProblem::KeyUsed { name: join.name.clone() });
            let name = self.members.get(holder).map(|member| member.grant.name.clone());
            let holder = name.unwrap_or(join.name.clone());
            return Err(JoinError::WireguardKeyTaken { key: join.wireguard_key, holder });
        }
        Ok(())
    }

    fn allocate(&self, node: NodeId) -> Result<(OverlayAddresses, u32), JoinError> {
        let config = &self.mesh.config;
        let v6 = address::v6(config.overlay_v6, node, |a| self.members.has_v6(a))
            .ok_or(JoinError::OverlayFull { family: "v6" })?;
        let (v4, cursor) =
            address::v4(config.overlay_v4, self.counters.v4_cursor, |a| self.members.has_v4(a))
                .ok_or(JoinError::OverlayFull { family: "v4" })?;
        Ok((OverlayAddresses { v6, v4 }, cursor))
    }
}
