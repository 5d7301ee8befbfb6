//! All peers of one node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use towline_types::id::NodeId;
use towline_types::node::Node;

use crate::changes::{Change, PeerId};
use crate::peer::{Peer, PeerContext};
use crate::status::PeerState;

/// A mesh of up to this many peers is kept connected throughout, so that an operator sees each path
/// before it is needed; in a larger one a peer is connected when there is traffic for it.
pub const EAGER_PEERS: usize = 64;
/// First attempts of many peers that come at once are spread over this much for each.
const SPREAD_PER_PEER: Duration = Duration::from_millis(2);
/// The longest time that first attempts are spread over.
const SPREAD_MAX: Duration = Duration::from_secs(2);

/// The peers, by node id.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    by_id: BTreeMap<NodeId, Peer>,
}

impl Peers {
    /// Takes a node that is new, or whose record or grant is another one.
    pub(crate) fn handle_node(&mut self, cx: &mut PeerContext<'_>, node: Arc<Node>) {
        let id = node.id();
        if self.by_id.contains_key(&id) {
            self.with(cx, id, |peer, cx| peer.set_node(cx, node));
            return;
        }
        let delay = self.spread().mul_f64(cx.fx.rng.random());
        let delay = (self.by_id.len() < EAGER_PEERS).then_some(delay);
        self.by_id.insert(id, Peer::new(cx.fx, node, delay));
        if self.by_id.len() == EAGER_PEERS + 1 {
            // A map arrives node by node, so that of a large mesh looks like that of a small one at first.
            self.each(cx, |peer, cx| peer.cancel_first_attempt(cx));
        }
    }

    /// Forgets a node that was removed.
    pub(crate) fn handle_removal(&mut self, cx: &mut PeerContext<'_>, id: NodeId) {
        let Some(peer) = self.by_id.remove(&id) else { return };
        peer.forget(&mut cx.fx.timers);
        if self.by_id.len() == EAGER_PEERS {
            // From now on all of it is kept connected.
            let spread = self.spread();
            self.each(cx, |peer, cx| {
                let delay = spread.mul_f64(cx.fx.rng.random());
                peer.become_eager(cx, delay);
            });
        }
    }

    /// Returns the time over which the first attempts are spread, which grows with the number of peers.
    fn spread(&self) -> Duration {
        let peers = u32::try_from(self.by_id.len()).unwrap_or(u32::MAX);
        SPREAD_PER_PEER.saturating_mul(peers).min(SPREAD_MAX)
    }

    /// Lets one peer handle something. One that is unknown was removed: nothing happens.
    pub(crate) fn with(
        &mut self,
        cx: &mut PeerContext<'_>,
        id: NodeId,
        f: impl FnOnce(&mut Peer, &mut PeerContext<'_>),
    ) {
        if let Some(peer) = self.by_id.get_mut(&id) {
            tracked(peer, cx, f);
        }
    }

    /// Lets every peer handle something.
    pub(crate) fn each(
        &mut self,
        cx: &mut PeerContext<'_>,
        mut f: impl FnMut(&mut Peer, &mut PeerContext<'_>),
    ) {
        for peer in self.by_id.values_mut() {
            tracked(peer, cx, &mut f);
        }
    }

    /// Whether the mesh is so small that all of it is kept connected.
    pub(crate) fn is_eager(&self) -> bool {
        self.by_id.len() <= EAGER_PEERS
    }

    pub(crate) fn get(&self, id: NodeId) -> Option<&Peer> {
        self.by_id.get(&id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.by_id.values()
    }
}

/// Lets a peer handle something, in a tracing span of that peer. Marks its routes as changed if its
/// state or path MTU did, its path if the path MTU did, or whether datagrams are sent singly, and the whole
/// peer table if another peer may carry what it carried.
fn tracked(
    peer: &mut Peer,
    cx: &mut PeerContext<'_>,
    f: impl FnOnce(&mut Peer, &mut PeerContext<'_>),
) {
    let _span = tracing::debug_span!("peer", node = %peer.node().name()).entered();
    let (state, mtu, is_single) = (peer.state(), peer.applied_mtu(), peer.is_single());
    f(peer, cx);
    let is_same_mtu = peer.applied_mtu() == mtu;
    if peer.state() != state || !is_same_mtu {
        cx.fx.mark(Change::Routes(peer.id()));
    }
    if !is_same_mtu || peer.is_single() != is_single {
        cx.fx.mark(Change::Path(PeerId::Node(peer.id())));
    }
    // Another peer may carry what a peer that is down shares with it.
    let is_down_changed = (peer.state() == PeerState::Down) != (state == PeerState::Down);
    if is_down_changed && !peer.node().grant().shared.is_empty() {
        cx.fx.mark(Change::Carrier);
    }
}
