//! Subjects of the benchmark: two hosts that are joined by one cable, and a tunnel between them.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use nix::unistd::Pid;
use towline_netlink::{AddressOptions, Overlay, OverlayKind, Rtnetlink};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily};
use x25519_dalek::{PublicKey, StaticSecret};

use super::load::Way;
use crate::lab::binaries::Binaries;
use crate::lab::interrupt::wait_for;
use crate::lab::mesh::{Controller, Node, START_LIMIT, require_tunnel};
use crate::lab::namespace::Namespace;
use crate::lab::peers::{Installed, Peer, link_name, uapi};
use crate::lab::ping::first_reply;
use crate::lab::process::{Daemon, Program};
use crate::lab::scenario::Setting;
use crate::lab::topology::{Host, Lab};

/// Two running ends of one tunnel.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) hosts: [Arc<Host>; 2],
    /// Inner addresses of each end, IPv4 before IPv6.
    inner: [[IpAddr; 2]; 2],
    /// Name of the tunnel's link at each end.
    links: [String; 2],
    /// Process ids of the two tunnel programs. Empty without a tunnel.
    pub(super) daemons: Vec<Pid>,
    /// Programs of the subject. They are stopped when the subject is dropped.
    running: Running,
}

/// Programs that run for a subject.
#[derive(Debug)]
#[expect(dead_code, reason = "kept until the subject is dropped")]
enum Running {
    Towline(Vec<Node>, Controller),
    Others([Peer; 2]),
    Limit([Daemon; 2]),
    Nothing,
}

/// Configuration of Towline's agents.
#[derive(Debug, Clone, Copy)]
pub(super) struct Agents {
    /// Address family that carries the tunnel.
    pub(super) outer: Outer,
    /// Number of peers, all of which except for the other agent send nothing.
    pub(super) peers: u32,
    /// Number of workers.
    pub(super) workers: u32,
    /// WireGuard engine. `None` for a build that has no such setting, or for the default.
    pub(super) engine: Option<&'static str>,
    /// Number of helpers of each worker. `None` for a build that has no such setting, or for the default.
    pub(super) seal_ahead: Option<u32>,
}

impl Default for Agents {
    fn default() -> Self {
        Self { outer: Outer::V4, peers: 1, workers: 1, engine: None, seal_ahead: None }
    }
}

/// Address family that carries the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outer {
    V4,
    V6,
}

/// Limit for the kernel to create a link, and for a link to become ready.
const LINK_LIMIT: Duration = Duration::from_secs(10);
/// UDP port of the tunnels that the lab configures.
const PORT: u16 = 51830;
/// MTU of the tunnels, in bytes.
const MTU: u32 = super::limit::MTU as u32;
/// MTU of a tunnel inside the tunnel: 50 bytes less, for the VXLAN or Geneve headers.
const OVERLAY_MTU: u32 = MTU - 50;
/// Prefix of the name of a link for a tunnel inside the tunnel.
const OVERLAY_LINK: &str = "inside0";
/// Name of the link to the cable in each host.
const CABLE: &str = "eth0";
/// Name of the nftables table that drops datagrams.
const LOSS_TABLE: &str = "loss";

impl Outer {
    /// Returns the network of the cable.
    fn net(self) -> IpNet {
        match self {
            Self::V4 => IpNet::new_assert(Ipv4Addr::new(192, 0, 2, 0).into(), 24),
            Self::V6 => IpNet::new_assert([0x2001, 0xdb8, 7, 0, 0, 0, 0, 0].into(), 64),
        }
    }
}

impl Subject {
    /// Starts a controller and two agents that join it, all of one build.
    pub(super) fn towline(
        binaries: &Binaries,
        lab: &mut Lab,
        name: &str,
        agents: Agents,
    ) -> anyhow::Result<Self> {
        let Agents { outer, peers, workers, engine, seal_ahead } = agents;
        let names = [format!("{name}-1"), format!("{name}-2")];
        let hosts = lab.pair([&names[0], &names[1]], outer.net())?;
        let engine = engine.map(|engine| format!("engine = {engine:?}\n")).unwrap_or_default();
        let helpers = seal_ahead.map(|helpers| format!("seal_ahead = {helpers}\n"));
        let helpers = helpers.unwrap_or_default();
        let silent = silent_peers(peers - 1);
        let more = format!("[wireguard]\nworkers = {workers}\n{engine}{helpers}{silent}");
        let controller = Controller::start(lab, &hosts[0], binaries)?;
        let mut nodes = Vec::new();
        for (host, name) in hosts.iter().zip(&names) {
            let mut node = Node::new(lab, host, name, binaries, &more)?;
            node.join(&controller.operator().token("bench")?)?;
            node.launch()?;
            nodes.push(node);
        }
        let mut inner = Vec::new();
        let mut daemons = Vec::new();
        for node in &mut nodes {
            let status = node.await_status(START_LIMIT)?;
            let of = |v4: bool| status.overlay_addresses.iter().find(|ip| ip.is_ipv4() == v4);
            let both =
                of(true).zip(of(false)).context("a node has no mesh address of one family")?;
            inner.push([*both.0, *both.1]);
            daemons.push(node.agent()?.pid());
        }
        require_tunnel(&nodes[0], &nodes[1], START_LIMIT)?;
        Self {
            hosts,
            inner: [inner[0], inner[1]],
            links: ["towline0".to_owned(), "towline0".to_owned()],
            daemons,
            running: Running::Towline(nodes, controller),
        }
        .ready()
    }

