//! Command `towline-controller mesh`.

use std::time::Duration;

use std::str::FromStr;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use ipnet::IpNet;
use serde::Serialize;
use towline_proto::id::{IdentityKey, Label, MeshId};
use towline_proto::token::ControllerAddress;
use towline_proto::{pb, signed};
use towline_service::event_output::EventsArgs;
use towline_service::output::{self, Format};

use super::client::status_error;
use super::{Common, events, examples, tunnels};
use crate::config::check_ranges;

#[derive(Debug, Subcommand)]
pub(super) enum Mesh {
    /// Show the configuration of the mesh
    #[command(after_help = examples::MESH_SHOW)]
    Show {
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Show each node with what it reports of its tunnels: how many peers are up, and the worst one
    #[command(after_help = examples::MESH_STATUS)]
    Status(tunnels::Status),
    /// Show which node reaches which, with round-trip times; by site if there are more than 40 nodes
    #[command(after_help = examples::MESH_MATRIX)]
    Matrix(tunnels::MatrixArgs),
    /// Draw the mesh as a graph of nodes and tunnels
    #[command(after_help = examples::MESH_GRAPH)]
    Graph(tunnels::Graph),
    /// Show what happened in the mesh lately: who joined, left, connected, disconnected, was refused
    #[command(after_help = examples::MESH_EVENTS)]
    Events(EventsArgs),
    /// Change the configuration of the mesh: each given list is replaced, on every node at once
    #[command(after_help = examples::MESH_SET)]
    Set(Changes),
}

/// Lists to replace. At its next start the controller applies its own configuration again, which
/// overrides the lists that are set in it.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(super) struct Changes {
    /// Ranges in which an address that no node holds is unreachable instead of sent in clear, or
    /// `none`
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    protected: Option<Vec<String>>,
    /// Sites whose nodes reach each other's node IPs outside of the tunnel, or `none`
    #[arg(long, value_name = "SITE", value_delimiter = ',')]
    trusted_site: Option<Vec<String>>,
    /// Ranges in which a node's announced prefixes are reached in clear while the tunnel to it is
    /// down, or `none`
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    bypass_when_down: Option<Vec<String>>,
    /// Addresses of the controllers, in the order in which agents try them. Set this before a
    /// controller moves, while agents are connected
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    controllers: Option<Vec<ControllerAddress>>,
}

pub(super) async fn run(command: Mesh, common: &Common) -> anyhow::Result<()> {
    match command {
        Mesh::Show { output } => {
            let mut client = common.connect().await?;
            let answer =
                client.admin.get_mesh(pb::GetMeshRequest {}).await.map_err(status_error)?;
            let mesh = View::read(answer.into_inner().mesh.as_ref(), &client.ca)?;
            Ok(output::write(output, &mesh, |_| sheet(&mesh))?)
        }
        Mesh::Status(args) => args.run(common).await,
        Mesh::Matrix(args) => args.run(common).await,
        Mesh::Graph(args) => args.run(common).await,
        Mesh::Events(args) => events::run(args, common).await,
        Mesh::Set(changes) => {
            let request = changes.request()?;
            let mut client = common.connect().await?;
            let answer = client.admin.configure_mesh(request).await.map_err(status_error)?;
            let mesh = View::read(answer.into_inner().mesh.as_ref(), &client.ca)?;
            eprintln!("the mesh configuration now has generation {}", mesh.generation);
            Ok(())
        }
    }
}

impl Changes {
    fn request(&self) -> anyhow::Result<pb::ConfigureMeshRequest> {
        let ranges = |flag: &str, list: &Option<Vec<String>>| -> anyhow::Result<_> {
            let Some(ranges) = values::<IpNet>(flag, list.as_deref())? else { return Ok(None) };
            if let Err(why) = check_ranges(&ranges) {
                bail!("{flag}: {why}");
            }
            Ok(Some(pb::PrefixList { prefixes: ranges.iter().map(Into::into).collect() }))
        };
        let sites = values::<Label>("--trusted-site", self.trusted_site.as_deref())?;
        Ok(pb::ConfigureMeshRequest {
            protected: ranges("--protected", &self.protected)?,
            trusted_sites: sites.map(|sites| pb::SiteList {
                sites: sites.iter().map(ToString::to_string).collect(),
            }),
            bypass_when_down: ranges("--bypass-when-down", &self.bypass_when_down)?,
            controllers: self.controllers.as_ref().map(|list| pb::ControllerList {
                addresses: list.iter().map(ToString::to_string).collect(),
            }),
        })
    }
}

/// Parses the values of a list flag. The single value `none` is the empty list.
fn values<T>(flag: &str, list: Option<&[String]>) -> anyhow::Result<Option<Vec<T>>>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    match list {
        None => Ok(None),
        Some([only]) if only == "none" => Ok(Some(Vec::new())),
        Some(texts) => texts
            .iter()
            .map(|text| text.parse().with_context(|| format!("{flag}: `{text}`")))
            .collect::<anyhow::Result<_>>()
            .map(Some),
    }
}

#[derive(Serialize)]
struct View {
    /// Id of the mesh.
    id: MeshId,
    /// IPv6 range of the overlay.
    overlay_v6: String,
    /// IPv4 range of the overlay.
    overlay_v4: String,
    /// Ranges in which an address that no node holds is unreachable instead of sent in clear.
    protected: Vec<String>,
    /// Sites whose nodes reach each other's node IPs outside of the tunnel.
    trusted_sites: Vec<String>,
    /// Ranges in which a node's announced prefixes are reached in clear while the tunnel to it is
    /// down.
    bypass_when_down: Vec<String>,
    /// Addresses of the controllers, in the order in which agents try them.
    controllers: Vec<String>,
    /// Time in seconds that a node may be offline before other nodes may take over its prefixes.
    lease_seconds: u64,
    /// Number of this configuration. It grows with every change.
    generation: u64,
}

impl View {
    fn read(mesh: Option<&pb::Signed>, ca: &IdentityKey) -> anyhow::Result<Self> {
        let mesh = signed::mesh(mesh, ca)?;
        let texts = |ranges: &[IpNet]| ranges.iter().map(ToString::to_string).collect();
        Ok(Self {
            id: mesh.mesh_id,
            overlay_v6: mesh.overlay_v6.to_string(),
            overlay_v4: mesh.overlay_v4.to_string(),
            protected: texts(&mesh.protected),
            trusted_sites: mesh.trusted_sites.iter().map(ToString::to_string).collect(),
            bypass_when_down: texts(&mesh.bypass_when_down),
            controllers: mesh.controllers.iter().map(ToString::to_string).collect(),
            lease_seconds: mesh.lease.as_secs(),
            generation: mesh.generation,
        })
    }
}

fn sheet(mesh: &View) -> String {
    let lines = [
        ("id", mesh.id.to_string()),
        ("overlay", format!("{} {}", mesh.overlay_v6, mesh.overlay_v4)),
        ("protected", output::list(&mesh.protected)),
        ("trusted sites", output::list(&mesh.trusted_sites)),
        ("in clear when down", output::list(&mesh.bypass_when_down)),
        ("controllers", output::list(&mesh.controllers)),
        ("lease", output::span(Duration::from_secs(mesh.lease_seconds))),
        ("generation", mesh.generation.to_string()),
    ];
    output::sheet(20, &lines)
}
