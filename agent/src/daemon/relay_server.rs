//! Requests of other nodes to this node's relay.

use std::time::{Duration, Instant};

use rand::Rng as _;
use towline_core::mesh::Transmit;
use towline_core::path::Path;
use towline_core::peer_table::PeerTable;
use towline_dataplane::Relay;
use towline_proto::frame::Probe;
use towline_proto::id::WireguardKey;
use towline_proto::pb;

/// Minimum interval between searches for expired registrations and channels.
const SWEEP: Duration = Duration::from_secs(5);
/// Number of copies of the message that announces a new channel to the other end. If all are lost,
/// the opener repeats its request.
const INCOMING_COPIES: usize = 2;

/// The relay of this node, which the data plane shares.
#[derive(Debug)]
pub(super) struct RelayServer {
    relay: Relay,
    /// Time of the last search for what expired.
    swept: Instant,
}

impl RelayServer {
    pub(super) fn new(relay: Relay, now: Instant) -> Self {
        Self { relay, swept: now }
    }

    /// Returns a handle to the relay for the data plane.
    pub(super) fn handle_for_data_plane(&self) -> Relay {
        self.relay.clone()
    }

    /// Keeps the relay to these peers.
    pub(super) fn set_peers(&self, table: &PeerTable) {
        self.relay.retain(|node| table.peers.contains_key(node));
    }

    /// Handles a request that `node` sent over `from`. Returns the messages that answer it. Other
    /// messages are ignored.
    pub(super) fn handle(
        &mut self,
        now: Instant,
        node: WireguardKey,
        from: Path,
        request: &Probe,
    ) -> Vec<Transmit> {
        // A relay is reached directly only.
        if from.is_relayed() {
            return Vec::new();
        }
        if now.saturating_duration_since(self.swept) >= SWEEP {
            self.swept = now;
            self.relay.expire(now);
        }
        let message = |peer, path, message| Transmit {
            peer,
            path: Some(path),
            message,
            size: None,
            hop_limit: None,
        };
        match *request {
            Probe::Register { transaction } => {
                let answer = match self.relay.register(now, node, from) {
                    Ok(lifetime) => Probe::Registered { transaction, lifetime },
                    Err(_) => Probe::Refused { transaction },
                };
                vec![message(node, from, answer)]
            }
            Probe::Open { transaction, peer: other } => {
                match self.relay.open(now, (node, from), other, rand::rng().random()) {
                    Ok((channel, path)) => {
                        let channel = channel.0;
                        let mut answers =
                            vec![message(node, from, Probe::Opened { transaction, channel })];
                        for _ in 0..INCOMING_COPIES {
                            let incoming = Probe::Incoming { channel, peer: node };
                            answers.push(message(other, path, incoming));
                        }
                        answers
                    }
                    Err(reason) => {
                        tracing::debug!(?reason, "channel refused");
                        vec![message(node, from, Probe::Refused { transaction })]
                    }
                }
            }
            _ => Vec::new(),
        }
    }

    /// Returns the relay part of the status.
    pub(super) fn status(&self) -> pb::RelayStatus {
        let relay = self.relay.snapshot();
        let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
        pb::RelayStatus {
            nodes: count(relay.nodes),
            channels: count(relay.channels),
            bytes: relay.bytes,
        }
    }
}
