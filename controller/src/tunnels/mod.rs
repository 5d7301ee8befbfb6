//! Tunnels of the mesh as the nodes report them: who reaches which node by which path.
//!
//! [`Reported`] reads the controller's state. Everything else here is a pure function of the messages that the
//! RPC `ListTunnels` returns, so that the command line and the web page show the same.

pub mod graph;
pub mod matrix;

use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use towline_proto::code::Coded as _;
use towline_proto::id::NodeName;
use towline_proto::pb;
use towline_proto::status::time_text;
use towline_proto::summary::{PeerSummary, Tunnel};
use towline_registry::Now;
use towline_registry::sessions::Sessions;

use crate::summaries::Summaries;
use crate::view::{NodeView, View};

/// State of the controller that the tunnels are read from.
#[derive(Clone)]
pub struct Reported {
    /// Nodes of the mesh.
    pub view: Arc<View>,
    /// Sessions of the connected nodes.
    pub sessions: Arc<Mutex<Sessions>>,
    /// Newest summaries of the nodes.
    pub summaries: Arc<Summaries>,
}

impl Reported {
    /// Returns at most `limit` nodes after `after`, sorted by name.
    pub fn nodes(&self, after: Option<&NodeName>, limit: usize, now: Now) -> Vec<pb::NodeTunnels> {
        let nodes = self.view.nodes(after, limit);
        let presence: Vec<(bool, i64)> = {
            let sessions = self.sessions.lock();
            let of = |id| (sessions.is_online(id, now), sessions.last_seen(id, now));
            nodes.iter().map(|node| of(node.id)).collect()
        };
        let nodes = nodes.iter().zip(presence);
        nodes.map(|(node, presence)| self.node(node, presence, now)).collect()
    }

    fn node(&self, node: &NodeView, presence: (bool, i64), now: Now) -> pb::NodeTunnels {
        let (online, last_seen) = presence;
        let empty = pb::NodeTunnels {
            name: node.name.to_string(),
            site: node.site.as_ref().map(ToString::to_string).unwrap_or_default(),
            online,
            last_seen,
            ..Default::default()
        };
        let Some(kept) = self.summaries.of(node.id) else { return empty };
        let counts = kept.summary.counts;
        pb::NodeTunnels {
            reported_seconds: Some(now.since(kept.at.mono).as_secs()),
            direct: counts.direct,
            relayed: counts.relayed,
            connecting: counts.connecting,
            down: counts.down,
            idle: counts.idle,
            peers: kept.summary.peers.iter().filter_map(|peer| self.peer(peer)).collect(),
            ..empty
        }
    }

    /// Returns the message of a reported peer. `None` if it is no member.
    fn peer(&self, peer: &PeerSummary) -> Option<pb::PeerTunnel> {
        let name = self.view.name(peer.node)?.to_string();
        Some(pb::PeerTunnel {
            name,
            state: pb::TunnelState::from(&peer.tunnel).into(),
            relay: peer.tunnel.relay().map(ToString::to_string).unwrap_or_default(),
            rtt_us: peer.rtt_us,
            loss_permille: peer.loss_permille.map(u32::from),
            mtu: peer.mtu.map(u32::from),
            reason_code: peer.reason_code.as_deref().unwrap_or_default().to_owned(),
        })
    }
}

/// Returns the code of a tunnel's state. An unknown one of a newer controller is `unknown`.
pub fn state_code(state: pb::TunnelState) -> &'static str {
    match state {
        pb::TunnelState::Unspecified => "unknown",
        pb::TunnelState::Idle => Tunnel::Idle.code(),
        pb::TunnelState::Connecting => Tunnel::Connecting.code(),
        pb::TunnelState::Down => Tunnel::Down.code(),
        pb::TunnelState::Direct => Tunnel::Direct.code(),
        pb::TunnelState::Relayed => Tunnel::Relayed(None).code(),
    }
}

