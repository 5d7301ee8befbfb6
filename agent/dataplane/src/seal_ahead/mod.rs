//! Sealing on other cores than that of the worker ("seal ahead"), for more throughput with one peer.
//!
//! The worker reads the TUN, assigns the counters and lays the packets out, as it does without helpers.
//! Where it would then seal a large batch, it puts the batch into a ring and goes on with the next one.
//! A helper seals the batch. The worker sends the batches in the order in which it made them, so that
//! no packet overtakes another.
//!
//! ```text
//! worker: reads, lays out ──► ring: [sealed] [claimed] [claimed] [waiting] ──┐
//! worker: sends the first ◄──────┘               ▲                           │
//!                                             helper: seals ◄────────────────┘
//! ```
//!
//! - A batch belongs to one thread at a time, because it moves by value. A [`SendBatch`] shows nothing
//!   before it is sealed, so none can be sent in clear. It holds the keys of its messages, so sessions
//!   may be replaced meanwhile.
//! - The ring is bounded. If it is full, the worker seals what no helper has begun, and then waits.
//! - While the ring holds a batch the worker does not sleep. It wakes a helper only if there is more to
//!   do for itself ([`SealAhead::wake_helpers`]), and seals the rest itself otherwise
//!   ([`SealAhead::finish`]). Where packets come one by one, the helpers sleep.
//! - A helper that panics is a fault of the data plane, like a worker that panics. Its batch is counted
//!   as lost.

mod ring;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use super::arena::{GsoBatch, RecvBatch, SendBatch};
use super::drops::{DropReason, Drops};
use super::events::FaultState;
use super::switch::Switch;
use super::udp::{Ready, TooBig, Udp, UdpIo};
use ring::{Ring, Sealed, Slot};

/// Smallest batch in bytes that a helper seals. The worker seals a smaller one in a few microseconds,
/// which is about what it takes to wake a helper.
const LEAST_BYTES: usize = 32 * 1024;
/// Number of batches in the ring beyond one for each helper, so that a helper finds the next batch when
/// it completes one, while the first waits to be sent.
const MORE_BATCHES: usize = 2;
/// Number of flushes in a row that may find the first batch not sealed. After that the worker waits for
/// it, so that a helper that gets no processor delays a packet by a bounded number of the worker's rounds.
const LONGEST_LAG: u32 = 8;

/// Network side of a worker whose helpers, if it has any, seal its large batches.
#[derive(Debug)]
pub(super) struct SealAhead<U> {
    udp: U,
    /// Ring and helpers. `None` without helpers.
    ahead: Option<Ahead>,
}

impl<U: UdpIo> SealAhead<U> {
    /// Starts `helpers` threads for a worker that sends with `udp`. `new_batch` makes a batch like that
    /// of the worker. The helpers add the number of batches that they sealed to `sealed`, and set a
    /// fault if they panic.
    ///
    /// # Errors
    ///
    /// Returns the system's error if it provides no thread.
    pub(super) fn start(
        udp: U,
        helpers: usize,
        new_batch: impl Fn() -> SendBatch,
        faults: &FaultState,
        sealed: &Arc<AtomicU64>,
    ) -> io::Result<Self> {
        if helpers == 0 {
            return Ok(Self { udp, ahead: None });
        }
        let sealed = sealed.clone();
        let seal = move |batch| {
            sealed.fetch_add(1, Ordering::Relaxed);
            Sealed::new(batch)
        };
        Ok(Self { udp, ahead: Some(Ahead::start(helpers, new_batch, faults, seal)?) })
    }

    /// Returns whether batches were flushed that are not sent yet. Then the worker must call
    /// [`SealAhead::finish`] before it sleeps.
    pub(super) fn is_behind(&self) -> bool {
        self.ahead.as_ref().is_some_and(|ahead| ahead.unsent > 0)
    }

    /// Wakes a helper, because the worker has other work than to seal.
    pub(super) fn wake_helpers(&self) {
        if let Some(ahead) = &self.ahead {
            ahead.ring.wake();
        }
    }

    /// Sends everything that was flushed and is not sent yet. Seals what no helper has begun, and waits
    /// for the rest.
    pub(super) fn finish(&mut self, now: Instant, drops: &Drops) {
        if let Some(ahead) = &mut self.ahead {
            ahead.finish(&mut self.udp, now, drops);
        }
    }
}

impl<U: UdpIo> UdpIo for SealAhead<U> {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.udp.fds()
    }

    fn receive(&mut self, ready: Ready, batch: &mut RecvBatch, drops: &Drops) -> io::Result<()> {
        self.udp.receive(ready, batch, drops)
    }

    fn send(&mut self, now: Instant, batch: &SendBatch, drops: &Drops) {
        self.udp.send(now, batch, drops);
    }

    /// Clears the batch, and sends it once all batches before it are sent. A large one is sealed by a
    /// helper.
    fn flush(&mut self, now: Instant, batch: &mut SendBatch, drops: &Drops) {
        match &mut self.ahead {
            None => self.udp.flush(now, batch, drops),
            Some(ahead) => ahead.flush(&mut self.udp, now, batch, drops),
        }
    }

    fn send_gso_batches(
        &mut self,
        now: Instant,
        bytes: &[u8],
        gso_batches: &[GsoBatch],
        drops: &Drops,
    ) {
        self.udp.send_gso_batches(now, bytes, gso_batches, drops);
    }

    fn send_whole(&mut self, now: Instant, batch: &SendBatch, drops: &Drops) -> Result<(), TooBig> {
        self.udp.send_whole(now, batch, drops)
    }

    fn send_limited(&mut self, now: Instant, batch: &SendBatch, hops: u8, drops: &Drops) {
        self.udp.send_limited(now, batch, hops, drops);
    }

    fn set_second_port(&mut self, sockets: Option<Udp>) {
        self.udp.set_second_port(sockets);
    }

    fn record_gro(&mut self, now: Instant, datagrams: usize, corrupted: usize) {
        self.udp.record_gro(now, datagrams, corrupted);
    }

    fn features(&self) -> Vec<Switch> {
        self.udp.features()
    }
}

