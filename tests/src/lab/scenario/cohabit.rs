//! `cargo lab cohabit`: co-tenants of a worker do what they do, by netlink and by the real programs where
//! this machine has them. What is ours is back within a second, no clear packet leaves meanwhile, and what is
//! theirs stays as they left it.

mod deeds;
mod looks;

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
use crate::lab::chatter::{Chatter, Member, StopOnDrop};
use crate::lab::interrupt::{wait_for, wait_up_to};
use crate::lab::meddle::LINK;
use crate::lab::mesh::{Node, START_LIMIT, await_tunnel};
use crate::lab::namespace::join;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, round};
use crate::lab::topology::Host;
use crate::lab::traffic::{Pattern, tcp_both_ways};
use deeds::Deed;
use looks::Watcher;

/// What was done, and how long something of ours was missing.
#[derive(Debug, Default, Serialize)]
pub struct Cohabit {
    /// The lab ran without root's rights over the machine.
    pub rootless: bool,
    /// One by one.
    pub acts: Vec<ActFigure>,
    /// What could not run here.
    pub skipped: Vec<Skipped>,
    /// Things of others that were not as their owners left them.
    pub foreign_changes: usize,
    /// Frames with inner payload or inner addresses, on any uplink.
    pub plaintext_packets: u64,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// One act.
#[derive(Debug, Clone, Serialize)]
pub struct ActFigure {
    /// What was done.
    pub name: String,
    /// The longest time that anything of ours was not as it should be; 0: it never was.
    pub restored_ms: f64,
}

/// An act that could not run.
#[derive(Debug, Clone, Serialize)]
pub struct Skipped {
    /// Which.
    pub name: String,
    /// Why.
    pub why: String,
}

const RESTORED_MS: f64 = 1_000.0;
/// How long a restoration is waited for, to say how late it was.
const PATIENCE: Duration = Duration::from_secs(5);
/// Sessions that a deleted link took along are made anew within this.
const FLOWS_LIMIT: Duration = Duration::from_secs(10);
/// worker-a among the nodes.
const VICTIM: usize = 1;
/// Of the victim's pods.
const POD: (Ipv4Net, Ipv6Net) = (
    Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 2, 0), 24),
    Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0x244, 2, 0, 0, 0, 0), 64),
);
/// The routing table of somebody else.
const THEIR_TABLE: u32 = 77;

/// Runs it; with `netlink`, only what needs no program.
pub fn run(setting: &Setting, netlink: bool) -> anyhow::Result<Cohabit> {
    let hybrid = Hybrid::build(setting)?;
    let mut cohabit = Cohabit { rootless: setting.rank == Rank::Rootless, ..Cohabit::default() };
    let mut promises = Promises::new();
    if let Err(error) = cohabit.play(setting, netlink, &hybrid, &mut promises) {
        promises.fail(format!("{error:#}"));
    }
    cohabit.failed = promises.into_failed();
    Ok(cohabit)
}

