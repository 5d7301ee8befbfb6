//! Hosts with networks of others, which the mesh must leave alone.

use std::sync::Arc;

use anyhow::Context as _;

use super::Case;
use crate::lab::mesh::Node;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{
    Scene, answers, connected, has_no_problem, names_problem, publishes,
};
use crate::lab::topology::Host;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("networks/router-of-another-node", router),
        Case::new("networks/announced-lan-with-another-node", |setting| {
            announced_lan(setting, "192.168.1.0/24", "")
        }),
        Case::new("networks/announced-range-around-the-lan", |setting| {
            announced_lan(setting, "192.168.0.0/16", "")
        }),
        Case::new("networks/announced-part-of-the-lan", announced_part),
        Case::new("networks/announced-part-with-the-gateway", announced_gateway),
        Case::new("networks/protected-range-around-a-bridge", covered_bridge),
        Case::new("networks/listed-network", listed),
    ]
}

/// A node that is the router of another one, whose node IP is its address in the LAN.
fn router(setting: &Setting) -> anyhow::Result<()> {
    let mut scene = Scene::build_v4(setting)?;
    let neighbour_host = scene.lab.host("neighbour").behind(&scene.router).build()?;
    let of = |ip: &str| ["--prefix".to_owned(), format!("{ip}/32")];
    let node_ip = "[node]\naddressing = \"node-ip\"\n";
    let flags = of("192.168.1.10");
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let pair = scene.join_with(setting, ("", &[]), (node_ip, &flags))?;
    pair.is_connected()?;
    let host = scene.router.host();
    let router = scene.node(setting, &pair.controller, host, "router", ("", &[]))?;
    connected(&pair.cp, &router)?;
    connected(&pair.worker, &router)?;
    pair.is_connected().context("through the router that is a node")?;
    let internet = "203.0.113.1".parse()?;
    answers(&scene.worker, internet).context("from the node behind the router to the internet")?;
    answers(&neighbour_host, internet).context("from another machine there to the internet")?;
    // Its address in the LAN is reached through the tunnel, from the router too.
    answers(scene.router.host(), "192.168.1.10".parse()?)?;
    answers(&scene.cp, "192.168.1.10".parse()?)?;
    has_no_problem(&router)
}

/// A LAN that one node announces, with another node in it.
struct Lan {
    scene: Scene,
    /// Node `cp`, elsewhere.
    cp: Node,
    /// Node that announces the LAN.
    announcer: Node,
    /// Another node in the LAN.
    neighbour: Node,
    neighbour_host: Arc<Host>,
    /// A machine in the LAN that is no node, such as a NAS.
    nas: Arc<Host>,
}

fn lan(setting: &Setting, network: &str, more: &str) -> anyhow::Result<Lan> {
    let mut scene = Scene::build(setting)?;
    let neighbour_host = scene.lab.host("neighbour").behind(&scene.router).build()?;
    let nas = scene.lab.host("nas").behind(&scene.router).build()?;
    let announce = format!("[node]\nprefixes = [\"{network}\"]\n");
    let flags = ["--prefix", network];
    let pair = scene.join_with(setting, ("", &[]), (&announce, &flags))?;
    let controller = pair.controller;
    let neighbour = scene.node(setting, &controller, &neighbour_host, "neighbour", (more, &[]))?;
    connected(&pair.cp, &neighbour)?;
    connected(&pair.worker, &neighbour)?;
    // The controller ends here: nodes keep what they know.
    Ok(Lan { scene, cp: pair.cp, announcer: pair.worker, neighbour, neighbour_host, nas })
}

fn announced_lan(setting: &Setting, network: &str, more: &str) -> anyhow::Result<()> {
    let lan = lan(setting, network, more)?;
    let own = *lan.neighbour_host.addresses().first().context("no address")?;
    let nas = *lan.nas.addresses().first().context("no address")?;
    let gateway = lan.scene.router.gateway();
    answers(&lan.neighbour_host, gateway).context("from the other node to its gateway")?;
    answers(&lan.neighbour_host, nas).context("from the other node to a machine in its LAN")?;
    answers(lan.scene.router.host(), own).context("from the gateway to the other node")?;
    answers(&lan.nas, own).context("from a machine in the LAN to the other node")?;
    // The rest of the mesh reaches the LAN through the node that announces it.
    answers(lan.cp.host(), lan.neighbour.overlay_v4()?)?;
    // The announcing node keeps its own address there.
    publishes(&lan.announcer, "192.168.1.10")
}

/// A part of a LAN could be somebody's pods: it stays closed, and the status tells.
fn announced_part(setting: &Setting) -> anyhow::Result<()> {
    let lan = lan(setting, "192.168.1.128/25", "")?;
    names_problem(&lan.neighbour, &["a part of the network 192.168.1.0/24", "192.168.1.128/25"])
}

/// A part of a LAN that contains the gateway of a machine: the machine refuses it.
fn announced_gateway(setting: &Setting) -> anyhow::Result<()> {
    let lan = lan(setting, "192.168.1.0/25", "")?;
    let words = ["prefix 192.168.1.0/25 is refused here", "a gateway of this machine"];
    names_problem(&lan.neighbour, &words)?;
    answers(&lan.neighbour_host, lan.scene.router.gateway())
}

/// A protected range of the mesh that covers containers of this machine alone.
fn covered_bridge(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let net = "172.17.0.0/16".parse()?;
    let _container = scene.worker.container("container", net, "2001:db8:17::/64".parse()?)?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    has_no_problem(&pair.worker)?;
    pair.controller.operator().command_ok(&["mesh", "set", "--protected", "172.16.0.0/12"])?;
    names_problem(&pair.worker, &["the network 172.17.0.0/16 of the link docker0 is cut off"])
}

/// A network that another node announces, and that the operator lists as local.
fn listed(setting: &Setting) -> anyhow::Result<()> {
    announced_lan(setting, "192.168.1.0/24", "[node]\nlocal_networks = [\"192.168.1.0/24\"]\n")
}
