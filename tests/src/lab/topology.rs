//! Hosts, routers, links and addresses: a builder for the network of a scenario.
//!
//! ```no_run
//! # use towline_tests::lab::{nat::Nat, privilege::Rank, topology::Lab};
//! # fn picture(rank: Rank) -> anyhow::Result<()> {
//! let mut lab = Lab::new(rank)?;
//! let cp = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.build()?;
//! let router = lab
//!     .router("router-a")
//!     .public("203.0.113.11", "2001:db8::11")?
//!     .lan("192.168.1.0/24", "2001:db8:1::/64")?
//!     .nat(Nat::Masquerade)
//!     .build()?;
//! let worker = lab.host("worker-a").behind(&router).build()?;
//! # Ok(()) }
//! ```
//!
//! The internet is a bridge in its own namespace, [`Lab::internet`]. It is also the next hop of
//! every host with a public address, and has routes to the IPv6 networks behind the routers. IPv4
//! networks behind routers are private: two routers may use the same.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tempfile::TempDir;
use towline_netlink::{AddressOptions, Family, Route, Rtnetlink, VethPeer};

use super::interference::Interference;
use super::namespace::Namespace;
use super::nat::{self, Nat};
use super::ping::first_reply;
use super::privilege::Rank;
use super::wire::{Cable, Weather};

/// The network that was built. Dropping it removes everything.
#[derive(Debug)]
pub struct Lab {
    rank: Rank,
    weather: Weather,
    /// Treatment of what hosts that are created from now on send on their uplinks.
    interference: Option<Arc<Interference>>,
    /// Simulated links; dropped before the namespaces that they connect.
    cables: Vec<Cable>,
    internet: Namespace,
    /// Logs and state of the processes in the hosts; dropped last.
    directory: TempDir,
}

/// A machine: a namespace with links.
#[derive(Debug)]
pub struct Host {
    namespace: Namespace,
    addresses: Vec<IpAddr>,
}

/// A host that forwards between the internet and its own LAN.
#[derive(Debug)]
pub struct Router {
    host: Arc<Host>,
    lan: (Ipv4Net, Ipv6Net),
    /// Number of the next free host address in the LAN.
    next: AtomicU8,
}

/// Network of the example above: a cloud host, and a worker behind a NAT router. Fields are dropped in this order.
#[derive(Debug)]
pub struct CloudAndWorker {
    /// Host with a public address.
    pub cp: Arc<Host>,
    /// Host behind the router.
    pub worker: Arc<Host>,
    /// Router of the worker.
    pub router: Router,
    /// The lab that they are in.
    pub lab: Lab,
}

impl CloudAndWorker {
    /// Builds the network.
    pub fn build(rank: Rank) -> anyhow::Result<Self> {
        let mut lab = Lab::new(rank)?;
        let cp = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.build()?;
        let router = lab
            .router("router-a")
            .public_number(11)?
            .lan_number(1)?
            .nat(Nat::Masquerade)
            .build()?;
        let worker = lab.host("worker-a").behind(&router).build()?;
        Ok(Self { cp, worker, router, lab })
    }
}

/// Time limit for a new link to carry its first packet; one that takes longer is broken.
const LINK_LIMIT: Duration = Duration::from_secs(5);
const BRIDGE: &str = "net0";
const LAN: &str = "lan0";
/// Number of the first host in a LAN.
const FIRST_HOST: u8 = 10;
const INTERNET_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(203, 0, 113, 0), 24);
const INTERNET_V6: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 64);

