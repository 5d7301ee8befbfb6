//! Bounds on what others can make us send.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Datagrams to one address that never answered, within [`WINDOW`]. A whole site of peers may
/// stand behind one address; a victim whose address somebody advertised as its own gets no more.
const UNANSWERED: u32 = 250;
/// Time over which datagrams to one address are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// Addresses that are counted at a time: this bounds the memory that lies can take.
const ADDRESSES: usize = 4_096;

/// What was sent to addresses that have not answered yet. Candidates come from peers, signals and
/// relays, any of which may lie: this bounds what a lie costs the one whose address it names.
#[derive(Debug, Default)]
pub(crate) struct Unanswered {
    /// For each address: begin of its window, and datagrams sent since.
    by_address: BTreeMap<IpAddr, (Instant, u32)>,
}

impl Unanswered {
    /// Counts one more datagram to an address. Returns whether it may be sent.
    pub(crate) fn take(&mut self, now: Instant, to: IpAddr) -> bool {
        if self.by_address.len() >= ADDRESSES && !self.by_address.contains_key(&to) {
            self.by_address.retain(|_, (since, _)| now < *since + WINDOW);
            if self.by_address.len() >= ADDRESSES {
                return false;
            }
        }
        let (since, sent) = self.by_address.entry(to).or_insert((now, 0));
        if now >= *since + WINDOW {
            (*since, *sent) = (now, 0);
        }
        *sent += 1;
        *sent <= UNANSWERED
    }

    /// Forgets an address from which something authentic came: it is no victim.
    pub(crate) fn answered(&mut self, from: IpAddr) {
        self.by_address.remove(&from);
    }
}
