//! Desired and actual state of Towline's objects in the kernel, and the changes between them.
//!
//! This module owns the link, its addresses, the policy rules and the routes. It reads the firewall's
//! table, but `firewall` changes it. It never changes an object that Towline did not create.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;
use towline_core::plan::{Plan, RoutePlan, RouteVia};

use towline_netlink::{
    AddressOptions, Family, Link, NetlinkError, Route, RouteChange, RouteKind, Rtnetlink, Rule,
    RuleAction,
};
use towline_nftables::{Nft, NftError, Table};

use super::families::Families;
use super::firewall;
use super::problem::{ApplyError, InUse, Piece, Problem};
use super::{Changes, OURS, rules};

/// Names and numbers that identify the state that Towline created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// Name of the TUN link, such as `towline0`.
    pub link: String,
    /// Number of the plan's routing table. The next two numbers are the detour table and the answers
    /// table.
    pub table: u32,
    /// First of the consecutive priorities of the policy rules.
    pub priority: u32,
    /// Name of the nftables table.
    pub firewall: String,
}

impl Names {
    /// Returns the names and numbers that a plan uses.
    pub fn of(plan: &Plan) -> Self {
        Self {
            link: plan.link.name.clone(),
            table: plan.table,
            priority: plan.rules.priority,
            firewall: plan.firewall.table.clone(),
        }
    }

    /// Returns the numbers of Towline's three routing tables.
    pub(super) fn tables(&self) -> [u32; 3] {
        [self.table, rules::detour_table(self.table), rules::answers_table(self.table)]
    }

    /// Returns true if the priority is one of Towline's.
    pub(super) fn has_priority(&self, priority: u32) -> bool {
        (self.priority..self.priority + rules::PRIORITIES).contains(&priority)
    }
}

/// Metric of routes through the link. It is less than [`UNREACHABLE_METRIC`], so that the link is
/// preferred while it has the route.
const LINK_METRIC: u32 = 10;
/// Metric of unreachable routes, which match when the link has no route. The lookup then ends and does
/// not continue in another table.
const UNREACHABLE_METRIC: u32 = 20_000;

/// Key by which the kernel identifies a route: table, destination and metric.
type RouteName = (u32, IpNet, u32);

/// State that Towline created in the kernel, either desired or actual.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct State {
    /// Address families that the host supports.
    pub(super) families: Families,
    /// TUN link; `None` if no TUN link has our name.
    pub(super) link: Option<LinkState>,
    addresses: BTreeSet<IpNet>,
    rules: Vec<Rule>,
    routes: BTreeMap<RouteName, Route>,
    /// Routes of Towline with the same key as another one in `routes`. Empty in a desired state.
    duplicates: Vec<Route>,
    pub(super) firewall: Option<Table>,
}

/// State of Towline's TUN link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LinkState {
    index: u32,
    mtu: u32,
    up: bool,
    /// Mode of the reverse path filter (`rp_filter`); `None` if unknown. [`LOOSE`] accepts packets from
    /// sources whose return route uses another link.
    filter: Option<u32>,
    /// Whether the link accepts IPv6 addresses and routes. False while its sysctl `disable_ipv6` is 1.
    ipv6: bool,
}

/// State of other programs that uses Towline's names, numbers or mark.
#[derive(Debug, Default)]
pub(super) struct Foreign {
    found: Vec<InUse>,
    /// Rules of other programs that match a mark, at any priority.
    pub(super) marks: Vec<ForeignMark>,
    /// Number of packets of other programs that carried our mark and were dropped.
    pub(super) marked_packets: u64,
}

/// Policy rule of another program that matches packets by their mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ForeignMark {
    pub(super) priority: u32,
    pub(super) mark: u32,
    pub(super) mask: u32,
}

impl Foreign {
    /// Returns the first object that uses one of Towline's names or numbers.
    pub(super) fn first(&self) -> Option<&InUse> {
        self.found.first()
    }

    /// Returns true if another program has an nftables table of Towline's name.
    pub(super) fn has_firewall_table(&self) -> bool {
        self.found.iter().any(|found| matches!(found, InUse::FirewallTable { .. }))
    }

