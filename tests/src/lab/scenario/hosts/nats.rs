//! Hosts behind NAT routers that are set up simply, or that lose an address.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use towline_netlink::Family;
use towline_nftables::{Chain, ChainKind, Hook, Rule, Table, TableFamily};

use super::Case;
use crate::lab::interrupt::sleep;
use crate::lab::mesh::{Controller, Node};
use crate::lab::nat::{self, Nat};
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{
    Scene, UP_LIMIT, add_address, add_route, answers_within, connected, connected_within,
    delete_address, drop_first, has_no_problem, load, names_problem, node_behind,
};
use crate::lab::topology::{Host, Lab, Router};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("nats/controller-known-by-its-second-address", |setting| {
            two_sites(setting, [Nat::Masquerade, Nat::Masquerade], Providers::Shared)
        }),
        Case::new("nats/both-routers-only-masquerade", |setting| {
            two_sites(setting, [Nat::Unfiltered, Nat::Unfiltered], Providers::Own)
        }),
        Case::new("nats/one-router-only-masquerades", |setting| {
            two_sites(setting, [Nat::Unfiltered, Nat::Masquerade], Providers::Own)
        }),
        Case::new("nats/other-router-only-masquerades", |setting| {
            two_sites(setting, [Nat::Masquerade, Nat::Unfiltered], Providers::Own)
        })
        .long(),
        Case::new("nats/one-router-only-masquerades-on-one-segment", |setting| {
            two_sites(setting, [Nat::Unfiltered, Nat::Masquerade], Providers::Shared)
        })
        .long(),
        Case::new("nats/address-of-the-router-that-changes", |setting| stuck(setting, false)),
        Case::new("nats/address-of-the-router-that-changes-beside-a-neighbour", |setting| {
            stuck(setting, true)
        })
        .long(),
        Case::new("nats/controller-that-is-reached-over-tcp-alone", tcp_alone),
        Case::new("nats/filter-that-netcheck-names", named_filter),
        Case::new("nats/silent-peer-of-a-public-node", public_node).long(),
    ]
}

/// How routers reach each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Providers {
    /// They are on one network segment.
    Shared,
    /// There is another router between them, as between two providers.
    Own,
}

/// Two nodes behind NAT routers, and no other node. They know the controller by the second address of
/// its link, at which they also ask for their public addresses.
fn two_sites(setting: &Setting, nats: [Nat; 2], providers: Providers) -> anyhow::Result<()> {
    /// Limit for one of two nodes to try its second port, and for the other to follow. Both routers
    /// are on one segment: there a datagram that is to open one of them reaches the other too.
    const SECOND_PORT_LIMIT: Duration = Duration::from_secs(150);
    let mut lab = Lab::new(setting.rank)?;
    let host = lab.host("controller").public("203.0.113.10", "2001:db8::10")?.build()?;
    add_address(&host, "eth0", "203.0.113.50/24")?;
    let known = "203.0.113.50".parse()?;
    let controller = Controller::start_known_by(&lab, &host, &setting.binaries, known)?;
    let mut nodes = Vec::new();
    for (number, nat) in (1..).zip(nats) {
        let router = lab
            .router(&format!("router-{number}"))
            .public_number(10 + number)?
            .lan_number(number)?
            .nat(nat)
            .build()?;
        if providers == Providers::Own {
            own_provider(&router, &format!("203.0.113.1{number}"))?;
        }
        let name = format!("worker-{number}");
        let worker = lab.host(&name).behind(&router).only(Family::V4).build()?;
        nodes.push((node_behind(setting, &lab, &controller, &worker, &name)?, router));
    }
    let [(one, _), (other, _)] = nodes.as_slice() else { unreachable!("two nodes") };
    let limit = match (nats, providers) {
        ([Nat::Unfiltered, _], Providers::Shared) => SECOND_PORT_LIMIT,
        _ => UP_LIMIT,
    };
    connected_within(limit, one, other)
}

/// Sends everything that leaves a router through the router of the internet, as if each had a provider of
/// its own.
fn own_provider(router: &Router, address: &str) -> anyhow::Result<()> {
    let host = router.host();
    delete_address(host, "eth0", &format!("{address}/24"))?;
    add_address(host, "eth0", &format!("{address}/32"))?;
    add_route(host, "203.0.113.1/32", "eth0", None, |route| route)?;
    add_route(host, "0.0.0.0/0", "eth0", Some("203.0.113.1"), |route| route)
}

/// Makes a router translate the sources of new connections to this address. Connections that it tracks
/// already keep their address.
fn translate_to(router: &Host, address: &str) -> anyhow::Result<()> {
    let leaving = Rule::new().family(Family::V4).output("eth0").snat(address.parse()?, None);
    let chain = Chain::base(ChainKind::Nat, Hook::Postrouting, 100).rule(leaving);
    // The table replaces the one of the router's class, with the rules that filter.
    load(router, &Table::new(TableFamily::Inet, nat::TABLE).chain("translate", chain))
}

