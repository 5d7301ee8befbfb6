//! The plan's firewall as an nftables table.
//!
//! | chain | where | does |
//! |---|---|---|
//! | `outer` | before everything that comes in | marks our own outer packets, so that what asks for the way back with the mark (firewalld's IPv6 filter) finds the uplink; drops what claims a mesh source outside the tunnel, or one of ours on a link that does not lead to it |
//! | `ingress` | called by `outer` for what comes out of the tunnel | drops what is not for this node, before destinations are translated |
//! | `answer`, and from there `accepted` | after connection tracking | remembers, in the set `answered`, the connections to local sockets that begin outside the tunnel on a plain port or from a network that may come either way; only where there are such, since it needs connection tracking |
//! | `answer_out` | made here, routed | marks what answers those, which has it routed again, past our tables |
//! | `guard`, and from there `guarded` | at the end of the way out | drops what goes to a guarded network by another link than ours |
//! | `clamp`, `clamp_in` | into the tunnel, called by `guard`; routed out of it | lower the MSS of TCP connections through the tunnel to what the routes leave |
//!
//! Every packet of the machine passes the chains of its way, most of them none of ours. So there are
//! few, and the rules that end most packets' way stand first.
//!
//! Where the kernel can (6.9), the table is owned by our socket: nobody else's flush takes it while the
//! agent runs, and it stays when the agent is gone.
//!
//! Our own sockets' packets pass the guard, since they are sealed: those that carry our mark and
//! come from our port (or go to a controller's) and from a socket that the agent's user opened.
//! So do answers of the connections in `answered`, which only rules of this table fill. Others
//! set packet marks and connection marks too, and anybody chooses a source port: none of these is
//! a permission. Neighbour discovery passes both guards: on a LAN whose addresses are mesh addresses it is what finds the
//! other end of the tunnel, and it carries nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;
use towline_core::own_networks::SPECIAL;
use towline_core::plan::{FirewallPlan, Plan};

use towline_netlink::Family;
use towline_nftables::{
    Chain, ChainKind, CtState, Expression, Hook, KeyType, Loaded, Nft, NftError, Rule, Set, Table,
    TableFamily,
};

use super::Changes;
use super::families::Families;
use super::problem::{ApplyError, Problem};

/// How much of the table this kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// All of it.
    Full,
    /// The guard, made of what every nftables has.
    GuardOnly,
}

/// Which address families the table knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// Both, in a table of the family inet.
    Both,
    /// IPv4 alone, in a table of the family inet.
    Ipv4,
    /// IPv4 alone, in a table of the family ip: a kernel that was built without IPv6 has no other.
    Ipv4Table,
}

impl Scope {
    /// Those to try on a host, the best first. A table that guards less than the host has is none.
    fn of(families: Families) -> &'static [Self] {
        if families.exists(Family::V6) {
            &[Self::Both]
        } else {
            &[Self::Both, Self::Ipv4, Self::Ipv4Table]
        }
    }
}

/// Where the table goes.
#[derive(Debug)]
pub(super) struct Target<'a> {
    /// `None`: this kernel has no nftables.
    pub(super) nft: Option<&'a mut Nft>,
    /// False once this kernel refused to let us own the table.
    pub(super) ownable: &'a mut bool,
    /// What the host has of IPv4 and IPv6.
    pub(super) families: Families,
}

/// The families of tables in which ours may be found on a host.
pub(super) fn table_families(families: Families) -> &'static [TableFamily] {
    if families.exists(Family::V6) {
        &[TableFamily::Inet]
    } else {
        &[TableFamily::Inet, TableFamily::Ip]
    }
}

