//! The host's network made like the plan, and watched.
//!
//! # Contract
//!
//! - [`HostNetwork::apply`] is idempotent. The same plan twice makes no system call; another plan
//!   changes what differs and nothing else. After [`HostNetwork::invalidate`] (a notification
//!   said that somebody touched what is ours) it reads what is there and puts back what is
//!   missing.
//! - What is ours: the link of our name with its addresses; routes in our tables and rules at our
//!   priorities that carry our protocol number ([`OURS`]); the nftables table of our name that
//!   carries our comment; tagged rules in the chain that Docker leaves to others. Nothing else
//!   is ever changed or removed.
//! - Fail closed: guards come first and go last. Without the link there are still the guards;
//!   without nftables there are still the routes. What could not be done is said
//!   ([`Changes::problems`]), and the rest is done all the same.
//! - Everything belongs to the network namespace of the thread that called
//!   [`HostNetwork::open`].

mod address;
mod candidates;
mod families;
mod firewall;
mod hook;
mod problem;
mod redirects;
mod rules;
mod state;
#[cfg(test)]
mod tests;
mod uplinks;
mod watch;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use towline_core::plan::Plan;

use towline_netlink::{Family, MAIN_TABLE, NetlinkError, RouteKind, Rtnetlink};
use towline_nftables::{Nft, NftError};

pub use address::LocalAddress;
pub use candidates::{CandidatePolicy, candidates};
use families::Families;
pub use problem::{ApplyError, NoIpv6Reason, Piece, Problem};
pub use redirects::PastNetfilter;
pub use state::Names;
use state::{Foreign, ForeignMark, State};
use watch::Ports;
pub use watch::register;
pub use watch::{HostEvent, Watch};

/// The number that our routes and rules carry as their maker (`RTPROT_*`): "T".
pub const OURS: u8 = 84;

/// The host's network, as far as it is ours.
#[derive(Debug)]
pub struct HostNetwork {
    rtnetlink: Rtnetlink,
    /// `None`: this kernel has no nftables.
    nft: Option<Nft>,
    /// The nftables table can be owned, as far as is known.
    ownable: bool,
    /// What is there of ours, as read or as made by the last apply.
    known: Option<State>,
    /// The plan that `known` follows, and what of it is not so.
    applied: Option<Plan>,
    problems: Vec<Problem>,
    /// Other programs' uses of our mark, as found by the last reading.
    marks: Vec<Problem>,
}

/// What an apply did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Netlink messages that changed something.
    pub messages: usize,
    /// What is not as planned, also if it was so before. Empty: all is.
    pub problems: Vec<Problem>,
}

