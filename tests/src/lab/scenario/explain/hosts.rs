//! Faults of a host: other programs that drop, remove or take what Towline needs.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use towline_netlink::{Family, MAIN_TABLE, Rtnetlink, Rule, RuleAction};
use towline_nftables::{Chain, ChainKind, CtState, Hook, Rule as Filter, Table, TableFamily};

use super::ask::{View, ask, ask_while};
use super::{Case, Outcome};
use crate::lab::interrupt::wait_up_to;
use crate::lab::scenario::Setting;
use crate::lab::scenario::foreign_firewalls::{docker, filter, ufw};
use crate::lab::scenario::scene::{Scene, add_route, change, load};
use crate::lab::tamper::Tampering;
use crate::lab::topology::Host;

/// First of Towline's routing tables, and of the priorities of its rules.
const OURS: u32 = 21_580;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "hosts/rp-filter",
            "Another program makes the reverse path filter of the link strict",
            "rp-filter-strict",
            |setting, case| {
                while_connected(setting, case, |host| {
                    host.namespace().sysctl("net.ipv4.conf.towline0.rp_filter", "1")
                })
            },
        ),
        Case::new(
            "hosts/flushed-rules",
            "Another program removes Towline's policy rules again and again",
            "state-removed",
            |setting, case| while_connected(setting, case, flush_rules),
        ),
        Case::new(
            "hosts/full-conntrack",
            "The conntrack table is full",
            "conntrack-full",
            full_conntrack,
        ),
        Case::new(
            "hosts/ufw",
            "ufw drops what comes out of the tunnel",
            "firewall-drops-input",
            |setting, case| with_firewall(setting, case, &ufw()),
        ),
        Case::new(
            "hosts/blocked-tunnels",
            "A firewall of the machine drops what leaves from the tunnels' port",
            "firewall-drops-tunnels",
            |setting, case| {
                let udp = Filter::new().protocol(libc::IPPROTO_UDP as u8).source_port(51_830);
                let chain = filter(Hook::Output).rule(udp.drop());
                let table = Table::new(TableFamily::Inet, "egress").chain("out", chain);
                with_firewall(setting, case, &table)
            },
        ),
        Case::new(
            "hosts/docker",
            "Docker drops what is forwarded between the mesh and pods",
            "firewall-drops-forwarded",
            forwarding_dropped,
        ),
        Case::new(
            "hosts/foreign-mark",
            "Another program routes by Towline's packet mark",
            "mark-in-use",
            |setting, case| {
                let by_mark = Rule {
                    mark: Some((0x10, 0x30)),
                    ..Rule::new(Family::V4, 5_000, RuleAction::Table(MAIN_TABLE))
                };
                before_start(setting, case, |host| {
                    change(host, |netlink| Ok(netlink.add_rule(&by_mark)?))
                })
            },
        ),
        Case::new(
            "hosts/routing-table-in-use",
            "Another program has routes in Towline's routing table",
            "routing-table-in-use",
            |setting, case| {
                before_start(setting, case, |host| {
                    let gateway = Some("192.168.1.1");
                    add_route(host, "10.99.0.0/16", "eth0", gateway, |route| route.table(OURS))
                })
            },
        ),
        Case::new(
            "hosts/rule-priority-in-use",
            "Another program has a policy rule of Towline's priority",
            "rule-priority-in-use",
            |setting, case| {
                let same = Rule::new(Family::V4, OURS, RuleAction::Table(MAIN_TABLE));
                before_start(setting, case, |host| {
                    change(host, |netlink| Ok(netlink.add_rule(&same)?))
                })
            },
        ),
        Case::new(
            "hosts/nftables-table-in-use",
            "Another program has an nftables table of Towline's name",
            "nftables-table-in-use",
            |setting, case| {
                let chain = Chain::base(ChainKind::Filter, Hook::Input, 0);
                let table = Table::new(TableFamily::Inet, "towline").chain("other", chain);
                before_start(setting, case, |host| load(host, &table))
            },
        ),
        Case::new(
            "hosts/forwarding-off",
            "A node announces a network behind it, but its kernel does not forward",
            "forwarding-off",
            |setting, case| {
                let scene = Scene::build(setting)?;
                let announce = "[node]\nprefixes = [\"10.9.0.0/16\"]\n";
                let flags = ["--prefix", "10.9.0.0/16"];
                let pair = scene.join_with(setting, ("", &[]), (announce, &flags))?;
                pair.settles()?;
                ask_while(case, &[View::new(&pair.worker, "cp")], || {
                    scene.worker.namespace().sysctl("net.ipv4.ip_forward", "0")
                })
            },
        ),
    ]
}

