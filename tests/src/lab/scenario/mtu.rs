//! `cargo lab mtu`: discovers the MTU of paths with a narrow link, with and without ICMP errors.
//!
//! `a` is behind two routers. The link between them has the MTU of the case, so it is in the middle
//! of the path for both directions. In a black hole the routers send no errors, because their ICMP
//! is dropped.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use towline_netlink::{Family, Rtnetlink};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily};

use super::Setting;
use crate::lab::flow::while_talking;
use crate::lab::interrupt::{wait_for, wait_up_to};
use crate::lab::mesh::{Controller, Node, START_LIMIT};
use crate::lab::namespace::Namespace;
use crate::lab::nat::Nat;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, round};
use crate::lab::topology::{Lab, Router};
use crate::lab::traffic::{Pattern, tcp_both_ways};

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Mtu {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Results for each underlay MTU, with ICMP errors and without.
    pub cases: Vec<Case>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result for one path.
#[derive(Debug, Serialize)]
pub struct Case {
    /// MTU of the narrowest link of the path, in bytes.
    pub underlay: u32,
    /// True if the routers send no ICMP errors.
    pub blackhole: bool,
    /// Size of the largest inner packet that status shows, in bytes. `None` if it was not
    /// discovered.
    pub inner_mtu: Option<u32>,
    /// True if a TCP transfer failed.
    pub stalled: bool,
    /// Time from the first packet until the MTU was discovered, in milliseconds.
    pub settle_ms: Option<f64>,
}

/// Underlay MTUs of the cases, in bytes. Above 1500 the whole path has the MTU.
const UNDERLAYS: [u32; 5] = [1500, 1420, 1368, 1296, 9000];
/// Bytes that the tunnel adds over IPv4: IP, UDP and WireGuard headers and tag.
const OVERHEAD: u32 = 20 + 8 + 32;
/// Lowest MTU of an IPv6 link, in bytes (RFC 8200).
const LEAST: u32 = 1280;
/// Size of the transfer in each direction, in bytes.
const TRANSFER: u64 = 2 << 20;
/// Limit for the discovery of the MTU.
const SETTLE: Duration = Duration::from_secs(20);

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Mtu> {
    let mut figures = Mtu { rootless: setting.rank == Rank::Rootless, ..Mtu::default() };
    let mut promises = Promises::new();
    for blackhole in [false, true] {
        for underlay in UNDERLAYS {
            let label =
                format!("{underlay} bytes{}", if blackhole { ", a black hole" } else { "" });
            setting.output.step(&label);
            match case(setting, underlay, blackhole) {
                Ok(case) => {
                    case.check(&label, &mut promises);
                    figures.cases.push(case);
                }
                Err(error) => promises.fail(format!("{label}: {error:#}")),
            }
        }
    }
    figures.failed = promises.into_failed();
    Ok(figures)
}

/// Builds the path of a case, sends traffic over it, and returns what was measured.
fn case(setting: &Setting, underlay: u32, blackhole: bool) -> anyhow::Result<Case> {
    let mut lab = Lab::new(setting.rank)?;
    let host = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
    let carrier = router(&mut lab, "carrier", None)?;
    let home = router(&mut lab, "home", Some(&carrier))?;
    let a = lab.host("a").only(Family::V4).behind(&home).build()?;
    let b = lab.host("b").only(Family::V4).public("203.0.113.10", "2001:db8::10")?.build()?;
    let jumbo = underlay > 1500;
    if jumbo {
        let internet = [(lab.internet(), "carrier"), (lab.internet(), "b")];
        let others = [
            (carrier.host().namespace(), "eth0"),
            (carrier.host().namespace(), "home"),
            (home.host().namespace(), "eth0"),
            (home.host().namespace(), "a"),
            (a.namespace(), "eth0"),
            (b.namespace(), "eth0"),
        ];
        for (namespace, link) in internet.into_iter().chain(others) {
            set_mtu(namespace, link, underlay)?;
        }
        set_mtu(lab.internet(), "net0", underlay)?;
        set_mtu(carrier.host().namespace(), "lan0", underlay)?;
        set_mtu(home.host().namespace(), "lan0", underlay)?;
    } else {
        set_mtu(home.host().namespace(), "eth0", underlay)?;
        set_mtu(carrier.host().namespace(), "lan0", underlay)?;
    }
    if blackhole {
        silence(home.host().namespace())?;
        silence(carrier.host().namespace())?;
    }
    let controller = Controller::start(&lab, &host, &setting.binaries)?;
    let link = if jumbo { "[link]\nmtu = 8920\n" } else { "" };
    let mut nodes = Vec::new();
    for host in [&a, &b] {
        let name = host.name().to_owned();
        let mut node = Node::new(&lab, &Arc::clone(host), &name, &setting.binaries, link)?;
        node.join(&controller.operator().token(&format!("site-{name}"))?)?;
        node.restart()?;
        nodes.push(node);
    }
    let peer = |from: usize, to: usize| nodes[from].peer(nodes[to].name());
    wait_for("map on both nodes", START_LIMIT, || {
        Ok((peer(0, 1)?.is_some() && peer(1, 0)?.is_some()).then_some(()))
    })?;
    let (a_end, b_end) = (nodes[0].overlay_v4()?, nodes[1].overlay_v4()?);
    let begun = Instant::now();
    let (found, _) = while_talking((a.namespace(), a_end), (b.namespace(), b_end), || {
        wait_up_to(SETTLE, || Ok(peer(0, 1)?.and_then(|peer| peer.mtu).map(|_| begun.elapsed())))
    })?;
    let pattern = Pattern::random()?;
    let transfer = tcp_both_ways(a.namespace(), b.namespace(), b_end, TRANSFER, pattern, |_| {});
    Ok(Case {
        underlay,
        blackhole,
        inner_mtu: peer(0, 1)?.and_then(|peer| peer.mtu),
        stalled: transfer.is_err(),
        settle_ms: found.map(|took| round(took.as_secs_f64() * 1000.0)),
    })
}

/// Builds a router that is public, or behind another router.
fn router(lab: &mut Lab, name: &str, behind: Option<&Router>) -> anyhow::Result<Router> {
    let builder = lab.router(name).nat(Nat::Masquerade);
    match behind {
        None => builder
            .public("203.0.113.11", "2001:db8::11")?
            .lan("100.64.0.0/24", "2001:db8:1::/64")?
            .build(),
        Some(router) => builder.behind(router).lan("192.168.1.0/24", "2001:db8:2::/64")?.build(),
    }
}

/// Sets the MTU of a link, in bytes.
fn set_mtu(namespace: &Namespace, link: &str, mtu: u32) -> anyhow::Result<()> {
    namespace.run(|| {
        let mut netlink = Rtnetlink::open()?;
        let index = netlink.link_index(link)?;
        Ok(netlink.set_mtu(index, mtu)?)
    })
}

/// Drops all ICMP packets that the router itself sends.
fn silence(router: &Namespace) -> anyhow::Result<()> {
    let icmp = |protocol: libc::c_int| Rule::new().protocol(protocol as u8).drop();
    let output = Chain::base(ChainKind::Filter, Hook::Output, 0)
        .rules([icmp(libc::IPPROTO_ICMP), icmp(libc::IPPROTO_ICMPV6)]);
    router.run(|| {
        Nft::open()?.load(&Table::new(TableFamily::Inet, "silence").chain("output", output))?;
        Ok(())
    })
}

impl Case {
    /// Checks the promises about a path.
    fn check(&self, label: &str, promises: &mut Promises) {
        promises.hold(!self.stalled, || format!("{label}: TCP makes progress"));
        // The MTU of the tunnel never falls below the minimum of IPv6.
        let most = self.underlay.saturating_sub(OVERHEAD).max(LEAST);
        let found = self.inner_mtu.unwrap_or(u32::MAX);
        promises.hold(found <= most, || {
            format!("{label}: inner MTU at most {most}: {:?}", self.inner_mtu)
        });
    }
}

impl Figures for Mtu {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for case in &self.cases {
            let _ = writeln!(
                text,
                "{} bytes{}: inner MTU {}, {}, discovered after {}",
                case.underlay,
                if case.blackhole { ", a black hole" } else { "" },
                case.inner_mtu.map_or("-".to_owned(), |mtu| mtu.to_string()),
                if case.stalled { "stalled" } else { "no stall" },
                case.settle_ms.map_or("-".to_owned(), |ms| format!("{ms} ms")),
            );
        }
        text
    }
}
