//! Commands `towline-controller mesh status`, `mesh matrix` and `mesh graph`.

use std::time::Duration;

use anyhow::bail;
use clap::{Args, ValueEnum};
use towline_proto::pb;
use towline_service::output::{self, Format};

use super::Common;
use super::client::{Client, status_error};
use crate::tunnels::graph::{dot, svg};
use crate::tunnels::matrix::Matrix;
use crate::tunnels::{NodeStatus, TunnelStatus, tunnels};

#[derive(Debug, Args)]
pub(super) struct Status {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Args)]
pub(super) struct MatrixArgs {
    /// Only the nodes of this site
    #[arg(long, value_name = "SITE")]
    site: Option<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Args)]
pub(super) struct Graph {
    /// Only the nodes of this site
    #[arg(long, value_name = "SITE")]
    site: Option<String>,
    /// Language of the picture
    #[arg(short, long, value_enum, default_value_t)]
    output: Picture,
}

/// Language of a picture.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Picture {
    /// Language of Graphviz
    #[default]
    Dot,
    /// Picture for browsers, the nodes on a circle
    Svg,
}

impl Status {
    pub(super) async fn run(self, common: &Common) -> anyhow::Result<()> {
        let nodes = read(&mut common.connect().await?, None).await?;
        let nodes: Vec<NodeStatus> = nodes.iter().map(NodeStatus::from).collect();
        Ok(output::write(self.output, &nodes, |wide| status_table(&nodes, wide))?)
    }
}

impl MatrixArgs {
    pub(super) async fn run(self, common: &Common) -> anyhow::Result<()> {
        let nodes = read(&mut common.connect().await?, self.site.as_deref()).await?;
        let all: Vec<TunnelStatus> = nodes.iter().flat_map(tunnels).collect();
        let text = |wide| if wide { tunnel_table(&all) } else { Matrix::of(&nodes).text() };
        Ok(output::write(self.output, &all, text)?)
    }
}

impl Graph {
    pub(super) async fn run(self, common: &Common) -> anyhow::Result<()> {
        let nodes = read(&mut common.connect().await?, self.site.as_deref()).await?;
        let text = match self.output {
            Picture::Dot => dot(&nodes),
            Picture::Svg => svg(&nodes),
        };
        Ok(output::print(&text)?)
    }
}

/// Returns all nodes, or those of one site, sorted by name.
pub(super) async fn read(
    client: &mut Client,
    site: Option<&str>,
) -> anyhow::Result<Vec<pb::NodeTunnels>> {
    let mut nodes = Vec::new();
    let mut after = String::new();
    loop {
        let request = pb::ListTunnelsRequest { after };
        let page = client.admin.list_tunnels(request).await.map_err(status_error)?.into_inner();
        after = page.nodes.last().map(|node| node.name.clone()).unwrap_or_default();
        nodes.extend(page.nodes);
        if !page.more || after.is_empty() {
            break;
        }
    }
    if let Some(site) = site {
        nodes.retain(|node: &pb::NodeTunnels| node.site == site);
        if nodes.is_empty() {
            bail!("no node of site `{site}`: see the sites in `towline-controller node list`");
        }
    }
    Ok(nodes)
}

fn status_table(nodes: &[NodeStatus], wide: bool) -> String {
    let mut header = vec!["NAME", "SITE", "STATE", "UP", "RELAYED", "DOWN", "WORST"];
    if wide {
        header.extend(["CONNECTING", "IDLE", "REPORTED", "LAST SEEN"]);
    }
    let rows = nodes.iter().map(|node| {
        let is_known = node.reported_seconds.is_some();
        let count = |count: u32| if is_known { count.to_string() } else { "-".to_owned() };
        let mut row = vec![
            node.name.clone(),
            output::or_dash(node.site.as_ref()),
            if node.online { "online" } else { "offline" }.to_owned(),
            count(node.peers_up),
            count(node.peers_relayed),
            count(node.peers_down),
            output::or_dash(node.worst.as_ref()),
        ];
        if wide {
            let age = node.reported_seconds.map(Duration::from_secs).map(output::span);
            row.extend([
                count(node.peers_connecting),
                count(node.peers_idle),
                output::or_dash(age.map(|age| age + " ago")),
                output::or_dash(node.last_seen.as_ref()),
            ]);
        }
        row
    });
    output::table(&header, rows)
}

fn tunnel_table(tunnels: &[TunnelStatus]) -> String {
    let header = ["FROM", "TO", "STATE", "RELAY", "RTT", "LOSS", "MTU", "REASON"];
    let rows = tunnels.iter().map(|tunnel| {
        vec![
            tunnel.from.clone(),
            tunnel.to.clone(),
            tunnel.state.clone(),
            output::or_dash(tunnel.relay.as_ref()),
            output::or_dash(tunnel.rtt_us.map(|rtt| output::rtt(rtt.into()))),
            output::or_dash(tunnel.loss_percent.map(|loss| format!("{loss:.1} %"))),
            output::or_dash(tunnel.mtu.map(|mtu| mtu.to_string())),
            output::or_dash(tunnel.reason_code.as_ref()),
        ]
    });
    output::table(&header, rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnels::testing::{direct, in_state, node};

    #[test]
    fn a_node_that_reported_nothing_has_no_numbers() {
        let silent = pb::NodeTunnels { name: "old".into(), ..Default::default() };
        let nodes = [node("a", "dc", vec![direct("b", 420)]), silent];
        let nodes: Vec<NodeStatus> = nodes.iter().map(NodeStatus::from).collect();
        let text = status_table(&nodes, false);
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["a", "dc", "online", "1", "0", "0", "b", "0.42", "ms"]);
        assert_eq!(lines[2], ["old", "-", "offline", "-", "-", "-", "-"]);
        assert!(status_table(&nodes, true).contains("7s ago"));
    }

    #[test]
    fn the_screen_in_the_guide_has_these_columns() {
        let guide = include_str!("../../../docs/guide.md");
        let text = status_table(&[], false);
        let header: Vec<&str> = text.split_whitespace().collect();
        let mut lines = guide.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert!(lines.any(|line| line == header), "{text}");
    }

    #[test]
    fn the_wide_matrix_has_a_line_for_each_tunnel() {
        let nodes = [node("a", "", vec![direct("b", 420), in_state("c", pb::TunnelState::Down)])];
        let all: Vec<TunnelStatus> = nodes.iter().flat_map(tunnels).collect();
        let text = tunnel_table(&all);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.lines().nth(2).unwrap().starts_with("a     c   down"), "{text}");
    }
}
