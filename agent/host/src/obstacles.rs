//! Finds firewalls of other programs that drop the mesh's traffic. It changes nothing.
//!
//! An accept in Towline's own table does not help against a drop in another table, and Towline changes
//! no rules of others (but for the chain that Docker reserves for that, see `hook`). So this module
//! asks, for a few packets that a working mesh needs, what each filter chain of the host does with
//! them, and names the chain with the command that lets them pass.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use towline_core::path;
use towline_core::plan::{Plan, RouteVia};
use towline_core::prefixes::is_host;
use towline_netlink::Family;
use towline_nftables::{ForeignTable, Hook, Nft, NftError, Packet, PacketLink, TableFamily};
use towline_types::codes;

use super::address::LocalAddress;
use super::hook;

/// Chain of another program that drops packets of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Obstacle {
    /// Traffic that is dropped.
    traffic: Traffic,
    /// Program that the chain belongs to.
    owner: Owner,
    /// Address family of the table.
    family: TableFamily,
    /// Name of the table.
    table: String,
    /// Name of the base chain.
    chain: String,
    /// Name of Towline's link.
    link: String,
    /// UDP port of the tunnels.
    port: u16,
}

/// Traffic that a firewall may drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Traffic {
    /// Connections from the mesh to this host.
    In,
    /// Connections of this host to the mesh.
    Out,
    /// Connections from the mesh to networks behind this host, such as its pods.
    ForwardIn,
    /// Connections of networks behind this host to the mesh.
    ForwardOut,
    /// Datagrams to the UDP port of the tunnels that this host did not ask for.
    PortIn,
    /// Datagrams from the UDP port of the tunnels.
    PortOut,
}

/// Program that manages a firewall, which determines the command that opens it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Owner {
    /// ufw.
    Ufw,
    /// firewalld.
    Firewalld,
    /// Docker, with rules of iptables.
    Docker,
    /// Docker, with its own nftables tables.
    DockerNftables,
    /// iptables, without a program that is known.
    Iptables,
    /// nftables, without a program that is known.
    Nftables,
}

/// Port of the kubelet, to which the control plane connects.
const KUBELET: u16 = 10_250;
/// Port of a client.
const CLIENT: u16 = 40_000;
/// Greatest number of outer addresses of peers of each family whose datagrams are tried.
const PEERS: usize = 8;

impl Obstacle {
    /// Returns true if the mesh works all the same: peers that this node contacts first are let in.
    pub fn is_note(&self) -> bool {
        self.traffic == Traffic::PortIn
    }

    /// Returns true if what the mesh sends to this host itself is dropped.
    pub fn is_incoming(&self) -> bool {
        self.traffic == Traffic::In
    }

    /// Returns the name of the chain with its table, such as `chain INPUT of table ip filter`.
    pub fn place(&self) -> String {
        format!("chain {} of table {} {}", self.chain, self.family, self.table)
    }

