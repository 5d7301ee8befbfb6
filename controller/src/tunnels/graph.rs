//! The mesh as a picture: DOT for Graphviz, or SVG that is drawn here, the nodes on a circle, grouped by site.

use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::fmt::Write as _;

use towline_proto::pb;

use super::{rtt_text, state_code};

/// Space between two neighbours on the circle, in pixels.
const SPACING: f64 = 34.0;
/// Smallest radius of the circle, in pixels.
const LEAST_RADIUS: f64 = 120.0;
/// Space around the circle for names, in pixels.
const MARGIN: f64 = 190.0;

/// A pair of nodes with the worse of the two states that they reported.
#[derive(Debug, Clone, Copy)]
struct Link<'a> {
    state: pb::TunnelState,
    peer: &'a pb::PeerTunnel,
}

/// Nodes in the order in which they are drawn, and the links between them by their positions.
struct Graph<'a> {
    nodes: Vec<&'a pb::NodeTunnels>,
    links: BTreeMap<(usize, usize), Link<'a>>,
}

impl<'a> Graph<'a> {
    fn of(nodes: &'a [pb::NodeTunnels]) -> Self {
        let mut sorted: Vec<&pb::NodeTunnels> = nodes.iter().collect();
        sorted.sort_by_key(|node| (&node.site, &node.name));
        let positions: BTreeMap<&str, usize> =
            sorted.iter().enumerate().map(|(at, node)| (node.name.as_str(), at)).collect();
        let mut links = BTreeMap::<(usize, usize), Link<'_>>::new();
        for (from, node) in sorted.iter().enumerate() {
            for peer in &node.peers {
                let Some(to) = positions.get(peer.name.as_str()).copied() else { continue };
                // Idle pairs would hide those that matter.
                let state = peer.state();
                if to == from || rank(state) == 0 {
                    continue;
                }
                let pair = (from.min(to), from.max(to));
                let link = links.entry(pair).or_insert(Link { state, peer });
                if rank(state) > rank(link.state) {
                    *link = Link { state, peer };
                }
            }
        }
        Self { nodes: sorted, links }
    }

    /// Returns the sites in the order in which they are drawn, each with its nodes' positions.
    fn sites(&self) -> Vec<(&'a str, std::ops::Range<usize>)> {
        let mut sites: Vec<(&str, std::ops::Range<usize>)> = Vec::new();
        for (at, node) in self.nodes.iter().enumerate() {
            match sites.last_mut() {
                Some((site, range)) if *site == node.site => range.end = at + 1,
                _ => sites.push((node.site.as_str(), at..at + 1)),
            }
        }
        sites
    }
}

/// Returns the place of a state among those of a link: the worst has the largest. 0: it is not drawn.
fn rank(state: pb::TunnelState) -> u8 {
    match state {
        pb::TunnelState::Unspecified | pb::TunnelState::Idle => 0,
        pb::TunnelState::Direct => 1,
        pb::TunnelState::Relayed => 2,
        pb::TunnelState::Connecting => 3,
        pb::TunnelState::Down => 4,
    }
}

/// Returns the colour of a link. The line's pattern tells the states apart as well.
fn colour(state: pb::TunnelState) -> &'static str {
    match state {
        pb::TunnelState::Direct => "#1a7f37",
        pb::TunnelState::Relayed => "#9a6700",
        pb::TunnelState::Connecting => "#0969da",
        _ => "#cf222e",
    }
}

/// Returns the mesh in the language of Graphviz, for example for `dot -Tpng`.
pub fn dot(nodes: &[pb::NodeTunnels]) -> String {
    let graph = Graph::of(nodes);
    let mut text = String::from("graph mesh {\n  layout=circo;\n  node [shape=box];\n");
    for (number, (site, positions)) in graph.sites().into_iter().enumerate() {
        if !site.is_empty() {
            let _ = writeln!(text, "  subgraph cluster_{number} {{\n  label={};", quoted(site));
        }
        for node in graph.nodes.get(positions).into_iter().flatten() {
            let style = if node.online { "solid" } else { "dashed" };
            let _ = writeln!(text, "  {} [style={style}];", quoted(&node.name));
        }
        if !site.is_empty() {
            text.push_str("  }\n");
        }
    }
    for ((from, to), link) in &graph.links {
        let (Some(from), Some(to)) = (graph.nodes.get(*from), graph.nodes.get(*to)) else {
            continue;
        };
        let style = match link.state {
            pb::TunnelState::Direct => "solid",
            pb::TunnelState::Relayed => "dashed",
            _ => "dotted",
        };
        let _ = writeln!(
            text,
            "  {} -- {} [color=\"{}\", style={style}, label={}];",
            quoted(&from.name),
            quoted(&to.name),
            colour(link.state),
            quoted(&label(*link)),
        );
    }
    text.push_str("}\n");
    text
}

