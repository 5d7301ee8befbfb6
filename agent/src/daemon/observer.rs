//! What operators read over time: events, rates of traffic, and problems that come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use towline_dataplane::Traffic;
use towline_proto::code::Coded;
use towline_proto::id::WireguardKey;

use super::problem::Problem;
use crate::events::{Event, EventLog, Reason, unix_millis};

/// Interval between two looks at traffic and problems.
const PERIOD: Duration = Duration::from_secs(5);

/// Events, rates and known problems of a running agent.
#[derive(Debug)]
pub(super) struct Observer {
    log: EventLog,
    problems: BTreeSet<Reason>,
    /// Time of the next look.
    due: Instant,
    counted: Option<Instant>,
    traffic: BTreeMap<WireguardKey, Traffic>,
    rates: BTreeMap<WireguardKey, Rates>,
}

/// Mean rates of one peer's inner traffic over the last period, in bytes per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rates {
    pub(super) received: u64,
    pub(super) sent: u64,
}

impl Observer {
    /// Returns the observer of an agent that starts now with this boot epoch.
    pub(super) fn new(now: Instant, boot_epoch: u64) -> Self {
        let mut log = EventLog::new(boot_epoch);
        log.add(unix_millis(SystemTime::now()), Event::AgentStarted.message());
        Self {
            log,
            problems: BTreeSet::new(),
            due: now + PERIOD,
            counted: None,
            traffic: BTreeMap::new(),
            rates: BTreeMap::new(),
        }
    }

    /// Returns when [`Self::look`] is to be called.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Records an event that happens now.
    pub(super) fn happened(&mut self, event: &Event) {
        self.log.add(unix_millis(SystemTime::now()), event.message());
    }

    /// Returns the log of the events.
    pub(super) fn log(&self) -> &EventLog {
        &self.log
    }

    /// Compares the problems and the traffic with those of the last look.
    pub(super) fn look(
        &mut self,
        now: Instant,
        problems: &[Problem],
        traffic: BTreeMap<WireguardKey, Traffic>,
    ) {
        self.due = now + PERIOD;
        let current: BTreeSet<Reason> = problems.iter().map(reason).collect();
        let known = std::mem::take(&mut self.problems);
        // A text may contain figures that change. The same problem with other figures is no news.
        let codes = |list: &BTreeSet<Reason>| -> BTreeSet<String> {
            list.iter().map(|reason| reason.code.clone()).collect()
        };
        let (before, after) = (codes(&known), codes(&current));
        for found in current.iter().filter(|reason| !before.contains(&reason.code)) {
            let event = Event::ProblemFound(found.clone());
            let (code, problem) = (found.code.as_str(), found.text.as_str());
            tracing::warn!(event = event.code(), code, problem, "problem found");
            self.happened(&event);
        }
        for solved in known.iter().filter(|reason| !after.contains(&reason.code)) {
            let event = Event::ProblemSolved(solved.clone());
            let (code, problem) = (solved.code.as_str(), solved.text.as_str());
            tracing::info!(event = event.code(), code, problem, "problem solved");
            self.happened(&event);
        }
        self.problems = current;
        self.count(now, traffic);
    }

    fn count(&mut self, now: Instant, traffic: BTreeMap<WireguardKey, Traffic>) {
        let seconds = self.counted.map(|at| now.saturating_duration_since(at).as_secs_f64());
        let rates = traffic.iter().filter_map(|(key, traffic)| {
            let seconds = seconds.filter(|seconds| *seconds > 0.0)?;
            let before = self.traffic.get(key)?;
            let rate = |now: u64, then: u64| (now.saturating_sub(then) as f64 / seconds) as u64;
            let received = rate(traffic.received_bytes, before.received_bytes);
            Some((*key, Rates { received, sent: rate(traffic.sent_bytes, before.sent_bytes) }))
        });
        self.rates = rates.collect();
        self.traffic = traffic;
        self.counted = Some(now);
    }

    /// Returns the rates of a peer. `None` before the second look.
    pub(super) fn rates(&self, key: &WireguardKey) -> Option<Rates> {
        self.rates.get(key).copied()
    }
}

/// Returns a reason or problem with its code.
pub(super) fn reason(value: &(impl Coded + ToString)) -> Reason {
    Reason { code: value.code().into(), text: value.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_last_period() {
        let (start, key) = (Instant::now(), WireguardKey([1; 32]));
        let mut observer = Observer::new(start, 1);
        let mut look = |after: u64, received_bytes: u64, sent_bytes: u64| {
            let now = start + Duration::from_secs(after);
            let traffic = Traffic { received_bytes, sent_bytes };
            observer.look(now, &[], [(key, traffic)].into());
            observer.rates(&key)
        };
        assert_eq!(look(0, 100, 0), None);
        assert_eq!(look(5, 600, 50), Some(Rates { received: 100, sent: 10 }));
        assert_eq!(look(10, 0, 50), Some(Rates::default()), "counted again");
    }

    #[test]
    fn a_problem_is_an_event_when_it_comes_and_when_it_goes() {
        let start = Instant::now();
        let mut observer = Observer::new(start, 1);
        for problems in [&[Problem::Removed][..], &[Problem::Removed], &[]] {
            observer.look(start, problems, BTreeMap::new());
        }
        let (events, _) = observer.log().read(None);
        let codes: Vec<&str> = events.iter().map(|event| event.code.as_str()).collect();
        assert_eq!(codes, ["agent-started", "problem-found", "problem-solved"]);
    }
}
