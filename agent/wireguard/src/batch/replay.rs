//! Replay window of a receiving key, as RFC 6479 lays it out: a ring of words, of which the one
//! after the newest is free, so that the window moves by clearing words and never by shifting.

/// Words of 64 bits in the ring: 8,192 counters, as the kernel's window has.
const WORDS: u64 = 128;
/// Counters behind the highest that are still accepted. One word of the ring is always partly
/// ahead of the window.
pub(crate) const WINDOW: u64 = (WORDS - 1) * 64;

/// Counters that were received with one key.
pub(crate) struct ReplayWindow {
    /// Highest counter that was accepted. 0 before the first, too.
    highest: u64,
    /// Bit `counter % 64` of word `counter / 64 % WORDS` is set if the counter was accepted.
    words: Box<[u64; WORDS as usize]>,
}

impl ReplayWindow {
    /// Creates the window of a new key.
    pub(crate) fn new() -> Self {
        Self { highest: 0, words: Box::new([0; WORDS as usize]) }
    }

    /// Returns whether a counter would be accepted, so that a replay is refused before the cost of
    /// its decryption.
    #[inline]
    pub(crate) fn is_new(&self, counter: u64) -> bool {
        if counter > self.highest {
            return true;
        }
        let word = self.words.get(slot(counter / 64)).copied().unwrap_or(u64::MAX);
        self.highest - counter <= WINDOW && word & bit(counter) == 0
    }

    /// Accepts the counter of an authentic message. Returns false if it was accepted before, or is
    /// older than the window.
    #[inline]
    pub(crate) fn accept(&mut self, counter: u64) -> bool {
        if counter > self.highest {
            let (from, to) = (self.highest / 64, counter / 64);
            // A jump over the whole ring clears each word once.
            for number in (from + 1..=to).take(WORDS as usize) {
                if let Some(word) = self.words.get_mut(slot(number)) {
                    *word = 0;
                }
            }
            self.highest = counter;
        } else if self.highest - counter > WINDOW {
            return false;
        }
        let Some(word) = self.words.get_mut(slot(counter / 64)) else { return false };
        let is_new = *word & bit(counter) == 0;
        *word |= bit(counter);
        is_new
    }
}

fn slot(word: u64) -> usize {
    (word % WORDS) as usize
}

fn bit(counter: u64) -> u64 {
    1 << (counter % 64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// In any order and with any jumps, a counter is accepted at most once, and always if it is
        /// new and within the window.
        #[test]
        fn a_counter_is_accepted_once(
            steps in proptest::collection::vec(
                prop_oneof![-70i64..70, -9_000i64..9_000, Just(1i64), 0i64..100_000],
                1..2_000,
            ),
        ) {
            let (mut window, mut taken, mut highest, mut at) =
                (ReplayWindow::new(), BTreeSet::new(), 0u64, 0u64);
            for step in steps {
                at = at.saturating_add_signed(step);
                let is_old = highest.saturating_sub(at) > WINDOW;
                let expected = !is_old && taken.insert(at);
                prop_assert_eq!(window.is_new(at), expected, "{}", at);
                prop_assert_eq!(window.accept(at), expected, "{}", at);
                highest = highest.max(at);
            }
        }
    }

    #[test]
    fn the_ends_of_the_window_are_exact() {
        let mut window = ReplayWindow::new();
        assert!(window.accept(10_000));
        assert!(window.accept(10_000 - WINDOW));
        assert!(!window.accept(10_000 - WINDOW - 1));
        assert!(window.accept(u64::MAX - 1));
        assert!(!window.accept(10_001));
    }
}
