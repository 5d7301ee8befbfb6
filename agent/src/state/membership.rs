//! Membership of a mesh: the statements that the CA signed for this node, verified.

use rustls_pki_types::CertificateDer;
use towline_proto::id::{IdentityKey, NodeName};
use towline_proto::node::{Grant, MeshConfig};
use towline_proto::token::ControllerAddress;
use towline_proto::{pb, signed};
use towline_service::certificate;

use super::Keys;
use crate::map_cache::MapCache;

/// Membership of a mesh, as a join returns it: the statements that the CA signed for this node.
#[derive(Debug, Clone)]
pub struct Membership {
    /// Pinned certificate of the CA.
    pub ca: CertificateDer<'static>,
    /// Public key of the CA, from its certificate.
    pub ca_key: IdentityKey,
    /// Addresses of the controllers from the join token. Those of the mesh's configuration come
    /// first.
    pub controllers: Vec<ControllerAddress>,
    /// Grant of this node.
    pub grant: Grant,
    /// The signed form of `grant`.
    pub signed_grant: pb::Signed,
    /// Configuration of the mesh.
    pub mesh: MeshConfig,
    /// The signed form of `mesh`.
    pub signed_mesh: pb::Signed,
}

/// Error of verifying a membership.
#[derive(Debug, thiserror::Error)]
pub enum InvalidMembership {
    /// The CA certificate contains no Ed25519 key.
    #[error("the CA certificate contains no Ed25519 key")]
    Ca,
    /// The grant or the configuration is not what this machine asked for.
    #[error("the {0} is not the one that this machine asked for")]
    Other(&'static str),
    /// A statement is not signed by the CA, or is malformed.
    #[error(transparent)]
    Untrusted(#[from] signed::Untrusted),
}

impl Membership {
    /// Creates a membership. Verifies both statements with the CA's key.
    pub fn new(
        ca: CertificateDer<'static>,
        controllers: Vec<ControllerAddress>,
        signed_grant: pb::Signed,
        signed_mesh: pb::Signed,
    ) -> Result<Self, InvalidMembership> {
        let ca_key = certificate::public_key(&ca).ok_or(InvalidMembership::Ca)?;
        let grant = signed::grant(Some(&signed_grant), &ca_key)?;
        let mesh = signed::mesh(Some(&signed_mesh), &ca_key)?;
        Ok(Self { ca, ca_key, controllers, grant, signed_grant, mesh, signed_mesh })
    }

    /// Checks that the grant is for this machine: its name, its keys, and the mesh of the configuration.
    pub fn check_own(&self, name: &NodeName, keys: &Keys) -> Result<(), InvalidMembership> {
        let Grant { mesh_id, identity_key, wireguard_keys, .. } = &self.grant;
        let other = [
            ("mesh of the grant", *mesh_id == self.mesh.mesh_id),
            ("name in the grant", self.grant.name == *name),
            ("identity key in the grant", *identity_key == keys.identity.public()),
            ("WireGuard key in the grant", *wireguard_keys == [keys.wireguard.public()]),
        ]
        .into_iter()
        .find(|(_, is_ours)| !is_ours);
        other.map_or(Ok(()), |(what, _)| Err(InvalidMembership::Other(what)))
    }

    /// Takes over the mesh configuration of the map if it is newer. Returns whether it was.
    pub fn update(&mut self, map: &MapCache) -> bool {
        let Some((signed, mesh)) = map.mesh() else { return false };
        if !mesh.is_newer_than(&self.mesh) {
            return false;
        }
        (self.mesh, self.signed_mesh) = (mesh.clone(), signed.clone());
        true
    }
}