/// Owner's side of a ring, and the helpers.
#[derive(Debug)]
struct Ahead {
    ring: Arc<Ring>,
    /// Empty batches. Each batch is here, in the ring, or the one that the worker fills.
    spare: Vec<SendBatch>,
    /// Number of batches in the ring. Only the owner adds and removes them.
    unsent: usize,
    /// Number of flushes since a batch was sent that found the first one not sealed.
    lag: u32,
    helpers: Vec<JoinHandle<()>>,
}

impl Ahead {
    fn start(
        helpers: usize,
        new_batch: impl Fn() -> SendBatch,
        faults: &FaultState,
        seal: impl Fn(SendBatch) -> Sealed + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let batches = helpers + MORE_BATCHES;
        let mut ahead = Self {
            ring: Arc::new(Ring::new(batches)),
            spare: std::iter::repeat_with(new_batch).take(batches).collect(),
            unsent: 0,
            lag: 0,
            helpers: Vec::with_capacity(helpers),
        };
        for _ in 0..helpers {
            let (ring, seal, faults) = (ahead.ring.clone(), seal.clone(), faults.clone());
            let thread = std::thread::Builder::new().name("dataplane-seal".to_owned());
            // If a thread cannot be started, dropping `ahead` ends those already started.
            let thread = thread.spawn(move || {
                // It is dropped at the end of the thread, and sets the fault if that is a panic.
                let _faults = faults;
                ring.help(seal);
            })?;
            ahead.helpers.push(thread);
        }
        Ok(ahead)
    }

    fn flush<U: UdpIo>(&mut self, udp: &mut U, now: Instant, batch: &mut SendBatch, drops: &Drops) {
        self.send_sealed(udp, now, drops);
        if self.unsent > 0 {
            self.lag += 1;
            if self.lag > LONGEST_LAG {
                self.finish(udp, now, drops);
            }
        }
        if batch.is_empty() {
            return;
        }
        let is_large = batch.bytes_to_seal() >= LEAST_BYTES;
        if self.unsent == 0 && !is_large {
            udp.flush(now, batch, drops);
            return;
        }
        while self.spare.is_empty() && self.step(udp, now, drops) {}
        let Some(empty) = self.spare.pop() else {
            // The ring is empty too, so nothing is overtaken.
            udp.flush(now, batch, drops);
            return;
        };
        let full = std::mem::replace(batch, empty);
        // Others wait behind those that are being sealed.
        let slot = if is_large { Slot::Waiting(full) } else { Slot::Sealed(Sealed::new(full)) };
        self.ring.push(slot);
        self.unsent += 1;
    }

    fn finish<U: UdpIo>(&mut self, udp: &mut U, now: Instant, drops: &Drops) {
        while self.unsent > 0 && self.step(udp, now, drops) {}
    }

    /// Seals a batch that no helper has begun, or else waits for the first one. Sends what is sealed
    /// then. Returns false if the ring is empty.
    fn step<U: UdpIo>(&mut self, udp: &mut U, now: Instant, drops: &Drops) -> bool {
        if let Some((claim, batch)) = self.ring.claim() {
            claim.put(Sealed::new(batch));
        } else if let Some(sealed) = self.ring.wait() {
            self.send(sealed, udp, now, drops);
        } else {
            return false;
        }
        self.send_sealed(udp, now, drops);
        true
    }

    /// Sends batches from the front of the ring until one is not sealed yet. Does not wait for that one.
    fn send_sealed<U: UdpIo>(&mut self, udp: &mut U, now: Instant, drops: &Drops) {
        while self.unsent > 0 {
            let Some(sealed) = self.ring.pop() else { return };
            self.send(sealed, udp, now, drops);
        }
    }

    fn send<U: UdpIo>(&mut self, sealed: Sealed, udp: &mut U, now: Instant, drops: &Drops) {
        self.unsent = self.unsent.saturating_sub(1);
        self.lag = 0;
        drops.add(DropReason::NoSession, sealed.lost as u64);
        if let Some(mut batch) = sealed.batch {
            udp.send(now, &batch, drops);
            batch.clear();
            self.spare.push(batch);
        }
    }
}

impl Drop for Ahead {
    /// Ends the helpers and waits for them.
    fn drop(&mut self) {
        self.ring.stop();
        for helper in self.helpers.drain(..) {
            // A helper that panicked has set the fault.
            let _ = helper.join();
        }
    }
}
