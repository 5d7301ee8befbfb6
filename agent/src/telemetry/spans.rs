//! The spans of one start: which step ended when. Times and random numbers are arguments.

use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use tokio::sync::mpsc;
use towline_proto::id::NodeId;

/// Key of the attribute with the name of the peer.
const PEER: &str = "towline.peer";

/// What a start reached. Only the first time counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    /// A session with a controller began.
    Connected,
    /// The controller sent the first message of the map.
    Map,
    /// The first handshake with a peer was begun by this node.
    Attempt,
    /// The first handshake was completed.
    Handshake,
    /// The first inner packet went to a peer or came from one.
    Packet,
}

/// Ids of the spans of one trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TraceIds {
    trace: [u8; 16],
    /// Span of the join. `None` for starts after the first one.
    parent: Option<[u8; 8]>,
    /// Id of the first span; the next ones follow it. Neither is 0, which would be invalid.
    first: u64,
}

impl TraceIds {
    /// Returns the ids of a join: everybody who knows the node can compute them, so the first start needs no file
    /// to continue the trace.
    pub(super) fn of_join(node: NodeId) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = node.0;
        let first = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1;
        Self { trace: node.0, parent: None, first: first + 1 }
    }

    /// Returns the ids of the first start after a join.
    pub(super) fn after_join(node: NodeId, random: u64) -> Self {
        let join = Self::of_join(node);
        Self { parent: Some(join.first.to_be_bytes()), first: (random >> 1) + 1, ..join }
    }

    /// Returns the ids of another start.
    pub(super) fn of_start(trace: [u8; 16], random: u64) -> Self {
        Self { trace, parent: None, first: (random >> 1) + 1 }
    }

    /// Returns a span that began and ended at these times. The one with the index 0 is the outermost one.
    pub(super) fn span(&self, index: u8, name: &str, from: SystemTime, to: SystemTime) -> Span {
        let parent = match index {
            0 => self.parent.map_or_else(Vec::new, Vec::from),
            _ => self.first.to_be_bytes().to_vec(),
        };
        Span {
            trace_id: self.trace.to_vec(),
            span_id: (self.first + u64::from(index)).to_be_bytes().to_vec(),
            parent_span_id: parent,
            name: name.to_owned(),
            kind: SpanKind::Internal.into(),
            start_time_unix_nano: nanos(from),
            // A clock that was set between both does not make a span negative.
            end_time_unix_nano: nanos(to.max(from)),
            ..Default::default()
        }
    }
}

/// Trace of one start of the agent. Sends each span when it ends: at most five.
#[derive(Debug)]
pub(crate) struct StartTrace {
    /// Queue of the exporter. `None`: no collector is configured, or everything was sent.
    queue: Option<mpsc::Sender<Span>>,
    ids: TraceIds,
    started: SystemTime,
    connected: Option<SystemTime>,
    map: Option<SystemTime>,
    attempt: Option<SystemTime>,
    handshake: Option<SystemTime>,
}

impl StartTrace {
    /// Begins the trace of a start at `now`.
    pub(super) fn new(queue: Option<mpsc::Sender<Span>>, ids: TraceIds, now: SystemTime) -> Self {
        let (connected, map, attempt, handshake) = (None, None, None, None);
        Self { queue, ids, started: now, connected, map, attempt, handshake }
    }

    /// Returns whether spans are still to be sent, so that a caller can save the work for [`Self::reached`].
    pub(crate) fn is_open(&self) -> bool {
        self.queue.is_some()
    }

    /// Notes that a step was reached at `now`, with the peer that it is about.
    pub(crate) fn reached(&mut self, step: Step, peer: Option<String>, now: SystemTime) {
        if !self.is_open() {
            return;
        }
        match step {
            Step::Connected if self.connected.is_none() => {
                self.connected = Some(now);
                self.send(1, "connect", self.started, now, peer);
            }
            Step::Map if self.map.is_none() => {
                self.map = Some(now);
                self.send(2, "map", self.connected.unwrap_or(self.started), now, peer);
            }
            Step::Attempt if self.attempt.is_none() => self.attempt = Some(now),
            Step::Handshake if self.handshake.is_none() => {
                self.handshake = Some(now);
                // Without an attempt the peer began: this node noticed the whole handshake at once.
                self.send(3, "handshake", self.attempt.unwrap_or(now), now, peer);
            }
            Step::Packet => {
                let Some(handshake) = self.handshake else { return };
                self.send(4, "first packet", handshake, now, peer);
                self.send(0, "start", self.started, now, None);
                self.queue = None;
            }
            Step::Connected | Step::Map | Step::Attempt | Step::Handshake => {}
        }
    }

