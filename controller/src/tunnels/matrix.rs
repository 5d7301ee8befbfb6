//! The mesh as a table: nodes by nodes, or sites by sites if there are many nodes.

use std::collections::BTreeMap;

use towline_proto::pb;
use towline_service::output;

use super::{rtt_text, state_code};

/// Largest number of nodes that get a column each.
pub const NODES: usize = 40;

/// Name of the row of nodes without a site.
const NO_SITE: &str = "-";

/// Table with the same names at its rows and its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    /// Names of the rows and columns, sorted: nodes or sites.
    pub names: Vec<String>,
    /// Text of each cell, by row. The row is that of the node that reported it.
    pub cells: Vec<Vec<String>>,
    /// True if the rows are sites.
    pub is_by_site: bool,
}

/// What the tunnels from the nodes of one site to those of another have in common.
#[derive(Debug, Default)]
struct Between {
    up: usize,
    reported: usize,
    rtts: Vec<u32>,
}

impl Matrix {
    /// Returns the table of these nodes, by site if there are more than [`NODES`].
    pub fn of(nodes: &[pb::NodeTunnels]) -> Self {
        if nodes.len() > NODES { Self::of_sites(nodes) } else { Self::of_nodes(nodes) }
    }

    fn of_nodes(nodes: &[pb::NodeTunnels]) -> Self {
        let mut sorted: Vec<&pb::NodeTunnels> = nodes.iter().collect();
        sorted.sort_by_key(|node| (&node.site, &node.name));
        let row = |from: &pb::NodeTunnels| {
            let peers: BTreeMap<&str, &pb::PeerTunnel> =
                from.peers.iter().map(|peer| (peer.name.as_str(), peer)).collect();
            let to_node = |to: &&pb::NodeTunnels| match peers.get(to.name.as_str()) {
                _ if to.name == from.name => String::new(),
                Some(peer) => cell(peer),
                None => "?".to_owned(),
            };
            sorted.iter().map(to_node).collect::<Vec<String>>()
        };
        Self {
            names: sorted.iter().map(|node| node.name.clone()).collect(),
            cells: sorted.iter().map(|from| row(from)).collect(),
            is_by_site: false,
        }
    }

    fn of_sites(nodes: &[pb::NodeTunnels]) -> Self {
        let site = |node: &pb::NodeTunnels| match node.site.as_str() {
            "" => NO_SITE.to_owned(),
            site => site.to_owned(),
        };
        let site_of: BTreeMap<&str, String> =
            nodes.iter().map(|node| (node.name.as_str(), site(node))).collect();
        let mut between = BTreeMap::<(&String, &String), Between>::new();
        for node in nodes {
            let Some(from) = site_of.get(node.name.as_str()) else { continue };
            for peer in &node.peers {
                let Some(to) = site_of.get(peer.name.as_str()) else { continue };
                let entry = between.entry((from, to)).or_default();
                let is_up = is_up(peer.state());
                // Nothing is known of a path that nobody needs.
                entry.reported += usize::from(peer.state() != pb::TunnelState::Idle);
                entry.up += usize::from(is_up);
                entry.rtts.extend(peer.rtt_us.filter(|_| is_up));
            }
        }
        let mut names: Vec<String> = site_of.values().cloned().collect();
        names.sort_unstable();
        names.dedup();
        let row = |from: &String| {
            let found = names.iter().map(|to| between.get(&(from, to)));
            let texts = found.map(|found| found.map_or_else(|| "?".to_owned(), Between::cell));
            texts.collect::<Vec<String>>()
        };
        let cells = names.iter().map(row).collect();
        Self { names, cells, is_by_site: true }
    }

    /// Returns the text of the table, with a line that explains its cells.
    pub fn text(&self) -> String {
        let mut header = vec![if self.is_by_site { "FROM SITE" } else { "FROM" }];
        header.extend(self.names.iter().map(String::as_str));
        let rows = self.names.iter().zip(&self.cells).map(|(name, cells)| {
            let mut row = vec![name.clone()];
            row.extend(cells.iter().cloned());
            row
        });
        let legend = if self.is_by_site {
            "cell: tunnels that are up of those with traffic, and their median round-trip time; ?: not reported"
        } else {
            "cell: round-trip time, with (relay) if it is not direct; ?: not reported"
        };
        format!("{}\n{legend}\n", output::table(&header, rows))
    }
}

impl Between {
    fn cell(&self) -> String {
        let mut rtts = self.rtts.clone();
        rtts.sort_unstable();
        let median = rtts.get(rtts.len() / 2).map(|rtt| format!(" {}", rtt_text(*rtt)));
        format!("{}/{}{}", self.up, self.reported, median.unwrap_or_default())
    }
}

/// Returns whether a path carries traffic.
pub(super) fn is_up(state: pb::TunnelState) -> bool {
    matches!(state, pb::TunnelState::Direct | pb::TunnelState::Relayed)
}

fn cell(peer: &pb::PeerTunnel) -> String {
    let state = peer.state();
    let rtt = peer.rtt_us.map_or_else(|| "up".to_owned(), rtt_text);
    match state {
        pb::TunnelState::Direct => rtt,
        pb::TunnelState::Relayed => format!("{rtt} (relay)"),
        state => state_code(state).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{direct, in_state, node};
    use super::*;

    #[test]
    fn a_small_mesh_has_a_row_and_a_column_for_each_node() {
        let relayed =
            pb::PeerTunnel { rtt_us: Some(9_000), ..in_state("c", pb::TunnelState::Relayed) };
        let nodes = [
            node("c", "x", Vec::new()),
            node("a", "x", vec![direct("b", 420), relayed]),
            node("b", "y", vec![in_state("a", pb::TunnelState::Down)]),
        ];
        let matrix = Matrix::of(&nodes);
        assert_eq!(matrix.names, ["a", "c", "b"], "by site, then by name");
        assert_eq!(
            matrix.cells,
            [["", "9.00 ms (relay)", "0.42 ms"], ["?", "", "?"], ["down", "?", ""]]
        );
        let text = matrix.text();
        assert!(text.starts_with("FROM  a"), "{text}");
        assert!(text.lines().any(|line| line.starts_with("b     down")), "{text}");
    }

    #[test]
    fn a_large_mesh_is_shown_by_site() {
        let name = |number: usize| format!("n{number}");
        let nodes: Vec<_> = (0..NODES + 2)
            .map(|number| {
                let site = if number % 2 == 0 { "" } else { "dc" };
                // Each node reports the next one, which is of the other site.
                let next = name((number + 1) % (NODES + 2));
                let peer = if number == 0 {
                    in_state(&next, pb::TunnelState::Down)
                } else {
                    direct(&next, u32::try_from(number).unwrap() * 1_000)
                };
                node(&name(number), site, vec![peer])
            })
            .collect();
        let matrix = Matrix::of(&nodes);
        assert!(matrix.is_by_site);
        assert_eq!(matrix.names, ["-", "dc"]);
        assert_eq!(matrix.cells, [["?", "20/21 22.00 ms"], ["21/21 21.00 ms", "?"]]);
    }
}