/// Says whose table it is.
pub(super) const COMMENT: &str = "towline: made by the agent, removed by towline down";
/// On the rules that drop packets with forged sources.
const FORGED: [&str; 2] = ["forged source, IPv4", "forged source, IPv6"];
/// On the rules that drop packets from elsewhere with one of our own addresses as source.
const OWN_ADDRESS: [&str; 2] = ["own address as source, IPv4", "own address as source, IPv6"];
/// On the rules that drop packets with a source of our networks that came by a link that does not lead there.
const OWN_NETWORK: [&str; 2] = ["own network as source, IPv4", "own network as source, IPv6"];
/// On the rules that drop what came out of the tunnel for loopback, link-local or multicast.
const SPECIAL_DESTINATION: [&str; 2] = ["special destination, IPv4", "special destination, IPv6"];
/// On the rule that drops what came out of the tunnel for somebody else.
const NOT_OURS: &str = "not for this node";
/// On the rule that drops broadcasts out of the tunnel.
const BROADCAST: &str = "broadcast out of the tunnel";
/// How the names of Cilium's links to its pods begin. It checks the sources of pods itself, and its routes lead
/// back to them by another link.
const CILIUM_POD: &str = "lxc";
/// On the rules that drop what would leave in clear.
const IN_CLEAR: [&str; 2] = ["would leave in clear, IPv4", "would leave in clear, IPv6"];

/// On the rules that count what carries our mark and is not ours: before it is dropped.
const FOREIGN_MARK: [&str; 2] =
    ["another's packet with our mark, IPv4", "another's packet with our mark, IPv6"];

const GUARD: &str = "guard";
const GUARDED: &str = "guarded";
const ACCEPTED: &str = "accepted";
/// Holds the connections that are answered outside the tunnel.
const ANSWERED: &str = "answered";
/// Upper bound of remembered connections. Each entry takes about 100 bytes, in a table of a megabyte.
const CONNECTIONS: u32 = 131_072;
const CLAMP: &str = "clamp";
const PLAIN_PORTS: &str = "plain_ports";
const OUTER: &str = "outer";
const INGRESS: &str = "ingress";
/// Before everybody else (raw tables are at -300), after defragmentation (-400).
const OUTER_PRIORITY: i32 = -310;
/// After connection tracking (-200).
const MANGLE_PRIORITY: i32 = -150;
/// After everything that still changes packets, before source addresses are translated.
const GUARD_PRIORITY: i32 = 50;

/// How long a connection is remembered after its last packet, as long as connection tracking does
/// or longer: one that began, one that is open, one that ends, and what is not TCP.
const OPENING: Duration = Duration::from_secs(60);
const OPEN: Duration = Duration::from_secs(5 * 24 * 3_600);
const CLOSING: Duration = Duration::from_secs(120);
const STREAM: Duration = Duration::from_secs(180);

const ROOT: u32 = 0;
const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;

/// Brings the kernel's table from `have` to what the plan wants, as far as this kernel can;
/// returns the table that then is there.
///
/// # Errors
///
/// [`ApplyError::Nft`] when `have` is not `fresh` (just read) and was refused: it may no longer
/// be what is there.
pub(super) fn change(
    plan: &Plan,
    have: Option<Table>,
    fresh: bool,
    target: Target<'_>,
    changes: &mut Changes,
) -> Result<Option<Table>, ApplyError> {
    let Target { nft, ownable, families } = target;
    let Some(nft) = nft else {
        changes.problems.push(Problem::NoFirewall(NftError::Unsupported.to_string()));
        return Ok(have);
    };
    let mut refused = None;
    for owned in [true, false] {
        if owned && !*ownable {
            continue;
        }
        refused = None;
        let scopes = Scope::of(families);
        let with = |extent| scopes.iter().map(move |scope| (extent, *scope));
        for (extent, scope) in with(Extent::Full).chain(with(Extent::GuardOnly)) {
            let want = scoped(table(plan, extent), scope);
            let want = if owned { want.owned() } else { want };
            let transaction = want.changes(have.as_ref());
            let messages = transaction.messages();
            match nft.commit(transaction) {
                Ok(()) => {
                    *ownable = owned;
                    changes.messages += messages;
                    let refused = refused.filter(|_| extent == Extent::GuardOnly);
                    changes.problems.extend(refused.map(Problem::FirewallReduced));
                    return Ok(Some(want));
                }
                Err(NftError::Netlink(error)) => return Err(error.into()),
                Err(error) if !fresh => return Err(error.into()),
                Err(error) => {
                    refused.get_or_insert(error.to_string());
                }
            }
        }
    }
    changes.problems.extend(refused.map(Problem::NoFirewall));
    Ok(have)
}

