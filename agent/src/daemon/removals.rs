//! Removals of nodes that pass from peer to peer, so that they also reach a node that cannot reach a controller: an
//! attacker who blocks the controller must not keep a removed node in the mesh.
//!
//! A node that is connected only answers. One that has had no controller for a while asks one peer after the other.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot, watch};
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
    /// Starts the task. It asks the daemon by `requests`, and the discovery client by `commands`. `connected` is true
    /// while there is a session with a controller.
    pub(super) fn start(
        requests: Requests,
        commands: mpsc::Sender<Command>,
        connected: watch::Receiver<bool>,
    ) -> Self {
        Self(tokio::spawn(async move {
            let questions = Questions::default();
            Exchange { requests, commands, connected, quiet: 0, questions }.run().await;
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
    connected: watch::Receiver<bool>,
    /// Number of intervals for which there was no controller.
    quiet: u32,
    questions: Questions,
}

/// A question to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Question {
    /// Overlay address of the peer.
    peer: IpAddr,
    /// Time from which on removals are asked for, in seconds since 1970.
    since: i64,
}

/// Order of the questions while there is no controller.
///
/// Each peer is asked from the same time on, until it knows nothing more, and then the next one. So what a peer
/// answers, or withholds, changes nothing for the others.
#[derive(Debug, Default)]
struct Questions {
    /// Time from which on each peer is asked. Set once there has been no controller for a while, cleared when there
    /// is one again.
    base: Option<i64>,
    /// Question that was asked last, until it is answered.
    asked: Option<Question>,
    /// Question that goes on after the last answer.
    continued: Option<Question>,
    /// Number of the next peer to ask, among those that are up.
    next_peer: usize,
}

impl Questions {
    /// Returns the next question to one of these peers, which now counts as asked. `None` if there is no peer.
    fn next(&mut self, base: i64, reachable: &[IpAddr]) -> Option<Question> {
        // If the last peer did not answer, the next one is asked.
        self.asked = None;
        let continued = self.continued.take().filter(|next| reachable.contains(&next.peer));
        let question = match continued {
            Some(question) => question,
            None => {
                let peer = *reachable.get(self.next_peer % reachable.len().max(1))?;
                self.next_peer = self.next_peer.wrapping_add(1);
                Question { peer, since: base }
            }
        };
        self.asked = Some(question);
        Some(question)
    }

    /// Takes the question that this peer answers. `None` if another peer was asked last, or it answered already.
    fn take_asked(&mut self, peer: IpAddr) -> Option<Question> {
        self.asked.take_if(|question| question.peer == peer)
    }

    /// Goes on after an answer whose newest removal is of the time `last`. Without one, the peer knows nothing more.
    fn handle_answer(&mut self, question: Question, last: Option<i64>) {
        self.continued = last.map(|last| {
            let is_later = last > question.since;
            Question { since: if is_later { last } else { last.saturating_add(1) }, ..question }
        });
    }

    /// Forgets the questions, because there is a controller.
    fn clear(&mut self) {
        (self.base, self.asked, self.continued) = (None, None, None);
    }
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
                            if self.learn(from.ip(), tombstones).await.is_none() {
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
        if *self.connected.borrow() {
            self.quiet = 0;
            self.questions.clear();
            return Some(());
        }
        self.quiet = self.quiet.saturating_add(1);
        if self.quiet < PATIENCE {
            return Some(());
        }
        let base = match self.questions.base {
            Some(base) => base,
            None => self.known(i64::MAX).await?.newest.saturating_sub(SLACK),
        };
        self.questions.base = Some(base);
        let peers = self.requests.ask(Request::Peers).await?;
        let is_v4 = socket.local_addr().is_ok_and(|own| own.is_ipv4());
        let up = peers.peers.iter().filter(|peer| peer.state == "up" && !peer.node_id.is_empty());
        let reachable: Vec<IpAddr> = up
            .filter_map(|peer| addresses(&peer.overlay_addresses).find(|ip| ip.is_ipv4() == is_v4))
            .collect();
        let Some(Question { peer, since }) = self.questions.next(base, &reachable) else {
            return Some(());
        };
        let _ = socket.send_to(&removals::question(since), SocketAddr::new(peer, PORT)).await;
        Some(())
    }

    /// Passes what a peer answered to the discovery client, which verifies it. An answer of a peer that was not asked
    /// is ignored. Returns `None` if the agent stops.
    async fn learn(&mut self, peer: IpAddr, tombstones: Vec<pb::Signed>) -> Option<()> {
        let Some(question) = self.questions.take_asked(peer) else { return Some(()) };
        for tombstone in &tombstones {
            self.commands.send(Command::Removed(tombstone.clone())).await.ok()?;
        }
        // A peer could go on forever with removals that it makes up: only those that were accepted count.
        let known = self.known(question.since).await?.tombstones;
        let accepted = tombstones.iter().filter(|tombstone| known.contains(tombstone));
        self.questions.handle_answer(question, accepted.filter_map(removals::removed_at).max());
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use towline_fixtures::ca::Ca;
    use towline_fixtures::node::{node_id, tombstone};
    use towline_proto::node::Tombstone;
    use towline_proto::signed::Domain;

    use super::*;
    use crate::map_cache::MapCache;

    const PEERS: [IpAddr; 3] = [
        IpAddr::V4(std::net::Ipv4Addr::new(198, 19, 0, 2)),
        IpAddr::V4(std::net::Ipv4Addr::new(198, 19, 0, 3)),
        IpAddr::V4(std::net::Ipv4Addr::new(198, 19, 0, 4)),
    ];

    /// Returns the signed removal of a node at a time.
    fn removal(ca: &Ca, number: u8, removed_at: i64) -> pb::Signed {
        let tombstone = Tombstone { removed_at, ..tombstone(number) };
        ca.sign(Domain::Tombstone, &pb::Tombstone::from(&tombstone))
    }

    /// Returns an exchange of a node that knows no removal, with a discovery client that verifies.
    fn exchange(ca: &Ca) -> Exchange {
        let (queue, _requests) = mpsc::channel(1);
        let (commands, mut received) = mpsc::channel(8);
        let mut map = MapCache::new(ca.public(), node_id(1));
        tokio::spawn(async move {
            while let Some(command) = received.recv().await {
                match command {
                    Command::Removed(tombstone) => {
                        map.apply(pb::Changes::of([pb::change::Kind::Tombstone(tombstone)], 0));
                    }
                    Command::Removals { since, reply } => {
                        let _ = reply.send(map.removals(since));
                    }
                    Command::Leave(_) | Command::Signal(..) | Command::Summary(_) => {}
                }
            }
        });
        let requests = Requests::of(&queue);
        let connected = watch::Sender::new(false).subscribe();
        Exchange { requests, commands, connected, quiet: PATIENCE, questions: Questions::default() }
    }

    #[tokio::test]
    async fn what_one_peer_withholds_the_others_tell() {
        let ca = Ca::new(9);
        let (old, new) = (removal(&ca, 5, 10_000), removal(&ca, 6, 90_000));
        let mut exchange = exchange(&ca);
        let mut asked = BTreeSet::new();
        // The first peer knows the newest removal alone, as it says.
        for _ in 0..12 {
            let question = exchange.questions.next(5_000, &PEERS).unwrap();
            asked.insert((question.peer, question.since));
            let is_first = question.peer == PEERS[0];
            let knows = if is_first { vec![&new] } else { vec![&old, &new] };
            let is_wanted = |tombstone: &&&pb::Signed| {
                removals::removed_at(tombstone).is_some_and(|at| at >= question.since)
            };
            let answer = knows.iter().filter(is_wanted).copied().cloned().collect();
            exchange.learn(question.peer, answer).await.unwrap();
        }
        for peer in PEERS {
            assert!(asked.contains(&(peer, 5_000)), "{asked:?}");
        }
        assert_eq!(exchange.known(0).await.unwrap().tombstones, [old, new]);
    }

    #[tokio::test]
    async fn an_answer_counts_once_from_the_peer_that_was_asked_and_only_if_signed() {
        let ca = Ca::new(9);
        let mut exchange = exchange(&ca);
        let question = exchange.questions.next(0, &PEERS).unwrap();
        assert_eq!(question, Question { peer: PEERS[0], since: 0 });
        exchange.learn(PEERS[1], vec![removal(&ca, 5, 10)]).await.unwrap();
        assert!(exchange.known(0).await.unwrap().tombstones.is_empty(), "it was not asked");
        exchange.learn(PEERS[0], vec![removal(&ca, 5, 10)]).await.unwrap();
        exchange.learn(PEERS[0], vec![removal(&ca, 6, 20)]).await.unwrap();
        assert_eq!(exchange.known(0).await.unwrap().newest, 10);
        let question = exchange.questions.next(0, &PEERS).unwrap();
        assert_eq!(question, Question { peer: PEERS[0], since: 10 }, "it may know more");
        exchange.learn(PEERS[0], vec![removal(&Ca::new(8), 7, 1_000)]).await.unwrap();
        let question = exchange.questions.next(0, &PEERS).unwrap();
        assert_eq!(question, Question { peer: PEERS[1], since: 0 }, "the removal was made up");
    }

    #[tokio::test]
    async fn a_node_with_a_controller_asks_for_no_peers() {
        let ca = Ca::new(9);
        let (queue, mut requests) = mpsc::channel(1);
        let connected = watch::Sender::new(true);
        let mut exchange = Exchange {
            requests: Requests::of(&queue),
            connected: connected.subscribe(),
            ..exchange(&ca)
        };
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        exchange.ask(&socket).await.unwrap();
        assert!(requests.try_recv().is_err() && exchange.quiet == 0);
        connected.send_replace(false);
        for _ in 1..PATIENCE {
            exchange.ask(&socket).await.unwrap();
            assert!(requests.try_recv().is_err());
        }
        let answer = tokio::spawn(async move {
            let Some(Request::Peers(reply)) = requests.recv().await else { panic!("peers") };
            reply.send(pb::PeersResponse::default()).unwrap();
        });
        exchange.ask(&socket).await.unwrap();
        answer.await.unwrap();
    }

    #[test]
    fn a_peer_that_does_not_answer_or_is_gone_is_followed_by_the_next() {
        let mut questions = Questions::default();
        for peer in [PEERS[0], PEERS[1], PEERS[2], PEERS[0]] {
            assert_eq!(questions.next(7, &PEERS), Some(Question { peer, since: 7 }));
        }
        let question = questions.take_asked(PEERS[0]).unwrap();
        questions.handle_answer(question, Some(9));
        assert_eq!(questions.next(7, &[]), None);
        assert_eq!(questions.take_asked(PEERS[0]), None);
    }
}
