//! The plan's firewall, as one nftables table.
//!
//! This module builds the table, compares it with the kernel's table and commits the difference. It
//! changes no other table; `hook` owns the rules in the chains of other programs.
//!
//! | chain | hook | what it does |
//! |---|---|---|
//! | `outer` | prerouting, before the raw tables | marks the tunnels' own UDP packets and the packets of controllers, so that a reverse path lookup with the mark (firewalld's IPv6 filter) finds the uplink; drops packets with a mesh source that arrive outside the tunnel, and packets with a source of this node that arrive on a link that does not lead to it |
//! | `ingress` | jump from `outer`, for packets from the tunnel | drops packets whose destination is not this node's, before destination NAT |
//! | `transit` | jump from `outer`, for packets from a network in which other nodes have node IPs | lets this host forward what those nodes encrypted, and what is for neither this host nor the mesh; exists only if there is such a network |
//! | `answer`, which continues at `accepted` | prerouting, after conntrack | stores in the set `answered` the connections to local sockets that begin outside the tunnel on a plain port or from a plain network; exists only if the plan has plain ports or networks, because it needs conntrack |
//! | `answer_out` | output, chain type route | marks the replies of those connections; the kernel then routes them again, past Towline's routing tables |
//! | `guard`, which continues at `guarded` | postrouting, before source NAT | drops packets to a guarded network that leave by another link than the tunnel |
//! | `translate` | postrouting, chain type nat | gives packets of this host that enter the tunnel with a source that is not this node's the address of the link; exists only with `masquerade`, because it needs conntrack |
//! | `clamp`, `clamp_in` | jump from `guard`, for packets into the tunnel; forward, for packets out of it | lower the MSS of TCP connections through the tunnel to the MTU of the route |
//!
//! Every packet of the host passes these chains, and most packets have nothing to do with the mesh.
//! So there are few chains, and the rules that accept most packets come first.
//!
//! If the kernel supports it (6.9), our socket owns the table: no other program's flush removes the
//! table while the agent runs, and the table persists after the agent ends.
//!
//! The packets of Towline's own sockets are encrypted and pass the guard. Such a packet carries our
//! mark, has the tunnels' source port or a controller's destination address and port, and comes from
//! a socket of the agent's user (to a controller, of root too). The replies of connections in
//! `answered` pass too; only rules of this table add to that set. A mark or a source port alone is
//! never a permission, because other programs can set both. Neighbour discovery passes too: on
//! a LAN whose addresses are mesh addresses it finds the link-layer address for the encrypted packets,
//! and it carries no payload.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use towline_core::own_networks::SPECIAL;
use towline_core::plan::{FirewallPlan, Plan, TransitPlan};

use towline_netlink::Family;
use towline_nftables::{
    Chain, ChainKind, CtState, Expression, Hook, Interval, KeyType, Loaded, Nft, NftError, Rule,
    Set, Table, TableFamily,
};

use super::Changes;
use super::families::Families;
use super::problem::{ApplyError, Problem};

/// Part of the table that this kernel accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// The whole table.
    Full,
    /// Only the chains `guard`, `guarded`, `outer` and `ingress`, with expressions that every kernel with
    /// nftables supports. The table then does not drop spoofed sources.
    GuardOnly,
}

/// Address families that the table covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// IPv4 and IPv6, in a table of the family inet.
    Both,
    /// IPv4 alone, in a table of the family inet.
    Ipv4,
    /// IPv4 alone, in a table of the family ip. A kernel that was built without IPv6 has no family
    /// inet.
    Ipv4Table,
}

impl Scope {
    /// Returns the scopes to try on a host, the best first. If the host has IPv6, the table must cover
    /// it.
    fn of(families: Families) -> &'static [Self] {
        if families.exists(Family::V6) {
            &[Self::Both]
        } else {
            &[Self::Both, Self::Ipv4, Self::Ipv4Table]
        }
    }
}

