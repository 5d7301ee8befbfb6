//! Whether datagrams that are sent with one system call arrive as well as single ones.
//!
//! Some network cards and hypervisors damage the datagrams into which they split such a train
//! (`UDP_SEGMENT`), and nobody but the peer sees it. So beside the ping that confirms the path's MTU, a
//! train of pings of the same size is sent. Where single ones are answered and trains are not, again and
//! again, datagrams on that path are sent singly.

/// Number of pings of a train.
pub(crate) const TRAIN: u8 = 3;
/// Trains in a row with a ping that was not answered, beside a single one that was, from which on the
/// path is bad for trains. With 5 % loss in each direction this happens by chance once in 200 series.
const BAD_TRAINS: u8 = 4;

/// Result of the trains on one path.
#[derive(Debug, Default)]
pub(super) struct Trains {
    /// Pings of the current train that were answered. `None` while there is no train.
    answered: Option<u8>,
    /// Incomplete trains in a row.
    bad: u8,
}

impl Trains {
    /// Begins a train, unless the path is known to be bad for them. Returns whether it is to be sent.
    pub(super) fn begin(&mut self) -> bool {
        self.answered = (!self.is_bad()).then_some(0);
        self.answered.is_some()
    }

    /// Records the answer to a ping of the current train.
    pub(super) fn answered(&mut self) {
        if let Some(answered) = &mut self.answered {
            *answered += 1;
        }
    }

    /// Ends the current train: `is_single_answered` says whether the single ping beside it was answered.
    /// Returns whether another train is needed soon.
    pub(super) fn end(&mut self, is_single_answered: bool) -> bool {
        match self.answered.take() {
            Some(answered) if answered >= TRAIN => self.bad = 0,
            Some(_) if is_single_answered => self.bad += 1,
            // A path that loses single pings says nothing about trains.
            Some(_) | None => {}
        }
        self.bad > 0 && !self.is_bad()
    }

    /// Returns whether the path is bad for trains.
    pub(super) fn is_bad(&self) -> bool {
        self.bad >= BAD_TRAINS
    }
}
