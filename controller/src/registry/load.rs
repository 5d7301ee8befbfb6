//! Loading of the registry from its stored records. Every signature is verified again, so that an
//! altered store cannot forge grants, tombstones or records.

use std::sync::Arc;

use prost::Message;
use towline_proto::convert;
use towline_proto::id::{NodeId, TokenId};
use towline_proto::node::Node;
use towline_proto::signed;

use super::token::{SecretHash, Token};
use super::{Key, Member, Mesh, Registry, RemovedNode, stored};
use crate::authority::Authority;
use crate::clock::Now;

/// Error of loading the registry.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A required record is absent.
    #[error("its record `{0}` is missing")]
    Missing(&'static str),
    /// A record is malformed or its signature is invalid.
    #[error("its record `{key}` is not valid: {why}")]
    Invalid {
        /// Key of the record.
        key: String,
        /// Description of the error.
        why: String,
    },
}

impl Registry {
    /// Loads the registry from its records.
    pub fn load(
        authority: Arc<Authority>,
        records: Vec<(String, Vec<u8>)>,
        now: Now,
    ) -> Result<Self, LoadError> {
        let mut mesh = None;
        let mut meta = None;
        let mut rest = Vec::new();
        for (key, value) in records {
            let invalid = |why: String| LoadError::Invalid { key: key.clone(), why };
            match Key::parse(&key).ok_or_else(|| invalid("its key is unknown".into()))? {
                Key::Meta => meta = Some(decode::<stored::Meta>(&value).map_err(invalid)?),
                Key::Mesh => mesh = Some(load_mesh(&authority, &value).map_err(invalid)?),
                other => rest.push((key, other, value)),
            }
        }
        let mut registry = Self::empty(authority, mesh.ok_or(LoadError::Missing("mesh"))?);
        let meta = meta.ok_or(LoadError::Missing("meta"))?;
        registry.epoch = meta.epoch;
        registry.revision = meta.revision;
        registry.taken = meta.revision;
        registry.starts = meta.starts;
        registry.v4_cursor = meta.v4_cursor;
        for (key, parsed, value) in rest {
            registry
                .load_record(parsed, &value, now)
                .map_err(|why| LoadError::Invalid { key, why })?;
        }
        Ok(registry)
    }

    fn load_record(&mut self, key: Key, value: &[u8], now: Now) -> Result<(), String> {
        match key {
            Key::Meta | Key::Mesh => {}
            Key::Node(id) => self.load_node(id, value, now)?,
            Key::RemovedNode(id) => {
                let removed: stored::RemovedNode = decode(value)?;
                let key = self.authority.public_key();
                let tombstone = signed::tombstone(removed.tombstone.as_ref(), key).map_err(text)?;
                if tombstone.node_id != id {
                    return Err("it names another node".into());
                }
                self.removed_identities.insert(tombstone.identity_key, id);
                let signed = removed.tombstone.unwrap_or_default();
                self.removed_nodes
                    .insert(id, RemovedNode { tombstone, signed, revision: removed.revision });
            }
            Key::Token(id) => {
                let token: stored::Token = decode(value)?;
                let hash = SecretHash::from_bytes(&token.secret_hash).ok_or("it has no hash")?;
                let token = Token::from_pb(hash, token.token.unwrap_or_default()).map_err(text)?;
                if token.id != id {
                    return Err("it names another token".into());
                }
                self.tokens.insert(id, token);
            }
        }
        Ok(())
    }

    fn load_node(&mut self, id: NodeId, value: &[u8], now: Now) -> Result<(), String> {
        let node: stored::Node = decode(value)?;
        let grant =
            signed::grant(node.grant.as_ref(), self.authority.public_key()).map_err(text)?;
        if grant.node_id != id || grant.mesh_id != self.authority.mesh_id() {
            return Err("it names another node".into());
        }
        let record = match &node.record {
            None => None,
            Some(signed) => {
                let record = signed::record(Some(signed), &grant.identity_key).map_err(text)?;
                let node = Node::new(grant.clone(), record).map_err(text)?;
                Some((node.record().clone(), signed.clone()))
            }
        };
        let withheld = convert::prefixes(&node.withheld).map_err(text)?;
        let held = record.iter().flat_map(|(record, _)| &record.prefixes);
        for prefix in held.filter(|prefix| !withheld.contains(prefix)) {
            self.claims.hold(*prefix, id);
        }
        let taken = self.names.contains_key(&grant.name)
            || self.identities.contains_key(&grant.identity_key)
            || grant.wireguard_keys.iter().any(|key| self.wireguard_keys.contains_key(key))
            || self.overlay_v4.contains_key(&grant.overlay.v4)
            || self.overlay_v6.contains_key(&grant.overlay.v6);
        if taken {
            return Err("another node has its name, a key or an address".into());
        }
        let member = Member {
            grant,
            signed_grant: node.grant.unwrap_or_default(),
            record,
            withheld,
            revision: node.revision,
            token: TokenId::try_from(node.token.as_ref()).map_err(text)?,
            joined_at: node.joined_at,
            last_seen: node.last_seen,
            seen: now.mono,
        };
        self.index(id, member);
        Ok(())
    }
}

impl Key {
    fn parse(text: &str) -> Option<Self> {
        match text.split_once('/') {
            None if text == "meta" => Some(Self::Meta),
            None if text == "mesh" => Some(Self::Mesh),
            Some(("node", id)) => id.parse().ok().map(Self::Node),
            Some(("tombstone", id)) => id.parse().ok().map(Self::RemovedNode),
            Some(("token", id)) => id.parse().ok().map(Self::Token),
            _ => None,
        }
    }
}

fn load_mesh(authority: &Authority, value: &[u8]) -> Result<Mesh, String> {
    let mesh: stored::Mesh = decode(value)?;
    let config = signed::mesh(mesh.config.as_ref(), authority.public_key()).map_err(|_| {
        "it was not signed with this ca.key: store and key belong to different meshes".to_owned()
    })?;
    if config.mesh_id != authority.mesh_id() {
        return Err("it names another mesh".into());
    }
    Ok(Mesh { config, signed: mesh.config.unwrap_or_default(), revision: mesh.revision })
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, String> {
    M::decode(bytes).map_err(text)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
