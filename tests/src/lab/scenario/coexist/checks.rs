//! Network state of a host as comparable sets: what Towline created, and what other programs
//! created.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use towline_host::OURS;
use towline_netlink::{Family, Rtnetlink};
use towline_nftables::{Nft, Rule, TableFamily};

use crate::lab::interrupt;
use crate::lab::tamper::LINK;

/// Name of Towline's nftables table.
const FIREWALL: &str = "towline";
/// Prefix of the comments on Towline's rules in chains of other programs.
const TAG: &str = "towline: ";

/// Returns the state that Towline created, without details that change when the link is created
/// again.
pub(super) fn ours() -> anyhow::Result<BTreeSet<String>> {
    let mut netlink = Rtnetlink::open()?;
    let mut found = BTreeSet::new();
    let link = netlink.link(LINK)?;
    if let Some(link) = &link {
        found.insert(format!("link, up: {}, MTU {}", link.up, link.mtu));
        for address in netlink.addresses(Some(link.index))? {
            if address.scope == 0 {
                found.insert(format!("address {}", address.prefix));
            }
        }
    }
    for family in Family::ALL {
        for rule in netlink.rules(family)? {
            if rule.made_by == OURS {
                found.insert(format!("{rule:?}"));
            }
        }
        for mut route in netlink.routes(family, None)? {
            if route.protocol == OURS {
                let through = link.as_ref().is_some_and(|link| route.link == Some(link.index));
                route.link = None;
                found.insert(format!("through the link: {through}, {route:?}"));
            }
        }
    }
    if let Some(loaded) = Nft::open()?.read(TableFamily::Inet, FIREWALL)? {
        found.insert(format!("{:?}", loaded.table));
    }
    Ok(found)
}

/// Nftables tables that other programs create in this scenario.
const THEIR_TABLES: [(TableFamily, &str); 9] = [
    (TableFamily::Inet, "theirs"),
    (TableFamily::Inet, "filter"),
    (TableFamily::Inet, "firewalld"),
    (TableFamily::Ip, "filter"),
    (TableFamily::Ip, "nat"),
    (TableFamily::Ip, "mangle"),
    (TableFamily::Ip, "kube-proxy"),
    (TableFamily::Ip6, "filter"),
    (TableFamily::Ip6, "kube-proxy"),
];

/// Returns the state of other programs, without routes of the kernel.
pub(super) fn theirs() -> anyhow::Result<BTreeSet<String>> {
    let mut netlink = Rtnetlink::open()?;
    let mut found = BTreeSet::new();
    let mut own = None;
    for link in netlink.links()? {
        if link.name == LINK {
            own = Some(link.index);
        } else {
            found.insert(format!("{link:?}"));
            for address in netlink.addresses(Some(link.index))? {
                found.insert(format!("address {} on {}", address.prefix, link.name));
            }
        }
    }
    for family in Family::ALL {
        for rule in netlink.rules(family)? {
            if rule.made_by != OURS {
                found.insert(format!("{rule:?}"));
            }
        }
        for route in netlink.routes(family, None)? {
            let kernels = i32::from(route.protocol) == i32::from(libc::RTPROT_KERNEL);
            // Routes over Towline's link are removed and added with it.
            if route.protocol != OURS && !kernels && (own.is_none() || route.link != own) {
                found.insert(format!("{route:?}"));
            }
        }
    }
    let mut nft = Nft::open()?;
    for (family, name) in THEIR_TABLES {
        if let Some(mut loaded) = nft.read(family, name)? {
            // The chain `DOCKER-USER` may contain rules of Towline.
            let ours = |rule: &Rule| rule.comment.as_deref().is_some_and(|c| c.starts_with(TAG));
            for chain in loaded.table.chains.values_mut() {
                chain.rules.retain(|rule| !ours(rule));
            }
            found.insert(format!("{:?}", loaded.table));
        }
    }
    Ok(found)
}

/// Observes the state that Towline created, continuously.
#[derive(Debug)]
pub(super) struct Watcher<'a> {
    whole: &'a BTreeSet<String>,
    seen: Mutex<Seen>,
}

/// Results of the observation so far.
#[derive(Debug, Default)]
struct Seen {
    /// Start of the last observation, if it found the complete state. `None` if it did not.
    whole: Option<Instant>,
    /// Longest time in which the state was not complete.
    longest: Duration,
    /// Difference that the last incomplete observation found.
    difference: String,
}

impl<'a> Watcher<'a> {
    /// Returns an observer that compares with this complete state.
    pub(super) fn new(whole: &'a BTreeSet<String>) -> Self {
        Self { whole, seen: Mutex::new(Seen::default()) }
    }

    /// Observes until `stop` is set, in the calling thread's namespace.
    pub(super) fn run(&self, stop: &AtomicBool) -> anyhow::Result<()> {
        // Start of the last observation that found the complete state.
        let mut whole = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            interrupt::check()?;
            let looked = Instant::now();
            let found = ours()?;
            let mut seen = self.seen.lock();
            if found == *self.whole {
                if seen.whole.is_none() {
                    // The state was not complete since the last complete observation.
                    if !seen.difference.is_empty() {
                        seen.longest = seen.longest.max(looked.duration_since(whole));
                    }
                    seen.difference.clear();
                }
                whole = looked;
                seen.whole = Some(looked);
            } else {
                let missing =
                    self.whole.difference(&found).map(|thing| format!("missing: {thing}"));
                let more = found.difference(self.whole).map(|thing| format!("unexpected: {thing}"));
                seen.difference = missing.chain(more).collect::<Vec<_>>().join("; ");
                seen.whole = None;
                seen.longest = seen.longest.max(looked.duration_since(whole));
            }
        }
        Ok(())
    }

    /// Returns whether an observation that began after `moment` found the complete state.
    pub(super) fn whole_since(&self, moment: Instant) -> bool {
        self.seen.lock().whole.is_some_and(|looked| looked > moment)
    }

    /// Returns the longest time in which the state was not complete, rounded up to whole
    /// observations.
    pub(super) fn longest(&self) -> Duration {
        self.seen.lock().longest
    }

    /// Returns the difference between the state that the last observation found and the complete
    /// state.
    pub(super) fn difference(&self) -> String {
        self.seen.lock().difference.clone()
    }
}
