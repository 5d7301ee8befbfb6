//! Hosts that send into the tunnel with another source than their own: the status names it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use towline_nftables::{Chain, ChainKind, Hook, Rule, Table, TableFamily};

use super::Case;
use super::scene::{Scene, answers, has_no_problem, load, names_problem, overlay};
use crate::lab::namespace::Namespace;
use crate::lab::scenario::Setting;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("sources/program-bound-to-the-lan", bound),
        Case::new("sources/service-without-masquerade", service),
        Case::new("sources/pods-that-are-not-announced", pods),
        Case::new("sources/link-local-and-multicast", ordinary),
    ]
}

/// Sends a datagram from an address of a host.
fn send(from: &Namespace, source: IpAddr, to: SocketAddr) -> anyhow::Result<()> {
    from.run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(source, 0))?;
        // The datagram may be refused: it is dropped either way.
        let _ = socket.send_to(b"towline", to);
        Ok(())
    })
}

/// A program that is bound to the address of the LAN.
fn bound(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    has_no_problem(&pair.worker)?;
    let to = SocketAddr::new(overlay(&pair.cp)?, 6_443);
    send(scene.worker.namespace(), "192.168.1.10".parse()?, to)?;
    names_problem(&pair.worker, &["packets of this machine", "their source 192.168.1.10"])
}

/// A cluster address that is translated after the source was chosen.
fn service(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    let inner = overlay(&pair.cp)?;
    let address: IpAddr = "10.96.0.1".parse()?;
    let translate = Rule::new()
        .destination(address.into())
        .protocol(libc::IPPROTO_UDP as u8)
        .dnat(inner, Some(6_443));
    let chain = Chain::base(ChainKind::Nat, Hook::Output, -100).rule(translate);
    load(&scene.worker, &Table::new(TableFamily::Ip, "kube-proxy").chain("services", chain))?;
    let to = SocketAddr::new(address, 443);
    send(scene.worker.namespace(), Ipv4Addr::UNSPECIFIED.into(), to)?;
    names_problem(&pair.worker, &["packets of this machine", "their source 192.168.1.10"])
}

/// Pods whose network nobody announces, and whose packets nobody translates.
fn pods(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let pod = scene.worker.pod("pod", "10.244.1.0/24".parse()?, "2001:db8:244:1::/64".parse()?)?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    let to = SocketAddr::new(overlay(&pair.cp)?, 6_443);
    send(pod.namespace(), Ipv4Addr::UNSPECIFIED.into(), to)?;
    names_problem(&pair.worker, &["their source 10.244.1.2", "no network that this node announces"])
}

/// What every host sends on every link is no problem.
fn ordinary(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    scene.worker.namespace().run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let socket = socket2::Socket::from(socket);
        socket.bind_device(Some(b"towline0"))?;
        let group = SocketAddr::new(Ipv4Addr::new(224, 0, 0, 251).into(), 5_353);
        let _ = socket.send_to(b"towline", &group.into());
        Ok(())
    })?;
    answers(&scene.worker, overlay(&pair.cp)?)?;
    has_no_problem(&pair.worker)
}