/// A node in the output of `mesh status` and of the web page.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NodeStatus {
    /// Name of the node.
    pub name: String,
    /// Site of the node, if it has one.
    pub site: Option<String>,
    /// True if the node has a session with the controller.
    pub online: bool,
    /// Time of the node's last session.
    pub last_seen: Option<String>,
    /// Seconds since the node reported its tunnels. Absent if it did not since the controller's start, for
    /// example because its agent is too old; the numbers below are then 0.
    pub reported_seconds: Option<u64>,
    /// Number of peers that are up, directly or through a relay.
    pub peers_up: u32,
    /// Number of peers that are up through a relay.
    pub peers_relayed: u32,
    /// Number of peers to which paths are being tried.
    pub peers_connecting: u32,
    /// Number of peers without a path.
    pub peers_down: u32,
    /// Number of peers without traffic, to which no path is tried.
    pub peers_idle: u32,
    /// The worst of the reported peers, with what is wrong or its round-trip time.
    pub worst: Option<String>,
}

/// A tunnel in the output of `mesh matrix` and of the web page: one direction of a pair of nodes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TunnelStatus {
    /// Name of the node that reported it.
    pub from: String,
    /// Name of the peer.
    pub to: String,
    /// State: `direct` or `relay` (the peer is up by this kind of path), `connecting`, `down` or `idle`.
    pub state: String,
    /// Name of the relay on the path.
    pub relay: Option<String>,
    /// Round-trip time in microseconds.
    pub rtt_us: Option<u32>,
    /// Share of the last pings that were lost, in percent.
    pub loss_percent: Option<f64>,
    /// Largest inner packet in bytes that the path carries.
    pub mtu: Option<u32>,
    /// Code of the reason if the peer is not up, or relayed.
    pub reason_code: Option<String>,
}

impl From<&pb::NodeTunnels> for NodeStatus {
    fn from(node: &pb::NodeTunnels) -> Self {
        Self {
            name: node.name.clone(),
            site: some(&node.site),
            online: node.online,
            last_seen: time_text(node.last_seen),
            reported_seconds: node.reported_seconds,
            peers_up: node.direct.saturating_add(node.relayed),
            peers_relayed: node.relayed,
            peers_connecting: node.connecting,
            peers_down: node.down,
            peers_idle: node.idle,
            worst: worst(&node.peers),
        }
    }
}

/// Returns the tunnels that a node reported.
pub fn tunnels(node: &pb::NodeTunnels) -> impl Iterator<Item = TunnelStatus> + '_ {
    node.peers.iter().map(|peer| TunnelStatus {
        from: node.name.clone(),
        to: peer.name.clone(),
        state: state_code(peer.state()).to_owned(),
        relay: some(&peer.relay),
        rtt_us: peer.rtt_us,
        loss_percent: peer.loss_permille.map(percent),
        mtu: peer.mtu,
        reason_code: some(&peer.reason_code),
    })
}

/// Returns the worst peer: one that is down, else one to which paths are tried, else the one with the most loss,
/// else the one with the longest round-trip time.
fn worst(peers: &[pb::PeerTunnel]) -> Option<String> {
    let rank = |peer: &pb::PeerTunnel| match peer.state() {
        pb::TunnelState::Down => 2,
        pb::TunnelState::Connecting => 1,
        _ => 0,
    };
    let figures = |peer: &pb::PeerTunnel| {
        (rank(peer), peer.loss_permille.unwrap_or(0), peer.rtt_us.unwrap_or(0))
    };
    let worst = peers.iter().max_by_key(|peer| figures(peer))?;
    let name = &worst.name;
    match (figures(worst), worst.reason_code.as_str()) {
        ((0, 0, 0), _) => None,
        ((0, 0, rtt), _) => Some(format!("{name} {}", rtt_text(rtt))),
        ((0, loss, _), _) => Some(format!("{name} loses {} %", percent(loss))),
        (_, "") => Some(format!("{name} {}", state_code(worst.state()))),
        (_, reason) => Some(format!("{name} {} ({reason})", state_code(worst.state()))),
    }
}

