//! Batches that are being sealed, in the order in which they have to be sent.
//!
//! The owner appends batches and takes the first one out. In between, a helper or the owner claims a
//! batch, seals it without holding the lock, and puts it back into its place.

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex};

use crate::arena::SendBatch;

/// Batch that was sealed, or lost.
#[derive(Debug, Default)]
pub(super) struct Sealed {
    /// The batch. `None` if the thread that had claimed it panicked.
    pub(super) batch: Option<SendBatch>,
    /// Number of datagrams that were lost.
    pub(super) lost: usize,
}

impl Sealed {
    /// Seals a batch.
    pub(super) fn new(mut batch: SendBatch) -> Self {
        let lost = batch.seal();
        Self { batch: Some(batch), lost }
    }
}

/// Place of one batch in the ring.
#[derive(Debug)]
pub(super) enum Slot {
    /// The batch waits for a thread that seals it.
    Waiting(SendBatch),
    /// A thread seals the batch.
    Claimed,
    /// The batch may be sent.
    Sealed(Sealed),
}

/// Ring of batches, shared by its owner and the helpers.
#[derive(Debug)]
pub(super) struct Ring {
    state: Mutex<State>,
    /// Signals helpers that a batch waits, or that they must end.
    work: Condvar,
    /// Signals the owner that the first batch is sealed.
    first_sealed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Batches in the order in which they are sent.
    slots: VecDeque<Slot>,
    /// Number of the first slot. Slots are numbered from the start, so that a claim finds its slot after
    /// those before it left.
    first: u64,
    /// True once the helpers must end. Never cleared.
    is_stopped: bool,
}

impl State {
    /// Takes the first batch that waits out of its slot.
    fn claim(&mut self) -> Option<(u64, SendBatch)> {
        for (number, slot) in (self.first..).zip(&mut self.slots) {
            if matches!(slot, Slot::Waiting(_))
                && let Slot::Waiting(batch) = std::mem::replace(slot, Slot::Claimed)
            {
                return Some((number, batch));
            }
        }
        None
    }

    /// Removes the first batch if it is sealed.
    fn pop(&mut self) -> Option<Sealed> {
        match self.slots.pop_front()? {
            Slot::Sealed(sealed) => {
                self.first += 1;
                Some(sealed)
            }
            other @ (Slot::Waiting(_) | Slot::Claimed) => {
                self.slots.push_front(other);
                None
            }
        }
    }
}

impl Ring {
    /// Creates an empty ring that holds `slots` batches without allocating.
    pub(super) fn new(slots: usize) -> Self {
        Self {
            state: Mutex::new(State {
                slots: VecDeque::with_capacity(slots),
                first: 0,
                is_stopped: false,
            }),
            work: Condvar::new(),
            first_sealed: Condvar::new(),
        }
    }

    /// Appends a batch. Wakes no helper for it, but one if an earlier batch still waits.
    pub(super) fn push(&self, slot: Slot) {
        let mut state = self.state.lock();
        let is_work_left = state.slots.iter().any(|slot| matches!(slot, Slot::Waiting(_)));
        state.slots.push_back(slot);
        drop(state);
        if is_work_left {
            self.wake();
        }
    }

    /// Wakes one helper.
    pub(super) fn wake(&self) {
        self.work.notify_one();
    }

    /// Removes the first batch if it is sealed. Does not wait.
    pub(super) fn pop(&self) -> Option<Sealed> {
        self.state.lock().pop()
    }

    /// Removes the first batch, and waits for the thread that has claimed it. `None` if there is no
    /// batch, or if the first one is not claimed.
    pub(super) fn wait(&self) -> Option<Sealed> {
        let mut state = self.state.lock();
        while matches!(state.slots.front(), Some(Slot::Claimed)) {
            self.first_sealed.wait(&mut state);
        }
        state.pop()
    }

    /// Claims the first batch that waits, to seal it.
    pub(super) fn claim(&self) -> Option<(Claim<'_>, SendBatch)> {
        let (number, batch) = self.state.lock().claim()?;
        Some(self.claimed(number, batch))
    }

    /// Seals batches until [`Ring::stop`] is called. Sleeps while there are none.
    pub(super) fn help(&self, seal: impl Fn(SendBatch) -> Sealed) {
        while let Some((claim, batch)) = self.next() {
            claim.put(seal(batch));
        }
    }