    /// Returns true if nothing that the nftables guard needs is in use. It treats the link that has Towline's
    /// name as the tunnel.
    pub(super) fn leaves_firewall(&self) -> bool {
        self.found.iter().all(|found| matches!(found, InUse::Table { .. } | InUse::Priority { .. }))
    }

    /// Returns true if nothing that the policy rules and unreachable routes need is in use.
    pub(super) fn leaves_routing(&self) -> bool {
        self.found
            .iter()
            .all(|found| matches!(found, InUse::FirewallTable { .. } | InUse::Link { .. }))
    }
}

impl State {
    /// Returns the state that the plan wants on the existing link. It has no firewall table, see
    /// [`firewall::change`].
    pub(super) fn wanted(plan: &Plan, link: Option<&LinkState>, families: Families) -> Self {
        let reach = Reach::new(link, families);
        let routes = plan.routes.iter().flat_map(|((destination, via), attributes)| {
            routes(plan, *destination, *via, attributes, reach)
        });
        let detours = plan.detour.destinations.iter().filter_map(|destination| {
            let link = reach.link_for(*destination)?;
            let route = Route::new(*destination).table(rules::detour_table(plan.table)).dev(link);
            Some(Route { protocol: OURS, ..route.metric(LINK_METRIC) })
        });
        let routes = routes.chain(detours).map(|route| (name(&route), route));
        let addresses = plan.link.addresses.iter().copied();
        Self {
            families,
            link: link.map(|link| LinkState {
                index: link.index,
                mtu: plan.link.mtu.into(),
                up: true,
                filter: Some(LOOSE),
                ipv6: link.ipv6,
            }),
            addresses: addresses.filter(|address| reach.link_for(*address).is_some()).collect(),
            rules: rules::wanted(plan, families),
            routes: routes.collect(),
            duplicates: Vec::new(),
            firewall: None,
        }
    }

    /// Returns the problem that keeps the plan from being applied in one of the address families.
    pub(super) fn problem(&self, plan: &Plan) -> Option<Problem> {
        let of_link = || {
            let disabled = self.link.as_ref().is_some_and(|link| !link.ipv6);
            disabled.then(|| Problem::NoIpv6OnLink { link: plan.link.name.clone() })
        };
        self.families.problem().or_else(of_link)
    }

