//! Judges what a flood did to the path between two nodes, by what an operator sees at both ends.
//!
//! The path may move to another address of the peer, because that one is better while answers on the flooded one
//! take longer. It must not move because the flooded one is silent, and probes must not get lost: both show that
//! the flood uses up what the peer needs.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, anyhow};
use jiff::Timestamp;
use serde::Deserialize;

use crate::lab::mesh::Node;

/// Pings of each end. With [`PING_INTERVAL`] they take about as long as a flood, and less than a command may if none
/// is answered.
const PINGS: &str = "28";
/// Interval between two pings, in milliseconds.
const PING_INTERVAL: &str = "250";
/// Limit for the answer to a ping, in milliseconds.
const PING_TIMEOUT: &str = "500";
/// Pings of one end that may get lost: queues of a busy machine lose some. Where a flood uses up the limit of pongs,
/// half of them are lost.
const LOST_AT_MOST: usize = 3;
/// Code of a change to a better path.
const BETTER: &str = "path-better";
/// Codes of changes by which one end follows the other.
const FOLLOWING: [&str; 2] = ["path-by-handshake", "path-by-roaming"];

/// One end of the path.
#[derive(Debug, Clone, Copy)]
pub(super) struct End<'n> {
    /// Node of this end.
    pub(super) node: &'n Node,
    /// Name of the node at the other end.
    pub(super) peer: &'static str,
}

/// Part of `towline ping -o json` that is read.
#[derive(Debug, Deserialize)]
struct Pings {
    sent: usize,
    received: usize,
}

/// Part of `towline peer -o json` that is read.
#[derive(Debug, Deserialize)]
struct PeerSheet {
    history: Vec<Change>,
}

/// Change of state or path of a peer.
#[derive(Debug, Deserialize)]
struct Change {
    at: String,
    from_state: Option<String>,
    to_state: Option<String>,
    from_path: Option<String>,
    to_path: Option<String>,
    reason_code: Option<String>,
}

/// Part of `towline status -o json` that is read.
#[derive(Debug, Deserialize)]
struct Status {
    drops: BTreeMap<String, u64>,
}

/// What one end saw of a flood.
#[derive(Debug)]
struct Seen {
    name: String,
    pings: Pings,
    changes: Vec<Change>,
    /// Counters that grew, each with the difference.
    drops: BTreeMap<String, u64>,
}

/// Runs `flood` while both ends ping each other. `flood` returns a fault that it found itself. Returns the faults of
/// the path with what both ends saw, or `None` if there is none.
pub(super) fn judge(
    ends: [End<'_>; 2],
    flood: impl FnOnce() -> anyhow::Result<Option<String>>,
) -> anyhow::Result<Option<String>> {
    let since = Timestamp::now();
    let before = [ends[0].drops()?, ends[1].drops()?];
    let (flooded, pings) = std::thread::scope(|scope| {
        let pings = ends.map(|end| scope.spawn(move || end.pings()));
        let flooded = flood();
        let pings = pings.map(|pings| {
            pings.join().unwrap_or_else(|_| Err(anyhow!("the thread of the pings panicked")))
        });
        (flooded, pings)
    });
    let mut faults = Vec::from_iter(flooded?);
    let mut seen = Vec::new();
    for ((end, before), pings) in ends.into_iter().zip(before).zip(pings) {
        seen.push(end.seen(since, &before, pings?)?);
    }
    faults.extend(self::faults(&seen));
    if faults.is_empty() {
        return Ok(None);
    }
    let mut report = faults.join("; ");
    for seen in &seen {
        seen.write(&mut report)?;
    }
    Ok(Some(report))
}

/// Returns what must not happen to the path in a flood.
fn faults(seen: &[Seen]) -> Vec<String> {
    let mut faults = Vec::new();
    for (place, Seen { name, pings, changes, .. }) in seen.iter().enumerate() {
        let lost = pings.sent - pings.received.min(pings.sent);
        if lost > LOST_AT_MOST {
            faults.push(format!("{lost} of {} pings of {name} were lost", pings.sent));
        }
        // One end chooses the better path, and the other one follows. The times that this one measured may differ.
        let others = seen.iter().enumerate().filter(|(other, _)| *other != place);
        let is_chosen =
            others.flat_map(|(_, other)| &other.changes).any(|change| change.is(BETTER));
        let is_allowed = |change: &&Change| {
            change.is(BETTER) || is_chosen && FOLLOWING.iter().any(|code| change.is(code))
        };
        if let Some(change) = changes.iter().find(|change| !is_allowed(change)) {
            faults.push(format!("at {name}: {}", change.text()));
        }
    }
    faults
}

impl End<'_> {
    fn pings(self) -> anyhow::Result<Pings> {
        let Self { node, peer } = self;
        let flags = ["--count", PINGS, "--interval", PING_INTERVAL, "--timeout", PING_TIMEOUT];
        let arguments: Vec<&str> =
            ["ping", peer].into_iter().chain(flags).chain(["-o", "json"]).collect();
        // It fails if no ping is answered, after it printed that.
        let output = node.command(&arguments)?;
        serde_json::from_str(&output.stdout)
            .with_context(|| format!("`towline ping {peer}`: {}", output.stderr.trim()))
    }

    fn drops(self) -> anyhow::Result<BTreeMap<String, u64>> {
        let output = self.node.command_ok(&["status", "-o", "json"])?;
        let status: Status =
            serde_json::from_str(&output).context("cannot parse the output of `towline status`")?;
        Ok(status.drops)
    }

    fn seen(
        self,
        since: Timestamp,
        before: &BTreeMap<String, u64>,
        pings: Pings,
    ) -> anyhow::Result<Seen> {
        let output = self.node.command_ok(&["peer", self.peer, "-o", "json"])?;
        let sheet: PeerSheet =
            serde_json::from_str(&output).context("cannot parse the output of `towline peer`")?;
        let mut changes = Vec::new();
        for change in sheet.history {
            if change.at.parse::<Timestamp>().context("a change has no time")? >= since {
                changes.push(change);
            }
        }
        let mut drops = self.drops()?;
        for (name, count) in &mut drops {
            *count = count.saturating_sub(before.get(name).copied().unwrap_or_default());
        }
        drops.retain(|_, count| *count > 0);
        Ok(Seen { name: self.node.name().to_owned(), pings, changes, drops })
    }
}

