//! Converts the daemon's state to the messages of the local API.

use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use towline_core::mesh::{
    GuardReason, GuardedNetwork, Mapping, PathStatus, PeerState, PeerStatus, ReflectorStatus,
    RelayStatus,
};
use towline_core::peer_history::{Changed, PeerChange};
use towline_core::static_peers::StaticPeerStatus;
use towline_dataplane::{Feature, ForeignSource};
use towline_proto::code::Coded;
use towline_proto::id::{NodeId, WireguardKey};
use towline_proto::node::Grant;
use towline_proto::pb;
use towline_service::certificate;

use super::Daemon;
use super::problem::{Note, Problem};
use crate::api_endpoint::ApiEndpoint;
use crate::config::{ClearSetting, Config};
use crate::confirm::Confirmation;
use crate::control::PathKind;
use crate::down::MachineState;
use crate::events;
use crate::state::StateDir;
use crate::timing::micros;
use crate::uapi;

/// Time after which something that was seen once is no longer a problem.
const RECENT: Duration = Duration::from_secs(300);

/// Reads the state of a daemon for the local API.
pub(super) struct Reporter<'a>(pub(super) &'a Daemon);

impl Reporter<'_> {
    /// Returns the answer to `towline status`.
    pub(super) fn status(&self) -> pb::StatusResponse {
        let Self(daemon) = self;
        let (mesh, config) = (&daemon.mesh, &daemon.config);
        let (mut up, mut relayed, mut total) = (0, 0, 0);
        let states = mesh.peers().map(|peer| {
            relayed += u32::from(peer.path.is_some_and(|path| path.is_relayed()));
            peer.state
        });
        for state in states.chain(mesh.static_peers().map(|peer| peer.state)) {
            total += 1;
            up += u32::from(state == PeerState::Up);
        }
        let data_plane = daemon.tunnels.data_plane();
        let snapshot = data_plane.snapshot();
        let engine = data_plane.engine();
        let blocked = daemon.host.blocked();
        let (problems, mut notes) = (self.problems(), daemon.host.notes());
        let configured = config.wireguard.port;
        let socket = daemon.wireguard_socket.as_ref();
        notes.extend(socket.and_then(|socket| socket.problem()).map(Note::from));
        notes.extend(self.kept_in_tunnel());
        let unused = daemon.api_endpoint.as_ref().and_then(|endpoint| endpoint.without_servers());
        notes.extend(unused.map(|address| Note::NoApiServers { address }));
        notes.extend(mesh.second_port().map(|second| Note::SecondPort { configured, second }));
        let relays = mesh.undecided_relays().cloned();
        notes.extend(relays.map(|relay| Note::RelayNotGranted { relay }));
        let own_drops = [("probes_refused", daemon.prober.refused())];
        let drops = snapshot.drops.into_iter().chain(mesh.counters().named()).chain(own_drops);
        let feature = |feature: Feature| pb::Feature {
            name: feature.name.into(),
            active: feature.active,
            reason: text(feature.reason.as_ref()),
            reason_code: code(feature.reason.as_ref()),
        };
        pb::StatusResponse {
            public_key: daemon.prober.own_key().public().to_string(),
            version: towline_proto::VERSION.into(),
            listen_port: config.wireguard.port.into(),
            link: config.link.name.clone(),
            mtu: config.link.mtu.into(),
            wireguard_engine: engine.name().into(),
            wireguard_aead: engine.aead().into(),
            wireguard_seal_helpers: u32::try_from(data_plane.seal_helpers()).unwrap_or(u32::MAX),
            wireguard_sealed_ahead: data_plane.sealed_ahead(),
            candidates: daemon.announcer.candidates().iter().map(Into::into).collect(),
            controller: daemon.controller.status(),
            kubernetes: daemon.kubernetes.status(),
            api_endpoint: daemon.api_endpoint.as_ref().map(ApiEndpoint::status),
            peers_up: up,
            peers_total: total,
            peers_relayed: relayed,
            certificate_expires_at: daemon.controller.certificate_expires_at(),
            uptime_ms: millis(daemon.started.elapsed()),
            problems: texts(&problems),
            problem_details: details(&problems),
            notes: texts(&notes),
            note_details: details(&notes),
            applied: Some(blocked.is_none()),
            applied_reason: text(blocked),
            applied_reason_code: code(blocked),
            drops: drops.map(|(name, count)| pb::Counter { name: name.into(), count }).collect(),
            relay: mesh.relay().map(|relay| self.relay(relay)),
            features: snapshot.features.into_iter().map(feature).collect(),
            state: MachineState::Running.code().into(),
            confirm_within_ms: confirm_within_ms(daemon.confirmation()),
            reflectors: mesh.reflectors().into_iter().map(reflector_status).collect(),
            nat_mapping: mesh.mapping().map(mapping_word).unwrap_or_default().into(),
            second_port: mesh.second_port().map(u32::from),
            ..identity(mesh.grant(), config)
        }
    }

    fn relay(&self, relay: RelayStatus) -> pb::RelayStatus {
        let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
        pb::RelayStatus {
            nodes: count(relay.nodes),
            channels: count(relay.channels),
            bytes: self.0.tunnels.data_plane().forwarded_bytes(),
        }
    }

    pub(super) fn problems(&self) -> Vec<Problem> {
        let Self(daemon) = self;
        let mesh = &daemon.mesh;
        let mut problems = Vec::new();
        if mesh.is_removed() {
            problems.push(Problem::Removed);
        }
        problems.extend(daemon.map_problem());
        problems.extend(Problem::of_confirmation(daemon.confirmation()));
        problems.extend(daemon.controller.problems());
        problems.extend(daemon.state.unsaved().map(Problem::from));
        problems.extend(daemon.host.problems());
        let silent = mesh.silent_reflectors();
        problems.extend(silent.map(|reflector| Problem::ReflectorSilent { reflector }));
        problems.extend(self.foreign_source());
        problems.extend(daemon.announcer.problems().iter().cloned().map(Problem::from));
        problems.extend(daemon.kubernetes.problems(mesh.grant()));
        let denied = mesh.grant().filter(|_| mesh.is_relay_denied());
        problems.extend(denied.map(|grant| Problem::RelayDenied { node: grant.name.clone() }));
        let endpoint = daemon.api_endpoint.as_ref();
        problems.extend(endpoint.and_then(ApiEndpoint::problem).map(Problem::from));
        problems.extend(daemon.api_port_without_role());
        // This is not repeated for each peer: there may be as many guards as peers.
        let gateways = daemon.host.gateways().iter().copied();
        let gateways: Vec<IpAddr> = gateways.filter(|ip| daemon.host.is_guarded(ip)).collect();
        for status in mesh.peers() {
            let peer = status.node.name();
            problems.extend(
                status
                    .conflicts
                    .into_iter()
                    .map(|conflict| Problem::Peer { peer: peer.clone(), conflict }),
            );
            let whose = || format!("peer {peer}'s");
            problems.extend(covered_gateways(&gateways, &status.prefixes, whose));
        }
        let ranges: Vec<_> = mesh.guarded_ranges().collect();
        problems.extend(covered_gateways(&gateways, &ranges, || "the mesh's".to_owned()));
        let refused = mesh.refused_ranges();
        problems.extend(refused.map(|(range, covered)| Problem::RangeRefused { range, covered }));
        problems.extend(mesh.static_peers().flat_map(|status| {
            let peer = status.name;
            let of_peer = move |conflict| Problem::StaticPeer { peer: peer.clone(), conflict };
            status.conflicts.into_iter().map(of_peer)
        }));
        problems
    }

    /// Returns a note for each setting of the mesh that lets traffic leave in clear and is not applied here.
    fn kept_in_tunnel(&self) -> Vec<Note> {
        let Some(mesh) = self.0.mesh.config() else { return Vec::new() };
        let allowed = &self.0.config.trust.allow_in_clear;
        let settings = [
            (ClearSetting::TrustedSites, mesh.trusted_sites.is_empty()),
            (ClearSetting::BypassWhenDown, mesh.bypass_when_down.is_empty()),
        ];
        let refused =
            settings.into_iter().filter(|(setting, unset)| !unset && !allowed.contains(setting));
        refused.map(|(setting, _)| Note::InClearNotAllowed { setting }).collect()
    }

    /// Returns a problem if a packet with a foreign source was dropped lately.
    fn foreign_source(&self) -> Option<Problem> {
        let daemon = self.0;
        let last = daemon.tunnels.data_plane().foreign_source()?;
        if last.at.elapsed() > RECENT {
            return None;
        }
        let ForeignSource { source: source_address, destination, .. } = last;
        Some(if daemon.host.has_address(&source_address) {
            Problem::OwnSource { source_address, destination }
        } else {
            Problem::ForeignSource { source_address, destination }
        })
    }

    /// Returns the answer to `towline guard list`.
    pub(super) fn guards(&self) -> pb::GuardsResponse {
        let network = |guarded: GuardedNetwork| {
            let reason = guard_word(&guarded.reason).to_owned();
            let node = match guarded.reason {
                GuardReason::Overlay | GuardReason::Protected | GuardReason::StaticPeer => {
                    String::new()
                }
                GuardReason::Announced(name) | GuardReason::Withdrawn { name: Some(name), .. } => {
                    name.to_string()
                }
                GuardReason::Withdrawn { name: None, owner } => text(owner.as_ref()),
            };
            pb::GuardedNetwork { network: guarded.network.to_string(), reason, node }
        };
        let networks = self.0.mesh.guarded_networks().into_iter().map(network).collect();
        pb::GuardsResponse { networks }
    }

    /// Returns the answer to `towline peers`.
    pub(super) fn peers(&self) -> pb::PeersResponse {
        let Self(daemon) = self;
        let traffic = daemon.tunnels.data_plane().traffic();
        let now = Instant::now();
        let with_traffic = |key: WireguardKey, status: pb::PeerStatus| {
            let bytes = traffic.get(&key);
            let rates = daemon.observer.rates(&key);
            pb::PeerStatus {
                rx_bytes: bytes.map_or(0, |bytes| bytes.received_bytes),
                tx_bytes: bytes.map_or(0, |bytes| bytes.sent_bytes),
                rx_bytes_per_s: rates.map(|rates| rates.received),
                tx_bytes_per_s: rates.map(|rates| rates.sent),
                ..status
            }
        };
        let table = daemon.mesh.peer_table();
        let nodes = daemon.mesh.peers().map(|peer| {
            let key = peer.node.wireguard_key();
            let entry = table.and_then(|table| table.peers.get(&key));
            let standby = entry.into_iter().flat_map(|entry| &entry.shared_sources);
            let standby_prefixes = standby.map(ToString::to_string).collect();
            let status = pb::PeerStatus { standby_prefixes, ..peer_status(peer, now) };
            with_traffic(key, status)
        });
        let static_peers = daemon
            .mesh
            .static_peers()
            .map(|peer| with_traffic(peer.public_key, static_peer_status(peer, now)));
        pb::PeersResponse { peers: nodes.chain(static_peers).collect() }
    }

    /// Returns the answer to `towline peer` for the peer with this name or overlay address.
    pub(super) fn peer(&self, name: &str) -> Option<pb::PeerResponse> {
        let named = |peer: &pb::PeerStatus| {
            peer.name == name || peer.overlay_addresses.iter().any(|address| address == name)
        };
        let peer = self.peers().peers.into_iter().find(named)?;
        let Ok(id) = peer.node_id.parse::<NodeId>() else {
            // A static peer has one endpoint, and no history.
            return Some(pb::PeerResponse { peer: Some(peer), ..Default::default() });
        };
        let mesh = &self.0.mesh;
        let (now, clock) = (Instant::now(), SystemTime::now());
        let paths = mesh.paths(id).into_iter().map(|path| path_status(path, now));
        let history = mesh.history(id).into_iter().map(|change| peer_change(change, now, clock));
        Some(pb::PeerResponse {
            peer: Some(peer),
            paths: paths.collect(),
            history: history.collect(),
        })
    }
}