    /// Reads the actual state from the kernel, together with the state of other programs that conflicts
    /// with it.
    pub(super) fn read(
        rtnetlink: &mut Rtnetlink,
        nft: Option<&mut Nft>,
        names: &Names,
        families: Families,
    ) -> Result<(Self, Foreign), ApplyError> {
        let mut state = Self { families, ..Self::default() };
        let mut foreign = Foreign::default();
        state.read_link(rtnetlink, names, &mut foreign)?;
        for family in families.routed() {
            for rule in rtnetlink.rules(family)? {
                if rule.made_by == OURS
                    && (names.has_priority(rule.priority)
                        || names.tables().map(RuleAction::Table).contains(&rule.action))
                {
                    state.rules.push(rule);
                    continue;
                }
                if let Some((mark, mask)) =
                    rule.mark.filter(|_| !rule.invert && rule.made_by != OURS)
                {
                    foreign.marks.push(ForeignMark { priority: rule.priority, mark, mask });
                }
                if names.has_priority(rule.priority) {
                    foreign.found.push(InUse::Priority { priority: rule.priority });
                }
            }
            for table in names.tables() {
                for route in rtnetlink.routes(family, Some(table))? {
                    state.take_route(route, &mut foreign);
                }
            }
        }
        if let Some(nft) = nft {
            for family in firewall::table_families(families) {
                match nft.read(*family, &names.firewall) {
                    Ok(Some(loaded)) if firewall::is_ours(&loaded.table) => {
                        foreign.marked_packets += firewall::marked_by_others(&loaded);
                        state.firewall.get_or_insert(loaded.table);
                    }
                    Ok(Some(_)) => foreign.found.push(InUse::FirewallTable {
                        family: *family,
                        name: names.firewall.clone(),
                    }),
                    Ok(None) | Err(NftError::Unsupported) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok((state, foreign))
    }

    fn read_link(
        &mut self,
        rtnetlink: &mut Rtnetlink,
        names: &Names,
        foreign: &mut Foreign,
    ) -> Result<(), NetlinkError> {
        let Some(link) = rtnetlink.link(&names.link)? else { return Ok(()) };
        if !is_tun(&link) {
            let kind = link.kind.unwrap_or_else(|| "hardware link".to_owned());
            foreign.found.push(InUse::Link { name: link.name, kind });
            return Ok(());
        }
        let addresses = rtnetlink.addresses(Some(link.index))?.into_iter();
        self.addresses = addresses
            .map(|address| address.prefix)
            .filter(|prefix| !is_link_local(prefix.addr()))
            .collect();
        self.link = Some(LinkState {
            index: link.index,
            mtu: link.mtu,
            up: link.up,
            filter: link.reverse_path_filter,
            // The kernel does not report it while the MTU is too small for IPv6.
            ipv6: link.ipv6_disabled != Some(true),
        });
        Ok(())
    }

    fn take_route(&mut self, mut route: Route, foreign: &mut Foreign) {
        if route.protocol != OURS {
            foreign.found.push(InUse::Table { table: route.table, destination: route.destination });
            return;
        }
        if route.kind != RouteKind::Unicast {
            // The kernel assigns these IPv6 routes to the loopback.
            route.link = None;
        }
        let duplicate = self.routes.insert(name(&route), route);
        self.duplicates.extend(duplicate);
    }

    /// Changes the kernel from this state to the wanted one, and returns the resulting state. The
    /// firewall is not changed here; it is up to date already.
    ///
    /// Order: link and new addresses, rules, routes (new before old, so that no guard is ever
    /// missing), removal of old addresses.
    pub(super) fn reconcile(
        self,
        mut want: Self,
        names: &Names,
        rtnetlink: &mut Rtnetlink,
        changes: &mut Changes,
    ) -> Result<Self, ApplyError> {
        match (&self.link, &mut want.link) {
            (Some(have), Some(want)) => change_link(have, want, names, rtnetlink, changes)?,
            _ => changes.problems.push(Problem::LinkMissing(names.link.clone())),
        }
        let index = want.link.as_ref().map_or(0, |link| link.index);
        for address in want.addresses.difference(&self.addresses) {
            let options = AddressOptions { no_dad: true, no_prefix_route: true };
            note(rtnetlink.add_address(index, *address, options), Piece::Link, changes)?;
        }
        for rule in want.rules.iter().filter(|rule| !self.rules.contains(rule)) {
            note(rtnetlink.add_rule(rule), Piece::Guard, changes)?;
        }
        for rule in self.rules.iter().filter(|rule| !want.rules.contains(rule)) {
            note(rtnetlink.delete_rule(rule), Piece::Route, changes)?;
        }
        change_routes(&self, &want, rtnetlink, changes)?;
        if want.has_new_guard_of_ipv6(&self) {
            forget_cached_routes(names.priority, rtnetlink)?;
        }
        for address in self.addresses.difference(&want.addresses) {
            note(rtnetlink.delete_address(index, *address), Piece::Route, changes)?;
        }
        Ok(want)
    }

    /// Adds the policy rules and the routes of a plan that need no link. Nothing is deleted, and the link is
    /// left as it is.
    pub(super) fn guard(
        &self,
        plan: &Plan,
        rtnetlink: &mut Rtnetlink,
        changes: &mut Changes,
    ) -> Result<(), ApplyError> {
        let want = Self::wanted(plan, None, self.families);
        for rule in want.rules.iter().filter(|rule| !self.rules.contains(rule)) {
            note(rtnetlink.add_rule(rule), Piece::Guard, changes)?;
        }
        let mut list = Vec::new();
        for (name, route) in &want.routes {
            set_route(self.routes.get(name), route, &mut list);
        }
        send_routes(&list, rtnetlink, changes)?;
        if want.has_new_guard_of_ipv6(self) {
            forget_cached_routes(plan.rules.priority, rtnetlink)?;
        }
        Ok(())
    }

    /// Returns true if this state has a policy rule or an unreachable route of IPv6 that `have` lacks.
    fn has_new_guard_of_ipv6(&self, have: &Self) -> bool {
        let old = |route: &&Route| have.routes.get(&name(route)) == Some(*route);
        let mut guards = self.routes.values().filter(|route| !old(route));
        let mut rules = self.rules.iter().filter(|rule| !have.rules.contains(rule));
        guards.any(is_guard_of_ipv6) || rules.any(|rule| rule.family == Family::V6)
    }

    /// Applies the routes of a plan that differs from `before` only in routes and networks. It
    /// compares the two plans, so that its cost depends on the number of differences alone.
    pub(super) fn follow_routes(
        &mut self,
        before: &Plan,
        plan: &Plan,
        rtnetlink: &mut Rtnetlink,
        changes: &mut Changes,
    ) -> Result<(), ApplyError> {
        let reach = Reach::new(self.link.as_ref(), self.families);
        let (mut set, mut gone) = (Vec::new(), Vec::new());
        for ((destination, via), attributes) in different(&plan.routes, &before.routes) {
            set.extend(routes(plan, *destination, *via, attributes, reach));
        }
        for ((destination, via), attributes) in different(&before.routes, &plan.routes) {
            if !plan.routes.contains_key(&(*destination, *via)) {
                gone.extend(routes(plan, *destination, *via, attributes, reach));
            }
        }
        // A route into the tunnel and one past it have the same name.
        gone.retain(|route| !set.iter().any(|new| name(new) == name(route)));
        let mut list = Vec::new();
        for route in set {
            let old = self.routes.insert(name(&route), route.clone());
            set_route(old.as_ref(), &route, &mut list);
        }
        for route in gone {
            self.routes.remove(&name(&route));
            list.push(RouteChange::Delete(route));
        }
        let mut set = list.iter().filter_map(|change| match change {
            RouteChange::Set(route) => Some(route),
            RouteChange::Delete(_) => None,
        });
        let guards = set.any(is_guard_of_ipv6);
        send_routes(&list, rtnetlink, changes)?;
        if guards { forget_cached_routes(plan.rules.priority, rtnetlink) } else { Ok(()) }
    }

    /// Deletes everything in this state, and returns the number of objects deleted.
    pub(super) fn remove(
        self,
        rtnetlink: &mut Rtnetlink,
        nft: Option<&mut Nft>,
        names: &Names,
    ) -> Result<usize, ApplyError> {
        let mut removed = 0;
        for rule in &self.rules {
            removed += usize::from(gone(rtnetlink.delete_rule(rule))?);
        }
        let routes: Vec<_> =
            self.routes.into_values().chain(self.duplicates).map(RouteChange::Delete).collect();
        let failures = rtnetlink.change_routes(&routes)?;
        removed += routes.len() - failures.len();
        for (place, refusal) in failures {
            if !is_absence(refusal.errno) {
                let what = name_of(&routes[place]);
                return Err(NetlinkError::Refused { what, refusal }.into());
            }
        }
        if let Some(link) = self.link {
            // The kernel deletes the addresses with the link.
            removed += usize::from(gone(rtnetlink.delete_link(link.index))?);
        }
        if let (Some(table), Some(nft)) = (self.firewall, nft) {
            removed += usize::from(nft.delete(table.family, &names.firewall)?);
        }
        Ok(removed)
    }
}

/// Returns the entries of `these` that `those` lacks or has with another value, in one pass over both.
fn different<'a, K: Ord, V: PartialEq>(
    these: &'a BTreeMap<K, V>,
    those: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    let mut others = those.iter().peekable();
    these.iter().filter(move |(key, value)| {
        while others.next_if(|(other, _)| other < key).is_some() {}
        others.peek().is_none_or(|(other, same)| other != key || same != value)
    })
}

/// Destinations that can have routes, in any table and through the link.
#[derive(Debug, Clone, Copy)]
struct Reach {
    families: Families,
    /// Index of the link; `None` if it does not exist.
    link: Option<u32>,
    /// Whether the link accepts IPv6 routes.
    ipv6: bool,
}

impl Reach {
    fn new(link: Option<&LinkState>, families: Families) -> Self {
        Self {
            families,
            link: link.map(|link| link.index),
            ipv6: link.is_some_and(|link| link.ipv6),
        }
    }

    /// Returns the link's index if it accepts an address or a route of this family.
    fn link_for(self, net: IpNet) -> Option<u32> {
        let family = Family::of(net.addr());
        let takes = family == Family::V4 || self.ipv6;
        self.link.filter(|_| takes && self.families.is_routed(family))
    }
}

/// Returns the kernel's routes for one route of the plan, in the plan's table and in the answers table.
/// Routes through the link are left out if the link does not exist or does not accept this family. All
/// are left out if the host lacks the family.
fn routes(
    plan: &Plan,
    destination: IpNet,
    via: RouteVia,
    attributes: &RoutePlan,
    reach: Reach,
) -> impl Iterator<Item = Route> + use<> {
    let link = reach.link_for(destination);
    let in_table = |table| Route { protocol: OURS, ..Route::new(destination).table(table) };
    let route = |table| match via {
        RouteVia::Link => Some(Route {
            source: attributes.source,
            mtu: attributes.mtu.map(u32::from),
            ..in_table(table).dev(link?).metric(LINK_METRIC)
        }),
        RouteVia::Native => Some(in_table(table).kind(RouteKind::Throw).metric(LINK_METRIC)),
        RouteVia::Unreachable => {
            Some(in_table(table).kind(RouteKind::Unreachable).metric(UNREACHABLE_METRIC))
        }
    };
    let answer = |table| match via {
        RouteVia::Link | RouteVia::Native => route(table),
        RouteVia::Unreachable => Some(in_table(table).dev(link?).metric(UNREACHABLE_METRIC)),
    };
    let answers = !plan.underlay.plain_ports.is_empty();
    let answer = answers.then(|| answer(rules::answers_table(plan.table))).flatten();
    let routed = reach.families.is_routed(Family::of(destination.addr()));
    [route(plan.table), answer].into_iter().flatten().filter(move |_| routed)
}

/// Makes every IPv6 socket look up its route again.
///
/// A connected IPv6 socket caches its route, and checks only whether that route changed. Unlike IPv4,
/// it does not notice a new route in a table that is looked up earlier. So a socket that sent while our
/// table was empty would continue to send outside the tunnel, with the firewall as its only guard.
/// A new rule makes the kernel drop all cached routes. The rule added here matches almost no packet,
/// has no effect, and is deleted at once.
fn forget_cached_routes(priority: u32, rtnetlink: &mut Rtnetlink) -> Result<(), ApplyError> {
    let last = priority + rules::PRIORITIES - 1;
    let rule = Rule {
        made_by: OURS,
        protocol: Some(libc::IPPROTO_TCP as u8),
        source_ports: Some(1..=1),
        ..Rule::new(Family::V6, last, RuleAction::Nop)
    };
    for result in [rtnetlink.add_rule(&rule), rtnetlink.delete_rule(&rule)] {
        match result {
            // A kernel that refuses this rule refused the guards too, which is a problem already.
            Ok(()) | Err(NetlinkError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn is_guard_of_ipv6(route: &Route) -> bool {
    route.kind == RouteKind::Unreachable && Family::of(route.destination.addr()) == Family::V6
}

fn name(route: &Route) -> RouteName {
    (route.table, route.destination, route.metric)
}

fn change_link(
    have: &LinkState,
    want: &mut LinkState,
    names: &Names,
    rtnetlink: &mut Rtnetlink,
    changes: &mut Changes,
) -> Result<(), ApplyError> {
    if have.mtu != want.mtu {
        note(rtnetlink.set_mtu(have.index, want.mtu), Piece::Link, changes)?;
    }
    if !have.up {
        note(rtnetlink.set_up(have.index, true), Piece::Link, changes)?;
    }
    if have.filter != want.filter {
        // Written over netlink: services and containers often have /proc/sys read-only.
        match rtnetlink.set_reverse_path_filter(have.index, LOOSE) {
            Ok(()) => {}
            Err(NetlinkError::Refused { refusal, .. }) => {
                want.filter = have.filter;
                if is_strict(have) {
                    changes.problems.push(Problem::Setting {
                        link: names.link.clone(),
                        reason: refusal.to_string(),
                    });
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn change_routes(
    have: &State,
    want: &State,
    rtnetlink: &mut Rtnetlink,
    changes: &mut Changes,
) -> Result<(), ApplyError> {
    let mut list: Vec<_> = have.duplicates.iter().cloned().map(RouteChange::Delete).collect();
    for (name, route) in &want.routes {
        set_route(have.routes.get(name), route, &mut list);
    }
    let gone = have.routes.iter().filter(|(name, _)| !want.routes.contains_key(*name));
    list.extend(gone.map(|(_, route)| RouteChange::Delete(route.clone())));
    send_routes(&list, rtnetlink, changes)
}

/// Adds to the list the changes that replace the route with the same key by this one.
fn set_route(have: Option<&Route>, want: &Route, list: &mut Vec<RouteChange>) {
    let way = |route: &Route| (route.kind, route.link, route.gateway);
    match have {
        Some(old) if old == want => return,
        // Some kernels cannot replace a route by one of another kind.
        Some(old) if way(old) != way(want) => list.push(RouteChange::Delete(old.clone())),
        _ => {}
    }
    list.push(RouteChange::Set(want.clone()));
}

fn send_routes(
    list: &[RouteChange],
    rtnetlink: &mut Rtnetlink,
    changes: &mut Changes,
) -> Result<(), ApplyError> {
    if list.is_empty() {
        return Ok(());
    }
    changes.messages += list.len();
    let failures = rtnetlink.change_routes(list)?;
    // One failure is reported, because the others usually have the same reason. Guards come first.
    let failure = failures
        .into_iter()
        .filter(|(place, refusal)| {
            !(matches!(list[*place], RouteChange::Delete(_)) && is_absence(refusal.errno))
        })
        .min_by_key(|(place, _)| piece_of(&list[*place]) != Piece::Guard);
    if let Some((place, refusal)) = failure {
        let (piece, what) = (piece_of(&list[place]), name_of(&list[place]));
        changes.problems.push(Problem::Refused { piece, what, refusal });
    }
    Ok(())
}

fn piece_of(change: &RouteChange) -> Piece {
    match change {
        RouteChange::Set(route) if route.kind == RouteKind::Unreachable => Piece::Guard,
        RouteChange::Set(_) | RouteChange::Delete(_) => Piece::Route,
    }
}

fn name_of(change: &RouteChange) -> String {
    match change {
        RouteChange::Set(route) => format!("set the route to {}", route.destination),
        RouteChange::Delete(route) => format!("delete the route to {}", route.destination),
    }
}

/// Counts a request and records its refusal as a problem, unless the object to delete does not exist.
pub(super) fn note(
    result: Result<(), NetlinkError>,
    piece: Piece,
    changes: &mut Changes,
) -> Result<(), ApplyError> {
    changes.messages += 1;
    match result {
        Ok(()) => Ok(()),
        Err(NetlinkError::Refused { what, refusal }) => {
            if !(what.starts_with("delete") && is_absence(refusal.errno)) {
                changes.problems.push(Problem::Refused { piece, what, refusal });
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns true if an object was deleted, and false if it did not exist.
fn gone(result: Result<(), NetlinkError>) -> Result<bool, NetlinkError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.errno().is_some_and(is_absence) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_absence(errno: Errno) -> bool {
    matches!(errno, Errno::ENOENT | Errno::ESRCH | Errno::ENODEV | Errno::EADDRNOTAVAIL)
}

fn is_tun(link: &Link) -> bool {
    link.kind.as_deref() == Some("tun")
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Value of `rp_filter` for loose mode (RFC 3704). Strict mode would drop packets out of the tunnel
/// whose return route is not in the main table. The kernel uses the larger one of the values of the
/// link and of `all`.
const LOOSE: u32 = 2;
/// Path of `rp_filter` for all links. Towline only reads it.
const ALL_LINKS: &str = "/proc/sys/net/ipv4/conf/all/rp_filter";

/// Returns true if the reverse path filter of a link is strict. Only then must it be changed.
fn is_strict(link: &LinkState) -> bool {
    let all = std::fs::read_to_string(ALL_LINKS).ok();
    let all = all.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    all.max(link.filter.unwrap_or(0)) == 1
}
