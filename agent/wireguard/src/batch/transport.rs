//! Transport sessions with one peer: the keys of the previous, the current and the next session,
//! counters, and replay windows. Decides nothing about time but the age of its keys.
//!
//! A responder may not use a new session before a data message of it arrived (whitepaper section
//! 5.4.6): until then it is the next one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use towline_aead::{Backend, Key};

use super::noise::SessionKeys;
use super::replay::ReplayWindow;
use super::timers::is_over;
use crate::Refusal;

/// Reject-After-Messages (whitepaper section 6.1).
pub(crate) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Rekey-After-Messages.
pub(crate) const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// Reject-After-Time.
pub(crate) const REJECT_AFTER: Duration = Duration::from_secs(180);

/// Session: two keys, the indices of both ends, and what was sent and received.
pub(crate) struct Epoch {
    /// Index that this node chose.
    pub(crate) local: u32,
    /// Index that the peer chose.
    pub(crate) remote: u32,
    /// Shared with the batches that wait to be sealed.
    sending: Arc<Key>,
    receiving: Key,
    next_counter: u64,
    window: ReplayWindow,
    pub(crate) created: Instant,
    pub(crate) is_initiator: bool,
    /// True once data was sent with this session.
    pub(crate) has_sent_data: bool,
    /// True once data was received with this session.
    pub(crate) has_received_data: bool,
}

impl Epoch {
    pub(crate) fn new(
        keys: &SessionKeys,
        backend: Backend,
        [local, remote]: [u32; 2],
        is_initiator: bool,
        now: Instant,
    ) -> Self {
        Self {
            local,
            remote,
            sending: Arc::new(Key::new(&keys.sending, backend)),
            receiving: Key::new(&keys.receiving, backend),
            next_counter: 0,
            window: ReplayWindow::new(),
            created: now,
            is_initiator,
            has_sent_data: false,
            has_received_data: false,
        }
    }

    /// Returns the counter for the next message. `None` if the session has sent as many as it may.
    #[inline]
    pub(crate) fn take_counter(&mut self) -> Option<u64> {
        let counter = self.next_counter;
        if counter >= REJECT_AFTER_MESSAGES {
            return None;
        }
        self.next_counter += 1;
        Some(counter)
    }

    pub(crate) fn is_exhausted(&self) -> bool {
        self.next_counter >= REJECT_AFTER_MESSAGES
    }

    pub(crate) fn needs_rekey(&self) -> bool {
        self.next_counter >= REKEY_AFTER_MESSAGES
    }

    pub(crate) fn is_expired(&self, now: Instant) -> bool {
        is_over(self.created, REJECT_AFTER, now)
    }

    pub(crate) fn sending(&self) -> &Arc<Key> {
        &self.sending
    }

    pub(crate) fn receiving(&self) -> &Key {
        &self.receiving
    }

    /// Judges a counter before its message is decrypted.
    #[inline]
    pub(crate) fn judge(&self, counter: u64) -> Result<(), Refusal> {
        if counter >= REJECT_AFTER_MESSAGES {
            return Err(Refusal::CounterExhausted);
        }
        if self.window.is_new(counter) { Ok(()) } else { Err(Refusal::Replayed) }
    }

    /// Accepts the counter of an authentic message that [`Self::judge`] let pass.
    #[inline]
    pub(crate) fn accept(&mut self, counter: u64) -> Result<(), Refusal> {
        if self.window.accept(counter) { Ok(()) } else { Err(Refusal::Replayed) }
    }

    /// Sets the counter of the next message, to test the limits.
    #[cfg(test)]
    pub(crate) fn set_counter(&mut self, counter: u64) {
        self.next_counter = counter;
    }
}

/// Sessions with one peer.
#[derive(Default)]
pub(crate) struct Epochs {
    previous: Option<Epoch>,
    current: Option<Epoch>,
    next: Option<Epoch>,
}

impl Epochs {
    /// Adds a session that this node initiated: it is used at once.
    pub(crate) fn establish(&mut self, epoch: Epoch) {
        // If both ends initiated at the same moment, the session that this node answered is the one
        // that the peer sends with, so it is kept for receiving.
        let current = self.current.replace(epoch);
        self.previous = self.next.take().or(current);
    }

    /// Adds a session that this node answered: it is used once the peer confirms it.
    pub(crate) fn prepare(&mut self, epoch: Epoch) {
        self.next = Some(epoch);
    }

    /// Returns the session with this index of ours.
    #[inline]
    pub(crate) fn receiving(&mut self, local: u32) -> Option<&mut Epoch> {
        [&mut self.current, &mut self.previous, &mut self.next]
            .into_iter()
            .flatten()
            .find(|epoch| epoch.local == local)
    }

    /// Returns whether an index of ours belongs to a session.
    pub(crate) fn has(&self, local: u32) -> bool {
        let all = [&self.current, &self.previous, &self.next];
        all.into_iter().flatten().any(|epoch| epoch.local == local)
    }

