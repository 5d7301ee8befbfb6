//! Our own addresses as others see them.
//!
//! Reflectors (the controllers, relays, and public nodes of the mesh) are asked by STUN binding
//! requests from the very socket of the tunnels, two reflectors with different addresses for each
//! uplink and family. While a controller's reflector answers with a public address, a node that answers with another
//! one is not believed. From one answer follows a reflexive candidate; from two, and only from two,
//! how the NAT maps. While a NAT stands between, asking again keeps the mapping open.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng;
use towline_types::backoff::{Backoff, Jitter};
use towline_types::id::NodeId;
use towline_types::node::{Candidate, CandidateKind, Node};

use crate::effects::Effects;
use crate::home_relays::{self, HomeRelays};
use crate::local_node::LocalNode;
use crate::output::Output;
use crate::path::{LocalAddress, Path};
use crate::prefixes::is_private;
use crate::status::ReflectorStatus;
use crate::timers::Timer;

/// Number of reflectors that are asked for each uplink and family: two show how the NAT maps.
const REFLECTORS: usize = 2;
/// Largest number of public nodes that reflect for us, in addition to controllers and relays.
const PUBLIC_REFLECTORS: usize = 4;
/// Pauses before an unanswered request is repeated.
const RETRY: Backoff =
    Backoff::new(Duration::from_millis(200), Duration::from_secs(30), Jitter::Tenth);
/// Interval of requests behind a NAT: many forget a mapping after 30 s.
const REFRESH: Duration = Duration::from_secs(20);
/// Interval of requests where there is no NAT.
const REFRESH_OPEN: Duration = Duration::from_secs(300);
/// Time after which an answer that was not renewed is forgotten: four missed requests.
const GOOD_FOR: Duration = Duration::from_secs(90);
/// Requests without an answer from which on a reflector counts as silent: about 6 s.
const SILENT_TRIES: u32 = 5;
/// Requests without an answer up to which the last answer of a controller's reflector still contradicts others: the one
/// that is under way.
const JUDGE_TRIES: u32 = 1;
/// Largest number of addresses at which peers saw us that are remembered.
const OBSERVED: usize = 4;
/// Largest number of reflectors that the status lists.
const LISTED: usize = 16;

/// How the NAT on our side maps: RFC 4787 section 4.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// No NAT: others see our own address.
    None,
    /// Endpoint-independent mapping: one outer address for all remote addresses, so others can find
    /// it.
    Independent,
    /// Address-dependent mapping: another outer address for each remote address, so only the remote
    /// that we sent to can answer.
    Dependent,
}

type Query = (Option<LocalAddress>, SocketAddr);

#[derive(Debug, Default)]
struct QueryState {
    transaction: Option<[u8; 12]>,
    tries: u32,
    due: Option<Instant>,
    mapped: Option<(SocketAddr, Instant)>,
}

/// The reflectors, and what they answered; see the module.
#[derive(Debug, Default)]
pub(crate) struct StunClient {
    /// Reflectors that the controllers offer; asked first.
    offered: Vec<SocketAddr>,
    /// Relays of the mesh; asked next.
    relays: Vec<SocketAddr>,
    /// Nodes that can be called, with their addresses; asked last. No more than
    /// [`PUBLIC_REFLECTORS`].
    public: BTreeMap<NodeId, Vec<SocketAddr>>,
    queries: BTreeMap<Query, QueryState>,
    /// Reflectors of the controllers that ever answered.
    answered: BTreeSet<SocketAddr>,
    /// Addresses that peers saw our pings come from.
    observed: BTreeMap<SocketAddr, Observed>,
}

/// An address that peers saw our pings come from. One peer alone could make up any number of them.
#[derive(Debug)]
struct Observed {
    /// First peer that saw it.
    first: NodeId,
    /// Another peer that saw it, too.
    second: Option<NodeId>,
    /// Time of the last pong.
    at: Instant,
}

impl StunClient {
    /// Takes the reflectors that the controllers offer, whole.
    pub(crate) fn set_offered(
        &mut self,
        fx: &mut Effects,
        local: &LocalNode,
        offered: Vec<SocketAddr>,
    ) {
        if self.offered != offered {
            self.offered = offered;
            self.answered.retain(|known| self.offered.contains(known));
            self.follow(fx, local, false);
        }
    }