/// The nftables connection, and what is known of the host that the table is for.
#[derive(Debug)]
pub(super) struct Target<'a> {
    /// nftables connection; `None` if this kernel has no nftables.
    pub(super) nft: Option<&'a mut Nft>,
    /// Whether to ask for ownership of the table. Set to false once the kernel refused it.
    pub(super) ownable: &'a mut bool,
    /// Address families that the host supports.
    pub(super) families: Families,
}

/// Returns the table families in which Towline's table may exist on a host.
pub(super) fn table_families(families: Families) -> &'static [TableFamily] {
    if families.exists(Family::V6) {
        &[TableFamily::Inet]
    } else {
        &[TableFamily::Inet, TableFamily::Ip]
    }
}

/// Comment of the table. It identifies the table as Towline's and tells an operator how to remove it.
pub(super) const COMMENT: &str = "towline: made by the agent, removed by towline down";
/// Comments of the rules that drop packets with spoofed mesh sources.
const FORGED: [&str; 2] = ["forged source, IPv4", "forged source, IPv6"];
/// Comments of the rules that drop the agent's outer packets with an address of the tunnel as source.
const INNER_SOURCE: [&str; 2] =
    ["inner source of an outer packet, IPv4", "inner source of an outer packet, IPv6"];
/// Comments of the rules that drop packets from outside this node whose source is one of its own
/// addresses.
const OWN_ADDRESS: [&str; 2] = ["own address as source, IPv4", "own address as source, IPv6"];
/// Comments of the rules that drop packets whose source is in a network that this node announces, if
/// the link that they arrive on does not lead to that source.
const OWN_NETWORK: [&str; 2] = ["own network as source, IPv4", "own network as source, IPv6"];
/// Comments of the rules that drop packets out of the tunnel to loopback, link-local or multicast
/// addresses.
const SPECIAL_DESTINATION: [&str; 2] = ["special destination, IPv4", "special destination, IPv6"];
/// Comment of the rule that drops packets out of the tunnel to destinations that are not this node's.
const NOT_OURS: &str = "not for this node";
/// Comment of the rule that drops broadcasts out of the tunnel.
const BROADCAST: &str = "broadcast out of the tunnel";
/// Prefix of the names of Cilium's links to its pods. Cilium verifies the sources of pods itself, and
/// its routes to them use another link, so the check of the reverse path would drop their packets.
const CILIUM_POD: &str = "lxc";
/// Comments of the rules that drop packets that would leave in clear.
const IN_CLEAR: [&str; 2] = ["would leave in clear, IPv4", "would leave in clear, IPv6"];

/// Comments of the rules that count packets of other programs that carry our mark. The next rule drops
/// them.
const FOREIGN_MARK: [&str; 2] =
    ["another's packet with our mark, IPv4", "another's packet with our mark, IPv6"];

const GUARD: &str = "guard";
const GUARDED: &str = "guarded";
const ACCEPTED: &str = "accepted";
/// Set of the connections that are answered outside the tunnel.
const ANSWERED: &str = "answered";
/// Greatest number of elements in [`ANSWERED`]. Each takes about 100 bytes. The hash table takes 1 MB.
const CONNECTIONS: u32 = 131_072;
const CLAMP: &str = "clamp";
const PLAIN_PORTS: &str = "plain_ports";
const OUTER: &str = "outer";
const INGRESS: &str = "ingress";
const TRANSIT: &str = "transit";
/// Priority before all other tables (raw is -300) and after defragmentation (-400).
const OUTER_PRIORITY: i32 = -310;
/// Priority after conntrack (-200).
const MANGLE_PRIORITY: i32 = -150;
/// Priority of source NAT.
const SOURCE_NAT_PRIORITY: i32 = 100;
/// Priority after all chains that still change packets, and before source NAT (100).
const GUARD_PRIORITY: i32 = 50;

// Timeouts of the elements of `ANSWERED`, from a connection's last packet on. Each is at least as long
// as conntrack keeps a connection in that state by default.

/// Timeout of a new connection.
const OPENING: Duration = Duration::from_secs(60);
/// Timeout of an established TCP connection.
const OPEN: Duration = Duration::from_secs(5 * 24 * 3_600);
/// Timeout of a TCP connection that ends.
const CLOSING: Duration = Duration::from_secs(120);
/// Timeout of a connection that is not TCP.
const STREAM: Duration = Duration::from_secs(180);

