//! Datagrams of the UDP port that are not WireGuard: probes, STUN, relay messages and signals. The
//! core decides what to send. This module seals and opens the datagrams.

use std::time::{Duration, Instant};

use rand::Rng as _;
use towline_core::mesh::ReceivedProbe;
use towline_core::path::{ChannelId, LocalEnd, Path};
use towline_core::relay::{RelayAnswer, RelayRequest};
use towline_core::signal::Signal;
use towline_proto::frame::{Probe, RELAYED_HEADER_BYTES};
use towline_proto::id::{NodeId, WireguardKey};
use towline_proto::stun;

use super::Daemon;
use crate::discovery;

/// Minimum interval between searches for expired relay registrations and channels.
const RELAY_SWEEP: Duration = Duration::from_secs(5);
/// Number of copies of the message that announces a new channel to the other end. If all are lost,
/// the opener repeats its request.
const INCOMING_COPIES: usize = 2;

impl Daemon {
    pub(super) fn send_probe(&self, peer: &WireguardKey, to: Path, probe: &Probe) {
        if let Some(datagram) = self.probe_keys.seal(peer, probe, 0) {
            self.data_plane.send(to, &datagram);
        }
    }

    /// Sends a ping of `size` bytes of UDP payload in total, relay header included.
    pub(super) fn send_ping(
        &self,
        peer: WireguardKey,
        to: Path,
        transaction: u64,
        size: Option<u16>,
    ) {
        let ping = Probe::Ping { transaction };
        let Some(size) = size else { return self.send_probe(&peer, to, &ping) };
        let around = if to.is_relayed() { RELAYED_HEADER_BYTES } else { 0 };
        let size = usize::from(size).saturating_sub(around);
        if let Some(datagram) = self.probe_keys.seal(&peer, &ping, size) {
            self.data_plane.send_whole(peer, to, &datagram);
        }
    }

    pub(super) fn ask_reflector(
        &self,
        local: Option<LocalEnd>,
        to: std::net::SocketAddr,
        transaction: stun::Transaction,
    ) {
        let to = Path { local, ..Path::direct(to) };
        self.data_plane.send(to, &stun::request(transaction));
    }

    pub(super) fn ask_relay(&self, request: RelayRequest) {
        match request {
            RelayRequest::Register { relay, to, transaction } => {
                self.send_probe(&relay, to, &Probe::Register { transaction });
            }
            RelayRequest::Open { relay, to, peer, transaction } => {
                self.send_probe(&relay, to, &Probe::Open { transaction, peer });
            }
        }
    }

    /// Seals a signal for the peer and sends it over the path `via`, or through the controller.
    pub(super) fn send_signal(&self, peer: NodeId, via: Option<Path>, signal: Signal) {
        let Some(key) = self.mesh.peer(peer).map(|status| status.node.wireguard_key()) else {
            return;
        };
        let Signal::CallMe { boot_epoch, number, candidates } = signal;
        let call = Probe::CallMe { boot_epoch, number, candidates };
        let Some(datagram) = self.probe_keys.seal(&key, &call, 0) else { return };
        match via {
            Some(path) => self.data_plane.send(path, &datagram),
            None => {
                // A full queue means that the controller is too slow. The core repeats the signal.
                if let Some(commands) = &self.commands {
                    let _ = commands.try_send(discovery::Command::Signal(peer, datagram));
                }
            }
        }
    }

    /// Handles a datagram that looks like a probe. `from` is `None` if it came through the
    /// controller.
    pub(super) fn probe_received(&mut self, from: Option<Path>, datagram: &[u8]) {
        let Some((peer, probe)) = self.probe_keys.open(datagram) else { return };
        let now = Instant::now();
        let Some(from) = from else {
            // Only this message is valid here: all others refer to the path on which they arrived.
            if let Probe::CallMe { .. } = probe {
                self.called(now, peer, probe);
            }
            return;
        };
        let answer = match probe {
            Probe::Ping { transaction } => {
                return self.mesh.probe_received(
                    now,
                    peer,
                    from,
                    ReceivedProbe::Ping { transaction },
                );
            }
            Probe::Pong { transaction, observed } => {
                let pong = ReceivedProbe::Pong { transaction, observed };
                return self.mesh.probe_received(now, peer, from, pong);
            }
            Probe::CallMe { .. } => return self.called(now, peer, probe),
            Probe::Register { transaction } => return self.register(now, peer, from, transaction),
            Probe::Open { transaction, peer: other } => {
                return self.open_channel(now, (peer, from), other, transaction);
            }
            Probe::Registered { transaction, lifetime } => {
                RelayAnswer::Registered { transaction, lifetime }
            }
            Probe::Opened { transaction, channel } => {
                RelayAnswer::Opened { transaction, channel: ChannelId(channel) }
            }
            Probe::Refused { transaction } => RelayAnswer::Refused { transaction },
            Probe::Incoming { channel, peer } => {
                RelayAnswer::Incoming { peer, channel: ChannelId(channel) }
            }
        };
        self.mesh.relay_received(now, peer, from, answer);
    }

    pub(super) fn stun_received(&mut self, from: Path, datagram: &[u8]) {
        if let Some(stun::Message::Success { transaction, mapped }) =
            stun::Message::decode(datagram)
        {
            let now = Instant::now();
            self.mesh.stun_received(now, from.local, from.remote, transaction, mapped);
        }
    }

    /// Passes a peer's `CallMe` signal to the core.
    fn called(&mut self, now: Instant, peer: WireguardKey, probe: Probe) {
        let Probe::CallMe { boot_epoch, number, candidates } = probe else { return };
        if let Some(node) = self.nodes.get(&peer) {
            let call = Signal::CallMe { boot_epoch, number, candidates };
            self.mesh.signal_received(now, *node, call);
        }
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
        self.send_probe(&node, from, &answer);
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
                self.send_probe(&node, from, &opened);
                for _ in 0..INCOMING_COPIES {
                    let incoming = Probe::Incoming { channel: channel.0, peer: node };
                    self.send_probe(&other, path, &incoming);
                }
            }
            Err(reason) => {
                tracing::debug!(?reason, "relay channel refused");
                self.send_probe(&node, from, &Probe::Refused { transaction });
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