impl Seen {
    /// Appends everything that was seen.
    fn write(&self, report: &mut String) -> std::fmt::Result {
        let Self { name, pings: Pings { sent, received }, changes, drops } = self;
        write!(report, "\n  {name}: {received} of {sent} pings answered; drops {drops:?}")?;
        for change in changes {
            write!(report, "\n  {name}: {} {}", change.at, change.text())?;
        }
        Ok(())
    }
}

impl Change {
    /// Returns whether it is a change of path with the reason of this code.
    fn is(&self, code: &str) -> bool {
        self.to_state.is_none() && self.reason_code.as_deref() == Some(code)
    }

    fn text(&self) -> String {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
        match &self.to_state {
            Some(to) => format!("{} -> {to}", or_none(&self.from_state)),
            None => format!(
                "{} -> {}: {}",
                or_none(&self.from_path),
                or_none(&self.to_path),
                or_none(&self.reason_code)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(received: usize, codes: &[&str]) -> Seen {
        let change = |code: &&str| Change {
            at: "2026-01-01T00:00:00Z".to_owned(),
            from_state: None,
            to_state: None,
            from_path: Some("direct 203.0.113.11:51830".to_owned()),
            to_path: Some("direct [2001:db8::11]:51830".to_owned()),
            reason_code: Some((*code).to_owned()),
        };
        let changes = codes.iter().map(change).collect();
        let (pings, drops) = (Pings { sent: 28, received }, BTreeMap::new());
        Seen { name: "cp".to_owned(), pings, changes, drops }
    }

    #[test]
    fn a_path_may_move_to_a_better_one_and_the_other_end_follows() {
        assert!(faults(&[seen(28, &[]), seen(26, &[])]).is_empty());
        assert!(faults(&[seen(28, &[BETTER]), seen(28, &["path-by-handshake"])]).is_empty());
        let back = seen(28, &[BETTER, "path-by-roaming", BETTER]);
        assert!(faults(&[seen(28, &[BETTER, BETTER]), back]).is_empty());
    }

    #[test]
    fn an_end_that_follows_what_the_other_one_did_not_choose_is_a_fault() {
        let followed = faults(&[seen(28, &[BETTER, "path-by-handshake"]), seen(28, &[])]);
        assert_eq!(followed.len(), 1, "{followed:?}");
        assert!(followed[0].contains("path-by-handshake"), "{followed:?}");
        assert_eq!(faults(&[seen(28, &["path-by-handshake"]), seen(28, &[])]).len(), 1);
    }

    #[test]
    fn a_path_that_is_left_because_it_is_silent_is_a_fault_and_so_are_lost_pings() {
        let silent = faults(&[seen(28, &["path-silent"]), seen(28, &["path-by-handshake"])]);
        assert_eq!(silent.len(), 2, "nobody chose a better one: {silent:?}");
        assert!(silent[0].contains("path-silent"), "{silent:?}");
        let both = faults(&[seen(28, &[BETTER, "path-silent"]), seen(28, &[])]);
        assert_eq!(both.len(), 1, "{both:?}");
        assert_eq!(faults(&[seen(14, &[]), seen(28, &[])]), ["14 of 28 pings of cp were lost"]);
        let mut down = seen(28, &[BETTER]);
        down.changes[0].to_state = Some("connecting".to_owned());
        assert_eq!(faults(&[down, seen(28, &[])]), ["at cp: none -> connecting"]);
    }
}
