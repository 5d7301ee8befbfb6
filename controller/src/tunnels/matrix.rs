//! The mesh as a table: nodes by nodes, or sites by sites if there are many nodes.
//!
//! A table has at most [`ROWS`] rows and as many columns, however large the mesh is.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use towline_proto::pb;
use towline_service::output;

use super::{rtt_text, state_code};

/// Largest number of rows, and of columns. More do not fit on a screen.
pub const ROWS: usize = 40;

/// Name of the row of nodes without a site.
const NO_SITE: &str = "-";
/// Name of the row of the sites that have none of their own. No site can have this name.
const OTHER_SITES: &str = "(others)";

/// Table with the same names at its rows and its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    /// Names of the rows and columns, sorted: nodes or sites.
    pub names: Vec<String>,
    /// Text of each cell, by row. The row is that of the node that reported it.
    pub cells: Vec<Vec<String>>,
    /// True if the rows are sites.
    pub is_by_site: bool,
    /// Number of nodes without a row, or of sites that share the last row. 0 in most meshes.
    pub left_out: usize,
}

/// What the tunnels from the nodes of one site to those of another have in common.
#[derive(Debug, Default)]
struct Between {
    up: usize,
    reported: usize,
    rtts: Vec<u32>,
}

impl Matrix {
    /// Returns the table of these nodes: by site if there are more than [`ROWS`]. If they are of one site, the
    /// nodes with the most trouble have a row each.
    pub fn of(nodes: &[pb::NodeTunnels]) -> Self {
        if nodes.len() <= ROWS {
            return Self::of_nodes(nodes.iter().collect());
        }
        let first = nodes.first().map(|node| &node.site);
        if nodes.iter().any(|node| Some(&node.site) != first) {
            return Self::of_sites(nodes);
        }
        let mut chosen: Vec<&pb::NodeTunnels> = nodes.iter().collect();
        chosen.sort_by_key(|node| (Reverse(trouble(node)), &node.name));
        chosen.truncate(ROWS);
        Self { left_out: nodes.len() - chosen.len(), ..Self::of_nodes(chosen) }
    }

    fn of_nodes(mut sorted: Vec<&pb::NodeTunnels>) -> Self {
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
            left_out: 0,
        }
    }

    fn of_sites(nodes: &[pb::NodeTunnels]) -> Self {
        let row_of = rows_of_sites(nodes);
        let row = |node: &pb::NodeTunnels| row_of.get(node.site.as_str()).copied();
        let row_of_node: BTreeMap<&str, &str> =
            nodes.iter().filter_map(|node| Some((node.name.as_str(), row(node)?))).collect();
        let mut between = BTreeMap::<(&str, &str), Between>::new();
        for node in nodes {
            let Some(from) = row(node) else { continue };
            for peer in &node.peers {
                let Some(to) = row_of_node.get(peer.name.as_str()).copied() else { continue };
                let entry = between.entry((from, to)).or_default();
                let is_up = is_up(peer.state());
                // Nothing is known of a path that nobody needs.
                entry.reported += usize::from(peer.state() != pb::TunnelState::Idle);
                entry.up += usize::from(is_up);
                entry.rtts.extend(peer.rtt_us.filter(|_| is_up));
            }
        }
        let mut names: Vec<&str> = row_of.values().copied().collect();
        // The row of the other sites is the last one.
        names.sort_unstable_by_key(|name| (*name == OTHER_SITES, *name));
        names.dedup();
        let row = |from: &&str| {
            let found = names.iter().map(|to| between.get(&(*from, *to)));
            let texts = found.map(|found| found.map_or_else(|| "?".to_owned(), Between::cell));
            texts.collect::<Vec<String>>()
        };
        let cells = names.iter().map(row).collect();
        let left_out = row_of.values().filter(|name| **name == OTHER_SITES).count();
        let names = names.into_iter().map(ToOwned::to_owned).collect();
        Self { names, cells, is_by_site: true, left_out }
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
            "cell: tunnels up / tunnels with traffic, and their median round-trip time; ?: not reported"
        } else {
            "cell: round-trip time, with (relay) if it is not direct; ?: not reported"
        };
        let left_out = match (self.left_out, self.is_by_site) {
            (0, _) => String::new(),
            (number, true) => format!("{OTHER_SITES}: the {number} sites with the fewest nodes\n"),
            (number, false) => {
                format!("{number} more nodes are not shown: these have the most trouble\n")
            }
        };
        format!("{}\n{legend}\n{left_out}", output::table(&header, rows))
    }
}