impl Lab {
    /// Creates an internet without hosts.
    pub fn new(rank: Rank) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("towline-lab-")
            .tempdir()
            .context("cannot create the lab's directory")?;
        let internet = bare("internet")?;
        internet.run(|| {
            let mut netlink = Rtnetlink::open()?;
            add_bridge(&mut netlink, BRIDGE)?;
            let gateway = (first_v4(INTERNET_V4), first_v6(INTERNET_V6));
            address(&mut netlink, BRIDGE, IpNet::new(gateway.0.into(), INTERNET_V4.prefix_len())?)?;
            address(&mut netlink, BRIDGE, IpNet::new(gateway.1.into(), INTERNET_V6.prefix_len())?)
        })?;
        forward(&internet)?;
        let (weather, interference, cables) = (Weather::default(), None, Vec::new());
        Ok(Self { rank, weather, interference, cables, internet, directory })
    }

    /// Returns the lab's rights.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Sets the delay and loss of uplinks that are created from now on. By default they have
    /// neither.
    pub fn weather(&mut self, weather: Weather) {
        self.weather = weather;
    }

    /// Sets what treats the frames that hosts send to the internet, for uplinks that are created from
    /// now on. By default nothing does.
    pub fn interfere(&mut self, interference: Option<Arc<Interference>>) {
        self.interference = interference;
    }

    /// Returns the namespace with the internet's bridge, where captures run.
    pub fn internet(&self) -> &Namespace {
        &self.internet
    }

    /// Returns a directory for logs and state, which is removed with the lab.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts to define a host. Its name (at most 15 bytes) also names its ports on bridges.
    pub fn host<'a>(&'a mut self, name: &'a str) -> HostBuilder<'a> {
        HostBuilder { lab: self, name, uplinks: Vec::new(), only: None }
    }

    /// Creates two hosts that are joined by one link and nothing else: `eth0` of each, with numbers
    /// 1 and 2 of this network.
    pub fn pair(&mut self, names: [&str; 2], net: IpNet) -> anyhow::Result<[Arc<Host>; 2]> {
        let [left, right] = [bare(names[0])?, bare(names[1])?];
        left.run(|| {
            let far = VethPeer { name: "eth0", namespace: Some(right.file().as_fd()) };
            Ok(Rtnetlink::open()?.add_veth("eth0", far)?)
        })?;
        let own = [1, 2].map(|number| match net {
            IpNet::V4(v4) => in_net(nth_v4(v4, number), v4),
            IpNet::V6(v6) => in_net(nth_v6(v6, number), v6),
        });
        for (namespace, own) in [&left, &right].into_iter().zip(own) {
            namespace.run(|| address(&mut Rtnetlink::open()?, "eth0", own))?;
        }
        first_reply(&left, own[1].addr(), "eth0", Instant::now() + LINK_LIMIT)?
            .with_context(|| format!("{} cannot reach {}", names[0], names[1]))?;
        let host =
            |namespace, own: IpNet| Arc::new(Host { namespace, addresses: vec![own.addr()] });
        Ok([host(left, own[0]), host(right, own[1])])
    }

    /// Starts to define a router.
    pub fn router<'a>(&'a mut self, name: &'a str) -> RouterBuilder<'a> {
        RouterBuilder { lab: self, name, uplink: None, lan: None, nat: None }
    }
}

impl Host {
    /// Returns the host's name.
    pub fn name(&self) -> &str {
        self.namespace.name()
    }

    /// Returns the namespace in which the host's processes run.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Returns the host's own addresses (not the overlay's), by uplink, IPv4 before IPv6.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Creates a pod as a CNI plugin does: a separate host behind the bridge `cni0` of this host,
    /// which forwards. Number 1 of each network is the bridge, number 2 the pod. Each host can have
    /// one pod.
    pub fn pod(&self, name: &str, v4: Ipv4Net, v6: Ipv6Net) -> anyhow::Result<Host> {
        self.behind_bridge(name, ("cni0", "veth0"), v4, v6)
    }

    /// Creates a container of another runtime: as [`Self::pod`], behind the bridge `docker0`.
    pub fn container(&self, name: &str, v4: Ipv4Net, v6: Ipv6Net) -> anyhow::Result<Host> {
        self.behind_bridge(name, ("docker0", "veth1"), v4, v6)
    }

