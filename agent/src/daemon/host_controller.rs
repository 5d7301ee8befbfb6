//! The daemon's part of the host network: applies the latest plan and repairs it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ipnet::IpNet;
use towline_core::path;
use towline_core::plan::Plan;
use towline_host::{
    CandidatePolicy, Changes, Connectivity, HostEvent, HostNetwork, LocalAddress, Names, Obstacle,
    ObstacleSearch, Overlap, PastNetfilter, Watch,
};
use towline_proto::code::Coded as _;
use towline_proto::limits;
use towline_proto::node::{Candidate, CandidateKind};

use super::Purpose;
use super::problem::{Blocked, NotApplied, Note, Problem};
use super::restorations::Restorations;
use crate::config::Config;
use crate::conntrack::Conntrack;

/// Delay after an incomplete apply until the next one, unless an event comes first.
const RETRY: Duration = Duration::from_secs(1);

/// Host network of a running daemon. A relay alone changes nothing there.
pub(super) struct HostController {
    purpose: Purpose,
    network: HostNetwork,
    watch: Watch,
    names: Names,
    /// True if the plan counts as applied only where spoofed sources of the mesh are dropped.
    requires_inverse_guard: bool,
    plan: Option<Arc<Plan>>,
    /// Deviations from the plan.
    problems: Vec<Problem>,
    /// Particularities of this host that need no repair.
    notes: Vec<Note>,
    /// Why the plan does not count as applied. `None` if it does.
    blocked: Option<Blocked>,
    /// Time of the next attempt. Set after an apply that is worth retrying.
    retry: Option<Instant>,
    /// Gateways of the default routes, as of the last [`Self::read_gateways`].
    gateways: Vec<IpAddr>,
    /// Addresses of this host, as of the last [`Self::look_for_overlaps`].
    addresses: Vec<LocalAddress>,
    /// Addresses that datagrams leave from, as of the last [`Self::connectivity`].
    uplinks: Vec<path::LocalAddress>,
    /// Changes of Towline's state by other programs that were undone.
    restorations: Restorations,
    /// Networks of this host that the guards cut off, as of the last [`Self::look_for_overlaps`].
    overlaps: Vec<Overlap>,
    /// Firewalls of other programs that drop traffic of the mesh, as of the last search.
    obstacles: Vec<Obstacle>,
    /// Programs and links that may redirect packets around nftables, as of the last
    /// [`Self::look_for_redirects`]. `None` also where the uplinks are guarded against them.
    past_netfilter: Option<PastNetfilter>,
    /// Why the uplinks are not guarded against redirected packets, as of the last
    /// [`Self::look_for_redirects`].
    unguarded: Option<String>,
}

impl HostController {
    pub(super) fn open(config: &Config, purpose: Purpose) -> anyhow::Result<Self> {
        let names = config.names();
        let mut network = HostNetwork::open().context("cannot open a netlink socket")?;
        let watch = network.watch(&names).context("cannot watch the host's network")?;
        Ok(Self {
            purpose,
            network,
            watch,
            names,
            requires_inverse_guard: config.trust.require_inverse_guard,
            plan: None,
            problems: Vec::new(),
            notes: Vec::new(),
            blocked: Some(Blocked::NoPlan),
            retry: None,
            gateways: Vec::new(),
            addresses: Vec::new(),
            uplinks: Vec::new(),
            restorations: Restorations::default(),
            overlaps: Vec::new(),
            obstacles: Vec::new(),
            past_netfilter: None,
            unguarded: None,
        })
    }

    /// Waits for the next event of the host network, or for the time of the next attempt.
    pub(super) async fn next(&mut self) -> HostEvent {
        let Some(retry) = self.retry else { return self.watched().await };
        tokio::select! {
            event = self.watched() => event,
            () = tokio::time::sleep_until(retry.into()) => HostEvent::OursChanged,
        }
    }