    /// Handles a node that is new, changed, or (with `None`) gone, and the relays of the mesh if they
    /// changed.
    pub(crate) fn handle_node(
        &mut self,
        fx: &mut Effects,
        local: &LocalNode,
        id: NodeId,
        node: Option<&Node>,
        relays: Option<&HomeRelays>,
    ) {
        let public = node.map(home_relays::addresses).unwrap_or_default();
        let known = self.public.get(&id).map(Vec::as_slice).unwrap_or_default();
        let changed = known != public;
        let of_use = self.public.len() < PUBLIC_REFLECTORS || self.public.contains_key(&id);
        if changed && public.is_empty() {
            self.public.remove(&id);
        } else if changed && of_use {
            self.public.insert(id, public);
        }
        if let Some(relays) = relays {
            self.relays = relays.addresses().collect();
        }
        if relays.is_some() || changed && of_use {
            self.follow(fx, local, false);
        }
    }

    /// Asks all reflectors at once, since our addresses or uplinks changed. Known answers stay
    /// where the uplink is the same.
    pub(crate) fn handle_local_change(&mut self, fx: &mut Effects, local: &LocalNode) {
        self.follow(fx, local, true);
    }

    /// Asks all reflectors from another port, to which no known answer applies.
    pub(crate) fn handle_port_change(&mut self, fx: &mut Effects, local: &LocalNode) {
        self.queries.clear();
        self.observed.clear();
        self.follow(fx, local, false);
    }

    /// Chooses the reflectors again, since they changed, or (with `is_local_change`) our addresses.
    fn follow(&mut self, fx: &mut Effects, local: &LocalNode, is_local_change: bool) {
        let now = fx.now;
        let mut wanted: Vec<Query> = Vec::new();
        for v4 in [true, false] {
            let mut reflectors: Vec<SocketAddr> = Vec::new();
            let public = self.public.values().flatten();
            for address in self.offered.iter().chain(&self.relays).chain(public) {
                let other = reflectors.iter().all(|known| known.ip() != address.ip());
                if address.is_ipv4() == v4 && other && local.can_send_to(*address) {
                    reflectors.push(*address);
                }
                if reflectors.len() == REFLECTORS {
                    break;
                }
            }
            for end in local.ends(v4) {
                wanted.extend(reflectors.iter().map(|to| (end, *to)));
            }
        }
        if is_local_change {
            self.observed.clear();
            let queries = std::mem::take(&mut self.queries).into_iter();
            let still = queries.filter_map(|((end, remote), asked)| {
                let path = local.still(Path { local: end, ..Path::direct(remote) })?;
                // A path is named where there are several addresses to answer from; a request only where
                // several links lead outside.
                let ends = local.ends(remote.is_ipv4());
                let end = path.local.filter(|_| ends.contains(&path.local));
                let asked =
                    QueryState { mapped: asked.mapped, due: Some(now), ..QueryState::default() };
                Some(((end, remote), asked))
            });
            self.queries = still.collect();
        }
        self.queries.retain(|query, _| wanted.contains(query));
        for query in wanted {
            self.queries
                .entry(query)
                .or_insert_with(|| QueryState { due: Some(now), ..QueryState::default() });
        }
        self.schedule(fx);
    }

    /// Sends the requests that are due. Returns whether our reflexive addresses may be others now.
    pub(crate) fn handle_timeout(&mut self, fx: &mut Effects, local: &LocalNode) -> bool {
        let now = fx.now;
        let mut forgot = false;
        self.observed.retain(|_, observed| {
            let keep = now < observed.at + GOOD_FOR;
            forgot |= !keep;
            keep
        });
        for ((end, to), asked) in &mut self.queries {
            if asked.mapped.is_some_and(|(_, at)| now >= at + GOOD_FOR) {
                asked.mapped = None;
                forgot = true;
            }
            if asked.due.is_none_or(|due| due > now) {
                continue;
            }
            let transaction = fx.rng.random();
            asked.transaction = Some(transaction);
            asked.due = Some(now + RETRY.pause(asked.tries, fx.rng.random()));
            asked.tries = asked.tries.saturating_add(1);
            // From now on it contradicts nobody.
            forgot |= asked.tries == JUDGE_TRIES + 1 && self.offered.contains(to);
            if local.can_send_to(*to) {
                let to = Path { local: *end, ..local.path_to(*to) };
                fx.output(Output::Stun { to, transaction });
            }
        }
        self.schedule(fx);
        forgot
    }

