//! Hosts with many links, with several addresses on a link, or with addresses that change.

use std::time::Duration;

use towline_netlink::Family;
use towline_nftables::Rule;

use super::Case;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{
    Scene, add_address, add_route, answers_within, change, connected, delete_address, drop_first,
    has_no_problem, publishes,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("addresses/four-links-that-lead-nowhere", |setting| nowhere(setting, 4)),
        Case::new("addresses/thirty-links-that-lead-nowhere", |setting| nowhere(setting, 30)),
        Case::new("addresses/default-route-with-a-worse-metric", worse_default),
        Case::new("addresses/two-addresses-and-a-private-link", anchor),
        Case::new("addresses/alias-in-the-same-network", alias),
        Case::new("addresses/many-private-links-beside-a-public-one", many_private),
        Case::new("addresses/reply-from-a-floating-address", floating),
        Case::new("addresses/public-address-on-the-loopback", on_loopback),
        Case::new("addresses/host-address-with-a-gateway-on-the-link", host_address),
        Case::new("addresses/network-of-two-addresses", slash_31),
        Case::new("addresses/link-without-carrier", no_carrier),
        Case::new("addresses/public-address-that-changes", changing),
    ]
}

/// Links with lower addresses than the uplink, at whose other end nobody answers.
fn nowhere(setting: &Setting, count: u8) -> anyhow::Result<()> {
    let mut scene = Scene::build(setting)?;
    let worker = scene.worker.clone();
    for number in 0..count {
        scene.add_link(&worker, &format!("rdma{number}"), &format!("10.0.{number}.1/24"))?;
    }
    scene.join(setting)?.is_connected()
}

/// Further links with default routes that the kernel does not prefer.
fn worse_default(setting: &Setting) -> anyhow::Result<()> {
    let mut scene = Scene::build(setting)?;
    let worker = scene.worker.clone();
    for number in 0..5u8 {
        let link = format!("mgmt{number}");
        scene.add_link(&worker, &link, &format!("10.0.{number}.1/24"))?;
        let gateway = format!("10.0.{number}.254");
        let metric = 1_000 + u32::from(number);
        add_route(&worker, "0.0.0.0/0", &link, Some(&gateway), |route| route.metric(metric))?;
    }
    scene.join(setting)?.is_connected()
}

/// Drops datagrams from private sources on the way to the router, as the internet does.
fn drop_private_sources(scene: &Scene) -> anyhow::Result<()> {
    let from_private =
        |net: &str| anyhow::Ok(Rule::new().input("eth0").source(net.parse()?).drop());
    let rules = [from_private("10.0.0.0/8")?, from_private("172.16.0.0/12")?];
    drop_first(scene.router.host(), "internet", rules)
}

/// A cloud machine with a public and a private address on its first link, and a second link.
fn anchor(setting: &Setting) -> anyhow::Result<()> {
    let mut scene = Scene::build(setting)?;
    drop_private_sources(&scene)?;
    let cp = scene.cp.clone();
    add_address(&cp, "eth0", "10.15.0.5/16")?;
    scene.add_link(&cp, "eth1", "10.114.0.2/20")?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    has_no_problem(&pair.cp)
}

/// A second address in the network of the first one, and a second link.
fn alias(setting: &Setting) -> anyhow::Result<()> {
    let mut scene = Scene::build(setting)?;
    let cp = scene.cp.clone();
    add_address(&cp, "eth0", "203.0.113.9/24")?;
    scene.add_link(&cp, "eth1", "10.114.0.2/20")?;
    scene.join(setting)?.is_connected()
}

/// A control plane with more private links than candidates.
fn many_private(setting: &Setting) -> anyhow::Result<()> {
    let mut scene = Scene::build(setting)?;
    let cp = scene.cp.clone();
    for number in 0..17 {
        scene.add_link(&cp, &format!("lan{number}"), &format!("10.0.{number}.1/24"))?;
    }
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    publishes(&pair.cp, "203.0.113.10")
}

