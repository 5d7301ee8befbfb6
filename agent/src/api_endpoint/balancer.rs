//! Choice among the API servers of the control-plane nodes, as values: which server a new client gets, which
//! ones are to be checked, and when the connections to one are closed. No I/O and no clock.
//!
//! ```text
//!   unchecked ──check succeeds──► healthy ◄───────check succeeds───────┐
//!       │                            │                                 │
//!       └──────── check fails ───────┴─► failing ── 2nd check fails ──► its connections are closed
//! ```

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use towline_proto::codes;
use towline_proto::id::NodeName;

/// Largest number of API servers that are used. A cluster has up to 7 control-plane nodes.
pub(crate) const SERVERS: usize = 16;
/// Interval between checks of a server that is healthy, or has failed [`FAILURES`] checks or more in a row.
const PERIOD: Duration = Duration::from_secs(10);
/// Pause after the first check that failed.
const RETRY: Duration = Duration::from_secs(1);
/// Number of checks in a row that must fail before connections are closed. One datagram burst that is lost
/// must not cost every client its connection.
const FAILURES: u32 = 2;

/// API server of a control-plane node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiServer {
    /// Name of the node.
    pub(crate) node: NodeName,
    /// Address in the mesh, with the port of the node's record.
    pub(crate) address: SocketAddr,
    /// Round-trip time of the path to the node, once it was measured.
    pub(crate) rtt: Option<Duration>,
    /// False while the tunnel to the node does not carry traffic.
    pub(crate) is_up: bool,
}

/// Reason why an API server does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// No program listens on the port.
    #[error("it refuses connections")]
    Refused,
    /// There is no way to the node, or the connection broke.
    #[error("no connection to it")]
    Unreachable,
    /// Nothing answered in time.
    #[error("it does not answer")]
    Silent,
    /// The answer is not TLS.
    #[error("it does not speak TLS")]
    NotTls,
}

codes! {
    Failure {
        Refused => "api-check-refused",
        Unreachable => "api-check-unreachable",
        Silent => "api-check-silent",
        NotTls => "api-check-not-tls",
    }
}

/// Result of the last checks of an API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    /// It was not checked yet. Nothing is checked while no client is connected.
    Unchecked,
    /// The last TLS handshake with it completed.
    Healthy,
    /// The last check failed.
    Failing {
        /// Reason of the last failure.
        reason: Failure,
        /// Number of failures in a row.
        count: u32,
    },
}

codes! {
    Health {
        Unchecked => "unchecked",
        Healthy => "healthy",
        Failing => "failing",
    }
}

impl Health {
    /// Returns why the last check failed, if it did.
    pub(crate) fn failure(self) -> Option<Failure> {
        match self {
            Self::Unchecked | Self::Healthy => None,
            Self::Failing { reason, .. } => Some(reason),
        }
    }

    fn is_dead(self) -> bool {
        matches!(self, Self::Failing { count: FAILURES.., .. })
    }
}

/// What follows from the result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The check changes nothing.
    Same,
    /// The server answers again.
    Recovered,
    /// The server has just been found dead: its connections are to be closed.
    Died,
    /// The server is still dead: connections that it took in the meantime are to be closed.
    Dead,
}

/// An API server with its health, for status output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ranked {
    /// The server.
    pub(crate) server: ApiServer,
    /// Its health.
    pub(crate) health: Health,
    /// Round-trip time by which it is ordered.
    pub(crate) rtt: Option<Duration>,
}

/// API servers of the mesh with their health.
#[derive(Debug, Default)]
pub(crate) struct Balancer {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    server: ApiServer,
    health: Health,
    /// Time that the last check needed to connect; orders servers whose path has no round-trip time.
    connect_time: Option<Duration>,
    /// Time of the next check.
    check_at: Instant,
    /// True while a check runs.
    is_checking: bool,
}

/// Order in which servers are tried. The address makes it total.
type Rank = (u8, Duration, SocketAddr);

impl Balancer {
    /// Replaces the servers. The health of those that stay is kept. One whose tunnel went down or came up is
    /// checked at once. Of more than [`SERVERS`], the nearest are used. Returns
    /// whether anything changed.
    pub(crate) fn set_servers(&mut self, now: Instant, mut servers: Vec<ApiServer>) -> bool {
        servers.sort_by_key(|server| {
            (!server.is_up, server.rtt.unwrap_or(Duration::MAX), server.address)
        });
        servers.truncate(SERVERS);
        if self.entries.iter().map(|entry| &entry.server).eq(&servers) {
            return false;
        }
        let mut before = std::mem::take(&mut self.entries);
        for server in servers {
            let known = before.iter().position(|entry| entry.server.address == server.address);
            let entry = match known.map(|at| before.swap_remove(at)) {
                Some(entry) if entry.server.is_up == server.is_up => Entry { server, ..entry },
                Some(entry) => Entry { server, check_at: now, ..entry },
                None => Entry::new(server, now),
            };
            self.entries.push(entry);
        }
        true
    }

