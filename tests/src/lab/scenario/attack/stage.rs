//! Hosts, agents and listeners that the cases attack.
//!
//! ```text
//!              internet (203.0.113.0/24, 2001:db8::/64, also 169.254.169.254)
//!    ┌──────────────┬──────────────┬──────────────┬──────────────┐
//!   cp (relay)      a              b             evil          router
//!                   ├─ cni0    pod 10.9.1.2, announced           │ 192.168.77.0/24
//!                   ├─ docker0 container 10.66.0.2, unannounced  ├─ desk, also 192.168.88.5
//!                   └─ eth1 ─────────────────────────────────────┘
//! ```
//!
//! `a` is the victim. It announces its pods and 192.168.88.0/24, which it reaches through `desk`.
//! `a` and `b` cannot exchange UDP datagrams directly, so `cp` relays between them. `evil` is a
//! member of the mesh whose agent was killed. It relays once an operator grants it the role
//! ([`Stage::relay_by_evil`]).

use std::fs::{Permissions, set_permissions};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use towline_core::peer_table::{PeerEntry, PeerTable};
use towline_dataplane::Probes;
use towline_netlink::{AddressOptions, Route, Rtnetlink};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily};
use towline_proto::frame::ProbeVersion;
use towline_proto::id::WireguardKey;
use x25519_dalek::PublicKey;

use super::{Setting, Unavailable};
use crate::lab::actor::Actor;
use crate::lab::capture::Tap;
use crate::lab::interference::Interference;
use crate::lab::interrupt::{wait_for, wait_up_to};
use crate::lab::listener::{Listener, Tag};
use crate::lab::mesh::{Controller, Node, START_LIMIT, require_tunnel};
use crate::lab::namespace::Namespace;
use crate::lab::ping::echoes;
use crate::lab::privilege::Rank;
use crate::lab::raw_tunnel::{RawTunnel, private_key};
use crate::lab::spoof::{self, Spoofer};
use crate::lab::tamper::{LINK, Tampering};
use crate::lab::topology::{Host, Lab, Router};
use crate::lab::traffic::Pattern;

/// UDP port of all listeners.
pub(super) const PORT: u16 = 4_444;
/// TCP port that `a` serves in clear and through the tunnel (`plain_ports`).
pub(super) const PLAIN_PORT: u16 = 6_443;
/// UDP port of the agents.
pub(super) const WIREGUARD: u16 = 51_830;
/// Limit for the arrival of a packet that is not dropped, on a slow machine.
pub(super) const ARRIVAL: Duration = Duration::from_secs(20);
/// Time to wait for an answer that must not come.
pub(super) const SILENCE: Duration = Duration::from_secs(3);
/// Limit for a packet that takes a longer way than the packet that was sent after it.
pub(super) const DETOUR: Duration = Duration::from_millis(250);
/// Limit for the address space of an agent, in bytes: an attack must not use up the memory of this
/// machine.
const MEMORY: u64 = 2 << 30;
/// Number of times that each packet of an attempt is sent. A single packet may be lost in a queue,
/// which proves nothing.
pub(super) const TIMES: usize = 5;

/// Announced networks of the pods of `a`.
const POD: (Ipv4Net, Ipv6Net) = (
    Ipv4Net::new_assert(Ipv4Addr::new(10, 9, 1, 0), 24),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd09, 1, 0, 0, 0, 0, 0, 0), 64),
);
/// Networks of the containers of `a`, which it does not announce.
const CONTAINER: (Ipv4Net, Ipv6Net) = (
    Ipv4Net::new_assert(Ipv4Addr::new(10, 66, 0, 0), 24),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 0), 64),
);
/// Address of `desk` in the announced LAN behind it.
pub(super) const DESK_ANNOUNCED: Ipv4Addr = Ipv4Addr::new(192, 168, 88, 5);
/// Address of `desk` that `a` has a route to but does not announce.
pub(super) const DESK_ELSEWHERE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);
/// IPv6 counterpart of [`DESK_ELSEWHERE`], a unique local address.
pub(super) const DESK_FOREIGN: Ipv6Addr = Ipv6Addr::new(0xfdee, 0, 0, 0, 0, 0, 0, 5);
/// Address of a cloud's metadata service.
pub(super) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Address of the TUN link of `a` that only the configuration of `a` contains.
pub(super) const CONFIGURED: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
/// Multicast groups that `a` joins on its TUN link.
pub(super) const GROUP_V4: Ipv4Addr = Ipv4Addr::new(239, 1, 1, 1);
pub(super) const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 1, 3);

