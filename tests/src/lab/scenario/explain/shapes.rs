//! Healthy meshes of different shapes, about which no command may complain.

use std::time::Duration;

use towline_netlink::Family;
use towline_nftables::{Hook, Policy, Rule, Table, TableFamily};

use super::Shape;
use super::ask::complaints;
use crate::lab::mesh::Controller;
use crate::lab::scenario::Setting;
use crate::lab::scenario::foreign_firewalls::filter;
use crate::lab::scenario::scene::{Scene, add_address, load, node_behind, settled};
use crate::lab::topology::Lab;
use crate::lab::wire::Weather;

pub(super) fn all() -> Vec<Shape> {
    vec![
        Shape::new("healthy/worker-behind-nat", |setting| {
            pair(Scene::build(setting)?, setting, ("", &[]))
        }),
        Shape::new("healthy/ipv4-only", |setting| {
            pair(Scene::build_v4(setting)?, setting, ("", &[]))
        }),
        Shape::new("healthy/ipv6-only", |setting| public(setting, Family::V6, Weather::default())),
        Shape::new("healthy/ipv6-disabled", |setting| {
            let scene = Scene::build(setting)?;
            for links in ["all", "default"] {
                let name = format!("net.ipv6.conf.{links}.disable_ipv6");
                scene.worker.namespace().sysctl(&name, "1")?;
            }
            pair(scene, setting, ("", &[]))
        }),
        Shape::new("healthy/far-away", |setting| {
            let delay = Duration::from_millis(40);
            public(setting, Family::V4, Weather { delay, ..Weather::default() })
        }),
        Shape::new("healthy/many-links", |setting| {
            let mut scene = Scene::build(setting)?;
            let worker = scene.worker.clone();
            for number in 0..8 {
                scene.add_link(&worker, &format!("lan{number}"), &format!("10.0.{number}.1/24"))?;
            }
            add_address(&worker, "eth0", "192.168.1.77/24")?;
            pair(scene, setting, ("", &[]))
        }),
        Shape::new("healthy/neighbours", neighbours),
        Shape::new("healthy/announced-pods", |setting| {
            let scene = Scene::build(setting)?;
            let network = "10.244.1.0/24";
            let _pod = scene.worker.pod("pod", network.parse()?, "2001:db8:244:1::/64".parse()?)?;
            let announce = format!("[node]\nprefixes = [\"{network}\"]\n");
            pair(scene, setting, (&announce, &["--prefix", network]))
        }),
        Shape::new("healthy/firewall-that-accepts", |setting| {
            let scene = Scene::build(setting)?;
            let udp = Rule::new().protocol(libc::IPPROTO_UDP as u8).destination_port(51_830);
            let input = filter(Hook::Input)
                .policy(Policy::Drop)
                .rule(udp.accept())
                .rule(Rule::new().input("towline0").accept());
            load(&scene.worker, &Table::new(TableFamily::Inet, "filter").chain("input", input))?;
            pair(scene, setting, ("", &[]))
        }),
        Shape::new("healthy/node-ip", |setting| {
            let configuration = "[node]\naddressing = \"node-ip\"\n";
            // The worker has a node IP of each family.
            let flags = ["--prefix", "192.168.1.10/32", "--prefix", "2001:db8:1::a/128"];
            pair(Scene::build_v4(setting)?, setting, (configuration, &flags))
        }),
    ]
}

/// A control plane, and a worker with this configuration and these flags for its token.
fn pair(scene: Scene, setting: &Setting, worker: (&str, &[&str])) -> anyhow::Result<Vec<String>> {
    let pair = scene.join_with(setting, ("", &[]), worker)?;
    pair.settles()?;
    complaints(&[&pair.cp, &pair.worker])
}

/// Two public nodes of one address family, over links with this weather.
fn public(setting: &Setting, family: Family, weather: Weather) -> anyhow::Result<Vec<String>> {
    let mut lab = Lab::new(setting.rank)?;
    let cp_host = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.only(family).build()?;
    lab.weather(weather);
    let edge_host =
        lab.host("edge").public("203.0.113.20", "2001:db8::20")?.only(family).build()?;
    let controller = Controller::start(&lab, &cp_host, &setting.binaries)?;
    let cp = node_behind(setting, &lab, &controller, &cp_host, "cp")?;
    let edge = node_behind(setting, &lab, &controller, &edge_host, "edge")?;
    settled(&cp, &edge)?;
    complaints(&[&cp, &edge])
}

/// Two workers in one LAN.
fn neighbours(setting: &Setting) -> anyhow::Result<Vec<String>> {
    let mut scene = Scene::build(setting)?;
    let host = scene.lab.host("neighbour").behind(&scene.router).build()?;
    let pair = scene.join(setting)?;
    let neighbour = scene.node(setting, &pair.controller, &host, "neighbour", ("", &[]))?;
    pair.settles()?;
    settled(&pair.worker, &neighbour)?;
    complaints(&[&pair.cp, &pair.worker, &neighbour])
}