    /// Handles the result of a check, which is the time that the connection took.
    pub(crate) fn handle_check(
        &mut self,
        now: Instant,
        address: SocketAddr,
        result: Result<Duration, Failure>,
    ) -> Verdict {
        match self.entry(address) {
            Some(entry) => entry.handle_check(now, result),
            None => Verdict::Same,
        }
    }

    /// Handles a client's connection that failed: the server is checked at once. However many clients fail at
    /// the same time, they count as one failure.
    pub(crate) fn handle_failure(&mut self, now: Instant, address: SocketAddr, reason: Failure) {
        let Some(entry) = self.entry(address) else { return };
        match entry.health {
            Health::Unchecked | Health::Healthy => {
                entry.health = Health::Failing { reason, count: 1 };
                entry.check_at = now;
            }
            Health::Failing { .. } => {}
        }
    }

    /// Returns the servers whose check is due. The caller checks them, and reports each result.
    pub(crate) fn begin_checks(&mut self, now: Instant) -> Vec<SocketAddr> {
        let is_due = |entry: &&mut Entry| !entry.is_checking && entry.check_at <= now;
        let due = self.entries.iter_mut().filter(is_due).map(|entry| {
            entry.is_checking = true;
            entry.server.address
        });
        due.collect()
    }

    /// Returns the time of the next check.
    pub(crate) fn due(&self) -> Option<Instant> {
        let waiting = self.entries.iter().filter(|entry| !entry.is_checking);
        waiting.map(|entry| entry.check_at).min()
    }

    /// Returns the addresses that a new client tries, in this order: healthy servers first, each group by
    /// round-trip time. Those that fail come last, because a check may be wrong.
    pub(crate) fn order(&self) -> Vec<SocketAddr> {
        self.ranked().into_iter().map(|ranked| ranked.server.address).collect()
    }

    /// Returns the servers in the order in which a new client tries them.
    pub(crate) fn ranked(&self) -> Vec<Ranked> {
        let mut entries: Vec<&Entry> = self.entries.iter().collect();
        entries.sort_by_key(|entry| entry.rank());
        let ranked = entries.into_iter().map(|entry| Ranked {
            server: entry.server.clone(),
            health: entry.health,
            rtt: entry.rtt(),
        });
        ranked.collect()
    }

    /// Returns the nearest server and why it does not answer, if no server answers.
    pub(crate) fn unreached(&self) -> Option<(NodeName, Failure)> {
        let all_dead = self.entries.iter().all(|entry| entry.health.is_dead());
        let first = self.ranked().into_iter().next().filter(|_| all_dead)?;
        Some((first.server.node, first.health.failure()?))
    }

    fn entry(&mut self, address: SocketAddr) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.server.address == address)
    }
}

impl Entry {
    fn new(server: ApiServer, now: Instant) -> Self {
        let health = Health::Unchecked;
        Self { server, health, connect_time: None, check_at: now, is_checking: false }
    }

    fn handle_check(&mut self, now: Instant, result: Result<Duration, Failure>) -> Verdict {
        let before = std::mem::replace(&mut self.health, Health::Healthy);
        self.is_checking = false;
        self.check_at = now + PERIOD;
        let reason = match result {
            Ok(time) => {
                self.connect_time = Some(time);
                return if before.is_dead() { Verdict::Recovered } else { Verdict::Same };
            }
            Err(reason) => reason,
        };
        let count = match before {
            Health::Unchecked | Health::Healthy => 1,
            Health::Failing { count, .. } => count.saturating_add(1),
        };
        self.health = Health::Failing { reason, count };
        match (before.is_dead(), self.health.is_dead()) {
            (false, false) => {
                self.check_at = now + RETRY;
                Verdict::Same
            }
            (false, true) => Verdict::Died,
            (true, _) => Verdict::Dead,
        }
    }

    fn rtt(&self) -> Option<Duration> {
        self.server.rtt.or(self.connect_time)
    }

