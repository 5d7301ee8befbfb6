//! The cluster of the scenario: its hosts, its pods, the mesh between the nodes, and the rules that
//! kube-proxy, a CNI plugin and the routers of the sites would add.

use std::fmt::{self, Display, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use anyhow::Context as _;
use clap::ValueEnum;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;
use towline_netlink::{Family, Route, Rtnetlink};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily, Transaction};

use super::super::Setting;
use crate::lab::mesh::{Controller, Node, START_LIMIT, require_tunnel};
use crate::lab::namespace::Namespace;
use crate::lab::nat::Nat;
use crate::lab::tamper::LINK;
use crate::lab::topology::{Host, Lab, Router};

/// Kind of address that a node has inside the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Addressing {
    /// The mesh address of the node.
    Overlay,
    /// The machine's own address, which the mesh routes.
    NodeIp,
}

impl Display for Addressing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Overlay => "overlay",
            Self::NodeIp => "node-ip",
        })
    }
}

/// TCP port of the API server.
pub(super) const API_SERVER: u16 = 6_443;
/// TCP port of the kubelet.
pub(super) const KUBELET: u16 = 10_250;
/// TCP port on which the pods of the service listen.
pub(super) const SERVICE: u16 = 8_080;
/// Node port of the service with `externalTrafficPolicy: Cluster`. Every node accepts it, and
/// forwards to the pod of the service with its own source address.
pub(super) const NODE_PORT: u16 = 30_080;
/// Node port of the service with `externalTrafficPolicy: Local`. Worker-a accepts it, and forwards
/// to its own pod with the source address of the client.
pub(super) const LOCAL_NODE_PORT: u16 = 30_081;
/// TCP port of worker-a that is published for a container. No node announces the network of the
/// container.
pub(super) const PUBLISHED: u16 = 8_088;
/// TCP port of worker-a that a pod (a game server) uses as its host port.
pub(super) const HOST_PORT: u16 = 7_777;
/// Cluster addresses of the service, at port 80. Its only backend is the pod of worker-b.
pub(super) const CLUSTER_IP: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)),
    IpAddr::V6(Ipv6Addr::new(0xfd10, 0x96, 0, 0, 0, 0, 0, 0x10)),
];
/// Networks that contain the pods of all nodes.
const PODS: [IpNet; 2] = [
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(10, 244, 0, 0)), 16),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfd10, 0x244, 0, 0, 0, 0, 0, 0)), 32),
];
/// Networks of the containers of worker-a.
const CONTAINERS: (Ipv4Net, Ipv6Net) = (
    Ipv4Net::new_assert(Ipv4Addr::new(172, 17, 0, 0), 16),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd17, 0, 0, 0, 0, 0, 0, 0), 64),
);
/// Networks of the LAN of worker-a.
const LAN: [IpNet; 2] = [
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(192, 168, 1, 0)), 24),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0)), 64),
];
/// Mark that kube-proxy sets on packets whose source must be translated.
const MASQUERADE: u32 = 0x4000;
/// UDP port of the agents.
const WIREGUARD: u16 = 51_830;

/// A node of the cluster and its pod.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) host: Arc<Host>,
    pub(super) pod: Host,
    /// Addresses by which the other nodes of the cluster reach this node, one of each family.
    pub(super) addresses: Vec<IpAddr>,
    node: Node,
}

/// Hosts, programs and mesh of one cluster.
#[derive(Debug)]
pub(super) struct Cluster {
    /// The nodes cp, worker-a and worker-b, in this order.
    pub(super) members: [Member; 3],
    _controller: Controller,
    /// Host on the internet that is not in the mesh: a web server, and an operator outside of the
    /// mesh.
    pub(super) www: Arc<Host>,
    /// Host on the internet that connects to the game server.
    pub(super) player: Arc<Host>,
    /// Machine on the LAN of worker-a that is not in the mesh.
    pub(super) desk: Arc<Host>,
    /// Container on worker-a, one port of which is published.
    pub(super) container: Host,
    /// Addresses at which players reach the host port of worker-a.
    pub(super) player_sees: Vec<IpAddr>,
    routers: [Router; 2],
    lab: Lab,
}

