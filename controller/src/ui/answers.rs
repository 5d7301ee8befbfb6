//! Documents below `/api/`. They are pure functions of what the nodes report.

use std::collections::BTreeMap;

use serde::Serialize;
use towline_proto::pb;

use crate::tunnels::matrix::Matrix;
use crate::tunnels::{NodeStatus, TunnelStatus, tunnels};

/// Largest number of reports about one node in an answer. In a mesh of 10,000 nodes they would be megabytes.
const REPORTED_BY: usize = 1_000;

/// Sites and nodes of the mesh.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct MeshAnswer {
    sites: Vec<SiteStatus>,
    nodes: Vec<NodeStatus>,
}

/// A site, with sums of what its nodes report.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct SiteStatus {
    /// Name of the site. `None`: nodes without a site.
    name: Option<String>,
    nodes: u32,
    offline: u32,
    tunnels_up: u64,
    tunnels_relayed: u64,
    tunnels_down: u64,
}

impl MeshAnswer {
    /// Returns the answer for these nodes.
    pub(super) fn of(nodes: &[pb::NodeTunnels]) -> Self {
        let nodes: Vec<NodeStatus> = nodes.iter().map(NodeStatus::from).collect();
        let mut sites = BTreeMap::<Option<&str>, SiteStatus>::new();
        for node in &nodes {
            let site = sites.entry(node.site.as_deref()).or_default();
            site.nodes += 1;
            site.offline += u32::from(!node.online);
            site.tunnels_up += u64::from(node.peers_up);
            site.tunnels_relayed += u64::from(node.peers_relayed);
            site.tunnels_down += u64::from(node.peers_down);
        }
        let named = |(name, site): (Option<&str>, SiteStatus)| SiteStatus {
            name: name.map(ToOwned::to_owned),
            ..site
        };
        let sites = sites.into_iter().map(named).collect();
        Self { sites, nodes }
    }
}

/// The matrix of the mesh or of a site.
#[derive(Debug, Serialize)]
pub(super) struct MatrixAnswer {
    names: Vec<String>,
    cells: Vec<Vec<String>>,
    is_by_site: bool,
    /// Number of nodes without a row, or of sites that share the last row.
    left_out: usize,
}

impl MatrixAnswer {
    /// Returns the matrix of these nodes, or of those of one site.
    pub(super) fn of(nodes: &[pb::NodeTunnels], site: Option<&str>) -> Self {
        let Matrix { names, cells, is_by_site, left_out } = match site {
            None => Matrix::of(nodes),
            Some(site) => {
                let of_site = nodes.iter().filter(|node| node.site == site);
                Matrix::of(&of_site.cloned().collect::<Vec<_>>())
            }
        };
        Self { names, cells, is_by_site, left_out }
    }
}

/// A node with the tunnels from it and to it.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct NodeAnswer {
    node: NodeStatus,
    /// Tunnels that the node reported.
    reported: Vec<TunnelStatus>,
    /// Tunnels to the node that others reported, those that are not up first, at most [`REPORTED_BY`].
    reported_by: Vec<TunnelStatus>,
}

impl NodeAnswer {
    /// Returns the answer for the node with this name, if there is one.
    pub(super) fn of(nodes: &[pb::NodeTunnels], name: &str) -> Option<Self> {
        let node = nodes.iter().find(|node| node.name == name)?;
        let has_it = |other: &&pb::NodeTunnels| other.peers.iter().any(|peer| peer.name == name);
        let others = nodes.iter().filter(has_it).flat_map(tunnels);
        let mut reported_by: Vec<TunnelStatus> =
            others.filter(|tunnel| tunnel.to == name).collect();
        reported_by.sort_by_key(|tunnel| matches!(tunnel.state.as_str(), "direct" | "relay"));
        reported_by.truncate(REPORTED_BY);
        Some(Self { node: NodeStatus::from(node), reported: tunnels(node).collect(), reported_by })
    }
}

/// Events of the mesh.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct EventsAnswer {
    /// Events, the oldest first.
    pub(super) events: Vec<pb::Event>,
}

#[cfg(test)]
mod tests {
    use towline_service::output;

    use super::*;
    use crate::tunnels::matrix::ROWS;
    use crate::tunnels::testing::{direct, in_state, node};

    fn mesh() -> Vec<pb::NodeTunnels> {
        vec![
            node("a", "dc", vec![direct("b", 420), in_state("c", pb::TunnelState::Down)]),
            node("b", "dc", vec![direct("a", 430)]),
            pb::NodeTunnels { online: false, ..node("c", "", Vec::new()) },
        ]
    }

    #[test]
    fn sites_have_the_sums_of_their_nodes() {
        let answer = MeshAnswer::of(&mesh());
        let none = SiteStatus { nodes: 1, offline: 1, ..Default::default() };
        let dc = SiteStatus {
            name: Some("dc".into()),
            nodes: 2,
            tunnels_up: 2,
            tunnels_down: 1,
            ..Default::default()
        };
        assert_eq!(answer.sites, [none, dc]);
        assert_eq!(answer.nodes.len(), 3);
    }

    #[test]
    fn a_node_has_both_directions_of_its_tunnels() {
        let answer = NodeAnswer::of(&mesh(), "a").unwrap();
        let to: Vec<&str> = answer.reported.iter().map(|tunnel| tunnel.to.as_str()).collect();
        let from: Vec<&str> =
            answer.reported_by.iter().map(|tunnel| tunnel.from.as_str()).collect();
        assert_eq!((to, from), (vec!["b", "c"], vec!["b"]));
        assert_eq!(NodeAnswer::of(&mesh(), "d"), None);
        assert_eq!(MatrixAnswer::of(&mesh(), Some("dc")).names, ["a", "b"]);
    }

    #[test]
    fn reports_of_trouble_with_a_node_come_first_and_are_bounded() {
        let mut nodes: Vec<_> = (0..REPORTED_BY + 10)
            .map(|number| node(&format!("n{number:04}"), "dc", vec![direct("target", 420)]))
            .collect();
        nodes.push(node("z", "dc", vec![in_state("target", pb::TunnelState::Down)]));
        nodes.push(node("target", "dc", Vec::new()));
        let answer = NodeAnswer::of(&nodes, "target").unwrap();
        assert_eq!(answer.reported_by.len(), REPORTED_BY);
        assert_eq!(
            (answer.reported_by[0].from.as_str(), &*answer.reported_by[0].state),
            ("z", "down")
        );
    }

    /// With 1,000 nodes, each at a site of its own and with as many reported peers as are kept.
    #[test]
    fn answers_about_a_large_mesh_stay_small() {
        /// Size that a browser on a slow line still loads at once, in bytes.
        const LARGE: usize = 512 * 1024;
        let name = |number: usize| format!("node-{:04}", number % 1_000);
        let nodes: Vec<_> = (0..1_000)
            .map(|own| {
                let peers = (1..=64).map(|step| direct(&name(own + step), 420)).collect();
                node(&name(own), &format!("site-{own:04}"), peers)
            })
            .collect();
        let matrix = MatrixAnswer::of(&nodes, None);
        let cells: usize = matrix.cells.iter().map(Vec::len).sum();
        assert!(cells <= ROWS * ROWS, "{cells} cells");
        for text in [
            output::json_line(&MeshAnswer::of(&nodes)).unwrap(),
            output::json_line(&matrix).unwrap(),
            output::json_line(&NodeAnswer::of(&nodes, "node-0003")).unwrap(),
        ] {
            assert!(text.len() < LARGE, "{} bytes", text.len());
        }
    }
}
