//! Requests of the command line, which arrive over the local socket.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use towline_core::mesh;
use towline_core::path;

use super::{CONFIRMATION_PERIOD, Daemon, Exit};
use crate::control::{PingAnswer, Request};
use crate::notify::Notifier;

impl Daemon {
    pub(super) async fn control_request(
        &mut self,
        request: Request,
        notifier: &Notifier,
    ) -> Option<Exit> {
        match request {
            Request::Status(reply) => {
                self.host.read_gateways();
                self.host.look_for_redirects();
                let _ = reply.send(self.status());
            }
            Request::Peers(reply) => {
                let _ = reply.send(self.peers());
            }
            Request::Ping { node, timeout, reply } => self.ping(&node, timeout, reply),
            Request::Down(reply) => {
                let result = self.down();
                let exit = if result.is_ok() { Exit::Down } else { Exit::Standby };
                let _ = reply.send(result);
                return Some(exit);
            }
            Request::Leave { force, reply } => {
                let result = with_heartbeat(notifier, self.leave(force)).await;
                let ended = result.is_ok();
                let _ = reply.send(result);
                if ended {
                    return Some(Exit::Left);
                }
            }
            Request::Up(reply) => {
                let _ = reply.send(Ok(true));
            }
            Request::Confirm(reply) => {
                let _ = reply.send(self.state.confirm().map_err(|error| error.to_string()));
            }
        }
        None
    }

    fn ping(&mut self, node: &str, timeout: Duration, reply: oneshot::Sender<PingAnswer>) {
        let named = |status: &mesh::PeerStatus| {
            status.node.name().as_str() == node
                || status.node.grant().overlay.iter().any(|ip| ip.to_string() == node)
        };
        let Some(peer) = self.mesh.peers().find(named) else {
            if self.mesh.static_peers().any(|peer| peer.name == node) {
                let why = "static peers do not answer probes: run `towline peers`";
                let _ = reply.send(PingAnswer::Silence(why.into()));
                return;
            }
            let _ = reply.send(PingAnswer::UnknownNode);
            return;
        };
        if peer.path.is_none() {
            let _ = reply.send(PingAnswer::Silence(if peer.reason.is_empty() {
                "no path yet".into()
            } else {
                peer.reason
            }));
            return;
        }
        let id = self.next_ping;
        self.next_ping += 1;
        self.pings.insert(id, reply);
        self.mesh.ping(Instant::now(), peer.node.id(), id, timeout);
    }

    pub(super) fn ping_result(&mut self, id: u64, answer: Option<(path::Path, Duration)>) {
        let Some(reply) = self.pings.remove(&id) else { return };
        let _ = reply.send(match answer {
            Some((path, rtt)) => {
                PingAnswer::Answer { path_kind: path_kind(&path), path: path.remote, rtt }
            }
            None => PingAnswer::Silence("no answer in time".into()),
        });
    }
}

/// Runs `work` and notifies the service manager in the meantime that the agent is alive.
pub(super) async fn with_heartbeat<T>(notifier: &Notifier, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let mut ticks = tokio::time::interval(notifier.period().unwrap_or(CONFIRMATION_PERIOD));
    loop {
        tokio::select! {
            result = &mut work => return result,
            _ = ticks.tick() => notifier.alive(),
        }
    }
}

/// Returns the kind of a path for command-line output.
pub(super) fn path_kind(path: &path::Path) -> &'static str {
    if path.is_relayed() { "relay" } else { "direct" }
}
