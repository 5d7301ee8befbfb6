//! What is on a host, ours and theirs, as comparable lists of things.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use towline_host::OURS;
use towline_netlink::{Family, Rtnetlink};
use towline_nftables::{Nft, Rule, TableFamily};

use crate::lab::interrupt;
use crate::lab::meddle::LINK;

const FIREWALL: &str = "towline";
/// How the comments of our rules in others' chains begin.
const TAG: &str = "towline: ";

/// What is ours, without what differs from one life of the link to the next.
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

/// Tables that co-tenants of this scenario make.
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

/// What is theirs, without what the kernel keeps by itself.
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
            // Those of our link come and go with it.
            if route.protocol != OURS && !kernels && (own.is_none() || route.link != own) {
                found.insert(format!("{route:?}"));
            }
        }
    }
    let mut nft = Nft::open()?;
    for (family, name) in THEIR_TABLES {
        if let Some(mut loaded) = nft.read(family, name)? {
            // The hook that docker leaves to others holds rules of ours.
            let ours = |rule: &Rule| rule.comment.as_deref().is_some_and(|c| c.starts_with(TAG));
            for chain in loaded.table.chains.values_mut() {
                chain.rules.retain(|rule| !ours(rule));
            }
            found.insert(format!("{:?}", loaded.table));
        }
    }
    Ok(found)
}

/// Looks at what is ours again and again.
#[derive(Debug)]
pub(super) struct Watcher<'a> {
    whole: &'a BTreeSet<String>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// When the look began that found everything there, if the last one did.
    whole: Option<Instant>,
    longest: Duration,
    difference: String,
}

impl<'a> Watcher<'a> {
    /// For what should be there.
    pub(super) fn new(whole: &'a BTreeSet<String>) -> Self {
        Self { whole, seen: Mutex::new(Seen::default()) }
    }

    /// Looks until `stop`, in the calling thread's namespace.
    pub(super) fn run(&self, stop: &AtomicBool) -> anyhow::Result<()> {
        // The last look that found everything there.
        let mut whole = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            interrupt::check()?;
            let looked = Instant::now();
            let found = ours()?;
            let mut seen = self.seen.lock();
            if found == *self.whole {
                if seen.whole.is_none() {
                    // It was missing since after the last whole look.
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
                let more = found.difference(self.whole).map(|thing| format!("too much: {thing}"));
                seen.difference = missing.chain(more).collect::<Vec<_>>().join("; ");
                seen.whole = None;
                seen.longest = seen.longest.max(looked.duration_since(whole));
            }
        }
        Ok(())
    }

    /// Whether everything was there in a look that began after `moment`.
    pub(super) fn whole_since(&self, moment: Instant) -> bool {
        self.seen.lock().whole.is_some_and(|looked| looked > moment)
    }

    /// The longest time that something was not as it should be, rounded up to whole looks.
    pub(super) fn longest(&self) -> Duration {
        self.seen.lock().longest
    }

    /// What the last look found missing, or too much.
    pub(super) fn difference(&self) -> String {
        self.seen.lock().difference.clone()
    }
}