    fn behind_bridge(
        &self,
        name: &str,
        (bridge, port): (&str, &str),
        v4: Ipv4Net,
        v6: Ipv6Net,
    ) -> anyhow::Result<Host> {
        self.namespace.run(|| {
            let mut netlink = Rtnetlink::open()?;
            add_bridge(&mut netlink, bridge)?;
            address(&mut netlink, bridge, in_net(first_v4(v4), v4))?;
            address(&mut netlink, bridge, in_net(first_v6(v6), v6))
        })?;
        forward(&self.namespace)?;
        let namespace = bare(name)?;
        plug(&namespace, "eth0", (&self.namespace, bridge), port, Weather::default(), None)?;
        let own = [in_net(nth_v4(v4, 2), v4), in_net(nth_v6(v6, 2), v6)];
        let ways = [(own[0], first_v4(v4).into()), (own[1], first_v6(v6).into())];
        connect(&namespace, "eth0", &ways, 100)?;
        Ok(Host { namespace, addresses: own.map(|net| net.addr()).to_vec() })
    }
}

impl Router {
    /// Returns the router as a host.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Returns the router's IPv4 address in its LAN.
    pub fn gateway(&self) -> IpAddr {
        first_v4(self.lan.0).into()
    }
}

/// A builder for a host.
#[derive(Debug)]
#[must_use = "a host is created by `build`"]
pub struct HostBuilder<'a> {
    lab: &'a mut Lab,
    name: &'a str,
    uplinks: Vec<Uplink<'a>>,
    only: Option<Family>,
}

#[derive(Debug)]
enum Uplink<'a> {
    Internet(Ipv4Addr, Ipv6Addr),
    Lan(&'a Router),
}

impl Uplink<'_> {
    fn weather(&self, lab: &Lab) -> Weather {
        match self {
            Uplink::Internet(..) => lab.weather,
            Uplink::Lan(_) => Weather::default(),
        }
    }

    fn interference<'b>(&self, lab: &'b Lab) -> Option<&'b Arc<Interference>> {
        match self {
            Uplink::Internet(..) => lab.interference.as_ref(),
            Uplink::Lan(_) => None,
        }
    }

    /// Returns the bridge that the uplink connects to, the next free addresses there, and the
    /// gateways.
    fn ends<'b>(&'b self, lab: &'b Lab) -> (&'b Namespace, &'static str, [IpNet; 2], [IpAddr; 2]) {
        match self {
            Uplink::Internet(v4, v6) => (
                &lab.internet,
                BRIDGE,
                [in_net(*v4, INTERNET_V4), in_net(*v6, INTERNET_V6)],
                [first_v4(INTERNET_V4).into(), first_v6(INTERNET_V6).into()],
            ),
            Uplink::Lan(router) => {
                let (v4, v6) = router.lan;
                let number = router.next.fetch_add(1, Ordering::Relaxed);
                (
                    &router.host.namespace,
                    LAN,
                    [in_net(nth_v4(v4, number), v4), in_net(nth_v6(v6, number), v6)],
                    [first_v4(v4).into(), first_v6(v6).into()],
                )
            }
        }
    }
}

impl<'a> HostBuilder<'a> {
    /// Adds an uplink directly to the internet, with these addresses of 203.0.113.0/24 and
    /// 2001:db8::/64. Number 1 of each is taken.
    pub fn public(mut self, v4: &str, v6: &str) -> anyhow::Result<Self> {
        let (v4, v6) = public(v4, v6)?;
        self.uplinks.push(Uplink::Internet(v4, v6));
        Ok(self)
    }

    /// Adds an uplink to a router's LAN, with its next free addresses.
    pub fn behind(mut self, router: &'a Router) -> Self {
        self.uplinks.push(Uplink::Lan(router));
        self
    }

    /// Restricts the host to addresses of this family.
    pub fn only(mut self, family: Family) -> Self {
        self.only = Some(family);
        self
    }

