//! Exchange with the other controllers that use the same store: each follows what the others write, tells them which
//! nodes are connected to it, and forwards signals to nodes that are connected to another one.
//!
//! What is exchanged is authenticated with the secret of the store, like its records. A part that is not authentic
//! counts as no news: then no node is offline (see [`Sessions`]).
//!
//! A controller without news for [`BLIND`] is cut off, whether it is presence or the store that it cannot read: the
//! others cannot know its nodes, or it does not know what the others changed. So it ends the watches, one after the
//! other, until it has news again. The nodes connect to the next controller of their list.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prost::Message as _;
use prost::bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};
use towline_proto::id::NodeId;
use towline_proto::{limits, pb};
use towline_registry::sessions::{BLIND, Sessions};
use towline_registry::{NodeProblem, Now};

use crate::clock;
use crate::ledger::Ledger;
use crate::service::{Outbound, Shared};
use crate::store::etcd::{EtcdError, Presence, Replicas, SIGNALS};
use crate::store_secret::StoreSecret;

/// Interval at which presence is told and read.
const PRESENCE: Duration = Duration::from_secs(2);
/// Interval at which the store is read, and after it could not be read.
const FOLLOW: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// Interval at which signals are received.
const RECEIVE: Duration = Duration::from_millis(100);
/// Time over which each watch of a controller that is cut off ends.
const CUT_OFF: Duration = Duration::from_secs(60);

/// The exchange of one controller.
pub(crate) struct Exchange {
    replicas: Replicas,
    shared: Arc<Shared>,
    /// Time over which watches end, while this controller is cut off.
    cut_off: watch::Sender<Option<Duration>>,
    /// Monotonic time of the start, from which the first news are awaited.
    started: Instant,
    /// Numbers of the controllers that nodes are connected to, by the newest news.
    routes: Mutex<BTreeMap<NodeId, u64>>,
}

/// Error of an exchange of presence.
#[derive(Debug, thiserror::Error)]
enum ExchangeError {
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    #[error(
        "the presence of another controller is not authentic: give every controller of a mesh the same store.key"
    )]
    Unauthentic,
}

impl Exchange {
    /// Creates the exchange. `cut_off` gets the time over which watches end, while this controller is cut off.
    pub(crate) fn new(
        replicas: Replicas,
        shared: Arc<Shared>,
        cut_off: watch::Sender<Option<Duration>>,
    ) -> Self {
        let started = clock::now().mono;
        Self { replicas, shared, cut_off, started, routes: Mutex::default() }
    }

    /// Runs until it is dropped. Signals to nodes of other controllers come from `outbound`.
    pub(crate) async fn run(self, outbound: mpsc::Receiver<Outbound>) {
        tokio::join!(self.tell(), self.follow(), self.send(outbound), self.receive());
    }

