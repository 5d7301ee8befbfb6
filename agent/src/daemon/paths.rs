//! Datagrams of the UDP port that are not WireGuard: sealed messages and STUN. The core decides
//! what to send. This module seals and opens the datagrams, and answers what other nodes ask of
//! this node's relay.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng as _;
use towline_core::mesh::Transmit;
use towline_core::path::{LocalAddress, Path};
use towline_proto::frame::{Probe, RELAYED_HEADER_BYTES};
use towline_proto::id::WireguardKey;
use towline_proto::stun;

use super::Daemon;
use crate::discovery;

/// Minimum interval between searches for expired relay registrations and channels.
const RELAY_SWEEP: Duration = Duration::from_secs(5);
/// Number of copies of the message that announces a new channel to the other end. If all are lost,
/// the opener repeats its request.
const INCOMING_COPIES: usize = 2;

impl Daemon {
    /// Seals a message and sends it.
    pub(super) fn transmit(&self, Transmit { peer, path, message, size }: Transmit) {
        let channel = path.filter(Path::is_relayed).map_or(0, |_| RELAYED_HEADER_BYTES);
        let padded = size.map_or(0, |size| usize::from(size).saturating_sub(channel));
        let Some(datagram) = self.probe_keys.seal(&peer, &message, padded) else { return };
        match path {
            Some(path) if size.is_some() => self.data_plane.send_whole(peer, path, &datagram),
            Some(path) => self.data_plane.send(path, &datagram),
            None => {
                // A full queue means that the controller is too slow. The core repeats the message.
                if let (Some(commands), Some(node)) = (&self.commands, self.mesh.node_id(&peer)) {
                    let _ = commands.try_send(discovery::Command::Signal(node, datagram));
                }
            }
        }
    }

    pub(super) fn ask_reflector(
        &self,
        local: Option<LocalAddress>,
        to: SocketAddr,
        transaction: stun::Transaction,
    ) {
        let to = Path { local, ..Path::direct(to) };
        self.data_plane.send(to, &stun::request(transaction));
    }

    /// Handles a datagram that looks like a sealed message: requests to a relay are answered here,
    /// every other message goes to the core. `from` is `None` if it came through a controller.
    pub(super) fn message_received(&mut self, from: Option<Path>, datagram: &[u8]) {
        let Some((peer, message)) = self.probe_keys.open(datagram) else { return };
        let now = Instant::now();
        match (message, from) {
            (Probe::Register { transaction }, Some(from)) => {
                self.register(now, peer, from, transaction);
            }
            (Probe::Open { transaction, peer: other }, Some(from)) => {
                self.open_channel(now, (peer, from), other, transaction);
            }
            (message, from) => self.mesh.handle_message(now, peer, from, message),
        }
    }

    pub(super) fn stun_received(&mut self, from: Path, datagram: &[u8]) {
        if let Some(stun::Message::Success { transaction, mapped }) =
            stun::Message::decode(datagram)
        {
            self.mesh.handle_stun(Instant::now(), from.remote, transaction, mapped);
        }
    }

    /// Sends the answer of this node's relay to a node.
    fn answer(&self, peer: WireguardKey, path: Path, message: Probe) {
        self.transmit(Transmit { peer, path: Some(path), message, size: None });
    }

    /// Registers a node with this node's relay, and sends the response.
    fn register(&mut self, now: Instant, node: WireguardKey, from: Path, transaction: u64) {
        if from.is_relayed() {
            return;
        }
        self.sweep_relay(now);
        let answer = match self.relay.register(now, node, from) {
            Ok(lifetime) => Probe::Registered { transaction, lifetime },
            Err(_) => Probe::Refused { transaction },
        };
        self.answer(node, from, answer);
    }

    /// Opens a relay channel to `other` for a node, and informs both of them.
    fn open_channel(
        &mut self,
        now: Instant,
        (node, from): (WireguardKey, Path),
        other: WireguardKey,
        transaction: u64,
    ) {
        if from.is_relayed() {
            return;
        }
        self.sweep_relay(now);
        match self.relay.open(now, (node, from), other, rand::rng().random()) {
            Ok((channel, path)) => {
                let opened = Probe::Opened { transaction, channel: channel.0 };
                self.answer(node, from, opened);
                for _ in 0..INCOMING_COPIES {
                    let incoming = Probe::Incoming { channel: channel.0, peer: node };
                    self.answer(other, path, incoming);
                }
            }
            Err(reason) => {
                tracing::debug!(?reason, "channel refused");
                self.answer(node, from, Probe::Refused { transaction });
            }
        }
    }

    fn sweep_relay(&mut self, now: Instant) {
        if now.saturating_duration_since(self.relay_swept) >= RELAY_SWEEP {
            self.relay_swept = now;
            self.relay.expire(now);
        }
    }
}
