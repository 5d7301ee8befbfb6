//! The agent's metrics for Prometheus, from one snapshot of its status for each scrape, without I/O.
//!
//! The snapshot is that of `towline status` and `towline peers`, so that metrics, command line and JSON cannot
//! disagree. Labels are bounded: codes and names from closed lists, and names of peers while there are at most
//! [`PEER_SERIES`]. A mesh with more peers has the aggregates alone, and `towline_peers_without_series` says so.

pub mod table;

use std::collections::BTreeMap;

use towline_proto::pb;
use towline_service::metrics::Exposition;

pub use table::METRICS;
use table::*;

/// Largest number of peers that have metrics of their own. 256 peers have about 2,000 series on each node.
pub const PEER_SERIES: usize = 256;

/// States of a peer, each of which has a sample, also if no peer is in it.
const STATES: [&str; 4] = ["up", "connecting", "down", "idle"];
/// Kinds of a path, each of which has a sample; `none` is that of peers without a path.
const PATH_KINDS: [&str; 4] = ["direct", "relay", "static", "none"];

/// Collector of the metrics. It keeps what is needed for totals that never shrink.
#[derive(Debug, Default)]
pub struct Collector {
    received: Total,
    sent: Total,
}

/// Sum over the counters of all peers. It stays when a peer is removed, or when its counter begins again with a
/// new data plane.
#[derive(Debug, Default)]
struct Total {
    sum: u64,
    /// Last value of each current peer, by public key.
    last: BTreeMap<String, u64>,
}

impl Total {
    /// Adds what the counters grew by, and returns the sum.
    fn update<'a>(&mut self, counters: impl Iterator<Item = (&'a str, u64)>) -> u64 {
        let last = std::mem::take(&mut self.last);
        for (key, value) in counters {
            // A static peer with the key of a node has that node's counters.
            if self.last.contains_key(key) {
                continue;
            }
            let before = last.get(key).copied().unwrap_or(0);
            self.sum += if value >= before { value - before } else { value };
            self.last.insert(key.to_owned(), value);
        }
        self.sum
    }
}

impl Collector {
    /// Returns the text of a scrape.
    pub fn collect(&mut self, status: &pb::StatusResponse, peers: &[pb::PeerStatus]) -> String {
        let mut text = Exposition::default();
        of_agent(&mut text, status);
        of_controller(&mut text, status);
        self.of_peers(&mut text, peers);
        of_data_plane(&mut text, status);
        text.text()
    }

    fn of_peers(&mut self, text: &mut Exposition, peers: &[pb::PeerStatus]) {
        let mut by_state = text.family(&PEERS);
        for state in STATES {
            by_state.sample(&[state], peers.iter().filter(|peer| peer.state == state).count());
        }
        let mut by_kind = text.family(&PEER_PATHS);
        for kind in PATH_KINDS {
            let is_kind = |peer: &&pb::PeerStatus| path_kind(peer) == kind;
            by_kind.sample(&[kind], peers.iter().filter(is_kind).count());
        }
        let counters = |count: fn(&pb::PeerStatus) -> u64| {
            peers.iter().map(move |peer| (peer.public_key.as_str(), count(peer)))
        };
        text.one(&RECEIVED_BYTES, self.received.update(counters(|peer| peer.rx_bytes)));
        text.one(&SENT_BYTES, self.sent.update(counters(|peer| peer.tx_bytes)));
        let without_series = if peers.len() > PEER_SERIES { peers.len() } else { 0 };
        text.one(&PEERS_WITHOUT_SERIES, without_series);
        if without_series == 0 {
            each_peer(text, peers);
        }
    }
}

fn of_agent(text: &mut Exposition, status: &pb::StatusResponse) {
    text.family(&BUILD_INFO).sample(&[status.version.as_str()], 1_u64);
    text.one(&UPTIME, seconds(status.uptime_ms));
    text.one(&DOWN, status.state == "down");
    text.one(&APPLIED, status.applied.unwrap_or(false));
    if status.certificate_expires_at > 0 {
        text.one(&CERTIFICATE_EXPIRY, status.certificate_expires_at as f64);
    }
    let mut problems = text.family(&PROBLEMS);
    for (code, count) in by_code(&status.problem_details) {
        problems.sample(&[code], count);
    }
    let mut notes = text.family(&NOTES);
    for (code, count) in by_code(&status.note_details) {
        notes.sample(&[code], count);
    }
    if let Some(kubernetes) = &status.kubernetes {
        text.one(&KUBERNETES_CONNECTED, kubernetes.connected);
    }
    if let Some(endpoint) = &status.api_endpoint {
        of_api_endpoint(text, endpoint);
    }
}

