//! Grants, records, tombstones and the mesh configuration, as plain values.
//!
//! `towline-proto` converts messages into [`Grant`], [`Record`], [`Tombstone`] and [`MeshConfig`]
//! after it checked their bounds and their signatures. A [`Node`] is a grant with a record that
//! the grant allows: code that has one need not check it again.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::codes;
use crate::id::{IdentityKey, Label, MeshId, NodeId, NodeName, WireguardKey};
use crate::limits;
use crate::pod_range::PodRange;
use crate::probe_version::ProbeVersion;
use crate::token::ControllerAddress;

/// Identity of a node and the prefixes that it may announce. Signed by the CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Mesh in which the grant is valid.
    pub mesh_id: MeshId,
    /// Id of the node.
    pub node_id: NodeId,
    /// Name of the node, unique in the mesh.
    pub name: NodeName,
    /// Key that signs the node's records and TLS handshakes.
    pub identity_key: IdentityKey,
    /// WireGuard keys of the node; at least one.
    pub wireguard_keys: Vec<WireguardKey>,
    /// Overlay addresses of the node.
    pub overlay: OverlayAddresses,
    /// Networks that the node may announce, whole or in part. The pinned blocks of `pod_ranges` are
    /// among them.
    pub allowed_prefixes: Vec<IpNet>,
    /// Networks of which the node may announce a few blocks.
    pub pod_ranges: Vec<PodRange>,
    /// Those of `allowed_prefixes` that other nodes of a group may announce at the same time.
    pub shared: Vec<SharedPrefix>,
    /// Site of the node, if it has one. Nodes of one site share a LAN.
    pub site: Option<Label>,
    /// Labels from the join token, set by the operator.
    pub labels: BTreeMap<Label, String>,
    /// Time at which the grant was issued, in seconds since 1970.
    pub issued_at: i64,
    /// True if the node is removed once it is offline for longer than [`Self::ephemeral_after`].
    pub ephemeral: bool,
    /// Time that an ephemeral node may be offline; `None`: [`MeshConfig::lease`].
    pub ephemeral_after: Option<Duration>,
    /// Whether the node may relay for others.
    pub relay: RelayRole,
    /// True if the node is a control-plane node of a Kubernetes cluster, whose API server others may use.
    pub control_plane: bool,
}

/// Whether a node may relay for others: a relay sees who talks to whom, and can drop what it forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum RelayRole {
    /// The grant was issued by a version before 0.2.0, which let any node relay. Such a relay is used
    /// in this version only, and shown to the operator.
    #[default]
    Undecided,
    /// The node may not relay. It is not used as a relay even if it claims to be one.
    Denied,
    /// The node may relay.
    Granted,
}

impl RelayRole {
    /// Returns the role that an operator decided.
    pub fn of(may_relay: bool) -> Self {
        if may_relay { Self::Granted } else { Self::Denied }
    }

    /// Returns the operator's decision; `None` if there is none.
    pub fn decision(self) -> Option<bool> {
        match self {
            Self::Undecided => None,
            Self::Denied => Some(false),
            Self::Granted => Some(true),
        }
    }
}

impl From<Option<bool>> for RelayRole {
    /// Returns the role for the decision of a grant or token; `None` if it contains none.
    fn from(decision: Option<bool>) -> Self {
        decision.map_or(Self::Undecided, Self::of)
    }
}

impl Grant {
    /// Returns whether the node may announce `prefix`: an allowed prefix must contain it.
    pub fn allows(&self, prefix: &IpNet) -> bool {
        self.allowed_prefixes.iter().any(|allowed| allowed.contains(prefix))
    }

    /// Returns the group of nodes that share exactly this prefix, if the node is in one.
    pub fn sharing(&self, prefix: &IpNet) -> Option<&Label> {
        self.shared.iter().find(|shared| shared.prefix == *prefix).map(|shared| &shared.group)
    }

    /// Returns the grant with the blocks pinned that a record with these prefixes needs. `None` if it
    /// needs no other blocks. A prefix for which there is no block left stays outside of the grant.
    pub fn pin(&self, announced: &[IpNet]) -> Option<Self> {
        let mut grant = self.clone();
        let mut is_changed = false;
        for prefix in announced {
            if !grant.allows(prefix) {
                is_changed |= grant.pin_block(prefix, announced);
            }
        }
        is_changed.then_some(grant)
    }

