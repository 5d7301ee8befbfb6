//! `cargo lab plan`: measures the time and netlink messages to apply a host's network plan for a
//! mesh of 1,000 peers with 5,000 prefixes: the whole plan, and a single change.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::Context;
use ipnet::IpNet;
use serde::Serialize;
use towline_core::plan::{Plan, RoutePlan, RouteVia};
use towline_dataplane::open_tun;
use towline_fixtures::agent;
use towline_host::{HostNetwork, Names};
use towline_netlink::Rtnetlink;

use crate::lab::interrupt;
use crate::lab::namespace::Namespace;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, round};
use crate::lab::tamper::{LINK, Tampering};

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct PlanFigures {
    /// True if the lab ran in a user namespace, without root rights on this machine. The kernel
    /// then limits the socket buffers.
    pub rootless: bool,
    /// Number of peers in the large mesh.
    pub peers: u32,
    /// Number of prefixes that are reached through these peers.
    pub prefixes: usize,
    /// Median time to apply the whole plan to a host without any state, in milliseconds.
    pub full_ms: f64,
    /// Number of netlink messages for the whole plan.
    pub full_messages: usize,
    /// Median time to add or remove one prefix, in milliseconds.
    pub change_ms: f64,
    /// Largest number of netlink messages for one prefix.
    pub change_messages: usize,
    /// Largest number of netlink messages for one prefix, in a mesh of a tenth of the size.
    pub change_messages_small: usize,
    /// Median time to read the host's state when it already matches the plan, in milliseconds.
    pub read_ms: f64,
    /// Median time to read the state and restore all routes after another program flushed them, in
    /// milliseconds.
    pub put_back_ms: f64,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Number of peers in the large mesh.
const PEERS: u32 = 1_000;
/// Upper bound of [`PlanFigures::full_ms`].
const FULL_MS: f64 = 500.0;
/// Upper bound of [`PlanFigures::change_ms`].
const CHANGE_MS: f64 = 5.0;
/// Number of measurements of the whole plan, of reading, and of restoring.
const FULL_ROUNDS: usize = 5;
/// Number of added and removed prefixes that are measured.
const CHANGE_ROUNDS: usize = 25;

/// Command line options of the scenario.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Measure with this program itself instead of a release build.
    #[arg(long, hide = true)]
    pub here: bool,
}

/// Runs the scenario and returns its results.
pub fn run(rank: Rank) -> anyhow::Result<PlanFigures> {
    let mut figures = PlanFigures { rootless: rank == Rank::Rootless, ..Default::default() };
    figures.failed = Promises::broken_by(|promises| figures.measure(promises));
    Ok(figures)
}

impl PlanFigures {
    /// Measures a large and a small mesh, and checks the promises.
    fn measure(&mut self, promises: &mut Promises) -> anyhow::Result<()> {
        let small = Mesh::new(PEERS / 10).measure()?;
        let mesh = Mesh::new(PEERS);
        let large = mesh.measure()?;
        self.peers = PEERS;
        self.prefixes = mesh.prefixes();
        self.full_ms = milliseconds(large.full);
        self.full_messages = large.full_messages;
        self.change_ms = milliseconds(large.change);
        self.change_messages = large.change_messages;
        self.change_messages_small = small.change_messages;
        self.read_ms = milliseconds(large.read);
        self.put_back_ms = milliseconds(large.restore);
        promises.hold(self.full_ms < FULL_MS, || {
            format!("the whole plan is applied within {FULL_MS} ms: {} ms", self.full_ms)
        });
        promises.hold(self.change_ms < CHANGE_MS, || {
            format!("one change is applied within {CHANGE_MS} ms: {} ms", self.change_ms)
        });
        promises.hold(self.change_messages <= self.change_messages_small, || {
            format!(
                "a change needs no more messages in a larger mesh: {} with {} peers, {} with {PEERS}",
                self.change_messages_small,
                PEERS / 10,
                self.change_messages
            )
        });
        Ok(())
    }
}

/// Median times and message counts for one mesh.
struct Cost {
    full: Duration,
    full_messages: usize,
    change: Duration,
    change_messages: usize,
    read: Duration,
    restore: Duration,
}

/// A host's plan for a mesh. Each peer holds its mesh addresses, a node IP, and a pod network of
/// each family. The mesh guards the mesh addresses and the pod ranges. Each node IP is guarded
/// separately.
struct Mesh {
    plan: Plan,
}