    /// Builds the host. Its links are eth0, eth1, ... in the order of its uplinks; earlier uplinks
    /// are preferred.
    pub fn build(self) -> anyhow::Result<Arc<Host>> {
        let Self { lab, name, uplinks, only } = self;
        let namespace = bare(name)?;
        let (mut addresses, mut cables) = (Vec::new(), Vec::new());
        for (index, uplink) in uplinks.iter().enumerate() {
            let link = format!("eth{index}");
            let port = if index == 0 { name.to_owned() } else { format!("{name}-{index}") };
            let (switch, bridge, own, gateways) = uplink.ends(lab);
            let (weather, interference) = (uplink.weather(lab), uplink.interference(lab));
            let cable = plug(&namespace, &link, (switch, bridge), &port, weather, interference)?;
            cables.extend(cable);
            let ways: Vec<(IpNet, IpAddr)> = own
                .into_iter()
                .zip(gateways)
                .filter(|(own, _)| only.is_none_or(|only| only == Family::of(own.addr())))
                .collect();
            // The kernel treats an IPv6 metric of 0 as 1,024.
            connect(&namespace, &link, &ways, 100 + index as u32)?;
            addresses.extend(ways.iter().map(|(own, _)| own.addr()));
        }
        lab.cables.extend(cables);
        Ok(Arc::new(Host { namespace, addresses }))
    }
}

/// A builder for a router.
#[derive(Debug)]
#[must_use = "a router is created by `build`"]
pub struct RouterBuilder<'a> {
    lab: &'a mut Lab,
    name: &'a str,
    uplink: Option<Uplink<'a>>,
    lan: Option<(Ipv4Net, Ipv6Net)>,
    nat: Option<Nat>,
}

impl<'a> RouterBuilder<'a> {
    /// Sets the router's addresses on the internet.
    pub fn public(mut self, v4: &str, v6: &str) -> anyhow::Result<Self> {
        let (v4, v6) = public(v4, v6)?;
        self.uplink = Some(Uplink::Internet(v4, v6));
        Ok(self)
    }

    /// Sets the router's addresses on the internet to 203.0.113.N and 2001:db8::N.
    pub fn public_number(self, number: u8) -> anyhow::Result<Self> {
        self.public(&format!("203.0.113.{number}"), &format!("2001:db8::{number}"))
    }

    /// Places the router behind another router instead of on the internet.
    pub fn behind(mut self, router: &'a Router) -> Self {
        self.uplink = Some(Uplink::Lan(router));
        self
    }

    /// Sets the networks of the router's LAN; number 1 of each is the router's own.
    pub fn lan(mut self, v4: &str, v6: &str) -> anyhow::Result<Self> {
        let parse = || -> anyhow::Result<_> { Ok((v4.parse()?, v6.parse()?)) };
        self.lan =
            Some(parse().with_context(|| format!("{v4} and {v6} are not networks of a LAN"))?);
        Ok(self)
    }

    /// Sets the networks of the router's LAN to 192.168.N.0/24 and 2001:db8:N::/64.
    pub fn lan_number(self, number: u8) -> anyhow::Result<Self> {
        self.lan(&format!("192.168.{number}.0/24"), &format!("2001:db8:{number}::/64"))
    }

    /// Sets the router's NAT or firewall class; without one, the router only forwards.
    pub fn nat(mut self, nat: Nat) -> Self {
        self.nat = Some(nat);
        self
    }