/// State of the agent of `a` and of its guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    /// The agent runs.
    Running,
    /// The agent was killed.
    Killed,
    /// The agent exited on SIGTERM.
    Stopped,
    /// The agent was killed, and then the nftables table was deleted.
    NoTable,
    /// The agent was killed, and then policy rules and routes were flushed.
    NoRoutes,
}

impl Condition {
    pub(super) const ALL: [Self; 4] = [Self::Running, Self::Killed, Self::NoTable, Self::NoRoutes];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Killed => "killed",
            Self::Stopped => "stopped",
            Self::NoTable => "no-table",
            Self::NoRoutes => "no-routes",
        }
    }
}

/// Host that has a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    A,
    B,
    Cp,
    Pod,
    Container,
    Desk,
    Internet,
}

/// Hosts, agents and listeners of one run.
pub(super) struct Stage<'s> {
    setting: &'s Setting,
    pub(super) tag: Tag,
    next: u64,
    condition: Condition,
    listeners: Vec<(Place, Listener)>,
    pub(super) mesh: Option<Mesh>,
    pub(super) hosts: Hosts,
    lab: Lab,
}

/// Hosts of the diagram above.
pub(super) struct Hosts {
    pub(super) pod: Host,
    pub(super) container: Host,
    pub(super) desk: Arc<Host>,
    pub(super) cp: Arc<Host>,
    pub(super) a: Arc<Host>,
    pub(super) b: Arc<Host>,
    pub(super) evil: Arc<Host>,
    /// Treatment of what `evil` sends.
    interference: Arc<Interference>,
    _router: Router,
}

/// Programs that run on the hosts.
pub(super) struct Mesh {
    pub(super) cp: Node,
    pub(super) a: Node,
    pub(super) b: Node,
    /// Node that joined and published its record, and whose agent was then killed.
    evil: Node,
    /// Mesh addresses of the nodes.
    pub(super) overlay: Overlay,
    controller: Controller,
}

/// Mesh addresses of each node, IPv4 before IPv6.
#[derive(Debug, Clone, Copy)]
pub(super) struct Overlay {
    pub(super) cp: [IpAddr; 2],
    pub(super) a: [IpAddr; 2],
    pub(super) b: [IpAddr; 2],
    pub(super) evil: [IpAddr; 2],
}

impl<'s> Stage<'s> {
    /// Builds the hosts. No program runs on them yet.
    pub(super) fn build(setting: &'s Setting) -> anyhow::Result<Self> {
        setting.output.step("building the hosts");
        let mut lab = Lab::new(setting.rank)?;
        let hosts = Hosts::build(&mut lab).context("cannot build the hosts")?;
        // The permissions of the agent must stop a local user, not those of the lab's directory.
        set_permissions(lab.directory(), Permissions::from_mode(0o755))?;
        let tag = Tag::random()?;
        let (condition, listeners) = (Condition::Running, Vec::new());
        Ok(Self { setting, tag, next: 0, condition, listeners, mesh: None, hosts, lab })
    }

