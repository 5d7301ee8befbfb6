//! The policy rules that lead into our tables, and past them.
//!
//! By priority, from the configured one on:
//!
//! | + | matches | does |
//! |---|---|---|
//! | 0 | everything but what was made here and carries our mark | goes on at 4 |
//! | 1 | made here, our mark, and: a UDP source port that is the tunnels', of the agent's user; a controller's address and TCP port, of the agent's user; a plain TCP source port; a destination that may be reached either way | goes on at 6 |
//! | 2 | IPv6, made here, our mark, UDP or TCP with a port | goes on at 4 |
//! | 3 | IPv6, made here, our mark, UDP or TCP, no port and no user | goes on at 6 |
//! | 4 | everything | nothing: others go on here |
//! | 4 | sources of detours | looks into the table of detours |
//! | 4 | made here, from a plain TCP port | looks into the table of answers |
//! | 5 | everything | looks into our table |
//! | 6 | everything | nothing: the host's other rules follow |
//! | 6 | a UDP source port of 1 | nothing, but see below |
//!
//! Others set marks too, and anybody chooses source ports: neither alone leads past our table.
//! Forwarded packets, a pod's too, never do; the kernel says of what was made here that it comes
//! in by the loopback.
//!
//! Root stands beside the agent's user for two reasons. A packet that changes its mark on its way
//! out is routed again, which IPv4 does in root's name. And with a strict `rp_filter` the kernel
//! asks whether the way back to a packet's source leads through the link that it came by, in
//! root's name, as if made here, with the packet's ports turned round, and (`src_valid_mark`, see
//! `uplinks`) with its mark. When a peer's outer address is a mesh address as well, the way back
//! would be the tunnel; chain `outer` of the firewall has marked the packet before. firewalld's
//! own filter of IPv6 asks the same, but names no ports; sockets always do, except raw ones.
//!
//! From some version on, the kernel looks for the ports of packets that it did not make just now
//! only if some rule names ports and not the loopback. The last one does.
//!
//! A TCP connection that was accepted on a plain port asks for a route before any of its packets
//! exists. The table of answers is ours with the tunnel in place of nowhere, so that there are
//! packets, which the firewall then marks if their connection began outside the tunnel. Without
//! the firewall, the agent drops them.

use std::net::SocketAddr;

use ipnet::IpNet;
use towline_core::plan::Plan;

use towline_netlink::{Family, Rule, RuleAction};

use super::OURS;
use super::families::Families;
use super::state::{answers_table, detour_table};

/// How many priorities are ours, from the configured one on.
pub(super) const PRIORITIES: u32 = 7;
/// Rules for destinations that may be reached either way, at most, of a family. Replies to more of
/// them go through the tunnel alone.
const EITHER_WAY: usize = 64;

const LOOPBACK: &str = "lo";
const ROOT: u32 = 0;
const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;

/// The rules of the host's families, in the order in which they are to be added.
pub(super) fn wanted(plan: &Plan, families: Families) -> Vec<Rule> {
    families.routed().flat_map(|family| of_family(plan, family)).collect()
}

/// Whether two plans that differ in routes and networks alone have the same rules.
pub(super) fn same(before: &Plan, plan: &Plan) -> bool {
    let either_way = |plan: &Plan| {
        let (plain, native) = (&plan.firewall.plain, &plan.firewall.native);
        plain.difference(native).copied().collect::<Vec<_>>()
    };
    either_way(before) == either_way(plan)
}

fn of_family(plan: &Plan, family: Family) -> Vec<Rule> {
    let place = Place { plan, family };
    let table = RuleAction::Table(plan.table);

    // The one that fails closed comes first.
    let nop = |offset| place.rule(offset, RuleAction::Nop);
    let mut rules = vec![place.rule(5, table), nop(6), nop(4)];
    let dissected = Rule { protocol: Some(UDP), source_ports: Some(1..=1), ..nop(6) };
    rules.push(dissected);
    rules.extend(place.entries());
    let on = RuleAction::Goto(place.priority(4));
    rules.push(Rule { invert: true, ..place.marked(0, on) });
    rules.extend(place.ours());
    if family == Family::V6 {
        rules.extend(place.questions(on));
    }
    rules
}

