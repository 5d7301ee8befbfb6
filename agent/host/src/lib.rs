//! Applies a plan to the host's network, and watches the network for changes by other programs.
//!
//! # Contract
//!
//! - [`HostNetwork::apply`] is idempotent. Applying the same plan twice makes no system call, unless a
//!   problem of the first apply may pass by itself. Another plan changes only what differs. After [`HostNetwork::invalidate`] (a notification reported that
//!   another program changed Towline's state) the next apply reads the kernel's state and restores
//!   what is missing.
//! - Towline's state consists of: the link that has its name, with the link's addresses; the routes in
//!   its tables and the rules at its priorities that carry its protocol number ([`OURS`]); the nftables
//!   table that has its name and its comment; the tagged rules in the chain that Docker reserves for
//!   other programs; the setting `src_valid_mark` of the uplinks; the eBPF program `towline_egress` on the
//!   uplinks. No other state is ever changed or
//!   removed.
//! - Fail closed: the nftables table is changed first and removed last, and wanted rules are added
//!   before old ones are deleted. They hold without the link, and the
//!   unreachable routes hold without nftables. What could not be applied is reported in
//!   [`Changes::problems`], and the rest is applied. If another program uses one of Towline's names or
//!   numbers from the start on, only the guard that does not need it is installed.
//! - All state belongs to the network namespace of the thread that called [`HostNetwork::open`].

mod address;
mod candidates;
mod families;
mod firewall;
mod hook;
mod listing;
mod obstacles;
mod outward;
mod overlaps;
mod problem;
mod redirects;
mod rules;
mod state;
#[cfg(test)]
mod tests;
mod uplinks;
mod watch;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use towline_core::path;
use towline_core::plan::Plan;

use towline_netlink::{MainTables, NetlinkError, RouteKind, Rtnetlink};
use towline_nftables::{Nft, NftError};

pub use address::LocalAddress;
pub use candidates::{CandidatePolicy, candidates};
use families::Families;
pub use listing::{has_firewall_guard, list_table};
pub use obstacles::{Obstacle, ObstacleSearch, TrialConnection};
use outward::WaysOut;
pub use outward::{Connectivity, OutwardAddresses};
pub use overlaps::Overlap;
pub use problem::{ApplyError, InUse, Piece, Problem, RedirectError};
use redirects::EgressState;
pub use redirects::PastNetfilter;
pub use state::Names;
use state::{Foreign, ForeignMark, State};
use watch::Ports;
pub use watch::register;
pub use watch::{HostEvent, Watch};

/// Protocol number (`RTPROT_*`) that identifies the routes and rules of Towline: the letter "T".
pub const OURS: u8 = 84;

/// Access to Towline's state in the host's network.
#[derive(Debug)]
pub struct HostNetwork {
    rtnetlink: Rtnetlink,
    /// nftables connection; `None` if this kernel has no nftables.
    nft: Option<Nft>,
    /// Whether to ask for ownership of the nftables table. Set to false once the kernel refused it.
    ownable: bool,
    /// Towline's state as last read or applied. `None` if the next apply must read it again.
    known: Option<State>,
    /// Plan that was applied last.
    applied: Option<Plan>,
    /// Problems of the plan that was applied last.
    problems: Vec<Problem>,
    /// Uses of Towline's mark by other programs, as found when the state was last read.
    marks: Vec<Problem>,
    /// Uplinks that are guarded against redirected packets.
    egress: EgressState,
    /// Reader of the main routing tables.
    tables: MainTables,
}

/// Result of an apply.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Number of netlink messages that changed state.
    pub messages: usize,
    /// Refused parts of the plan, conflicts with other programs, and notes about the host. Earlier ones are
    /// kept if only routes and networks changed.
    pub problems: Vec<Problem>,
}