fn percent(permille: u32) -> f64 {
    f64::from(permille) / 10.0
}

/// Formats a round-trip time for people.
fn rtt_text(rtt_us: u32) -> String {
    towline_service::output::rtt(rtt_us.into())
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// Meshes for tests.
#[cfg(test)]
pub(crate) mod testing {
    use towline_proto::pb;

    /// Returns a peer that is up by a direct path.
    pub(crate) fn direct(name: &str, rtt_us: u32) -> pb::PeerTunnel {
        pb::PeerTunnel { rtt_us: Some(rtt_us), ..in_state(name, pb::TunnelState::Direct) }
    }

    /// Returns a peer in this state.
    pub(crate) fn in_state(name: &str, state: pb::TunnelState) -> pb::PeerTunnel {
        pb::PeerTunnel { name: name.into(), state: state.into(), ..Default::default() }
    }

    /// Returns a node that reported these peers.
    pub(crate) fn node(name: &str, site: &str, peers: Vec<pb::PeerTunnel>) -> pb::NodeTunnels {
        let count = |state: pb::TunnelState| {
            u32::try_from(peers.iter().filter(|peer| peer.state() == state).count()).unwrap()
        };
        pb::NodeTunnels {
            name: name.into(),
            site: site.into(),
            online: true,
            last_seen: 1_700_000_000,
            reported_seconds: Some(7),
            direct: count(pb::TunnelState::Direct),
            relayed: count(pb::TunnelState::Relayed),
            connecting: count(pb::TunnelState::Connecting),
            down: count(pb::TunnelState::Down),
            idle: count(pb::TunnelState::Idle),
            peers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{direct, in_state, node};
    use super::*;

    #[test]
    fn the_worst_peer_is_the_one_to_look_at_first() {
        let lossy = pb::PeerTunnel { loss_permille: Some(25), ..direct("c", 10) };
        let down = pb::PeerTunnel {
            reason_code: "no-answer".into(),
            ..in_state("d", pb::TunnelState::Down)
        };
        let mut peers = vec![in_state("z", pb::TunnelState::Idle)];
        let mut add = |peer: pb::PeerTunnel| {
            peers.push(peer);
            worst(&peers)
        };
        assert_eq!(add(direct("a", 420)).as_deref(), Some("a 0.42 ms"));
        assert_eq!(add(direct("b", 100)).as_deref(), Some("a 0.42 ms"));
        assert_eq!(add(lossy).as_deref(), Some("c loses 2.5 %"));
        let connecting = in_state("e", pb::TunnelState::Connecting);
        assert_eq!(add(connecting).as_deref(), Some("e connecting"));
        assert_eq!(add(down).as_deref(), Some("d down (no-answer)"));
        assert_eq!(worst(&[in_state("z", pb::TunnelState::Idle)]), None);
    }

    #[test]
    fn a_node_and_its_tunnels_are_shown_as_they_were_reported() {
        let relayed = pb::PeerTunnel {
            relay: "r".into(),
            loss_permille: Some(100),
            ..in_state("b", pb::TunnelState::Relayed)
        };
        let node = node("a", "", vec![direct("c", 420), relayed]);
        let status = NodeStatus::from(&node);
        assert_eq!((status.site, status.peers_up, status.peers_relayed), (None, 2, 1));
        let tunnels: Vec<_> = tunnels(&node).collect();
        assert_eq!((tunnels[0].state.as_str(), tunnels[0].rtt_us), ("direct", Some(420)));
        assert_eq!((tunnels[1].state.as_str(), tunnels[1].loss_percent), ("relay", Some(10.0)));
        assert_eq!(tunnels[1].relay.as_deref(), Some("r"));
    }
}
