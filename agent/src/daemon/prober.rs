//! Sealed messages between this node and others: the keys of each pair, which the data plane uses too,
//! and the pings of `towline ping` that wait for their answers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use towline_core::mesh::{Mesh, PeerStatus};
use towline_core::path::Path;
use towline_dataplane::Probes;
use towline_proto::frame::Probe;
use towline_proto::id::WireguardKey;

use crate::control::{NoPong, PathKind, PingAnswer};
use crate::keys::Wireguard;

/// Keys of this node and of its pairs, and the operator's pings in flight.
#[derive(Debug)]
pub(super) struct Prober {
    own: Wireguard,
    probes: Probes,
    /// Number of messages that a controller carried and that were not authentic, or replays.
    refused: u64,
    /// Reply channel of each probe of `towline ping` in flight, by probe id.
    pings: BTreeMap<u64, oneshot::Sender<PingAnswer>>,
    next_ping: u64,
}

impl Prober {
    /// Creates the keys of a node without peers. `boot_epoch` is the number of this start.
    pub(super) fn new(own: Wireguard, boot_epoch: u64) -> Self {
        let probes = Probes::new(own.secret().clone(), boot_epoch);
        Self { own, probes, refused: 0, pings: BTreeMap::new(), next_ping: 0 }
    }

    /// Returns a handle to the keys and sessions for the data plane, which follows the peer table.
    pub(super) fn handle_for_data_plane(&self) -> Probes {
        self.probes.clone()
    }

    /// Returns the WireGuard key pair of this node.
    pub(super) fn own_key(&self) -> &Wireguard {
        &self.own
    }

    /// Returns the datagram of a message to `peer`, padded to `size` bytes if it is shorter. `None`
    /// if there is no such peer.
    pub(super) fn seal(
        &self,
        peer: &WireguardKey,
        message: &Probe,
        size: usize,
    ) -> Option<Vec<u8>> {
        self.probes.seal(peer, message, size)
    }

    /// Opens a message that a controller carried. Returns its sender and its content. `None` if it is
    /// not authentic or a replay, which is counted.
    pub(super) fn open_signal(&mut self, datagram: &[u8]) -> Option<(WireguardKey, Probe)> {
        let opened = self.probes.open_signal(datagram);
        self.refused += u64::from(opened.is_none());
        opened
    }

    /// Returns the number of messages that a controller carried and that were refused.
    pub(super) fn refused(&self) -> u64 {
        self.refused
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