    /// Handles an answer. Returns whether our reflexive addresses may be others now.
    pub(crate) fn handle_answer(
        &mut self,
        fx: &mut Effects,
        local: &LocalNode,
        from: SocketAddr,
        transaction: [u8; 12],
        mapped: SocketAddr,
    ) -> bool {
        let asked = self
            .queries
            .iter_mut()
            .find(|((_, to), asked)| *to == from && asked.transaction == Some(transaction));
        let Some((_, asked)) = asked else {
            fx.counters.stun_refused += 1;
            return false;
        };
        let usable = Candidate::new(CandidateKind::Reflexive, mapped)
            .filter(|c| !local.is_inside(c.address().ip()) && mapped.is_ipv4() == from.is_ipv4());
        let Some(candidate) = usable else {
            fx.counters.stun_refused += 1;
            return false;
        };
        fx.silence.reflected(fx.now);
        if self.offered.contains(&from) {
            self.answered.insert(from);
        }
        let open = local.is_own(candidate.address());
        asked.transaction = None;
        let contradicts_again = asked.tries > JUDGE_TRIES;
        asked.tries = 0;
        asked.due = Some(fx.now + if open { REFRESH_OPEN } else { REFRESH });
        let before =
            asked.mapped.replace((candidate.address(), fx.now)).map(|(address, _)| address);
        self.schedule(fx);
        before != Some(candidate.address()) || contradicts_again
    }

    /// Handles an address at which a peer saw our ping. It becomes a candidate once a second peer saw it, or if a
    /// reflector's answer has the same IP address: then the peer tells only another port of our NAT. Returns whether
    /// there is a new candidate.
    pub(crate) fn handle_observed(
        &mut self,
        now: Instant,
        local: &LocalNode,
        peer: NodeId,
        address: SocketAddr,
    ) -> bool {
        let usable = Candidate::new(CandidateKind::Reflexive, address)
            .is_some_and(|c| !local.is_inside(c.address().ip()) && !local.is_own(c.address()));
        if !usable {
            return false;
        }
        let was_known = self.known().any(|known| known == address);
        if let Some(observed) = self.observed.get_mut(&address) {
            observed.at = now;
            if observed.first != peer {
                observed.second = Some(peer);
            }
        } else {
            if was_known {
                return false;
            }
            self.make_room(peer);
            self.observed.insert(address, Observed { first: peer, second: None, at: now });
        }
        !was_known && self.known().any(|known| known == address)
    }

    /// Forgets an observed address if there are too many: the oldest one that the same peer saw first and no other,
    /// else the oldest of those that one peer alone saw, else the oldest. So a peer that makes up addresses
    /// displaces its own.
    fn make_room(&mut self, peer: NodeId) {
        if self.observed.len() < OBSERVED {
            return;
        }
        let first_to_go = self.observed.iter().min_by_key(|(_, observed)| {
            let is_own = observed.first == peer && observed.second.is_none();
            (!is_own, observed.second.is_some(), observed.at)
        });
        if let Some(address) = first_to_go.map(|(address, _)| *address) {
            self.observed.remove(&address);
        }
    }