    /// Tells and reads presence.
    async fn tell(&self) {
        let mut ticks = interval(PRESENCE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_failing = false;
        loop {
            ticks.tick().await;
            let begun = clock::now();
            let connected = self.shared.sessions.lock().connected(begun);
            match self.exchange(&connected).await {
                Ok(routes) => {
                    let doubled = {
                        let mut sessions = self.shared.sessions.lock();
                        sessions.hear(routes.keys().copied(), begun);
                        sessions.take_doubled(begun)
                    };
                    *self.routes.lock() = routes;
                    if !doubled.is_empty() {
                        // Presence does not wait for the writer.
                        tokio::spawn(note_doubled(self.shared.clone(), doubled));
                    }
                    is_failing = false;
                }
                Err(error) => {
                    if !is_failing {
                        tracing::warn!(%error, "no news of the other controllers");
                    }
                    is_failing = true;
                }
            }
            self.note_cut_off();
        }
    }

    /// Tells which nodes are connected to this controller. Returns those that are connected to others, each with the
    /// number of its controller.
    async fn exchange(&self, connected: &[NodeId]) -> Result<BTreeMap<NodeId, u64>, ExchangeError> {
        let secret = self.shared.authority.store_secret();
        let ours = encode_presence(secret, self.replicas.number(), connected);
        let mut routes = BTreeMap::new();
        for part in self.replicas.exchange(ours).await? {
            let nodes = decode_presence(secret, &part).ok_or(ExchangeError::Unauthentic)?;
            routes.extend(nodes.into_iter().map(|node| (node, part.controller)));
        }
        Ok(routes)
    }

    /// Lets watches end while this controller is cut off.
    fn note_cut_off(&self) {
        let news = News {
            presence: self.shared.sessions.lock().heard_at().unwrap_or(self.started),
            store: self.shared.counters.current_at().unwrap_or(self.started),
        };
        let now = clock::now();
        let is_cut_off = news.is_cut_off(now);
        let over = is_cut_off.then_some(CUT_OFF);
        self.cut_off.send_if_modified(|known| {
            let is_new = *known != over;
            if is_new && is_cut_off {
                tracing::error!(
                    presence_age_s = now.since(news.presence).as_secs(),
                    store_age_s = now.since(news.store).as_secs(),
                    "cut off from the other controllers: nodes are sent to them"
                );
            } else if is_new {
                tracing::info!("the other controllers are back");
            }
            *known = over;
            is_new
        });
    }

    /// Follows what the other controllers write.
    async fn follow(&self) {
        loop {
            let is_read = self.shared.writer.refresh().await;
            sleep(if is_read { FOLLOW.0 } else { FOLLOW.1 }).await;
        }
    }

    /// Sends signals to nodes of other controllers. Nodes repeat important ones, so a loss does no harm.
    async fn send(&self, mut outbound: mpsc::Receiver<Outbound>) {
        let mut waiting = Vec::new();
        while outbound.recv_many(&mut waiting, SIGNALS).await > 0 {
            let secret = self.shared.authority.store_secret();
            let routed: Vec<(u64, Bytes)> = {
                let routes = self.routes.lock();
                let route = |(to, signal): Outbound| {
                    let controller = *routes.get(&to)?;
                    Some((controller, encode_signal(secret, controller, to, &signal)))
                };
                waiting.drain(..).filter_map(route).collect()
            };
            if routed.is_empty() {
                continue;
            }
            if let Err(error) = self.replicas.send(routed).await {
                tracing::debug!(%error, "signals to other controllers dropped");
            }
        }
    }

    /// Receives signals to nodes of this controller.
    async fn receive(&self) {
        let mut ticks = interval(RECEIVE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let secret = self.shared.authority.store_secret();
        loop {
            ticks.tick().await;
            // The exchange of presence says that etcd does not answer.
            let received = self.replicas.receive().await.unwrap_or_default();
            for value in received {
                let signal = decode_signal(secret, self.replicas.number(), &value);
                let delivered =
                    signal.is_some_and(|(to, signal)| self.shared.signals.deliver(to, signal));
                if !delivered {
                    tracing::debug!("signal of another controller dropped");
                }
            }
        }
    }
}

/// Adds to the problems of nodes that they are connected to another controller, too. The writer logs it.
async fn note_doubled(shared: Arc<Shared>, doubled: Vec<(NodeId, SocketAddr)>) {
    let change = move |ledger: &mut Ledger, _: &Sessions, _: Now| {
        for (node, address) in doubled {
            let problem = NodeProblem::ClonedElsewhere { connected: address.ip() };
            ledger.registry().note(node, problem);
        }
    };
    if let Err(error) = shared.writer.run(change).await {
        tracing::warn!(%error, "nodes are connected to two controllers: not noted");
    }
}

/// Monotonic times of the newest news of the other controllers, or of the start if there were none.
#[derive(Debug, Clone, Copy)]
struct News {
    /// Time at which their presence was read.
    presence: Instant,
    /// Time at which everything that they stored was known.
    store: Instant,
}

impl News {
    /// Returns whether a controller with these news is cut off from the others.
    fn is_cut_off(self, now: Now) -> bool {
        [self.presence, self.store].into_iter().any(|at| now.since(at) > BLIND)
    }
}

/// Returns the parts that tell which nodes are connected to a controller. A change of one node changes one part.
fn encode_presence(
    secret: &StoreSecret,
    controller: u64,
    connected: &[NodeId],
) -> BTreeMap<u8, Bytes> {
    let mut parts = BTreeMap::<u8, Vec<u8>>::new();
    for node in connected {
        let [.., last] = node.0;
        // 64 parts, which fit into one transaction. Ids are random.
        parts.entry(last >> 2).or_default().extend_from_slice(&node.0);
    }
    let seal = |(part, body): (u8, Vec<u8>)| {
        (part, Bytes::from(secret.seal(&presence_name(controller, part), &body)))
    };
    parts.into_iter().map(seal).collect()
}

/// Returns the nodes in a part of presence; `None` if it is not authentic or malformed.
fn decode_presence(secret: &StoreSecret, presence: &Presence) -> Option<Vec<NodeId>> {
    let name = presence_name(presence.controller, presence.part);
    let (nodes, rest) = secret.open(&name, &presence.value).ok()?.body.as_chunks::<16>();
    let is_valid = rest.is_empty() && nodes.len() <= limits::NODES;
    is_valid.then(|| nodes.iter().map(|id| NodeId(*id)).collect())
}

/// Returns the value of a signal to a node: its id, and the signal as the node gets it.
fn encode_signal(secret: &StoreSecret, controller: u64, to: NodeId, signal: &pb::Signal) -> Bytes {
    secret.seal(&signal_name(controller), &signal_body(to, signal)).into()
}

/// Returns the node and the signal in a value; `None` if it is not authentic or malformed.
fn decode_signal(
    secret: &StoreSecret,
    controller: u64,
    value: &[u8],
) -> Option<(NodeId, pb::Signal)> {
    let opened = secret.open(&signal_name(controller), value).ok()?;
    parse_signal(opened.body)
}

/// Returns what is authenticated of a signal to a node.
fn signal_body(to: NodeId, signal: &pb::Signal) -> Vec<u8> {
    [to.0.as_slice(), &signal.encode_to_vec()].concat()
}

/// Parses what is authenticated of a signal.
fn parse_signal(body: &[u8]) -> Option<(NodeId, pb::Signal)> {
    let (to, signal) = body.split_first_chunk::<16>()?;
    let signal = pb::Signal::decode(signal).ok()?;
    (signal.body.len() <= limits::SIGNAL_BYTES).then_some((NodeId(*to), signal))
}

/// Parses what is authenticated of a signal and encodes it again, for fuzzing. `None` if it is malformed.
pub(crate) fn recode_signal(body: &[u8]) -> Option<Vec<u8>> {
    parse_signal(body).map(|(to, signal)| signal_body(to, &signal))
}

/// Returns the name under which a part of presence is authenticated.
fn presence_name(controller: u64, part: u8) -> String {
    format!("presence/{controller:016x}/{part:02x}")
}

/// Returns the name under which the signals to a controller are authenticated.
fn signal_name(controller: u64) -> String {
    format!("signals/{controller:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_is_cut_off_without_news_of_presence_or_of_the_store() {
        let start = clock::now();
        let news = |presence: u64, store: u64| News {
            presence: start.plus(Duration::from_secs(presence)).mono,
            store: start.plus(Duration::from_secs(store)).mono,
        };
        let (at_most, more) = (start.plus(BLIND), start.plus(BLIND + Duration::from_secs(1)));
        assert!(!news(0, 0).is_cut_off(at_most));
        assert!(news(0, 0).is_cut_off(more), "there never were any");
        assert!(news(1, 0).is_cut_off(more), "the store cannot be read");
        assert!(news(0, 1).is_cut_off(more), "presence cannot be read");
        assert!(!news(1, 1).is_cut_off(more));
    }

    fn secret() -> StoreSecret {
        StoreSecret::generate().unwrap().0
    }

    #[test]
    fn presence_is_told_in_parts_of_which_a_node_changes_one() {
        let (secret, other) = (secret(), secret());
        let nodes: Vec<NodeId> = (0..200).map(|n| NodeId([n; 16])).collect();
        let parts = encode_presence(&secret, 1, &nodes);
        assert!((2..=64).contains(&parts.len()));
        let changed = encode_presence(&secret, 1, &nodes[1..]);
        let differ = parts.iter().filter(|(part, value)| changed.get(*part) != Some(*value));
        assert_eq!(differ.count(), 1);

        let of = |controller| {
            let part = move |(part, value): (&u8, &Bytes)| Presence {
                controller,
                part: *part,
                value: value.clone(),
            };
            parts.iter().map(part).collect::<Vec<_>>()
        };
        let read: Option<Vec<Vec<NodeId>>> =
            of(1).iter().map(|part| decode_presence(&secret, part)).collect();
        let mut read = read.unwrap().concat();
        read.sort();
        assert_eq!(read, nodes);
        // Neither another controller's name nor another mesh's secret.
        assert!(of(2).iter().all(|part| decode_presence(&secret, part).is_none()));
        assert!(of(1).iter().all(|part| decode_presence(&other, part).is_none()));
    }

    #[test]
    fn a_signal_is_for_one_controller() {
        let secret = secret();
        let signal = |bytes| pb::Signal { node_id: vec![1; 16], body: vec![7; bytes] };
        let to = NodeId([2; 16]);
        let value = encode_signal(&secret, 1, to, &signal(10));
        assert_eq!(decode_signal(&secret, 1, &value), Some((to, signal(10))));
        assert_eq!(decode_signal(&secret, 2, &value), None);
        let long = encode_signal(&secret, 1, to, &signal(limits::SIGNAL_BYTES + 1));
        assert_eq!(decode_signal(&secret, 1, &long), None);
    }
}