    /// Returns the command that lets the traffic pass, in backticks.
    pub fn command(&self) -> String {
        let Self { link, port, family, table, chain, .. } = self;
        let tool = if *family == TableFamily::Ip6 { "ip6tables" } else { "iptables" };
        match (self.owner, self.traffic) {
            (Owner::Ufw, Traffic::In) => format!("`ufw allow in on {link}`"),
            (Owner::Ufw, Traffic::Out) => format!("`ufw allow out on {link}`"),
            (Owner::Ufw, Traffic::ForwardIn) => format!("`ufw route allow in on {link}`"),
            (Owner::Ufw, Traffic::ForwardOut) => format!("`ufw route allow out on {link}`"),
            (Owner::Ufw, Traffic::PortIn) => format!("`ufw allow {port}/udp`"),
            (Owner::Ufw, Traffic::PortOut) => {
                format!("`ufw allow out proto udp from any port {port}`")
            }
            (Owner::Firewalld, Traffic::PortIn) => {
                format!(
                    "`firewall-cmd --permanent --add-port={port}/udp` and `firewall-cmd --reload`"
                )
            }
            (Owner::Firewalld, Traffic::PortOut) => format!(
                "`firewall-cmd --permanent --direct --add-rule ipv4 filter OUTPUT 0 -p udp --sport \
                 {port} -j ACCEPT` and `firewall-cmd --reload`"
            ),
            (Owner::Firewalld, _) => format!(
                "`firewall-cmd --permanent --zone=trusted --add-interface={link}` and \
                 `firewall-cmd --reload`"
            ),
            (Owner::Docker, Traffic::ForwardOut) => {
                format!("`{tool} -I DOCKER-USER -o {link} -j ACCEPT`")
            }
            (Owner::Docker, _) => format!("`{tool} -I DOCKER-USER -i {link} -j ACCEPT`"),
            (Owner::DockerNftables, _) => format!(
                "`dockerd --bridge-accept-fwmark=0x1000000/0x1000000`, with a rule of your own that \
                 sets this mark on packets of {link}"
            ),
            (Owner::Iptables, Traffic::PortIn) => {
                format!("`{tool} -I {chain} -p udp --dport {port} -j ACCEPT`")
            }
            (Owner::Iptables, Traffic::PortOut) => {
                format!("`{tool} -I {chain} -p udp --sport {port} -j ACCEPT`")
            }
            (Owner::Iptables, Traffic::Out | Traffic::ForwardOut) => {
                format!("`{tool} -I {chain} -o {link} -j ACCEPT`")
            }
            (Owner::Iptables, Traffic::In | Traffic::ForwardIn) => {
                format!("`{tool} -I {chain} -i {link} -j ACCEPT`")
            }
            (Owner::Nftables, traffic) => {
                let matches = match traffic {
                    Traffic::In | Traffic::ForwardIn => format!("iifname \"{link}\""),
                    Traffic::Out | Traffic::ForwardOut => format!("oifname \"{link}\""),
                    Traffic::PortIn => format!("udp dport {port}"),
                    Traffic::PortOut => format!("udp sport {port}"),
                };
                format!("`nft insert rule {family} {table} {chain} {matches} accept`")
            }
        }
    }
}

codes! { Obstacle.traffic: Traffic }

codes! {
    Traffic {
        In => "firewall-drops-input",
        Out => "firewall-drops-output",
        ForwardIn => "firewall-drops-forwarded",
        ForwardOut => "firewall-drops-forwarded",
        PortIn => "firewall-closes-port",
        PortOut => "firewall-drops-tunnels",
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { traffic, owner, port, .. } = self;
        let what = match traffic {
            Traffic::In => {
                format!("connections from the mesh to this machine (tried: TCP port {KUBELET})")
            }
            Traffic::Out => {
                format!("connections of this machine to the mesh (tried: TCP port {KUBELET})")
            }
            Traffic::ForwardIn => "forwarded connections from the mesh".to_owned(),
            Traffic::ForwardOut => "forwarded connections to the mesh".to_owned(),
            Traffic::PortIn => format!("what arrives first at UDP port {port}"),
            Traffic::PortOut => format!("what leaves from UDP port {port}"),
        };
        let who = match owner {
            Owner::Ufw => "ufw",
            Owner::Firewalld => "firewalld",
            Owner::Docker | Owner::DockerNftables => "Docker's firewall",
            Owner::Iptables | Owner::Nftables => "the host's firewall",
        };
        write!(f, "{who} drops {what}: {}: run {}", self.place(), self.command())
    }
}

/// A search for the chains that drop traffic of the mesh. It needs no other state and may take long.
#[derive(Debug)]
pub struct ObstacleSearch {
    /// Name and index of Towline's link.
    link: PacketLink,
    /// Name of Towline's table.
    table: String,
    /// UDP port of the tunnels.
    port: Option<u16>,
    /// Our addresses in the mesh.
    own: Vec<IpAddr>,
    /// Address of a peer in the mesh, of each family that has one.
    inner_peers: Vec<IpAddr>,
    /// Networks that this node announces.
    announced: Vec<IpNet>,
    /// Addresses that datagrams leave from, the preferred ones first.
    uplinks: Vec<path::LocalAddress>,
    /// All addresses of the host.
    addresses: Vec<LocalAddress>,
    /// Outer addresses of peers. A firewall may let datagrams to the peers pass and no others.
    peers: Vec<SocketAddr>,
}

