//! Admission of a node with a join token.

use towline_proto::id::{IdentityKey, NodeId, NodeName, TokenId, WireguardKey};
use towline_proto::node::{Grant, OverlayAddresses};
use towline_proto::token::TokenSecret;
use towline_proto::{limits, pb};

use super::sessions::Sessions;
use super::{Event, Key, Member, Refusal, Registry, address};
use crate::clock::Now;

/// A request to join. The caller has verified that the machine holds both private keys.
#[derive(Debug, Clone)]
pub struct Join {
    /// Id of the token.
    pub token: TokenId,
    /// Secret of the token.
    pub secret: TokenSecret,
    /// Name that the node requests.
    pub name: NodeName,
    /// Key that will sign the node's records.
    pub identity_key: IdentityKey,
    /// Public key of the node's WireGuard tunnel.
    pub wireguard_key: WireguardKey,
    /// Random id that the node gets if it is admitted.
    pub node_id: NodeId,
}

/// Result of a join.
#[derive(Debug, Clone, PartialEq)]
pub struct Joined {
    /// Id of the node.
    pub node_id: NodeId,
    /// Signed grant of the node.
    pub grant: pb::Signed,
    /// Signed mesh configuration.
    pub mesh: pb::Signed,
}

impl Registry {
    /// Admits a node. A repeated request with the same token, keys and name returns the same node,
    /// for an agent that was killed before it could save the response.
    pub fn join(&mut self, join: &Join, sessions: &Sessions, now: Now) -> Result<Joined, Refusal> {
        let id = join.token;
        let token = self.tokens.get(&id).ok_or(Refusal::TokenUnknown { token: id })?;
        token.authenticate(&join.secret)?;
        if token.revoked {
            return Err(Refusal::TokenRevoked { token: id });
        }
        if let Some(member) = self.joined_before(join) {
            return Ok(self.answer(member));
        }
        token.admits(&join.name, now.unix)?;
        let terms = token.terms.clone();
        let replaced = terms.replace.as_ref().and_then(|name| self.names.get(name).copied());
        self.check_unique(join, replaced)?;
        let freed = usize::from(replaced.is_some());
        if self.nodes.len() - freed >= limits::NODES {
            return Err(Refusal::MeshFull);
        }
        let (overlay, v4_cursor) = self.allocate(join.node_id)?;

        // All checks have passed; nothing below can fail.
        if let Some(replaced) = replaced {
            let _ = self.remove(replaced, "replaced", sessions, now);
        }
        self.v4_cursor = v4_cursor;
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
            site: terms.site,
            labels: terms.labels,
            issued_at: now.unix,
            ephemeral: terms.ephemeral,
        };
        let member = Member {
            signed_grant: self.authority.sign_grant(&grant),
            grant,
            record: None,
            withheld: Vec::new(),
            revision: 0,
            token: id,
            joined_at: now.unix,
            last_seen: 0,
            seen: now.mono,
        };
        let joined = self.answer(&member);
        self.index(join.node_id, member);
        self.touch(join.node_id);
        let name = join.name.clone();
        self.events.push(Event::Joined { name, node: join.node_id, token: id });
        Ok(joined)
    }

    /// Returns the node that an earlier, identical request created.
    fn joined_before(&self, join: &Join) -> Option<&Member> {
        let member = self.nodes.get(self.identities.get(&join.identity_key)?)?;
        let same = member.token == join.token
            && member.grant.name == join.name
            && member.grant.wireguard_keys == [join.wireguard_key];
        same.then_some(member)
    }

    fn answer(&self, member: &Member) -> Joined {
        Joined {
            node_id: member.grant.node_id,
            grant: member.signed_grant.clone(),
            mesh: self.mesh.signed.clone(),
        }
    }

    /// Checks that no node except the replaced one has the requested name or keys.
    fn check_unique(&mut self, join: &Join, replaced: Option<NodeId>) -> Result<(), Refusal> {
        if let Some(removed) = self.removed_identities.get(&join.identity_key) {
            let name =
                self.removed_nodes.get(removed).map(|removed| removed.tombstone.name.clone());
            return Err(Refusal::IdentityRemoved { name: name.unwrap_or(join.name.clone()) });
        }
        if let Some(holder) = self.identities.get(&join.identity_key) {
            // This includes the replaced node: its identity key cannot join again.
            let name = self.nodes.get(holder).map(|member| member.grant.name.clone());
            let holder = name.unwrap_or(join.name.clone());
            return Err(Refusal::IdentityTaken { key: join.identity_key, holder });
        }
        let other = |holder: &&NodeId| Some(**holder) != replaced;
        if let Some(holder) = self.names.get(&join.name).filter(other).copied() {
            self.note(
                holder,
                None,
                format!("another machine tried to join as `{}` and was refused", join.name),
            );
            return Err(Refusal::NameTaken { name: join.name.clone(), holder });
        }
        if let Some(holder) = self.wireguard_keys.get(&join.wireguard_key).filter(other).copied() {
            self.note(
                holder,
                None,
                format!(
                    "a machine tried to join as `{}` with this node's WireGuard key",
                    join.name
                ),
            );
            let name = self.nodes.get(&holder).map(|member| member.grant.name.clone());
            let holder = name.unwrap_or(join.name.clone());
            return Err(Refusal::WireguardKeyTaken { key: join.wireguard_key, holder });
        }
        Ok(())
    }

    fn allocate(&self, node: NodeId) -> Result<(OverlayAddresses, u32), Refusal> {
        let config = &self.mesh.config;
        let v6 = address::v6(config.overlay_v6, node, |a| self.overlay_v6.contains_key(&a))
            .ok_or(Refusal::OverlayFull { family: "v6" })?;
        let (v4, cursor) =
            address::v4(config.overlay_v4, self.v4_cursor, |a| self.overlay_v4.contains_key(&a))
                .ok_or(Refusal::OverlayFull { family: "v4" })?;
        Ok((OverlayAddresses { v6, v4 }, cursor))
    }
}