    /// Returns our known outer addresses.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = Candidate> {
        self.known().filter_map(|address| Candidate::new(CandidateKind::Reflexive, address))
    }

    /// Returns how the NAT maps, for the family for which two reflectors answered; IPv4 first.
    pub(crate) fn mapping(&self, local: &LocalNode) -> Option<Mapping> {
        [true, false].into_iter().find_map(|v4| {
            let mut seen: BTreeMap<Option<LocalAddress>, Vec<SocketAddr>> = BTreeMap::new();
            for ((end, to), asked) in &self.queries {
                if to.is_ipv4() == v4
                    && let Some((mapped, _)) = asked.mapped
                {
                    seen.entry(*end).or_default().push(mapped);
                }
            }
            // What the kernel sends by several links, as a multipath route does, meets several NATs.
            if local.ends(v4).len() > 1 {
                seen.remove(&None);
            }
            let of_two = seen.into_values().find(|mapped| mapped.len() >= 2)?;
            Some(if of_two.iter().all(|mapped| local.is_own(*mapped)) {
                Mapping::None
            } else if of_two.iter().all(|mapped| *mapped == of_two[0]) {
                Mapping::Independent
            } else {
                Mapping::Dependent
            })
        })
    }

    /// Returns the reflectors that are known, in the order in which they are asked, with what they
    /// answered lately. Bounded.
    pub(crate) fn reflectors(&self, local: &LocalNode) -> Vec<ReflectorStatus> {
        let mut found: Vec<ReflectorStatus> = Vec::new();
        for address in self.offered.iter().chain(&self.relays).chain(self.public.values().flatten())
        {
            let is_new = found.iter().all(|known| known.address != *address);
            if found.len() < LISTED && is_new && local.can_send_to(*address) {
                let mut queries = self.queries.iter().filter(|((_, to), _)| to == address);
                let mapped = queries.find_map(|(_, asked)| Some(asked.mapped?.0));
                found.push(ReflectorStatus { address: *address, mapped });
            }
        }
        found
    }

    /// Returns whether reflectors were asked a few times and none ever answered: several, or with `is_alone`
    /// (no peer was ever reached either) one of a controller, which runs.
    pub(crate) fn is_silent(&self, is_alone: bool) -> bool {
        let is_offered = |(_, remote): &Query| self.offered.contains(remote);
        let is_enough =
            self.queries.len() >= REFLECTORS || is_alone && self.queries.keys().any(is_offered);
        is_enough && self.queries.values().all(|asked| asked.mapped.is_none() && asked.tries > 3)
    }

    /// Returns the reflectors of the controllers that were asked a few times and never answered.
    pub(crate) fn silent(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        let asked = |to: &SocketAddr| {
            let mut queries = self.queries.iter().filter(|((_, asked), _)| asked == to).peekable();
            let is_asked = queries.peek().is_some();
            is_asked
                && queries.all(|(_, asked)| asked.mapped.is_none() && asked.tries > SILENT_TRIES)
        };
        let never = |to: &SocketAddr| !self.answered.contains(to);
        self.offered.iter().copied().filter(move |to| never(to) && asked(to))
    }

    fn known(&self) -> impl Iterator<Item = SocketAddr> {
        let asked = self.reflected();
        let observed = self.observed.iter().filter(move |(address, seen)| {
            seen.second.is_some() || self.is_reflected(address.ip())
        });
        asked.chain(observed.map(|(address, _)| *address))
    }

    /// Returns whether a reflector's answer has this IP address.
    fn is_reflected(&self, address: IpAddr) -> bool {
        self.reflected().any(|reflected| reflected.ip() == address)
    }

    /// Returns the answers of reflectors that are believed.
    fn reflected(&self) -> impl Iterator<Item = SocketAddr> {
        self.queries.iter().filter_map(|(query, asked)| {
            let (mapped, _) = asked.mapped?;
            (!self.is_contradicted(query, mapped.ip())).then_some(mapped)
        })
    }

    /// Returns whether the answer of a node is contradicted by the controllers' reflectors, which were asked by the
    /// same uplink and answer with other public addresses. One in our own LAN sees a private address, and says nothing
    /// of what others see.
    fn is_contradicted(&self, (end, to): &Query, address: IpAddr) -> bool {
        if self.offered.contains(to) {
            return false;
        }
        let judges = self.queries.iter().filter(|((by, judge), asked)| {
            by == end
                && judge.is_ipv4() == to.is_ipv4()
                && self.offered.contains(judge)
                && asked.tries <= JUDGE_TRIES
        });
        let mut public = judges
            .filter_map(|(_, asked)| Some(asked.mapped?.0.ip()))
            .filter(|mapped| !is_private(*mapped))
            .peekable();
        public.peek().is_some() && public.all(|mapped| mapped != address)
    }

    fn schedule(&self, fx: &mut Effects) {
        match self.queries.values().filter_map(|asked| asked.due).min() {
            Some(due) => fx.timers.set(Timer::StunClient, due),
            None => fx.timers.cancel(Timer::StunClient),
        }
    }
}