/// The same for a plan that differs from the one before in the networks of the firewall and the
/// routes alone: only elements of sets change.
pub(super) fn follow(
    before: &FirewallPlan,
    plan: &FirewallPlan,
    have: Table,
    nft: &mut Nft,
    changes: &mut Changes,
) -> Result<Table, ApplyError> {
    if before == plan {
        return Ok(have);
    }
    let mut want = have.clone();
    for family in Family::ALL {
        let of_family = |net: &&IpNet| Family::of(net.addr()) == family;
        if let Some(set) = want.sets.get_mut(guarded_set(family)) {
            // They never overlap, so each is an element.
            for gone in before.guarded.difference(&plan.guarded).filter(of_family) {
                set.elements.remove(&(*gone).into());
            }
            for new in plan.guarded.difference(&before.guarded).filter(of_family) {
                set.elements.insert((*new).into());
            }
        }
        let (own_before, own) = (&before.own, &plan.own);
        let [addresses, announced, reachable] = own_sets(family);
        let others = [
            (native_set(family), &before.native, &plan.native),
            (plain_set(family), &before.plain, &plan.plain),
            (addresses, own_before.addresses(), own.addresses()),
            (announced, own_before.announced(), own.announced()),
            (reachable, own_before.reachable(), own.reachable()),
        ];
        for (name, before, now) in others {
            if before != now
                && let Some(set) = want.sets.get_mut(name)
            {
                *set = Set::networks(key(family), now);
            }
        }
    }
    let transaction = want.changes(Some(&have));
    let messages = transaction.messages();
    nft.commit(transaction)?;
    changes.messages += messages;
    Ok(want)
}

/// Whether some connections begin or cease to be answered the way they came: then chains differ.
pub(super) fn same_chains(before: &Plan, plan: &Plan) -> bool {
    before.firewall.plain.is_empty() == plan.firewall.plain.is_empty()
}

fn table(plan: &Plan, extent: Extent) -> Table {
    let mut table = Table::new(TableFamily::Inet, &plan.firewall.table).comment(COMMENT);
    for family in Family::ALL {
        let guarded = Set::networks(key(family), &plan.firewall.guarded);
        table = table.set(guarded_set(family), guarded);
        let native = Set::networks(key(family), &plan.firewall.native);
        table = table.set(native_set(family), native);
    }
    for family in Family::ALL {
        let own = &plan.firewall.own;
        let [addresses, announced, reachable] = own_sets(family);
        table = table
            .set(addresses, Set::networks(key(family), own.addresses()))
            .set(announced, Set::networks(key(family), own.announced()))
            .set(reachable, Set::networks(key(family), own.reachable()))
            .set(special_set(family), Set::networks(key(family), &SPECIAL));
    }
    table = table
        .chain(GUARD, guard(plan, extent))
        .chain(GUARDED, guarded(plan, extent))
        .chain(OUTER, outer(plan, extent))
        .chain(INGRESS, ingress(extent));
    if extent == Extent::GuardOnly {
        return table;
    }
    for family in Family::ALL {
        table = table.set(plain_set(family), Set::networks(key(family), &plan.firewall.plain));
    }
    if both_ways(plan) {
        table = table
            .set(ANSWERED, Set::expiring(KeyType::Connection, CONNECTIONS))
            .chain("answer", answer(plan))
            .chain(ACCEPTED, accepted(plan))
            .chain("answer_out", answer_out(plan));
    }
    table
        .set(PLAIN_PORTS, Set::ports(plan.underlay.plain_ports.iter().copied()))
        .chain(CLAMP, clamp())
        .chain("clamp_in", clamp_in(plan))
}

/// How many packets for guarded networks carried our mark without being ours.
pub(super) fn marked_by_others(loaded: &Loaded) -> u64 {
    let packets = |comment| loaded.counter(GUARDED, comment).map_or(0, |counter| counter.packets);
    FOREIGN_MARK.into_iter().map(packets).sum()
}