/// Plan and address family that rules are made for.
struct Place<'a> {
    plan: &'a Plan,
    family: Family,
}

impl Place<'_> {
    fn priority(&self, offset: u32) -> u32 {
        self.plan.rules.priority + offset
    }

    fn past(&self) -> RuleAction {
        RuleAction::Goto(self.priority(PRIORITIES - 1))
    }

    fn rule(&self, offset: u32, action: RuleAction) -> Rule {
        Rule { made_by: OURS, ..Rule::new(self.family, self.priority(offset), action) }
    }

    /// For what was made here and carries our mark.
    fn marked(&self, offset: u32, action: RuleAction) -> Rule {
        let marks = self.plan.rules;
        Rule {
            input: Some(LOOPBACK.to_owned()),
            mark: Some((marks.mark, marks.mask)),
            ..self.rule(offset, action)
        }
    }

    fn has(&self, net: &IpNet) -> bool {
        Family::of(net.addr()) == self.family
    }

    /// For what enters one of our tables before all others.
    fn entries(&self) -> Vec<Rule> {
        let plan = self.plan;
        let mut rules = Vec::new();
        if plan.detour.destinations.iter().any(|net| self.has(net)) {
            let detour = RuleAction::Table(detour_table(plan.table));
            let sources = plan.detour.sources.iter().filter(|net| self.has(net));
            rules.extend(sources.map(|net| Rule { source: Some(*net), ..self.rule(4, detour) }));
        }
        let answers = RuleAction::Table(answers_table(plan.table));
        rules.extend(plan.underlay.plain_ports.iter().map(|port| Rule {
            input: Some(LOOPBACK.to_owned()),
            protocol: Some(TCP),
            source_ports: Some(*port..=*port),
            ..self.rule(4, answers)
        }));
        rules
    }

    /// For what is ours and goes past our tables.
    fn ours(&self) -> Vec<Rule> {
        let (plan, underlay) = (self.plan, &self.plan.underlay);
        let mut owners = vec![underlay.owner, ROOT];
        owners.dedup();
        let mut rules = Vec::new();
        for owner in owners {
            let owned = || Rule { users: Some(owner..=owner), ..self.marked(1, self.past()) };
            rules.extend(underlay.port.map(|port| Rule {
                protocol: Some(UDP),
                source_ports: Some(port..=port),
                ..owned()
            }));
            let of_family = |to: &&SocketAddr| Family::of(to.ip()) == self.family;
            rules.extend(underlay.controllers.iter().filter(of_family).map(|to| Rule {
                destination: Some(IpNet::from(to.ip())),
                protocol: Some(TCP),
                destination_ports: Some(to.port()..=to.port()),
                ..owned()
            }));
        }
        rules.extend(underlay.plain_ports.iter().map(|port| Rule {
            protocol: Some(TCP),
            source_ports: Some(*port..=*port),
            ..self.marked(1, self.past())
        }));
        // Those that are native now are past our table anyway.
        let either_way = plan.firewall.plain.difference(&plan.firewall.native);
        let either_way = either_way.filter(|net| self.has(net)).take(EITHER_WAY);
        rules.extend(
            either_way.map(|net| Rule { destination: Some(*net), ..self.marked(1, self.past()) }),
        );
        rules
    }

    /// For the way back of a packet that came in, when who asks names no port.
    fn questions(&self, on: RuleAction) -> Vec<Rule> {
        let of = |protocol| {
            let rule =
                |offset, action| Rule { protocol: Some(protocol), ..self.marked(offset, action) };
            // The kernel takes no greater one.
            let any = Some(1..=u16::MAX - 1);
            [
                Rule { destination_ports: any.clone(), ..rule(2, on) },
                Rule { source_ports: any, ..rule(2, on) },
                Rule { users: Some(ROOT..=ROOT), ..rule(3, self.past()) },
            ]
        };
        [UDP, TCP].into_iter().flat_map(of).collect()
    }
}
