//! Converts the daemon's state to the messages of the local API.

use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use towline_core::mesh::{PeerState, PeerStatus};
use towline_core::static_peers::StaticPeerStatus;
use towline_proto::id::WireguardKey;
use towline_proto::pb;

use super::Daemon;
use crate::config::Config;
use crate::confirm::Confirmation;
use crate::down::Down;
use crate::state::{Membership, StateDir};
use crate::tls;

/// State of an agent whose machine is not down, as `towline status` shows it.
pub(super) const RUNNING: &str = "running";
/// State of an agent whose machine is down, as `towline status` shows it.
pub(super) const DOWN: &str = "down";

impl Daemon {
    pub(super) fn status(&self) -> pb::StatusResponse {
        let (mut up, mut relayed, mut total) = (0, 0, 0);
        let states = self.mesh.peers().map(|peer| {
            relayed += u32::from(peer.path.is_some_and(|path| path.is_relayed()));
            peer.state
        });
        for state in states.chain(self.mesh.static_peers().map(|peer| peer.state)) {
            total += 1;
            up += u32::from(state == PeerState::Up);
        }
        let snapshot = self.data_plane.snapshot();
        let announcement = self.announcements.borrow();
        pb::StatusResponse {
            public_key: self.keys.wireguard.public().to_string(),
            version: towline_proto::VERSION.into(),
            listen_port: self.config.wireguard.port.into(),
            link: self.config.link.name.clone(),
            mtu: self.config.link.mtu,
            candidates: announcement
                .iter()
                .flat_map(|announcement| &announcement.candidates)
                .map(Into::into)
                .collect(),
            controller: self.membership.is_some().then(|| pb::ControllerStatus {
                connected: self.controller.connected,
                address: self.controller.address.clone(),
                revision: self.controller.revision,
                last_heard_ms: self.controller.last_heard.map(|at| millis(at.elapsed())),
                reason: self.controller.reason.clone(),
            }),
            kubernetes: self.kubernetes_status(),
            peers_up: up,
            peers_total: total,
            peers_relayed: relayed,
            certificate_expires_at: self.certificate_expires_at,
            uptime_ms: millis(self.started.elapsed()),
            problems: self.problems(),
            notes: self.host.notes(),
            applied: Some(self.blocked().is_none()),
            applied_reason: self.blocked().unwrap_or_default().to_owned(),
            drops: snapshot
                .drops
                .into_iter()
                .chain(self.mesh.counters().named())
                .chain([("probes_refused", self.probe_keys.refused())])
                .map(|(name, count)| pb::Counter { name: name.into(), count })
                .collect(),
            relay: self.config.relay.enabled.then(|| {
                let relay = self.relay.snapshot();
                let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
                pb::RelayStatus {
                    nodes: count(relay.nodes),
                    channels: count(relay.channels),
                    bytes: relay.bytes,
                }
            }),
            features: snapshot
                .features
                .into_iter()
                .map(|feature| pb::Feature {
                    name: feature.name.into(),
                    active: feature.active,
                    reason: feature.reason,
                })
                .collect(),
            state: RUNNING.into(),
            confirm_within_ms: confirm_within_ms(self.confirmation()),
            ..identity(self.membership.as_ref(), &self.config)
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.mesh.is_removed() {
            problems.push(
                "this node was removed from the mesh: run `towline leave`, then join with a new token"
                    .into(),
            );
        }
        problems.extend(unconfirmed(self.confirmation()));
        match &self.published {
            Ok(remarks) => problems.extend(remarks.iter().cloned()),
            Err(reason) => {
                problems.push(format!("the controller refused this node's record: {reason}"));
            }
        }
        problems.extend(self.state.unsaved());
        problems.extend(self.host.problems().iter().cloned());
        problems.extend(self.announced.problems.iter().cloned());
        problems.extend(self.kubernetes_problems());
        problems.extend(self.host.table_of_connections_is_full());
        for peer in self.mesh.peers() {
            let name = peer.node.name();
            problems.extend(peer.conflicts.iter().map(|why| format!("peer {name}: {why}")));
            problems.extend(self.covered_gateways(&peer.prefixes, &format!("peer {name}'s")));
        }
        if let Some(membership) = &self.membership {
            let ranges: Vec<_> = membership.mesh.guarded().collect();
            problems.extend(self.covered_gateways(&ranges, "the mesh's"));
        }
        problems.extend(self.mesh.static_peers().flat_map(|peer| {
            let name = peer.name;
            peer.conflicts.into_iter().map(move |why| format!("static peer {name}: {why}"))
        }));
        problems
    }

    /// Returns a problem for each gateway whose address is in one of `networks`. Such a gateway
    /// still forwards, but does not answer itself, so that its DNS and DHCP fail.
    fn covered_gateways(&self, networks: &[IpNet], whose: &str) -> Vec<String> {
        let covered = |gateway: &&IpAddr| networks.iter().find(|net| net.contains(*gateway));
        let line = |gateway: &IpAddr| {
            let net = covered(&gateway)?;
            Some(format!("{whose} network {net} covers this machine's gateway {gateway}"))
        };
        self.host.gateways().iter().filter_map(line).collect()
    }

    pub(super) fn peers(&self) -> pb::PeersResponse {
        let snapshot = self.data_plane.snapshot();
        let now = Instant::now();
        let bytes = |key: &WireguardKey| {
            let counters = snapshot.peers.get(key);
            counters.map_or((0, 0), |counters| (counters.received_bytes, counters.sent_bytes))
        };
        let nodes = self.mesh.peers().map(|peer| {
            let (rx_bytes, tx_bytes) = bytes(&peer.node.wireguard_key());
            pb::PeerStatus { rx_bytes, tx_bytes, ..peer_status(peer, now) }
        });
        let static_peers = self.mesh.static_peers().map(|peer| {
            let (rx_bytes, tx_bytes) = bytes(&peer.public_key);
            pb::PeerStatus { rx_bytes, tx_bytes, ..static_peer_status(peer, now) }
        });
        pb::PeersResponse { peers: nodes.chain(static_peers).collect() }
    }
}

/// Returns a status that contains the identity of this node only.
pub(super) fn identity(membership: Option<&Membership>, config: &Config) -> pb::StatusResponse {
    let grant = membership.map(|membership| &membership.grant);
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
    chain.first().and_then(tls::validity).map_or(0, |(_, end)| end)
}

/// Returns the status line of a machine that is down.
pub(crate) fn down_line(down: Down) -> String {
    let since = down.since.and_then(|since| jiff::Timestamp::try_from(since).ok());
    let since = since.map(|since| format!(" since {since}")).unwrap_or_default();
    format!("this machine is down{since}: run `towline up`")
}

/// Returns a problem if the join still has to be confirmed.
pub(super) fn unconfirmed(confirmation: Confirmation) -> Option<String> {
    match confirmation {
        Confirmation::Settled => None,
        Confirmation::Due(left) => {
            let seconds = left.as_secs_f64().ceil();
            Some(format!("the join is not confirmed: undone in {seconds} s: run `towline confirm`"))
        }
        Confirmation::Missed => {
            Some("the join was not confirmed in time: it is being undone".into())
        }
    }
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
        state: state(peer.state).into(),
        path_kind: peer.path.as_ref().map(super::path_kind).unwrap_or_default().into(),
        path: peer.path.map(|path| path.remote.to_string()).unwrap_or_default(),
        relay: peer.relay.map(|relay| relay.to_string()).unwrap_or_default(),
        mtu: peer.mtu.map(u32::from),
        rtt_us: peer.rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
        handshake_age_ms: peer.last_handshake.map(|at| millis(now.saturating_duration_since(at))),
        rx_bytes: 0,
        tx_bytes: 0,
        prefixes: announced.map(ToString::to_string).collect(),
        conflicts: peer.conflicts,
        since_ms: millis(now.saturating_duration_since(peer.since)),
        public_key: peer.node.wireguard_key().to_string(),
        candidates: peer.node.record().candidates.iter().map(Into::into).collect(),
        reason: peer.reason,
    }
}

fn static_peer_status(peer: StaticPeerStatus, now: Instant) -> pb::PeerStatus {
    let age = |at| millis(now.saturating_duration_since(at));
    pb::PeerStatus {
        name: peer.name,
        state: state(peer.state).into(),
        path_kind: if peer.endpoint.is_some() { "static" } else { "" }.into(),
        path: peer.endpoint.map(|path| path.remote.to_string()).unwrap_or_default(),
        handshake_age_ms: peer.last_handshake.map(age),
        prefixes: peer.prefixes.iter().map(ToString::to_string).collect(),
        since_ms: age(peer.since),
        public_key: peer.public_key.to_string(),
        reason: peer.reason,
        ..Default::default()
    }
}

fn state(state: PeerState) -> &'static str {
    match state {
        PeerState::Idle => "idle",
        PeerState::Connecting => "connecting",
        PeerState::Up => "up",
        PeerState::Down => "down",
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