impl Reporter<'_> {
    /// Returns the answer to `wg show`: the peer table with its counters.
    pub(super) fn device(&self) -> uapi::Device {
        let Self(daemon) = self;
        let snapshot = daemon.tunnels.data_plane().snapshot();
        let (now, wall) = (Instant::now(), SystemTime::now());
        let since_1970 = |at: Instant| {
            let at = wall.checked_sub(now.saturating_duration_since(at))?;
            at.duration_since(UNIX_EPOCH).ok()
        };
        let table = daemon.mesh.peer_table();
        let peers = table.into_iter().flat_map(|table| &table.peers).map(|(key, entry)| {
            let state = snapshot.peers.get(key);
            uapi::Peer {
                public_key: *key,
                endpoint: entry.endpoint.map(|path| path.remote),
                last_handshake: state.and_then(|state| state.last_handshake).and_then(since_1970),
                rx_bytes: state.map_or(0, |state| state.received_bytes),
                tx_bytes: state.map_or(0, |state| state.sent_bytes),
                keepalive: entry.keepalive,
                allowed_ips: entry.prefixes.clone(),
            }
        });
        let (listen_port, fwmark) = (daemon.config.wireguard.port, daemon.config.routing.mark);
        uapi::Device { listen_port, fwmark, peers: peers.collect() }
    }
}

