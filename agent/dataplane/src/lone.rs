//! Decides whether a wake-up of the worker takes one item from a queue, or all: packets of the TUN, or
//! datagrams of the sockets.
//!
//! To read until nothing is left costs one more system call, which finds nothing. Before the packet of an
//! echo is sent, that call only delays it. So where the last wake-up found one small item, this one takes
//! one item. The epoll set is level-triggered and tells if there are more. If it does, the next wake-up takes
//! all, so that the batches of a stream are as large as they can be.
//!
//! | the last wake-up took | and found | this one takes |
//! |---|---|---|
//! | all | one small item | one |
//! | one | one small item, and now the queue is empty | nothing; the next one takes one |
//! | one | one small item, and now the queue is not empty | all |
//! | all or one | anything else | all |

/// Largest size in bytes of an item that may be followed by none: about that of a packet on most links.
/// Larger ones belong to a stream.
const SMALL_BYTES: usize = 2_048;

/// Decision for one queue, by what the last wake-ups found in it.
#[derive(Debug, Default)]
pub(super) struct LoneItems {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// The next wake-up takes all items.
    #[default]
    All,
    /// The next wake-up takes one item.
    One,
    /// The last wake-up took one item, so there may be more.
    Taken,
}

impl LoneItems {
    /// Returns how many items to take at most.
    pub(super) fn limit(&self) -> usize {
        match self.state {
            State::One => 1,
            State::All | State::Taken => usize::MAX,
        }
    }

    /// Records what a wake-up found that took at most [`Self::limit`] items.
    pub(super) fn record(&mut self, items: usize, bytes: usize) {
        let is_lone = items <= 1 && bytes <= SMALL_BYTES;
        self.state = match self.state {
            _ if !is_lone => State::All,
            State::One => State::Taken,
            State::All | State::Taken => State::One,
        };
    }

    /// Records that the queue was empty at a wake-up.
    pub(super) fn record_empty(&mut self) {
        if self.state == State::Taken {
            self.state = State::One;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ECHO: usize = 200;

    /// Runs wake-ups that find this many items of a size in the queue. Returns the limit of each one that
    /// found an item.
    fn limits(queue: &[usize], bytes: usize) -> Vec<usize> {
        let mut lone = LoneItems::default();
        let wake_up = |items: &usize| {
            if *items == 0 {
                lone.record_empty();
                return None;
            }
            let limit = lone.limit();
            let taken = limit.min(*items);
            lone.record(taken, taken * bytes);
            Some(limit)
        };
        queue.iter().filter_map(wake_up).collect()
    }

    #[test]
    fn echoes_are_taken_one_by_one() {
        assert_eq!(limits(&[1, 0, 1, 0, 1, 0, 0, 1], ECHO), [usize::MAX, 1, 1, 1]);
    }

    #[test]
    fn what_follows_the_first_packet_of_a_burst_is_taken_together() {
        let all = usize::MAX;
        assert_eq!(limits(&[1, 0, 9, 8, 5, 6, 4], ECHO), [all, 1, all, all, all, all]);
    }

    #[test]
    fn large_packets_are_taken_together() {
        assert_eq!(limits(&[1, 1, 0, 1], 65_000), [usize::MAX; 3]);
    }
}
