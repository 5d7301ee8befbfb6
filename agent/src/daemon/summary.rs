//! What this node reports about its tunnels to the controller, for the operators of the mesh.
//!
//! A report is bounded: the peers that matter, and of the others a sample and their number.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use towline_core::status::{PeerState, PeerStatus};
use towline_proto::backoff::Jitter;
use towline_proto::code::Coded as _;
use towline_proto::id::NodeId;
use towline_proto::limits;
use towline_proto::summary::{MeshSummary, PeerSummary, Tunnel};

/// Delay of the first report after a session was opened. Most tunnels are up by then.
const FIRST: Duration = Duration::from_secs(5);
/// Interval between two reports. With its jitter it is at least 30 s.
const PERIOD: Duration = Duration::from_secs(40);
/// Jitter of both, so that the nodes of a mesh do not report at the same time.
const JITTER: Jitter = Jitter::Fifth;

/// Schedule of the reports.
#[derive(Debug, Default)]
pub(super) struct SummarySchedule {
    /// Time of the next report. `None` until a session was opened.
    due: Option<Instant>,
    /// Time of the last report.
    sent: Option<Instant>,
}

impl SummarySchedule {
    /// Plans the first report of a session that was opened now.
    pub(super) fn connected(&mut self, now: Instant, random: u64) {
        let first = now + JITTER.apply(FIRST, random);
        // Sessions that flap earn no more reports.
        let next = self.sent.map(|sent| sent + JITTER.apply(PERIOD, random));
        self.due = Some(next.map_or(first, |next| next.max(first)));
    }

    /// Plans the next report, as one is made now.
    pub(super) fn reported(&mut self, now: Instant, random: u64) {
        self.sent = Some(now);
        self.due = Some(now + JITTER.apply(PERIOD, random));
    }

    /// Returns when a report is to be made.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }
}

/// Returns the summary of the node `own`. `peers` has each peer with its traffic in bytes per second.
pub(super) fn summarize(
    own: NodeId,
    peers: impl IntoIterator<Item = (PeerStatus, u64)>,
) -> MeshSummary {
    let mut summary = MeshSummary::default();
    let mut ranked = Vec::new();
    for (peer, traffic) in peers {
        let reported = summary_of(&peer);
        summary.counts.add(&reported.tunnel);
        let need = match reported.tunnel {
            Tunnel::Down | Tunnel::Connecting => 0,
            Tunnel::Relayed(_) => 1,
            Tunnel::Direct if traffic > 0 => 2,
            Tunnel::Direct => 3,
            Tunnel::Idle => 4,
        };
        // The nodes that follow this one in the order of their ids: each node has others, so that the reports of
        // all are a sample of the whole mesh.
        let is_before = reported.node < own;
        ranked.push(((need, Reverse(traffic), is_before, reported.node), reported));
    }
    ranked.sort_unstable_by_key(|(rank, _)| *rank);
    ranked.truncate(limits::SUMMARY_PEERS);
    summary.peers = ranked.into_iter().map(|(_, peer)| peer).collect();
    summary
}

fn summary_of(peer: &PeerStatus) -> PeerSummary {
    let is_relayed = peer.path.is_some_and(|path| path.is_relayed());
    let tunnel = match peer.state {
        PeerState::Idle => Tunnel::Idle,
        PeerState::Connecting => Tunnel::Connecting,
        PeerState::Down => Tunnel::Down,
        PeerState::Up if is_relayed => Tunnel::Relayed(peer.relay.clone()),
        PeerState::Up => Tunnel::Direct,
    };
    let code = peer.reason.as_ref().map(|reason| reason.code());
    PeerSummary {
        node: peer.node.grant().node_id,
        tunnel,
        rtt_us: peer.rtt.map(|rtt| u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX)),
        // A share is at most 1, so the value is at most 1,000.
        loss_permille: peer.loss.map(|loss| (loss.clamp(0.0, 1.0) * 1000.0).round() as u16),
        mtu: peer.mtu,
        reason_code: code.filter(|code| code.len() <= limits::CODE_BYTES).map(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use towline_core::path::Path;
    use towline_fixtures::node::node;

    use super::*;

    fn peer(number: u8, state: PeerState) -> PeerStatus {
        let path = Path::direct("192.0.2.1:51830".parse().unwrap());
        PeerStatus {
            node: Arc::new(node(number).build()),
            state,
            since: Instant::now(),
            reason: None,
            path: (state == PeerState::Up).then_some(path),
            relay: None,
            mtu: Some(1420),
            rtt: Some(Duration::from_micros(420)),
            loss: Some(0.025),
            is_single: false,
            last_handshake: None,
            prefixes: Vec::new(),
            conflicts: Vec::new(),
        }
    }

    fn id(number: u8) -> NodeId {
        node(number).grant.node_id
    }

    #[test]
    fn a_report_has_the_peers_that_matter_and_counts_all() {
        let mut peers: Vec<_> = (1..=200).map(|number| (peer(number, PeerState::Up), 0)).collect();
        peers.push((peer(201, PeerState::Idle), 0));
        peers.push((peer(202, PeerState::Up), 1_000));
        peers.push((peer(203, PeerState::Down), 0));
        let summary = summarize(id(100), peers);
        assert_eq!((summary.counts.direct, summary.counts.idle, summary.counts.down), (201, 1, 1));
        assert_eq!(summary.peers.len(), limits::SUMMARY_PEERS);
        let first: Vec<NodeId> = summary.peers.iter().take(4).map(|peer| peer.node).collect();
        assert_eq!(first, [id(203), id(202), id(100), id(101)], "then those that follow the node");
        let up = &summary.peers[1];
        assert_eq!((up.rtt_us, up.loss_permille, up.mtu), (Some(420), Some(25), Some(1420)));
    }

    #[test]
    fn reports_are_at_least_thirty_seconds_apart() {
        let start = Instant::now();
        for random in [0, u64::MAX / 2, u64::MAX] {
            let mut schedule = SummarySchedule::default();
            assert_eq!(schedule.due(), None);
            schedule.connected(start, random);
            let first = schedule.due().unwrap();
            assert!(first < start + Duration::from_secs(10));
            schedule.reported(first, random);
            assert!(schedule.due().unwrap() >= first + Duration::from_secs(30));
            // The session ends, and another one begins at once.
            schedule.connected(first + Duration::from_secs(1), random);
            assert!(schedule.due().unwrap() >= first + Duration::from_secs(30));
        }
    }
}