    async fn watched(&mut self) -> HostEvent {
        match self.watch.next().await {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(%error, "cannot watch the host network: retrying");
                tokio::time::sleep(RETRY).await;
                HostEvent::OursChanged
            }
        }
    }

    /// Applies the plan again, since another program may have changed what is ours, and counts it if one did.
    pub(super) fn ours_changed(&mut self) {
        // A retry finishes an apply of our own: nobody else need have changed anything.
        let is_retry = self.retry.is_some();
        let messages = self.restore();
        if messages > 0 && !is_retry {
            self.restorations.add(Instant::now());
        }
    }

    /// Applies a plan, which replaces the last one.
    pub(super) fn apply(&mut self, plan: Arc<Plan>) {
        if self.purpose == Purpose::Relay {
            return;
        }
        let is_first = self.plan.replace(plan).is_none();
        self.reapply();
        if is_first {
            self.look_for_redirects();
        }
    }

    /// Applies the plan again, after another program changed state that Towline created or after an
    /// incomplete apply. Returns the number of netlink messages that changed state.
    pub(super) fn restore(&mut self) -> usize {
        self.network.invalidate();
        self.reapply()
    }

    /// Sets whether the plan counts as applied only where spoofed sources of the mesh are dropped.
    pub(super) fn set_requires_inverse_guard(&mut self, is_required: bool) {
        if std::mem::replace(&mut self.requires_inverse_guard, is_required) != is_required {
            self.restore();
        }
    }

    /// Applies the hooks again, after another program changed a chain with Towline's rules.
    pub(super) fn restore_hooks(&mut self) {
        match self.network.apply_hooks() {
            Ok(changes) => self.changed(&changes),
            // The full apply finds and reports the problem.
            Err(_) => {
                self.restore();
            }
        }
    }

    /// Applies the current plan and evaluates the result. Returns the number of netlink messages that
    /// changed state.
    fn reapply(&mut self) -> usize {
        let Some(plan) = &self.plan else { return 0 };
        match self.network.apply(plan) {
            Ok(changes) => {
                self.changed(&changes);
                changes.messages
            }
            Err(error) => {
                let error = NotApplied::from(&error);
                self.take_problems(vec![error.clone().into()], Vec::new(), Some(error.into()));
                self.retry = Some(Instant::now() + RETRY);
                0
            }
        }
    }

    /// Evaluates an apply: problems, notes, and whether to try again.
    fn changed(&mut self, changes: &Changes) {
        if changes.messages > 0 {
            tracing::debug!(messages = changes.messages, "host network changed");
        }
        let (notes, problems): (Vec<_>, Vec<_>) =
            changes.problems.iter().cloned().partition(|problem| problem.is_note());
        let blocked = blocking(&changes.problems, self.requires_inverse_guard);
        self.take_problems(
            problems.into_iter().map(Problem::Host).collect(),
            notes.into_iter().map(Note::Host).collect(),
            blocked.cloned().map(Blocked::Host),
        );
        let again = changes.problems.iter().any(towline_host::Problem::is_worth_retrying);
        self.retry = again.then(|| Instant::now() + RETRY);
    }

    fn take_problems(
        &mut self,
        problems: Vec<Problem>,
        notes: Vec<Note>,
        blocked: Option<Blocked>,
    ) {
        if problems != self.problems {
            for problem in &problems {
                let code = problem.code();
                tracing::error!(%problem, code, "link, routes or guards are not in place");
            }
        }
        if notes != self.notes {
            for note in &notes {
                tracing::info!(%note, code = note.code(), "host network");
            }
        }
        (self.problems, self.notes, self.blocked) = (problems, notes, blocked);
    }

    /// Returns whether this machine has an address, as of the last [`Self::look_for_overlaps`].
    pub(super) fn has_address(&self, ip: &IpAddr) -> bool {
        self.addresses.iter().any(|local| local.prefix.addr() == *ip)
    }

    /// Returns whether packets to an address enter the tunnel or are dropped. A local network is exempt.
    pub(super) fn is_guarded(&self, ip: &IpAddr) -> bool {
        let guarded = self.plan.iter().flat_map(|plan| &plan.firewall.guarded);
        guarded.into_iter().any(|net| net.contains(ip))
    }

    /// Returns the gateways of the default routes, as of the last read.
    pub(super) fn gateways(&self) -> &[IpAddr] {
        &self.gateways
    }

    /// Returns the problems of the host's network.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let full = Conntrack::read().and_then(Problem::of_conntrack);
        let obstacles = self.obstacles.iter().filter(|obstacle| !obstacle.is_note());
        let obstacles = obstacles.cloned().map(Problem::Firewall);
        let overlaps = self.overlaps.iter().cloned().map(Problem::NetworkCovered);
        let is_disturbed = self.restorations.are_many(Instant::now());
        let removed = is_disturbed.then_some(Problem::StateRemoved);
        let own = self.problems.iter().cloned();
        own.chain(removed).chain(overlaps).chain(obstacles).chain(full).collect()
    }

    /// Returns peculiarities of the host that need no repair.
    pub(super) fn notes(&self) -> Vec<Note> {
        let past = self.past_netfilter.iter().cloned().map(Note::PastNetfilter);
        let obstacles = self.obstacles.iter().filter(|obstacle| obstacle.is_note());
        let obstacles = obstacles.cloned().map(Note::Firewall);
        self.notes.iter().cloned().chain(past).chain(obstacles).collect()
    }

    /// Returns why this machine must not use the mesh yet: a guard is missing, or no packet can
    /// enter the tunnel. `None` if the plan is applied. A relay alone has no plan.
    pub(super) fn blocked(&self) -> Option<&Blocked> {
        match self.purpose {
            Purpose::Node => self.blocked.as_ref(),
            Purpose::Relay => None,
        }
    }

    /// Removes everything that Towline created on the host.
    pub(super) fn remove(&mut self) -> Result<(), String> {
        self.plan = None;
        self.retry = None;
        self.blocked = Some(Blocked::Open);
        let removed = self.network.remove(&self.names).map_err(|error| error.to_string())?;
        tracing::info!(removed, "host network opened");
        Ok(())
    }

    /// Reads the gateways of the default routes.
    pub(super) fn read_gateways(&mut self) {
        match self.network.gateways() {
            Ok(gateways) => self.gateways = gateways,
            Err(error) => tracing::warn!(%error, "default routes not read"),
        }
    }

    /// Looks for programs and links that may redirect packets around nftables, and guards the uplinks
    /// against them. The kernel sends no event when a program is attached.
    pub(super) fn look_for_redirects(&mut self) {
        match self.network.past_netfilter(&self.names.link) {
            Ok(found) => {
                let is_guarded = self.guard_redirects(found.is_some());
                let found = found.filter(|_| !is_guarded);
                if let Some(past) = found.as_ref().filter(|_| found != self.past_netfilter) {
                    tracing::warn!(note = %past, code = past.code(), "host network");
                }
                self.past_netfilter = found;
            }
            Err(error) => tracing::warn!(%error, "programs on links not read"),
        }
    }

    /// Looks for networks of this host that the guards cut off, in a mesh with these overlay ranges.
    pub(super) fn look_for_overlaps(&mut self, overlay: &[IpNet]) {
        match self.network.local_addresses() {
            Ok(found) => self.addresses = found,
            Err(error) => tracing::debug!(%error, "local addresses not read"),
        }
        let found = self.network.overlaps(overlay, &self.addresses);
        for overlap in found.iter().filter(|found| !self.overlaps.contains(found)) {
            tracing::warn!(problem = %overlap, code = overlap.code(), "host network");
        }
        self.overlaps = found;
    }

    /// Returns the search for firewalls of other programs that drop traffic of the mesh, with the addresses of
    /// the last [`Self::look_for_overlaps`]. `peers` are the outer addresses of peers.
    pub(super) fn obstacle_search(&mut self, peers: Vec<SocketAddr>) -> Option<ObstacleSearch> {
        let (addresses, uplinks) = (self.addresses.clone(), self.uplinks.clone());
        self.network.obstacle_search(addresses, uplinks, peers).unwrap_or_else(|error| {
            tracing::debug!(%error, "link not read");
            None
        })
    }

    /// Takes the result of a search.
    pub(super) fn take_obstacles(&mut self, found: Result<Vec<Obstacle>, String>) {
        match found {
            Ok(found) => {
                for obstacle in found.iter().filter(|found| !self.obstacles.contains(found)) {
                    tracing::warn!(problem = %obstacle, code = obstacle.code(), "host network");
                }
                self.obstacles = found;
            }
            Err(error) => tracing::debug!(%error, "firewalls of other programs not read"),
        }
    }

    /// Guards the uplinks against redirected packets, or removes that guard. Returns true if all uplinks
    /// are guarded.
    fn guard_redirects(&mut self, is_wanted: bool) -> bool {
        let (is_guarded, unguarded) = match self.network.guard_redirects(is_wanted) {
            Ok(is_guarded) => (is_guarded, None),
            Err(error) => (false, Some(error.to_string())),
        };
        if let Some(error) = unguarded.as_ref().filter(|_| unguarded != self.unguarded) {
            tracing::warn!(%error, "host network");
        }
        self.unguarded = unguarded;
        is_guarded
    }

    /// Reads how this machine is connected. `excluded` has the networks of which no address is published or
    /// sent from. If the network cannot be read, the machine has no addresses and no networks: then all that
    /// others hold is guarded.
    pub(super) fn connectivity(&mut self, excluded: Vec<IpNet>) -> Connectivity {
        let policy = CandidatePolicy { own_link: self.names.link.clone(), excluded };
        let found = self.network.connectivity(&policy, limits::CANDIDATES / 2);
        let found = found.unwrap_or_else(|error| {
            tracing::warn!(%error, "links, addresses and routes not read");
            Connectivity::default()
        });
        self.uplinks.clone_from(&found.outward.uplinks);
        found
    }
}