    /// Notes that an authentic message arrived for this index. Returns true if that confirmed the
    /// next session, which is the current one now.
    pub(crate) fn confirm(&mut self, local: u32) -> bool {
        if self.next.as_ref().is_none_or(|next| next.local != local) {
            return false;
        }
        self.previous = self.current.take();
        self.current = self.next.take();
        true
    }

    /// Returns the session that this node sends with.
    pub(crate) fn current(&self) -> Option<&Epoch> {
        self.current.as_ref()
    }

    /// Returns the session that this node sends with.
    pub(crate) fn current_mut(&mut self) -> Option<&mut Epoch> {
        self.current.as_mut()
    }

    /// Removes what is too old to be used.
    pub(crate) fn expire(&mut self, now: Instant) {
        for epoch in [&mut self.previous, &mut self.current, &mut self.next] {
            epoch.take_if(|epoch| epoch.is_expired(now));
        }
    }

    /// Removes all sessions.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;
    use towline_aead::{Aead, Packet, TAG_BYTES};

    fn epoch(index: u32, now: Instant) -> Epoch {
        let keys =
            SessionKeys { sending: Zeroizing::new([1; 32]), receiving: Zeroizing::new([2; 32]) };
        Epoch::new(&keys, Backend::select(Aead::Auto), [index, index + 1], true, now)
    }

    #[test]
    fn a_new_session_replaces_the_one_before_and_keeps_it_for_receiving() {
        let now = Instant::now();
        let mut epochs = Epochs::default();
        epochs.establish(epoch(10, now));
        epochs.establish(epoch(20, now));
        assert_eq!(epochs.current().map(|epoch| epoch.local), Some(20));
        assert!(epochs.receiving(10).is_some());
        epochs.establish(epoch(30, now));
        assert!(epochs.receiving(10).is_none());
    }

    #[test]
    fn a_session_of_the_peer_is_used_once_it_is_confirmed() {
        let now = Instant::now();
        let mut epochs = Epochs::default();
        epochs.prepare(epoch(10, now));
        assert!(epochs.current().is_none());
        assert!(!epochs.confirm(11));
        assert!(epochs.confirm(10));
        assert!(!epochs.confirm(10));
        assert_eq!(epochs.current().map(|epoch| epoch.local), Some(10));
        // Only the last one that waits can be confirmed.
        epochs.prepare(epoch(20, now));
        epochs.prepare(epoch(22, now));
        assert!(!epochs.has(20) && epochs.has(22));
    }

    #[test]
    fn ends_that_initiate_at_the_same_moment_understand_each_other() {
        let now = Instant::now();
        let mut epochs = Epochs::default();
        epochs.establish(epoch(10, now));
        epochs.prepare(epoch(20, now));
        epochs.establish(epoch(30, now));
        assert_eq!(epochs.current().map(|epoch| epoch.local), Some(30));
        assert!(epochs.has(20) && !epochs.has(10));
        assert!(!epochs.confirm(20), "it is used for receiving only");
    }

    #[test]
    fn a_session_ends_by_time_and_by_count() {
        let now = Instant::now();
        let mut epochs = Epochs::default();
        let mut last = epoch(10, now);
        assert!(!last.needs_rekey() && !last.is_exhausted());
        last.set_counter(REKEY_AFTER_MESSAGES);
        assert!(last.needs_rekey());
        last.set_counter(REJECT_AFTER_MESSAGES - 1);
        assert!(last.take_counter().is_some());
        assert!(last.take_counter().is_none() && last.is_exhausted());
        assert_eq!(last.judge(REJECT_AFTER_MESSAGES), Err(Refusal::CounterExhausted));
        assert_eq!(last.judge(REJECT_AFTER_MESSAGES - 1), Ok(()));
        assert_eq!(last.accept(REJECT_AFTER_MESSAGES - 1), Ok(()));
        assert_eq!(last.judge(REJECT_AFTER_MESSAGES - 1), Err(Refusal::Replayed));
        assert_eq!(last.accept(REJECT_AFTER_MESSAGES - 1), Err(Refusal::Replayed));
        epochs.establish(last);
        epochs.expire(now + REJECT_AFTER - Duration::from_millis(1));
        assert!(epochs.current().is_some());
        epochs.expire(now + REJECT_AFTER);
        assert!(epochs.current().is_none());
    }

    #[test]
    fn what_one_end_seals_the_other_opens() {
        let now = Instant::now();
        let keys =
            SessionKeys { sending: Zeroizing::new([2; 32]), receiving: Zeroizing::new([1; 32]) };
        let (mut ours, theirs) =
            (epoch(10, now), Epoch::new(&keys, Backend::select(Aead::Ring), [11, 10], false, now));
        let counter = ours.take_counter().unwrap();
        let mut arena = vec![7; 100 + TAG_BYTES];
        let packets = [Packet { start: 0, len: 100, counter }];
        ours.sending().seal(&mut arena, &packets).unwrap();
        let mut authentic = Vec::new();
        theirs.receiving().open(&mut arena, &packets, &mut authentic).unwrap();
        assert_eq!((authentic, &arena[..100]), (vec![true], &[7; 100][..]));
        assert_eq!((theirs.remote, theirs.is_initiator, theirs.created), (10, false, now));
    }
}