    /// Builds the router.
    pub fn build(self) -> anyhow::Result<Router> {
        let Self { lab, name, uplink, lan, nat } = self;
        let missing = |what| anyhow!("router {name} has no {what}");
        let uplink = uplink.ok_or_else(|| missing("uplink"))?;
        let lan = lan.ok_or_else(|| missing("LAN"))?;
        let namespace = bare(name)?;
        let (switch, bridge, own, gateways) = uplink.ends(lab);
        let (weather, interference) = (uplink.weather(lab), uplink.interference(lab));
        let cable = plug(&namespace, "eth0", (switch, bridge), name, weather, interference)?;
        let ways: Vec<(IpNet, IpAddr)> = own.into_iter().zip(gateways).collect();
        connect(&namespace, "eth0", &ways, 100)?;
        namespace.run(|| {
            let mut netlink = Rtnetlink::open()?;
            add_bridge(&mut netlink, LAN)?;
            address(&mut netlink, LAN, in_net(first_v4(lan.0), lan.0))?;
            address(&mut netlink, LAN, in_net(first_v6(lan.1), lan.1))
        })?;
        forward(&namespace)?;
        if let Some(nat) = nat {
            let inside = [nth_v4(lan.0, FIRST_HOST).into(), nth_v6(lan.1, FIRST_HOST).into()];
            namespace.run(|| nat::install(nat, "eth0", inside))?;
        }
        // IPv6 is not translated, so every hop between needs a route back.
        let lan_v6 = || Route::new(lan.1.into());
        let here = own[1].addr();
        let switch = match &uplink {
            Uplink::Internet(..) => &lab.internet,
            Uplink::Lan(router) => {
                let above = router.host.addresses[1];
                lab.internet.run(|| Ok(Rtnetlink::open()?.add_route(&lan_v6().via(above))?))?;
                &router.host.namespace
            }
        };
        switch.run(|| Ok(Rtnetlink::open()?.add_route(&lan_v6().via(here))?))?;
        lab.cables.extend(cable);
        let host = Arc::new(Host { namespace, addresses: own.map(|net| net.addr()).to_vec() });
        Ok(Router { host, lan, next: AtomicU8::new(FIRST_HOST) })
    }
}

/// Creates a namespace with its loopback up, and with settings that do not depend on the machine's.
fn bare(name: &str) -> anyhow::Result<Namespace> {
    let namespace = Namespace::new(name)?;
    for (setting, value) in [
        // Addresses are usable at once, and no router advertises addresses.
        ("net.ipv6.conf.default.accept_dad", "0"),
        ("net.ipv6.conf.default.accept_ra", "0"),
        ("net.ipv6.conf.all.disable_ipv6", "0"),
        ("net.ipv6.conf.default.disable_ipv6", "0"),
        // The values that systemd sets on most distributions.
        ("net.ipv4.conf.all.rp_filter", "0"),
        ("net.ipv4.conf.default.rp_filter", "2"),
    ] {
        namespace.sysctl(setting, value)?;
    }
    namespace.run(|| {
        let mut netlink = Rtnetlink::open()?;
        let loopback = netlink.link_index("lo")?;
        Ok(netlink.set_up(loopback, true)?)
    })?;
    Ok(namespace)
}

fn forward(namespace: &Namespace) -> anyhow::Result<()> {
    namespace.sysctl("net.ipv4.ip_forward", "1")?;
    namespace.sysctl("net.ipv6.conf.all.forwarding", "1")?;
    // All traffic takes the gateway; ICMP redirects would change that.
    namespace.sysctl("net.ipv4.conf.all.send_redirects", "0")
}

/// Connects `link` of a host to the port `port` of a bridge.
fn plug(
    host: &Namespace,
    link: &str,
    (switch, bridge): (&Namespace, &str),
    port: &str,
    weather: Weather,
    interference: Option<&Arc<Interference>>,
) -> anyhow::Result<Option<Cable>> {
    switch.run(|| {
        let mut netlink = Rtnetlink::open()?;
        let peer = VethPeer { name: link, namespace: Some(host.file().as_fd()) };
        Ok(netlink.add_veth(port, peer)?)
    })?;
    if weather == Weather::default() && interference.is_none() {
        switch.run(|| attach(port, bridge))?;
        return Ok(None);
    }
    // The host keeps a veth link: an agent does not use a TAP link as an uplink.
    let [near, far, joint] = ["n", "f", "j"].map(|prefix| format!("{prefix}-{port}"));
    let cable = Cable::lay((switch, &near), (switch, &far), weather, interference)?;
    switch.run(|| {
        Rtnetlink::open()?.add_bridge(&joint)?;
        attach(port, &joint)?;
        attach(&near, &joint)?;
        let mut netlink = Rtnetlink::open()?;
        let index = netlink.link_index(&joint)?;
        netlink.set_up(index, true)?;
        attach(&far, bridge)
    })?;
    Ok(Some(cable))
}

