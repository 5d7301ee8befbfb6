//! Detection of datagrams that were corrupted by coalescing (`UDP_GRO`).
//!
//! A kernel or a network card that coalesces wrongly reports no error. The only symptom is that
//! coalesced datagrams are not authentic. Forged datagrams have the same symptom, so only a large
//! share of them is taken for corruption. An attacker who can forge that large a share of the
//! traffic could drop it as well.

use std::time::Instant;

use crate::switch::{OffReason, Switch};

/// Number of coalesced datagrams that are evaluated together.
const WINDOW: u64 = 256;
/// Inverse of the share of datagrams that counts as corruption: one in four.
const TOLERATED: u64 = 4;

/// Counters of the window that is not full yet.
#[derive(Debug, Default)]
pub(in super::super) struct GroCorruption {
    datagrams: u64,
    corrupted: u64,
}

impl GroCorruption {
    /// Counts coalesced datagrams, and disables `UDP_GRO` if too many of them are corrupted.
    pub(in super::super) fn evaluate(
        &mut self,
        now: Instant,
        datagrams: usize,
        corrupted: usize,
        gro: &Switch,
    ) {
        // A switch that is off keeps its reason.
        if self.count(datagrams, corrupted) && gro.is_on() {
            gro.disable(OffReason::Damaged, now);
        }
    }

    /// Counts datagrams. Returns whether a window is full and has too much corruption.
    fn count(&mut self, datagrams: usize, corrupted: usize) -> bool {
        self.datagrams += datagrams as u64;
        self.corrupted += corrupted as u64;
        if self.datagrams < WINDOW {
            return false;
        }
        let window = std::mem::take(self);
        window.corrupted * TOLERATED >= window.datagrams
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_much_corruption_is_a_fault_of_coalescing() {
        let mut corruption = GroCorruption::default();
        for _ in 0..1_000 {
            assert!(!corruption.count(64, 2), "a few forged datagrams are tolerated");
        }
        let judged: Vec<bool> = (0..8).map(|_| corruption.count(64, 40)).collect();
        assert!(judged.contains(&true));
    }

    #[test]
    fn a_few_corrupted_datagrams_are_not_enough_to_evaluate() {
        assert!(!GroCorruption::default().count(60, 60));
    }
}
