//! The peer table and the plan, derived from what the core knows.

use std::sync::Arc;

use crate::effects::Effects;
use crate::output::Output;
use crate::peer::clamped;
use crate::peer_table::{PeerEntry, PeerTable};
use crate::routing::{Routing, RoutingInput};

/// The tables that were handed out last.
#[derive(Debug, Default)]
pub(crate) struct Derived {
    /// `None` before the first one.
    table: Option<Arc<PeerTable>>,
    routing: Routing,
}

impl Derived {
    /// Returns the peer table that was handed out last.
    pub(crate) fn table(&self) -> Option<&Arc<PeerTable>> {
        self.table.as_ref()
    }

    /// Derives what changed. Returns a table that is another one than the last; the peer table
    /// comes first. To be called until it returns `None`.
    pub(crate) fn poll(&mut self, fx: &mut Effects, input: &RoutingInput<'_>) -> Option<Output> {
        if fx.changes.take_table() {
            let table = peer_table(input);
            if self.table.as_deref() != Some(&table) {
                let table = Arc::new(table);
                self.table = Some(table.clone());
                return Some(Output::PeerTable(table));
            }
        }
        let scope = fx.changes.take_plan()?;
        self.routing.update(input, &scope).map(Output::Plan)
    }
}

/// All peers that hold their key. A node that was removed from the mesh has static peers only.
fn peer_table(input: &RoutingInput<'_>) -> PeerTable {
    let link = input.link_mtu();
    let nodes = input.peers.iter().filter(|_| !input.roster.is_removed());
    let entries = nodes.filter_map(|peer| {
        let claim = input.roster.claim(peer.id()).filter(|claim| claim.key_holder.is_none())?;
        let (mtu, fragment) = clamped(peer.applied_mtu(), link);
        let grant = peer.node().grant();
        let (prefixes, shared_sources) =
            claim.prefixes.iter().copied().partition(|net| input.carries(grant, net));
        let entry = PeerEntry {
            endpoint: peer.endpoint(),
            prefixes,
            shared_sources,
            // The core's own pings keep mappings open.
            keepalive: None,
            mtu,
            fragment,
            is_single: peer.is_single(),
            preshared_key: None,
            boot_epoch: peer.node().record().boot_epoch,
            is_static: false,
            probe_version: peer.node().record().probe_version,
        };
        Some((peer.key(), entry))
    });
    let peers = entries.chain(input.static_peers.entries(link)).collect();
    PeerTable { peers, own: input.own_networks() }
}
