//! Forwarding of signals: sealed messages from one node to another, which the controller can
//! neither read nor store.
//!
//! Signals are only forwarded between live watches, which may be at different controllers of the
//! mesh. A signal is dropped if the receiver's queue is full or the sender exceeds its rate. Nodes
//! repeat important signals and number them, so a loss or a duplicate does no harm.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use towline_proto::id::NodeId;
use towline_proto::{limits, pb};

use towline_registry::sessions::SessionId;

/// Length of the queue of signals for one watch.
const WAITING: usize = 64;

/// A signal to a node of another controller: the node that receives it, and the signal as it gets it.
pub type Outbound = (NodeId, pb::Signal);

/// Queues of signals, one for each live watch.
#[derive(Debug, Default)]
pub struct Signals {
    open: Mutex<BTreeMap<NodeId, (SessionId, mpsc::Sender<ToWatch>)>>,
    /// Queue of the signals to nodes of other controllers; `None` if there are none.
    outbound: Option<mpsc::Sender<Outbound>>,
}

/// Message from another request or watch to the task of a watch.
#[derive(Debug, PartialEq)]
pub(super) enum ToWatch {
    /// Send this signal to the client.
    Signal(pb::Signal),
    /// Find out whether the client is still there: send it a heartbeat.
    Probe,
}

impl Signals {
    /// Creates queues. Signals to nodes without a live watch go to `outbound`, if there are other controllers.
    pub fn new(outbound: Option<mpsc::Sender<Outbound>>) -> Self {
        Self { open: Mutex::default(), outbound }
    }

    /// Opens the queue of a new watch. It replaces the queue of the node's previous watch.
    pub(super) fn open(&self, node: NodeId, session: SessionId) -> mpsc::Receiver<ToWatch> {
        let (sender, receiver) = mpsc::channel(WAITING);
        self.open.lock().insert(node, (session, sender));
        receiver
    }

    /// Closes the queue of a watch that ended.
    pub(super) fn close(&self, node: NodeId, session: SessionId) {
        let mut open = self.open.lock();
        if open.get(&node).is_some_and(|(current, _)| *current == session) {
            open.remove(&node);
        }
    }

    /// Forwards a signal from the node `from`. Returns `false` if it is dropped.
    pub(super) fn carry(&self, from: NodeId, signal: pb::Signal) -> bool {
        let Ok(to) = NodeId::try_from(signal.node_id.as_slice()) else { return false };
        if signal.body.len() > limits::SIGNAL_BYTES {
            return false;
        }
        let carried = pb::Signal { node_id: from.0.to_vec(), body: signal.body };
        if self.open.lock().contains_key(&to) {
            return self.deliver(to, carried);
        }
        let outbound = self.outbound.as_ref();
        outbound.is_some_and(|outbound| outbound.try_send((to, carried)).is_ok())
    }

    /// Sends a signal to the live watch of a node. Returns `false` if it is dropped.
    pub(crate) fn deliver(&self, to: NodeId, signal: pb::Signal) -> bool {
        let open = self.open.lock();
        open.get(&to).is_some_and(|(_, sender)| sender.try_send(ToWatch::Signal(signal)).is_ok())
    }

    /// Lets the node's watch find out whether its client is still there.
    pub(super) fn probe(&self, node: NodeId) {
        if let Some((_, sender)) = self.open.lock().get(&node) {
            // If its queue is full, messages are on their way, which find it out too.
            let _ = sender.try_send(ToWatch::Probe);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId([1; 16]);
    const B: NodeId = NodeId([2; 16]);

    fn to(node: NodeId, bytes: usize) -> pb::Signal {
        pb::Signal { node_id: node.0.to_vec(), body: vec![7; bytes] }
    }

    #[test]
    fn a_signal_reaches_a_live_watch_under_its_senders_name() {
        let signals = Signals::default();
        assert!(!signals.carry(A, to(B, 10)), "nobody is there");
        let mut inbox = signals.open(B, [1; 16]);
        assert!(signals.carry(A, to(B, 10)));
        assert_eq!(inbox.try_recv().unwrap(), ToWatch::Signal(to(A, 10)));
        assert!(!signals.carry(A, to(B, limits::SIGNAL_BYTES + 1)));
        signals.close(B, [9; 16]);
        assert!(signals.carry(A, to(B, 10)), "an older session's end closes nothing");
        signals.close(B, [1; 16]);
        assert!(!signals.carry(A, to(B, 10)));
    }

    #[test]
    fn a_signal_to_a_node_without_a_watch_goes_to_the_other_controllers() {
        let (sender, mut outbound) = mpsc::channel(1);
        let signals = Signals::new(Some(sender));
        assert!(signals.carry(A, to(B, 10)));
        assert_eq!(outbound.try_recv().unwrap(), (B, to(A, 10)));
        let mut inbox = signals.open(B, [1; 16]);
        assert!(signals.carry(A, to(B, 10)));
        assert_eq!(inbox.try_recv().unwrap(), ToWatch::Signal(to(A, 10)));
        assert!(outbound.try_recv().is_err());
        // One that comes from another controller is not sent on.
        assert!(!signals.deliver(A, to(B, 10)));
        assert!(outbound.try_recv().is_err());
    }

    #[test]
    fn what_waits_is_bounded() {
        let signals = Signals::default();
        let _inbox = signals.open(B, [1; 16]);
        assert_eq!((0..1000).filter(|_| signals.carry(A, to(B, 10))).count(), WAITING);
    }
}