    fn rank(&self) -> Rank {
        let group = match (self.health, self.server.is_up) {
            (Health::Healthy, true) => 0,
            (Health::Unchecked, true) => 1,
            (Health::Healthy | Health::Unchecked, false) => 2,
            (Health::Failing { .. }, _) => 3 + u8::from(self.health.is_dead()),
        };
        (group, self.rtt().unwrap_or(Duration::MAX), self.server.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(number: u8, rtt_ms: u64) -> ApiServer {
        ApiServer {
            node: format!("cp-{number}").parse().unwrap(),
            address: address(number),
            rtt: Some(Duration::from_millis(rtt_ms)),
            is_up: true,
        }
    }

    fn address(number: u8) -> SocketAddr {
        SocketAddr::from(([198, 19, 0, number], 6443))
    }

    fn three(now: Instant) -> Balancer {
        let mut balancer = Balancer::default();
        balancer.set_servers(now, vec![server(1, 30), server(2, 10), server(3, 20)]);
        balancer
    }

    const ANSWER: Result<Duration, Failure> = Ok(Duration::from_millis(5));
    const SILENCE: Result<Duration, Failure> = Err(Failure::Silent);

    #[test]
    fn the_nearest_server_is_tried_first_and_one_that_fails_last() {
        let now = Instant::now();
        let mut balancer = three(now);
        assert_eq!(balancer.order(), [address(2), address(3), address(1)]);
        assert_eq!(balancer.handle_check(now, address(1), ANSWER), Verdict::Same);
        assert_eq!(balancer.order()[0], address(1), "it is known to answer");
        balancer.handle_failure(now, address(2), Failure::Refused);
        assert_eq!(balancer.order(), [address(1), address(3), address(2)]);
    }

    #[test]
    fn connections_are_closed_at_the_second_failure_in_a_row() {
        let now = Instant::now();
        let mut balancer = three(now);
        balancer.handle_check(now, address(2), SILENCE);
        assert_eq!(balancer.handle_check(now, address(2), ANSWER), Verdict::Same);
        assert_eq!(balancer.handle_check(now, address(2), SILENCE), Verdict::Same);
        assert_eq!(balancer.handle_check(now, address(2), SILENCE), Verdict::Died);
        assert_eq!(balancer.handle_check(now, address(2), SILENCE), Verdict::Dead);
        assert_eq!(balancer.order().last(), Some(&address(2)));
        assert_eq!(balancer.handle_check(now, address(2), ANSWER), Verdict::Recovered);
        assert_eq!(balancer.order().first(), Some(&address(2)));
    }

    #[test]
    fn many_clients_that_fail_together_are_one_failure() {
        let now = Instant::now();
        let mut balancer = three(now);
        for _ in 0..100 {
            balancer.handle_failure(now, address(2), Failure::Refused);
        }
        assert_eq!(balancer.handle_check(now, address(2), ANSWER), Verdict::Same);
        assert_eq!(balancer.unreached(), None);
    }

    #[test]
    fn a_check_runs_once_and_is_repeated_sooner_after_a_failure() {
        let now = Instant::now();
        let mut balancer = three(now);
        assert_eq!(balancer.due(), Some(now));
        assert_eq!(balancer.begin_checks(now).len(), 3);
        assert!(balancer.begin_checks(now).is_empty());
        assert_eq!(balancer.due(), None, "all of them run");
        balancer.handle_check(now, address(1), ANSWER);
        assert_eq!(balancer.due(), Some(now + PERIOD));
        balancer.handle_check(now, address(2), SILENCE);
        assert_eq!(balancer.due(), Some(now + RETRY));
        assert_eq!(balancer.begin_checks(now + RETRY), [address(2)]);
    }

    #[test]
    fn a_tunnel_that_goes_down_moves_its_server_back_and_has_it_checked() {
        let now = Instant::now();
        let mut balancer = three(now);
        for address in balancer.begin_checks(now) {
            balancer.handle_check(now, address, ANSWER);
        }
        assert!(balancer.begin_checks(now).is_empty());
        let down = ApiServer { is_up: false, rtt: None, ..server(2, 10) };
        balancer.set_servers(now, vec![server(1, 30), down, server(3, 20)]);
        assert_eq!(balancer.order(), [address(3), address(1), address(2)]);
        assert_eq!(balancer.begin_checks(now), [address(2)]);
    }

    #[test]
    fn servers_that_are_set_again_change_nothing() {
        let now = Instant::now();
        let mut balancer = three(now);
        assert!(!balancer.set_servers(now, vec![server(3, 20), server(2, 10), server(1, 30)]));
        assert!(balancer.set_servers(now, vec![server(3, 20), server(2, 10), server(1, 31)]));
        assert!(balancer.set_servers(now, vec![server(3, 20), server(2, 10)]));
        assert_eq!(balancer.order(), [address(2), address(3)]);
    }

    #[test]
    fn where_no_server_answers_the_nearest_one_is_named() {
        let now = Instant::now();
        let mut balancer = three(now);
        for number in 1..=3 {
            balancer.handle_check(now, address(number), SILENCE);
            assert_eq!(balancer.unreached(), None);
        }
        for number in 1..=3 {
            balancer.handle_check(now, address(number), SILENCE);
        }
        let (node, failure) = balancer.unreached().unwrap();
        assert_eq!((node.as_str(), failure), ("cp-2", Failure::Silent));
        assert_eq!(Balancer::default().unreached(), None);
    }

    #[test]
    fn the_number_of_servers_is_bounded() {
        let mut balancer = Balancer::default();
        let servers = (1..=100).map(|number| server(number, u64::from(number))).collect();
        balancer.set_servers(Instant::now(), servers);
        let order = balancer.order();
        assert_eq!((order.len(), order[0]), (SERVERS, address(1)));
    }
}