    /// Joins and starts all nodes, waits for their tunnels, and opens the listeners.
    pub(super) fn begin(&mut self) -> anyhow::Result<()> {
        self.setting.output.step("starting the mesh");
        self.mesh = Some(Mesh::start(self.setting, &self.lab, &self.hosts)?);
        let link = self.hosts.a.namespace().run(|| Ok(Rtnetlink::open()?.link_index(LINK)?))?;
        // The internet gets a route to `evil` through `a`, so that it can answer packets that `a`
        // forwards for `evil`. Masquerading on `a` would have the same effect.
        let answer = route(self.overlay()?.evil[0], self.hosts.a.addresses()[0]);
        self.internet().run(|| Ok(Rtnetlink::open()?.add_route(&answer)?))?;
        let none: (&[Ipv4Addr], &[Ipv6Addr]) = (&[], &[]);
        let groups: (&[Ipv4Addr], &[Ipv6Addr]) = (&[GROUP_V4], &[GROUP_V6]);
        for place in [
            Place::A,
            Place::B,
            Place::Cp,
            Place::Pod,
            Place::Container,
            Place::Desk,
            Place::Internet,
        ] {
            let joined = if place == Place::A { groups } else { none };
            let listener = Listener::open(self.namespace(place), PORT, self.tag, joined, link)?;
            self.listeners.push((place, listener));
        }
        self.setting.output.step("attacking");
        Ok(())
    }

    /// Returns an error of type [`Unavailable`] if the lab cannot act with the rights of this
    /// actor.
    pub(super) fn require(&self, actor: Actor) -> anyhow::Result<()> {
        if actor != Actor::Root && self.setting.rank == Rank::Rootless {
            let why = "a user namespace has no other user: run as root";
            return Err(Unavailable(why.to_owned()).into());
        }
        Ok(())
    }

    /// Returns the programs, or an error before [`Self::begin`].
    pub(super) fn mesh(&mut self) -> anyhow::Result<&mut Mesh> {
        self.mesh.as_mut().context("the mesh is not up")
    }

    /// Returns the mesh addresses, or an error before [`Self::begin`].
    pub(super) fn overlay(&self) -> anyhow::Result<Overlay> {
        Ok(self.mesh.as_ref().context("the mesh is not up")?.overlay)
    }

    /// Returns the namespace of the simulated internet.
    pub(super) fn internet(&self) -> &Namespace {
        self.lab.internet()
    }

    /// Returns the network namespace of a host.
    pub(super) fn namespace(&self, place: Place) -> &Namespace {
        let hosts = &self.hosts;
        match place {
            Place::A => hosts.a.namespace(),
            Place::B => hosts.b.namespace(),
            Place::Cp => hosts.cp.namespace(),
            Place::Pod => hosts.pod.namespace(),
            Place::Container => hosts.container.namespace(),
            Place::Desk => hosts.desk.namespace(),
            Place::Internet => self.lab.internet(),
        }
    }

    /// Returns the number of the next datagram.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Returns the listener on a host.
    pub(super) fn listener(&mut self, place: Place) -> anyhow::Result<&mut Listener> {
        let found = self.listeners.iter_mut().find(|(at, _)| *at == place);
        found.map(|(_, listener)| listener).context("this host has no listener")
    }

    /// Returns a sender that acts as a neighbour on the first uplink of `a`.
    pub(super) fn neighbour(&self) -> anyhow::Result<Spoofer> {
        Spoofer::new(self.internet(), "a", self.hosts.a.namespace(), "eth0")
    }

    /// Opens a capture of everything that `a` sends on its first uplink.
    pub(super) fn tap(&self) -> anyhow::Result<Tap> {
        Tap::open(self.internet(), "a")
    }

    /// Establishes a WireGuard session of `evil` with `a`.
    pub(super) fn raw_tunnel(&self) -> anyhow::Result<RawTunnel> {
        let mesh = self.mesh.as_ref().context("the mesh is not up")?;
        let own = private_key(&mesh.evil.state().join("wireguard.key"))?;
        let theirs = PublicKey::from(&private_key(&mesh.a.state().join("wireguard.key"))?);
        let to = SocketAddr::new(self.hosts.a.addresses()[0], WIREGUARD);
        RawTunnel::connect(self.hosts.evil.namespace(), own, &theirs, to)
    }

