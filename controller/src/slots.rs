//! A bounded table of slots in which a new holder always gets one.
//!
//! If its key has its maximum, the oldest slot of that key ends; otherwise, if the table is full, the
//! oldest slot of the key with the most slots ends. So nobody can keep others out by filling the table
//! first.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Slots for holders with keys.
#[derive(Debug)]
pub(crate) struct Slots<K> {
    /// Largest number of slots in total.
    all: usize,
    /// Largest number of slots of one key.
    each: usize,
    table: Mutex<Table<K>>,
}

#[derive(Debug)]
struct Table<K> {
    /// Number of the next slot. Older slots have smaller numbers.
    next: u64,
    taken: usize,
    /// Slots of each key, oldest first. Dropping a sender ends the slot.
    by_key: HashMap<K, VecDeque<(u64, oneshot::Sender<()>)>>,
}

/// A slot, which is free again when it is dropped.
#[derive(Debug)]
pub(crate) struct Slot<K: Copy + Eq + Hash> {
    slots: Arc<Slots<K>>,
    key: K,
    number: u64,
    ended: oneshot::Receiver<()>,
}

impl<K: Copy + Eq + Hash> Slots<K> {
    /// Creates a table with `all` slots, of which one key has at most `each`. Both are at least 1.
    pub(crate) fn new((all, each): (usize, usize)) -> Arc<Self> {
        let table = Table { next: 0, taken: 0, by_key: HashMap::new() };
        Arc::new(Self { all, each, table: Mutex::new(table) })
    }

    /// Takes a slot, and ends another one if there are too many.
    pub(crate) fn take(self: &Arc<Self>, key: K) -> Slot<K> {
        let mut table = self.table.lock();
        let held = table.by_key.get(&key).map_or(0, VecDeque::len);
        if held >= self.each {
            table.end_oldest(key);
        } else if table.taken >= self.all
            && let Some(heaviest) = table.heaviest()
        {
            table.end_oldest(heaviest);
        }
        let number = table.next;
        table.next += 1;
        table.taken += 1;
        let (holder, ended) = oneshot::channel();
        table.by_key.entry(key).or_default().push_back((number, holder));
        Slot { slots: self.clone(), key, number, ended }
    }
}

impl<K> Slots<K> {
    /// Returns the number of slots that are taken.
    pub(crate) fn taken(&self) -> usize {
        self.table.lock().taken
    }
}

impl<K: Copy + Eq + Hash> Table<K> {
    /// Returns the key with the most slots; of several the one with the oldest slot.
    fn heaviest(&self) -> Option<K> {
        let weight = |slots: &VecDeque<(u64, _)>| {
            (slots.len(), slots.front().map(|(number, _)| Reverse(*number)))
        };
        self.by_key.iter().max_by_key(|(_, slots)| weight(slots)).map(|(key, _)| *key)
    }

    fn end_oldest(&mut self, key: K) {
        let oldest = self.by_key.get(&key).and_then(|slots| slots.front());
        if let Some(number) = oldest.map(|(number, _)| *number) {
            self.remove(key, number);
        }
    }

    fn remove(&mut self, key: K, number: u64) {
        let Some(slots) = self.by_key.get_mut(&key) else { return };
        let before = slots.len();
        slots.retain(|(other, _)| *other != number);
        self.taken -= before - slots.len();
        if slots.is_empty() {
            self.by_key.remove(&key);
        }
    }
}

impl<K: Copy + Eq + Hash> Slot<K> {
    /// Resolves when the slot had to give way.
    pub(crate) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.ended).poll(cx).map(drop)
    }
}

impl<K: Copy + Eq + Hash> Drop for Slot<K> {
    fn drop(&mut self) {
        self.slots.table.lock().remove(self.key, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has_ended(slot: &mut Slot<char>) -> bool {
        slot.ended.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[test]
    fn a_key_with_too_many_slots_loses_its_own_oldest() {
        let slots = Slots::new((10, 2));
        let mut other = slots.take('b');
        let mut taken: Vec<_> = (0..3).map(|_| slots.take('a')).collect();
        let ended: Vec<bool> = taken.iter_mut().map(has_ended).collect();
        assert_eq!(ended, [true, false, false]);
        assert!(!has_ended(&mut other));
        drop((taken, other));
        let table = slots.table.lock();
        assert!(table.by_key.is_empty() && table.taken == 0, "slots come back");
    }

    #[test]
    fn in_a_full_table_the_heaviest_key_gives_way() {
        let slots = Slots::new((4, 3));
        let mut honest = slots.take('h');
        let mut flood: Vec<_> = (0..3).map(|_| slots.take('f')).collect();
        let mut next = slots.take('n');
        let ended: Vec<bool> = flood.iter_mut().map(has_ended).collect();
        assert_eq!(ended, [true, false, false], "the flood's oldest");
        assert!(!has_ended(&mut honest) && !has_ended(&mut next));
        // Among equals the oldest slot of all gives way.
        let slots = Slots::new((3, 3));
        let mut taken: Vec<_> = ['a', 'b', 'c', 'd'].map(|key| slots.take(key)).into();
        let ended: Vec<bool> = taken.iter_mut().map(has_ended).collect();
        assert_eq!(ended, [true, false, false, false]);
    }
}
