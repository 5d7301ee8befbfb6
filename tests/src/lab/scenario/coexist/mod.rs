//! `cargo lab coexist`: runs what other programs on a worker do to its network, over netlink and
//! with the real programs that this machine has. State that Towline created must be restored within
//! a second, no packet of the mesh may leave in clear meanwhile, and state of other programs must
//! not change.

mod actions;
mod checks;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use ipnet::{Ipv4Net, Ipv6Net};
use serde::Serialize;
use towline_netlink::{Family, Route, Rtnetlink, Rule, RuleAction};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Table, TableFamily};

use super::Setting;
use super::hybrid::{Hybrid, Mesh};
use crate::lab::background_traffic::{BackgroundTraffic, Member, StopOnDrop};
use crate::lab::interrupt::{wait_for, wait_up_to};
use crate::lab::mesh::{Node, START_LIMIT, require_tunnel};
use crate::lab::namespace::join;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, Skipped, round};
use crate::lab::tamper::LINK;
use crate::lab::topology::Host;
use crate::lab::traffic::{Pattern, tcp_both_ways};
use actions::Action;
use checks::Watcher;

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Coexist {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Actions that ran, in order.
    pub acts: Vec<ActionFigure>,
    /// Actions that could not run on this machine.
    pub skipped: Vec<Skipped>,
    /// Number of objects of other programs that changed after an action.
    pub foreign_changes: usize,
    /// Number of frames with inner payload or inner addresses in clear, on all uplinks.
    pub plaintext_packets: u64,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result of one action.
#[derive(Debug, Clone, Serialize)]
pub struct ActionFigure {
    /// Name of the action.
    pub name: String,
    /// Longest time in milliseconds in which state that Towline created was missing or wrong. 0 if
    /// it always was complete.
    pub restored_ms: f64,
}

/// Limit for state to be restored, in milliseconds.
const RESTORED_MS: f64 = 1_000.0;
/// Time to wait for state to be restored. Longer than the limit, so that a late restoration is
/// measured too.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Limit for sessions to be established again after an action, for example after the link was
/// deleted.
const FLOWS_LIMIT: Duration = Duration::from_secs(10);
/// Index of worker-a in the list of nodes.
const VICTIM: usize = 1;
/// Networks of the victim's pods, which are not announced.
const POD: (Ipv4Net, Ipv6Net) = (
    Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 2, 0), 24),
    Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0x244, 2, 0, 0, 0, 0), 64),
);
/// Number of the routing table of another program.
const THEIR_TABLE: u32 = 77;

/// Command line options of the scenario.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Run only the cases that need no program of the host.
    #[arg(long)]
    pub netlink: bool,
}

/// Runs the scenario.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Coexist> {
    let hybrid = Hybrid::build(setting)?;
    let mut coexist = Coexist { rootless: setting.rank == Rank::Rootless, ..Coexist::default() };
    coexist.failed =
        Promises::broken_by(|promises| coexist.play(setting, options.netlink, &hybrid, promises));
    Ok(coexist)
}