/// The number of servers is bounded, so their names may be labels.
fn of_api_endpoint(text: &mut Exposition, endpoint: &pb::ApiEndpointStatus) {
    text.one(&API_ENDPOINT_LISTENING, endpoint.listening);
    text.one(&API_ENDPOINT_CONNECTIONS, endpoint.connections);
    text.one(&API_ENDPOINT_REFUSED, endpoint.refused);
    let mut chosen = text.family(&API_SERVER_CHOSEN);
    for server in &endpoint.servers {
        chosen.sample(&[server.name.as_str()], server.name == endpoint.server);
    }
    let mut failing = text.family(&API_SERVER_FAILING);
    for server in &endpoint.servers {
        failing.sample(&[server.name.as_str()], server.state == "failing");
    }
}

fn of_controller(text: &mut Exposition, status: &pb::StatusResponse) {
    let Some(controller) = &status.controller else { return };
    text.one(&CONTROLLER_CONNECTED, controller.connected);
    text.one(&MAP_REVISION, controller.revision);
    if let Some(silence) = controller.last_heard_ms {
        text.one(&CONTROLLER_SILENCE, seconds(silence));
    }
}

fn of_data_plane(text: &mut Exposition, status: &pb::StatusResponse) {
    let mut drops = text.family(&DROPS);
    for drop in &status.drops {
        drops.sample(&[drop.name.as_str()], drop.count);
    }
    let mut features = text.family(&FEATURE_ACTIVE);
    for feature in &status.features {
        features.sample(&[feature.name.as_str()], feature.active);
    }
    if let Some(relay) = &status.relay {
        text.one(&RELAY_NODES, relay.nodes);
        text.one(&RELAY_CHANNELS, relay.channels);
        text.one(&RELAY_BYTES, relay.bytes);
    }
}

/// Adds the metrics that have a sample for each peer. Names of static peers are in the configuration and may equal
/// that of a node, so the origin is a label, too.
fn each_peer(text: &mut Exposition, peers: &[pb::PeerStatus]) {
    let named = || peers.iter().map(|peer| ([peer.name.as_str(), origin(peer)], peer));
    let mut up = text.family(&PEER_UP);
    for (labels, peer) in named() {
        up.sample(&labels, peer.state == "up");
    }
    let mut relayed = text.family(&PEER_RELAYED);
    for (labels, peer) in named() {
        relayed.sample(&labels, peer.path_kind == "relay");
    }
    let mut rtt = text.family(&PEER_RTT);
    for (labels, peer) in named() {
        if let Some(micros) = peer.rtt_us {
            rtt.sample(&labels, std::time::Duration::from_micros(micros).as_secs_f64());
        }
    }
    let mut mtu = text.family(&PEER_MTU);
    for (labels, peer) in named() {
        if let Some(bytes) = peer.mtu {
            mtu.sample(&labels, bytes);
        }
    }
    let mut handshake = text.family(&PEER_HANDSHAKE_AGE);
    for (labels, peer) in named() {
        if let Some(age) = peer.handshake_age_ms {
            handshake.sample(&labels, seconds(age));
        }
    }
    let mut received = text.family(&PEER_RECEIVED_BYTES);
    for (labels, peer) in named() {
        received.sample(&labels, peer.rx_bytes);
    }
    let mut sent = text.family(&PEER_SENT_BYTES);
    for (labels, peer) in named() {
        sent.sample(&labels, peer.tx_bytes);
    }
}

/// Returns where a peer comes from. A static peer is no node, and has no id.
fn origin(peer: &pb::PeerStatus) -> &'static str {
    if peer.node_id.is_empty() { "configuration" } else { "mesh" }
}

fn path_kind(peer: &pb::PeerStatus) -> &str {
    if peer.path_kind.is_empty() { "none" } else { &peer.path_kind }
}

/// Returns how often each code occurs.
fn by_code(details: &[pb::Detail]) -> BTreeMap<&str, u64> {
    let mut counts = BTreeMap::new();
    for detail in details {
        *counts.entry(detail.code.as_str()).or_default() += 1;
    }
    counts
}

