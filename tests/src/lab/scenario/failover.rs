//! `cargo lab failover`: breaks paths between nodes, and measures how long each outage lasts.
//!
//! `a` has two uplinks, each behind its own router, and `b` is behind a third router. `c` and `d`
//! are behind NATs that allow no direct path between them. Two public nodes relay.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use ipnet::{IpNet, Ipv4Net};
use serde::Serialize;
use towline_netlink::{AddressOptions, Family, Route, Rtnetlink};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily};

use super::Setting;
use crate::lab::flow::{End, while_talking};
use crate::lab::interrupt::{sleep, wait_for, wait_up_to};
use crate::lab::mesh::{Controller, Node, START_LIMIT};
use crate::lab::namespace::Namespace;
use crate::lab::nat::{Nat, forget_connections};
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, Skipped, round};
use crate::lab::topology::{Lab, Router};
use crate::lab::traffic::{Pattern, tcp_both_ways};

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Failover {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Results of all cases, each once with the controller running and once without it.
    pub cases: Vec<Case>,
    /// Throughput over a relay, divided by the throughput over a direct path.
    pub relay_vs_direct: Option<f64>,
    /// Cases that could not run.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result of one case.
#[derive(Debug, Serialize)]
pub struct Case {
    /// Name of the fault.
    pub name: &'static str,
    /// True if the controller was running.
    pub controller: bool,
    /// Longest outage in either direction, in milliseconds.
    pub outage_ms: f64,
    /// True if the TCP connection survived.
    pub tcp_survived: bool,
    /// True if the kernel notifies the agent of this fault.
    pub notified: bool,
}

/// Limit for an outage that the kernel does not notify the agent of, in milliseconds.
const OUTAGE_MS: f64 = 3_000.0;
/// Limit for an outage that the kernel notifies the agent of, in milliseconds.
const NOTIFIED_MS: f64 = 1_000.0;
/// Lower bound of [`Failover::relay_vs_direct`].
const RELAY_VS_DIRECT: f64 = 0.6;
/// Duration of the traffic before a fault.
const BEFORE: Duration = Duration::from_secs(1);
/// Duration of the traffic after a fault.
const AFTER: Duration = Duration::from_secs(6);
/// Limit for the expected path to come back between two cases.
const MEND: Duration = Duration::from_secs(20);
/// Size of a throughput measurement in each direction, in bytes.
const TRANSFER: u64 = 32 << 20;
/// Name of the nftables table that drops packets on a router.
const CUT: &str = "cut";

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Failover> {
    let mut figures = Failover { rootless: setting.rank == Rank::Rootless, ..Failover::default() };
    let mut world = World::build(setting)?;
    figures.failed = Promises::broken_by(|promises| figures.measure(setting, &mut world, promises));
    Ok(figures)
}

/// Hosts and programs of the scenario. Fields are dropped in this order: processes, hosts, lab.
struct World {
    /// The nodes a, b, c and d, in this order.
    nodes: Vec<Node>,
    relays: Vec<Node>,
    controller: Controller,
    routers: Vec<Router>,
    /// Current public IPv4 addresses of the two routers of `a`.
    addresses: [Ipv4Addr; 2],
    _lab: Lab,
}

impl World {
    /// Builds the hosts, joins and starts all nodes, and waits until each has the map.
    fn build(setting: &Setting) -> anyhow::Result<Self> {
        setting.output.step("building two uplinks, five routers and two relays");
        let mut lab = Lab::new(setting.rank)?;
        let host = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
        let mut relay_hosts = Vec::new();
        for number in [3, 4] {
            let (v4, v6) = (format!("203.0.113.{number}"), format!("2001:db8::{number}"));
            relay_hosts.push(lab.host(&format!("relay{number}")).public(&v4, &v6)?.build()?);
        }
        let mut routers = Vec::new();
        for (number, nat) in [
            (11, Nat::Masquerade),
            (12, Nat::Masquerade),
            (13, Nat::Masquerade),
            (14, Nat::SymmetricRandom),
            (15, Nat::SymmetricRandom),
        ] {
            routers.push(
                lab.router(&format!("r{number}"))
                    .public_number(number)?
                    .lan_number(number)?
                    .nat(nat)
                    .build()?,
            );
        }
        let hosts = [("a", vec![0, 1]), ("b", vec![2]), ("c", vec![3]), ("d", vec![4])];
        let mut built = Vec::new();
        for (name, behind) in hosts {
            let mut builder = lab.host(name).only(Family::V4);
            for router in behind {
                builder = builder.behind(&routers[router]);
            }
            built.push((name.to_owned(), builder.build()?, ""));
        }
        setting.output.step("starting the controller, joining six nodes");
        let controller = Controller::start(&lab, &host, &setting.binaries)?;
        let relays = relay_hosts.into_iter().map(|host| {
            let name = host.name().to_owned();
            // What is measured is the relay, not its budget for a node.
            (name, host, "[relay]\nenabled = true\nmegabits_per_node = 100000\n")
        });
        let mut nodes = Vec::new();
        for (number, (name, host, more)) in relays.chain(built).enumerate() {
            let mut node = Node::new(&lab, &Arc::clone(&host), &name, &setting.binaries, more)?;
            let site = format!("site-{number}");
            let token = controller.operator().token_with(&["--site", &site, "--relay"])?;
            node.join(&token)?;
            node.restart()?;
            nodes.push(node);
        }
        let others = nodes.len() - 1;
        for node in &nodes {
            wait_for("complete map on every node", START_LIMIT, || {
                Ok((node.peers()?.len() == others).then_some(()))
            })?;
        }
        let relays = nodes.drain(..2).collect();
        let addresses = [11, 12].map(|number| Ipv4Addr::new(203, 0, 113, number));
        Ok(Self { nodes, relays, controller, routers, addresses, _lab: lab })
    }

    /// Returns the namespace and the IPv4 mesh address of a node.
    fn end(&self, number: usize) -> anyhow::Result<End<'_>> {
        let node = &self.nodes[number];
        Ok((node.host().namespace(), node.overlay_v4()?))
    }

    /// Returns the namespace of a router.
    fn router(&self, number: usize) -> &Namespace {
        self.routers[number].host().namespace()
    }

    /// Returns the index of the uplink of `a` that `b` sends to.
    fn used(&self) -> anyhow::Result<usize> {
        let path = self.nodes[1].peer("a")?.and_then(|peer| peer.path);
        let path: SocketAddr = path.context("b has no path to a")?.parse()?;
        let used = self.addresses.iter().position(|address| IpAddr::V4(*address) == path.ip());
        used.with_context(|| format!("{path} is not a router of a"))
    }

    /// Breaks the path that is in use. `name` is one of [`CASES`].
    fn break_it(&mut self, name: &str) -> anyhow::Result<()> {
        let there = IpNet::from(IpAddr::from([203, 0, 113, 13]));
        let udp = |rule: Rule| rule.protocol(libc::IPPROTO_UDP as u8).drop();
        let used = if name == "relay_kill" { 0 } else { self.used()? };
        match name {
            "nat_flush" => self.router(used).run(forget_connections),
            "drop_in" => self.cut(used, Hook::Prerouting, udp(Rule::new().source(there))),
            "drop_out" => self.cut(used, Hook::Postrouting, udp(Rule::new().destination(there))),
            "nat_readdress" => {
                let before = self.addresses[used];
                let octets = before.octets();
                let after = Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3] + 50);
                self.addresses[used] = after;
                self.readdress(used, before, after)
            }
            "uplink_switch" => self.nodes[0].host().namespace().run(|| {
                let mut netlink = Rtnetlink::open()?;
                let link = netlink.link_index(&format!("eth{used}"))?;
                Ok(netlink.set_up(link, false)?)
            }),
            "relay_kill" => {
                let used = self.nodes[2].peer("d")?.and_then(|peer| peer.relay);
                let used = used.ok_or_else(|| anyhow!("no relay is in use between c and d"))?;
                let relay = self.relays.iter_mut().find(|relay| relay.name() == used);
                relay.with_context(|| format!("there is no relay {used}"))?.agent()?.kill()
            }
            other => Err(anyhow!("unknown fault {other}")),
        }
    }

    /// Repairs what [`Self::break_it`] has broken.
    fn repair(&mut self, name: &str) -> anyhow::Result<()> {
        match name {
            "drop_in" | "drop_out" => [0, 1].into_iter().try_for_each(|router| {
                self.router(router).run(|| {
                    Nft::open()?.delete(TableFamily::Inet, CUT)?;
                    Ok(())
                })
            }),
            "uplink_switch" => self.nodes[0].host().namespace().run(|| {
                let mut netlink = Rtnetlink::open()?;
                for uplink in 0..2u8 {
                    let link = netlink
                        .link(&format!("eth{uplink}"))?
                        .context("the link does not exist")?;
                    if link.up {
                        continue;
                    }
                    netlink.set_up(link.index, true)?;
                    let gateway = Ipv4Addr::new(192, 168, 11 + uplink, 1).into();
                    let route = Route::new(IpNet::V4(Ipv4Net::default())).via(gateway);
                    let metric = 100 + u32::from(uplink);
                    netlink.add_route(&route.dev(link.index).metric(metric))?;
                }
                Ok(())
            }),
            "relay_kill" => {
                for relay in &mut self.relays {
                    if relay.agent()?.check().is_err() {
                        relay.restart()?;
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Drops packets on a router.
    fn cut(&self, router: usize, hook: Hook, rule: Rule) -> anyhow::Result<()> {
        /// Priority before connection tracking and NAT, so that packets of existing connections are
        /// dropped too.
        const FIRST: i32 = -400;
        let chain = Chain::base(ChainKind::Filter, hook, FIRST).rule(rule);
        self.router(router).run(|| {
            Nft::open()?.load(&Table::new(TableFamily::Inet, CUT).chain("cut", chain))?;
            Ok(())
        })
    }

    /// Changes the public address of a router.
    fn readdress(&self, router: usize, before: Ipv4Addr, after: Ipv4Addr) -> anyhow::Result<()> {
        let router = self.router(router);
        // With this setting, routes remain when the primary address is removed.
        router.sysctl("net.ipv4.conf.all.promote_secondaries", "1")?;
        router.run(|| {
            let mut netlink = Rtnetlink::open()?;
            let link = netlink.link_index("eth0")?;
            let net = |address: Ipv4Addr| IpNet::new_assert(address.into(), 24);
            netlink.add_address(link, net(after), AddressOptions::default())?;
            Ok(netlink.delete_address(link, net(before))?)
        })
    }
}

/// Name of the fault, indexes of the two nodes, and whether the kernel notifies the agent.
const CASES: [(&str, [usize; 2], bool); 6] = [
    ("nat_flush", [0, 1], false),
    ("drop_in", [0, 1], false),
    ("drop_out", [0, 1], false),
    ("nat_readdress", [0, 1], false),
    ("uplink_switch", [0, 1], true),
    ("relay_kill", [2, 3], false),
];

impl Failover {
    /// Compares the throughput, then runs all cases with the controller and without it.
    fn measure(
        &mut self,
        setting: &Setting,
        world: &mut World,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        setting.output.step("measuring the throughput of a relay and of a direct path");
        match compare(world) {
            Ok(ratio) => {
                self.relay_vs_direct = Some(round(ratio));
                promises.hold(ratio >= RELAY_VS_DIRECT, || {
                    format!("relay_vs_direct at least {RELAY_VS_DIRECT}: {}", round(ratio))
                });
            }
            Err(error) => promises.fail(format!("relay_vs_direct: {error:#}")),
        }
        for controller in [true, false] {
            if !controller {
                drop(world.controller.take_daemon());
            }
            for (name, ends, notified) in CASES {
                let label =
                    format!("{name}, controller {}", if controller { "running" } else { "down" });
                setting.output.step(&label);
                match case(world, name, ends) {
                    Ok((outage_ms, tcp_survived)) => {
                        setting
                            .output
                            .step(&format!("{label}: {outage_ms} ms, TCP {tcp_survived}"));
                        let limit = if notified { NOTIFIED_MS } else { OUTAGE_MS };
                        promises.hold(outage_ms < limit, || {
                            format!("{label}: outage below {limit} ms: {outage_ms}")
                        });
                        promises.hold(tcp_survived, || format!("{label}: TCP survives"));
                        self.cases.push(Case {
                            name,
                            controller,
                            outage_ms,
                            tcp_survived,
                            notified,
                        });
                    }
                    Err(error) => {
                        promises.fail(format!("{label}: {error:#}"));
                        let why = format!("{error:#}");
                        self.skipped.push(Skipped { name: label, why });
                    }
                }
                world.repair(name)?;
            }
        }
        Ok(())
    }
}

/// Runs a case. Returns the outage in milliseconds, and whether TCP survived.
fn case(world: &mut World, name: &str, ends: [usize; 2]) -> anyhow::Result<(f64, bool)> {
    let wanted = if ends == [0, 1] { "direct" } else { "relay" };
    let [a, b] = [world.end(ends[0])?, world.end(ends[1])?].map(|(_, address)| address);
    let hosts = ends.map(|end| Arc::clone(world.nodes[end].host()));
    let [here, there] = &hosts;
    let send_traffic = |world: &mut World| {
        let peer = world.nodes[ends[1]].name().to_owned();
        while_talking((here.namespace(), a), (there.namespace(), b), || {
            wait_up_to(MEND, || {
                let kind = world.nodes[ends[0]].peer(&peer)?.and_then(|peer| peer.path_kind);
                Ok((kind.as_deref() == Some(wanted)).then_some(()))
            })?
            .with_context(|| format!("no {wanted} path before the fault"))
        })
    };
    // The time to establish the first path does not count as an outage.
    send_traffic(world)?;
    let ((), seen) = while_talking((here.namespace(), a), (there.namespace(), b), || {
        sleep(BEFORE)?;
        world.break_it(name)?;
        Ok(sleep(AFTER)?)
    })?;
    Ok((round(seen.outage.as_secs_f64() * 1000.0), seen.tcp_survived))
}

/// Returns the throughput over a relay divided by that over a direct path.
fn compare(world: &World) -> anyhow::Result<f64> {
    let pattern = Pattern::random()?;
    let mut rates = Vec::new();
    for (ends, wanted) in [([0, 1], "direct"), ([2, 3], "relay")] {
        let (a, b) = (world.end(ends[0])?, world.end(ends[1])?);
        let peer = world.nodes[ends[1]].name();
        while_talking(a, b, || {
            wait_for(&format!("{wanted} path to {peer}"), MEND, || {
                let kind = world.nodes[ends[0]].peer(peer)?.and_then(|peer| peer.path_kind);
                Ok((kind.as_deref() == Some(wanted)).then_some(()))
            })
        })?;
        let both = tcp_both_ways(a.0, b.0, b.1, TRANSFER, pattern, |_| {})?;
        let mean = both.iter().map(|way| way.mbit_per_s()).sum::<f64>() / 2.0;
        rates.push(mean);
    }
    Ok(rates[1] / rates[0].max(1e-9))
}

impl Figures for Failover {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for case in &self.cases {
            let controller = if case.controller { "running" } else { "down" };
            let tcp = if case.tcp_survived { "survived" } else { "lost" };
            let _ = writeln!(
                text,
                "{} (controller {controller}): outage of {} ms, TCP {tcp}",
                case.name, case.outage_ms
            );
        }
        let ratio = self.relay_vs_direct.map_or("-".to_owned(), |ratio| ratio.to_string());
        let _ = write!(text, "relay to direct: {ratio}");
        text
    }
}