impl HostNetwork {
    /// Opens the netlink sockets in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        let nft = match Nft::open() {
            Ok(nft) => Some(nft),
            Err(NftError::Netlink(error)) => return Err(error),
            Err(_) => None,
        };
        Ok(Self {
            rtnetlink: Rtnetlink::open()?,
            nft,
            ownable: true,
            known: None,
            applied: None,
            problems: Vec::new(),
            marks: Vec::new(),
            egress: EgressState::default(),
            tables: MainTables::default(),
        })
    }

    /// Opens the netlink sockets for a program that only holds the guards until an agent runs. It
    /// creates the nftables table without an owner, so that the agent can take ownership.
    pub fn open_unowned() -> Result<Self, NetlinkError> {
        Ok(Self { ownable: false, ..Self::open()? })
    }

    /// Returns the networks that have an unreachable route of Towline now.
    pub fn guarded(&mut self, names: &Names) -> Result<Vec<IpNet>, NetlinkError> {
        let mut found = Vec::new();
        for family in Families::probe(&mut self.rtnetlink)?.routed() {
            let routes = self.rtnetlink.routes(family, Some(names.table))?;
            let ours = routes
                .into_iter()
                .filter(|route| route.protocol == OURS && route.kind == RouteKind::Unreachable);
            found.extend(ours.map(|route| route.destination));
        }
        Ok(found)
    }

    /// Simulates a kernel without nftables, for tests.
    #[doc(hidden)]
    pub fn lack_nftables(&mut self) {
        self.nft = None;
    }

    /// Returns false once the kernel refused ownership of the nftables table.
    #[doc(hidden)]
    pub fn is_owner(&self) -> bool {
        self.ownable
    }

    /// Applies the plan to the host.
    ///
    /// # Errors
    ///
    /// If another program used one of Towline's names or numbers before the first apply (only a guard that
    /// does not need it is installed then), or if a netlink socket fails. A refusal of a single request is
    /// a [`Problem`].
    pub fn apply(&mut self, plan: &Plan) -> Result<Changes, ApplyError> {
        if self.known.is_some() && self.applied.as_ref() == Some(plan) {
            return Ok(Changes { messages: 0, problems: self.problems.clone() });
        }
        let applied = match self.try_apply(plan) {
            // Answers were lost, or the known state is out of date: read it again.
            Err(ApplyError::Netlink(NetlinkError::Overrun(_)) | ApplyError::Nft(_)) => {
                self.invalidate();
                self.try_apply(plan)
            }
            other => other,
        };
        if applied.as_ref().is_ok_and(|changes| changes.messages > 0) {
            // The next call of `guard_redirects` reports failures.
            let _ = redirects::follow_tunnel(&mut self.rtnetlink, plan, &mut self.egress);
        }
        applied
    }

    /// Discards the known state of the host. The next apply reads it again.
    pub fn invalidate(&mut self) {
        self.known = None;
    }

    /// Removes all of Towline's state: rules, routes, the link with its addresses, and the nftables
    /// table. Returns the number of objects removed. Missing objects are no error.
    pub fn remove(&mut self, names: &Names) -> Result<usize, ApplyError> {
        self.invalidate();
        self.applied = None;
        let families = Families::probe(&mut self.rtnetlink)?;
        let (have, foreign) = State::read(&mut self.rtnetlink, self.nft.as_mut(), names, families)?;
        // Objects of other programs stay.
        drop(foreign);
        let hooks = self.nft.as_mut().map(hook::remove).transpose()?.unwrap_or_default();
        let addresses = address::read(&mut self.rtnetlink)?;
        let hooks = hooks + uplinks::unmark(&mut self.rtnetlink, &addresses, &names.link)?;
        let removed = hooks + have.remove(&mut self.rtnetlink, self.nft.as_mut(), names)?;
        redirects::open(&mut self.rtnetlink, &names.link, &mut self.egress)?;
        Ok(removed)
    }

    /// Restores only the rules in chains of other programs.
    pub fn apply_hooks(&mut self) -> Result<Changes, ApplyError> {
        let mut changes = Changes { messages: 0, problems: self.problems.clone() };
        let (Some(plan), Some(nft)) = (&self.applied, self.nft.as_mut()) else {
            return Ok(changes);
        };
        changes.problems.retain(|problem| !problem.is_of_hooks());
        hook::put(nft, plan, &mut changes)?;
        self.problems = changes.problems.clone();
        Ok(changes)
    }

    /// Returns every address of the host, with the properties of its link. Once a plan is applied, also
    /// sets `src_valid_mark` on uplinks that lack it.
    pub fn local_addresses(&mut self) -> Result<Vec<LocalAddress>, NetlinkError> {
        let addresses = address::read(&mut self.rtnetlink)?;
        self.mark_uplinks(&addresses);
        Ok(addresses)
    }

    /// Reads links, addresses and routes once, and returns how this host is connected. At most `limit`
    /// addresses are to be published. Once a plan is applied, also sets `src_valid_mark` on uplinks that lack
    /// it.
    pub fn connectivity(
        &mut self,
        policy: &CandidatePolicy,
        limit: usize,
    ) -> Result<Connectivity, NetlinkError> {
        let links = self.rtnetlink.links()?;
        let addresses = address::on_links(&links, self.rtnetlink.addresses(None)?);
        self.mark_uplinks(&addresses);
        let ways = self.ways_out()?;
        let ports: BTreeSet<u16> = links.iter().filter_map(|link| link.tunnel_port).collect();
        Ok(Connectivity {
            outward: outward::outward(&addresses, &ways, policy, limit),
            node_ips: outward::node_ips(&addresses, &ways, policy),
            networks: candidates::link_networks(&addresses, &policy.own_link),
            transit: outward::transit(&addresses, &ways, policy),
            tunnel_ports: ports.into_iter().collect(),
        })
    }

    /// Returns the first program found on this host that may redirect packets past nftables, see
    /// [`PastNetfilter`]. The link `own_link` is left out.
    pub fn past_netfilter(
        &mut self,
        own_link: &str,
    ) -> Result<Option<PastNetfilter>, NetlinkError> {
        redirects::find(&mut self.rtnetlink, own_link, &self.egress)
    }

    /// Guards every uplink against packets that another program redirects to it, or removes that guard.
    /// Call it again when links change. Returns true if all uplinks are guarded. Without a plan that was
    /// applied, none is.
    ///
    /// # Errors
    ///
    /// If the kernel has no TCX (before Linux 6.6), or neither this process nor the helper may attach the
    /// program. Uplinks that could be guarded are.
    pub fn guard_redirects(&mut self, is_wanted: bool) -> Result<bool, RedirectError> {
        match &self.applied {
            Some(plan) if is_wanted => {
                redirects::guard(&mut self.rtnetlink, plan, &mut self.egress)
            }
            None if is_wanted => Ok(false),
            plan => {
                let own = plan.as_ref().map_or("", |plan| &plan.link.name);
                redirects::open(&mut self.rtnetlink, own, &mut self.egress)?;
                Ok(false)
            }
        }
    }

    /// Returns the networks of the host's links that lead outside, each once.
    pub fn connected_networks(
        &mut self,
        policy: &CandidatePolicy,
    ) -> Result<Vec<IpNet>, NetlinkError> {
        let addresses = address::read(&mut self.rtnetlink)?;
        Ok(candidates::connected_networks(&addresses, policy))
    }

    /// Returns the networks of all links of the host that are connected now, except Towline's own link.
    pub fn link_networks(&mut self, own_link: &str) -> Result<BTreeSet<IpNet>, NetlinkError> {
        Ok(candidates::link_networks(&address::read(&mut self.rtnetlink)?, own_link))
    }

    /// Returns the networks that the guards cut off among those of these addresses, in a mesh with these
    /// overlay ranges.
    pub fn overlaps(&self, overlay: &[IpNet], addresses: &[LocalAddress]) -> Vec<Overlap> {
        let plan = self.applied.as_ref();
        plan.map_or_else(Vec::new, |plan| overlaps::find(plan, overlay, addresses))
    }

    /// Returns the search for firewalls of other programs that drop traffic of the mesh. `addresses` are all
    /// addresses of the host, `uplinks` those of [`OutwardAddresses`], and `peers` outer addresses of peers.
    /// Without an applied plan or without nftables there is nothing to search.
    pub fn obstacle_search(
        &mut self,
        addresses: Vec<LocalAddress>,
        uplinks: Vec<path::LocalAddress>,
        peers: Vec<SocketAddr>,
    ) -> Result<Option<ObstacleSearch>, NetlinkError> {
        let Some(plan) = self.applied.as_ref().filter(|_| self.nft.is_some()) else {
            return Ok(None);
        };
        let Some(link) = self.rtnetlink.link(&plan.link.name)? else { return Ok(None) };
        Ok(Some(ObstacleSearch::new(plan, link.index, uplinks, addresses, peers)))
    }

    /// Returns the gateways of the default routes, each once.
    pub fn gateways(&mut self) -> Result<Vec<IpAddr>, NetlinkError> {
        Ok(self.ways_out()?.gateways())
    }

    /// Opens a watch for changes by other programs. Changes by this value are left out.
    pub fn watch(&mut self, names: &Names) -> Result<Watch, NetlinkError> {
        let ports =
            Ports { route: self.rtnetlink.port(), netfilter: self.nft.as_ref().map(Nft::port) };
        Watch::open(&mut self.rtnetlink, names, ports)
    }

    /// Sets `src_valid_mark` on uplinks that lack it, since a link may be new. Does nothing before a plan is
    /// applied. The next apply reports failures.
    fn mark_uplinks(&mut self, addresses: &[LocalAddress]) {
        if let Some(plan) = &self.applied {
            let (link, mut unsaid) = (&plan.link.name, Changes::default());
            let _ = uplinks::mark(&mut self.rtnetlink, addresses, link, &mut unsaid);
        }
    }

    fn ways_out(&mut self) -> Result<WaysOut, NetlinkError> {
        WaysOut::read(&mut self.rtnetlink, &mut self.tables)
    }

    fn try_apply(&mut self, plan: &Plan) -> Result<Changes, ApplyError> {
        let names = Names::of(plan);
        let old = self.applied.as_ref().map(Names::of).filter(|old| *old != names);
        if old.is_some() {
            self.invalidate();
        }
        if let Some(changes) = self.follow(plan)? {
            return Ok(changes);
        }
        let mut changes = Changes::default();
        let known = self.known.take();
        let fresh = known.is_none();
        let mut is_table_free = true;
        let mut have = match known {
            Some(known) => known,
            None => {
                let families = Families::probe(&mut self.rtnetlink)?;
                let (mut have, foreign) =
                    State::read(&mut self.rtnetlink, self.nft.as_mut(), &names, families)?;
                self.marks = marks_of_others(plan, &foreign);
                if let Some(intruder) = foreign.first() {
                    if self.applied.is_none() {
                        self.guard_beside(plan, &mut have, &foreign)?;
                        return Err(intruder.clone().into());
                    }
                    // After the first apply it is only a problem, so that the guards stay.
                    changes.problems.push(Problem::Intruder(intruder.clone()));
                }
                is_table_free = !foreign.has_firewall_table();
                have
            }
        };
        changes.problems.extend(self.marks.iter().cloned());
        let table = have.firewall.take();
        let firewall = if is_table_free {
            let (nft, families) = (self.nft.as_mut(), have.families);
            let target = firewall::Target { nft, ownable: &mut self.ownable, families };
            firewall::change(plan, table, fresh, target, &mut changes)?
        } else {
            table
        };
        let addresses = address::read(&mut self.rtnetlink)?;
        uplinks::mark(&mut self.rtnetlink, &addresses, &plan.link.name, &mut changes)?;
        let mut want = State::wanted(plan, have.link.as_ref(), have.families);
        changes.problems.extend(want.problem(plan));
        want.firewall = firewall;
        let now = have.reconcile(want, &names, &mut self.rtnetlink, &mut changes)?;
        if let Some(nft) = self.nft.as_mut() {
            hook::put(nft, plan, &mut changes)?;
        }
        // The state under the new names is complete before the old one is removed.
        if let Some(old) = old {
            let families = now.families;
            let (mut have, _) =
                State::read(&mut self.rtnetlink, self.nft.as_mut(), &old, families)?;
            if old.link == names.link {
                have.link = None;
            }
            if old.firewall == names.firewall {
                have.firewall = None;
            }
            changes.messages += have.remove(&mut self.rtnetlink, self.nft.as_mut(), &old)?;
        }
        self.applied = Some(plan.clone());
        self.problems = changes.problems.clone();
        self.known = (!changes.problems.iter().any(Problem::is_passing)).then_some(now);
        Ok(changes)
    }

    /// Applies a plan that differs from the applied one only in routes and networks. Its cost depends
    /// on the number of differences, not on the size of the state. Returns `None`, and changes nothing,
    /// if the plans differ in anything else or the state is not known.
    fn follow(&mut self, plan: &Plan) -> Result<Option<Changes>, ApplyError> {
        let Some(before) = &self.applied else { return Ok(None) };
        let same = before.link == plan.link
            && (before.table, before.rules) == (plan.table, plan.rules)
            && before.detour == plan.detour
            && before.underlay == plan.underlay
            && before.transit == plan.transit
            && before.firewall.table == plan.firewall.table
            && firewall::same_chains(before, plan)
            && rules::same_rules(before, plan);
        let Some(mut known) = self.known.take_if(|_| same) else { return Ok(None) };
        let mut changes = Changes { messages: 0, problems: self.problems.clone() };
        if let (Some(table), Some(nft)) = (known.firewall.take(), self.nft.as_mut()) {
            let table =
                firewall::follow(&before.firewall, &plan.firewall, table, nft, &mut changes)?;
            known.firewall = Some(table);
            if before.firewall.own != plan.firewall.own {
                changes.problems.retain(|problem| !problem.is_of_hooks());
                hook::put(nft, plan, &mut changes)?;
            }
        }
        known.follow_routes(before, plan, &mut self.rtnetlink, &mut changes)?;
        self.applied = Some(plan.clone());
        self.problems = changes.problems.clone();
        self.known = (!changes.problems.iter().any(Problem::is_passing)).then_some(known);
        Ok(Some(changes))
    }

    /// Installs the guards that need nothing of what other programs use. The link gets no routes.
    fn guard_beside(
        &mut self,
        plan: &Plan,
        have: &mut State,
        foreign: &Foreign,
    ) -> Result<(), ApplyError> {
        // The error says what is missing.
        let mut unsaid = Changes::default();
        if foreign.leaves_firewall() {
            let (table, nft) = (have.firewall.take(), self.nft.as_mut());
            let families = have.families;
            let target = firewall::Target { nft, ownable: &mut self.ownable, families };
            firewall::change(plan, table, true, target, &mut unsaid)?;
        }
        if foreign.leaves_routing() {
            have.guard(plan, &mut self.rtnetlink, &mut unsaid)?;
        }
        Ok(())
    }
}

/// Returns a problem for each of the first uses of Towline's mark by other programs.
fn marks_of_others(plan: &Plan, foreign: &Foreign) -> Vec<Problem> {
    const MOST: usize = 8;
    let ours = plan.rules;
    let shared = |theirs: &&ForeignMark| {
        let common = theirs.mask & ours.mask;
        theirs.mark & common != 0 && (theirs.mark ^ ours.mark) & common == 0
    };
    // Programs usually add the same rule for both families.
    let rules: BTreeSet<ForeignMark> = foreign.marks.iter().filter(shared).copied().collect();
    let problem =
        |ForeignMark { priority, mark, mask }| Problem::MarkInUse { priority, mark, mask };
    let mut found: Vec<Problem> = rules.into_iter().take(MOST).map(problem).collect();
    if foreign.marked_packets != 0 {
        found.push(Problem::MarkSeen { packets: foreign.marked_packets });
    }
    found
}
