//! Delay after batches of small packets, like the interrupt moderation of a network card.
//!
//! A program that sends small datagrams wakes the worker long before it has written many of them,
//! and each of the resulting small batches costs its own send, wake-up and receive. When a batch
//! shows such a program, the worker waits before the next read of the TUN for as long as this batch
//! took, at most 0.1 ms, so that the next batch is larger. A datagram from the network or a command
//! ends the delay early. Single packets, such as an echo or a request, are never delayed. Neither
//! are super-packets, which are batches already.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

/// Smallest number of packets in one read that indicates a continuing stream.
const LEAST_PACKETS: usize = 8;
/// Number of bytes from which a batch is large enough for its own send.
const MOST_BYTES: usize = 32 * 1024;
/// Longest delay. It bounds the latency that the delay adds.
const LONGEST: Duration = Duration::from_micros(100);
/// Timer slack of the worker's thread: how much later than requested the kernel may end a delay.
/// The kernel's default of 50 µs is half of [`LONGEST`].
const SLACK_NS: u64 = 1_000;
/// Largest number of descriptors that can end a delay.
const DESCRIPTORS: usize = 9;

/// Runs the delay, and holds the descriptors that end it early.
#[derive(Debug)]
pub(super) struct BatchDelay {
    others: Vec<OwnedFd>,
}

impl BatchDelay {
    /// Creates a delay that input on any of `others` ends. Only the first [`DESCRIPTORS`] are used.
    pub(super) fn new<'a>(others: impl IntoIterator<Item = BorrowedFd<'a>>) -> io::Result<Self> {
        let others = others.into_iter().take(DESCRIPTORS);
        Ok(Self { others: others.map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>()? })
    }

    /// Sets the timer slack of the calling thread, so that its delays end in time.
    pub(super) fn prepare_thread() {
        // If the call fails, delays last a little longer.
        let _ = nix::sys::prctl::set_timerslack(SLACK_NS);
    }

    /// Returns the delay after a read of `packets` packets with `bytes` bytes in total, whose
    /// processing took the time that `took` returns.
    pub(super) fn due(packets: usize, bytes: usize, took: impl FnOnce() -> Duration) -> Duration {
        if packets < LEAST_PACKETS || bytes >= MOST_BYTES {
            return Duration::ZERO;
        }
        took().min(LONGEST)
    }

    /// Waits for `time`, or until one of the descriptors is readable.
    pub(super) fn wait(&self, time: Duration) {
        let Some(first) = self.others.first().filter(|_| !time.is_zero()) else { return };
        let mut fds: [_; DESCRIPTORS] = std::array::from_fn(|place| {
            let other = self.others.get(place).unwrap_or(first);
            PollFd::new(other.as_fd(), PollFlags::POLLIN)
        });
        // A signal ends the delay too, and it is not resumed.
        let _ = ppoll(&mut fds[..self.others.len()], Some(TimeSpec::from_duration(time)), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Duration = Duration::from_micros(40);

    #[test]
    fn only_many_small_packets_are_followed_by_a_delay() {
        let due = |packets, bytes| BatchDelay::due(packets, bytes, || WORK);
        assert_eq!(due(1, 100), Duration::ZERO, "an echo");
        assert_eq!(due(7, 700), Duration::ZERO, "a few acknowledgements");
        assert_eq!(due(16, 1600), WORK, "a stream of small datagrams");
        assert_eq!(due(8, 200_000), Duration::ZERO, "super-packets");
    }

    #[test]
    fn no_delay_is_long() {
        let preempted = Duration::from_millis(30);
        assert_eq!(BatchDelay::due(16, 1600, || preempted), LONGEST);
    }

    #[test]
    fn the_clock_is_not_read_for_a_packet_that_is_not_followed_by_a_delay() {
        BatchDelay::due(1, 100, || unreachable!("the clock was read"));
    }

    /// A delay that nothing ends would take far longer than any test run.
    #[test]
    fn what_arrives_meanwhile_ends_a_delay() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&writer, b"!").unwrap();
        let (idle, _open) = nix::unistd::pipe().unwrap();
        BatchDelay::new([idle.as_fd(), reader.as_fd()]).unwrap().wait(Duration::from_secs(100_000));
    }
}