    /// Starts two instances of another implementation on hosts of this name.
    pub(super) fn other(
        lab: &mut Lab,
        name: &str,
        program: &Installed,
        outer: Outer,
    ) -> anyhow::Result<Self> {
        let name = match outer {
            Outer::V4 => name.to_owned(),
            Outer::V6 => format!("{name}6"),
        };
        let names = [format!("{name}-1"), format!("{name}-2")];
        let hosts = lab.pair([&names[0], &names[1]], outer.net())?;
        let links = [link_name(), link_name()];
        let keys = [[0x11; 32], [0x22; 32]];
        let inner = inner();
        let start = |end: usize| {
            let log = lab.directory().join(format!("{}.log", names[end]));
            let mut peer = Peer::start(program, hosts[end].namespace(), &links[end], &log)?;
            let far = 1 - end;
            peer.configure(&uapi::Device {
                private_key: keys[end],
                port: PORT,
                peers: vec![uapi::Peer {
                    public_key: PublicKey::from(&StaticSecret::from(keys[far])).to_bytes(),
                    preshared_key: None,
                    endpoint: Some(SocketAddr::new(hosts[far].addresses()[0], PORT)),
                    allowed_ips: inner[far].map(IpNet::from).to_vec(),
                    keepalive: 0,
                }],
            })?;
            configure(hosts[end].namespace(), &links[end], inner[end], inner[far])?;
            anyhow::Ok(peer)
        };
        let mut peers = [start(0)?, start(1)?];
        let [one, two] = &mut peers;
        let daemons = vec![one.daemon().pid(), two.daemon().pid()];
        Self { hosts, inner, links, daemons, running: Running::Others(peers) }.ready()
    }

    /// Starts two ends of the bare limit. With `null` they do not encrypt.
    pub(super) fn limit(setting: &Setting, lab: &mut Lab, null: bool) -> anyhow::Result<Self> {
        let names = if null { ["null-1", "null-2"] } else { ["limit-1", "limit-2"] };
        let hosts = lab.pair(names, Outer::V4.net())?;
        let lab_program =
            setting.binaries.lab.as_ref().context("the lab's own program was not built")?;
        let inner = inner();
        let link = "limit0";
        let start = |end: usize| {
            let far = 1 - end;
            let log = lab.directory().join(format!("{}.log", names[end]));
            let to = SocketAddr::new(hosts[far].addresses()[0], PORT);
            let mut daemon = Program::new(lab_program)
                .args(["limit", "--link", link, "--port", &PORT.to_string()])
                .args(["--to", &to.to_string()])
                .args(null.then_some("--null"))
                .start(hosts[end].namespace(), names[end], &log)?;
            wait_for("link of the bare limit", LINK_LIMIT, || {
                daemon.check()?;
                hosts[end].namespace().run(|| Ok(Rtnetlink::open()?.link(link)?.map(drop)))
            })?;
            configure(hosts[end].namespace(), link, inner[end], inner[far])?;
            anyhow::Ok(daemon)
        };
        let ends = [start(0)?, start(1)?];
        let daemons = ends.iter().map(Daemon::pid).collect();
        let links = [link.to_owned(), link.to_owned()];
        Self { hosts, inner, links, daemons, running: Running::Limit(ends) }.ready()
    }

    /// Builds two hosts whose traffic takes the cable itself, without a tunnel.
    pub(super) fn raw(lab: &mut Lab) -> anyhow::Result<Self> {
        let hosts = lab.pair(["raw-1", "raw-2"], Outer::V4.net())?;
        let inner = inner();
        for (end, host) in hosts.iter().enumerate() {
            host.namespace().run(|| {
                let mut netlink = Rtnetlink::open()?;
                let index = netlink.link_index(CABLE)?;
                address(&mut netlink, index, inner[end], inner[1 - end])
            })?;
        }
        let links = [CABLE.to_owned(), CABLE.to_owned()];
        Self { hosts, inner, links, daemons: Vec::new(), running: Running::Nothing }.ready()
    }

    /// Waits until both inner address families work.
    fn ready(self) -> anyhow::Result<Self> {
        for address in self.inner[1] {
            let deadline = std::time::Instant::now() + LINK_LIMIT;
            let [here, _] = self.namespaces();
            first_reply(here, address, &self.links[0], deadline)?
                .with_context(|| format!("{address} does not reply through the tunnel"))?;
        }
        Ok(self)
    }

    /// Returns the number of batches that helpers of both agents encrypted. 0 for another program.
    pub(super) fn sealed_ahead(&self) -> anyhow::Result<u64> {
        let Running::Towline(nodes, _) = &self.running else { return Ok(0) };
        nodes.iter().map(|node| anyhow::Ok(node.status()?.wireguard_sealed_ahead)).sum()
    }