/// The same table with what a kernel without IPv6 may refuse left out: sets of IPv6 addresses, and
/// the rules that look into them.
fn scoped(mut table: Table, scope: Scope) -> Table {
    if scope == Scope::Both {
        return table;
    }
    let (gone, kept) = std::mem::take(&mut table.sets)
        .into_iter()
        .partition::<BTreeMap<_, _>, _>(|(_, set)| set.key == KeyType::Ipv6);
    table.sets = kept;
    let asks = |expression: &Expression| match expression {
        Expression::Lookup { set, .. } => gone.contains_key(set),
        _ => false,
    };
    for chain in table.chains.values_mut() {
        chain.rules.retain(|rule| !rule.expressions.iter().any(asks));
    }
    if scope == Scope::Ipv4Table {
        table.family = TableFamily::Ip;
    }
    table
}

/// Whether a table of our name is ours. A kernel before 5.10 forgets the comment.
pub(super) fn is_ours(table: &Table) -> bool {
    match &table.comment {
        Some(comment) => comment == COMMENT,
        None => {
            table.sets.contains_key(guarded_set(Family::V4)) && table.chains.contains_key(GUARD)
        }
    }
}

fn guarded_set(family: Family) -> &'static str {
    match family {
        Family::V4 => "guarded4",
        Family::V6 => "guarded6",
    }
}

fn native_set(family: Family) -> &'static str {
    match family {
        Family::V4 => "native4",
        Family::V6 => "native6",
    }
}

fn foreign_mark(family: Family) -> &'static str {
    let [v4, v6] = FOREIGN_MARK;
    match family {
        Family::V4 => v4,
        Family::V6 => v6,
    }
}

fn plain_set(family: Family) -> &'static str {
    match family {
        Family::V4 => "plain4",
        Family::V6 => "plain6",
    }
}

/// The sets of our own addresses, announced networks, and networks that are only forwarded to.
fn own_sets(family: Family) -> [&'static str; 3] {
    match family {
        Family::V4 => ["addresses4", "announced4", "reachable4"],
        Family::V6 => ["addresses6", "announced6", "reachable6"],
    }
}

fn special_set(family: Family) -> &'static str {
    match family {
        Family::V4 => "special4",
        Family::V6 => "special6",
    }
}

fn key(family: Family) -> KeyType {
    match family {
        Family::V4 => KeyType::Ipv4,
        Family::V6 => KeyType::Ipv6,
    }
}

/// Whether some connections may come either way, so that they must be answered the way they came.
fn both_ways(plan: &Plan) -> bool {
    !(plan.underlay.plain_ports.is_empty() && plan.firewall.plain.is_empty())
}

fn outer(plan: &Plan, extent: Extent) -> Chain {
    let chain = Chain::base(ChainKind::Filter, Hook::Prerouting, OUTER_PRIORITY)
        .rule(Rule::new().input(&plan.link.name).jump(INGRESS));
    match extent {
        Extent::Full => outside_of_tunnel(plan, chain),
        Extent::GuardOnly => chain,
    }
}

fn outside_of_tunnel(plan: &Plan, chain: Chain) -> Chain {
    let marks = &plan.rules;
    let mark = |rule: Rule| rule.set_mark(marks.mark, marks.mask).accept();
    let here = |rule: Rule| rule.destination_is_local();

    let mut chain = chain
        .rule(Rule::new().input("lo").accept())
        .rule(Rule::new().neighbour_discovery().accept());
    if let Some(port) = plan.underlay.port {
        let datagram = Rule::new().protocol(UDP).destination_port(port);
        chain = chain.rule(mark(here(datagram)));
    }
    for controller in &plan.underlay.controllers {
        let segment = Rule::new()
            .source(IpNet::from(controller.ip()))
            .protocol(TCP)
            .source_port(controller.port());
        chain = chain.rule(mark(here(segment)));
    }
    for (number, family) in Family::ALL.into_iter().enumerate() {
        let [addresses, announced, _] = own_sets(family);
        let address = Rule::new().source_in(family, addresses).comment(OWN_ADDRESS[number]);
        let network = Rule::new().source_in(family, announced).not_input_like(CILIUM_POD);
        let network = network.source_leads_elsewhere().comment(OWN_NETWORK[number]);
        chain = chain.rule(address.counter().drop()).rule(network.counter().drop());
    }
    let plain = Rule::new().protocol(TCP).destination_port_in(PLAIN_PORTS);
    chain = chain.rule(mark(here(plain)));
    for (family, forged) in Family::ALL.into_iter().zip(FORGED) {
        let source_in = |set| Rule::new().source_in(family, set);
        chain = chain
            .rule(source_in(plain_set(family)).accept())
            .rule(source_in(guarded_set(family)).comment(forged).counter().drop());
    }
    chain
}

