//! `cargo lab hosts`: hosts with something odd about them, as operators have them: many links, odd
//! addresses, other networks, firewalls and NATs. Each case builds its own hosts, runs the real
//! binaries on them, and checks what is right there.
//!
//! | module | hosts |
//! |---|---|
//! | [`addresses`] | with many links, several addresses on a link, or addresses that change |
//! | [`families`] | with one address family, or with IPv6 disabled |
//! | [`networks`] | with networks of others, which the mesh must leave alone |
//! | [`firewalls`] | with a firewall that drops what comes out of the tunnel |
//! | [`sources`] | that send into the tunnel with another source than their own |
//! | [`marks`] | whose packets carry marks for congestion and priority |
//! | [`state`] | with another name or file system than expected |
//! | [`kubelet`] | whose kubelet waits for the mesh |
//! | [`controllers`] | whose controller moves |
//! | [`cards`] | whose network card damages what it splits |
//! | [`nats`] | behind NAT routers that are set up simply, or that lose an address |
//!
//! [`scene`](super::scene) builds the hosts, and joins them.

mod addresses;
mod cards;
mod controllers;
mod families;
mod firewalls;
mod kubelet;
mod marks;
mod nats;
mod networks;
mod sources;
mod state;

use std::fmt::Write as _;
use std::time::Instant;

use serde::Serialize;

use super::Setting;
use super::selection::{Entry, Selection};
use crate::lab::interrupt;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, Skipped};

/// A kind of host, with the check of what is right on it.
struct Case {
    /// Name of the case: the kind and the host, separated by a slash.
    name: &'static str,
    /// True if the case also runs without `--full`.
    is_short: bool,
    check: fn(&Setting) -> anyhow::Result<()>,
}

impl Case {
    fn new(name: &'static str, check: fn(&Setting) -> anyhow::Result<()>) -> Self {
        Self { name, is_short: true, check }
    }

    /// Restricts the case to runs with `--full`.
    fn long(mut self) -> Self {
        self.is_short = false;
        self
    }
}

/// Cases that the lab's namespaces and links cannot show, each with the reason.
const ELSEWHERE: [(&str, &str); 5] = [
    ("addresses/bond", "the lab creates no bond links: it uses veth and bridge links only"),
    ("addresses/vlan", "the lab creates no VLAN links: it uses veth and bridge links only"),
    (
        "families/ipv6-disabled-at-boot",
        "the parameter belongs to the whole kernel: `cargo lab vm` boots such a machine",
    ),
    ("state/read-only-root", "`cargo lab vm` boots such a machine"),
    ("state/shutdown-order", "systemd orders it: `cargo lab vm` boots such a machine"),
];

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Hosts {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Cases that ran, in order.
    pub cases: Vec<Tried>,
    /// Cases that the lab's namespaces and links cannot show.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// A case that ran.
#[derive(Debug, Serialize)]
pub struct Tried {
    /// Name of the case: the kind and the host, separated by a slash.
    pub name: &'static str,
    /// True if everything was right.
    pub ok: bool,
    /// Duration of the case in milliseconds, with building and removing the hosts.
    pub took_ms: u64,
    /// What was not right. Absent if everything was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Returns all cases, in the order in which they run.
fn every_case() -> Vec<Case> {
    [
        addresses::cases(),
        families::cases(),
        networks::cases(),
        firewalls::cases(),
        sources::cases(),
        marks::cases(),
        state::cases(),
        kubelet::cases(),
        controllers::cases(),
        cards::cases(),
        nats::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Returns the cases as the command line selects them.
pub fn entries() -> Vec<Entry> {
    let entry = |case: Case| Entry { name: case.name.to_owned(), is_short: case.is_short };
    every_case().into_iter().map(entry).collect()
}

/// Runs the selected cases.
pub fn run(setting: &Setting, selection: &Selection) -> anyhow::Result<Hosts> {
    let mut hosts = Hosts { rootless: setting.rank == Rank::Rootless, ..Hosts::default() };
    if selection.cases.is_empty() {
        let elsewhere =
            ELSEWHERE.map(|(name, why)| Skipped { name: name.to_owned(), why: why.to_owned() });
        hosts.skipped.extend(elsewhere);
    }
    let mut promises = Promises::new();
    for case in every_case() {
        if !selection.has(case.name, case.is_short) {
            continue;
        }
        interrupt::check()?;
        setting.output.step(case.name);
        let begun = Instant::now();
        let result = (case.check)(setting);
        interrupt::check()?;
        let why = result.err().map(|error| format!("{error:#}"));
        if let Some(why) = &why {
            let found = format!("{}: {why}", case.name);
            setting.output.note(&found);
            promises.fail(found);
        }
        let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        hosts.cases.push(Tried { name: case.name, ok: why.is_none(), took_ms, why });
    }
    hosts.failed = promises.into_failed();
    Ok(hosts)
}

impl Figures for Hosts {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for Tried { name, ok, took_ms, .. } in &self.cases {
            let ok = if *ok { "ok" } else { "FAILED" };
            let _ = writeln!(text, "  {name:<52}{ok:<8}{took_ms:>6} ms");
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "{skipped}");
        }
        text.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let cases = every_case();
        let elsewhere = ELSEWHERE.iter().map(|(name, _)| *name);
        let names: BTreeSet<&str> = cases.iter().map(|case| case.name).chain(elsewhere).collect();
        assert_eq!(names.len(), cases.len() + ELSEWHERE.len());
    }
}
