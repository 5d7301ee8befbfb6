//! Hosts that send into the tunnel with another source than their own: the status names it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use towline_nftables::{Chain, ChainKind, Hook, Rule, Table, TableFamily};

use super::Case;
use crate::lab::namespace::Namespace;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{Scene, answers, has_no_problem, load, names_problem};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("sources/program-bound-to-the-lan", bound),
        Case::new("sources/service-without-masquerade", service),
        Case::new("sources/pods-that-are-not-announced", pods),
        Case::new("sources/program-bound-to-the-lan-is-translated", |setting| {
            translated(setting, Sender::BoundToTheLan)
        }),
        Case::new("sources/service-without-masquerade-is-translated", |setting| {
            translated(setting, Sender::ToAService)
        }),
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
    let to = SocketAddr::new(pair.cp.overlay_v4()?, 6_443);
    send(scene.worker.namespace(), "192.168.1.10".parse()?, to)?;
    names_problem(&pair.worker, &["packets of this machine", "their source 192.168.1.10"])
}

/// Program whose packets have a source that is not the node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sender {
    /// It is bound to the address of the LAN.
    BoundToTheLan,
    /// It connects to a cluster address.
    ToAService,
}

/// A node that translates sources that are not its own.
fn translated(setting: &Setting, sender: Sender) -> anyhow::Result<()> {
    /// Limit for one datagram to arrive.
    const LIMIT: Duration = Duration::from_secs(5);
    let scene = Scene::build(setting)?;
    let masquerade = "[node]\nmasquerade_local = true\n";
    let pair = scene.join_with(setting, ("", &[]), (masquerade, &[]))?;
    pair.is_connected()?;
    let (inner, own) = (pair.cp.overlay_v4()?, pair.worker.overlay_v4()?);
    let server = scene.cp.namespace().run(|| Ok(UdpSocket::bind((inner, 6_443))?))?;
    server.set_read_timeout(Some(LIMIT))?;
    let (from, to): (IpAddr, _) = match sender {
        Sender::BoundToTheLan => ("192.168.1.10".parse()?, SocketAddr::new(inner, 6_443)),
        Sender::ToAService => {
            translate_service(&scene, inner)?;
            (Ipv4Addr::UNSPECIFIED.into(), SocketAddr::new(SERVICE, 443))
        }
    };
    let client = scene.worker.namespace().run(|| Ok(UdpSocket::bind((from, 0))?))?;
    client.set_read_timeout(Some(LIMIT))?;
    client.send_to(b"request", to)?;
    let mut buffer = [0; 16];
    let (len, source) = server.recv_from(&mut buffer).context("no request arrived")?;
    ensure!(&buffer[..len] == b"request", "another request arrived");
    ensure!(source.ip() == own, "the request came from {source} instead of {own}");
    server.send_to(b"answer", source)?;
    let (len, source) = client.recv_from(&mut buffer).context("no answer arrived")?;
    ensure!(&buffer[..len] == b"answer" && source == to, "an answer came from {source}");
    has_no_problem(&pair.worker)
}

/// Address of a service.
const SERVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));

/// A cluster address that is translated after the source was chosen.
fn service(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    translate_service(&scene, pair.cp.overlay_v4()?)?;
    let to = SocketAddr::new(SERVICE, 443);
    send(scene.worker.namespace(), Ipv4Addr::UNSPECIFIED.into(), to)?;
    names_problem(&pair.worker, &["packets of this machine", "their source 192.168.1.10"])
}

/// Has the worker reach an address of the mesh at the address of the service.
fn translate_service(scene: &Scene, inner: IpAddr) -> anyhow::Result<()> {
    let translate = Rule::new()
        .destination(SERVICE.into())
        .protocol(libc::IPPROTO_UDP as u8)
        .dnat(inner, Some(6_443));
    let chain = Chain::base(ChainKind::Nat, Hook::Output, -100).rule(translate);
    load(&scene.worker, &Table::new(TableFamily::Ip, "kube-proxy").chain("services", chain))
}

/// Pods whose network nobody announces, and whose packets nobody translates.
fn pods(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let pod = scene.worker.pod("pod", "10.244.1.0/24".parse()?, "2001:db8:244:1::/64".parse()?)?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    let to = SocketAddr::new(pair.cp.overlay_v4()?, 6_443);
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
    answers(&scene.worker, pair.cp.overlay_v4()?)?;
    has_no_problem(&pair.worker)
}