/// A floating address that the operator advertises; the machine's own one cannot be reached.
fn floating(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    add_address(&scene.cp, "eth0", "203.0.113.50/32")?;
    let own = Rule::new()
        .destination("203.0.113.10/32".parse()?)
        .protocol(libc::IPPROTO_UDP as u8)
        .destination_port(51_830)
        .drop();
    drop_first(&scene.cp, "cloud", [own])?;
    let advertise = "[node]\nadvertise = [\"203.0.113.50:51830\"]\n";
    let pair = scene.join_with(setting, (advertise, &[]), ("", &[]))?;
    pair.is_connected()
}

/// A machine whose only public address is on the loopback: routes prefer it (BGP to the host).
fn on_loopback(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    scene.lab.internet().run(|| {
        let mut netlink = towline_netlink::Rtnetlink::open()?;
        let index = netlink.link_index("net0")?;
        Ok(netlink.add_address(index, "10.250.0.2/31".parse()?, Default::default())?)
    })?;
    delete_address(&scene.cp, "eth0", "203.0.113.10/24")?;
    add_address(&scene.cp, "lo", "203.0.113.10/32")?;
    add_address(&scene.cp, "eth0", "10.250.0.3/31")?;
    let source = "203.0.113.10".parse()?;
    add_route(&scene.cp, "0.0.0.0/0", "eth0", Some("10.250.0.2"), |route| route.source(source))?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    publishes(&pair.cp, "203.0.113.10")
}

/// A machine with a single host address, whose gateway is reached by a route of its own.
fn host_address(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    delete_address(&scene.worker, "eth0", "192.168.1.10/24")?;
    add_address(&scene.worker, "eth0", "192.168.1.10/32")?;
    add_route(&scene.worker, "192.168.1.1/32", "eth0", None, |route| route)?;
    add_route(&scene.worker, "0.0.0.0/0", "eth0", Some("192.168.1.1"), |route| route)?;
    scene.join(setting)?.is_connected()
}

/// A machine on a network of two addresses (RFC 3021), with a private network beside it.
fn slash_31(setting: &Setting) -> anyhow::Result<()> {
    let mut scene = Scene::build(setting)?;
    let worker = scene.worker.clone();
    scene.add_link(&worker, "eth1", "10.1.0.1/16")?;
    delete_address(&worker, "eth0", "192.168.1.10/24")?;
    add_address(scene.router.host(), "lan0", "192.168.7.0/31")?;
    add_address(&worker, "eth0", "192.168.7.1/31")?;
    add_route(&worker, "0.0.0.0/0", "eth0", Some("192.168.7.0"), |route| route)?;
    scene.join(setting)?.is_connected()
}

/// A link that loses its carrier, with the lowest address of the host.
fn no_carrier(setting: &Setting) -> anyhow::Result<()> {
    let mut scene = Scene::build(setting)?;
    let worker = scene.worker.clone();
    for number in 0..4 {
        scene.add_link(&worker, &format!("port{number}"), &format!("10.0.{number}.1/24"))?;
    }
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    change(&worker, |netlink| {
        let index = netlink.link_index("port0")?;
        Ok(netlink.set_up(index, false)?)
    })?;
    connected(&pair.cp, &pair.worker)
}

/// A public node that gets another address, as by DHCP. Peers behind NAT learn of it through the
/// controller, so its session there must not hang on the address that is gone.
fn changing(setting: &Setting) -> anyhow::Result<()> {
    /// Limit for a peer to reach the node again. The keepalive of a dead session takes 30 s.
    const LIMIT: Duration = Duration::from_secs(8);
    let mut scene = Scene::build(setting)?;
    let edge = scene.lab.host("edge").public("203.0.113.20", "2001:db8::20")?.only(Family::V4);
    let edge = edge.build()?;
    let pair = scene.join(setting)?;
    let node = scene.node(setting, &pair.controller, &edge, "edge", ("", &[]))?;
    connected(&pair.worker, &node)?;
    let inner = node.overlay_v4()?;
    delete_address(&edge, "eth0", "203.0.113.20/24")?;
    add_address(&edge, "eth0", "203.0.113.21/24")?;
    add_route(&edge, "0.0.0.0/0", "eth0", Some("203.0.113.1"), |route| route)?;
    answers_within(LIMIT, &scene.worker, inner)
}
