//! Serves the web page of a mesh that is made up, to look at it, for `docs/screens.sh` and for `cargo lab page`:
//! `cargo run -p towline-controller --example page -- 1000`, then open <http://127.0.0.1:7480>. A second argument is
//! another port.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use towline_controller::clock;
use towline_controller::config::UiConfig;
use towline_controller::events::{Events, MeshEvent};
use towline_controller::summaries::Summaries;
use towline_controller::tunnels::Reported;
use towline_controller::ui::{self, Page};
use towline_controller::view::{NodeView, View, ViewChange};
use towline_proto::id::{MeshId, NodeId, NodeName, TokenId};
use towline_proto::pb;
use towline_proto::summary::{MeshSummary, PeerSummary, Tunnel};
use towline_registry::sessions::{Session, Sessions};

const SITES: [&str; 4] = ["cloud", "dc-east", "dc-west", "edge"];
/// Peers that each node reports.
const PEERS: usize = 40;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let count: usize = std::env::args().nth(1).as_deref().unwrap_or("24").parse()?;
    let port: u16 = std::env::args().nth(2).as_deref().unwrap_or("7480").parse()?;
    let listen = SocketAddr::from(([127, 0, 0, 1], port));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let page = page(count)?;
    runtime.block_on(ui::serve(Some(UiConfig { listen, hosts: Vec::new() }), page));
    Ok(())
}

fn page(count: usize) -> Result<Page, Box<dyn std::error::Error>> {
    let now = clock::now();
    let (view, summaries, events) = (View::default(), Summaries::default(), Events::new(1));
    // The sessions stay live without heartbeats.
    let mut sessions = Sessions::new(Duration::from_secs(86_400));
    let nodes: Vec<NodeName> =
        (0..count).map(|number| format!("node-{number:04}").parse()).collect::<Result<_, _>>()?;
    for (number, name) in nodes.iter().enumerate() {
        view.apply(vec![ViewChange::Node(Arc::new(NodeView {
            id: id(number),
            name: name.clone(),
            site: SITES.get(number % SITES.len()).map(|site| site.parse()).transpose()?,
            grant: pb::Signed::default(),
            record: None,
            token: TokenId([1; 8]),
            joined_at: now.unix,
            problems: Vec::new(),
        }))]);
        events.add(&MeshEvent::NodeJoined { node: name.clone() });
        if number % 37 == 5 {
            continue;
        }
        let address = SocketAddr::from(([192, 0, 2, 1], 40_000));
        let session = Session::new(id(number).0, vec![1], address, now);
        if sessions.open(id(number), session, now).is_ok() {
            events.add(&MeshEvent::NodeConnected { node: name.clone(), address });
        }
        summaries.report(id(number), summary(number, &nodes), now);
    }
    let reported = Reported {
        view: Arc::new(view),
        sessions: Arc::new(Mutex::new(sessions)),
        summaries: Arc::new(summaries),
    };
    Ok(Page { reported, events: Arc::new(events), mesh_id: MeshId([7; 16]) })
}

/// Returns the summary of a node, which differs from node to node and is the same in each run.
fn summary(own: usize, nodes: &[NodeName]) -> MeshSummary {
    let mut summary = MeshSummary::default();
    for step in 1..=PEERS.min(nodes.len().saturating_sub(1)) {
        let peer = (own + step) % nodes.len();
        let mixed = (own.min(peer) * 7919 + own.max(peer) * 104_729) % 1000;
        let is_same_site = own % SITES.len() == peer % SITES.len();
        let tunnel = match mixed {
            _ if peer % 37 == 5 => Tunnel::Down,
            0..60 if !is_same_site => Tunnel::Relayed(nodes.first().cloned()),
            60..75 => Tunnel::Connecting,
            _ => Tunnel::Direct,
        };
        let base = if is_same_site { 300 } else { 11_000 };
        let figure = u32::try_from(base + mixed * 9).ok().filter(|_| tunnel.is_up());
        let reason = if tunnel == Tunnel::Down { Some("no-answer".into()) } else { None };
        summary.counts.add(&tunnel);
        summary.peers.push(PeerSummary {
            node: id(peer),
            rtt_us: figure,
            loss_permille: tunnel.is_up().then_some(if mixed.is_multiple_of(90) { 30 } else { 0 }),
            mtu: tunnel.is_up().then_some(1420),
            reason_code: reason,
            tunnel,
        });
    }
    summary
}

fn id(number: usize) -> NodeId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    NodeId(bytes)
}
