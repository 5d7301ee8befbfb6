//! What a mesh knows of its nodes, as plain values.
//!
//! `towline-proto` makes [`Grant`], [`Record`], [`Tombstone`] and [`MeshConfig`] from messages, after it
//! checked their bounds and their signatures. A [`Node`] is a grant with a record that the grant
//! allows: code that has one need not check it again.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::id::{IdentityKey, Label, MeshId, NodeId, NodeName, WireguardKey};

/// Who a node is and what it may announce. Signed by the CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The mesh that the grant holds in.
    pub mesh_id: MeshId,
    /// The node.
    pub node_id: NodeId,
    /// Its name, unique in the mesh.
    pub name: NodeName,
    /// The key that signs its records and its TLS handshakes.
    pub identity_key: IdentityKey,
    /// The keys of its tunnels; at least one.
    pub wireguard_keys: Vec<WireguardKey>,
    /// Its own addresses in the mesh.
    pub overlay: OverlayAddresses,
    /// Networks that it may announce, whole or in part.
    pub allowed_prefixes: Vec<IpNet>,
    /// Where it stands; nodes of one site share a LAN.
    pub site: Option<Label>,
    /// What its operator says of it.
    pub labels: BTreeMap<Label, String>,
    /// Seconds since 1970.
    pub issued_at: i64,
    /// Removed when it stays away for longer than the mesh's lease.
    pub ephemeral: bool,
}

impl Grant {
    /// Whether the node may announce `prefix`: it lies inside an allowed one.
    pub fn allows(&self, prefix: &IpNet) -> bool {
        self.allowed_prefixes.iter().any(|allowed| allowed.contains(prefix))
    }
}

/// A node's own addresses in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OverlayAddresses {
    /// Inside [`MeshConfig::overlay_v6`].
    pub v6: Ipv6Addr,
    /// Inside [`MeshConfig::overlay_v4`].
    pub v4: Ipv4Addr,
}

impl OverlayAddresses {
    /// Both, the IPv6 one first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        [IpAddr::V6(self.v6), IpAddr::V4(self.v4)].into_iter()
    }

    /// Both as host prefixes (/128 and /32).
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> {
        self.iter().map(IpNet::from)
    }
}

/// How a candidate was learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CandidateKind {
    /// An address of the node's own interfaces.
    Local,
    /// The address that a reflector saw the node's packets come from.
    Reflexive,
    /// Named in the node's configuration.
    Configured,
    /// A relay's address for the node.
    Relayed,
}

impl fmt::Display for CandidateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Local => "local",
            Self::Reflexive => "reflexive",
            Self::Configured => "configured",
            Self::Relayed => "relayed",
        })
    }
}

/// An address and port at which a node might be reached over UDP.
///
/// Never multicast, unspecified or with port 0; an IPv4-mapped IPv6 address is kept as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Candidate {
    kind: CandidateKind,
    address: SocketAddr,
}

impl Candidate {
    /// `None` for an address that no datagram can be sent to.
    pub fn new(kind: CandidateKind, address: SocketAddr) -> Option<Self> {
        let ip = address.ip().to_canonical();
        let broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
        if address.port() == 0 || ip.is_unspecified() || ip.is_multicast() || broadcast {
            return None;
        }
        Some(Self { kind, address: SocketAddr::new(ip, address.port()) })
    }

    /// How it was learned.
    pub fn kind(&self) -> CandidateKind {
        self.kind
    }

    /// Where to send to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// What a node says of itself. Signed by its identity key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The node.
    pub node_id: NodeId,
    /// Grows with every change; the higher one wins.
    pub generation: u64,
    /// Grows with every start of the agent.
    pub boot_epoch: u64,
    /// The keys of its tunnels, each one granted; at least one.
    pub wireguard_keys: Vec<WireguardKey>,
    /// Where it might be reached.
    pub candidates: Vec<Candidate>,
    /// Networks that are reached through it, besides its overlay addresses.
    pub prefixes: Vec<IpNet>,
    /// Towline version of its agent.
    pub version: String,
    /// Forwards sealed datagrams between nodes that have no direct path.
    pub relay: bool,
}

/// A node of the mesh: a grant and a record that stands under it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    grant: Grant,
    record: Record,
}

/// Why a record does not stand under a grant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotGranted {
    /// The two speak of different nodes.
    #[error("the record of node {record} came with the grant of node {grant}")]
    OtherNode {
        /// Whose grant.
        grant: NodeId,
        /// Whose record.
        record: NodeId,
    },
    /// A WireGuard key that the grant does not name.
    #[error("WireGuard key {0} is not granted: join again with a new token")]
    Key(WireguardKey),
    /// A prefix outside the granted ones.
    #[error("prefix {0} is not granted: create the token with --prefix {0}, or a wider one")]
    Prefix(IpNet),
}