fn seconds(milliseconds: u64) -> f64 {
    std::time::Duration::from_millis(milliseconds).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, state: &str, rx_bytes: u64) -> pb::PeerStatus {
        pb::PeerStatus {
            name: name.to_owned(),
            node_id: "1".to_owned(),
            state: state.to_owned(),
            public_key: format!("key of {name}"),
            rtt_us: Some(1_500),
            handshake_age_ms: Some(2_000),
            mtu: Some(1_420),
            rx_bytes,
            ..pb::PeerStatus::default()
        }
    }

    fn has(text: &str, line: &str) -> bool {
        text.lines().any(|found| found == line)
    }

    #[test]
    fn a_status_becomes_metrics_of_the_table() {
        let status = pb::StatusResponse {
            version: "1.2.3".into(),
            state: "running".into(),
            applied: Some(true),
            uptime_ms: 1_500,
            certificate_expires_at: 1_700_000_000,
            controller: Some(pb::ControllerStatus {
                connected: true,
                revision: 7,
                last_heard_ms: Some(250),
                ..pb::ControllerStatus::default()
            }),
            kubernetes: Some(pb::KubernetesStatus::default()),
            api_endpoint: Some(pb::ApiEndpointStatus {
                listening: true,
                server: "cp-1".into(),
                servers: [("cp-1", "healthy"), ("cp-2", "failing")]
                    .map(|(name, state)| pb::ApiServerStatus {
                        name: name.into(),
                        state: state.into(),
                        ..pb::ApiServerStatus::default()
                    })
                    .into(),
                connections: 3,
                refused: 4,
                ..pb::ApiEndpointStatus::default()
            }),
            relay: Some(pb::RelayStatus { nodes: 2, channels: 1, bytes: 10 }),
            drops: vec![pb::Counter { name: "no_route".into(), count: 3 }],
            features: vec![pb::Feature {
                name: "tun-tcp".into(),
                active: true,
                ..pb::Feature::default()
            }],
            problem_details: vec![
                pb::Detail { code: "a".into(), ..pb::Detail::default() },
                pb::Detail { code: "a".into(), ..pb::Detail::default() },
            ],
            note_details: vec![pb::Detail { code: "b".into(), ..pb::Detail::default() }],
            ..pb::StatusResponse::default()
        };
        let peers = [peer("gpu-1", "up", 5), peer("gpu-2", "down", 6)];
        let text = Collector::default().collect(&status, &peers);
        for line in [
            "towline_build_info{version=\"1.2.3\"} 1",
            "towline_uptime_seconds 1.5",
            "towline_host_applied 1",
            "towline_machine_down 0",
            "towline_certificate_expiry_timestamp_seconds 1700000000",
            "towline_session_connected 1",
            "towline_session_silence_seconds 0.25",
            "towline_peers{state=\"up\"} 1",
            "towline_peers{state=\"idle\"} 0",
            "towline_peer_paths{kind=\"none\"} 2",
            "towline_peer_up{peer=\"gpu-1\",origin=\"mesh\"} 1",
            "towline_peer_rtt_seconds{peer=\"gpu-1\",origin=\"mesh\"} 0.0015",
            "towline_received_bytes_total 11",
            "towline_problems{code=\"a\"} 2",
            "towline_dropped_packets_total{reason=\"no_route\"} 3",
            "towline_feature_active{feature=\"tun-tcp\"} 1",
            "towline_relay_forwarded_bytes_total 10",
            "towline_kubernetes_connected 0",
            "towline_api_endpoint_listening 1",
            "towline_api_endpoint_connections 3",
            "towline_api_endpoint_refused_clients_total 4",
            "towline_api_server_chosen{node=\"cp-1\"} 1",
            "towline_api_server_chosen{node=\"cp-2\"} 0",
            "towline_api_server_failing{node=\"cp-2\"} 1",
        ] {
            assert!(has(&text, line), "{line}\n{text}");
        }
        // This snapshot has everything, so each metric of the table occurs, and no other.
        let names = |text: &str| -> Vec<String> {
            let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
            let mut names: Vec<_> =
                types.filter_map(|line| Some(line.split_once(' ')?.0.to_owned())).collect();
            names.sort_unstable();
            names
        };
        let mut table: Vec<String> = METRICS.iter().map(|metric| metric.name.to_owned()).collect();
        table.sort_unstable();
        assert_eq!(names(&text), table);
    }

    #[test]
    fn a_large_mesh_has_aggregates_alone() {
        let peers: Vec<_> = (0..=PEER_SERIES).map(|i| peer(&format!("n{i}"), "up", 1)).collect();
        let text = Collector::default().collect(&pb::StatusResponse::default(), &peers);
        assert!(!text.contains("towline_peer_up{"));
        assert!(has(&text, "towline_peers_without_series 257"), "{text}");
        assert!(has(&text, "towline_peers{state=\"up\"} 257"));
        let text = Collector::default().collect(&pb::StatusResponse::default(), &peers[1..]);
        assert!(text.contains("towline_peer_up{") && has(&text, "towline_peers_without_series 0"));
    }

    #[test]
    fn totals_never_shrink() {
        let mut collector = Collector::default();
        let mut received = |peers: &[pb::PeerStatus]| {
            let text = collector.collect(&pb::StatusResponse::default(), peers);
            let line =
                text.lines().find_map(|line| line.strip_prefix("towline_received_bytes_total "));
            line.unwrap().parse::<u64>().unwrap()
        };
        assert_eq!(received(&[peer("a", "up", 10), peer("b", "up", 5)]), 15);
        assert_eq!(received(&[peer("a", "up", 12)]), 17, "b was removed");
        assert_eq!(received(&[peer("a", "up", 3)]), 20, "a new data plane counts from zero");
        assert_eq!(received(&[]), 20);
        let [own, twice] = [peer("c", "up", 7), peer("c", "down", 7)];
        assert_eq!(received(&[own, twice]), 27, "one key is counted once");
    }

    #[test]
    fn a_machine_that_is_down_says_so() {
        let status = pb::StatusResponse { state: "down".into(), ..pb::StatusResponse::default() };
        let text = Collector::default().collect(&status, &[]);
        assert!(has(&text, "towline_machine_down 1") && has(&text, "towline_host_applied 0"));
    }
}