    /// Returns the pod range in whose blocks a prefix lies.
    pub fn pod_range(&self, prefix: &IpNet) -> Option<&PodRange> {
        self.pod_ranges.iter().find(|range| range.block_around(prefix).is_some())
    }

    /// Pins the block around a prefix that is not allowed yet. Returns false if none is left.
    fn pin_block(&mut self, prefix: &IpNet, announced: &[IpNet]) -> bool {
        for range in &mut self.pod_ranges {
            let Some(block) = range.block_around(prefix) else { continue };
            let Some(unused) = range.make_room(announced) else { continue };
            self.allowed_prefixes.retain(|allowed| Some(*allowed) != unused);
            if self.allowed_prefixes.len() >= limits::PREFIXES {
                continue;
            }
            range.pin(block);
            self.allowed_prefixes.push(block);
            return true;
        }
        false
    }
}

/// A prefix that all nodes of a group may announce at the same time, such as a LAN with two gateways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedPrefix {
    /// The prefix.
    pub prefix: IpNet,
    /// Name of the group. Nodes of one group have the same name for the same prefix.
    pub group: Label,
}

/// Overlay addresses of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OverlayAddresses {
    /// IPv6 address inside [`MeshConfig::overlay_v6`].
    pub v6: Ipv6Addr,
    /// IPv4 address inside [`MeshConfig::overlay_v4`].
    pub v4: Ipv4Addr,
}

impl OverlayAddresses {
    /// Returns both addresses, IPv6 first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        [IpAddr::V6(self.v6), IpAddr::V4(self.v4)].into_iter()
    }

    /// Returns both addresses as host prefixes (/128 and /32).
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> {
        self.iter().map(IpNet::from)
    }

    /// Returns whether a network is one of [`Self::prefixes`].
    pub fn contains_prefix(&self, net: &IpNet) -> bool {
        self.prefixes().any(|own| own == *net)
    }
}

/// Source of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CandidateKind {
    /// Address of one of the node's own interfaces.
    Local,
    /// Server-reflexive address: the source address that a STUN server saw.
    Reflexive,
    /// Address from the node's configuration.
    Configured,
    /// Address of a relay that forwards to the node.
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

/// Address and port at which a node might be reached over UDP.
///
/// The address is never multicast, broadcast or unspecified, and the port is never 0. An
/// IPv4-mapped IPv6 address is stored as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Candidate {
    /// Source of the candidate.
    kind: CandidateKind,
    /// Address and port.
    address: SocketAddr,
}

impl Candidate {
    /// Creates a candidate. Returns `None` for an address that no datagram can be sent to.
    pub fn new(kind: CandidateKind, address: SocketAddr) -> Option<Self> {
        let ip = address.ip().to_canonical();
        let broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
        if address.port() == 0 || ip.is_unspecified() || ip.is_multicast() || broadcast {
            return None;
        }
        Some(Self { kind, address: SocketAddr::new(ip, address.port()) })
    }

    /// Returns the candidate's source.
    pub fn kind(&self) -> CandidateKind {
        self.kind
    }

    /// Returns the address and port to send to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Data that a node publishes about itself. Signed by its identity key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Id of the node.
    pub node_id: NodeId,
    /// Version number of the record. It grows with every change; the highest one is valid.
    pub generation: u64,
    /// Number of the agent's start. It grows with every start.
    pub boot_epoch: u64,
    /// WireGuard keys of the node, each of them in its grant; at least one.
    pub wireguard_keys: Vec<WireguardKey>,
    /// Addresses at which the node might be reached.
    pub candidates: Vec<Candidate>,
    /// Networks that are reached through the node, in addition to its overlay addresses.
    pub prefixes: Vec<IpNet>,
    /// Towline version of the node's agent.
    pub version: String,
    /// True if the node is a relay: it forwards sealed datagrams between nodes that have no direct
    /// path. [`Node::is_relay`] tells whether it may.
    pub relay: bool,
    /// Those of `prefixes` that are networks of machines, such as a LAN, rather than of pods. Records of
    /// versions before 0.2.0 name none.
    pub lans: Vec<IpNet>,
    /// Version of the probes that the node's agent sends and accepts.
    pub probe_version: ProbeVersion,
    /// TCP port of the node's Kubernetes API server, if it has one. It counts only with the grant's role:
    /// read it with [`Node::api_port`].
    pub api_port: Option<NonZeroU16>,
}