impl Cluster {
    /// Builds the hosts, joins and starts all nodes, and waits for their tunnels.
    pub(super) fn build(setting: &Setting, addressing: Addressing) -> anyhow::Result<Self> {
        setting.output.step(&format!("building a cluster, addressing: {addressing}"));
        let mut lab = Lab::new(setting.rank)?;
        let cp = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.build()?;
        let www = lab.host("www").public("203.0.113.80", "2001:db8::80")?.build()?;
        let player = lab.host("player").public("203.0.113.90", "2001:db8::90")?.build()?;
        let mut router = |letter: &str, number: u8| {
            lab.router(&format!("router-{letter}"))
                .public_number(10 + number)?
                .lan_number(number)?
                .nat(Nat::Masquerade)
                .build()
        };
        let routers = [router("a", 1)?, router("b", 2)?];
        let worker_a = lab.host("worker-a").behind(&routers[0]).build()?;
        let worker_b = lab.host("worker-b").behind(&routers[1]).build()?;
        let desk = lab.host("desk").behind(&routers[0]).build()?;
        forward_ports(&routers[0], &worker_a)?;
        let player_sees = routers[0].host().addresses().iter().filter(|ip| ip.is_ipv4());
        let player_sees = player_sees.chain(worker_a.addresses().iter().filter(|ip| ip.is_ipv6()));
        let player_sees = player_sees.copied().collect();

        let controller = Controller::start(&lab, &cp, &setting.binaries)?;
        let mut members = Vec::new();
        for (host, site, number, advertise) in [
            (cp, "cloud", 1, "203.0.113.10"),
            (worker_a, "dc-a", 2, "203.0.113.11"),
            (worker_b, "dc-b", 3, ""),
        ] {
            setting.output.step(&format!("joining {}", host.name()));
            members.push(join(
                &lab,
                setting,
                &controller,
                host,
                site,
                number,
                advertise,
                addressing,
            )?);
        }
        let [cp, a, b] = <[Member; 3]>::try_from(members)
            .map_err(|_| anyhow::anyhow!("the cluster does not have three nodes"))?;
        for (here, there) in [(&a, &cp), (&b, &cp), (&b, &a)] {
            require_tunnel(&here.node, &there.node, START_LIMIT)?;
        }
        let members = [cp, a, b];
        let container = members[1].host.container("container", CONTAINERS.0, CONTAINERS.1)?;
        for member in &members {
            let backend = members[2].pod.addresses();
            let here = (member.host.name() == "worker-a").then_some(&container);
            let kube = kube_proxy(member, backend, here);
            member.host.namespace().run(|| Ok(Nft::open()?.load(&kube)?))?;
        }
        lead_into_mesh(&desk, &members[1].host, &members[0].addresses)?;
        Ok(Self {
            members,
            _controller: controller,
            www,
            player,
            desk,
            container,
            player_sees,
            routers,
            lab,
        })
    }

    /// Returns the namespaces to capture in, each with the links whose frames are counted.
    pub(super) fn watched(&self) -> impl Iterator<Item = (&Namespace, &'static [&'static str])> {
        let nodes =
            self.members.iter().map(|member| (member.host.namespace(), ["eth0", LINK].as_slice()));
        let routers = self.routers.iter().zip([["worker-a"].as_slice(), &["worker-b"]]);
        let routers = routers.map(|(router, links)| (router.host().namespace(), links));
        nodes.chain(routers).chain([(self.lab.internet(), ["cp"].as_slice())])
    }

    /// Sets the reverse path filter on the uplinks of all nodes.
    pub(super) fn set_reverse_path_filter(&self, mode: u8) -> anyhow::Result<()> {
        for member in &self.members {
            for link in ["all", "eth0"] {
                let setting = format!("net.ipv4.conf.{link}.rp_filter");
                member.host.namespace().sysctl(&setting, &mode.to_string())?;
            }
        }
        Ok(())
    }
}

/// Joins a node with its pod, starts its agent, and waits until it answers.
#[expect(clippy::too_many_arguments, reason = "one caller, which lists the arguments in a table")]
fn join(
    lab: &Lab,
    setting: &Setting,
    controller: &Controller,
    host: Arc<Host>,
    site: &str,
    number: u8,
    advertise: &str,
    addressing: Addressing,
) -> anyhow::Result<Member> {
    let pods = (
        Ipv4Net::new(Ipv4Addr::new(10, 244, number, 0), 24)?,
        Ipv6Net::new(Ipv6Addr::new(0xfd10, 0x244, number.into(), 0, 0, 0, 0, 0), 64)?,
    );
    let pod = host.pod(&format!("pod-{site}"), pods.0, pods.1)?;
    let mut granted: Vec<IpNet> = vec![pods.0.into(), pods.1.into()];
    let mut configuration = String::from("[node]\n");
    let _ = writeln!(configuration, "prefixes = {:?}", texts(&granted));
    if addressing == Addressing::NodeIp {
        granted.extend(host.addresses().iter().map(|address| IpNet::from(*address)));
    }
    let _ = writeln!(configuration, "addressing = \"{addressing}\"");
    if !advertise.is_empty() {
        let _ = writeln!(configuration, "advertise = [\"{advertise}:{WIREGUARD}\"]");
    }
    if host.name() == "cp" {
        let port = controller.address().port();
        let _ = writeln!(configuration, "[routing]\nplain_ports = [{API_SERVER}, {port}]");
    }
    let mut node = Node::new(lab, &host, host.name(), &setting.binaries, &configuration)?;
    let granted = texts(&granted);
    let granted = granted.iter().flat_map(|prefix| ["--prefix", prefix]);
    let flags: Vec<_> = ["--site", site].into_iter().chain(granted).collect();
    node.join(&controller.operator().token_with(&flags)?)?;
    let status = node.restart()?;
    let addresses = match addressing {
        Addressing::Overlay => status.overlay_addresses,
        Addressing::NodeIp => host.addresses().to_vec(),
    };
    Ok(Member { host, pod, addresses, node })
}

