//! Faults of networks that overlap, and of packets with a wrong source.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use super::ask::{View, ask, ask_while};
use super::{Case, Outcome};
use crate::lab::namespace::Namespace;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::Scene;
use crate::lab::topology::Host;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "networks/covered",
            "A range of the mesh covers a network of this machine",
            "local-network-covered",
            covered,
        ),
        Case::new(
            "networks/announced-twice",
            "Two nodes announce the same network",
            "prefix-withheld",
            |setting, case| announced(setting, case, "10.9.0.0/16"),
        ),
        Case::new(
            "networks/announced-inside",
            "A node announces a part of another node's network",
            "prefix-withheld",
            |setting, case| announced(setting, case, "10.9.1.0/24"),
        ),
        Case::new(
            "networks/not-granted",
            "A node announces a network that its token does not allow",
            "prefix-not-granted",
            |setting, case| {
                let scene = Scene::build(setting)?;
                let announce = "[node]\nprefixes = [\"10.9.0.0/16\"]\n";
                let pair = scene.join_with(setting, ("", &[]), (announce, &[]))?;
                pair.settles()?;
                ask(case, &[View::new(&pair.worker, "cp")])
            },
        ),
        Case::new(
            "networks/own-source",
            "A program sends into the tunnel with the machine's LAN address",
            "own-source-foreign",
            |setting, case| {
                let from = Ipv4Addr::new(192, 168, 1, 10);
                sending(setting, case, from.into(), None)
            },
        ),
        Case::new(
            "networks/pods-without-announcement",
            "Pods send into the tunnel, and nobody announces their network",
            "source-not-announced",
            |setting, case| {
                sending(setting, case, Ipv4Addr::UNSPECIFIED.into(), Some("10.244.1.0/24"))
            },
        ),
    ]
}

/// A worker with containers, whose network a range of the mesh covers.
fn covered(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    let net = "172.17.0.0/16".parse()?;
    let _container = scene.worker.container("container", net, "2001:db8:17::/64".parse()?)?;
    let pair = scene.join(setting)?;
    pair.settles()?;
    pair.controller.operator().command_ok(&["mesh", "set", "--protected", "172.16.0.0/12"])?;
    ask(case, &[View::new(&pair.worker, "cp")])
}

/// Two nodes whose tokens allow 10.9.0.0/16. The control plane announces it, then the worker announces
/// `network`.
fn announced(setting: &Setting, case: &Case, network: &str) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    for host in [&scene.cp, &scene.worker] {
        host.namespace().sysctl("net.ipv4.ip_forward", "1")?;
    }
    let announce = |network: &str| format!("[node]\nprefixes = [\"{network}\"]\n");
    let (first, second) = (announce("10.9.0.0/16"), announce(network));
    let flags = ["--prefix", "10.9.0.0/16"];
    let pair = scene.join_with(setting, (&first, &flags), (&second, &flags))?;
    pair.settles()?;
    ask(case, &[View::new(&pair.worker, "cp")])
}

/// The worker, or a pod in this network on it, sends to the control plane from `source`.
fn sending(
    setting: &Setting,
    case: &Case,
    source: IpAddr,
    pods: Option<&str>,
) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    let pod = |network: &str| -> anyhow::Result<Host> {
        scene.worker.pod("pod", network.parse()?, "2001:db8:244:1::/64".parse()?)
    };
    let pod = pods.map(pod).transpose()?;
    let pair = scene.join(setting)?;
    pair.settles()?;
    let to = SocketAddr::new(pair.cp.overlay_v4()?, 6_443);
    let from = pod.as_ref().map_or(scene.worker.namespace(), Host::namespace);
    ask_while(case, &[View::new(&pair.worker, "cp")], || send(from, source, to))
}

/// Sends a datagram from an address.
fn send(from: &Namespace, source: IpAddr, to: SocketAddr) -> anyhow::Result<()> {
    from.run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(source, 0))?;
        // The datagram may be refused: it is dropped either way.
        let _ = socket.send_to(b"towline", to);
        Ok(())
    })
}