    pub(super) fn namespaces(&self) -> [&Namespace; 2] {
        [self.hosts[0].namespace(), self.hosts[1].namespace()]
    }

    /// Returns the direction from the first end to the second, inside the tunnel.
    pub(super) fn there(&self, v6: bool) -> Way<'_> {
        let [from, to] = self.namespaces();
        Way { from, to, address: self.inner[1][usize::from(v6)] }
    }

    /// Returns the direction from the second end to the first, inside the tunnel.
    pub(super) fn back(&self, v6: bool) -> Way<'_> {
        let [to, from] = self.namespaces();
        Way { from, to, address: self.inner[0][usize::from(v6)] }
    }

    /// Returns the direction from the first end to the second through a kernel tunnel inside this
    /// tunnel. Creates the kernel tunnel on the first call.
    pub(super) fn overlay(&self, kind: OverlayKind) -> anyhow::Result<Way<'_>> {
        let (number, port) = match kind {
            OverlayKind::Vxlan => (0, 4789),
            OverlayKind::Geneve => (1, 6081),
        };
        let link = format!("{OVERLAY_LINK}{number}");
        let address = |end: usize| IpAddr::from([10, 66, number, 1 + end as u8]);
        for end in 0..2 {
            self.namespaces()[end].run(|| {
                let mut netlink = Rtnetlink::open()?;
                if netlink.link(&link)?.is_some() {
                    return Ok(());
                }
                let remote = self.inner[1 - end][0];
                netlink.add_overlay(&link, Overlay { kind, id: 42, remote, port })?;
                let index = netlink.link_index(&link)?;
                netlink.set_mtu(index, OVERLAY_MTU)?;
                let net = IpNet::new_assert(address(end), 24);
                netlink.add_address(index, net, AddressOptions::default())?;
                Ok(netlink.set_up(index, true)?)
            })?;
        }
        let [from, to] = self.namespaces();
        let deadline = std::time::Instant::now() + LINK_LIMIT;
        first_reply(from, address(1), &link, deadline)?
            .context("no echo reply through the overlay")?;
        Ok(Way { from, to, address: address(1) })
    }

    /// Runs `job` while the cable loses this many of 1,000 datagrams in each direction.
    pub(super) fn losing<T>(
        &self,
        permille: u32,
        job: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let wire = |segments: u32, lossy: bool| {
            self.namespaces().into_iter().try_for_each(|namespace| {
                namespace.run(|| {
                    // A rule would drop a whole batch of segments, so every datagram is sent
                    // separately.
                    let mut netlink = Rtnetlink::open()?;
                    let index = netlink.link_index(CABLE)?;
                    netlink.set_gso_max_segs(index, segments)?;
                    let mut nft = Nft::open()?;
                    if lossy {
                        let rule = Rule::new().input(CABLE).chance(permille, 1000).drop();
                        let chain = Chain::base(ChainKind::Filter, Hook::Prerouting, -400);
                        nft.load(
                            &Table::new(TableFamily::Inet, LOSS_TABLE)
                                .chain("loss", chain.rule(rule)),
                        )?;
                    } else {
                        nft.delete(TableFamily::Inet, LOSS_TABLE)?;
                    }
                    Ok(())
                })
            })
        };
        wire(1, true)?;
        let done = job();
        wire(65_535, false)?;
        done
    }
}

/// Returns the configuration of peers that never connect, each with its own address.
fn silent_peers(count: u32) -> String {
    (1..=count).fold(String::new(), |mut text, number| {
        let mut key = [0x99; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 99, 0, 0).to_bits() + number);
        let key = data_encoding::BASE64.encode(&key);
        let _ =
            writeln!(text, "[[peer]]\npublic_key = \"{key}\"\nallowed_ips = [\"{address}/32\"]");
        text
    })
}

/// Returns inner addresses for implementations without a controller.
fn inner() -> [[IpAddr; 2]; 2] {
    [1, 2].map(|number| {
        [IpAddr::from([10, 88, 0, number]), IpAddr::from([0xfd88, 0, 0, 0, 0, 0, 0, number.into()])]
    })
}

/// Sets the MTU, addresses and routes of a tunnel, as another program would in production.
fn configure(
    namespace: &Namespace,
    link: &str,
    own: [IpAddr; 2],
    far: [IpAddr; 2],
) -> anyhow::Result<()> {
    namespace.run(|| {
        let mut netlink = Rtnetlink::open()?;
        let index = netlink.link_index(link)?;
        netlink.set_mtu(index, MTU)?;
        netlink.set_up(index, true)?;
        address(&mut netlink, index, own, far)
    })
}

/// Adds the inner addresses of an end to a link, and routes to those of the other end.
fn address(
    netlink: &mut Rtnetlink,
    index: u32,
    own: [IpAddr; 2],
    far: [IpAddr; 2],
) -> anyhow::Result<()> {
    for (own, far) in own.into_iter().zip(far) {
        let options = AddressOptions { no_dad: true, ..Default::default() };
        netlink.add_address(index, own.into(), options)?;
        netlink.add_route(&towline_netlink::Route::new(far.into()).dev(index))?;
    }
    Ok(())
}