/// A node of the mesh: a grant and a record that the grant allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    grant: Grant,
    record: Record,
    /// First key of the record.
    wireguard_key: WireguardKey,
}

/// Reason why a grant does not allow a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotGranted {
    /// Grant and record have different node ids.
    #[error("the record of node {record} came with the grant of node {grant}")]
    OtherNode {
        /// Node id of the grant.
        grant: NodeId,
        /// Node id of the record.
        record: NodeId,
    },
    /// The record has no WireGuard key.
    #[error("the record has no WireGuard key")]
    NoKey,
    /// The record has a WireGuard key that is not in the grant.
    #[error("WireGuard key {0} is not granted: join again with a new token")]
    Key(WireguardKey),
    /// The record has a prefix outside of the granted ones.
    #[error("prefix {0} is not granted: create the token with --prefix {0}, or a wider one")]
    Prefix(IpNet),
    /// The record has a block of a pod range, and the grant has no block left for it.
    #[error(
        "prefix {prefix} is not granted: the node has all blocks that it may have of {range}: create \
         the token with a larger --blocks"
    )]
    Block {
        /// Prefix of the record.
        prefix: IpNet,
        /// Pod range in which it lies.
        range: IpNet,
    },
}

codes! {
    NotGranted {
        OtherNode => "record-of-other-node",
        NoKey => "record-without-key",
        Key => "key-not-granted",
        Prefix => "prefix-not-granted",
        Block => "pod-blocks-used",
    }
}

impl Node {
    /// Combines a grant and a record.
    ///
    /// # Errors
    ///
    /// If the grant does not allow the record.
    pub fn new(grant: Grant, record: Record) -> Result<Self, NotGranted> {
        if grant.node_id != record.node_id {
            return Err(NotGranted::OtherNode { grant: grant.node_id, record: record.node_id });
        }
        if let Some(key) = record.wireguard_keys.iter().find(|k| !grant.wireguard_keys.contains(k))
        {
            return Err(NotGranted::Key(*key));
        }
        if let Some(prefix) = record.prefixes.iter().find(|p| !grant.allows(p)) {
            return Err(match grant.pod_range(prefix) {
                Some(range) => NotGranted::Block { prefix: *prefix, range: range.range() },
                None => NotGranted::Prefix(*prefix),
            });
        }
        let wireguard_key = *record.wireguard_keys.first().ok_or(NotGranted::NoKey)?;
        Ok(Self { grant, record, wireguard_key })
    }

    /// Returns the node without the prefixes in `withheld`, which another node holds.
    #[must_use]
    pub fn without(mut self, withheld: &[IpNet]) -> Self {
        self.record.prefixes.retain(|prefix| !withheld.contains(prefix));
        self
    }

    /// Returns the node's id.
    pub fn id(&self) -> NodeId {
        self.grant.node_id
    }

    /// Returns the node's name.
    pub fn name(&self) -> &NodeName {
        &self.grant.name
    }

    /// Returns the node's grant.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// Returns the node's record.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Returns whether the node relays for others, and its grant does not deny it.
    pub fn is_relay(&self) -> bool {
        self.record.relay && self.grant.relay != RelayRole::Denied
    }

    /// Returns the TCP port of the node's Kubernetes API server, if the node announces one and its grant
    /// makes it a control-plane node.
    pub fn api_port(&self) -> Option<NonZeroU16> {
        self.record.api_port.filter(|_| self.grant.control_plane)
    }

    /// Returns the public key of the node's WireGuard tunnel.
    pub fn wireguard_key(&self) -> WireguardKey {
        self.wireguard_key
    }
}

/// Statement that a node was removed. Signed by the CA; only a tombstone removes a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tombstone {
    /// Mesh that the node was removed from.
    pub mesh_id: MeshId,
    /// Id of the removed node.
    pub node_id: NodeId,
    /// Name of the removed node.
    pub name: NodeName,
    /// Identity key of the removed node. It cannot join again.
    pub identity_key: IdentityKey,
    /// WireGuard keys of the removed node. No other node joins with one of them. Empty in a tombstone of an
    /// earlier version.
    pub wireguard_keys: Vec<WireguardKey>,
    /// Time of the removal, in seconds since 1970.
    pub removed_at: i64,
}