/// Returns a problem that keeps the plan from counting as applied.
fn blocking(
    problems: &[towline_host::Problem],
    requires_inverse_guard: bool,
) -> Option<&towline_host::Problem> {
    problems.iter().find(|problem| {
        problem.is_blocking() || requires_inverse_guard && problem.has_open_inverse_guard()
    })
}

/// Returns these addresses as candidates.
pub(super) fn local_candidates(addresses: &[IpAddr], port: u16) -> impl Iterator<Item = Candidate> {
    addresses.iter().filter_map(move |address| {
        Candidate::new(CandidateKind::Local, SocketAddr::new(*address, port))
    })
}

/// Removes everything that Towline created on the host, without a running agent.
pub(super) fn remove(config: &Config) -> anyhow::Result<()> {
    let mut network = HostNetwork::open().context("cannot open a netlink socket")?;
    network.remove(&config.names()).context("cannot open the host")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use towline_host::Problem;

    use super::*;

    #[test]
    fn a_machine_that_requires_the_inverse_guard_is_not_used_without_it() {
        let refused = || "operation not supported".to_owned();
        for open in [Problem::FirewallReduced(refused()), Problem::NoFirewall(refused())] {
            let problems = [Problem::NoIpv6, open];
            assert_eq!(blocking(&problems, false), None, "status names it");
            assert_eq!(blocking(&problems, true), problems.get(1));
        }
        let missing = [Problem::LinkMissing("towline0".to_owned())];
        assert_eq!(blocking(&missing, false), missing.first());
        assert_eq!(blocking(&[Problem::NoIpv6], true), None);
    }
}
