//! What the daemon tells the trace of its start.

use std::time::SystemTime;

use towline_core::peer_table::Observation;
use towline_proto::id::WireguardKey;

use super::Daemon;
use crate::discovery;
use crate::telemetry::Step;

impl Daemon {
    /// Notes that a step was reached with this peer.
    pub(super) fn trace_step(&mut self, step: Step, peer: &WireguardKey) {
        if !self.trace.is_open() {
            return;
        }
        let status = self.mesh.node_id(peer).and_then(|node| self.mesh.peer(node));
        let name = status.map(|status| status.node.name().to_string());
        self.trace.reached(step, name, SystemTime::now());
    }

    /// Notes what the data plane observed.
    pub(super) fn trace_observation(&mut self, peer: &WireguardKey, what: &Observation) {
        match what {
            Observation::Handshake { .. } => self.trace_step(Step::Handshake, peer),
            Observation::Active { .. } => self.trace_step(Step::Packet, peer),
            Observation::Roamed { .. }
            | Observation::HandshakeUnanswered
            | Observation::SessionExpired
            | Observation::Wanted
            | Observation::TooBig { .. } => {}
        }
    }

    /// Notes what the discovery client reported. The parts of a map are followed by a report that the
    /// controller was heard, and so is the answer that the stored map is current.
    pub(super) fn trace_controller(&mut self, event: &discovery::Event) {
        let step = match event {
            discovery::Event::Connected { .. } => Step::Connected,
            discovery::Event::Heard { .. } => Step::Map,
            _ => return,
        };
        self.trace.reached(step, None, SystemTime::now());
    }
}