#[cfg(test)]
mod tests {
    use towline_types::mtu::Mtu;

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_peers_word_on_our_address_needs_a_second_one_or_a_reflector_with_the_same_address() {
        #[allow(clippy::disallowed_methods)] // some instant to count from
        let now = Instant::now();
        let local = LocalNode::new(None, Mtu::DEFAULT);
        let mut stun = StunClient::default();
        let (ours, forged) = (address("203.0.113.9:4000"), address("198.51.100.1:4000"));
        let known = |stun: &StunClient| stun.known().collect::<Vec<_>>();
        assert!(!stun.handle_observed(now, &local, NodeId([1; 16]), ours));
        assert!(!stun.handle_observed(now, &local, NodeId([1; 16]), ours), "the same peer again");
        assert!(known(&stun).is_empty());
        assert!(stun.handle_observed(now, &local, NodeId([2; 16]), ours));
        assert_eq!(known(&stun), [ours]);

        // One peer that makes up addresses displaces its own.
        for port in 1..20 {
            let made_up = SocketAddr::new(forged.ip(), port);
            assert!(!stun.handle_observed(now, &local, NodeId([3; 16]), made_up));
        }
        assert_eq!((known(&stun), stun.observed.len()), (vec![ours], OBSERVED));

        let other_port = address("203.0.113.50:7000");
        let reflected = QueryState {
            mapped: Some((address("203.0.113.50:6000"), now)),
            ..QueryState::default()
        };
        stun.queries.insert((None, address("192.0.2.1:7443")), reflected);
        assert!(stun.handle_observed(now, &local, NodeId([3; 16]), other_port));
    }

    #[test]
    fn a_node_that_reflects_is_not_believed_against_a_controllers_reflector_that_answers() {
        #[allow(clippy::disallowed_methods)] // some instant to count from
        let now = Instant::now();
        let local = LocalNode::new(None, Mtu::DEFAULT);
        let (controller, node) = (address("192.0.2.1:7443"), address("192.0.2.7:51830"));
        let mut stun = StunClient { offered: vec![controller], ..StunClient::default() };
        let answered = |stun: &mut StunClient, reflector, mapped, tries| {
            let mapped = Some((address(mapped), now));
            let answer = QueryState { mapped, tries, ..QueryState::default() };
            stun.queries.insert((None, reflector), answer);
        };
        let known = |stun: &StunClient| {
            let mut known: Vec<_> = stun.known().map(|address| address.to_string()).collect();
            known.sort_unstable();
            known
        };
        let (ours, forged) = ("203.0.113.9:4000", "203.0.113.66:53");
        answered(&mut stun, node, forged, 0);
        assert_eq!(known(&stun), [forged], "nobody else answers");
        answered(&mut stun, controller, ours, 1);
        assert_eq!(known(&stun), [ours]);
        let pong = address("203.0.113.66:54");
        assert!(!stun.handle_observed(now, &local, NodeId([7; 16]), pong), "nor its pongs");
        // A NAT that maps dependent on the remote address has one IP address.
        answered(&mut stun, node, "203.0.113.9:4001", 0);
        assert_eq!(known(&stun), [ours, "203.0.113.9:4001"]);

        stun.observed.clear();
        answered(&mut stun, node, forged, 0);
        answered(&mut stun, controller, ours, 2);
        assert_eq!(known(&stun), [forged, ours], "the NAT may have another address by now");
        // A controller in our LAN does not see what others see.
        answered(&mut stun, controller, "192.168.1.5:51830", 0);
        assert_eq!(known(&stun), ["192.168.1.5:51830", forged]);
    }
}