    /// Returns the keys of `evil` for probes to `cp`, in this version, and the key of `cp`.
    pub(super) fn member_probes(
        &self,
        version: ProbeVersion,
    ) -> anyhow::Result<(Probes, WireguardKey)> {
        let mesh = self.mesh.as_ref().context("the mesh is not up")?;
        let own = private_key(&mesh.evil.state().join("wireguard.key"))?;
        let theirs = PublicKey::from(&private_key(&mesh.cp.state().join("wireguard.key"))?);
        let cp = WireguardKey(theirs.to_bytes());
        // An epoch that no other call used: the relay then asks for a proof.
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
        let probes = Probes::new(own, u64::try_from(epoch)?);
        let entry = PeerEntry { probe_version: version, ..PeerEntry::default() };
        probes.apply(&PeerTable { peers: [(cp, entry)].into(), ..PeerTable::default() });
        Ok((probes, cp))
    }

    /// Sends a datagram of `a` in clear to the internet, and returns its payload. Once the payload
    /// is seen on the uplink, everything that `a` sent before it was seen too.
    pub(super) fn finish_in_clear(
        &mut self,
    ) -> anyhow::Result<[u8; crate::lab::listener::PAYLOAD]> {
        /// UDP port of the discard service (RFC 863).
        const DISCARD: u16 = 9;
        let number = self.number();
        // The payload must not contain the tag, which would count as traffic in clear.
        let payload = self.tag.payload(number).map(|byte| !byte);
        let cloud = self.hosts.cp.addresses()[0];
        self.hosts.a.namespace().run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.send_to(&payload, (cloud, DISCARD))?;
            Ok(())
        })?;
        Ok(payload)
    }

    /// Brings the agent of `a` and its guards into a condition.
    pub(super) fn be(&mut self, condition: Condition) -> anyhow::Result<()> {
        if self.condition == condition {
            return Ok(());
        }
        let is_next = self.condition == Condition::Killed
            && matches!(condition, Condition::NoTable | Condition::NoRoutes);
        if self.condition != Condition::Running && !is_next {
            self.start_a()?;
        }
        if condition == Condition::Running {
            return Ok(());
        }
        if condition == Condition::Stopped {
            let agent = self.mesh()?.a.take_agent().context("no agent runs on a")?;
            self.condition = condition;
            agent.stop()?;
        } else if self.condition == Condition::Running {
            self.mesh()?.a.agent()?.kill()?;
        }
        // Set before the next step: the agent is gone even if that step fails.
        self.condition = condition;
        let tamperings: &[Tampering] = match condition {
            Condition::Running | Condition::Killed | Condition::Stopped => &[],
            Condition::NoTable => &[Tampering::FlushRuleset],
            Condition::NoRoutes => &[Tampering::FlushRules, Tampering::FlushRoutes],
        };
        self.hosts
            .a
            .namespace()
            .run(|| tamperings.iter().try_for_each(|tampering| tampering.apply()))
    }

    /// Starts the agent of `a` and waits for its tunnels.
    fn start_a(&mut self) -> anyhow::Result<()> {
        let mesh = self.mesh()?;
        launch(&mut mesh.a)?;
        for other in [&mesh.cp, &mesh.b] {
            require_tunnel(&mesh.a, other, START_LIMIT)?;
        }
        self.condition = Condition::Running;
        Ok(())
    }

    /// Starts the agents that should run but do not, after an attempt failed halfway.
    pub(super) fn recover(&mut self) -> anyhow::Result<()> {
        let mesh = self.mesh()?;
        for node in [&mut mesh.cp, &mut mesh.b] {
            if node.agent().and_then(|agent| agent.check()).is_err() {
                launch(node)?;
            }
        }
        let is_running = self.mesh()?.a.agent().and_then(|agent| agent.check()).is_ok();
        if self.condition == Condition::Running && !is_running {
            self.start_a()?;
        }
        Ok(())
    }

    /// Starts the agent of `b`, which was killed, and waits for its tunnels.
    pub(super) fn restart_b(&mut self) -> anyhow::Result<()> {
        let mesh = self.mesh()?;
        launch(&mut mesh.b)?;
        for other in [&mesh.cp, &mesh.a] {
            require_tunnel(&mesh.b, other, START_LIMIT)?;
        }
        Ok(())
    }

    /// Kills the agent of `cp`, starts it again, and waits for the tunnels.
    pub(super) fn restart_cp(&mut self) -> anyhow::Result<()> {
        let mesh = self.mesh()?;
        if let Some(mut agent) = mesh.cp.take_agent() {
            agent.kill()?;
        }
        launch(&mut mesh.cp)?;
        for other in [&mesh.a, &mesh.b] {
            require_tunnel(other, &mesh.cp, START_LIMIT)?;
        }
        require_tunnel(&mesh.a, &mesh.b, START_LIMIT)
    }

    /// Returns the treatment of what `evil` sends.
    pub(super) fn interference(&self) -> &Interference {
        &self.hosts.interference
    }

    /// Has `evil` be the only relay, and waits until it carries the traffic between `a` and `b`.
    pub(super) fn relay_by_evil(&mut self) -> anyhow::Result<()> {
        let mesh = self.mesh()?;
        if mesh.evil.agent().and_then(|agent| agent.check()).is_err() {
            mesh.controller.operator().command_ok(&["node", "set", "evil", "--relay"])?;
            launch(&mut mesh.evil)?;
            require_tunnel(&mesh.a, &mesh.evil, START_LIMIT)?;
        }
        if let Some(mut agent) = mesh.cp.take_agent() {
            agent.kill()?;
        }
        wait_for("path from a to b through evil", START_LIMIT, || {
            let peer = mesh.a.peer("b")?.filter(|peer| peer.is_up());
            Ok(peer.filter(|peer| peer.relay.as_deref() == Some("evil")).map(drop))
        })
    }

    /// Returns whether `a` gets echo replies from `cp` and, through the relay on `cp`, from `b`.
    pub(super) fn relay_works(&self) -> anyhow::Result<bool> {
        Ok(self.reaches(self.overlay()?.cp[0])? && self.reaches_b()?)
    }

    /// Returns whether `a` gets echo replies from `b`, through a relay.
    pub(super) fn reaches_b(&self) -> anyhow::Result<bool> {
        self.reaches(self.overlay()?.b[0])
    }

    fn reaches(&self, target: IpAddr) -> anyhow::Result<bool> {
        let pattern = Pattern::random()?;
        let came = wait_up_to(ARRIVAL, || {
            let limit = Duration::from_millis(500);
            let echoes = echoes(self.hosts.a.namespace(), target, 1, limit, pattern)?;
            Ok((echoes.received > 0).then_some(()))
        })?;
        Ok(came.is_some())
    }

    /// Sends a datagram with a new number through the tunnel from `a` to `b`, and waits until it
    /// arrives. Everything that entered the TUN link of `a` before it was sent before it.
    pub(super) fn finish_through_tunnel(&mut self, v6: bool) -> anyhow::Result<()> {
        let (number, to) = (self.number(), self.overlay()?.b[usize::from(v6)]);
        let payload = self.tag.payload(number);
        self.hosts.a.namespace().run(|| {
            let any: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { [0; 4].into() };
            Ok(UdpSocket::bind((any, 0))?.send_to(&payload, (to, PORT))?)
        })?;
        anyhow::ensure!(
            self.listener(Place::B)?.receives(number, ARRIVAL)?,
            "no datagram passes through the tunnel from a to b"
        );
        Ok(())
    }

    /// Returns the next datagram as an IP packet, with its number.
    pub(super) fn packet(&mut self, from: IpAddr, to: IpAddr) -> anyhow::Result<(u64, Vec<u8>)> {
        let number = self.number();
        let packet = spoof::udp((from, PORT).into(), (to, PORT).into(), &self.tag.payload(number))?;
        Ok((number, packet))
    }
}