/// What comes out of the tunnel is for this node, or it is dropped. Nothing is translated yet, so a service
/// behind one of our addresses is judged by that address.
fn ingress(extent: Extent) -> Chain {
    let to = |family, set| Rule::new().destination_in(family, set);
    let mut chain = Chain::regular();
    for family in Family::ALL {
        chain = chain.rule(to(family, own_sets(family)[0]).accept());
    }
    for (family, comment) in Family::ALL.into_iter().zip(SPECIAL_DESTINATION) {
        let special = to(family, special_set(family)).comment(comment);
        chain = chain.rule(special.counter().drop());
    }
    if extent == Extent::Full {
        let broadcast = Rule::new().family(Family::V4).destination_is_broadcast();
        chain = chain.rule(broadcast.comment(BROADCAST).counter().drop());
    }
    for family in Family::ALL {
        let [_, announced, reachable] = own_sets(family);
        chain = chain.rule(to(family, announced).accept()).rule(to(family, reachable).accept());
    }
    chain.rule(Rule::new().comment(NOT_OURS).counter().drop())
}

/// Remembers the connections that begin outside the tunnel and may be answered there, as long as
/// they live.
fn answer(plan: &Plan) -> Chain {
    let mut chain = Chain::base(ChainKind::Filter, Hook::Prerouting, MANGLE_PRIORITY);
    if !plan.underlay.plain_ports.is_empty() {
        let plain = Rule::new().protocol(TCP).destination_port_in(PLAIN_PORTS);
        chain = chain.rule(plain.goto(ACCEPTED));
    }
    if !plan.firewall.plain.is_empty() {
        let from = |family| Rule::new().source_in(family, plain_set(family)).goto(ACCEPTED);
        chain = chain.rules(Family::ALL.map(from));
    }
    chain
}

/// Once a connection's packets come through the tunnel, it is answered there alone.
fn accepted(plan: &Plan) -> Chain {
    let known = || Rule::new().connection_in(ANSWERED);
    let remember = |rule: Rule, time| rule.remember_connection(ANSWERED, time);
    let new = Rule::new().ct_state(CtState::NEW).destination_is_local();
    Chain::regular().rules([
        Rule::new().input(&plan.link.name).forget_connection(ANSWERED).accept(),
        Rule::new().input("lo").accept(),
        remember(new, OPENING),
        remember(known().tcp_ends(), CLOSING).accept(),
        remember(known().protocol(TCP), OPEN).accept(),
        remember(known(), STREAM),
    ])
}

/// Has what answers a remembered connection routed again, past our tables.
fn answer_out(plan: &Plan) -> Chain {
    let marks = plan.rules;
    let answers = |rule: Rule| {
        rule.ct_reply().connection_in(ANSWERED).set_mark(marks.mark, marks.mask).accept()
    };
    let mut chain = Chain::base(ChainKind::Route, Hook::Output, MANGLE_PRIORITY);
    if !plan.underlay.plain_ports.is_empty() {
        chain = chain.rule(answers(Rule::new().protocol(TCP).source_port_in(PLAIN_PORTS)));
    }
    if !plan.firewall.plain.is_empty() {
        let to = |family| answers(Rule::new().destination_in(family, plain_set(family)));
        chain = chain.rules(Family::ALL.map(to));
    }
    chain
}

fn clamp() -> Chain {
    Chain::regular().rules([Rule::new().clamp_mss_to_route(), Rule::new().accept()])
}

