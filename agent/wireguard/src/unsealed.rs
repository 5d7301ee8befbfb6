//! Messages in a send buffer that are not sealed yet.
//!
//! The batch engine writes header and payload of a data message into the buffer and leaves a note
//! here. Before the buffer is sent, everything in it is sealed at once, one batch for each key. A
//! buffer with messages in this list must not show its bytes to a sender before [`Unsealed::seal`]
//! succeeded, or plaintext would leave the node.

use std::sync::Arc;

use towline_aead::{Key, Packet};

/// Messages in a send buffer that are not sealed yet, in the order of their positions.
#[derive(Debug, Default)]
pub struct Unsealed {
    packets: Vec<Packet>,
    /// Consecutive packets with one key: the key, and the number of the packet after the last.
    runs: Vec<(Arc<Key>, usize)>,
    /// Packets of one key, gathered from several runs.
    batch: Vec<Packet>,
}

impl Unsealed {
    /// Creates an empty list with room for `messages` messages in `runs` runs of one key. It allocates
    /// only beyond that.
    pub fn with_capacity(messages: usize, runs: usize) -> Self {
        Self {
            packets: Vec::with_capacity(messages),
            runs: Vec::with_capacity(runs),
            batch: Vec::with_capacity(messages),
        }
    }

    /// Notes a message whose payload is at `packet`.
    #[inline]
    pub(crate) fn push(&mut self, key: &Arc<Key>, packet: Packet) {
        self.packets.push(packet);
        match self.runs.last_mut() {
            Some((last, end)) if Arc::ptr_eq(last, key) => *end = self.packets.len(),
            _ => self.runs.push((key.clone(), self.packets.len())),
        }
    }

    /// Returns whether every message is sealed.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Returns the number of messages that are not sealed.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Forgets all messages, because their buffer was cleared.
    pub fn clear(&mut self) {
        self.packets.clear();
        self.runs.clear();
    }

    /// Seals all messages of the buffer `arena`. Returns false if that failed, which the buffer's
    /// owner must answer by clearing it: nothing in it may be sent then.
    #[must_use]
    pub fn seal(&mut self, arena: &mut [u8]) -> bool {
        let sealed = match self.runs.as_slice() {
            // Usually there is one run, whose packets are all.
            [(key, _)] => key.seal(arena, &self.packets).is_ok(),
            _ => self.seal_keys(arena),
        };
        self.clear();
        sealed
    }

    /// Seals the messages of several keys: those of a key that has several runs together with its first.
    fn seal_keys(&mut self, arena: &mut [u8]) -> bool {
        let mut sealed = true;
        for (index, (key, _)) in self.runs.iter().enumerate() {
            let is_of_key = |(other, _): &(Arc<Key>, usize)| Arc::ptr_eq(other, key);
            if self.runs.iter().take(index).any(is_of_key) {
                continue;
            }
            self.batch.clear();
            let mut start = 0;
            for run in &self.runs {
                if is_of_key(run) {
                    self.batch.extend(self.packets.get(start..run.1).unwrap_or_default());
                }
                start = run.1;
            }
            sealed &= key.seal(arena, &self.batch).is_ok();
        }
        sealed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use towline_aead::{Aead, Backend, TAG_BYTES};

    proptest! {
        /// Messages of several keys in any order are sealed as if each was sealed alone.
        #[test]
        fn each_message_is_sealed_with_its_key(
            messages in proptest::collection::vec((0usize..4, 0usize..300), 0..80),
        ) {
            let backend = Backend::select(Aead::Auto);
            let keys: Vec<Arc<Key>> =
                (0..4).map(|number| Arc::new(Key::new(&[number; 32], backend))).collect();
            let (mut unsealed, mut end) = (Unsealed::default(), 0);
            let mut packets = Vec::new();
            for (counter, (key, len)) in (0..).zip(&messages) {
                let packet = Packet { start: end + 16, len: *len, counter };
                end = packet.start + len + TAG_BYTES;
                unsealed.push(&keys[*key], packet);
                packets.push((*key, packet));
            }
            let mut arena = vec![3; end];
            let mut expected = arena.clone();
            prop_assert_eq!(unsealed.len(), messages.len());
            prop_assert!(unsealed.seal(&mut arena));
            for (key, packet) in &packets {
                keys[*key].seal(&mut expected, &[*packet]).unwrap();
            }
            prop_assert!(arena == expected);
            prop_assert!(unsealed.is_empty() && unsealed.seal(&mut []), "nothing is left");
        }
    }

    #[test]
    fn a_message_outside_of_the_arena_is_not_sealed() {
        let key = Arc::new(Key::new(&[1; 32], Backend::select(Aead::Auto)));
        let mut unsealed = Unsealed::default();
        unsealed.push(&key, Packet { start: 0, len: 10, counter: 0 });
        assert!(!unsealed.seal(&mut [0; 10]));
    }
}