impl Hosts {
    /// Builds the hosts, their addresses and routes, and the filter between `a` and `b`.
    fn build(lab: &mut Lab) -> anyhow::Result<Self> {
        let cp = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.build()?;
        let b = lab.host("b").public("203.0.113.12", "2001:db8::12")?.build()?;
        let interference = Arc::<Interference>::default();
        lab.interfere(Some(interference.clone()));
        let evil = lab.host("evil").public("203.0.113.66", "2001:db8::66")?.build()?;
        lab.interfere(None);
        let router = lab
            .router("router")
            .public("203.0.113.20", "2001:db8::20")?
            .lan("192.168.77.0/24", "2001:db8:77::/64")?
            .build()?;
        let a = lab.host("a").public("203.0.113.11", "2001:db8::11")?.behind(&router).build()?;
        let desk = lab.host("desk").behind(&router).build()?;
        let pod = a.pod("pod", POD.0, POD.1)?;
        let container = a.container("container", CONTAINER.0, CONTAINER.1)?;
        // The metadata service is on the internet's loopback link, the networks behind the desk on
        // its own.
        let add = |namespace: &Namespace, address: IpAddr| {
            namespace.run(|| {
                let mut netlink = Rtnetlink::open()?;
                let loopback = netlink.link_index("lo")?;
                let options = AddressOptions { no_dad: true, ..Default::default() };
                Ok(netlink.add_address(loopback, address.into(), options)?)
            })
        };
        add(lab.internet(), METADATA.into())?;
        let desk_lan = [desk.addresses()[0], desk.addresses()[1]];
        let a_lan = [a.addresses()[2], a.addresses()[3]];
        for address in [DESK_ANNOUNCED.into(), DESK_ELSEWHERE.into(), IpAddr::V6(DESK_FOREIGN)] {
            add(desk.namespace(), address)?;
            let via = desk_lan[usize::from(address.is_ipv6())];
            a.namespace().run(|| Ok(Rtnetlink::open()?.add_route(&route(address, via))?))?;
        }
        // The desk reaches the mesh through `a`.
        desk.namespace().run(|| {
            let mesh: IpNet = "198.19.0.0/16".parse()?;
            Ok(Rtnetlink::open()?.add_route(&Route::new(mesh).via(a_lan[0]))?)
        })?;
        for (setting, value) in [
            ("net.ipv4.conf.all.rp_filter", "0"),
            ("net.ipv4.conf.eth0.rp_filter", "0"),
            ("net.ipv4.conf.eth1.rp_filter", "0"),
            // Some CNI plugins set this. Packets to 127.0.0.0/8 are then no longer dropped by the
            // kernel.
            ("net.ipv4.conf.all.route_localnet", "1"),
        ] {
            a.namespace().sysctl(setting, value)?;
        }
        // Block the direct path between `a` and `b`.
        b.namespace().run(|| {
            let udp = || Rule::new().protocol(libc::IPPROTO_UDP as u8);
            let nets: Vec<IpNet> = a
                .addresses()
                .iter()
                .map(|address| IpNet::from(*address))
                .chain([IpNet::from(desk_lan[1]), "192.168.77.0/24".parse()?])
                .collect();
            let enter = Chain::base(ChainKind::Filter, Hook::Prerouting, -400)
                .rules(nets.iter().map(|net| udp().source(*net).drop()));
            let leave = Chain::base(ChainKind::Filter, Hook::Postrouting, 400)
                .rules(nets.iter().map(|net| udp().destination(*net).drop()));
            let wall = Table::new(TableFamily::Inet, "wall");
            Ok(Nft::open()?.load(&wall.chain("enter", enter).chain("leave", leave))?)
        })?;
        Ok(Self { pod, container, desk, cp, a, b, evil, interference, _router: router })
    }
}

