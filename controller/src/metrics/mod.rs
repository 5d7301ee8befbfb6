//! The controller's metrics for Prometheus. Each scrape reads what the parts show already; nothing of it waits
//! for the writer.

pub mod table;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use towline_proto::code::Coded as _;
use towline_proto::pb;
use towline_registry::Now;
use towline_registry::sessions::Sessions;
use towline_service::metrics::Exposition;

use crate::counters::Counters;
use crate::listen::Places;
use crate::map::Map;
use crate::service::Admission;
use crate::view::{NodeView, View};
use crate::writer::Writer;

pub use table::METRICS;
use table::*;

/// Parts that the metrics are read from.
#[derive(Clone)]
pub struct Source {
    /// Time of the controller's start.
    pub started: Now,
    /// Map that watchers see.
    pub map: Arc<Map>,
    /// Nodes and tokens that operators see.
    pub view: Arc<View>,
    /// Sessions of the connected nodes.
    pub sessions: Arc<Mutex<Sessions>>,
    /// Connections by kind.
    pub places: Places,
    /// Refused calls, commits and watches.
    pub counters: Arc<Counters>,
    /// Nodes that load the whole map.
    pub admission: Arc<Admission>,
    /// Writer with its queue.
    pub writer: Writer,
}

/// State of a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenState {
    Usable,
    Used,
    Expired,
    Revoked,
}

impl TokenState {
    /// All states with their labels.
    const ALL: [(Self, &str); 4] = [
        (Self::Usable, "usable"),
        (Self::Used, "used"),
        (Self::Expired, "expired"),
        (Self::Revoked, "revoked"),
    ];

    fn of(token: &pb::Token, now: i64) -> Self {
        if token.revoked {
            Self::Revoked
        } else if token.used >= token.uses {
            Self::Used
        } else if now >= token.expires_at {
            Self::Expired
        } else {
            Self::Usable
        }
    }
}

impl Source {
    /// Returns the text of a scrape.
    pub fn collect(&self, now: Now) -> String {
        let mut text = Exposition::default();
        text.family(&BUILD_INFO).sample(&[towline_proto::VERSION], 1_u64);
        text.one(&UPTIME, now.since(self.started.mono).as_secs_f64());
        self.nodes(&mut text, now);
        text.one(&WATCHES, self.map.watchers());
        let (epoch, revision) = self.map.position();
        text.one(&REVISION, revision);
        text.one(&EPOCH, epoch);
        let tokens = self.view.tokens(None, usize::MAX);
        let mut by_state = text.family(&TOKENS);
        for (state, label) in TokenState::ALL {
            let is_in = |token: &&pb::Token| TokenState::of(token, now.unix) == state;
            by_state.sample(&[label], tokens.iter().filter(is_in).count());
        }
        let mut connections = text.family(&CONNECTIONS);
        for (kind, count) in self.places.counts() {
            connections.sample(&[kind], count);
        }
        let mut refused = text.family(&REFUSED_CALLS);
        for (code, count) in self.counters.refused() {
            refused.sample(&[code], count);
        }
        let mut limited = text.family(&LIMITED_CALLS);
        for (limit, count) in self.counters.limited() {
            limited.sample(&[limit], count);
        }
        text.one(&WATCH_LAG, self.counters.lag(revision));
        text.one(&LOADING, self.admission.loading());
        let fan_outs = self.counters.fan_outs();
        text.one(&FAN_OUTS, fan_outs.sent);
        text.one(&FAN_OUT_TIME, fan_outs.time.as_secs_f64());
        text.one(&ENCODED_BYTES, self.map.encoded_bytes());
        let (waiting, most) = self.writer.queue();
        text.one(&QUEUE, waiting);
        text.one(&QUEUE_LIMIT, most);
        let commits = self.counters.commits();
        text.one(&COMMITS, commits.done);
        text.one(&FAILED_COMMITS, commits.failed);
        text.one(&COMMIT_TIME, commits.time.as_secs_f64());
        text.one(&STORE_AGE, self.store_age(now).as_secs_f64());
        text.text()
    }

    fn store_age(&self, now: Now) -> Duration {
        let current_at = self.counters.current_at().filter(|_| self.writer.is_shared());
        current_at.map(|at| now.since(at)).unwrap_or_default()
    }

