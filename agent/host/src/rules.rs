//! The policy rules that select Towline's routing tables, or skip them.
//!
//! This module only computes the rules; `state` applies them. Their priorities are the configured one
//! plus an offset:
//!
//! | offset | matches | action |
//! |---|---|---|
//! | 0 | every packet except a local one with our mark | goto offset 4 |
//! | 1 | local, our mark, user agent or root, and one of: the tunnels' UDP source port; a controller's address and TCP port | goto offset 8 |
//! | 1 | local, our mark, and one of: a plain TCP source port; a destination that may be reached either way | goto offset 8 |
//! | 2 | IPv6, local, our mark, UDP or TCP with a port | goto offset 4 |
//! | 3 | IPv6, local, our mark, UDP or TCP without a port, user root | goto offset 8 |
//! | 4 | every packet | none: target of the gotos |
//! | 4 | destinations that are pods of this node | look up the host's main table without its default routes |
//! | 4 | forwarded from a network in which other nodes have node IPs, UDP to the tunnels' port; or forwarded to such a network from a link that leads to the internet | goto offset 8 |
//! | 4 | sources of detours | look up the detour table |
//! | 4 | local, from a plain TCP port | look up the answers table |
//! | 5 | every packet | look up the plan's table |
//! | 6 | destinations in networks of this host that stay as they are | look up the host's main table without routes that are wider than the network of the link |
//! | 7 | destinations that are pods of this node, or in such networks | unreachable |
//! | 8 | every packet | none: the host's other rules follow |
//! | 8 | UDP source port 1 | none: see "Ports" below |
//!
//! "Local" means generated on this host: the kernel looks up the route of such a packet with the
//! loopback as input link. Forwarded packets, also those of pods, never skip our tables, except those of
//! other nodes whose router this host is. A mark or a source port alone does not skip them either, because
//! other programs can set both.
//!
//! A network of this host that stays as it is has a throw route in the plan's table where others hold a
//! network around it. The rules at offsets 6 and 7 keep a packet that the throw route lets pass from
//! reaching the host's default route, should the link have lost the network.
//!
//! # Root
//!
//! The rules of the first row at offset 1 match root as well as the agent's user, for two reasons:
//!
//! - A packet whose mark changes on output is routed again, and IPv4 does that as root.
//! - With a strict `rp_filter` the kernel looks up the route back to a packet's source and compares its
//!   link with the input link. It does so as root, as for a local packet, with the packet's ports
//!   swapped and (`src_valid_mark`, see `uplinks`) with its mark. If a peer's outer address is also a
//!   mesh address, that lookup must not find the tunnel. So chain `outer` of the firewall marks the
//!   packet first.
//!
//! firewalld's IPv6 filter does the same lookup without ports. Sockets always have ports, except raw
//! ones. The rules at offsets 2 and 3 use that difference.
//!
//! # Ports
//!
//! Newer kernels read the ports of a packet that was not just generated here only if some rule has
//! ports and does not have `lo` as its input link. The rule with UDP source port 1 exists for that.
//!
//! # Answers
//!
//! A TCP connection that is accepted on a plain port needs a route before it has any packet. The
//! answers table has the tunnel in place of the unreachable routes, so that the lookup succeeds and
//! packets exist. The firewall marks them if their connection began outside the tunnel. Without the
//! firewall they enter the tunnel, and the agent drops them.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ipnet::IpNet;
use towline_core::plan::{Plan, TransitPlan};

use towline_netlink::{Family, Rule, RuleAction};

use super::OURS;
use super::families::Families;

/// Number of consecutive priorities that the rules use, from the configured one on.
pub(super) const PRIORITIES: u32 = 9;
/// Offset of the rules that end a lookup where the host's own routes lead nowhere.
const NOWHERE: u32 = 7;
/// Offset at which a lookup that skips our tables continues.
const PAST: u32 = PRIORITIES - 1;
/// Greatest number of rules per family for destinations that may be reached either way. Replies to
/// further destinations use the tunnel only.
const EITHER_WAY: usize = 64;

