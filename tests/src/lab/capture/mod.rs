//! Captures every packet on the simulated internet and searches it for leaks.
//!
//! A capture sees the frames that enter the ports of a namespace's bridge: all outer traffic as its
//! sender made it (a GSO batch of datagrams may be one frame). It looks for three things:
//!
//! - the [`Pattern`]'s mark anywhere in a frame: inner payload in clear;
//! - an outer address inside a watched network (the overlay): an inner packet in clear, with any
//!   payload;
//! - WireGuard datagrams, so that "nothing in clear" is not claimed of a silent wire.
//!
//! The kernel counts the frames that did not fit into the ring. If [`Seen::missed`] is not 0, the
//! capture proves nothing.

pub(in crate::lab) mod frame;
mod ring;
mod tap;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use memchr::memmem::Finder;
use parking_lot::Mutex;
use serde::Serialize;
use towline_netlink::Rtnetlink;

use super::interrupt::wait_for;
use super::namespace::Namespace;
use super::traffic::Pattern;
use frame::Outer;
use ring::Ring;
pub use tap::{Tap, udp_payload};

/// A running capture. Dropping it ends the capture.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    links: BTreeMap<String, u32>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

/// Counts of what the capture saw so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Seen {
    /// Frames of any kind.
    pub frames: u64,
    /// Size of all frames in bytes.
    pub bytes: u64,
    /// Frames that carry WireGuard datagrams.
    pub wireguard: u64,
    /// Frames that carry a fragment of an IP packet.
    pub fragments: u64,
    /// Frames that contain the pattern's mark.
    pub marked: u64,
    /// Frames from or to an address of the watched networks.
    pub inner_addresses: u64,
    /// Frames that did not fit into the ring.
    pub missed: u64,
}

impl Seen {
    /// Returns the number of signs of inner packets in clear. A frame that shows both signs counts
    /// twice.
    pub fn in_clear(&self) -> u64 {
        self.marked + self.inner_addresses
    }
}

#[derive(Debug, Default)]
struct Shared {
    counts: Counts,
    watched: Mutex<Vec<IpNet>>,
    /// Frames with the mark, by index of the link that they entered.
    marked_on: Mutex<BTreeMap<u32, u64>>,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct Counts {
    frames: AtomicU64,
    bytes: AtomicU64,
    wireguard: AtomicU64,
    fragments: AtomicU64,
    marked: AtomicU64,
    inner_addresses: AtomicU64,
    missed: AtomicU64,
}

impl Capture {
    /// Captures the frames that enter any link of `namespace`.
    pub fn start(namespace: &Namespace, pattern: Pattern) -> anyhow::Result<Self> {
        let ring = namespace.run(Ring::open).context("cannot capture")?;
        let links = namespace.run(|| Ok(Rtnetlink::open()?.links()?))?;
        let links = links.into_iter().map(|link| (link.name, link.index)).collect();
        let shared = Arc::new(Shared::default());
        let worker = Arc::clone(&shared);
        let thread =
            Builder::new().name(format!("capture-{}", namespace.name())).spawn(move || {
                prefer_this_thread();
                worker.work(ring, pattern)
            })?;
        Ok(Self { shared, links, thread: Some(thread) })
    }

    /// Counts, from now on, frames with outer addresses inside these networks.
    pub fn watch(&self, networks: impl IntoIterator<Item = IpNet>) {
        self.shared.watched.lock().extend(networks);
    }

    /// Returns the counts so far. The frames of the last few milliseconds may be missing.
    pub fn seen(&self) -> Seen {
        self.shared.counts.read()
    }

    /// Returns how many frames with the mark entered by a link so far; 0 if there was no link of
    /// this name when the capture started.
    pub fn marked_on(&self, link: &str) -> u64 {
        let Some(index) = self.links.get(link) else { return 0 };
        self.shared.marked_on.lock().get(index).copied().unwrap_or(0)
    }

    /// Waits until the capture found the mark in a frame that was sent in clear on purpose, then
    /// resets the count: every later find is a leak.
    pub fn expect_mark(&self, limit: Duration) -> anyhow::Result<()> {
        wait_for("frame with the mark that was sent in clear", limit, || {
            Ok((self.seen().marked > 0).then_some(()))
        })?;
        self.shared.counts.marked.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Ends the capture once every frame that was on the wire before has been examined.
    pub fn stop(mut self) -> anyhow::Result<Seen> {
        self.end().unwrap_or(Ok(()))?;
        Ok(self.seen())
    }

    fn end(&mut self) -> Option<anyhow::Result<()>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take()?;
        Some(thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the capture panicked"))))
    }
}

/// Lets the calling thread run before others where that is permitted: a capture that has to wait for long
/// misses frames.
fn prefer_this_thread() {
    const NICENESS: libc::c_int = -10;
    // SAFETY: the call takes no pointer. It changes only the calling thread, or nothing.
    unsafe { libc::setpriority(libc::PRIO_PROCESS as _, 0, NICENESS) };
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn work(&self, mut ring: Ring, pattern: Pattern) -> anyhow::Result<()> {
        let finder = Finder::new(pattern.mark());
        loop {
            // Read before the last block, so that the last block comes after the request to stop.
            let stopping = self.stop.load(Ordering::Relaxed);
            let watched = self.watched.lock().clone();
            let any =
                ring.next_block(|frame, link| self.inspect(frame, link, &finder, &watched))?;
            self.counts.missed.fetch_add(ring.missed()?, Ordering::Relaxed);
            if stopping && !any {
                return Ok(());
            }
        }
    }

    fn inspect(&self, frame: &[u8], link: u32, finder: &Finder<'_>, watched: &[IpNet]) {
        let counts = &self.counts;
        let add = |counter: &AtomicU64, n: u64| counter.fetch_add(n, Ordering::Relaxed);
        add(&counts.frames, 1);
        add(&counts.bytes, frame.len() as u64);
        if finder.find(frame).is_some() {
            add(&counts.marked, 1);
            *self.marked_on.lock().entry(link).or_default() += 1;
        }
        let Some(outer) = Outer::parse(frame) else { return };
        if outer.is_fragment {
            add(&counts.fragments, 1);
        }
        if outer.is_wireguard() {
            add(&counts.wireguard, 1);
        }
        if watched.iter().any(|net| net.contains(&outer.source) || net.contains(&outer.destination))
        {
            add(&counts.inner_addresses, 1);
        }
    }
}

impl Counts {
    fn read(&self) -> Seen {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Seen {
            frames: read(&self.frames),
            bytes: read(&self.bytes),
            wireguard: read(&self.wireguard),
            fragments: read(&self.fragments),
            marked: read(&self.marked),
            inner_addresses: read(&self.inner_addresses),
            missed: read(&self.missed),
        }
    }
}