const ROOT: u32 = 0;
const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;

/// Changes the kernel's table from `have` to the one that the plan wants, or to the part of it that
/// this kernel accepts. Returns the resulting table.
///
/// # Errors
///
/// [`ApplyError::Nft`] if the kernel refused the change and `have` is not `fresh` (just read): the
/// kernel's table may differ from `have`.
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

/// Changes the kernel's table to that of a plan that differs from `before` only in networks. Only
/// elements of sets change.
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
            // Guarded networks never overlap, so each is one element.
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

/// Returns true if both plans have the same chains. The chains differ if only one of the plans has
/// plain networks, or translates.
pub(super) fn same_chains(before: &Plan, plan: &Plan) -> bool {
    before.firewall.plain.is_empty() == plan.firewall.plain.is_empty()
        && before.firewall.masquerade == plan.firewall.masquerade
}

/// Returns the table of a plan.
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
    if !plan.transit.lans.is_empty() {
        table = table.chain(TRANSIT, transit(plan));
    }
    if plan.firewall.masquerade {
        table = table.chain("translate", translate(plan));
    }
    table
        .set(PLAIN_PORTS, Set::ports(plan.underlay.plain_ports.iter().copied()))
        .chain(CLAMP, clamp())
        .chain("clamp_in", clamp_in(plan))
}

/// Returns the number of packets to guarded networks that carried our mark but came from other
/// programs.
pub(super) fn marked_by_others(loaded: &Loaded) -> u64 {
    let packets = |comment| loaded.counter(GUARDED, comment).map_or(0, |counter| counter.packets);
    FOREIGN_MARK.into_iter().map(packets).sum()
}

/// Returns the table without the parts that a kernel without IPv6 may refuse: the sets of IPv6
/// addresses and the rules that look into them.
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

/// Returns true if Towline created this table, which has our name. Kernels before 5.10 do not store
/// the comment; there the table is known by its names of sets and chains.
pub(super) fn is_ours(table: &Table) -> bool {
    match &table.comment {
        Some(comment) => comment == COMMENT,
        None => {
            table.sets.contains_key(guarded_set(Family::V4)) && table.chains.contains_key(GUARD)
        }
    }
}

