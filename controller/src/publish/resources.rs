//! Objects that the publisher wants to exist: pure functions of what the nodes report.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use ring::digest::{SHA256, digest};
use serde::Serialize;
use towline_proto::pb;
use towline_proto::status::time_text;

use crate::tunnels::state_code;

/// Group of the resources.
pub const GROUP: &str = "towline.io";
/// Version of the resources.
pub const VERSION: &str = "v1alpha1";
/// Largest number of `TowlinePath` objects. The API server keeps every object in memory and in etcd.
pub const PATHS: usize = 1_000;
/// Largest length of the part of an object's name that people read, in bytes. Kubernetes allows 253 in all.
const READABLE: usize = 200;

/// Kind of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A member of the mesh.
    Node,
    /// A tunnel that is not up by a direct path, as one of its ends reports it.
    Path,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 2] = [Self::Node, Self::Path];

    /// Returns the name of the kind.
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "TowlineNode",
            Self::Path => "TowlinePath",
        }
    }

    /// Returns the name of the kind in addresses.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Node => "towlinenodes",
            Self::Path => "towlinepaths",
        }
    }
}

/// Kind and name of an object.
pub type Key = (Kind, String);

/// Content of an object that the publisher owns.
#[derive(Debug, Clone, PartialEq)]
pub enum Status {
    /// Status of a `TowlineNode`.
    Node(NodeStatus),
    /// Status of a `TowlinePath`.
    Path(PathStatus),
}

/// Status of a `TowlineNode`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Name of the node in the mesh.
    pub node: String,
    /// Site of the node; empty if it has none.
    pub site: String,
    /// Time of the last session with the controller; empty while there is one, so that a connected
    /// node is not written again and again.
    pub last_seen: String,
    /// Number of peers that are up, directly or through a relay.
    pub peers_up: u32,
    /// Number of peers that are up through a relay.
    pub peers_relayed: u32,
    /// Number of peers without a path.
    pub peers_down: u32,
    /// `Connected` and `PeersReachable`.
    pub conditions: Vec<Condition>,
}

/// Status of a `TowlinePath`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PathStatus {
    /// Name of the node that reports it.
    pub from: String,
    /// Name of the peer.
    pub to: String,
    /// State: `relay`, `connecting` or `down`.
    pub state: String,
    /// Name of the relay; empty if there is none or it is not known.
    pub relay: String,
    /// Code of the reason; empty if there is none.
    pub reason: String,
}

/// Returns every object that should exist.
pub fn wanted(nodes: &[pb::NodeTunnels], now: Timestamp) -> BTreeMap<Key, Status> {
    let mut objects = BTreeMap::new();
    for node in nodes {
        let status = Status::Node(node_status(node, now));
        objects.insert((Kind::Node, object_name(&[&node.name])), status);
    }
    let mut paths: Vec<PathStatus> = nodes.iter().flat_map(problems).collect();
    // Those without a path come first, so that the bound cuts off the relayed ones.
    paths.sort_by(|a, b| {
        let rank = |path: &PathStatus| path.state != state_code(pb::TunnelState::Down);
        (rank(a), &a.from, &a.to).cmp(&(rank(b), &b.from, &b.to))
    });
    paths.truncate(PATHS);
    for path in paths {
        let name = object_name(&[&path.from, &path.to]);
        objects.insert((Kind::Path, name), Status::Path(path));
    }
    objects
}

fn node_status(node: &pb::NodeTunnels, now: Timestamp) -> NodeStatus {
    let connected = match node.online {
        true => ("True", "SessionOpen", "the node has a session with the controller".to_owned()),
        false => ("False", "NoSession", "the node has no session with the controller".to_owned()),
    };
    let reachable = match (node.reported_seconds, node.down) {
        (None, _) => ("Unknown", "NotReported", "the node did not report its tunnels".to_owned()),
        (Some(_), 0) => ("True", "EveryPeerHasAPath", "every peer in use has a path".to_owned()),
        (Some(_), down) => ("False", "PeersDown", {
            let peers = if down == 1 { "peer has" } else { "peers have" };
            format!("{down} {peers} no path: see TowlinePath")
        }),
    };
    NodeStatus {
        node: node.name.clone(),
        site: node.site.clone(),
        last_seen: match node.online {
            true => String::new(),
            false => time_text(node.last_seen).unwrap_or_default(),
        },
        peers_up: node.direct.saturating_add(node.relayed),
        peers_relayed: node.relayed,
        peers_down: node.down,
        conditions: vec![
            condition("Connected", connected, now),
            condition("PeersReachable", reachable, now),
        ],
    }
}

fn condition(
    type_: &str,
    (status, reason, message): (&str, &str, String),
    now: Timestamp,
) -> Condition {
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: Time(now),
        observed_generation: None,
    }
}