impl ObstacleSearch {
    pub(super) fn new(
        plan: &Plan,
        link: u32,
        uplinks: Vec<path::LocalAddress>,
        addresses: Vec<LocalAddress>,
        peers: Vec<SocketAddr>,
    ) -> Self {
        let inner_peer = |family: Family| {
            let mut routes = plan.routes.keys();
            let (net, _) = routes.find(|(net, via)| {
                *via == RouteVia::Link && is_host(net) && Family::of(net.addr()) == family
            })?;
            Some(net.addr())
        };
        Self {
            link: PacketLink { index: link, name: plan.link.name.clone() },
            table: plan.firewall.table.clone(),
            port: plan.underlay.port,
            own: plan.link.addresses.iter().map(IpNet::addr).collect(),
            inner_peers: Family::ALL.into_iter().filter_map(inner_peer).collect(),
            announced: plan.firewall.own.announced().iter().copied().collect(),
            uplinks,
            addresses,
            peers,
        }
    }

    /// Returns the chains that drop traffic of the mesh, each once.
    ///
    /// # Errors
    ///
    /// If the tables of other programs cannot be read.
    pub fn run(&self) -> Result<Vec<Obstacle>, NftError> {
        let packets = self.packets();
        let mut found = BTreeSet::new();
        for table in &other_tables(&self.table)? {
            // `hook` reports a link without a zone.
            let rules = table.chains.values().flat_map(|chain| &chain.rules);
            let has_no_zone =
                table.name == hook::FIREWALLD && !hook::has_zone(rules, &self.link.name);
            for (traffic, packet) in &packets {
                let by_link = !matches!(traffic, Traffic::PortIn | Traffic::PortOut);
                if !(has_no_zone && by_link) {
                    let port = self.port.unwrap_or_default();
                    found.extend(droppers(table, *traffic, packet, &self.link.name, port));
                }
            }
        }
        Ok(found.into_iter().collect())
    }

    /// Returns the packets that a working mesh needs.
    fn packets(&self) -> Vec<(Traffic, Packet)> {
        let mut packets = Vec::new();
        for family in Family::ALL {
            let of_family = |ip: &&IpAddr| Family::of(**ip) == family;
            if let (Some(&own), Some(&peer)) =
                (self.own.iter().find(of_family), self.inner_peers.iter().find(of_family))
            {
                let tunnel = || Some(self.link.clone());
                packets.push((Traffic::In, tcp(Hook::Input, (tunnel(), None), (peer, own))));
                packets.push((Traffic::Out, tcp(Hook::Output, (None, tunnel()), (own, peer))));
                for (link, pod) in self.pods(family) {
                    let (inner, outer) = (Some(link.clone()), tunnel());
                    let forwarded = |ways, ends| tcp(Hook::Forward, ways, ends);
                    packets
                        .push((Traffic::ForwardIn, forwarded((tunnel(), Some(link)), (peer, pod))));
                    packets.push((Traffic::ForwardOut, forwarded((inner, outer), (pod, peer))));
                }
            }
            let Some(port) = self.port else { continue };
            let uplink = self.uplinks.iter().find(|at| Family::of(at.address) == family);
            let Some(at) = uplink else { continue };
            let Some(link) = self.link_of(at.interface) else { continue };
            let own = SocketAddr::new(at.address, port);
            let udp = |hook, ways, (from, to): (SocketAddr, SocketAddr)| Packet {
                protocol: libc::IPPROTO_UDP as u8,
                source_port: from.port(),
                destination_port: to.port(),
                ..tcp(hook, ways, (from.ip(), to.ip()))
            };
            let peers = self.peers.iter().filter(|peer| Family::of(peer.ip()) == family);
            for peer in peers.take(PEERS) {
                let incoming = udp(Hook::Input, (Some(link.clone()), None), (*peer, own));
                packets.push((Traffic::PortIn, incoming));
                let outgoing = udp(Hook::Output, (None, Some(link.clone())), (own, *peer));
                packets.push((Traffic::PortOut, outgoing));
            }
        }
        packets
    }