    /// Claims the next batch, and waits for it. `None` once the helpers must end.
    fn next(&self) -> Option<(Claim<'_>, SendBatch)> {
        let mut state = self.state.lock();
        loop {
            if state.is_stopped {
                return None;
            }
            if let Some((number, batch)) = state.claim() {
                drop(state);
                return Some(self.claimed(number, batch));
            }
            self.work.wait(&mut state);
        }
    }

    fn claimed(&self, number: u64, batch: SendBatch) -> (Claim<'_>, SendBatch) {
        let result = Sealed { batch: None, lost: batch.datagrams() };
        (Claim { ring: self, number, result }, batch)
    }

    /// Ends the helpers. Each completes the batch that it seals.
    pub(super) fn stop(&self) {
        self.state.lock().is_stopped = true;
        self.work.notify_all();
    }

    fn put(&self, number: u64, sealed: Sealed) {
        let mut state = self.state.lock();
        // A slot stays in the ring while it is claimed.
        let place = number.saturating_sub(state.first) as usize;
        if let Some(slot) = state.slots.get_mut(place) {
            *slot = Slot::Sealed(sealed);
        }
        drop(state);
        if place == 0 {
            self.first_sealed.notify_one();
        }
    }
}

/// Right to seal one batch. If it is dropped without [`Claim::put`], by a panic, the batch counts as
/// lost, and those behind it can be sent.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    ring: &'a Ring,
    /// Number of the slot.
    number: u64,
    /// Result that the slot gets in the end.
    result: Sealed,
}

impl Claim<'_> {
    /// Puts the batch back into its place.
    pub(super) fn put(mut self, sealed: Sealed) {
        self.result = sealed;
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.ring.put(self.number, std::mem::take(&mut self.result));
    }
}

#[cfg(test)]
mod tests {
    use towline_core::path::Path;

    use super::*;

    /// Returns a batch of one datagram with this content.
    fn batch(content: u8) -> SendBatch {
        let mut batch = SendBatch::new(16, 1);
        assert!(batch.push(Path::direct(([192, 0, 2, 1], 1).into()), &[content]));
        batch
    }

    /// Returns the content of a batch that was sealed.
    fn content(sealed: Sealed) -> u8 {
        assert_eq!(sealed.lost, 0);
        sealed.batch.unwrap().bytes()[0]
    }

    fn filled(count: u8) -> Ring {
        let ring = Ring::new(4);
        (0..count).for_each(|content| ring.push(Slot::Waiting(batch(content))));
        ring
    }

    #[test]
    fn batches_leave_in_order_whichever_is_sealed_first() {
        let ring = filled(3);
        let claims: Vec<_> = std::iter::from_fn(|| ring.claim()).collect();
        assert_eq!(claims.len(), 3);
        for (claim, batch) in claims.into_iter().rev() {
            assert!(ring.pop().is_none(), "the first is not sealed");
            claim.put(Sealed::new(batch));
        }
        let order: Vec<u8> = std::iter::from_fn(|| ring.pop()).map(content).collect();
        assert_eq!(order, [0, 1, 2]);
    }

    #[test]
    fn a_claim_finds_its_place_after_earlier_batches_left() {
        let ring = filled(2);
        let (first, one) = ring.claim().unwrap();
        let (second, two) = ring.claim().unwrap();
        first.put(Sealed::new(one));
        assert_eq!(ring.pop().map(content), Some(0));
        ring.push(Slot::Waiting(batch(2)));
        second.put(Sealed::new(two));
        assert_eq!(ring.wait().map(content), Some(1));
        assert!(ring.pop().is_none() && ring.wait().is_none(), "the last one is not claimed");
        let (third, three) = ring.claim().unwrap();
        third.put(Sealed::new(three));
        assert_eq!(ring.wait().map(content), Some(2));
        assert!(ring.wait().is_none(), "the ring is empty");
    }

    #[test]
    fn a_batch_that_is_not_put_back_is_lost_and_holds_up_no_other() {
        let ring = filled(2);
        drop(ring.claim());
        let (claim, second) = ring.claim().unwrap();
        claim.put(Sealed::new(second));
        let lost = ring.wait().unwrap();
        assert!(lost.batch.is_none());
        assert_eq!(lost.lost, 1);
        assert_eq!(ring.wait().map(content), Some(1));
    }

    #[test]
    fn helpers_end_and_leave_what_waits() {
        let ring = filled(1);
        ring.stop();
        ring.help(|_| unreachable!("a stopped helper seals nothing"));
        assert!(ring.claim().is_some());
    }
}