/// The other side may be a plain WireGuard peer that clamps nothing.
fn clamp_in(plan: &Plan) -> Chain {
    Chain::base(ChainKind::Filter, Hook::Forward, MANGLE_PRIORITY)
        .rule(Rule::new().input(&plan.link.name).clamp_mss_to_route())
}

/// Most packets go to no guarded network, and end here.
fn guard(plan: &Plan, extent: Extent) -> Chain {
    let tunnel = Rule::new().output(&plan.link.name);
    let tunnel = match extent {
        Extent::Full => tunnel.jump(CLAMP),
        Extent::GuardOnly => tunnel.accept(),
    };
    let guarded = |family| Rule::new().destination_in(family, guarded_set(family)).goto(GUARDED);
    Chain::base(ChainKind::Filter, Hook::Postrouting, GUARD_PRIORITY)
        .rules([tunnel, Rule::new().output("lo").accept()])
        .rules(Family::ALL.map(guarded))
}

/// What goes to a guarded network past the tunnel.
fn guarded(plan: &Plan, extent: Extent) -> Chain {
    let (marks, underlay) = (&plan.rules, &plan.underlay);
    let marked = || Rule::new().mark(marks.mark, marks.mask);
    let mut chain = Chain::regular();
    if let Some(port) = underlay.port {
        let datagram = marked().protocol(UDP).source_port(port);
        chain = chain.rule(datagram.socket_owner(underlay.owner).accept());
    }
    for controller in &underlay.controllers {
        let segment = || {
            let to = IpNet::from(controller.ip());
            marked().destination(to).protocol(TCP).destination_port(controller.port())
        };
        // Root runs the commands that speak to controllers.
        let mut owners = vec![underlay.owner, ROOT];
        owners.dedup();
        chain = chain.rules(owners.into_iter().map(|uid| segment().socket_owner(uid).accept()));
    }
    if extent == Extent::Full && both_ways(plan) {
        let answer = Rule::new().made_here().ct_reply().connection_in(ANSWERED);
        chain = chain.rule(answer.source_is_local().accept());
    }
    chain = chain.rule(Rule::new().neighbour_discovery().accept());
    for (family, in_clear) in Family::ALL.into_iter().zip(IN_CLEAR) {
        let to = |set| Rule::new().destination_in(family, set);
        let leak = Rule::new().family(family).comment(in_clear).counter().drop();
        chain = chain.rule(to(native_set(family)).accept());
        chain = chain.rule(marked().family(family).comment(foreign_mark(family)).counter());
        chain = chain.rule(leak);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::plan;
    use towline_netns::namespace_test;

    namespace_test! {
        fn a_kernel_that_refuses_ipv6_in_nftables_gets_the_table_of_ipv4() {
            let mut nft = Nft::open().unwrap();
            for (scope, family) in
                [(Scope::Ipv4, TableFamily::Inet), (Scope::Ipv4Table, TableFamily::Ip)]
            {
                for extent in [Extent::Full, Extent::GuardOnly] {
                    let want = scoped(table(&plan(), extent), scope);
                    assert_eq!(want.family, family);
                    assert!(want.sets.keys().all(|name| !name.ends_with('6')), "{:?}", want.sets);
                    nft.load(&want).unwrap();
                    let found = nft.read(family, "towline").unwrap().unwrap().table;
                    assert_eq!((&found.sets, &found.chains), (&want.sets, &want.chains));
                    assert!(is_ours(&found) && !found.sets["guarded4"].elements.is_empty());
                }
            }
            // A kernel that accepts more than the previous one gets it.
            let have = nft.read(TableFamily::Ip, "towline").unwrap().unwrap().table;
            let whole = table(&plan(), Extent::Full);
            nft.commit(whole.changes(Some(&have))).unwrap();
            assert_eq!(nft.read(TableFamily::Ip, "towline").unwrap(), None);
            assert!(nft.read(TableFamily::Inet, "towline").unwrap().is_some());
        }
    }

    #[test]
    fn only_a_host_without_ipv6_may_do_without_its_guard() {
        assert_eq!(Scope::of(Families::default()), [Scope::Both]);
    }
}
