//! What the daemon does with the outputs of the core: each goes to the part that executes it.

use std::time::Instant;

use towline_core::mesh::{Output, PeerState, Transmit};
use towline_core::path::Path as NetworkPath;
use towline_core::peer_history::PathChange;
use towline_proto::code::Coded;
use towline_proto::frame::{Probe, RELAYED_HEADER_BYTES};
use towline_proto::id::{NodeId, WireguardKey};
use towline_proto::stun;

use super::{Daemon, observer};
use crate::events::Event;
#[cfg(feature = "otel")]
use crate::telemetry::Step;

impl Daemon {
    /// Executes all pending outputs of the core.
    pub(super) fn drain(&mut self) {
        // The list of API servers is made from all peers, so it is made once for all outputs.
        let mut has_peer_changes = false;
        while let Some(output) = self.mesh.poll_output() {
            match output {
                Output::Transmit(transmit) => self.transmit(transmit),
                Output::Stun { to, transaction } => {
                    self.tunnels.data_plane().send(to, &stun::request(transaction));
                }
                Output::Train { peer, path, transactions, size } => {
                    self.train(peer, path, &transactions, size);
                }
                Output::SecondPort { open: true } => self.open_second_port(),
                Output::SecondPort { open: false } => self.tunnels.data_plane().close_second_port(),
                Output::Handshake { peer, to } => {
                    #[cfg(feature = "otel")]
                    self.trace_step(Step::Attempt, &peer);
                    self.tunnels.data_plane().handshake(peer, to);
                }
                // The data plane derives the keys of the pairs.
                Output::PeerTable(table) => {
                    self.tunnels.apply(&table);
                    has_peer_changes = true;
                }
                Output::PeerPath { peer, path } => {
                    self.tunnels.data_plane().apply_path(&peer, path);
                    has_peer_changes = true;
                }
                Output::ForwardingTable(table) => {
                    self.tunnels.data_plane().apply_forwarding(&table);
                }
                Output::ReportChannels => {
                    let used = self.tunnels.data_plane().take_used_channels();
                    self.mesh.handle_channels_used(Instant::now(), used);
                }
                Output::Plan(plan) => {
                    self.host.apply(plan);
                    self.announcer.remember(&self.mesh);
                }
                Output::Advertise(candidates) => self.announcer.set_candidates(candidates),
                Output::StateChanged { peer, from, to } => {
                    has_peer_changes |= self.state_changed(peer, from, to);
                }
                Output::PathChanged { peer, from, to, reason } => {
                    self.path_changed(peer, from, to, reason);
                }
                Output::StaticStateChanged { peer, from, to } => {
                    self.static_state_changed(peer, from, to);
                }
                Output::PingResult { id, answer } => self.prober.handle_result(id, answer),
            }
        }
        if has_peer_changes {
            self.api_servers_changed();
        }
    }

    /// Seals a message and sends it.
    fn transmit(&self, Transmit { peer, path, message, size, hop_limit }: Transmit) {
        let channel = path.filter(NetworkPath::is_relayed).map_or(0, |_| RELAYED_HEADER_BYTES);
        let padded = size.map_or(0, |size| usize::from(size).saturating_sub(channel));
        let Some(datagram) = self.prober.seal(&peer, &message, padded) else { return };
        match path {
            Some(path) if size.is_some() => {
                self.tunnels.data_plane().send_whole(peer, path, &datagram);
            }
            Some(path) => match hop_limit {
                Some(hops) => self.tunnels.data_plane().send_limited(path, &datagram, hops),
                None => self.tunnels.data_plane().send(path, &datagram),
            },
            None => {
                if let Some(node) = self.mesh.node_id(&peer) {
                    self.controller.signal(node, datagram);
                }
            }
        }
    }

    /// Seals pings of one size and sends them together.
    fn train(&self, peer: WireguardKey, path: NetworkPath, transactions: &[u64], size: u16) {
        let channel = if path.is_relayed() { RELAYED_HEADER_BYTES } else { 0 };
        let padded = usize::from(size).saturating_sub(channel);
        let pings = transactions.iter().filter_map(|transaction| {
            self.prober.seal(&peer, &Probe::Ping { transaction: *transaction }, padded)
        });
        self.tunnels.data_plane().send_train(path, pings.collect());
    }

    /// Opens a second UDP port, since no peer answers on the configured one.
    pub(super) fn open_second_port(&mut self) {
        let opened = self.tunnels.data_plane().open_second_port(self.config.routing.mark);
        match &opened {
            Ok(port) => tracing::info!(port, "no peer answers: trying a second UDP port"),
            Err(error) => tracing::warn!(%error, "no second UDP port"),
        }
        self.mesh.set_second_port(Instant::now(), opened.ok());
    }

    fn static_state_changed(&mut self, peer: WireguardKey, from: PeerState, to: PeerState) {
        let status = self.mesh.static_peers().find(|status| status.public_key == peer);
        let Some(status) = status else { return };
        let endpoint = status.endpoint.map(|path| tracing::field::display(path.remote));
        let code = status.reason.as_ref().map(Coded::code);
        let why = status.reason.as_ref().map(tracing::field::display);
        let reason = status.reason.as_ref().map(observer::reason);
        let (peer, path) = (status.name.clone(), status.endpoint);
        let event = Event::PeerState { peer, from, to, path, reason };
        let (event_code, peer) = (event.code(), &status.name);
        tracing::info!(event = event_code, %peer, ?from, ?to, endpoint, reason = why, code, "static peer");
        self.observer.happened(&event);
    }

    /// Reports the new state of a peer. Returns whether the peer has an API server.
    fn state_changed(&mut self, peer: NodeId, from: PeerState, to: PeerState) -> bool {
        let Some(status) = self.mesh.peer(peer) else { return false };
        let name = status.node.name();
        let path = status.path;
        let reason = status.reason.as_ref().map(observer::reason);
        let event = Event::PeerState { peer: name.to_string(), from, to, path, reason };
        let event_code = event.code();
        match path {
            Some(path) => {
                tracing::info!(event = event_code, peer = %name, ?from, ?to, %path, "peer");
            }
            None => {
                let code = status.reason.as_ref().map(Coded::code);
                let reason = status.reason.as_ref().map(tracing::field::display);
                tracing::info!(event = event_code, peer = %name, ?from, ?to, reason, code, "peer");
            }
        }
        let is_api_server = status.node.api_port().is_some();
        self.observer.happened(&event);
        is_api_server
    }

    fn path_changed(
        &mut self,
        peer: NodeId,
        from: Option<NetworkPath>,
        to: Option<NetworkPath>,
        reason: PathChange,
    ) {
        let Some(status) = self.mesh.peer(peer) else { return };
        let peer = status.node.name().to_string();
        let event = Event::PeerPath { peer, from, to, reason };
        let (name, code) = (status.node.name(), reason.code());
        let shown = |path: Option<NetworkPath>| path.map(tracing::field::display);
        let (from, to) = (shown(from), shown(to));
        tracing::info!(event = event.code(), peer = %name, from, to, code, "path");
        self.observer.happened(&event);
    }
}