/// A router whose public address changes, and which keeps the connections of the old one: datagrams
/// from a port that was in use still leave with the old address.
fn stuck(setting: &Setting, has_neighbour: bool) -> anyhow::Result<()> {
    /// Limit for the tunnel to work again, with the TCP connection to the controller before it.
    const LIMIT: Duration = Duration::from_secs(75);
    let mut scene = Scene::build_v4(setting)?;
    let router = scene.router.host();
    translate_to(router, "203.0.113.11")?;
    let neighbour = match has_neighbour {
        true => Some(scene.lab.host("neighbour").behind(&scene.router).build()?),
        false => None,
    };
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    let start =
        |host: Arc<Host>| scene.node(setting, &pair.controller, &host, "neighbour", ("", &[]));
    let neighbour = neighbour.map(start).transpose()?;
    if let Some(neighbour) = &neighbour {
        connected(&pair.worker, neighbour)?;
    }
    let router = scene.router.host();
    add_address(router, "eth0", "203.0.113.12/24")?;
    translate_to(router, "203.0.113.12")?;
    let dead = Rule::new().input("eth0").destination("203.0.113.11/32".parse()?).drop();
    drop_first(router, "line", [dead])?;
    answers_within(LIMIT, &scene.worker, pair.cp.overlay_v4()?)
        .context("over the other address")?;
    if let Some(neighbour) = &neighbour {
        connected(&pair.worker, neighbour)?;
    }
    pair.is_connected()
}

/// A controller whose UDP port is blocked, as behind a Kubernetes Service of TCP alone.
fn tcp_alone(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build_v4(setting)?;
    let blocked = Rule::new().protocol(libc::IPPROTO_UDP as u8).destination_port(7_443).drop();
    drop_first(&scene.cp, "service", [blocked])?;
    let pair = scene.join(setting)?;
    ensure!(pair.controller.address().port() == 7_443, "the controller has another port");
    pair.is_connected()?;
    names_problem(&pair.worker, &["STUN server 203.0.113.10:7443", "never answered"])?;
    has_no_problem(&pair.cp)
}

/// A machine that asks a controller with two STUN ports and two addresses how its router filters: at first
/// the router lets answers in alone, then everything.
fn named_filter(setting: &Setting) -> anyhow::Result<()> {
    let mut lab = Lab::new(setting.rank)?;
    let host = lab.host("controller").public("203.0.113.10", "2001:db8::10")?.build()?;
    add_address(&host, "eth0", "203.0.113.50/24")?;
    let config = lab.directory().join("stun.toml");
    let addresses = "addresses = [\"203.0.113.10\", \"203.0.113.50\"]";
    fs::write(&config, format!("[stun]\nother_port = 7444\n{addresses}\n"))?;
    let _controller = Controller::start_on_all_configured(&lab, &host, &setting.binaries, &config)?;
    let router =
        lab.router("router").public_number(11)?.lan_number(1)?.nat(Nat::Masquerade).build()?;
    let worker = lab.host("worker").behind(&router).only(Family::V4).build()?;
    let node = Node::new(&lab, &worker, "worker", &setting.binaries, "")?;
    filters(&node, "address-and-port-dependent")?;

    let inside = worker.addresses().first().context("the worker has no address")?;
    let leaving = Rule::new().family(Family::V4).output("eth0").masquerade();
    let entering = Rule::new().family(Family::V4).input("eth0").protocol(libc::IPPROTO_UDP as u8);
    let leave = Chain::base(ChainKind::Nat, Hook::Postrouting, 100).rule(leaving);
    let enter =
        Chain::base(ChainKind::Nat, Hook::Prerouting, -100).rule(entering.dnat(*inside, None));
    // The table replaces the one of the router's class, with the rules that filter.
    let open = Table::new(TableFamily::Inet, nat::TABLE).chain("translate", leave);
    load(router.host(), &open.chain("enter", enter))?;
    filters(&node, "endpoint-independent")
}

/// Checks what `towline netcheck` says about the filter, and that the mapping is that of masquerading.
fn filters(node: &Node, expected: &str) -> anyhow::Result<()> {
    let netcheck = ["netcheck", "--reflector", "203.0.113.10:7443", "-o", "json"];
    let report: serde_json::Value = serde_json::from_str(&node.command_ok(&netcheck)?)?;
    let nat = &report["ipv4"]["nat"];
    let is_named = nat["filtering"] == expected && nat["mapping"] == "endpoint-independent";
    ensure!(is_named, "filtering is not {expected}: {nat}");
    Ok(())
}

/// A node with a public address whose only peer is off: peers call it at its port, so it keeps that.
fn public_node(setting: &Setting) -> anyhow::Result<()> {
    /// Longer than the silence after which a node behind a NAT tries another port.
    const SILENCE: Duration = Duration::from_secs(90);
    let scene = Scene::build(setting)?;
    let mut pair = scene.join(setting)?;
    pair.is_connected()?;
    drop(pair.worker.take_agent());
    let until = Instant::now() + SILENCE;
    while Instant::now() < until {
        let notes = pair.cp.status()?.notes;
        ensure!(!notes.iter().any(|note| note.contains("second UDP port")), "{notes:?}");
        sleep(Duration::from_secs(5))?;
    }
    Ok(())
}