/// Returns a problem for each of these guarded gateways whose address is in one of `networks`. Such a
/// gateway still forwards, but does not answer itself, so that its DNS and DHCP fail.
fn covered_gateways(
    gateways: &[IpAddr],
    networks: &[IpNet],
    whose: impl Fn() -> String,
) -> impl Iterator<Item = Problem> {
    gateways.iter().filter_map(move |gateway| {
        let network = *networks.iter().find(|net| net.contains(gateway))?;
        Some(Problem::GatewayCovered { whose: whose(), network, gateway: *gateway })
    })
}

/// Returns a status that contains the identity of this node only.
pub(super) fn identity(grant: Option<&Grant>, config: &Config) -> pb::StatusResponse {
    let site = grant.and_then(|grant| grant.site.as_ref());
    pb::StatusResponse {
        name: grant.map(|grant| grant.name.to_string()).unwrap_or_default(),
        node_id: grant.map(|grant| grant.node_id.to_string()).unwrap_or_default(),
        mesh_id: grant.map(|grant| grant.mesh_id.to_string()).unwrap_or_default(),
        site: site.map(ToString::to_string).unwrap_or_default(),
        overlay_addresses: grant
            .iter()
            .flat_map(|grant| grant.overlay.iter())
            .chain(config.node.addresses.iter().copied())
            .map(|ip| ip.to_string())
            .collect(),
        ..Default::default()
    }
}