impl Cohabit {
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
            if let Some(reason) = await_tunnel(worker, &nodes[0], START_LIMIT)? {
                anyhow::bail!("tunnel {}/cp is not up: {reason}", worker.name());
            }
        }
        let hosts: Vec<_> = nodes.iter().map(|node| std::sync::Arc::clone(node.host())).collect();
        let members = nodes.iter().zip(&hosts).map(|(node, host)| {
            Ok(Member::new(host.namespace(), node.status()?.overlay_addresses))
        });
        let members = members.collect::<anyhow::Result<_>>()?;
        let addresses = nodes[0].status()?.overlay_addresses;
        let forwarded = Forwarded { pod, to: &hosts[0], addresses, pattern };
        let chatter = Chatter::new(members, pattern, crate::lab::traffic::random_bytes()?);
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&chatter);
            let mut threads = chatter.listen(scope)?;
            threads.extend(chatter.talk(scope)?);
            let victim = &mut nodes[VICTIM];
            let acted = self.acts(setting, netlink, victim, &chatter, &forwarded, promises);
            chatter.stop();
            for thread in threads {
                join(thread)?;
            }
            acted
        })?;
        for capture in captures {
            let seen = capture.stop()?;
            self.plaintext_packets += seen.in_clear();
            promises
                .hold(seen.missed == 0, || format!("a capture misses nothing: {}", seen.missed));
            promises.hold(seen.wireguard > 0, || "the captures see the tunnels".to_owned());
        }
        promises.hold(self.plaintext_packets == 0, || {
            format!("nothing leaves in clear: {} packets", self.plaintext_packets)
        });
        promises.hold(self.foreign_changes == 0, || {
            format!("what is theirs stays as they left it: {} changes", self.foreign_changes)
        });
        Ok(())
    }

    fn acts(
        &mut self,
        setting: &Setting,
        netlink: bool,
        victim: &mut Node,
        chatter: &Chatter<'_>,
        forwarded: &Forwarded<'_>,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let host = std::sync::Arc::clone(victim.host());
        let namespace = host.namespace();
        namespace.run(make_foreign_things)?;
        let whole = wait_for("calm", PATIENCE, || {
            let looks = [namespace.run(looks::ours)?, namespace.run(looks::ours)?];
            Ok((looks[0] == looks[1]).then_some(looks[0].clone()))
        })?;
        for deed in Deed::all().into_iter().filter(|deed| !netlink || deed.is_netlink()) {
            if let Some(why) = deed.obstacle() {
                self.skipped.push(Skipped { name: deed.name().to_owned(), why });
                continue;
            }
            setting.talk.step(deed.name());
            namespace.run(make_foreign_things)?;
            let stop = AtomicBool::new(false);
            let watcher = Watcher::new(&whole);
            let (done, after) = std::thread::scope(|scope| {
                let watching = namespace.thread(scope, "watch", || watcher.run(&stop))?;
                let done = deed.act(namespace);
                let after = namespace.run(looks::theirs);
                let acted = Instant::now();
                let back = wait_up_to(PATIENCE, || Ok(watcher.whole_since(acted).then_some(())));
                stop.store(true, Ordering::Relaxed);
                join(watching)?;
                anyhow::Ok((done.and(back), after?))
            })?;
            match done {
                Err(error) => {
                    self.skipped.push(Skipped {
                        name: deed.name().to_owned(),
                        why: format!("it failed: {error:#}"),
                    });
                    continue;
                }
                Ok(None) => promises.fail(format!(
                    "restored after `{}`: after {} s still {}",
                    deed.name(),
                    PATIENCE.as_secs(),
                    watcher.difference()
                )),
                Ok(Some(())) => {}
            }
            let longest = round(watcher.longest().as_secs_f64() * 1e3);
            promises.hold(longest <= RESTORED_MS, || {
                format!("restored within {RESTORED_MS} ms after `{}`: {longest} ms", deed.name())
            });
            self.acts.push(ActFigure { name: deed.name().to_owned(), restored_ms: longest });
            let now = namespace.run(looks::theirs)?;
            self.foreign(deed.name(), &after, &now, promises);
            victim.agent()?.check().context(deed.name())?;
            if deed.drops_forwarded()
                && let Err(error) = forwarded.connect()
            {
                promises.fail(format!(
                    "a forwarded connection passes after `{}`: {error:#}",
                    deed.name()
                ));
            }
            if let Err(heard) = flows(chatter, VICTIM, FLOWS_LIMIT)? {
                promises.fail(format!(
                    "traffic after `{}` within {} s: {heard} datagrams",
                    deed.name(),
                    FLOWS_LIMIT.as_secs()
                ));
            }
        }
        Ok(())
    }

    fn foreign(
        &mut self,
        deed: &str,
        left: &BTreeSet<String>,
        now: &BTreeSet<String>,
        promises: &mut Promises,
    ) {
        for change in left.symmetric_difference(now) {
            self.foreign_changes += 1;
            let what = if now.contains(change) { "new" } else { "gone" };
            promises.fail(format!("theirs after `{deed}`, {what}: {change}"));
        }
    }
}

/// From a pod of the victim to another node, which takes it for the victim's own connection: no
/// network of pods is announced here.
struct Forwarded<'a> {
    pod: Host,
    to: &'a Host,
    addresses: Vec<IpAddr>,
    pattern: Pattern,
}

impl Forwarded<'_> {
    /// By both families.
    fn connect(&self) -> anyhow::Result<()> {
        const BYTES: u64 = 256 << 10;
        let (from, to) = (self.pod.namespace(), self.to.namespace());
        for address in &self.addresses {
            tcp_both_ways(from, to, *address, BYTES, self.pattern, |_| ())?;
        }
        Ok(())
    }
}

/// Waits until datagrams arrive at a member, by both families; else what arrived.
fn flows(
    chatter: &Chatter<'_>,
    member: usize,
    limit: Duration,
) -> anyhow::Result<Result<(), String>> {
    let heard = || chatter.members()[member].heard();
    let before = heard();
    let found = wait_up_to(limit, || {
        let more = heard().iter().zip(before).all(|(now, then)| *now > then);
        Ok(more.then_some(()))
    })?;
    let [v4, v6] = heard();
    Ok(found.ok_or_else(|| format!("{} by IPv4, {} by IPv6", v4 - before[0], v6 - before[1])))
}

/// A rule, a routing table and an nftables table of somebody else; those that are there stay.
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
    // What kube-proxy does to what pods send to a node.
    let (v4, v6) = POD;
    let masquerade = |net| towline_nftables::Rule::new().source(net).output(LINK).masquerade();
    let pods = Chain::base(ChainKind::Nat, Hook::Postrouting, 100)
        .rule(masquerade(v4.trunc().into()))
        .rule(masquerade(v6.trunc().into()));
    let table = Table::new(TableFamily::Inet, "theirs").chain("input", input).chain("pods", pods);
    Nft::open()?.load(&table)?;
    Ok(())
}

impl Figures for Cohabit {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for act in &self.acts {
            let _ = writeln!(text, "  {:8} ms  {}", act.restored_ms, act.name);
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "  skipped: {}: {}", skipped.name, skipped.why);
        }
        let _ = write!(
            text,
            "{} changes of what is theirs, {} packets in clear",
            self.foreign_changes, self.plaintext_packets
        );
        text
    }
}