/// Returns the name of the row of each site. If there are more than [`ROWS`], those with the most nodes have a
/// row each, and the others share one.
fn rows_of_sites(nodes: &[pb::NodeTunnels]) -> BTreeMap<&str, &str> {
    let mut sizes = BTreeMap::<&str, usize>::new();
    for node in nodes {
        *sizes.entry(node.site.as_str()).or_default() += 1;
    }
    let mut sites: Vec<(&str, usize)> = sizes.into_iter().collect();
    sites.sort_by_key(|(site, size)| (Reverse(*size), *site));
    let own_rows = if sites.len() > ROWS { ROWS - 1 } else { ROWS };
    let named = sites.into_iter().enumerate().map(|(at, (site, _))| match site {
        _ if at >= own_rows => (site, OTHER_SITES),
        "" => (site, NO_SITE),
        _ => (site, site),
    });
    named.collect()
}

/// Returns what makes a node interesting. It grows with the trouble that the node has.
fn trouble(node: &pb::NodeTunnels) -> (bool, u32, u32, u32) {
    (!node.online, node.down, node.connecting, node.relayed)
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
    fn the_screen_in_the_guide_is_what_is_printed() {
        let guide = include_str!("../../../docs/guide.md");
        let nodes = [
            node("cp", "cloud", vec![direct("gpu-1", 440), direct("worker-b", 310)]),
            node("gpu-1", "dc", vec![direct("cp", 440), direct("worker-b", 400)]),
            node("worker-b", "dc-b", vec![direct("cp", 310), direct("gpu-1", 400)]),
        ];
        let text = Matrix::of(&nodes).text();
        assert!(guide.contains(&text), "{text}");
    }

    #[test]
    fn a_large_mesh_is_shown_by_site() {
        let name = |number: usize| format!("n{number}");
        let nodes: Vec<_> = (0..ROWS + 2)
            .map(|number| {
                let site = if number % 2 == 0 { "" } else { "dc" };
                // Each node reports the next one, which is of the other site.
                let next = name((number + 1) % (ROWS + 2));
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
        assert_eq!(matrix.left_out, 0);
    }

    #[test]
    fn a_mesh_of_many_sites_has_no_more_rows_than_fit() {
        // One node at each of 1,000 sites, and a second one at the last.
        let mut nodes: Vec<_> = (0..1_000)
            .map(|number| {
                let next = format!("n{:04}", (number + 1) % 1_000);
                node(&format!("n{number:04}"), &format!("s{number:04}"), vec![direct(&next, 1_000)])
            })
            .collect();
        nodes.push(node("x", "s0999", vec![direct("n0999", 1_000)]));
        let matrix = Matrix::of(&nodes);
        assert_eq!((matrix.names.len(), matrix.left_out), (ROWS, 1_000 - (ROWS - 1)));
        assert!(matrix.cells.iter().all(|row| row.len() == ROWS) && matrix.cells.len() == ROWS);
        assert_eq!(matrix.names.last().map(String::as_str), Some(OTHER_SITES));
        assert!(matrix.names.contains(&"s0999".to_owned()), "the largest site has a row");
        assert_eq!(matrix.cells[0][1], "1/1 1.00 ms");
        let others = matrix.cells.last().and_then(|row| row.last());
        assert_eq!(others.map(String::as_str), Some("960/960 1.00 ms"));
        assert!(matrix.text().contains("(others): the 961 sites"), "{}", matrix.text());
    }

    #[test]
    fn a_large_site_shows_the_nodes_with_the_most_trouble() {
        let mut nodes: Vec<_> =
            (0..250).map(|number| node(&format!("n{number:03}"), "dc", Vec::new())).collect();
        nodes[200].down = 3;
        nodes[240].online = false;
        let matrix = Matrix::of(&nodes);
        assert_eq!((matrix.names.len(), matrix.is_by_site, matrix.left_out), (ROWS, false, 210));
        let last: Vec<&str> = matrix.names.iter().rev().take(3).map(String::as_str).collect();
        assert_eq!(last, ["n240", "n200", "n037"], "sorted by name");
        assert!(matrix.text().contains("210 more nodes are not shown"), "{}", matrix.text());
    }
}