/// Returns a route to an address through a gateway.
fn route(to: IpAddr, via: IpAddr) -> Route {
    Route::new(to.into()).via(via)
}

impl Mesh {
    /// Starts the controller, joins and starts all nodes, and kills the agent of `evil` in the end.
    fn start(setting: &Setting, lab: &Lab, hosts: &Hosts) -> anyhow::Result<Self> {
        let binaries = &setting.binaries;
        let controller = Controller::start(lab, &hosts.cp, binaries)?;
        let announced = ["10.9.1.0/24", "fd09:1::/64", "192.168.88.0/24"];
        let of_a = format!(
            "[node]\nprefixes = {announced:?}\naddresses = [\"{CONFIGURED}\"]\n\
             [routing]\nplain_ports = [{PLAIN_PORT}]\n"
        );
        let of_cp = "[node]\nadvertise = [\"203.0.113.10:51830\"]\n[relay]\nenabled = true\n";
        let join = |host: &Arc<Host>, more: &str, granted: &[&str]| {
            let node = Node::new(lab, host, host.name(), binaries, more)?;
            set_permissions(
                node.config().parent().context("the configuration file has no directory")?,
                Permissions::from_mode(0o755),
            )?;
            let flags = granted.iter().flat_map(|prefix| ["--prefix", prefix]);
            let role = (host.name() == "cp").then_some("--relay");
            let flags: Vec<&str> = ["--site", "lab"].into_iter().chain(flags).chain(role).collect();
            node.join(&controller.operator().token_with(&flags)?)?;
            anyhow::Ok(node)
        };
        let mut cp = join(&hosts.cp, of_cp, &[])?;
        let mut a = join(&hosts.a, &of_a, &announced)?;
        let mut b = join(&hosts.b, "[wireguard]\nworkers = 2\n", &[])?;
        // It is enabled, but not granted.
        let mut evil = join(&hosts.evil, "[relay]\nenabled = true\n", &[])?;
        for node in [&mut cp, &mut a, &mut b, &mut evil] {
            launch(node)?;
        }
        for (here, there) in [(&a, &cp), (&b, &cp), (&a, &b), (&a, &evil)] {
            require_tunnel(here, there, START_LIMIT)?;
        }
        // From now on the cases act as this node.
        evil.agent()?.kill()?;
        let nodes = controller.operator().nodes()?;
        let overlay = |name: &str| {
            let node = nodes.iter().find(|node| node.name == name);
            let of = |v4: bool| {
                let mut addresses = node?.overlay_addresses.iter();
                addresses.find(|address| address.is_ipv4() == v4).copied()
            };
            let both = of(true).zip(of(false));
            both.map(|(v4, v6)| [v4, v6]).with_context(|| format!("{name} has no mesh addresses"))
        };
        let overlay = Overlay {
            cp: overlay("cp")?,
            a: overlay("a")?,
            b: overlay("b")?,
            evil: overlay("evil")?,
        };
        Ok(Self { cp, a, b, evil, overlay, controller })
    }

    /// Returns the controller that manages the mesh.
    pub(super) fn controller(&self) -> &Controller {
        &self.controller
    }
}

/// Starts an agent with a memory limit, and waits until it answers.
fn launch(node: &mut Node) -> anyhow::Result<()> {
    node.launch()?;
    let limit = libc::rlimit { rlim_cur: MEMORY, rlim_max: MEMORY };
    let pid = node.agent()?.pid().as_raw();
    // SAFETY: the pointer is to one rlimit, which prlimit only reads.
    let done =
        unsafe { libc::prlimit(pid, libc::RLIMIT_AS, &raw const limit, std::ptr::null_mut()) };
    if done == -1 {
        return Err(std::io::Error::last_os_error()).context("cannot limit an agent's memory");
    }
    node.await_status(START_LIMIT).map(drop)
}
