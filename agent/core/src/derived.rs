//! The peer table and the plan, derived from what the core knows.

use std::collections::BTreeSet;
use std::sync::Arc;

use towline_types::id::WireguardKey;
use towline_types::mtu::Mtu;

use crate::changes::{PeerId, TableScope};
use crate::effects::Effects;
use crate::output::Output;
use crate::peer::{Peer, clamped};
use crate::peer_table::{PeerEntry, PeerPath, PeerTable};
use crate::routing::{Routing, RoutingInput};

/// The tables that were handed out last.
#[derive(Debug, Default)]
pub(crate) struct Derived {
    /// Peer table with every path that was handed out since. `None` before the first one.
    table: Option<Arc<PeerTable>>,
    /// Peers whose paths have to be derived again.
    paths: BTreeSet<PeerId>,
    routing: Routing,
}

impl Derived {
    /// Returns the peer table that was handed out last, with the paths of now.
    pub(crate) fn table(&self) -> Option<&Arc<PeerTable>> {
        self.table.as_ref()
    }

    /// Derives what changed. Returns a table or a path that is another one than the last; those of peers
    /// come first. To be called until it returns `None`.
    pub(crate) fn poll(&mut self, fx: &mut Effects, input: &RoutingInput<'_>) -> Option<Output> {
        match fx.changes.take_table() {
            None => {}
            Some(TableScope::Paths(peers)) => self.paths.extend(peers),
            Some(TableScope::All) => {
                self.paths.clear();
                let table = peer_table(input);
                if self.table.as_deref() != Some(&table) {
                    let table = Arc::new(table);
                    self.table = Some(table.clone());
                    return Some(Output::PeerTable(table));
                }
            }
        }
        while let Some(peer) = self.paths.pop_first() {
            if let Some((peer, path)) = self.changed_path(input, peer) {
                return Some(Output::PeerPath { peer, path });
            }
        }
        let scope = fx.changes.take_plan()?;
        self.routing.update(input, &scope).map(Output::Plan)
    }

    /// Puts the path of a peer into the table. Returns it if it is another one than before.
    fn changed_path(
        &mut self,
        input: &RoutingInput<'_>,
        peer: PeerId,
    ) -> Option<(WireguardKey, PeerPath)> {
        let link = input.link_mtu();
        let (key, path) = match peer {
            PeerId::Node(id) => {
                let peer = input.peers.get(id).filter(|_| input.roster.is_usable())?;
                input.roster.claim(id).filter(|claim| claim.key_holder.is_none())?;
                (peer.key(), path_of(peer, link))
            }
            PeerId::Static(key) => (key, input.static_peers.path(&key, link)?),
        };
        let table = self.table.as_mut()?;
        table.peers.get(&key).filter(|entry| entry.path() != path)?;
        // Nobody keeps a table that was handed out, so this copies none.
        Arc::make_mut(table).peers.get_mut(&key)?.set_path(path);
        Some((key, path))
    }
}

/// Returns how datagrams reach a node over a link of this MTU.
fn path_of(peer: &Peer, link: Mtu) -> PeerPath {
    let (mtu, fragment) = clamped(peer.applied_mtu(), link);
    PeerPath { endpoint: peer.endpoint(), mtu, fragment, is_single: peer.is_single() }
}

/// All peers that hold their key. A node that was removed from the mesh, or whose map is too old, has static
/// peers only.
fn peer_table(input: &RoutingInput<'_>) -> PeerTable {
    let link = input.link_mtu();
    let nodes = input.peers.iter().filter(|_| input.roster.is_usable());
    let entries = nodes.filter_map(|peer| {
        let claim = input.roster.claim(peer.id()).filter(|claim| claim.key_holder.is_none())?;
        let PeerPath { endpoint, mtu, fragment, is_single } = path_of(peer, link);
        let grant = peer.node().grant();
        let (prefixes, shared_sources) =
            claim.prefixes.iter().copied().partition(|net| input.carries(grant, net));
        let entry = PeerEntry {
            endpoint,
            prefixes,
            shared_sources,
            // The core's own pings keep mappings open.
            keepalive: None,
            mtu,
            fragment,
            is_single,
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