    fn send(&self, index: u8, name: &str, from: SystemTime, to: SystemTime, peer: Option<String>) {
        let mut span = self.ids.span(index, name, from, to);
        span.attributes.extend(peer.map(|peer| attribute(PEER, peer)));
        // The queue has room for all spans of a start. Without the exporter nobody wants them.
        if let Some(queue) = &self.queue {
            let _ = queue.try_send(span);
        }
    }
}

/// Returns an attribute whose value is a text.
pub(super) fn attribute(key: &str, text: String) -> KeyValue {
    let value = Some(AnyValue { value: Some(Value::StringValue(text)) });
    KeyValue { key: key.to_owned(), value, ..Default::default() }
}

/// Returns a time in nanoseconds since 1970.
fn nanos(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NODE: NodeId = NodeId([7; 16]);

    fn names(spans: &mut mpsc::Receiver<Span>) -> Vec<(String, u64)> {
        let mut names = Vec::new();
        while let Ok(span) = spans.try_recv() {
            let took = span.end_time_unix_nano - span.start_time_unix_nano;
            names.push((span.name, took / 1_000_000_000));
        }
        names
    }

    #[test]
    fn each_step_of_a_start_is_a_span_once() {
        let (queue, mut spans) = mpsc::channel(8);
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(1_000 + seconds);
        let mut trace = StartTrace::new(Some(queue), TraceIds::of_start([1; 16], 5), at(0));
        for (step, seconds) in [
            (Step::Attempt, 1),
            (Step::Connected, 2),
            (Step::Map, 5),
            (Step::Packet, 6),
            (Step::Handshake, 9),
            (Step::Handshake, 10),
            (Step::Connected, 11),
            (Step::Packet, 16),
            (Step::Packet, 20),
        ] {
            trace.reached(step, None, at(seconds));
        }
        assert!(!trace.is_open());
        let wanted =
            [("connect", 2), ("map", 3), ("handshake", 8), ("first packet", 7), ("start", 16)];
        let wanted: Vec<(String, u64)> = wanted.map(|(name, took)| (name.to_owned(), took)).into();
        assert_eq!(names(&mut spans), wanted);
    }

    #[test]
    fn the_first_start_continues_the_trace_of_the_join() {
        let now = UNIX_EPOCH;
        let join = TraceIds::of_join(NODE).span(0, "join", now, now);
        let ids = TraceIds::after_join(NODE, 3);
        let (start, map) = (ids.span(0, "start", now, now), ids.span(2, "map", now, now));
        assert_eq!((&start.trace_id, &map.trace_id), (&join.trace_id, &join.trace_id));
        assert_eq!(start.parent_span_id, join.span_id);
        assert_eq!(map.parent_span_id, start.span_id);
        assert!(join.parent_span_id.is_empty());
    }

    #[test]
    fn ids_are_never_zero() {
        for random in [0, u64::MAX] {
            let span = TraceIds::of_start([1; 16], random).span(4, "x", UNIX_EPOCH, UNIX_EPOCH);
            assert_ne!(span.span_id, [0; 8]);
        }
        let join = TraceIds::of_join(NodeId([0; 16])).span(0, "join", UNIX_EPOCH, UNIX_EPOCH);
        assert_ne!(join.span_id, [0; 8]);
    }

    #[test]
    fn nothing_is_kept_without_a_collector() {
        let ids = TraceIds::of_start([1; 16], 5);
        let mut trace = StartTrace::new(None, ids, UNIX_EPOCH);
        trace.reached(Step::Connected, Some("cp".to_owned()), UNIX_EPOCH);
        assert!(!trace.is_open());
        assert_eq!(trace.connected, None);
    }
}