/// Has another program do something to the worker of a connected pair, again before each question.
fn while_connected(
    setting: &Setting,
    case: &Case,
    action: impl Fn(&Host) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    let pair = scene.join(setting)?;
    pair.settles()?;
    ask_while(case, &[View::new(&pair.worker, "cp")], || action(&scene.worker))
}

/// Removes the rules a few times, each time after the agent has restored them: it counts what it restores within a
/// minute, and on a busy machine a round of questions takes long.
fn flush_rules(host: &Host) -> anyhow::Result<()> {
    /// Number of times in one round.
    const TIMES: usize = 3;
    /// Limit for the agent to restore them.
    const RESTORED: Duration = Duration::from_secs(10);
    for _ in 0..TIMES {
        host.namespace().run(|| Tampering::FlushRules.apply())?;
        wait_up_to(RESTORED, || {
            host.namespace().run(|| {
                let rules = Rtnetlink::open()?.rules(Family::V4)?;
                let is_restored = rules.iter().any(|rule| rule.made_by != libc::RTPROT_KERNEL);
                Ok(is_restored.then_some(()))
            })
        })?;
    }
    Ok(())
}

/// Has another program do something to the worker before its agent starts.
fn before_start(
    setting: &Setting,
    case: &Case,
    action: impl FnOnce(&Host) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    action(&scene.worker)?;
    let pair = scene.join(setting)?;
    ask(case, &[View::new(&pair.worker, "cp")])
}

/// Loads the rules of a firewall on the worker of a connected pair.
fn with_firewall(setting: &Setting, case: &Case, table: &Table) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    let pair = scene.join(setting)?;
    pair.settles()?;
    load(&scene.worker, table)?;
    ask(case, &[View::new(&pair.worker, "cp")])
}

/// Docker on a worker with pods.
fn forwarding_dropped(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    let network = "10.244.1.0/24";
    let _pod = scene.worker.pod("pod", network.parse()?, "2001:db8:244:1::/64".parse()?)?;
    let announce = format!("[node]\nprefixes = [\"{network}\"]\n");
    let pair = scene.join_with(setting, ("", &[]), (&announce, &["--prefix", network]))?;
    pair.settles()?;
    load(&scene.worker, &docker())?;
    ask(case, &[View::new(&pair.worker, "cp")])
}

/// A small table of connections, which a program keeps full.
fn full_conntrack(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    /// Limit of the table.
    const SMALL: u16 = 200;
    /// First destination port of the connections.
    const FIRST: u16 = 20_000;
    let scene = Scene::build(setting)?;
    let pair = scene.join(setting)?;
    pair.settles()?;
    // The kernel tracks connections where a rule asks for their state.
    let states = CtState::ESTABLISHED | CtState::RELATED;
    let chain = Chain::base(ChainKind::Filter, Hook::Output, 0);
    let chain = chain.rule(Filter::new().ct_state(states).accept());
    load(&scene.worker, &Table::new(TableFamily::Inet, "stateful").chain("out", chain))?;
    let worker = scene.worker.namespace();
    if let Err(error) = worker.sysctl("net.netfilter.nf_conntrack_max", &SMALL.to_string()) {
        return Ok(Outcome::NotShown(format!(
            "this kernel lets no network namespace have a limit of its own: {error:#}"
        )));
    }
    let gateway = scene.router.gateway();
    ask_while(case, &[View::new(&pair.worker, "cp")], || {
        worker.run(|| open_connections(gateway, FIRST..FIRST + 2 * SMALL))
    })
}

/// Sends a datagram to each of these ports. The kernel refuses what does not fit into its table.
fn open_connections(to: IpAddr, ports: std::ops::Range<u16>) -> anyhow::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    for port in ports {
        let _ = socket.send_to(b"towline", SocketAddr::new(to, port));
    }
    Ok(())
}