    /// Returns the links that lead to announced networks of this host, such as the bridge of its pods,
    /// each with an address there.
    fn pods(&self, family: Family) -> Vec<(PacketLink, IpAddr)> {
        let nets =
            self.announced.iter().filter(|net| !is_host(net) && Family::of(net.addr()) == family);
        let on = |net: &IpNet| {
            let local = self
                .addresses
                .iter()
                .find(|local| net.contains(&local.prefix.addr()) && local.link != self.link.name)?;
            let pod = net.hosts().filter(|host| *host != local.prefix.addr()).nth(1)?;
            Some((PacketLink { index: local.index, name: local.link.clone() }, pod))
        };
        nets.filter_map(on).collect()
    }

    fn link_of(&self, index: u32) -> Option<PacketLink> {
        let local = self.addresses.iter().find(|local| local.index == index)?;
        Some(PacketLink { index, name: local.link.clone() })
    }
}

/// Connection of this host with the mesh, to try in the chains of other programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrialConnection {
    /// Name and index of Towline's link.
    pub link: (String, u32),
    /// Name of Towline's nftables table, which is not asked.
    pub table: String,
    /// Address of this host.
    pub own: IpAddr,
    /// Address at the other end, of the same family.
    pub peer: IpAddr,
    /// TCP port that the connection is made to.
    pub port: u16,
}

impl TrialConnection {
    /// Returns the chains that drop a connection from this host to the other end, and one from there to
    /// the same port here.
    ///
    /// # Errors
    ///
    /// If the tables of other programs cannot be read.
    pub fn run(&self) -> Result<Vec<Obstacle>, NftError> {
        let (name, index) = &self.link;
        let link = || Some(PacketLink { index: *index, name: name.clone() });
        let to_port = |packet: Packet| Packet { destination_port: self.port, ..packet };
        let out = tcp(Hook::Output, (None, link()), (self.own, self.peer));
        let input = tcp(Hook::Input, (link(), None), (self.peer, self.own));
        let packets = [(Traffic::Out, to_port(out)), (Traffic::In, to_port(input))];
        let mut found = BTreeSet::new();
        for table in &other_tables(&self.table)? {
            for (traffic, packet) in &packets {
                found.extend(droppers(table, *traffic, packet, name, 0));
            }
        }
        Ok(found.into_iter().collect())
    }
}

/// Returns the tables of other programs than the one whose table has this name.
fn other_tables(own: &str) -> Result<Vec<ForeignTable>, NftError> {
    Nft::open()?.tables_with_filters(&[Hook::Input, Hook::Forward, Hook::Output], own)
}

/// Returns the chains of a table that drop a packet. `link` is Towline's, `port` the UDP port of the
/// tunnels.
fn droppers(
    table: &ForeignTable,
    traffic: Traffic,
    packet: &Packet,
    link: &str,
    port: u16,
) -> impl Iterator<Item = Obstacle> {
    table.chains_that_drop(packet).map(move |chain| Obstacle {
        traffic,
        owner: owner(table, chain, packet.hook),
        family: table.family,
        table: table.name.clone(),
        chain: chain.to_owned(),
        link: link.to_owned(),
        port,
    })
}

fn tcp(
    hook: Hook,
    (input, output): (Option<PacketLink>, Option<PacketLink>),
    (source, destination): (IpAddr, IpAddr),
) -> Packet {
    Packet {
        hook,
        input,
        output,
        source,
        destination,
        protocol: libc::IPPROTO_TCP as u8,
        source_port: CLIENT,
        destination_port: KUBELET,
    }
}

/// Returns the program that a chain belongs to, by the names that it uses.
fn owner(table: &ForeignTable, chain: &str, hook: Hook) -> Owner {
    let has = |prefix: &str| table.chains.keys().any(|name| name.starts_with(prefix));
    let is_iptables = table.family != TableFamily::Inet
        && table.name == "filter"
        && ["INPUT", "FORWARD", "OUTPUT"].contains(&chain);
    if table.name == hook::FIREWALLD {
        Owner::Firewalld
    } else if table.name.starts_with("docker") {
        Owner::DockerNftables
    } else if is_iptables && hook == Hook::Forward && has("DOCKER-USER") {
        Owner::Docker
    } else if is_iptables && (has("ufw-") || has("ufw6-")) {
        Owner::Ufw
    } else if is_iptables {
        Owner::Iptables
    } else {
        Owner::Nftables
    }
}
