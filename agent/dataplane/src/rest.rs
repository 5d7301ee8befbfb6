//! Rests between batches of small packets, as a network card holds its interrupts back.
//!
//! A sender of small datagrams wakes the worker long before it has written many of them, and each
//! of the small batches that come of it costs a send, a wake-up and a receive of its own. So when a
//! batch shows such a sender, the next read of the TUN waits for as long as this batch took: the
//! next one is larger by that much. What comes from the network ends a rest, and so do orders. A
//! packet now and then, an echo or a request, never meets one; nor do super-packets, which are
//! batches already.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

/// Packets in one read that show a sender who goes on.
const LEAST_PACKETS: usize = 8;
/// A batch of this many bytes is worth a send of its own.
const MOST_BYTES: usize = 32 * 1024;
const LONGEST: Duration = Duration::from_micros(100);
/// How much later than asked for the kernel may end a rest. Its default is half of the longest.
const SLACK_NS: u64 = 1_000;
/// Descriptors that can end a rest.
const DESCRIPTORS: usize = 9;

/// What ends a rest early.
#[derive(Debug)]
pub(super) struct Rest {
    others: Vec<OwnedFd>,
}

impl Rest {
    /// `others`: at most nine.
    pub(super) fn new<'a>(others: impl IntoIterator<Item = BorrowedFd<'a>>) -> io::Result<Self> {
        let others = others.into_iter().take(DESCRIPTORS);
        Ok(Self { others: others.map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>()? })
    }

    /// Lets this thread's rests end in time.
    pub(super) fn prepare_thread() {
        // Refused, they last a little longer.
        let _ = nix::sys::prctl::set_timerslack(SLACK_NS);
    }

    /// How long to rest after a read that gave so many packets, of so many bytes altogether, and
    /// whose work took so long.
    pub(super) fn due(packets: usize, bytes: usize, took: impl FnOnce() -> Duration) -> Duration {
        if packets < LEAST_PACKETS || bytes >= MOST_BYTES {
            return Duration::ZERO;
        }
        took().min(LONGEST)
    }

    /// Rests for so long, or until something else is to be done.
    pub(super) fn take(&self, time: Duration) {
        let Some(first) = self.others.first().filter(|_| !time.is_zero()) else { return };
        let mut fds: [_; DESCRIPTORS] = std::array::from_fn(|place| {
            let other = self.others.get(place).unwrap_or(first);
            PollFd::new(other.as_fd(), PollFlags::POLLIN)
        });
        // A signal ends it too, and then it is over.
        let _ = ppoll(&mut fds[..self.others.len()], Some(TimeSpec::from_duration(time)), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Duration = Duration::from_micros(40);

    #[test]
    fn only_many_small_packets_are_followed_by_a_rest() {
        let due = |packets, bytes| Rest::due(packets, bytes, || WORK);
        assert_eq!(due(1, 100), Duration::ZERO, "an echo");
        assert_eq!(due(7, 700), Duration::ZERO, "a few acknowledgements");
        assert_eq!(due(16, 1600), WORK, "a stream of small datagrams");
        assert_eq!(due(8, 200_000), Duration::ZERO, "super-packets");
    }

    #[test]
    fn no_rest_is_long() {
        let preempted = Duration::from_millis(30);
        assert_eq!(Rest::due(16, 1600, || preempted), LONGEST);
    }

    #[test]
    fn the_clock_is_not_read_for_a_packet_that_is_not_followed_by_a_rest() {
        Rest::due(1, 100, || unreachable!("the clock was read"));
    }

    /// It would otherwise not end at all.
    #[test]
    fn what_arrives_meanwhile_ends_a_rest() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&writer, b"!").unwrap();
        let (idle, _open) = nix::unistd::pipe().unwrap();
        Rest::new([idle.as_fd(), reader.as_fd()]).unwrap().take(Duration::from_secs(100_000));
    }
}
