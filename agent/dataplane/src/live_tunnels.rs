//! Which tunnels need ticks. Most tunnels of a large mesh have neither a session nor a handshake, and a tick
//! does not look at them.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::Slot;
use super::newly_live::NewlyLive;
use super::table::{Peer, Table};

/// Tunnels that need ticks. All workers share them: each may handle what makes a tunnel need ticks, and one of
/// them runs the tick for all.
#[derive(Debug, Default)]
pub(super) struct LiveTunnels {
    /// Whether a tunnel needs ticks that needed none before. The next tick then looks at all tunnels.
    pub(super) newly_live: NewlyLive,
    last: Mutex<LastTick>,
}

/// What the last tick found.
#[derive(Debug, Default)]
struct LastTick {
    /// Table that the slots are of. Another table has other slots.
    table: Weak<Table>,
    /// Slots of the peers whose tunnels need further ticks.
    slots: Vec<Slot>,
}

impl LiveTunnels {
    /// Makes room for the tunnels of a table with `count` peers, so that no tick allocates.
    pub(super) fn make_room(&self, count: usize) {
        let slots = &mut self.last.lock().slots;
        slots.reserve(count.saturating_sub(slots.len()));
    }

    /// Calls `tick` for each peer whose tunnel may need it. `tick` returns whether the tunnel needs further
    /// ticks. Returns whether any does.
    pub(super) fn tick(&self, table: &Arc<Table>, mut tick: impl FnMut(&Peer) -> bool) -> bool {
        // Another worker has not finished the last tick.
        let Some(mut last) = self.last.try_lock() else { return true };
        let is_same_table = Weak::as_ptr(&last.table) == Arc::as_ptr(table);
        if self.newly_live.take() || !is_same_table {
            last.table = Arc::downgrade(table);
            last.slots.clear();
            last.slots.extend(table.slots());
        }
        last.slots.retain(|slot| table.peer(*slot).is_some_and(|peer| tick(peer)));
        !last.slots.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use towline_core::peer_table::{PeerEntry, PeerTable};
    use towline_types::id::WireguardKey;
    use towline_wireguard::Secrets;
    use x25519_dalek::StaticSecret;

    #[test]
    fn a_tick_looks_at_all_tunnels_only_if_one_is_new_or_the_table_is() {
        let (now, secrets) = (Instant::now(), Arc::new(Secrets::new(StaticSecret::from([1; 32]))));
        let key = |number: u8| WireguardKey([number; 32]);
        let peers = (1..=100).map(|number| (key(number), PeerEntry::default())).collect();
        let wanted = PeerTable { peers, ..PeerTable::default() };
        let table = Arc::new(Table::default().next(now, &wanted, &secrets));
        let live = LiveTunnels::default();
        let ticked = |table: &Arc<Table>, live_numbers: &[u8]| {
            let mut count = 0;
            let needs_ticks = live.tick(table, |peer| {
                count += 1;
                live_numbers.iter().any(|number| key(*number) == peer.key)
            });
            (count, needs_ticks)
        };
        assert_eq!(ticked(&table, &[3, 4]), (100, true));
        assert_eq!(ticked(&table, &[4]), (2, true));
        assert_eq!(ticked(&table, &[]), (1, false));
        assert_eq!(ticked(&table, &[]), (0, false));
        assert!(!live.newly_live.is_recorded());
        live.newly_live.record();
        assert!(live.newly_live.is_recorded());
        assert_eq!(ticked(&table, &[7]), (100, true));
        assert!(!live.newly_live.is_recorded());
        let next = Arc::new(table.next(now, &wanted, &secrets));
        assert_eq!(ticked(&next, &[]), (100, false));
    }
}
