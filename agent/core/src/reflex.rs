//! Our own addresses as others see them.
//!
//! Reflectors (the controllers, relays, and public nodes of the mesh) are asked by STUN binding
//! requests from the very socket of the tunnels, two reflectors with different addresses for each
//! uplink and family. From one answer follows a reflexive candidate; from two, and only from two,
//! how the NAT maps. While a NAT stands between, asking again keeps the mapping open.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use towline_types::backoff::{Backoff, Jitter};
use towline_types::node::{Candidate, CandidateKind};

use crate::counters::Counters;
use crate::local::Local;
use crate::output::Output;
use crate::path::{LocalEnd, Path};
use crate::timers::{Timer, Timers};

/// Reflectors that are asked for each uplink and family.
const REFLECTORS: usize = 2;
/// Pauses before an unanswered request is repeated.
const RETRY: Backoff =
    Backoff::new(Duration::from_millis(200), Duration::from_secs(30), Jitter::Tenth);
/// How often is asked again behind a NAT: many forget a mapping after 30 s.
const REFRESH: Duration = Duration::from_secs(20);
/// And where there is none.
const REFRESH_OPEN: Duration = Duration::from_secs(300);
/// An answer that was not renewed for so long is forgotten.
const GOOD_FOR: Duration = Duration::from_secs(90);
/// Addresses that peers saw us at, besides.
const OBSERVED: usize = 4;

/// How the NAT on our side maps: RFC 4787 section 4.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// There is none: we are seen as we are.
    None,
    /// One address outside, whomever we speak to: others can find it.
    Independent,
    /// Another one for each remote address: only who was called can answer.
    Dependent,
}

type Query = (Option<LocalEnd>, SocketAddr);