/// Returns the mesh as an SVG document.
pub fn svg(nodes: &[pb::NodeTunnels]) -> String {
    let graph = Graph::of(nodes);
    let sites = graph.sites();
    // Sites are apart by one more place each.
    let places = (graph.nodes.len() + sites.len()).max(1) as f64;
    let radius = (places * SPACING / TAU).max(LEAST_RADIUS);
    let middle = radius + MARGIN;
    let mut angles = Vec::new();
    for (number, (_, positions)) in sites.iter().enumerate() {
        angles.extend(positions.clone().map(|at| TAU * (at + number) as f64 / places));
    }
    let at =
        |angle: f64, radius: f64| (middle + radius * angle.sin(), middle - radius * angle.cos());
    let size = 2.0 * middle;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {size:.0} {size:.0}\" role=\"img\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<title>Mesh of {} nodes</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
        graph.nodes.len()
    );
    for ((from, to), link) in &graph.links {
        let (Some(a), Some(b)) = (angles.get(*from), angles.get(*to)) else { continue };
        let (Some(from), Some(to)) = (graph.nodes.get(*from), graph.nodes.get(*to)) else {
            continue;
        };
        let ((x1, y1), (x2, y2)) = (at(*a, radius), at(*b, radius));
        let pattern = match link.state {
            pb::TunnelState::Direct => "",
            pb::TunnelState::Relayed => " stroke-dasharray=\"8 4\"",
            _ => " stroke-dasharray=\"2 4\"",
        };
        let _ = writeln!(
            text,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{}\" \
             stroke-width=\"1.5\"{pattern}><title>{} - {}: {}</title></line>",
            colour(link.state),
            escaped(&from.name),
            escaped(&to.name),
            escaped(&label(*link)),
        );
    }
    for (node, angle) in graph.nodes.iter().zip(&angles) {
        let (x, y) = at(*angle, radius);
        let (fill, state) =
            if node.online { ("#1f2328", "online") } else { ("#ffffff", "offline") };
        // Names on the left half end at their node, so that none is upside down.
        let is_left = *angle > TAU / 2.0;
        let (anchor, turn) = if is_left { ("end", 90.0) } else { ("start", -90.0) };
        let ((tx, ty), turn) = (at(*angle, radius + 10.0), angle.to_degrees() + turn);
        let name = escaped(&node.name);
        let _ = writeln!(
            text,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"{fill}\" stroke=\"#1f2328\">\
             <title>{name}: {state}</title></circle>\n\
             <text x=\"{tx:.1}\" y=\"{ty:.1}\" text-anchor=\"{anchor}\" dominant-baseline=\"middle\" \
             fill=\"#1f2328\" transform=\"rotate({turn:.1} {tx:.1} {ty:.1})\">{name}</text>",
        );
    }
    for (site, positions) in sites.iter().filter(|(site, _)| !site.is_empty()) {
        let (first, last) = (angles.get(positions.start), angles.get(positions.end - 1));
        let (Some(first), Some(last)) = (first, last) else { continue };
        let (x, y) = at((first + last) / 2.0, radius - 24.0);
        let _ = writeln!(
            text,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" font-weight=\"bold\" \
             fill=\"#1f2328\" stroke=\"#ffffff\" stroke-width=\"3\" paint-order=\"stroke\">{}</text>",
            escaped(site)
        );
    }
    text.push_str("</svg>\n");
    text
}

/// Returns the words on a link.
fn label(link: Link<'_>) -> String {
    let state = state_code(link.state);
    match link.peer.rtt_us {
        Some(rtt) => format!("{state} {}", rtt_text(rtt)),
        None => state.to_owned(),
    }
}

/// Returns a text as a string of DOT.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Returns a text with the characters escaped that mean something in XML.
fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::testing::{direct, in_state, node};
    use super::*;

    fn mesh() -> Vec<pb::NodeTunnels> {
        vec![
            node("b", "y", vec![in_state("a", pb::TunnelState::Down)]),
            node("a", "x", vec![direct("b", 420), direct("c", 500)]),
            pb::NodeTunnels {
                online: false,
                ..node("c", "", vec![in_state("b", pb::TunnelState::Idle), direct("gone", 1)])
            },
        ]
    }

    #[test]
    fn a_pair_is_one_line_in_the_worse_of_its_two_states() {
        let text = dot(&mesh());
        assert!(text.starts_with("graph mesh {\n") && text.ends_with("}\n"), "{text}");
        let links: Vec<&str> = text.lines().filter(|line| line.contains(" -- ")).collect();
        assert_eq!(links.len(), 2, "{links:?}");
        assert!(links[0].contains("\"c\" -- \"a\"") && links[0].contains("direct 0.50 ms"));
        assert!(links[1].contains("\"a\" -- \"b\"") && links[1].contains("label=\"down\""));
        assert!(text.contains("label=\"x\"") && text.contains("\"c\" [style=dashed]"), "{text}");
    }

    #[test]
    fn a_picture_has_each_node_each_site_and_each_link_inside_of_its_frame() {
        let text = svg(&mesh());
        let count = |what: &str| text.matches(what).count();
        assert_eq!((count("<circle"), count("<line"), count("font-weight")), (3, 2, 2), "{text}");
        let size: f64 = {
            let rest = text.split_once("viewBox=\"0 0 ").unwrap().1;
            rest.split_once(' ').unwrap().0.parse().unwrap()
        };
        for attribute in [" x1=\"", " y1=\"", " cx=\"", " cy=\""] {
            for rest in text.split(attribute).skip(1) {
                let at: f64 = rest.split_once('"').unwrap().0.parse().unwrap();
                assert!((0.0..=size).contains(&at), "{attribute}{at}");
            }
        }
        assert!(text.ends_with("</svg>\n"));
        assert!(svg(&[]).ends_with("</svg>\n"), "an empty mesh");
    }

    #[test]
    fn names_cannot_add_markup() {
        assert_eq!(escaped("<a b=\"c\">&"), "&lt;a b=&quot;c&quot;&gt;&amp;");
        assert_eq!(quoted("a\"b\\"), "\"a\\\"b\\\\\"");
    }
}