impl HostNetwork {
    /// Opens the sockets, in the calling thread's network namespace.
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
        })
    }

    /// Opens the sockets for a program that only keeps the guards until an agent runs: the nftables table
    /// is made without an owner, so that the agent can adopt it.
    pub fn open_unowned() -> Result<Self, NetlinkError> {
        Ok(Self { ownable: false, ..Self::open()? })
    }

    /// Returns the networks that unreachable routes of ours guard now.
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

    /// As on a kernel without nftables.
    #[doc(hidden)]
    pub fn lack_nftables(&mut self) {
        self.nft = None;
    }

    /// Returns false once the kernel refused to let it own its nftables table.
    #[doc(hidden)]
    pub fn is_owner(&self) -> bool {
        self.ownable
    }

    /// Makes the host be like the plan.
    ///
    /// # Errors
    ///
    /// When a name or number of ours is somebody else's, before anything was changed; when the
    /// kernel cannot be spoken to. What it refuses piece by piece is a [`Problem`].
    pub fn apply(&mut self, plan: &Plan) -> Result<Changes, ApplyError> {
        if self.known.is_some() && self.applied.as_ref() == Some(plan) {
            return Ok(Changes { messages: 0, problems: self.problems.clone() });
        }
        match self.try_apply(plan) {
            // Answers were lost, or what was remembered is no longer so: read again.
            Err(ApplyError::Netlink(NetlinkError::Overrun(_)) | ApplyError::Nft(_)) => {
                self.invalidate();
                self.try_apply(plan)
            }
            other => other,
        }
    }

    /// Forgets what is known of the host: the next apply reads it again.
    pub fn invalidate(&mut self) {
        self.known = None;
    }

    /// Takes away everything of ours: addresses, rules, routes, the nftables table, and at last
    /// the link. What is not there is no error; says how many things were removed.
    pub fn remove(&mut self, names: &Names) -> Result<usize, ApplyError> {
        self.invalidate();
        self.applied = None;
        let families = Families::probe(&mut self.rtnetlink)?;
        let (have, foreign) = State::read(&mut self.rtnetlink, self.nft.as_mut(), names, families)?;
        // What is somebody else's stays.
        drop(foreign);
        let hooks = self.nft.as_mut().map(hook::remove).transpose()?.unwrap_or_default();
        let addresses = address::read(&mut self.rtnetlink)?;
        let hooks = hooks + uplinks::unmark(&mut self.rtnetlink, &addresses, &names.link)?;
        Ok(hooks + have.remove(&mut self.rtnetlink, self.nft.as_mut(), names)?)
    }

    /// Looks after our rules in others' chains alone.
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

    /// Every address of the host, with what is known of its link.
    pub fn local_addresses(&mut self) -> Result<Vec<LocalAddress>, NetlinkError> {
        let addresses = address::read(&mut self.rtnetlink)?;
        if let Some(plan) = &self.applied {
            // A link may be new. What fails is said by the next apply.
            let (link, mut unsaid) = (&plan.link.name, Changes::default());
            let _ = uplinks::mark(&mut self.rtnetlink, &addresses, link, &mut unsaid);
        }
        Ok(addresses)
    }

    /// The UDP ports on which the host takes packets out of VXLAN or Geneve, each once.
    pub fn tunnel_ports(&mut self) -> Result<Vec<u16>, NetlinkError> {
        let links = self.rtnetlink.links()?;
        let mut ports: Vec<u16> = links.iter().filter_map(|link| link.tunnel_port).collect();
        ports.sort_unstable();
        ports.dedup();
        Ok(ports)
    }

    /// The machine's own addresses by which others could know it, the best of each family first:
    /// those of the link that leads to the internet, then the others that are worth telling.
    pub fn node_ips(&mut self, policy: &CandidatePolicy) -> Result<Vec<IpAddr>, NetlinkError> {
        let addresses = self.local_addresses()?;
        let mut outward = Vec::new();
        for family in Family::ALL {
            let routes = self.rtnetlink.routes(family, Some(MAIN_TABLE))?;
            let defaults = routes.iter().filter(|route| route.destination.prefix_len() == 0);
            let best = defaults.min_by_key(|route| route.metric).and_then(|route| route.link);
            outward.push(best);
        }
        let mut found = candidates(&addresses, policy);
        found.sort_by_key(|ip| {
            let outward = outward[usize::from(ip.is_ipv6())];
            let at = addresses.iter().find(|address| address.prefix.addr() == *ip);
            at.is_none_or(|address| Some(address.index) != outward)
        });
        Ok(found)
    }

    /// Returns what may redirect packets past nftables on this host, see [`PastNetfilter`]. Links
    /// but `own_link` are looked at, as they are now.
    pub fn past_netfilter(
        &mut self,
        own_link: &str,
    ) -> Result<Option<PastNetfilter>, NetlinkError> {
        redirects::find(&mut self.rtnetlink, own_link)
    }

    /// The gateways of the default routes.
    pub fn gateways(&mut self) -> Result<Vec<IpAddr>, NetlinkError> {
        self.rtnetlink.gateways()
    }

    /// Hears of changes that others make; what this one makes is left out.
    pub fn watch(&mut self, names: &Names) -> Result<Watch, NetlinkError> {
        let ports =
            Ports { route: self.rtnetlink.port(), netfilter: self.nft.as_ref().map(Nft::port) };
        Watch::open(&mut self.rtnetlink, names, ports)
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
        let mut have = match known {
            Some(known) => known,
            None => {
                let families = Families::probe(&mut self.rtnetlink)?;
                let (have, foreign) =
                    State::read(&mut self.rtnetlink, self.nft.as_mut(), &names, families)?;
                self.marks = marks_of_others(plan, &foreign);
                self.judge(foreign, &mut changes)?;
                have
            }
        };
        changes.problems.extend(self.marks.iter().cloned());
        let (table, nft) = (have.firewall.take(), self.nft.as_mut());
        let target = firewall::Target { nft, ownable: &mut self.ownable, families: have.families };
        let firewall = firewall::change(plan, table, fresh, target, &mut changes)?;
        let addresses = address::read(&mut self.rtnetlink)?;
        uplinks::mark(&mut self.rtnetlink, &addresses, &plan.link.name, &mut changes)?;
        let mut want = State::wanted(plan, have.link.as_ref(), have.families);
        changes.problems.extend(want.problem(plan));
        want.firewall = firewall;
        let now = have.become_(want, &names, &mut self.rtnetlink, &mut changes)?;
        if let Some(nft) = self.nft.as_mut() {
            hook::put(nft, plan, &mut changes)?;
        }
        // Under new names all stands anew before the old goes.
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

    /// The short way to a plan that differs from the applied one in routes and guarded networks
    /// alone: costs what differs, not what there is. `None`: it differs in more.
    fn follow(&mut self, plan: &Plan) -> Result<Option<Changes>, ApplyError> {
        let Some(before) = &self.applied else { return Ok(None) };
        let same = before.link == plan.link
            && (before.table, before.rules) == (plan.table, plan.rules)
            && before.detour == plan.detour
            && before.underlay == plan.underlay
            && before.firewall.table == plan.firewall.table
            && firewall::same_chains(before, plan)
            && rules::same(before, plan);
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

    /// At the start, a name or number that somebody else uses is refused; once we run, it is
    /// somebody else who came into ours: the guards are not given up for that.
    fn judge(&self, foreign: Foreign, changes: &mut Changes) -> Result<(), ApplyError> {
        match foreign.first() {
            Some(error) if self.applied.is_none() => Err(error),
            Some(error) => {
                changes.problems.push(Problem::Intruder(error.to_string()));
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// Which other programs use our mark, at most this many of them.
fn marks_of_others(plan: &Plan, foreign: &Foreign) -> Vec<Problem> {
    const MOST: usize = 8;
    let ours = plan.rules;
    let shared = |theirs: &&ForeignMark| {
        let common = theirs.mask & ours.mask;
        theirs.mark & common != 0 && (theirs.mark ^ ours.mark) & common == 0
    };
    // Both families have the same one as a rule.
    let rules: BTreeSet<ForeignMark> = foreign.marks.iter().filter(shared).copied().collect();
    let problem =
        |ForeignMark { priority, mark, mask }| Problem::MarkInUse { priority, mark, mask };
    let mut found: Vec<Problem> = rules.into_iter().take(MOST).map(problem).collect();
    if foreign.marked_packets != 0 {
        found.push(Problem::MarkSeen { packets: foreign.marked_packets });
    }
    found
}