/// Returns the end of the stored certificate, in seconds since 1970. 0 if there is none.
pub(super) fn certificate_expires_at(state: &StateDir) -> i64 {
    let chain = state.certificate().ok().flatten().unwrap_or_default();
    chain
        .first()
        .and_then(|certificate| certificate::validity(certificate))
        .map_or(0, |(_, end)| end)
}

pub(super) fn confirm_within_ms(confirmation: Confirmation) -> Option<u64> {
    match confirmation {
        Confirmation::Settled => None,
        Confirmation::Due(left) => Some(millis(left)),
        Confirmation::Missed => Some(0),
    }
}

pub(super) fn unix_seconds(time: Option<SystemTime>) -> i64 {
    let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.and_then(|since| i64::try_from(since.as_secs()).ok()).unwrap_or(0)
}

fn peer_status(peer: PeerStatus, now: Instant) -> pb::PeerStatus {
    let grant = peer.node.grant();
    let held = |net: &&IpNet| peer.prefixes.contains(net);
    let announced = peer.node.record().prefixes.iter().filter(held);
    pb::PeerStatus {
        name: grant.name.to_string(),
        node_id: grant.node_id.to_string(),
        site: grant.site.as_ref().map(ToString::to_string).unwrap_or_default(),
        overlay_addresses: grant.overlay.iter().map(|ip| ip.to_string()).collect(),
        state: peer.state.code().into(),
        path_kind: code(peer.path.as_ref().map(PathKind::of).as_ref()),
        path: peer.path.map(|path| path.remote.to_string()).unwrap_or_default(),
        relay: peer.relay.map(|relay| relay.to_string()).unwrap_or_default(),
        mtu: peer.mtu.map(u32::from),
        single_datagrams: peer.is_single,
        rtt_us: peer.rtt.map(micros),
        loss_percent: peer.loss.map(|share| share * 100.0),
        handshake_age_ms: peer.last_handshake.map(|at| millis(now.saturating_duration_since(at))),
        prefixes: announced.map(ToString::to_string).collect(),
        // Filled in by the caller.
        standby_prefixes: Vec::new(),
        conflicts: texts(&peer.conflicts),
        conflict_details: details(&peer.conflicts),
        since_ms: millis(now.saturating_duration_since(peer.since)),
        public_key: peer.node.wireguard_key().to_string(),
        candidates: peer.node.record().candidates.iter().map(Into::into).collect(),
        reason: text(peer.reason.as_ref()),
        reason_code: code(peer.reason.as_ref()),
        // Filled in by the caller.
        rx_bytes: 0,
        tx_bytes: 0,
        rx_bytes_per_s: None,
        tx_bytes_per_s: None,
    }
}