/// Makes a link a port of a bridge in the calling thread's namespace, and sets it up.
fn attach(port: &str, bridge: &str) -> anyhow::Result<()> {
    let mut netlink = Rtnetlink::open()?;
    let (port, bridge) = (netlink.link_index(port)?, netlink.link_index(bridge)?);
    netlink.set_master(port, Some(bridge))?;
    Ok(netlink.set_up(port, true)?)
}

/// Adds addresses and default routes to a link, then waits until both gateways answer: a new link
/// drops packets until the kernel's link watch has run, up to a second later.
fn connect(
    host: &Namespace,
    link: &str,
    ways: &[(IpNet, IpAddr)],
    metric: u32,
) -> anyhow::Result<()> {
    host.run(|| {
        let mut netlink = Rtnetlink::open()?;
        for (own, gateway) in ways.iter().copied() {
            address(&mut netlink, link, own)?;
            let index = netlink.link_index(link)?;
            let everywhere = match own {
                IpNet::V4(_) => IpNet::V4(Ipv4Net::default()),
                IpNet::V6(_) => IpNet::V6(Ipv6Net::default()),
            };
            netlink.add_route(&Route::new(everywhere).via(gateway).dev(index).metric(metric))?;
        }
        Ok(())
    })?;
    for (_, gateway) in ways {
        first_reply(host, *gateway, link, Instant::now() + LINK_LIMIT)?
            .with_context(|| format!("{} cannot reach its gateway {gateway}", host.name()))?;
    }
    Ok(())
}

/// Adds a bridge with a fixed hardware address. A bridge that inherits the address of a port
/// changes it when a port is added; its neighbours then keep sending to the old address, which the
/// bridge's host does not accept.
fn add_bridge(netlink: &mut Rtnetlink, name: &str) -> anyhow::Result<()> {
    /// A locally administered address, unique on its LAN.
    const HARDWARE: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
    netlink.add_bridge(name)?;
    let index = netlink.link_index(name)?;
    Ok(netlink.set_hardware_address(index, HARDWARE)?)
}

/// Adds an address to a link and sets the link up.
fn address(netlink: &mut Rtnetlink, link: &str, net: IpNet) -> anyhow::Result<()> {
    let index = netlink.link_index(link)?;
    netlink.add_address(index, net, AddressOptions { no_dad: true, ..Default::default() })?;
    netlink.set_up(index, true)?;
    Ok(())
}

fn public(v4: &str, v6: &str) -> anyhow::Result<(Ipv4Addr, Ipv6Addr)> {
    let parse = || -> anyhow::Result<_> { Ok((v4.parse()?, v6.parse()?)) };
    let (v4, v6) = parse().with_context(|| format!("{v4} and {v6} are not addresses"))?;
    if !INTERNET_V4.contains(&v4) || !INTERNET_V6.contains(&v6) {
        return Err(anyhow!("{v4} or {v6} is not on the simulated internet"));
    }
    Ok((v4, v6))
}

fn in_net(address: impl Into<IpAddr>, net: impl Into<IpNet>) -> IpNet {
    let (address, net) = (address.into(), net.into());
    IpNet::new_assert(address, net.prefix_len())
}

fn first_v4(net: Ipv4Net) -> Ipv4Addr {
    nth_v4(net, 1)
}

fn first_v6(net: Ipv6Net) -> Ipv6Addr {
    nth_v6(net, 1)
}

fn nth_v4(net: Ipv4Net, number: u8) -> Ipv4Addr {
    Ipv4Addr::from_bits(net.network().to_bits() | u32::from(number))
}

fn nth_v6(net: Ipv6Net, number: u8) -> Ipv6Addr {
    Ipv6Addr::from_bits(net.network().to_bits() | u128::from(number))
}
