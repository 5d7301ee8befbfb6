//! Command `towline-controller node`.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Serialize;
use towline_proto::id::{IdentityKey, NodeId};
use towline_proto::node::{RelayRole, SharedPrefix};
use towline_proto::{pb, signed};
use towline_service::output::{self, Format};

use super::client::{Client, status_error};
use super::{Common, examples, span};
use crate::clock;

#[derive(Debug, Subcommand)]
pub(super) enum Node {
    /// List the nodes
    #[command(after_help = examples::NODE_LIST)]
    List {
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Show the details of a node
    #[command(after_help = examples::NODE_SHOW)]
    Show {
        /// Name of the node
        name: String,
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Change what a node may do
    #[command(after_help = examples::NODE_SET)]
    Set {
        /// Name of the node
        name: String,
        #[command(flatten)]
        role: RelayFlags,
    },
    /// Remove a node permanently: it can join again only with a new token and new keys
    #[command(after_help = examples::NODE_REMOVE)]
    Remove {
        /// Name of the node
        name: String,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct RelayFlags {
    /// Let the node be a relay, for nodes that have no direct path
    #[arg(long)]
    relay: bool,
    /// Do not let the node be a relay: other nodes stop using it as one
    #[arg(long)]
    no_relay: bool,
}

pub(super) async fn run(command: Node, common: &Common) -> anyhow::Result<()> {
    match command {
        Node::List { output } => {
            let nodes = list(&mut common.connect().await?).await?;
            Ok(output::write(output, &nodes, |wide| table(&nodes, wide))?)
        }
        Node::Show { name, output } => {
            let mut client = common.connect().await?;
            let request = pb::ListNodesRequest { name, after: String::new() };
            let found =
                client.admin.list_nodes(request).await.map_err(status_error)?.into_inner().nodes;
            let node = found.first().context("invalid response from the controller: no node")?;
            let node = View::read(node, &client.ca)?;
            Ok(output::write(output, &node, |_| sheet(&node))?)
        }
        Node::Set { name, role } => {
            let relay = Some(role.relay && !role.no_relay);
            let request = pb::SetNodeRequest { name: name.clone(), relay };
            let mut client = common.connect().await?;
            let changed = client.admin.set_node(request).await.map_err(status_error)?.into_inner();
            let grant = signed::grant(changed.grant.as_ref(), &client.ca)?;
            let may = if grant.relay == RelayRole::Granted { "may" } else { "may not" };
            eprintln!("node {name} {may} be a relay");
            Ok(())
        }
        Node::Remove { name } => {
            let request = pb::RemoveNodeRequest { name: name.clone() };
            common.connect().await?.admin.remove_node(request).await.map_err(status_error)?;
            eprintln!("node {name} removed");
            Ok(())
        }
    }
}

async fn list(client: &mut Client) -> anyhow::Result<Vec<View>> {
    let mut nodes: Vec<View> = Vec::new();
    loop {
        let after = nodes.last().map(|node| node.name.clone()).unwrap_or_default();
        let request = pb::ListNodesRequest { name: String::new(), after };
        let page = client.admin.list_nodes(request).await.map_err(status_error)?.into_inner();
        for node in &page.nodes {
            nodes.push(View::read(node, &client.ca)?);
        }
        if !page.more {
            return Ok(nodes);
        }
    }
}

#[derive(Serialize)]
struct View {
    /// Name of the node.
    name: String,
    /// Id of the node.
    id: NodeId,
    /// Site of the node; empty: none.
    site: String,
    /// True if the node has a session with the controller.
    online: bool,
    /// Addresses of the node in the mesh.
    overlay_addresses: Vec<String>,
    /// Networks that the node announces.
    prefixes: Vec<String>,
    /// Networks that the node may announce, whole or in part.
    allowed_prefixes: Vec<String>,
    /// Networks of which the node may announce a few blocks, each with their number and length. The
    /// blocks that it announced are among the allowed prefixes.
    pod_ranges: Vec<String>,
    /// Networks that all nodes of a group may announce at the same time, each as `CIDR,shared=GROUP`.
    shared_prefixes: Vec<String>,
    /// Addresses and ports where the node might be reached, each with its kind.
    candidates: Vec<String>,
    /// Version of the node's agent; empty until it published a record.
    version: String,
    /// Number of the node's record. It grows with every change.
    generation: Option<u64>,
    /// WireGuard public key of the node.
    wireguard_key: Option<String>,
    /// Public key with which the node signs its record.
    identity_key: IdentityKey,
    /// Labels of the node.
    labels: BTreeMap<String, String>,
    /// True if the node is removed once it is offline for longer than `ephemeral_after_seconds`.
    ephemeral: bool,
    /// Time that the node may be offline if it is ephemeral; null: the mesh's lease.
    ephemeral_after_seconds: Option<u64>,
    /// True if the node may be a relay; null: it joined before 0.2.0, and nobody decided it.
    may_relay: Option<bool>,
    /// True if the node is a relay, or claims to be one without being allowed to.
    relay: bool,
    /// True if it is a control-plane node, whose API server other nodes may use.
    control_plane: bool,
    /// TCP port of its Kubernetes API server, if it announces one.
    api_port: Option<u16>,
    /// Time of its join.
    joined_at: Option<String>,
    /// Time of its last session.
    last_seen: Option<String>,
    /// Source address and port of the node's session; empty if it is offline.
    session_address: String,
    /// The last requests of the node that were refused, newest first.
    problems: Vec<String>,
    /// The same problems with their codes, in the same order.
    problem_details: Vec<pb::Detail>,
    #[serde(skip)]
    last_seen_unix: i64,
}

impl View {
    fn read(info: &pb::NodeInfo, ca: &IdentityKey) -> anyhow::Result<Self> {
        let grant = signed::grant(info.grant.as_ref(), ca)?;
        let record = match &info.record {
            Some(record) => Some(signed::record(Some(record), &grant.identity_key)?),
            None => None,
        };
        let is_relay = record.as_ref().is_some_and(|record| record.relay);
        let texts = |items: &[ipnet::IpNet]| items.iter().map(ToString::to_string).collect();
        let candidate = |candidate: &towline_proto::node::Candidate| {
            format!("{} ({})", candidate.address(), candidate.kind())
        };
        let shared = |shared: &SharedPrefix| format!("{},shared={}", shared.prefix, shared.group);
        Ok(Self {
            name: grant.name.to_string(),
            id: grant.node_id,
            site: grant.site.as_ref().map(ToString::to_string).unwrap_or_default(),
            online: info.online,
            overlay_addresses: grant.overlay.iter().map(|address| address.to_string()).collect(),
            prefixes: record.as_ref().map(|record| texts(&record.prefixes)).unwrap_or_default(),
            allowed_prefixes: texts(&grant.allowed_prefixes),
            pod_ranges: grant.pod_ranges.iter().map(ToString::to_string).collect(),
            shared_prefixes: grant.shared.iter().map(shared).collect(),
            candidates: record
                .as_ref()
                .map(|record| record.candidates.iter().map(candidate).collect())
                .unwrap_or_default(),
            generation: record.as_ref().map(|record| record.generation),
            api_port: record.as_ref().and_then(|record| record.api_port).map(NonZeroU16::get),
            version: record.map(|record| record.version).unwrap_or_default(),
            wireguard_key: grant.wireguard_keys.first().map(ToString::to_string),
            identity_key: grant.identity_key,
            labels: grant.labels.iter().map(|(k, v)| (k.to_string(), v.clone())).collect(),
            ephemeral: grant.ephemeral,
            ephemeral_after_seconds: grant.ephemeral_after.map(|after| after.as_secs()),
            may_relay: grant.relay.decision(),
            relay: is_relay,
            control_plane: grant.control_plane,
            joined_at: output::time(info.joined_at),
            last_seen: output::time(info.last_seen),
            session_address: info.session_address.clone(),
            problems: info.problems.clone(),
            problem_details: info.problem_details.clone(),
            last_seen_unix: info.last_seen,
        })
    }

    fn state(&self) -> &'static str {
        if self.online { "online" } else { "offline" }
    }

    fn relay_state(&self) -> &'static str {
        match (self.relay, self.may_relay) {
            (true, Some(true)) => "yes",
            (true, Some(false)) => "claimed, but not granted",
            (true, None) => "yes, but not granted: run `towline-controller node set NAME --relay`",
            (false, Some(true)) => "granted, but not enabled",
            (false, _) => "no",
        }
    }

    /// Returns whether other nodes may use an API server of this node, and its port.
    fn api_server(&self) -> String {
        match (self.control_plane, self.api_port) {
            (true, Some(port)) => format!("yes, API server on port {port}"),
            (true, None) => "yes".to_owned(),
            (false, _) => "no".to_owned(),
        }
    }

    /// Returns whether the node is removed when it is offline, and after which time.
    fn ephemeral_text(&self) -> String {
        match (self.ephemeral, self.ephemeral_after_seconds) {
            (false, _) => "no".to_owned(),
            (true, Some(seconds)) => {
                format!(
                    "yes, removed once it is offline for {}",
                    span(i64::try_from(seconds).unwrap_or(i64::MAX))
                )
            }
            (true, None) => {
                "yes, removed once it is offline for the lease of `mesh show`".to_owned()
            }
        }
    }

    fn seen(&self) -> String {
        match self.last_seen_unix {
            0 => "never".to_owned(),
            _ if self.online => "now".to_owned(),
            at => format!("{} ago", span(clock::now().unix - at)),
        }
    }
}

fn table(nodes: &[View], wide: bool) -> String {
    let mut header = vec!["NAME", "SITE", "STATE", "SEEN", "OVERLAY", "PREFIXES", "PROBLEMS"];
    if wide {
        header.extend(["ID", "VERSION", "FROM", "WIREGUARD KEY"]);
    }
    let rows = nodes.iter().map(|node| {
        let mut row = vec![
            node.name.clone(),
            output::or_dash(Some(&node.site)),
            node.state().to_owned(),
            node.seen(),
            output::list(&node.overlay_addresses),
            output::list(&node.prefixes),
            node.problems.len().to_string(),
        ];
        if wide {
            row.extend([
                node.id.to_string(),
                output::or_dash(Some(&node.version)),
                output::or_dash(Some(&node.session_address)),
                output::or_dash(node.wireguard_key.as_ref()),
            ]);
        }
        row
    });
    output::table(&header, rows)
}

fn sheet(node: &View) -> String {
    let labels: Vec<String> = node.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let mut lines = vec![
        ("name", node.name.clone()),
        ("id", node.id.to_string()),
        ("site", output::or_dash(Some(&node.site))),
        ("state", format!("{}, seen {}", node.state(), node.seen())),
        ("from", output::or_dash(Some(&node.session_address))),
        ("joined", output::or_dash(node.joined_at.as_ref())),
        ("overlay", output::list(&node.overlay_addresses)),
        ("prefixes", output::list(&node.prefixes)),
        ("allowed", output::list(&node.allowed_prefixes)),
        ("pod ranges", output::list(&node.pod_ranges)),
        ("shared", output::list(&node.shared_prefixes)),
        ("candidates", output::list(&node.candidates)),
        ("labels", output::list(&labels)),
        ("ephemeral", node.ephemeral_text()),
        ("relay", node.relay_state().to_owned()),
        ("control plane", node.api_server()),
        ("version", output::or_dash(Some(&node.version))),
        ("wireguard key", output::or_dash(node.wireguard_key.as_ref())),
        ("identity key", node.identity_key.to_string()),
    ];
    lines.extend(node.problems.iter().map(|problem| ("problem", problem.clone())));
    output::sheet(15, &lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> View {
        View {
            name: "gpu-1".into(),
            id: NodeId([1; 16]),
            site: String::new(),
            online: false,
            overlay_addresses: Vec::new(),
            prefixes: Vec::new(),
            allowed_prefixes: Vec::new(),
            pod_ranges: Vec::new(),
            shared_prefixes: Vec::new(),
            candidates: Vec::new(),
            version: String::new(),
            generation: None,
            wireguard_key: None,
            identity_key: IdentityKey([1; 32]),
            labels: BTreeMap::new(),
            ephemeral: true,
            ephemeral_after_seconds: Some(600),
            may_relay: Some(true),
            relay: false,
            control_plane: false,
            api_port: None,
            joined_at: None,
            last_seen: None,
            session_address: String::new(),
            problems: Vec::new(),
            problem_details: Vec::new(),
            last_seen_unix: 0,
        }
    }

    #[test]
    fn an_ephemeral_node_shows_when_it_is_removed() {
        let line = |node: &View| {
            let sheet = sheet(node);
            sheet.lines().find(|line| line.starts_with("ephemeral")).unwrap().to_owned()
        };
        assert_eq!(line(&node()), "ephemeral      yes, removed once it is offline for 10m");
        let lease = View { ephemeral_after_seconds: None, ..node() };
        let of_mesh = "ephemeral      yes, removed once it is offline for the lease of `mesh show`";
        assert_eq!(line(&lease), of_mesh);
        assert_eq!(line(&View { ephemeral: false, ..node() }), "ephemeral      no");
    }

    #[test]
    fn the_screens_in_the_guide_have_these_columns_and_lines() {
        let guide = include_str!("../../../docs/guide.md");
        let text = table(&[], false);
        let header: Vec<&str> = text.split_whitespace().collect();
        let mut lines = guide.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert!(lines.any(|line| line == header), "{text}");
        let (_, shown) = guide.split_once("# towline-controller node show gpu-1\n").unwrap();
        let names = |text: &str| -> Vec<String> {
            let lines = text.lines().take_while(|line| !line.starts_with('#'));
            lines.map(|line| line.get(..15).unwrap_or(line).trim().to_owned()).collect()
        };
        assert_eq!(names(shown), names(&sheet(&node())));
    }
}