impl Node {
    /// Joins a grant and a record, if the record says nothing that the grant does not allow.
    pub fn new(grant: Grant, record: Record) -> Result<Self, NotGranted> {
        if grant.node_id != record.node_id {
            return Err(NotGranted::OtherNode { grant: grant.node_id, record: record.node_id });
        }
        if let Some(key) = record.wireguard_keys.iter().find(|k| !grant.wireguard_keys.contains(k))
        {
            return Err(NotGranted::Key(*key));
        }
        if let Some(prefix) = record.prefixes.iter().find(|p| !grant.allows(p)) {
            return Err(NotGranted::Prefix(*prefix));
        }
        Ok(Self { grant, record })
    }

    /// The same node, less those of its prefixes that another one holds.
    #[must_use]
    pub fn without(mut self, withheld: &[IpNet]) -> Self {
        self.record.prefixes.retain(|prefix| !withheld.contains(prefix));
        self
    }

    /// Its id.
    pub fn id(&self) -> NodeId {
        self.grant.node_id
    }

    /// Its name.
    pub fn name(&self) -> &NodeName {
        &self.grant.name
    }

    /// The CA's word on it.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// Its own word.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The key of its tunnel.
    pub fn wireguard_key(&self) -> WireguardKey {
        self.record.wireguard_keys[0]
    }
}

/// A node that is no longer one. Signed by the CA; only this removes a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tombstone {
    /// The mesh that it holds in.
    pub mesh_id: MeshId,
    /// The node that was.
    pub node_id: NodeId,
    /// The name that it had.
    pub name: NodeName,
    /// Its key, which never joins again.
    pub identity_key: IdentityKey,
    /// Seconds since 1970.
    pub removed_at: i64,
}

/// What holds for every node of a mesh. Signed by the CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshConfig {
    /// The mesh.
    pub mesh_id: MeshId,
    /// The unique local /64 (RFC 4193) of the overlay.
    pub overlay_v6: Ipv6Net,
    /// The IPv4 range of the overlay.
    pub overlay_v4: Ipv4Net,
    /// Ranges inside which an address without an owner is unreachable.
    pub protected: Vec<IpNet>,
    /// How long a node may be offline before a live, granted one may take over its prefixes.
    pub lease: Duration,
    /// Sites whose nodes reach each other's node IPs outside the tunnel. Both ends decide by
    /// their grants, which name the site, so that they always agree.
    pub trusted_sites: Vec<Label>,
    /// Ranges in which what a node announces is reached in clear while the tunnel to it is down.
    pub bypass_when_down: Vec<IpNet>,
    /// Grows with every change.
    pub generation: u64,
}

impl MeshConfig {
    /// The overlay's two ranges and the protected ones: what is guarded on every node.
    pub fn guarded(&self) -> impl Iterator<Item = IpNet> {
        [IpNet::V6(self.overlay_v6), IpNet::V4(self.overlay_v4)]
            .into_iter()
            .chain(self.protected.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> Grant {
        Grant {
            mesh_id: MeshId([1; 16]),
            node_id: NodeId([2; 16]),
            name: "worker-1".parse().unwrap(),
            identity_key: IdentityKey([3; 32]),
            wireguard_keys: vec![WireguardKey([4; 32])],
            overlay: OverlayAddresses {
                v6: "fd00::1".parse().unwrap(),
                v4: [198, 19, 0, 1].into(),
            },
            allowed_prefixes: vec!["10.244.0.0/16".parse().unwrap()],
            site: None,
            labels: BTreeMap::new(),
            issued_at: 0,
            ephemeral: false,
        }
    }

    fn record() -> Record {
        Record {
            node_id: NodeId([2; 16]),
            generation: 1,
            boot_epoch: 1,
            wireguard_keys: vec![WireguardKey([4; 32])],
            candidates: Vec::new(),
            prefixes: vec!["10.244.3.0/24".parse().unwrap()],
            version: String::new(),
            relay: false,
        }
    }

    #[test]
    fn a_record_stands_only_under_its_own_grant() {
        assert!(Node::new(grant(), record()).is_ok());

        let other = Record { node_id: NodeId([9; 16]), ..record() };
        assert!(matches!(Node::new(grant(), other), Err(NotGranted::OtherNode { .. })));

        let key = Record { wireguard_keys: vec![WireguardKey([5; 32])], ..record() };
        assert!(matches!(Node::new(grant(), key), Err(NotGranted::Key(_))));

        let wide = Record { prefixes: vec!["10.0.0.0/8".parse().unwrap()], ..record() };
        assert!(matches!(Node::new(grant(), wide), Err(NotGranted::Prefix(_))));
    }

    #[test]
    fn a_candidate_can_be_sent_to() {
        let local = |text: &str| Candidate::new(CandidateKind::Local, text.parse().unwrap());
        assert!(local("192.0.2.1:51830").is_some());
        assert!(local("192.0.2.1:0").is_none());
        assert!(local("0.0.0.0:1").is_none());
        assert!(local("224.0.0.1:1").is_none());
        assert!(local("255.255.255.255:1").is_none());
        assert!(local("[ff02::1]:1").is_none());
        let mapped = local("[::ffff:192.0.2.1]:7").unwrap();
        assert_eq!(mapped.address(), "192.0.2.1:7".parse().unwrap());
    }
}
