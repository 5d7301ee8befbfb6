//! Removals of nodes that pass from peer to peer, so that they also reach a node that cannot reach a controller: an
//! attacker who blocks the controller must not keep a removed node in the mesh.
//!
//! A node that is connected only answers. One that has had no controller for a while asks one peer after the other.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};
use towline_proto::pb;
use towline_proto::rate::Rate;
use towline_proto::source_limiter::SourceLimiter;

use crate::control::{Request, Requests};
use crate::discovery::Command;
use crate::removals::{self, RemovalMessage, Removals};

/// UDP port on the overlay addresses.
const PORT: u16 = 51_832;
/// Interval at which a node without a controller asks a peer.
const ASK: Duration = Duration::from_secs(10);
/// Number of intervals without a controller before the first question: its restart is no reason to ask.
const PATIENCE: u32 = 3;
/// Time before the newest known removal from which on a peer is asked: peers learn removals in about that order.
const SLACK: i64 = 3_600;
/// Rate at which a peer is answered.
const ANSWERS: Rate = Rate::one_per(Duration::from_secs(2), 8);
/// Pause before the socket is opened again.
const AGAIN: Duration = Duration::from_secs(5);

/// The running task. Dropping it ends the task.
pub(super) struct RemovalExchange(JoinHandle<()>);

impl RemovalExchange {
    /// Starts the task. It asks the daemon by `requests`, and the discovery client by `commands`.
    pub(super) fn start(requests: Requests, commands: mpsc::Sender<Command>) -> Self {
        Self(tokio::spawn(async move {
            let exchange = Exchange { requests, commands, quiet: 0, next_peer: 0, since: None };
            exchange.run().await;
        }))
    }
}

impl Drop for RemovalExchange {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Exchange {
    requests: Requests,
    commands: mpsc::Sender<Command>,
    /// Number of intervals for which there was no controller.
    quiet: u32,
    /// Number of the next peer to ask, among those that are up.
    next_peer: usize,
    /// Time from which on removals are asked for; `None` until it is known.
    since: Option<i64>,
}

impl Exchange {
    async fn run(mut self) {
        let mut limiter = SourceLimiter::new(ANSWERS);
        let mut asks = interval(ASK);
        asks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let Some(socket) = self.open().await else { return };
        let mut datagram = [0; removals::BYTES + 1];
        loop {
            tokio::select! {
                received = socket.recv_from(&mut datagram) => {
                    let Ok((length, from)) = received else {
                        sleep(AGAIN).await;
                        continue;
                    };
                    let bytes = datagram.get(..length).unwrap_or_default();
                    match removals::parse(bytes) {
                        Some(RemovalMessage::Question { since })
                            if limiter.admit(from.ip(), Instant::now()) =>
                        {
                            let Some(known) = self.known(since).await else { return };
                            let answer = removals::answer(known.tombstones);
                            // A datagram that is lost is asked for again.
                            let _ = socket.send_to(&answer, from).await;
                        }
                        Some(RemovalMessage::Answer(tombstones)) if self.quiet >= PATIENCE => {
                            if self.learn(tombstones).await.is_none() {
                                return;
                            }
                        }
                        Some(_) | None => {}
                    }
                }
                _ = asks.tick() => {
                    if self.ask(&socket).await.is_none() {
                        return;
                    }
                }
            }
        }
    }

    /// Opens the socket once the link has an address. Returns `None` if the agent stops before.
    async fn open(&self) -> Option<UdpSocket> {
        loop {
            let (status, _) = self.requests.ask(Request::Metrics).await?;
            for address in addresses(&status.overlay_addresses) {
                match UdpSocket::bind(SocketAddr::new(address, PORT)).await {
                    Ok(socket) => return Some(socket),
                    Err(error) => tracing::debug!(%address, %error, "no socket for removals yet"),
                }
            }
            sleep(AGAIN).await;
        }
    }

    /// Asks the next peer, if there has been no controller for a while. Returns `None` if the agent stops.
    async fn ask(&mut self, socket: &UdpSocket) -> Option<()> {
        let (status, peers) = self.requests.ask(Request::Metrics).await?;
        if status.controller.is_none_or(|controller| controller.connected) {
            (self.quiet, self.since) = (0, None);
            return Some(());
        }
        self.quiet = self.quiet.saturating_add(1);
        if self.quiet < PATIENCE {
            return Some(());
        }
        let is_v4 = socket.local_addr().is_ok_and(|own| own.is_ipv4());
        let up = peers.peers.iter().filter(|peer| peer.state == "up" && !peer.node_id.is_empty());
        let reachable: Vec<IpAddr> = up
            .filter_map(|peer| addresses(&peer.overlay_addresses).find(|ip| ip.is_ipv4() == is_v4))
            .collect();
        let Some(peer) = reachable.get(self.next_peer % reachable.len().max(1)) else {
            return Some(());
        };
        self.next_peer = self.next_peer.wrapping_add(1);
        let since = match self.since {
            Some(since) => since,
            None => self.known(i64::MAX).await?.newest.saturating_sub(SLACK),
        };
        self.since = Some(since);
        let question = removals::question(since);
        // The next peer is asked if this one does not answer.
        let _ = socket.send_to(&question, SocketAddr::new(*peer, PORT)).await;
        Some(())
    }

    /// Passes what a peer answered to the discovery client, which verifies it. Returns `None` if the agent stops.
    async fn learn(&mut self, tombstones: Vec<pb::Signed>) -> Option<()> {
        let last = tombstones.iter().filter_map(removals::removed_at).max();
        // The next question goes on after what this answer has. After the end it starts over, at another peer.
        self.since = match (last, self.since) {
            (Some(last), Some(since)) if last > since => Some(last),
            (Some(last), Some(_)) => Some(last.saturating_add(1)),
            (None, _) | (_, None) => None,
        };
        for tombstone in tombstones {
            self.commands.send(Command::Removed(tombstone)).await.ok()?;
        }
        Some(())
    }

    /// Returns the removals that this node knows. Returns `None` if the agent stops.
    async fn known(&self, since: i64) -> Option<Removals> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Removals { since, reply }).await.ok()?;
        answer.await.ok()
    }
}

fn addresses(texts: &[String]) -> impl Iterator<Item = IpAddr> {
    texts.iter().filter_map(|text| text.parse().ok())
}