/// Greatest number of networks with other nodes, and of links to the internet, that get rules.
const LANS: usize = 8;
/// Greatest number of pod networks per family that get rules. Kubernetes gives a node one of each.
const PODS: usize = 16;

const LOOPBACK: &str = "lo";
const ROOT: u32 = 0;
const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;

/// Returns the number of the detour table. Its routes send packets of pods into the tunnel where the
/// plan's table leaves the destination to the host.
pub(super) fn detour_table(table: u32) -> u32 {
    table + 1
}

/// Returns the number of the answers table, which packets from plain ports use. It has the routes of
/// the plan's table, with the tunnel in place of the unreachable routes.
pub(super) fn answers_table(table: u32) -> u32 {
    table + 2
}

/// Returns the rules of the host's address families, in the order in which to add them.
pub(super) fn wanted(plan: &Plan, families: Families) -> Vec<Rule> {
    families.routed().flat_map(|family| of_family(plan, family)).collect()
}

/// Returns true if two plans that differ only in routes and networks have the same rules.
pub(super) fn same_rules(before: &Plan, plan: &Plan) -> bool {
    let either_way = |plan: &Plan| {
        let (plain, native) = (&plan.firewall.plain, &plan.firewall.native);
        plain.difference(native).copied().collect::<Vec<_>>()
    };
    before.pods == plan.pods && before.local == plan.local && either_way(before) == either_way(plan)
}

fn of_family(plan: &Plan, family: Family) -> Vec<Rule> {
    let builder = RuleBuilder { plan, family };
    let table = RuleAction::Table(plan.table);

    // The rule that fails closed comes first.
    let nop = |offset| builder.rule(offset, RuleAction::Nop);
    let mut rules = vec![builder.rule(5, table), nop(PAST), nop(4)];
    let dissected = Rule { protocol: Some(UDP), source_ports: Some(1..=1), ..nop(PAST) };
    rules.push(dissected);
    rules.extend(builder.lookup_rules());
    rules.extend(builder.local_rules());
    let on = RuleAction::Goto(builder.priority(4));
    rules.push(Rule { invert: true, ..builder.marked(0, on) });
    rules.extend(builder.own_rules());
    rules.extend(builder.transit_rules());
    if family == Family::V6 {
        rules.extend(builder.reverse_path_rules(on));
    }
    rules
}

/// Plan and address family for which rules are built.
struct RuleBuilder<'a> {
    plan: &'a Plan,
    family: Family,
}

