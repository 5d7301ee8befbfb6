//! The policy rules that lead into our table, and past it.
//!
//! By priority, from the configured one on:
//!
//! | + | matches | does |
//! |---|---|---|
//! | 0 | our tunnel mark: answers to what came out of the tunnel | looks into our table |
//! | 1 | our own outer traffic, by protocol and port | goes on at 4 |
//! | 2 | sources of detours | looks into the table of detours |
//! | 3 | whatever does not carry our bypass mark | looks into our table |
//! | 4 | everything | nothing: the host's other rules follow |
//!
//! Marked packets need no rule to go out. The rules by port are for those that come in: with a
//! strict `rp_filter` the kernel asks whether the way back to a packet's source leads through the
//! link that it came by, with the packet's ports turned round but without its mark. When a peer's
//! outer address is a mesh address as well, the way back would be the tunnel. None of them names
//! an input link: for that question every packet seems to come from the loopback.

use std::net::SocketAddr;

use ipnet::IpNet;
use towline_core::plan::Plan;

use towline_netlink::{Family, Rule, RuleAction};

use super::OURS;
use super::families::Families;
use super::state::detour_table;

/// The rules of the host's families, in the order in which they are to be added.
pub(super) fn wanted(plan: &Plan, families: Families) -> Vec<Rule> {
    families.routed().flat_map(|family| of_family(plan, family)).collect()
}

fn of_family(plan: &Plan, family: Family) -> Vec<Rule> {
    let marks = &plan.rules;
    let priority = |offset| marks.priority + offset;
    let rule =
        |offset, action| Rule { made_by: OURS, ..Rule::new(family, priority(offset), action) };
    let table = RuleAction::Table(plan.table);
    let past = RuleAction::Goto(priority(4));

    // The one that fails closed comes first.
    let mut rules =
        vec![Rule { invert: true, mark: Some((marks.mark, marks.mask)), ..rule(3, table) }];
    rules.push(rule(4, RuleAction::Nop));
    if marks.tunnel() != 0 {
        rules.push(Rule { mark: Some((marks.tunnel(), marks.mask)), ..rule(0, table) });
    }
    let ours = |net: &&IpNet| Family::of(net.addr()) == family;
    if plan.detour.destinations.iter().any(|net| ours(&net)) {
        let detour = RuleAction::Table(detour_table(plan.table));
        let from = |net: &IpNet| Rule { source: Some(*net), ..rule(2, detour) };
        rules.extend(plan.detour.sources.iter().filter(ours).map(from));
    }
    let underlay = &plan.underlay;
    rules.extend(underlay.port.map(|port| Rule {
        protocol: Some(libc::IPPROTO_UDP as u8),
        source_ports: Some(port..=port),
        ..rule(1, past)
    }));
    let of_family = |address: &&SocketAddr| Family::of(address.ip()) == family;
    rules.extend(underlay.controllers.iter().filter(of_family).map(|address| Rule {
        destination: Some(IpNet::from(address.ip())),
        protocol: Some(libc::IPPROTO_TCP as u8),
        destination_ports: Some(address.port()..=address.port()),
        ..rule(1, past)
    }));
    rules.extend(underlay.plain_ports.iter().map(|port| Rule {
        protocol: Some(libc::IPPROTO_TCP as u8),
        source_ports: Some(*port..=*port),
        ..rule(1, past)
    }));
    rules
}
