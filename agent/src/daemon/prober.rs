//! Sealed messages between this node and others: the keys of each pair, and the pings of
//! `towline ping` that wait for their answers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use towline_core::mesh::{Mesh, PeerStatus};
use towline_core::path::Path;
use towline_core::peer_table::PeerTable;
use towline_proto::frame::Probe;
use towline_proto::id::WireguardKey;

use crate::control::{NoPong, PathKind, PingAnswer};
use crate::keys::Wireguard;
use crate::probe::ProbeKeys;

/// Keys of this node and of its pairs, and the operator's pings in flight.
#[derive(Debug)]
pub(super) struct Prober {
    own: Wireguard,
    pairs: ProbeKeys,
    /// Reply channel of each probe of `towline ping` in flight, by probe id.
    pings: BTreeMap<u64, oneshot::Sender<PingAnswer>>,
    next_ping: u64,
}

impl Prober {
    pub(super) fn new(own: Wireguard) -> Self {
        Self { own, pairs: ProbeKeys::default(), pings: BTreeMap::new(), next_ping: 0 }
    }

    /// Returns the WireGuard key pair of this node.
    pub(super) fn own_key(&self) -> &Wireguard {
        &self.own
    }

    /// Derives the keys of the pairs with these peers.
    pub(super) fn set_peers(&mut self, table: &PeerTable) {
        self.pairs.follow(&self.own, table.peers.keys());
    }

    /// Returns the datagram of a message to `peer`, padded to `size` bytes if it is shorter. `None`
    /// if there is no such peer.
    pub(super) fn seal(
        &self,
        peer: &WireguardKey,
        message: &Probe,
        size: usize,
    ) -> Option<Vec<u8>> {
        self.pairs.seal(peer, message, size)
    }

    /// Opens a datagram. Returns its sender and its message, or `None` if it is not authentic.
    pub(super) fn open(&mut self, datagram: &[u8]) -> Option<(WireguardKey, Probe)> {
        self.pairs.open(datagram)
    }

    /// Returns the number of datagrams that were not authentic.
    pub(super) fn refused(&self) -> u64 {
        self.pairs.refused()
    }

    /// Sends one ping of `towline ping` to the node with this name or overlay address.
    pub(super) fn ping(
        &mut self,
        now: Instant,
        mesh: &mut Mesh,
        node: &str,
        timeout: Duration,
        reply: oneshot::Sender<PingAnswer>,
    ) {
        let named = |status: &PeerStatus| {
            status.node.name().as_str() == node
                || status.node.grant().overlay.iter().any(|ip| ip.to_string() == node)
        };
        let Some(peer) = mesh.peers().find(named) else {
            if mesh.static_peers().any(|peer| peer.name == node) {
                let _ = reply.send(PingAnswer::Silence(NoPong::StaticPeer));
                return;
            }
            let _ = reply.send(PingAnswer::UnknownNode);
            return;
        };
        if peer.path.is_none() {
            let reason = peer.reason.map_or(NoPong::NoPathYet, NoPong::NoPath);
            let _ = reply.send(PingAnswer::Silence(reason));
            return;
        }
        let id = self.next_ping;
        self.next_ping += 1;
        self.pings.insert(id, reply);
        mesh.ping(now, peer.node.id(), id, timeout);
    }

    /// Handles the end of a ping: `answer` is the path and the round-trip time.
    pub(super) fn handle_result(&mut self, id: u64, answer: Option<(Path, Duration)>) {
        let Some(reply) = self.pings.remove(&id) else { return };
        let _ = reply.send(match answer {
            Some((path, rtt)) => {
                PingAnswer::Answer { path_kind: PathKind::of(&path), path: path.remote, rtt }
            }
            None => PingAnswer::Silence(NoPong::Timeout),
        });
    }
}
