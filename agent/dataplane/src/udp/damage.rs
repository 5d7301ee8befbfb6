//! Whether datagrams that the kernel joined arrive as they were sealed.
//!
//! A kernel or a card that joins them wrongly refuses nothing and reports nothing: all that can be
//! seen of it is that what arrives is not authentic. A stranger's forgeries look the same, so it
//! takes a good part of all that arrives joined, which nobody forges who could not as well drop it.

use std::time::Instant;

use crate::switch::Switch;

/// How many joined datagrams are looked at together.
const WINDOW: u64 = 256;
/// One in so many is damage, not chance.
const TOLERATED: u64 = 4;

/// Those of the window that is not full yet.
#[derive(Debug, Default)]
pub(in super::super) struct Damage {
    datagrams: u64,
    damaged: u64,
}

impl Damage {
    /// Counts what arrived joined, and gives joining up where it is at fault.
    pub(in super::super) fn judge(
        &mut self,
        now: Instant,
        datagrams: usize,
        damaged: usize,
        gro: &Switch,
    ) {
        // What is off stays off for the reason that it has.
        if self.count(datagrams, damaged) && gro.is_on() {
            gro.distrust("what the kernel joined arrived damaged".to_owned(), now);
        }
    }

    /// Returns whether joining is at fault.
    fn count(&mut self, datagrams: usize, damaged: usize) -> bool {
        self.datagrams += datagrams as u64;
        self.damaged += damaged as u64;
        if self.datagrams < WINDOW {
            return false;
        }
        let window = std::mem::take(self);
        window.damaged * TOLERATED >= window.datagrams
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_much_damage_is_a_fault_of_joining() {
        let mut damage = Damage::default();
        for _ in 0..1_000 {
            assert!(!damage.count(64, 2), "now and then a forgery");
        }
        let judged: Vec<bool> = (0..8).map(|_| damage.count(64, 40)).collect();
        assert!(judged.contains(&true));
    }

    #[test]
    fn a_few_damaged_datagrams_are_not_enough_to_judge() {
        assert!(!Damage::default().count(60, 60));
    }
}
