//! Nodes and paths as their objects describe them.

use serde::{Deserialize, Serialize};
use towline_service::output;

/// Status of a `TowlineNode`. An older or newer publisher may leave fields out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Node {
    /// Name of the node in the mesh.
    pub(super) node: String,
    /// Site of the node; empty if it has none.
    pub(super) site: String,
    /// Time of the last session with the controller; empty while there is one.
    pub(super) last_seen: String,
    /// Number of peers that are up.
    pub(super) peers_up: u32,
    /// Number of peers that are up through a relay.
    pub(super) peers_relayed: u32,
    /// Number of peers without a path.
    pub(super) peers_down: u32,
    /// `Connected` and `PeersReachable`.
    pub(super) conditions: Vec<Condition>,
}

/// Condition of a `TowlineNode`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Condition {
    /// Name of the condition.
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// `True`, `False` or `Unknown`.
    pub(super) status: String,
    /// Reason in one word.
    pub(super) reason: String,
    /// Reason for people.
    pub(super) message: String,
    /// Time since which the status is the same.
    pub(super) last_transition_time: String,
}

/// Status of a `TowlinePath`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Path {
    /// Name of the node that reports it.
    pub(super) from: String,
    /// Name of the peer.
    pub(super) to: String,
    /// State: `relay`, `connecting` or `down`.
    pub(super) state: String,
    /// Name of the relay; empty if there is none.
    pub(super) relay: String,
    /// Code of the reason; empty if there is none.
    pub(super) reason: String,
}

impl Node {
    fn condition(&self, kind: &str) -> Option<&Condition> {
        self.conditions.iter().find(|condition| condition.kind == kind)
    }
}

/// Returns the table of `status`.
pub(super) fn table(nodes: &[Node], wide: bool) -> String {
    let mut header = vec!["NAME", "SITE", "CONNECTED", "REACHABLE", "UP", "RELAYED", "DOWN"];
    if wide {
        header.extend(["LAST SEEN", "REASON"]);
    }
    let rows = nodes.iter().map(|node| {
        let (connected, reachable) =
            (node.condition("Connected"), node.condition("PeersReachable"));
        let status = |condition: Option<&Condition>| {
            output::or_dash(condition.map(|condition| condition.status.to_lowercase()))
        };
        let mut row = vec![
            node.node.clone(),
            output::or_dash(Some(&node.site)),
            status(connected),
            status(reachable),
            node.peers_up.to_string(),
            node.peers_relayed.to_string(),
            node.peers_down.to_string(),
        ];
        if wide {
            row.push(output::or_dash(Some(&node.last_seen)));
            row.push(output::or_dash(reachable.map(|condition| &condition.message)));
        }
        row
    });
    output::table(&header, rows)
}

/// Returns the table of a node's paths.
pub(super) fn paths_table(paths: &[Path]) -> String {
    let rows = paths.iter().map(|path| {
        vec![
            path.to.clone(),
            path.state.clone(),
            output::or_dash(Some(&path.relay)),
            output::or_dash(Some(&path.reason)),
        ]
    });
    output::table(&["TO", "STATE", "RELAY", "REASON"], rows)
}

/// Parses the name of a Kubernetes node, so that it is neither a flag nor a part of a selector.
pub(super) fn name(text: &str) -> Result<String, String> {
    let inside = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let valid = text.len() <= 253
        && text.chars().all(inside)
        && edge(text.chars().next())
        && edge(text.chars().last());
    match valid {
        true => Ok(text.to_owned()),
        false => Err("a node's name has small letters, digits, `-` and `.`".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_flag_and_no_selector() {
        for good in ["gpu-1", "gpu-1.dc.example", "a"] {
            assert_eq!(name(good).as_deref(), Ok(good));
        }
        for bad in ["", "-o", "a,spec.nodeName=b", "a=b", "A", "a.", ".a", "a b", "a\n"] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_node_without_conditions_is_shown() {
        let node: Node = serde_json::from_str(r#"{"node": "a", "peersUp": 2, "new": 1}"#).unwrap();
        let table = table(&[node], true);
        assert!(table.contains("a ") && table.contains(" 2 "), "{table}");
    }
}