impl Coexist {
    /// Starts the mesh, the traffic and the captures, and runs the actions.
    fn play(
        &mut self,
        setting: &Setting,
        netlink: bool,
        hybrid: &Hybrid,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let pattern = Pattern::random()?;
        let captures = hybrid.capture_uplinks(pattern)?;
        let (v4, v6) = POD;
        let pod = hybrid.workers[0].pod("pod", v4, v6)?;
        let Mesh { controller: _controller, mut nodes } = hybrid.bring_up(setting)?;
        for worker in &nodes[1..] {
            require_tunnel(worker, &nodes[0], START_LIMIT)?;
        }
        let hosts: Vec<_> = nodes.iter().map(|node| std::sync::Arc::clone(node.host())).collect();
        let members = nodes.iter().zip(&hosts).map(|(node, host)| {
            Ok(Member::new(host.namespace(), node.status()?.overlay_addresses))
        });
        let members = members.collect::<anyhow::Result<_>>()?;
        let addresses = nodes[0].status()?.overlay_addresses;
        let forwarded = Forwarded { pod, to: &hosts[0], addresses, pattern };
        let background_traffic =
            BackgroundTraffic::new(members, pattern, crate::lab::traffic::random_bytes()?);
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&background_traffic);
            let mut threads = background_traffic.listen(scope)?;
            threads.extend(background_traffic.send_all(scope)?);
            let victim = &mut nodes[VICTIM];
            let acted = self.run_actions(
                setting,
                netlink,
                victim,
                &background_traffic,
                &forwarded,
                promises,
            );
            background_traffic.stop();
            for thread in threads {
                join(thread)?;
            }
            acted
        })?;
        for capture in captures {
            let seen = capture.stop()?;
            self.plaintext_packets += seen.in_clear();
            promises.hold(seen.missed == 0, || {
                format!("all frames are captured: {} were missed", seen.missed)
            });
            promises.hold(seen.wireguard > 0, || {
                "each capture sees WireGuard frames: one saw none".to_owned()
            });
        }
        promises.hold(self.plaintext_packets == 0, || {
            format!("no packet leaves in clear: {} did", self.plaintext_packets)
        });
        promises.hold(self.foreign_changes == 0, || {
            format!("state of other programs does not change: {} changes", self.foreign_changes)
        });
        Ok(())
    }

    /// Runs the actions one after another, and checks the state of the victim after each.
    fn run_actions(
        &mut self,
        setting: &Setting,
        netlink: bool,
        victim: &mut Node,
        background_traffic: &BackgroundTraffic<'_>,
        forwarded: &Forwarded<'_>,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let host = std::sync::Arc::clone(victim.host());
        let namespace = host.namespace();
        namespace.run(make_foreign_things)?;
        let whole = wait_for("calm", TIMEOUT, || {
            let states = [namespace.run(checks::ours)?, namespace.run(checks::ours)?];
            Ok((states[0] == states[1]).then_some(states[0].clone()))
        })?;
        for action in Action::all().into_iter().filter(|action| !netlink || action.is_netlink()) {
            if let Some(why) = action.obstacle() {
                self.skipped.push(Skipped { name: action.name().to_owned(), why });
                continue;
            }
            setting.output.step(action.name());
            namespace.run(make_foreign_things)?;
            let stop = AtomicBool::new(false);
            let watcher = Watcher::new(&whole);
            let (done, after) = std::thread::scope(|scope| {
                let watching = namespace.thread(scope, "watch", || watcher.run(&stop))?;
                let done = action.run(namespace);
                let after = namespace.run(checks::theirs);
                let acted = Instant::now();
                let back = wait_up_to(TIMEOUT, || Ok(watcher.whole_since(acted).then_some(())));
                stop.store(true, Ordering::Relaxed);
                join(watching)?;
                anyhow::Ok((done.and(back), after?))
            })?;
            match done {
                Err(error) => {
                    self.skipped.push(Skipped {
                        name: action.name().to_owned(),
                        why: format!("the action failed: {error:#}"),
                    });
                    continue;
                }
                Ok(None) => promises.fail(format!(
                    "state is restored after `{}`: after {} s still {}",
                    action.name(),
                    TIMEOUT.as_secs(),
                    watcher.difference()
                )),
                Ok(Some(())) => {}
            }
            let longest = round(watcher.longest().as_secs_f64() * 1e3);
            promises.hold(longest <= RESTORED_MS, || {
                format!(
                    "state is restored within {RESTORED_MS} ms after `{}`: {longest} ms",
                    action.name()
                )
            });
            self.acts.push(ActionFigure { name: action.name().to_owned(), restored_ms: longest });
            let now = namespace.run(checks::theirs)?;
            self.foreign(action.name(), &after, &now, promises);
            victim.agent()?.check().context(action.name())?;
            if action.drops_forwarded()
                && let Err(error) = forwarded.connect()
            {
                promises.fail(format!(
                    "a forwarded connection passes after `{}`: {error:#}",
                    action.name()
                ));
            }
            if let Err(received) = flows(background_traffic, VICTIM, FLOWS_LIMIT)? {
                promises.fail(format!(
                    "traffic flows after `{}` within {} s: {received} datagrams",
                    action.name(),
                    FLOWS_LIMIT.as_secs()
                ));
            }
        }
        Ok(())
    }

    /// Compares the state of other programs right after an action with that after the restoration.
    fn foreign(
        &mut self,
        action: &str,
        left: &BTreeSet<String>,
        now: &BTreeSet<String>,
        promises: &mut Promises,
    ) {
        for change in left.symmetric_difference(now) {
            self.foreign_changes += 1;
            let what = if now.contains(change) { "new" } else { "gone" };
            promises.fail(format!("state of other programs after `{action}`, {what}: {change}"));
        }
    }
}