impl Mesh {
    fn new(peers: u32) -> Self {
        let own = [v4([198, 18, 0, 1]), v6(0xfd00, 1)];
        let guards = [
            net(v4([198, 18, 0, 0]), 15),
            net(v6(0xfd00, 0), 64),
            net(v4([10, 0, 0, 0]), 8),
            net(v6(0xfd01, 0), 32),
        ];
        let mut routes = BTreeMap::new();
        let mut guarded: std::collections::BTreeSet<_> = guards.into();
        for peer in 2..peers + 2 {
            let [.., high, low] = peer.to_be_bytes();
            let node = net(v4([172, 16, high, low]), 32);
            guarded.insert(node);
            let pods6 = Ipv6Addr::new(0xfd01, 0, high.into(), low.into(), 0, 0, 0, 0);
            for held in [
                net(v4([198, 18, high, low]), 32),
                net(v6(0xfd00, peer.into()), 128),
                node,
                net(v4([10, high, low, 0]), 24),
                net(pods6.into(), 64),
            ] {
                let source = own[usize::from(held.addr().is_ipv6())];
                let attributes = RoutePlan { source: Some(source), mtu: None };
                routes.insert((held, RouteVia::Link), attributes);
            }
        }
        for guard in &guarded {
            routes.insert((*guard, RouteVia::Unreachable), RoutePlan::default());
        }
        let mut plan = Plan { routes, ..agent::plan() };
        plan.link.addresses = own.map(IpNet::from).into();
        plan.firewall.guarded = guarded;
        Self { plan }
    }

    /// Returns the number of prefixes that are reached through the peers.
    fn prefixes(&self) -> usize {
        self.plan.routes.keys().filter(|(_, via)| *via == RouteVia::Link).count()
    }

    /// Measures the costs in a new network namespace.
    fn measure(&self) -> anyhow::Result<Cost> {
        let namespace = Namespace::new("plan")?;
        namespace.run(|| {
            let mut netlink = Rtnetlink::open()?;
            let loopback = netlink.link_index("lo")?;
            netlink.set_up(loopback, true)?;
            self.measure_here()
        })
    }

    /// Measures the costs in the calling thread's namespace.
    fn measure_here(&self) -> anyhow::Result<Cost> {
        let mut host = HostNetwork::open()?;
        let names = Names::of(&self.plan);
        let mut full = Vec::new();
        let mut full_messages = 0;
        for _ in 0..FULL_ROUNDS {
            interrupt::check()?;
            host.remove(&names)?;
            // In the product, the data plane creates the link.
            let _tunnel = open_tun(LINK)?;
            let (took, messages) = apply(&mut host, &self.plan)?;
            full.push(took);
            full_messages = messages;
        }
        let _tunnel = open_tun(LINK)?;
        let mut change = Vec::new();
        let mut change_messages = 0;
        for round in 0..CHANGE_ROUNDS {
            interrupt::check()?;
            // A node IP needs a route, its guard, and an element of an nftables set.
            let node = net(v4([172, 31, 0, round as u8]), 32);
            let mut more = self.plan.clone();
            more.routes.insert((node, RouteVia::Link), RoutePlan::default());
            more.routes.insert((node, RouteVia::Unreachable), RoutePlan::default());
            more.firewall.guarded.insert(node);
            for plan in [&more, &self.plan] {
                let (took, messages) = apply(&mut host, plan)?;
                change.push(took);
                change_messages = change_messages.max(messages);
            }
        }
        let mut read = Vec::new();
        let mut restore = Vec::new();
        for _ in 0..FULL_ROUNDS {
            interrupt::check()?;
            host.invalidate();
            let (took, messages) = apply(&mut host, &self.plan)?;
            anyhow::ensure!(
                messages == 0,
                "the state matches the plan, but {messages} messages were sent"
            );
            read.push(took);
            Tampering::FlushRoutes.apply()?;
            host.invalidate();
            restore.push(apply(&mut host, &self.plan)?.0);
        }
        host.remove(&names)?;
        Ok(Cost {
            full: median(full),
            full_messages,
            change: median(change),
            change_messages,
            read: median(read),
            restore: median(restore),
        })
    }
}

/// Applies the plan. Returns the time it took and the number of netlink messages.
fn apply(host: &mut HostNetwork, plan: &Plan) -> anyhow::Result<(Duration, usize)> {
    let begun = Instant::now();
    let changes = host.apply(plan)?;
    let took = begun.elapsed();
    match changes.problems.first() {
        Some(problem) => Err(anyhow::anyhow!("{problem}")).context("cannot apply the plan"),
        None => Ok((took, changes.messages)),
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn milliseconds(duration: Duration) -> f64 {
    round(duration.as_secs_f64() * 1e3)
}

fn net(address: IpAddr, length: u8) -> IpNet {
    IpNet::new_assert(address, length)
}

fn v4(octets: [u8; 4]) -> IpAddr {
    Ipv4Addr::from(octets).into()
}

fn v6(first: u16, last: u128) -> IpAddr {
    Ipv6Addr::from_bits(u128::from(first) << 112 | last).into()
}

impl Figures for PlanFigures {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "{} peers, {} prefixes", self.peers, self.prefixes);
        let _ =
            writeln!(text, "  whole plan   {} ms, {} messages", self.full_ms, self.full_messages);
        let _ = writeln!(
            text,
            "  one change   {} ms, {} messages ({} with a tenth of the peers)",
            self.change_ms, self.change_messages, self.change_messages_small
        );
        let _ = writeln!(text, "  reading      {} ms", self.read_ms);
        let _ = write!(text, "  restoring    {} ms", self.put_back_ms);
        text
    }
}