impl RuleBuilder<'_> {
    fn priority(&self, offset: u32) -> u32 {
        self.plan.rules.priority + offset
    }

    /// Returns the action that skips Towline's tables.
    fn skip_action(&self) -> RuleAction {
        RuleAction::Goto(self.priority(PAST))
    }

    fn rule(&self, offset: u32, action: RuleAction) -> Rule {
        Rule { made_by: OURS, ..Rule::new(self.family, self.priority(offset), action) }
    }

    /// Returns a rule for local packets that carry our mark.
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

    /// Returns the rules that look up the detour table and the answers table.
    fn lookup_rules(&self) -> Vec<Rule> {
        let plan = self.plan;
        let mut rules = self.pod_rules();
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

    /// Returns the rules for packets that this host forwards for other nodes as their router: encrypted
    /// ones, and those that come back to them from the internet. Packets of this host and of its own
    /// pods arrive on no such link.
    fn transit_rules(&self) -> Vec<Rule> {
        let TransitPlan { lans, ways_out } = &self.plan.transit;
        let here = || lans.iter().filter(|(_, lan)| self.has(lan)).take(LANS);
        let on =
            |link: &String| Rule { input: Some(link.clone()), ..self.rule(4, self.skip_action()) };
        let links: BTreeSet<&String> = here().map(|(link, _)| link).collect();
        let ports = || self.plan.underlay.port.into_iter();
        let encrypted = links.into_iter().flat_map(|link| {
            ports().map(move |port| Rule {
                protocol: Some(UDP),
                destination_ports: Some(port..=port),
                ..on(link)
            })
        });
        let returning = ways_out.iter().take(LANS).flat_map(|way| {
            here().map(move |(_, lan)| Rule { destination: Some(*lan), ..on(way) })
        });
        encrypted.chain(returning).collect()
    }

    /// Returns the rules for packets to this node's pods. They follow the container network's own
    /// routes and are unreachable while these are missing. A reverse-path lookup gets the same answer,
    /// so that no uplink brings in a pod's address as a source. The two rules have different
    /// priorities because the kernel keeps rules of one priority in the order of their creation.
    fn pod_rules(&self) -> Vec<Rule> {
        let nets = self.plan.pods.iter().filter(|net| self.has(net)).take(PODS);
        let rules = nets.flat_map(|net| {
            let to = |offset, action| Rule { destination: Some(*net), ..self.rule(offset, action) };
            let main = RuleAction::Table(u32::from(libc::RT_TABLE_MAIN));
            [
                Rule { suppress_prefix_length: Some(0), ..to(4, main) },
                to(NOWHERE, RuleAction::Unreachable),
            ]
        });
        rules.collect()
    }

    /// Returns the rules for packets to networks of this host that stay as they are. The rule that ends the
    /// lookup comes first, so that no packet takes the default route while the rules are added.
    fn local_rules(&self) -> Vec<Rule> {
        let nets = self.plan.local.iter().filter(|(net, _)| self.has(net));
        let rules = nets.flat_map(|(net, connected)| {
            let to = |offset, action| Rule { destination: Some(*net), ..self.rule(offset, action) };
            let main = RuleAction::Table(u32::from(libc::RT_TABLE_MAIN));
            let wider = u32::from(connected.prefix_len()).saturating_sub(1);
            [
                to(NOWHERE, RuleAction::Unreachable),
                Rule { suppress_prefix_length: Some(wider), ..to(6, main) },
            ]
        });
        rules.collect()
    }

    /// Returns the rules for Towline's own packets and for replies, which skip our tables.
    fn own_rules(&self) -> Vec<Rule> {
        let (plan, underlay) = (self.plan, &self.plan.underlay);
        let mut owners = vec![underlay.owner, ROOT];
        owners.dedup();
        let mut rules = Vec::new();
        for owner in owners {
            let owned =
                || Rule { users: Some(owner..=owner), ..self.marked(1, self.skip_action()) };
            rules.extend(underlay.ports().map(|port| Rule {
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
            ..self.marked(1, self.skip_action())
        }));
        // Destinations that are native now have a throw route, which leaves our table anyway.
        let either_way = plan.firewall.plain.difference(&plan.firewall.native);
        let either_way = either_way.filter(|net| self.has(net)).take(EITHER_WAY);
        rules.extend(
            either_way
                .map(|net| Rule { destination: Some(*net), ..self.marked(1, self.skip_action()) }),
        );
        rules
    }

    /// Returns the rules for reverse path lookups that have no port.
    fn reverse_path_rules(&self, on: RuleAction) -> Vec<Rule> {
        let of = |protocol| {
            let rule =
                |offset, action| Rule { protocol: Some(protocol), ..self.marked(offset, action) };
            // The kernel accepts no port range that ends at 65,535.
            let any = Some(1..=u16::MAX - 1);
            [
                Rule { destination_ports: any.clone(), ..rule(2, on) },
                Rule { source_ports: any, ..rule(2, on) },
                Rule { users: Some(ROOT..=ROOT), ..rule(3, self.skip_action()) },
            ]
        };
        [UDP, TCP].into_iter().flat_map(of).collect()
    }
}
