//! Conversion of messages into plain types. No other module converts them, so every bound and
//! every form is checked once.
//!
//! `TryFrom<pb::X> for X` parses; `From<&X> for pb::X` is its inverse.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use ipnet::IpNet;
use prost::Message as _;

use crate::frame::ProbeVersion;
use crate::id::{InvalidId, Label, NodeName, WireguardKey};
use crate::limits;
use crate::node::{
    Candidate, CandidateKind, Grant, Head, MeshConfig, OverlayAddresses, Record, SharedPrefix,
    Tombstone,
};
use crate::pb;
use crate::pod_range::{InvalidPodRange, PodRange};
use crate::summary::{MeshSummary, PeerCounts, PeerSummary, Tunnel};
use crate::token::ControllerAddress;

/// Error of parsing a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The bytes do not decode as this message.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// A required field is absent.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field has more bytes or items than [`limits`] allows.
    #[error("{0} is too long")]
    TooLong(&'static str),
    /// A number is larger than [`limits`] allows.
    #[error("{0} is too large")]
    TooLarge(&'static str),
    /// An address has a wrong length, or cannot be used for its purpose.
    #[error("{0} is not a usable address")]
    Address(&'static str),
    /// A prefix has a wrong length, or host bits that are set.
    #[error("{0} is not a network")]
    Prefix(&'static str),
    /// A name, an id or a key has the wrong form.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// A pod range has numbers that do not fit.
    #[error(transparent)]
    PodRange(#[from] InvalidPodRange),
}

/// Checks that `len`, in items or bytes, is at most `limit`.
pub fn bounded(what: &'static str, len: usize, limit: usize) -> Result<(), Invalid> {
    if len > limit { Err(Invalid::TooLong(what)) } else { Ok(()) }
}

fn ip(what: &'static str, bytes: &[u8]) -> Result<IpAddr, Invalid> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        Ok(IpAddr::from(v4))
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        Ok(IpAddr::from(v6))
    } else {
        Err(Invalid::Address(what))
    }
}

fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

impl TryFrom<&pb::Prefix> for IpNet {
    type Error = Invalid;

    fn try_from(prefix: &pb::Prefix) -> Result<Self, Invalid> {
        let what = "prefix";
        let length = u8::try_from(prefix.length).map_err(|_| Invalid::Prefix(what))?;
        let net =
            IpNet::new(ip(what, &prefix.address)?, length).map_err(|_| Invalid::Prefix(what))?;
        if net.trunc() == net { Ok(net) } else { Err(Invalid::Prefix(what)) }
    }
}

impl From<&IpNet> for pb::Prefix {
    fn from(net: &IpNet) -> Self {
        Self { address: ip_bytes(net.network()), length: net.prefix_len().into() }
    }
}

/// Returns the number of bytes that a network takes each time that a record names it.
pub fn network_bytes(net: &IpNet) -> usize {
    // The number of the field and the length of the message take one byte each.
    2 + pb::Prefix::from(net).encoded_len()
}

/// Parses a list of at most [`limits::PREFIXES`] prefixes.
pub fn prefixes(list: &[pb::Prefix]) -> Result<Vec<IpNet>, Invalid> {
    bounded("list of prefixes", list.len(), limits::PREFIXES)?;
    list.iter().map(IpNet::try_from).collect()
}

/// Parses a list of at most [`limits::POD_RANGES`] pod ranges.
pub fn pod_ranges(list: &[pb::PodRange]) -> Result<Vec<PodRange>, Invalid> {
    bounded("list of pod ranges", list.len(), limits::POD_RANGES)?;
    list.iter().map(PodRange::try_from).collect()
}

/// Parses a list of shared prefixes, each of which must be in `allowed`.
pub fn shared_prefixes(
    list: &[pb::SharedPrefix],
    allowed: &[IpNet],
) -> Result<Vec<SharedPrefix>, Invalid> {
    let what = "shared prefix";
    bounded("list of shared prefixes", list.len(), limits::PREFIXES)?;
    let parse = |shared: &pb::SharedPrefix| {
        let prefix = IpNet::try_from(shared.prefix.as_ref().ok_or(Invalid::Missing(what))?)?;
        if !allowed.contains(&prefix) {
            return Err(Invalid::Prefix(what));
        }
        Ok(SharedPrefix { prefix, group: shared.group.parse()? })
    };
    list.iter().map(parse).collect()
}

/// Parses the name of a site. An empty one means no site.
pub fn site(text: String) -> Result<Option<Label>, Invalid> {
    if text.is_empty() { Ok(None) } else { Ok(Some(text.parse()?)) }
}

/// Parses a list of at most [`limits::TRUSTED_SITES`] trusted sites.
pub fn sites(list: Vec<String>) -> Result<Vec<Label>, Invalid> {
    bounded("list of sites", list.len(), limits::TRUSTED_SITES)?;
    list.iter().map(|text| Ok(text.parse()?)).collect()
}

/// Parses a list of at most [`limits::CONTROLLERS`] addresses of controllers.
pub fn controllers(list: &[String]) -> Result<Vec<ControllerAddress>, Invalid> {
    let what = "address of a controller";
    bounded("list of controllers", list.len(), limits::CONTROLLERS)?;
    list.iter().map(|text| text.parse().map_err(|_| Invalid::Address(what))).collect()
}

/// Parses a map of at most [`limits::LABELS`] labels.
pub fn labels(
    map: impl IntoIterator<Item = (String, String)>,
) -> Result<BTreeMap<Label, String>, Invalid> {
    let labels = map
        .into_iter()
        .take(limits::LABELS + 1)
        .map(|(key, value)| {
            bounded("value of a label", value.len(), limits::LABEL_VALUE_BYTES)?;
            Ok((key.parse()?, value))
        })
        .collect::<Result<BTreeMap<_, _>, Invalid>>()?;
    bounded("list of labels", labels.len(), limits::LABELS)?;
    Ok(labels)
}

/// Parses the port of an API server. 0 means that there is none.
fn port(number: u32) -> Result<Option<NonZeroU16>, Invalid> {
    let port = u16::try_from(number).map_err(|_| Invalid::Malformed("port of the API server"))?;
    Ok(NonZeroU16::new(port))
}

fn wireguard_keys<B: AsRef<[u8]>>(keys: &[B]) -> Result<Vec<WireguardKey>, Invalid> {
    bounded("list of WireGuard keys", keys.len(), limits::WIREGUARD_KEYS)?;
    if keys.is_empty() {
        return Err(Invalid::Missing("WireGuard key"));
    }
    keys.iter().map(|key| Ok(WireguardKey::try_from(key.as_ref())?)).collect()
}

fn id<T>(bytes: impl AsRef<[u8]>) -> Result<T, Invalid>
where
    T: for<'a> TryFrom<&'a [u8], Error = InvalidId>,
{
    Ok(T::try_from(bytes.as_ref())?)
}

/// Returns a duration of a message, in which 0 means none.
pub fn seconds(seconds: u32) -> Option<Duration> {
    (seconds != 0).then(|| Duration::from_secs(seconds.into()))
}

/// Returns a duration in whole seconds for a message, in which 0 means none.
pub fn whole_seconds(duration: Option<Duration>) -> u32 {
    duration.map_or(0, |duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX))
}

fn overlay<B: AsRef<[u8]>>(addresses: &[B]) -> Result<OverlayAddresses, Invalid> {
    let what = "overlay address";
    bounded("list of overlay addresses", addresses.len(), limits::OVERLAY_ADDRESSES)?;
    let (mut v4, mut v6) = (None, None);
    for address in addresses {
        match ip(what, address.as_ref())? {
            IpAddr::V4(ip) => v4 = Some(ip),
            IpAddr::V6(ip) => v6 = Some(ip),
        }
    }
    match (v6, v4) {
        (Some(v6), Some(v4)) => Ok(OverlayAddresses { v6, v4 }),
        _ => Err(Invalid::Missing(what)),
    }
}

impl TryFrom<&pb::PodRange> for PodRange {
    type Error = Invalid;

    fn try_from(range: &pb::PodRange) -> Result<Self, Invalid> {
        let net = IpNet::try_from(range.range.as_ref().ok_or(Invalid::Missing("range"))?)?;
        Ok(Self::new(net, range.block_len, range.blocks, prefixes(&range.pinned)?)?)
    }
}

impl From<&PodRange> for pb::PodRange {
    fn from(range: &PodRange) -> Self {
        Self {
            range: Some((&range.range()).into()),
            block_len: range.block_len().into(),
            blocks: range.blocks(),
            pinned: range.pinned().iter().map(Into::into).collect(),
        }
    }
}

impl From<&SharedPrefix> for pb::SharedPrefix {
    fn from(shared: &SharedPrefix) -> Self {
        Self { prefix: Some((&shared.prefix).into()), group: shared.group.to_string() }
    }
}

impl TryFrom<pb::Grant> for Grant {
    type Error = Invalid;

    fn try_from(grant: pb::Grant) -> Result<Self, Invalid> {
        let allowed_prefixes = prefixes(&grant.allowed_prefixes)?;
        let shared = shared_prefixes(&grant.shared, &allowed_prefixes)?;
        Ok(Self {
            mesh_id: id(&grant.mesh_id)?,
            node_id: id(&grant.node_id)?,
            name: NodeName::try_from(grant.name)?,
            identity_key: id(&grant.identity_key)?,
            wireguard_keys: wireguard_keys(&grant.wireguard_keys)?,
            overlay: overlay(&grant.overlay_addresses)?,
            allowed_prefixes,
            pod_ranges: pod_ranges(&grant.pod_ranges)?,
            shared,
            site: site(grant.site)?,
            labels: labels(grant.labels)?,
            issued_at: grant.issued_at,
            ephemeral: grant.ephemeral,
            ephemeral_after: seconds(grant.ephemeral_after_seconds),
            relay: grant.relay.into(),
            control_plane: grant.control_plane,
        })
    }
}

impl From<&Grant> for pb::Grant {
    fn from(grant: &Grant) -> Self {
        Self {
            mesh_id: grant.mesh_id.0.to_vec(),
            node_id: grant.node_id.0.to_vec(),
            name: grant.name.to_string(),
            identity_key: grant.identity_key.0.to_vec(),
            wireguard_keys: grant.wireguard_keys.iter().map(|key| key.0.to_vec()).collect(),
            overlay_addresses: grant.overlay.iter().map(ip_bytes).collect(),
            allowed_prefixes: grant.allowed_prefixes.iter().map(Into::into).collect(),
            pod_ranges: grant.pod_ranges.iter().map(Into::into).collect(),
            shared: grant.shared.iter().map(Into::into).collect(),
            site: grant.site.as_ref().map(Label::to_string).unwrap_or_default(),
            labels: grant.labels.iter().map(|(k, v)| (k.to_string(), v.clone())).collect(),
            issued_at: grant.issued_at,
            ephemeral: grant.ephemeral,
            ephemeral_after_seconds: whole_seconds(grant.ephemeral_after),
            relay: grant.relay.decision(),
            control_plane: grant.control_plane,
        }
    }
}

impl TryFrom<&pb::Candidate> for Candidate {
    type Error = Invalid;

    fn try_from(candidate: &pb::Candidate) -> Result<Self, Invalid> {
        let what = "candidate";
        let kind = match candidate.kind() {
            pb::CandidateKind::Unspecified => return Err(Invalid::Malformed(what)),
            pb::CandidateKind::Local => CandidateKind::Local,
            pb::CandidateKind::Reflexive => CandidateKind::Reflexive,
            pb::CandidateKind::Configured => CandidateKind::Configured,
            pb::CandidateKind::Relayed => CandidateKind::Relayed,
        };
        let port = u16::try_from(candidate.port).map_err(|_| Invalid::Address(what))?;
        let address = SocketAddr::new(ip(what, &candidate.address)?, port);
        Self::new(kind, address).ok_or(Invalid::Address(what))
    }
}

impl From<&Candidate> for pb::Candidate {
    fn from(candidate: &Candidate) -> Self {
        let kind = match candidate.kind() {
            CandidateKind::Local => pb::CandidateKind::Local,
            CandidateKind::Reflexive => pb::CandidateKind::Reflexive,
            CandidateKind::Configured => pb::CandidateKind::Configured,
            CandidateKind::Relayed => pb::CandidateKind::Relayed,
        };
        Self {
            kind: kind.into(),
            address: ip_bytes(candidate.address().ip()),
            port: candidate.address().port().into(),
        }
    }
}

impl TryFrom<pb::Record> for Record {
    type Error = Invalid;

    /// Parses a record. A candidate of an unknown kind is skipped instead of refused, so that an
    /// older agent can still reach a newer one.
    fn try_from(record: pb::Record) -> Result<Self, Invalid> {
        bounded("list of candidates", record.candidates.len(), limits::CANDIDATES)?;
        bounded("version", record.version.len(), limits::VERSION_BYTES)?;
        if record.generation > limits::GENERATION {
            return Err(Invalid::TooLarge("generation"));
        }
        Ok(Self {
            node_id: id(&record.node_id)?,
            generation: record.generation,
            boot_epoch: record.boot_epoch,
            wireguard_keys: wireguard_keys(&record.wireguard_keys)?,
            candidates: record
                .candidates
                .iter()
                .filter_map(|candidate| Candidate::try_from(candidate).ok())
                .collect(),
            prefixes: prefixes(&record.prefixes)?,
            version: record.version.chars().filter(|c| !c.is_control()).collect(),
            relay: record.relay,
            lans: prefixes(&record.lans)?,
            probe_version: ProbeVersion::of_record(record.probe_version),
            api_port: port(record.api_port)?,
        })
    }
}

impl From<&Record> for pb::Record {
    fn from(record: &Record) -> Self {
        Self {
            node_id: record.node_id.0.to_vec(),
            generation: record.generation,
            boot_epoch: record.boot_epoch,
            wireguard_keys: record.wireguard_keys.iter().map(|key| key.0.to_vec()).collect(),
            candidates: record.candidates.iter().map(Into::into).collect(),
            prefixes: record.prefixes.iter().map(Into::into).collect(),
            version: record.version.clone(),
            relay: record.relay,
            lans: record.lans.iter().map(Into::into).collect(),
            probe_version: record.probe_version.record_number(),
            api_port: record.api_port.map_or(0, |port| port.get().into()),
        }
    }
}

impl TryFrom<pb::Tombstone> for Tombstone {
    type Error = Invalid;

    fn try_from(tombstone: pb::Tombstone) -> Result<Self, Invalid> {
        Ok(Self {
            mesh_id: id(&tombstone.mesh_id)?,
            node_id: id(&tombstone.node_id)?,
            name: NodeName::try_from(tombstone.name)?,
            identity_key: id(&tombstone.identity_key)?,
            wireguard_keys: match tombstone.wireguard_keys.as_slice() {
                [] => Vec::new(),
                keys => wireguard_keys(keys)?,
            },
            removed_at: tombstone.removed_at,
        })
    }
}

impl From<&Tombstone> for pb::Tombstone {
    fn from(tombstone: &Tombstone) -> Self {
        Self {
            mesh_id: tombstone.mesh_id.0.to_vec(),
            node_id: tombstone.node_id.0.to_vec(),
            name: tombstone.name.to_string(),
            identity_key: tombstone.identity_key.0.to_vec(),
            wireguard_keys: tombstone.wireguard_keys.iter().map(|key| key.0.to_vec()).collect(),
            removed_at: tombstone.removed_at,
        }
    }
}

impl TryFrom<pb::MeshConfig> for MeshConfig {
    type Error = Invalid;

    fn try_from(mesh: pb::MeshConfig) -> Result<Self, Invalid> {
        let net = |prefix: Option<&pb::Prefix>, what| -> Result<IpNet, Invalid> {
            prefix.ok_or(Invalid::Missing(what))?.try_into()
        };
        let overlay_v6 = match net(mesh.overlay_v6.as_ref(), "overlay_v6")? {
            IpNet::V6(net) => net,
            IpNet::V4(_) => return Err(Invalid::Prefix("overlay_v6")),
        };
        let overlay_v4 = match net(mesh.overlay_v4.as_ref(), "overlay_v4")? {
            IpNet::V4(net) => net,
            IpNet::V6(_) => return Err(Invalid::Prefix("overlay_v4")),
        };
        Ok(Self {
            mesh_id: id(&mesh.mesh_id)?,
            overlay_v6,
            overlay_v4,
            protected: prefixes(&mesh.protected)?,
            lease: Duration::from_secs(mesh.lease_seconds.into()),
            trusted_sites: sites(mesh.trusted_sites)?,
            bypass_when_down: prefixes(&mesh.bypass_when_down)?,
            controllers: controllers(&mesh.controllers)?,
            generation: mesh.generation,
            epoch: mesh.epoch,
        })
    }
}

impl From<&MeshConfig> for pb::MeshConfig {
    fn from(mesh: &MeshConfig) -> Self {
        Self {
            mesh_id: mesh.mesh_id.0.to_vec(),
            overlay_v6: Some((&IpNet::V6(mesh.overlay_v6)).into()),
            overlay_v4: Some((&IpNet::V4(mesh.overlay_v4)).into()),
            protected: mesh.protected.iter().map(Into::into).collect(),
            lease_seconds: u32::try_from(mesh.lease.as_secs()).unwrap_or(u32::MAX),
            trusted_sites: mesh.trusted_sites.iter().map(ToString::to_string).collect(),
            bypass_when_down: mesh.bypass_when_down.iter().map(Into::into).collect(),
            controllers: mesh.controllers.iter().map(ToString::to_string).collect(),
            generation: mesh.generation,
            epoch: mesh.epoch,
        }
    }
}

impl TryFrom<pb::MeshSummary> for MeshSummary {
    type Error = Invalid;

    fn try_from(summary: pb::MeshSummary) -> Result<Self, Invalid> {
        let pb::MeshSummary { direct, relayed, connecting, down, idle, peers } = summary;
        let what = "list of peers";
        bounded(what, peers.len(), limits::SUMMARY_PEERS)?;
        let all: u64 = [direct, relayed, connecting, down, idle].into_iter().map(u64::from).sum();
        if usize::try_from(all).map_or(true, |all| all > limits::NODES) {
            return Err(Invalid::Malformed("number of peers"));
        }
        let peers: Vec<_> =
            peers.into_iter().map(PeerSummary::try_from).collect::<Result<_, _>>()?;
        let distinct: BTreeSet<_> = peers.iter().map(|peer| peer.node).collect();
        if distinct.len() != peers.len() {
            return Err(Invalid::Malformed(what));
        }
        let counts = PeerCounts { direct, relayed, connecting, down, idle };
        Ok(Self { counts, peers })
    }
}

impl From<&MeshSummary> for pb::MeshSummary {
    fn from(summary: &MeshSummary) -> Self {
        let PeerCounts { direct, relayed, connecting, down, idle } = summary.counts;
        let peers = summary.peers.iter().map(Into::into).collect();
        Self { direct, relayed, connecting, down, idle, peers }
    }
}

impl TryFrom<pb::PeerSummary> for PeerSummary {
    type Error = Invalid;

    fn try_from(peer: pb::PeerSummary) -> Result<Self, Invalid> {
        let relay = if peer.relay.is_empty() { None } else { Some(peer.relay.clone()) };
        let tunnel = match peer.state() {
            pb::TunnelState::Unspecified => return Err(Invalid::Malformed("state of a peer")),
            pb::TunnelState::Idle => Tunnel::Idle,
            pb::TunnelState::Connecting => Tunnel::Connecting,
            pb::TunnelState::Down => Tunnel::Down,
            pb::TunnelState::Direct => Tunnel::Direct,
            pb::TunnelState::Relayed => {
                Tunnel::Relayed(relay.clone().map(NodeName::try_from).transpose()?)
            }
        };
        if relay.is_some() && !matches!(tunnel, Tunnel::Relayed(_)) {
            return Err(Invalid::Malformed("relay of a peer"));
        }
        let loss_permille = match peer.loss_permille {
            Some(loss @ 0..=1000) => u16::try_from(loss).ok(),
            Some(_) => return Err(Invalid::Malformed("loss")),
            None => None,
        };
        let mtu = u16::try_from(peer.mtu).map_err(|_| Invalid::Malformed("mtu"))?;
        Ok(Self {
            node: id(&peer.node_id)?,
            tunnel,
            rtt_us: Some(peer.rtt_us).filter(|rtt| *rtt > 0),
            loss_permille,
            mtu: Some(mtu).filter(|mtu| *mtu > 0),
            reason_code: reason_code(peer.reason_code)?,
        })
    }
}

impl From<&Tunnel> for pb::TunnelState {
    fn from(tunnel: &Tunnel) -> Self {
        match tunnel {
            Tunnel::Idle => Self::Idle,
            Tunnel::Connecting => Self::Connecting,
            Tunnel::Down => Self::Down,
            Tunnel::Direct => Self::Direct,
            Tunnel::Relayed(_) => Self::Relayed,
        }
    }
}

impl From<&PeerSummary> for pb::PeerSummary {
    fn from(peer: &PeerSummary) -> Self {
        Self {
            node_id: peer.node.0.to_vec(),
            state: pb::TunnelState::from(&peer.tunnel).into(),
            relay: peer.tunnel.relay().map(ToString::to_string).unwrap_or_default(),
            rtt_us: peer.rtt_us.unwrap_or(0),
            loss_permille: peer.loss_permille.map(u32::from),
            mtu: peer.mtu.map_or(0, u32::from),
            reason_code: peer.reason_code.as_deref().unwrap_or_default().to_owned(),
        }
    }
}

/// Parses the code of a reason. An empty one means that there is none.
fn reason_code(code: String) -> Result<Option<Box<str>>, Invalid> {
    bounded("code of a reason", code.len(), limits::CODE_BYTES)?;
    let is_part = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if !code.bytes().all(is_part) {
        return Err(Invalid::Malformed("code of a reason"));
    }
    Ok(if code.is_empty() { None } else { Some(code.into()) })
}

impl TryFrom<pb::Head> for Head {
    type Error = Invalid;

    fn try_from(head: pb::Head) -> Result<Self, Invalid> {
        let pb::Head { mesh_id, epoch, revision } = head;
        Ok(Self { mesh_id: id(&mesh_id)?, epoch, revision })
    }
}

impl From<&Head> for pb::Head {
    fn from(head: &Head) -> Self {
        let Head { mesh_id, epoch, revision } = *head;
        Self { mesh_id: mesh_id.0.to_vec(), epoch, revision }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::RelayRole;

    #[test]
    fn a_grant_of_an_earlier_version_does_not_decide_who_relays() {
        let grant = |relay| pb::Grant {
            mesh_id: vec![1; 16],
            node_id: vec![1; 16],
            name: "a".into(),
            identity_key: vec![1; 32],
            wireguard_keys: vec![vec![1; 32]],
            overlay_addresses: vec![vec![1; 16], vec![1; 4]],
            relay,
            ..pb::Grant::default()
        };
        for (decision, role) in [
            (None, RelayRole::Undecided),
            (Some(false), RelayRole::Denied),
            (Some(true), RelayRole::Granted),
        ] {
            let parsed = Grant::try_from(grant(decision)).unwrap();
            assert_eq!(parsed.relay, role);
            assert_eq!(pb::Grant::from(&parsed).relay, decision);
        }
    }

    #[test]
    fn a_tombstone_names_the_keys_of_its_node_and_one_of_an_earlier_version_names_none() {
        let tombstone = |wireguard_keys| pb::Tombstone {
            mesh_id: vec![1; 16],
            node_id: vec![1; 16],
            name: "a".into(),
            identity_key: vec![1; 32],
            removed_at: 5,
            wireguard_keys,
        };
        for keys in [vec![], vec![vec![2; 32]], vec![vec![2; 32]; limits::WIREGUARD_KEYS]] {
            let parsed = Tombstone::try_from(tombstone(keys.clone())).unwrap();
            assert_eq!(parsed.wireguard_keys.len(), keys.len());
            assert_eq!(pb::Tombstone::from(&parsed).wireguard_keys, keys);
        }
        for wrong in [vec![vec![2; 31]], vec![vec![2; 32]; limits::WIREGUARD_KEYS + 1]] {
            assert!(Tombstone::try_from(tombstone(wrong)).is_err());
        }
    }

    fn peer(node: u8, state: pb::TunnelState) -> pb::PeerSummary {
        pb::PeerSummary { node_id: vec![node; 16], state: state.into(), ..Default::default() }
    }

    fn summary(peers: Vec<pb::PeerSummary>) -> Result<MeshSummary, Invalid> {
        pb::MeshSummary { direct: 1, peers, ..Default::default() }.try_into()
    }

    #[test]
    fn a_summary_is_read_as_it_was_written() {
        let read = summary(vec![
            pb::PeerSummary {
                rtt_us: 420,
                loss_permille: Some(0),
                mtu: 1420,
                ..peer(1, pb::TunnelState::Direct)
            },
            pb::PeerSummary {
                relay: "r1".into(),
                reason_code: "no-answer".into(),
                ..peer(2, pb::TunnelState::Relayed)
            },
            peer(3, pb::TunnelState::Idle),
        ])
        .unwrap();
        assert_eq!(read.peers[0].rtt_us, Some(420));
        assert_eq!(read.peers[0].loss_permille, Some(0));
        assert_eq!(read.peers[1].tunnel, Tunnel::Relayed(Some("r1".parse().unwrap())));
        assert_eq!(read.peers[2].loss_permille, None);
        assert_eq!(MeshSummary::try_from(pb::MeshSummary::from(&read)).unwrap(), read);
    }

    #[test]
    fn a_summary_outside_of_its_bounds_is_refused() {
        use pb::TunnelState::{Direct, Down, Relayed, Unspecified};
        let numbered = |count: usize| {
            let ids = (0..count).map(|number| u8::try_from(number).unwrap());
            ids.map(|number| peer(number, Direct)).collect::<Vec<_>>()
        };
        assert!(summary(numbered(limits::SUMMARY_PEERS)).is_ok());
        assert!(summary(numbered(limits::SUMMARY_PEERS + 1)).is_err());
        let counts = pb::MeshSummary { direct: u32::MAX, idle: u32::MAX, ..Default::default() };
        assert!(MeshSummary::try_from(counts).is_err());
        let twice = vec![peer(1, Direct), peer(1, Down)];
        assert_eq!(summary(twice), Err(Invalid::Malformed("list of peers")));
        for wrong in [
            peer(1, Unspecified),
            pb::PeerSummary { state: 99, ..peer(1, Direct) },
            pb::PeerSummary { node_id: vec![1; 15], ..peer(1, Direct) },
            pb::PeerSummary { relay: "r1".into(), ..peer(1, Direct) },
            pb::PeerSummary { relay: "no label!".into(), ..peer(1, Relayed) },
            pb::PeerSummary { loss_permille: Some(1001), ..peer(1, Direct) },
            pb::PeerSummary { mtu: 65_536, ..peer(1, Direct) },
            pb::PeerSummary { reason_code: "<b>".into(), ..peer(1, Down) },
            pb::PeerSummary { reason_code: "a".repeat(49), ..peer(1, Down) },
        ] {
            assert!(summary(vec![wrong.clone()]).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_record_with_ten_thousand_candidates_is_refused_and_one_with_all_that_there_may_be_is_not()
    {
        let candidate = pb::Candidate { kind: 1, address: vec![203, 0, 113, 7], port: 51_830 };
        let record = |candidates| pb::Record {
            node_id: vec![1; 16],
            wireguard_keys: vec![vec![2; 32]],
            candidates: vec![candidate.clone(); candidates],
            ..pb::Record::default()
        };
        assert!(Record::try_from(record(10_000)).is_err());
        assert!(Record::try_from(record(limits::CANDIDATES)).is_ok());
        let last = pb::Record { generation: limits::GENERATION, ..record(1) };
        assert!(Record::try_from(last.clone()).is_ok());
        let beyond = pb::Record { generation: limits::GENERATION + 1, ..last };
        assert_eq!(Record::try_from(beyond), Err(Invalid::TooLarge("generation")));
    }

    #[test]
    fn the_port_of_an_api_server_reads_back_and_older_records_have_none() {
        let record = |api_port| pb::Record {
            node_id: vec![1; 16],
            wireguard_keys: vec![vec![2; 32]],
            api_port,
            ..pb::Record::default()
        };
        let parsed = Record::try_from(record(6443)).unwrap();
        assert_eq!(parsed.api_port, NonZeroU16::new(6443));
        assert_eq!(pb::Record::from(&parsed).api_port, 6443);
        assert_eq!(Record::try_from(record(0)).unwrap().api_port, None);
        assert!(Record::try_from(record(65_536)).is_err());
    }
}