/// Returns true if a table of Towline drops packets to an address that leave outside the tunnel.
pub(super) fn guards(table: &Table, address: IpAddr) -> bool {
    let wanted = Interval::from(address);
    let covers = |net: &Interval| net.first() <= wanted.first() && wanted.last() <= net.last();
    let has = |name: &str| table.sets.get(name).is_some_and(|set| set.elements.iter().any(covers));
    let family = Family::of(address);
    has(guarded_set(family)) && !has(native_set(family))
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

/// Returns the names of the sets of this node's addresses, of the networks that it announces, and of
/// the networks that it only forwards to.
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

/// Returns true if some connections may arrive either inside or outside the tunnel, so that their
/// replies must leave the same way.
fn both_ways(plan: &Plan) -> bool {
    !(plan.underlay.plain_ports.is_empty() && plan.firewall.plain.is_empty())
}

/// Returns the first chain that incoming packets traverse.
fn outer(plan: &Plan, extent: Extent) -> Chain {
    let chain = Chain::base(ChainKind::Filter, Hook::Prerouting, OUTER_PRIORITY)
        .rule(Rule::new().input(&plan.link.name).jump(INGRESS));
    match extent {
        Extent::Full => outside_of_tunnel(plan, chain),
        Extent::GuardOnly => chain,
    }
}

/// Adds the rules for packets that arrive outside the tunnel.
fn outside_of_tunnel(plan: &Plan, chain: Chain) -> Chain {
    let marks = &plan.rules;
    let mark = |rule: Rule| rule.set_mark(marks.mark, marks.mask).accept();
    let here = |rule: Rule| rule.destination_is_local();

    let mut chain = chain
        .rule(Rule::new().input("lo").accept())
        .rule(Rule::new().neighbour_discovery().accept());
    for port in plan.underlay.ports() {
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
    for (link, lan) in &plan.transit.lans {
        chain = chain.rule(Rule::new().input(link).source(*lan).jump(TRANSIT));
    }
    for (family, forged) in Family::ALL.into_iter().zip(FORGED) {
        let source_in = |set| Rule::new().source_in(family, set);
        chain = chain
            .rule(source_in(plain_set(family)).accept())
            .rule(source_in(guarded_set(family)).comment(forged).counter().drop());
    }
    chain
}

/// Returns the chain for packets from a network in which other nodes have their node IPs, and whose
/// router this host may be. What is encrypted passes, and what is for neither this host nor the mesh. All
/// else goes back to the rules of [`outside_of_tunnel`], which let plain sources pass and drop spoofed ones.
fn transit(plan: &Plan) -> Chain {
    let mut chain = Chain::regular();
    for family in Family::ALL {
        let from = || Rule::new().source_in(family, guarded_set(family));
        chain = chain.rule(from().destination_is_local().return_());
        if let Some(port) = plan.underlay.port {
            chain = chain.rule(from().protocol(UDP).destination_port(port).accept());
        }
        let [_, announced, reachable] = own_sets(family);
        for set in [guarded_set(family), announced, reachable] {
            chain = chain.rule(from().destination_in(family, set).return_());
        }
        chain = chain.rule(from().accept());
    }
    chain
}

/// Returns the chain that drops packets out of the tunnel whose destination is not this node's. It runs
/// before destination NAT, so a packet to a service is checked by the service's address.
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

/// Returns the chain that selects the connections that may be answered outside the tunnel.
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

/// Returns the chain that adds the selected connections to [`ANSWERED`] and refreshes their timeouts.
/// A connection whose packets arrive through the tunnel is removed: its replies use the tunnel only.
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

/// Returns the chain that marks the replies of connections in [`ANSWERED`]. The kernel routes a packet
/// again when its mark changes, here past Towline's routing tables.
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

/// Returns the chain that translates sources of this host that are not this node's. What a static peer
/// gets keeps its source.
fn translate(plan: &Plan) -> Chain {
    let entering = || Rule::new().output(&plan.link.name).made_here();
    let mut chain = Chain::base(ChainKind::Nat, Hook::Postrouting, SOURCE_NAT_PRIORITY);
    for family in Family::ALL {
        let [addresses, announced, reachable] = own_sets(family);
        chain = chain.rules([
            entering().source_in(family, addresses).accept(),
            entering().source_in(family, announced).accept(),
            entering().destination_in(family, reachable).accept(),
            entering().destination_in(family, special_set(family)).accept(),
        ]);
    }
    chain.rule(entering().masquerade())
}

fn clamp() -> Chain {
    Chain::regular().rules([Rule::new().clamp_mss_to_route(), Rule::new().accept()])
}

/// Returns the chain that clamps the MSS of packets out of the tunnel. The other side may be a plain
/// WireGuard peer that does not clamp it.
fn clamp_in(plan: &Plan) -> Chain {
    Chain::base(ChainKind::Filter, Hook::Forward, MANGLE_PRIORITY)
        .rule(Rule::new().input(&plan.link.name).clamp_mss_to_route())
}

/// Returns the chain that sends packets to guarded networks on to [`GUARDED`], and drops packets of
/// the agent's own that have an address of the tunnel as source. Most packets have another
/// destination and leave after this chain.
fn guard(plan: &Plan, extent: Extent) -> Chain {
    let tunnel = Rule::new().output(&plan.link.name);
    let tunnel = match extent {
        Extent::Full => tunnel.jump(CLAMP),
        Extent::GuardOnly => tunnel.accept(),
    };
    let guarded = |family| Rule::new().destination_in(family, guarded_set(family)).goto(GUARDED);
    // While an uplink has no address, the kernel would give the agent's own packets an address of
    // the tunnel's link as source.
    // Every encrypted packet is compared with these rules. The kernel takes a lock to read the owner of
    // its socket, so that comes last.
    let marks = &plan.rules;
    let from_inside = |(family, comment): (Family, &str)| {
        let [addresses, _, _] = own_sets(family);
        let marked = Rule::new().mark(marks.mark, marks.mask);
        let own = marked.source_in(family, addresses).socket_owner(plan.underlay.owner);
        own.comment(comment).counter().drop()
    };
    Chain::base(ChainKind::Filter, Hook::Postrouting, GUARD_PRIORITY)
        .rules([tunnel, Rule::new().output("lo").accept()])
        .rules(Family::ALL.into_iter().zip(INNER_SOURCE).map(from_inside))
        .rules(Family::ALL.map(guarded))
}

/// Returns the chain that accepts or drops packets to guarded networks that leave outside the tunnel.
fn guarded(plan: &Plan, extent: Extent) -> Chain {
    let (marks, underlay) = (&plan.rules, &plan.underlay);
    let marked = || Rule::new().mark(marks.mark, marks.mask);
    let mut chain = Chain::regular();
    for port in underlay.ports() {
        let datagram = marked().protocol(UDP).source_port(port);
        chain = chain.rule(datagram.socket_owner(underlay.owner).accept());
    }
    for controller in &underlay.controllers {
        let segment = || {
            let to = IpNet::from(controller.ip());
            marked().destination(to).protocol(TCP).destination_port(controller.port())
        };
        // Commands that connect to controllers may run as root.
        let mut owners = vec![underlay.owner, ROOT];
        owners.dedup();
        chain = chain.rules(owners.into_iter().map(|uid| segment().socket_owner(uid).accept()));
    }
    if extent == Extent::Full && both_ways(plan) {
        let answer = Rule::new().made_here().ct_reply().connection_in(ANSWERED);
        chain = chain.rule(answer.source_is_local().accept());
    }
    chain = chain.rule(Rule::new().neighbour_discovery().accept());
    if extent == Extent::Full {
        chain = chain.rules(forwarded(plan));
    }
    for (family, in_clear) in Family::ALL.into_iter().zip(IN_CLEAR) {
        let to = |set| Rule::new().destination_in(family, set);
        let leak = Rule::new().family(family).comment(in_clear).counter().drop();
        chain = chain.rule(to(native_set(family)).accept());
        chain = chain.rule(marked().family(family).comment(foreign_mark(family)).counter());
        chain = chain.rule(leak);
    }
    chain
}

/// Returns the rules for packets that this host forwards for other nodes as their router, see
/// [`Plan::transit`]. The input link shows that neither this host nor its pods made them.
fn forwarded(plan: &Plan) -> Vec<Rule> {
    let TransitPlan { lans, ways_out } = &plan.transit;
    let links: BTreeSet<&String> = lans.iter().map(|(link, _)| link).collect();
    let encrypted = links.into_iter().flat_map(|link| {
        let datagram = |port| Rule::new().input(link).protocol(UDP).destination_port(port).accept();
        plan.underlay.port.map(datagram)
    });
    let returning = ways_out.iter().flat_map(|way| {
        lans.iter().map(move |(_, lan)| Rule::new().input(way).destination(*lan).accept())
    });
    encrypted.chain(returning).collect()
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
    fn the_kernel_tracks_connections_only_where_the_plan_needs_it() {
        let tracks = |plan: &Plan| {
            let table = table(plan, Extent::Full);
            let rules = table.chains.into_values().flat_map(|chain| chain.rules);
            let mut steps = rules.flat_map(|rule| rule.expressions);
            steps.any(|step| matches!(step, Expression::Ct { .. } | Expression::Masquerade { .. }))
        };
        assert!(!tracks(&plan()));
        let (mut masquerade, mut ports, mut sources) = (plan(), plan(), plan());
        masquerade.firewall.masquerade = true;
        ports.underlay.plain_ports = [6_443].into();
        sources.firewall.plain = ["192.0.2.2/32".parse().unwrap()].into();
        assert!([masquerade, ports, sources].iter().all(tracks));
    }

    #[test]
    fn only_a_host_without_ipv6_may_do_without_its_guard() {
        assert_eq!(Scope::of(Families::default()), [Scope::Both]);
    }
}
