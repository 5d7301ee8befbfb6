//! Faults on the way between two nodes.

use std::sync::Arc;
use std::time::Duration;

use towline_netlink::{Family, Rtnetlink};
use towline_nftables::{Chain, ChainKind, Hook, Rule, Table, TableFamily};

use super::ask::{View, ask, ask_while, poke};
use super::{Case, Outcome};
use crate::lab::mesh::{Controller, require_tunnel};
use crate::lab::nat::Nat;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{SETTLE_LIMIT, Scene, drop_first, load, node_behind};
use crate::lab::topology::{Host, Lab, Router};
use crate::lab::wire::Weather;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "paths/udp-blocked",
            "The network of a machine drops all UDP",
            "udp-blocked",
            blocked,
        ),
        Case::new(
            "paths/udp-blocked-one-way",
            "The network of a machine lets UDP out, but nothing in",
            "udp-one-way",
            one_way,
        ),
        Case::new("paths/peer-off", "The peer is off", "no-answer", peer_off),
        Case::new(
            "paths/mtu-hole",
            "A link on the way has a small MTU, and nobody says so",
            "path-mtu-small",
            mtu_hole,
        ),
        Case::new(
            "paths/slow",
            "The path to a peer takes 400 ms",
            "path-rtt-high",
            |setting, case| {
                let delay = Duration::from_millis(200);
                bad_link(setting, case, Weather { delay, ..Weather::default() })
            },
        ),
        Case::new(
            "paths/loss",
            "The path to a peer loses a tenth of the packets in each direction",
            "path-loss-high",
            |setting, case| bad_link(setting, case, Weather { lost: 10_000, ..Weather::default() }),
        ),
        Case::new(
            "paths/second-port",
            "A firewall on the way drops what leaves from the configured UDP port",
            "second-port-used",
            second_port,
        )
        .note(),
        Case::new(
            "paths/silent-reflector",
            "A firewall drops UDP to the controller's port",
            "reflector-silent",
            silent_reflector,
        ),
    ]
}

/// Returns a rule about UDP.
fn udp() -> Rule {
    Rule::new().protocol(libc::IPPROTO_UDP as u8)
}

fn blocked(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let scene = Scene::build_v4(setting)?;
    drop_first(scene.router.host(), "site", [udp().drop()])?;
    let pair = scene.join(setting)?;
    ask(case, &[View::new(&pair.worker, "cp")])
}

/// Seen from outside: the datagrams of the worker arrive, and the answers do not.
fn one_way(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let scene = Scene::build_v4(setting)?;
    drop_first(scene.router.host(), "site", [udp().input("eth0").drop()])?;
    let pair = scene.join(setting)?;
    ask(case, &[View::new(&pair.cp, "worker")])
}

fn peer_off(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    let mut pair = scene.join(setting)?;
    pair.settles()?;
    let address = pair.worker.overlay_v4()?;
    drop(pair.worker.take_agent());
    ask_while(case, &[View::new(&pair.cp, "worker")], || poke(&scene.cp, address))
}

/// A node behind two routers, between which packets have to be small. The routers send no errors.
fn mtu_hole(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    /// MTU of the link between the routers, in bytes.
    const SMALL: u32 = 1_368;
    let mut lab = Lab::new(setting.rank)?;
    let controller_host = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
    let carrier = lab
        .router("carrier")
        .public("203.0.113.11", "2001:db8::11")?
        .lan("100.64.0.0/24", "2001:db8:1::/64")?
        .nat(Nat::Masquerade)
        .build()?;
    let home = lab
        .router("home")
        .behind(&carrier)
        .lan("192.168.1.0/24", "2001:db8:2::/64")?
        .nat(Nat::Masquerade)
        .build()?;
    let inside = lab.host("inside").only(Family::V4).behind(&home).build()?;
    let outside = lab.host("outside").public("203.0.113.10", "2001:db8::10")?;
    let outside = outside.only(Family::V4).build()?;
    for (router, link) in [(&home, "eth0"), (&carrier, "lan0")] {
        narrow(router, link, SMALL)?;
        silence(router.host())?;
    }
    let controller = Controller::start(&lab, &controller_host, &setting.binaries)?;
    let inner = node_behind(setting, &lab, &controller, &inside, "inside")?;
    let outer = node_behind(setting, &lab, &controller, &outside, "outside")?;
    require_tunnel(&inner, &outer, SETTLE_LIMIT)?;
    let address = outer.overlay_v4()?;
    // The MTU of a path is measured while it has traffic.
    ask_while(case, &[View::new(&inner, "outside")], || poke(&inside, address))
}

/// Sets the MTU of a router's link, in bytes.
fn narrow(router: &Router, link: &str, mtu: u32) -> anyhow::Result<()> {
    router.host().namespace().run(|| {
        let mut netlink = Rtnetlink::open()?;
        let index = netlink.link_index(link)?;
        Ok(netlink.set_mtu(index, mtu)?)
    })
}

/// Drops all ICMP packets that a router itself sends.
fn silence(router: &Arc<Host>) -> anyhow::Result<()> {
    let icmp = |protocol: libc::c_int| Rule::new().protocol(protocol as u8).drop();
    let output = Chain::base(ChainKind::Filter, Hook::Output, 0)
        .rules([icmp(libc::IPPROTO_ICMP), icmp(libc::IPPROTO_ICMPV6)]);
    load(router, &Table::new(TableFamily::Inet, "silence").chain("output", output))
}

/// Two public nodes; the link of one of them has this weather.
fn bad_link(setting: &Setting, case: &Case, weather: Weather) -> anyhow::Result<Outcome> {
    let mut lab = Lab::new(setting.rank)?;
    let near_host = lab.host("near").public("203.0.113.10", "2001:db8::10")?;
    let near_host = near_host.only(Family::V4).build()?;
    lab.weather(weather);
    let far_host = lab.host("far").public("203.0.113.20", "2001:db8::20")?;
    let far_host = far_host.only(Family::V4).build()?;
    let controller = Controller::start(&lab, &near_host, &setting.binaries)?;
    let near = node_behind(setting, &lab, &controller, &near_host, "near")?;
    let far = node_behind(setting, &lab, &controller, &far_host, "far")?;
    require_tunnel(&near, &far, SETTLE_LIMIT)?;
    let address = far.overlay_v4()?;
    ask_while(case, &[View::new(&near, "far")], || poke(&near_host, address))
}

fn second_port(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let scene = Scene::build_v4(setting)?;
    let pair = scene.join(setting)?;
    pair.settles()?;
    let out = udp().input("lan0").source_port(51_830).drop();
    drop_first(scene.router.host(), "site", [out])?;
    ask(case, &[View::new(&pair.worker, "cp")])
}

fn silent_reflector(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let scene = Scene::build_v4(setting)?;
    drop_first(&scene.cp, "service", [udp().destination_port(7_443).drop()])?;
    let pair = scene.join(setting)?;
    pair.settles()?;
    ask(case, &[View::new(&pair.worker, "cp")])
}