/// Configuration that is valid for every node of a mesh. Signed by the CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshConfig {
    /// Id of the mesh.
    pub mesh_id: MeshId,
    /// IPv6 range of the overlay: a unique local /64 (RFC 4193).
    pub overlay_v6: Ipv6Net,
    /// IPv4 range of the overlay.
    pub overlay_v4: Ipv4Net,
    /// Ranges in which an address that no node holds is unreachable instead of sent in clear.
    pub protected: Vec<IpNet>,
    /// Time that a node may be offline. After that, a node that is online and has a grant for its
    /// prefixes may take them over.
    pub lease: Duration,
    /// Sites whose nodes reach each other's node IPs outside of the tunnel. Both ends decide by the
    /// site in the grants, so that they always agree.
    pub trusted_sites: Vec<Label>,
    /// Ranges in which a node's announced prefixes are reached in clear while the tunnel to it is
    /// down.
    pub bypass_when_down: Vec<IpNet>,
    /// Addresses of the controllers, in the order in which agents try them. Empty: agents know only
    /// those of their join token.
    pub controllers: Vec<ControllerAddress>,
    /// Version number of the configuration. It grows with every change within an epoch.
    pub generation: u64,
    /// Epoch of the map in which the configuration was signed. A controller that was restored begins a new one.
    /// 0 if the controller does not say it (before 0.2.0).
    pub epoch: u64,
}

/// Statement of the newest change of the map that a controller showed. Signed by the CA. A node that has it proves to
/// a controller that was restored from a copy that there was a later history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Id of the mesh.
    pub mesh_id: MeshId,
    /// Epoch of the map.
    pub epoch: u64,
    /// Revision of the newest change.
    pub revision: u64,
}

impl Head {
    /// Returns the epoch and the revision, by which heads are ordered.
    pub fn position(&self) -> (u64, u64) {
        (self.epoch, self.revision)
    }
}

impl MeshConfig {
    /// Returns whether this configuration replaces another one: it is of a later epoch, or of the same one and has
    /// a higher generation. After a restored backup the generation is lower than before.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        (self.epoch, self.generation) > (other.epoch, other.generation)
    }

    /// Returns whether a controller that has the configuration `other` may have lost this one: it has a higher
    /// generation or is of a later epoch. In contrast to [`Self::is_newer_than`], one of an earlier epoch counts too:
    /// what was signed after a backup has a higher generation than the backup, and the controller that was restored
    /// from it has begun a later epoch.
    pub fn is_ahead_of(&self, other: &Self) -> bool {
        self.generation > other.generation || self.epoch > other.epoch
    }

    /// Returns the mesh's controllers, then those of `others` that are not among them.
    pub fn controllers_and(&self, others: &[ControllerAddress]) -> Vec<ControllerAddress> {
        let mut controllers = self.controllers.clone();
        for address in others {
            if !controllers.contains(address) {
                controllers.push(address.clone());
            }
        }
        controllers
    }

    /// Returns both overlay ranges, IPv6 first.
    pub fn overlays(&self) -> [IpNet; 2] {
        [IpNet::V6(self.overlay_v6), IpNet::V4(self.overlay_v4)]
    }

    /// Returns the ranges that every node guards: both overlay ranges and the protected ones.
    pub fn guarded(&self) -> impl Iterator<Item = IpNet> {
        self.overlays().into_iter().chain(self.protected.iter().copied())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns a grant of a worker, for the tests of this package.
    pub(crate) fn grant() -> Grant {
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
            pod_ranges: Vec::new(),
            shared: Vec::new(),
            site: None,
            labels: BTreeMap::new(),
            issued_at: 0,
            ephemeral: false,
            ephemeral_after: None,
            relay: RelayRole::Granted,
            control_plane: false,
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
            lans: Vec::new(),
            probe_version: ProbeVersion::default(),
            api_port: None,
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
    fn only_a_whole_overlay_address_is_an_overlay_prefix() {
        let overlay = grant().overlay;
        assert!(overlay.prefixes().all(|net| overlay.contains_prefix(&net)));
        for other in ["198.19.0.2/32", "198.19.0.1/31", "198.19.0.0/16", "fd00::/64", "fd00::2/128"]
        {
            assert!(!overlay.contains_prefix(&other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn an_api_server_needs_the_role_in_the_grant() {
        let record = Record { api_port: NonZeroU16::new(6443), ..record() };
        let worker = Node::new(grant(), record.clone()).unwrap();
        assert_eq!(worker.api_port(), None);
        let grant = Grant { control_plane: true, ..grant() };
        assert_eq!(Node::new(grant, record).unwrap().api_port(), NonZeroU16::new(6443));
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