fn texts(prefixes: &[IpNet]) -> Vec<String> {
    prefixes.iter().map(IpNet::to_string).collect()
}

/// Forwards the ports of worker-a at the router of its site, as an administrator does: its
/// WireGuard port and its host port are reachable from outside. IPv6 is only let in, without
/// translation.
fn forward_ports(router: &Router, worker: &Host) -> anyhow::Result<()> {
    const TRANSLATE_DESTINATION: i32 = -100;
    let ports = [(libc::IPPROTO_UDP as u8, WIREGUARD), (libc::IPPROTO_TCP as u8, HOST_PORT)];
    let inside = worker.addresses().iter().copied().find(IpAddr::is_ipv4);
    let mut translate = Chain::base(ChainKind::Nat, Hook::Prerouting, TRANSLATE_DESTINATION);
    let mut let_in = Transaction::new();
    for (protocol, port) in ports {
        let arrived = || Rule::new().input("eth0").protocol(protocol).destination_port(port);
        if let Some(inside) = inside {
            translate = translate.rule(arrived().family(Family::V4).dnat(inside, None));
        }
        let_in.insert_rule(TableFamily::Inet, "lab", "forward", &arrived().accept());
    }
    let table = Table::new(TableFamily::Inet, "ports").chain("translate", translate);
    router.host().namespace().run(|| {
        let mut nft = Nft::open()?;
        nft.load(&table)?;
        Ok(nft.commit(let_in)?)
    })
}

/// Routes these addresses through a node of the mesh on the same LAN, which masquerades the
/// machine's packets.
fn lead_into_mesh(machine: &Host, node: &Host, addresses: &[IpAddr]) -> anyhow::Result<()> {
    machine.namespace().run(|| {
        let mut netlink = Rtnetlink::open()?;
        for address in addresses {
            let gateway = node.addresses().iter().find(|ip| ip.is_ipv4() == address.is_ipv4());
            let gateway = gateway.context("the node has no address of this family")?;
            netlink.replace_route(&Route::new(IpNet::from(*address)).via(*gateway))?;
        }
        Ok(())
    })
}

/// Returns the rules that kube-proxy and a CNI plugin would add. Service addresses are translated
/// to the service's pod, also for connections from the node itself. The node masquerades packets
/// whose answers would otherwise bypass it, and packets of its pods that leave the pod networks. On
/// worker-a there are also a host port, a node port of its own pod, a published container port, and
/// masquerading for packets from its LAN into the mesh.
fn kube_proxy(member: &Member, backend: &[IpAddr], container: Option<&Host>) -> Table {
    const TRANSLATE_DESTINATION: i32 = -100;
    const TRANSLATE_SOURCE: i32 = 100;
    let tcp = || Rule::new().protocol(libc::IPPROTO_TCP as u8);
    let marked = |rule: Rule| rule.set_mark(MASQUERADE, MASQUERADE);
    let mut arriving = Chain::base(ChainKind::Nat, Hook::Prerouting, TRANSLATE_DESTINATION);
    let mut made_here = Chain::base(ChainKind::Nat, Hook::Output, TRANSLATE_DESTINATION);
    let mut leaving = Chain::base(ChainKind::Nat, Hook::Postrouting, TRANSLATE_SOURCE)
        .rule(Rule::new().mark(MASQUERADE, MASQUERADE).masquerade());
    for (service, pod) in CLUSTER_IP.into_iter().zip(backend) {
        let family = Family::of(service);
        let to_service = || tcp().destination(service.into()).destination_port(80);
        arriving = arriving.rule(to_service().dnat(*pod, Some(SERVICE)));
        made_here = made_here.rule(marked(to_service()).dnat(*pod, Some(SERVICE)));
        let to_node_port = tcp().family(family).destination_is_local().destination_port(NODE_PORT);
        arriving = arriving.rule(marked(to_node_port).dnat(*pod, Some(SERVICE)));
    }
    if let Some(container) = container {
        let pod = member.pod.addresses();
        for (port, to, target) in [
            (HOST_PORT, pod, HOST_PORT),
            (LOCAL_NODE_PORT, pod, SERVICE),
            (PUBLISHED, container.addresses(), SERVICE),
        ] {
            for to in to {
                let here = tcp().family(Family::of(*to)).destination_is_local();
                arriving = arriving.rule(here.destination_port(port).dnat(*to, Some(target)));
            }
        }
        for lan in LAN {
            leaving = leaving.rule(Rule::new().source(lan).output(LINK).masquerade());
        }
    }
    for (pods, pod) in PODS.into_iter().zip(member.pod.addresses()) {
        leaving =
            leaving.rule(Rule::new().source((*pod).into()).not_destination(pods).masquerade());
    }
    Table::new(TableFamily::Inet, "kube")
        .chain("arriving", arriving)
        .chain("made-here", made_here)
        .chain("leaving", leaving)
}
