//! Events: what happened lately, as a program shows it to operators.
//!
//! A program keeps its newest [`KEPT`] events in memory. Each has an id that grows, also over restarts, so that a
//! reader can resume after the last event that it saw.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

use tokio::sync::broadcast;
use towline_proto::pb;

/// Number of events that are kept.
pub const KEPT: usize = 1_000;
/// Number of events that a follower may lag behind before it misses some.
const LAG: usize = 256;

/// Id of an event: the number of the program's start, and the event's number since then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventId {
    /// Number of the program's start, which grows.
    pub epoch: u64,
    /// Number of the event, from 1.
    pub number: u64,
}

/// Error of reading an [`EventId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event id looks like 12-345")]
pub struct EventIdError;

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.number)
    }
}

impl FromStr for EventId {
    type Err = EventIdError;

    fn from_str(text: &str) -> Result<Self, EventIdError> {
        let (epoch, number) = text.split_once('-').ok_or(EventIdError)?;
        Ok(Self {
            epoch: epoch.parse().map_err(|_| EventIdError)?,
            number: number.parse().map_err(|_| EventIdError)?,
        })
    }
}

/// The newest events, and those who follow them.
#[derive(Debug)]
pub struct EventLog {
    epoch: u64,
    last: u64,
    kept: VecDeque<pb::Event>,
    followers: broadcast::Sender<pb::Event>,
}

impl EventLog {
    /// Returns the log of a program's start with this number.
    pub fn new(epoch: u64) -> Self {
        let (followers, _) = broadcast::channel(LAG);
        Self { epoch, last: 0, kept: VecDeque::new(), followers }
    }

    /// Adds an event that happened at `at`, in milliseconds since 1970, and forgets the oldest one if there are
    /// too many. The log sets the event's id and time.
    pub fn add(&mut self, at: i64, event: pb::Event) {
        self.last += 1;
        let id = EventId { epoch: self.epoch, number: self.last }.to_string();
        let event = pb::Event { id, at, ..event };
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(event.clone());
        // Nobody may be following.
        let _ = self.followers.send(event);
    }

    /// Returns the kept events after `after`, the oldest first, and a channel of those to come. All
    /// that are kept, if `after` is of another run of the program.
    pub fn read(&self, after: Option<EventId>) -> (Vec<pb::Event>, broadcast::Receiver<pb::Event>) {
        let seen = after.filter(|after| after.epoch == self.epoch).map_or(0, |after| after.number);
        let first = self.last - self.kept.len() as u64;
        let skipped = usize::try_from(seen.saturating_sub(first)).unwrap_or(usize::MAX);
        let events = self.kept.iter().skip(skipped).cloned().collect();
        (events, self.followers.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(log: &EventLog, after: Option<EventId>) -> Vec<u64> {
        let (events, _) = log.read(after);
        events.iter().map(|event| event.id.parse::<EventId>().unwrap().number).collect()
    }

    #[test]
    fn a_reader_resumes_after_the_last_event_that_it_saw() {
        let mut log = EventLog::new(7);
        for _ in 0..3 {
            log.add(0, pb::Event::default());
        }
        let after = |epoch, number| Some(EventId { epoch, number });
        assert_eq!(numbers(&log, None), [1, 2, 3]);
        assert_eq!(numbers(&log, after(7, 2)), [3]);
        assert_eq!(numbers(&log, after(7, 3)), [0; 0]);
        assert_eq!(numbers(&log, after(7, u64::MAX)), [0; 0]);
        assert_eq!(numbers(&log, after(6, 2)), [1, 2, 3], "an earlier run");
    }

    #[test]
    fn the_oldest_events_are_forgotten() {
        let mut log = EventLog::new(1);
        for _ in 0..KEPT + 5 {
            log.add(0, pb::Event::default());
        }
        let kept = numbers(&log, None);
        assert_eq!((kept.len(), kept[0]), (KEPT, 6));
        assert_eq!(numbers(&log, Some(EventId { epoch: 1, number: 2 }))[0], 6);
    }

    #[test]
    fn ids_that_are_none_are_refused() {
        for text in ["", "1", "1-", "-1", "a-b", "1-2-3"] {
            assert_eq!(text.parse::<EventId>(), Err(EventIdError), "{text}");
        }
        assert_eq!("3-4".parse(), Ok(EventId { epoch: 3, number: 4 }));
    }
}