/// Forwarded connections: from a pod of the victim to another node. The victim masquerades them,
/// because the pod network is not announced.
struct Forwarded<'a> {
    pod: Host,
    to: &'a Host,
    addresses: Vec<IpAddr>,
    pattern: Pattern,
}

impl Forwarded<'_> {
    /// Transfers data in both directions over both address families.
    fn connect(&self) -> anyhow::Result<()> {
        const BYTES: u64 = 256 << 10;
        let (from, to) = (self.pod.namespace(), self.to.namespace());
        for address in &self.addresses {
            tcp_both_ways(from, to, *address, BYTES, self.pattern, |_| ())?;
        }
        Ok(())
    }
}

/// Waits until datagrams of both address families arrive at a member. Otherwise returns the numbers
/// that arrived.
fn flows(
    background_traffic: &BackgroundTraffic<'_>,
    member: usize,
    limit: Duration,
) -> anyhow::Result<Result<(), String>> {
    let received = || background_traffic.members()[member].received();
    let before = received();
    let found = wait_up_to(limit, || {
        let more = received().iter().zip(before).all(|(now, then)| *now > then);
        Ok(more.then_some(()))
    })?;
    let [v4, v6] = received();
    Ok(found.ok_or_else(|| format!("{} by IPv4, {} by IPv6", v4 - before[0], v6 - before[1])))
}

/// Creates a policy rule, a routing table and an nftables table of another program. Existing ones
/// are kept.
fn make_foreign_things() -> anyhow::Result<()> {
    let mut netlink = Rtnetlink::open()?;
    let link = netlink.link_index("eth0")?;
    for (family, network) in [(Family::V4, "10.77.0.0/16"), (Family::V6, "2001:db8:77::/64")] {
        let route = Route::new(network.parse()?).dev(link).table(THEIR_TABLE);
        netlink.replace_route(&route)?;
        let rule = Rule::new(family, THEIR_TABLE, RuleAction::Table(THEIR_TABLE));
        if !netlink.rules(family)?.contains(&rule) {
            netlink.add_rule(&rule)?;
        }
    }
    let input = Chain::base(ChainKind::Filter, Hook::Input, 0)
        .rule(towline_nftables::Rule::new().counter());
    // kube-proxy masquerades packets from pods to a node in the same way.
    let (v4, v6) = POD;
    let masquerade = |net| towline_nftables::Rule::new().source(net).output(LINK).masquerade();
    let pods = Chain::base(ChainKind::Nat, Hook::Postrouting, 100)
        .rule(masquerade(v4.trunc().into()))
        .rule(masquerade(v6.trunc().into()));
    let table = Table::new(TableFamily::Inet, "theirs").chain("input", input).chain("pods", pods);
    Nft::open()?.load(&table)?;
    Ok(())
}

impl Figures for Coexist {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for action in &self.acts {
            let _ = writeln!(text, "  {:8} ms  {}", action.restored_ms, action.name);
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "{skipped}");
        }
        let _ = write!(
            text,
            "{} changes of other programs' state, {} packets in clear",
            self.foreign_changes, self.plaintext_packets
        );
        text
    }
}