    fn nodes(&self, text: &mut Exposition, now: Now) {
        let nodes: Vec<Arc<NodeView>> = self.view.nodes(None, usize::MAX);
        let (online, changes) = {
            let sessions = self.sessions.lock();
            let is_online = |node: &&Arc<NodeView>| sessions.is_online(node.id, now);
            (nodes.iter().filter(is_online).count(), sessions.opened_and_closed())
        };
        let mut by_state = text.family(&NODES);
        by_state.sample(&["online"], online);
        by_state.sample(&["offline"], nodes.len() - online);
        let mut codes = BTreeMap::<&str, u64>::new();
        for problem in nodes.iter().flat_map(|node| &node.problems) {
            *codes.entry(problem.code()).or_default() += 1;
        }
        let mut problems = text.family(&NODE_PROBLEMS);
        for (code, count) in codes {
            problems.sample(&[code], count);
        }
        text.one(&SESSIONS, changes);
    }
}

#[cfg(test)]
mod tests {
    use towline_proto::id::{NodeId, TokenId};
    use towline_registry::NodeProblem;
    use towline_registry::token::SecretHash;

    use super::*;
    use crate::clock;
    use crate::counters::Limit;
    use crate::view::{TokenView, ViewChange};

    #[test]
    fn the_parts_become_metrics_of_the_table() {
        let now = clock::now();
        let (view, counters) = (View::default(), Counters::default());
        let token = |id: u8, message: pb::Token| {
            let secret_hash = SecretHash([id; 32]);
            ViewChange::Token(TokenId([id; 8]), Arc::new(TokenView { message, secret_hash }))
        };
        let usable = pb::Token { uses: 1, expires_at: i64::MAX, ..pb::Token::default() };
        let problem = NodeProblem::Cloned {
            connected: "192.0.2.1".parse().unwrap(),
            tried: "192.0.2.2".parse().unwrap(),
        };
        view.apply(vec![
            ViewChange::Node(Arc::new(NodeView {
                id: NodeId([1; 16]),
                name: "a".parse().unwrap(),
                site: None,
                grant: pb::Signed::default(),
                record: None,
                token: TokenId([1; 8]),
                joined_at: 0,
                problems: vec![problem],
            })),
            token(1, pb::Token { used: 1, ..usable.clone() }),
            token(2, pb::Token { expires_at: 1, ..usable.clone() }),
            token(3, pb::Token { revoked: true, ..usable.clone() }),
            token(4, usable),
        ]);
        counters.response(&tonic::Status::permission_denied("no").into_http::<String>());
        counters.limit(Limit::Renew);
        counters.fan_out(Duration::from_millis(250));
        counters.commit(Duration::from_millis(500), true);
        let source = Source {
            started: now,
            map: Arc::new(Map::new()),
            view: Arc::new(view),
            sessions: Arc::new(Mutex::new(Sessions::new(Duration::from_secs(1)))),
            places: Places::new(),
            counters: Arc::new(counters),
            admission: Arc::default(),
            writer: Writer::ended(),
        };
        let text = source.collect(now.plus(Duration::from_secs(2)));
        for line in [
            "towline_controller_uptime_seconds 2",
            "towline_controller_nodes{state=\"online\"} 0",
            "towline_controller_nodes{state=\"offline\"} 1",
            "towline_controller_node_problems{code=\"identity-cloned\"} 1",
            "towline_controller_tokens{state=\"usable\"} 1",
            "towline_controller_tokens{state=\"used\"} 1",
            "towline_controller_tokens{state=\"expired\"} 1",
            "towline_controller_tokens{state=\"revoked\"} 1",
            "towline_controller_connections{kind=\"node\"} 0",
            "towline_controller_refused_calls_total{code=\"permission_denied\"} 1",
            "towline_controller_limited_calls_total{limit=\"renew\"} 1",
            "towline_controller_watch_lag_revisions 0",
            "towline_controller_loading_watches 0",
            "towline_controller_fan_outs_total 1",
            "towline_controller_fan_out_seconds_total 0.25",
            "towline_controller_encoded_bytes_total 0",
            "towline_controller_queued_requests 0",
            "towline_controller_commits_total 1",
            "towline_controller_commit_seconds_total 0.5",
            "towline_controller_store_age_seconds 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let mut names: Vec<&str> = types.filter_map(|line| Some(line.split_once(' ')?.0)).collect();
        let mut table: Vec<&str> = METRICS.iter().map(|metric| metric.name).collect();
        names.sort_unstable();
        table.sort_unstable();
        assert_eq!(names, table);
    }
}