/// Returns the tunnels of a node that are not up by a direct path and not idle.
fn problems(node: &pb::NodeTunnels) -> impl Iterator<Item = PathStatus> {
    let is_shown = |state| match state {
        pb::TunnelState::Down | pb::TunnelState::Connecting | pb::TunnelState::Relayed => true,
        pb::TunnelState::Unspecified | pb::TunnelState::Idle | pb::TunnelState::Direct => false,
    };
    node.peers.iter().filter(move |peer| is_shown(peer.state())).map(|peer| PathStatus {
        from: node.name.clone(),
        to: peer.name.clone(),
        state: state_code(peer.state()).to_owned(),
        relay: peer.relay.clone(),
        reason: peer.reason_code.clone(),
    })
}

/// Returns the name of an object: what people read, and a hash that tells names apart that are cut or joined to
/// the same text.
fn object_name(parts: &[&str]) -> String {
    let hash = digest(&SHA256, parts.join("\0").as_bytes());
    let hash = data_encoding::HEXLOWER.encode(hash.as_ref().get(..4).unwrap_or_default());
    let mut readable = parts.join(".").to_ascii_lowercase();
    readable.truncate(READABLE);
    match parts {
        // A node's name is an object's name already.
        [one] if *one == readable => readable,
        _ => format!("{}.{hash}", readable.trim_end_matches(['.', '-'])),
    }
}

/// Keeps the time of the last transition of each condition whose status did not change since `before`.
pub fn keep_transitions(before: &Status, now: &mut Status) {
    let (Status::Node(before), Status::Node(now)) = (before, now) else { return };
    for condition in &mut now.conditions {
        let same = before.conditions.iter().find(|old| old.type_ == condition.type_);
        if let Some(old) = same.filter(|old| old.status == condition.status) {
            condition.last_transition_time = old.last_transition_time.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, online: bool) -> pb::NodeTunnels {
        pb::NodeTunnels {
            name: name.to_owned(),
            online,
            last_seen: 1_700_000_000,
            reported_seconds: Some(3),
            ..Default::default()
        }
    }

    fn peer(name: &str, state: pb::TunnelState) -> pb::PeerTunnel {
        pb::PeerTunnel { name: name.to_owned(), state: state.into(), ..Default::default() }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn a_node_is_an_object_with_its_own_name() {
        let objects = wanted(&[node("gpu-1.dc", false)], at(1));
        let Status::Node(status) = &objects[&(Kind::Node, "gpu-1.dc".to_owned())] else {
            panic!("no node")
        };
        assert_eq!(status.last_seen, "2023-11-14T22:13:20Z");
        let told: Vec<_> =
            status.conditions.iter().map(|one| (&*one.type_, &*one.status)).collect();
        assert_eq!(told, [("Connected", "False"), ("PeersReachable", "True")]);
    }

    #[test]
    fn only_paths_that_somebody_would_look_at_are_objects() {
        let mut from = node("a", true);
        from.peers = vec![
            peer("b", pb::TunnelState::Direct),
            peer("c", pb::TunnelState::Idle),
            peer("d", pb::TunnelState::Relayed),
            peer("e", pb::TunnelState::Down),
        ];
        let objects = wanted(&[from], at(1));
        let paths = objects.values().filter_map(|status| match status {
            Status::Path(path) => Some((&*path.to, &*path.state)),
            Status::Node(_) => None,
        });
        let paths: Vec<_> = paths.collect();
        assert_eq!(paths, [("d", "relay"), ("e", "down")]);
    }

    #[test]
    fn what_is_down_stays_when_there_are_too_many_paths() {
        let mut from = node("a", true);
        from.peers =
            (0..PATHS).map(|at| peer(&format!("r{at}"), pb::TunnelState::Relayed)).collect();
        from.peers.push(peer("z", pb::TunnelState::Down));
        let objects = wanted(&[from], at(1));
        assert_eq!(objects.len(), 1 + PATHS);
        let down = |status: &Status| matches!(status, Status::Path(path) if path.to == "z");
        assert!(objects.values().any(down));
    }

    #[test]
    fn paths_whose_names_join_to_the_same_text_are_two_objects() {
        assert_ne!(object_name(&["a.b", "c"]), object_name(&["a", "b.c"]));
        let long = "n".repeat(253);
        let name = object_name(&[&long, &long]);
        assert!(name.len() <= 253, "{name}");
    }

    #[test]
    fn a_condition_keeps_its_time_while_its_status_is_the_same() {
        let status = |online, seconds| Status::Node(node_status(&node("a", online), at(seconds)));
        let before = status(true, 1);
        let mut now = status(false, 2);
        keep_transitions(&before, &mut now);
        let Status::Node(now) = now else { panic!("no node") };
        let times: Vec<_> =
            now.conditions.iter().map(|one| one.last_transition_time.0.as_second()).collect();
        assert_eq!(times, [2, 1]);
    }
}