#[derive(Debug, Default)]
struct Asked {
    transaction: Option<[u8; 12]>,
    tries: u32,
    due: Option<Instant>,
    mapped: Option<(SocketAddr, Instant)>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Reflex {
    /// The controllers' reflectors, and those of the mesh.
    pub(crate) offered: Vec<SocketAddr>,
    pub(crate) mesh: Vec<SocketAddr>,
    queries: BTreeMap<Query, Asked>,
    /// Where peers saw our pings come from.
    observed: BTreeMap<SocketAddr, Instant>,
}

impl Reflex {
    /// The reflectors or our uplinks are others now. With `anew`, our addresses changed: all are
    /// asked at once, and what was known holds only where the uplink is the same.
    pub(crate) fn follow(&mut self, now: Instant, local: &Local, timers: &mut Timers, anew: bool) {
        let mut wanted: Vec<Query> = Vec::new();
        for v4 in [true, false] {
            let mut reflectors: Vec<SocketAddr> = Vec::new();
            for address in self.offered.iter().chain(&self.mesh) {
                let other = reflectors.iter().all(|known| known.ip() != address.ip());
                if address.is_ipv4() == v4 && other && local.may_send_to(*address) {
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
        if anew {
            self.observed.clear();
            let queries = std::mem::take(&mut self.queries).into_iter();
            let still = queries.filter_map(|((end, remote), asked)| {
                let path = local.still(Path { local: end, remote, channel: None })?;
                let asked = Asked { mapped: asked.mapped, due: Some(now), ..Asked::default() };
                Some(((path.local, remote), asked))
            });
            self.queries = still.collect();
        }
        self.queries.retain(|query, _| wanted.contains(query));
        for query in wanted {
            self.queries
                .entry(query)
                .or_insert_with(|| Asked { due: Some(now), ..Asked::default() });
        }
        self.schedule(timers);
    }

    /// Asks whom it is time to ask. Says whether something was forgotten.
    pub(crate) fn ask(
        &mut self,
        now: Instant,
        rng: &mut StdRng,
        local: &Local,
        timers: &mut Timers,
        outputs: &mut VecDeque<Output>,
    ) -> bool {
        let mut forgot = false;
        self.observed.retain(|_, at| {
            let keep = now < *at + GOOD_FOR;
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
            let transaction = rng.random();
            asked.transaction = Some(transaction);
            asked.due = Some(now + RETRY.pause(asked.tries, rng.random()));
            asked.tries = asked.tries.saturating_add(1);
            if local.may_send_to(*to) {
                outputs.push_back(Output::Stun { local: *end, to: *to, transaction });
            }
        }
        self.schedule(timers);
        forgot
    }

    /// Takes an answer. Says whether our reflexive addresses may be others now.
    #[expect(clippy::too_many_arguments, reason = "an answer, and what it is judged by")]
    pub(crate) fn answer(
        &mut self,
        now: Instant,
        local: &Local,
        timers: &mut Timers,
        counters: &mut Counters,
        from: SocketAddr,
        transaction: [u8; 12],
        mapped: SocketAddr,
    ) -> bool {
        let asked = self
            .queries
            .iter_mut()
            .find(|((_, to), asked)| *to == from && asked.transaction == Some(transaction));
        let Some((_, asked)) = asked else {
            counters.stun_refused += 1;
            return false;
        };
        let usable = Candidate::new(CandidateKind::Reflexive, mapped)
            .filter(|c| !local.inside(c.address().ip()) && mapped.is_ipv4() == from.is_ipv4());
        let Some(candidate) = usable else {
            counters.stun_refused += 1;
            return false;
        };
        let open = local.is_own(candidate.address());
        asked.transaction = None;
        asked.tries = 0;
        asked.due = Some(now + if open { REFRESH_OPEN } else { REFRESH });
        let before = asked.mapped.replace((candidate.address(), now)).map(|(address, _)| address);
        self.schedule(timers);
        before != Some(candidate.address())
    }

    /// A peer saw our ping come from there. Says whether that is news.
    pub(crate) fn observed(&mut self, now: Instant, local: &Local, address: SocketAddr) -> bool {
        let usable = Candidate::new(CandidateKind::Reflexive, address)
            .is_some_and(|c| !local.inside(c.address().ip()) && !local.is_own(c.address()));
        if !usable || self.known().any(|known| known == address) {
            if let Some(at) = self.observed.get_mut(&address) {
                *at = now;
            }
            return false;
        }
        if self.observed.len() == OBSERVED
            && let Some(oldest) = self.observed.iter().min_by_key(|(_, at)| **at).map(|(a, _)| *a)
        {
            self.observed.remove(&oldest);
        }
        self.observed.insert(address, now);
        true
    }

    /// Our addresses outside, as far as they are known.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = Candidate> {
        self.known().filter_map(|address| Candidate::new(CandidateKind::Reflexive, address))
    }

    /// How the NAT maps, for the family for which two reflectors answered; IPv4 first.
    pub(crate) fn mapping(&self, local: &Local) -> Option<Mapping> {
        [true, false].into_iter().find_map(|v4| {
            let mut seen: BTreeMap<Option<LocalEnd>, Vec<SocketAddr>> = BTreeMap::new();
            for ((end, to), asked) in &self.queries {
                if to.is_ipv4() == v4
                    && let Some((mapped, _)) = asked.mapped
                {
                    seen.entry(*end).or_default().push(mapped);
                }
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

    /// Whether several reflectors were asked a few times and none ever answered.
    pub(crate) fn silent(&self) -> bool {
        self.queries.len() >= REFLECTORS
            && self.queries.values().all(|asked| asked.mapped.is_none() && asked.tries > 3)
    }

    fn known(&self) -> impl Iterator<Item = SocketAddr> {
        let asked = self.queries.values().filter_map(|asked| Some(asked.mapped?.0));
        asked.chain(self.observed.keys().copied())
    }

    fn schedule(&self, timers: &mut Timers) {
        match self.queries.values().filter_map(|asked| asked.due).min() {
            Some(due) => timers.set(Timer::Reflex, due),
            None => timers.cancel(Timer::Reflex),
        }
    }
}