fn reflector_status(status: ReflectorStatus) -> pb::ReflectorStatus {
    pb::ReflectorStatus {
        address: status.address.to_string(),
        mapped_address: text(status.mapped.as_ref()),
    }
}

/// Returns the word for the reason of a guard, as the schema lists them.
fn guard_word(reason: &GuardReason) -> &'static str {
    match reason {
        GuardReason::Overlay => "overlay",
        GuardReason::Protected => "protected",
        GuardReason::Announced(_) => "announced",
        GuardReason::StaticPeer => "static-peer",
        GuardReason::Withdrawn { .. } => "withdrawn",
    }
}

/// Returns the word for a NAT's mapping, as the schema lists them.
fn mapping_word(mapping: Mapping) -> &'static str {
    match mapping {
        Mapping::None => "none",
        Mapping::Independent => "endpoint-independent",
        Mapping::Dependent => "dependent",
    }
}

fn path_status(status: PathStatus, now: Instant) -> pb::PathStatus {
    let age = |at: Instant| millis(now.saturating_duration_since(at));
    pb::PathStatus {
        path_kind: PathKind::of(&status.path).code().into(),
        path: status.path.remote.to_string(),
        relay: text(status.relay.as_ref()),
        local_address: text(status.path.local.map(|local| local.address).as_ref()),
        in_use: status.in_use,
        rtt_us: status.rtt.map(micros),
        heard_ms: status.heard.map(age),
        answered_ms: status.answered.map(age),
    }
}

fn peer_change(change: PeerChange, now: Instant, clock: SystemTime) -> pb::PeerChange {
    let at = clock.checked_sub(now.saturating_duration_since(change.at)).unwrap_or(UNIX_EPOCH);
    let empty = pb::PeerChange { at: events::unix_millis(at), ..Default::default() };
    match change.what {
        Changed::State { from, to } => {
            pb::PeerChange { from_state: from.code().into(), to_state: to.code().into(), ..empty }
        }
        Changed::Path { from, to, reason } => pb::PeerChange {
            from_path: text(from.as_ref()),
            to_path: text(to.as_ref()),
            reason: reason.to_string(),
            reason_code: reason.code().into(),
            ..empty
        },
    }
}

fn static_peer_status(peer: StaticPeerStatus, now: Instant) -> pb::PeerStatus {
    let age = |at| millis(now.saturating_duration_since(at));
    pb::PeerStatus {
        name: peer.name,
        state: peer.state.code().into(),
        path_kind: code(peer.endpoint.map(|_| PathKind::Static).as_ref()),
        path: peer.endpoint.map(|path| path.remote.to_string()).unwrap_or_default(),
        handshake_age_ms: peer.last_handshake.map(age),
        prefixes: peer.prefixes.iter().map(ToString::to_string).collect(),
        since_ms: age(peer.since),
        public_key: peer.public_key.to_string(),
        reason: text(peer.reason.as_ref()),
        reason_code: code(peer.reason.as_ref()),
        ..Default::default()
    }
}

/// Returns the text of a reason, empty if there is none.
pub(super) fn text(reason: Option<&impl ToString>) -> String {
    reason.map(ToString::to_string).unwrap_or_default()
}

/// Returns the code of a reason, empty if there is none.
pub(super) fn code(reason: Option<&impl Coded>) -> String {
    reason.map(|reason| reason.code().into()).unwrap_or_default()
}

/// Returns the texts of problems, conflicts or notes.
pub(super) fn texts(list: &[impl ToString]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

/// Returns the codes and texts of problems, conflicts or notes.
pub(super) fn details<T: Coded + ToString>(list: &[T]) -> Vec<pb::Detail> {
    list.iter().map(pb::Detail::of).collect()
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
