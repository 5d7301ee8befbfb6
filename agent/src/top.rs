//! History of the peers for `towline top`: samples of the last minute, rates, and their order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use towline_proto::pb;

/// Number of samples that are kept: one a second.
pub const SAMPLES: usize = 60;

/// Levels of a sparkline, from the lowest.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// The same for terminals without UTF-8.
const ASCII_BARS: [char; 8] = ['_', '.', '-', '~', '=', '+', '*', '#'];

/// Samples of all peers.
#[derive(Debug, Default)]
pub struct History {
    peers: BTreeMap<String, Samples>,
}

/// Samples of one peer.
#[derive(Debug, Default)]
struct Samples {
    /// Round-trip times in microseconds, the oldest first; `None` where there was none.
    rtt: VecDeque<Option<u64>>,
    /// Time and counters of the last sample: received and sent bytes.
    last: Option<(Instant, u64, u64)>,
    /// Rates between the last two samples.
    rates: Option<Rates>,
}

/// Rates in bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    /// Received bytes a second.
    pub received: u64,
    /// Sent bytes a second.
    pub sent: u64,
}

impl History {
    /// Adds one sample of each peer, and forgets the peers that are gone.
    pub fn add(&mut self, peers: &[pb::PeerStatus], now: Instant) {
        self.peers.retain(|name, _| peers.iter().any(|peer| peer.name == *name));
        for peer in peers {
            self.peers.entry(peer.name.clone()).or_default().add(peer, now);
        }
    }

    /// Returns the rates of a peer; `None` before its second sample.
    pub fn rates(&self, peer: &str) -> Option<Rates> {
        self.peers.get(peer)?.rates
    }

    /// Returns the peers, those with the most traffic first. Without traffic, those that are up come
    /// first, then the others by name.
    pub fn sorted<'a>(&self, peers: &'a [pb::PeerStatus]) -> Vec<&'a pb::PeerStatus> {
        let mut sorted: Vec<&pb::PeerStatus> = peers.iter().collect();
        sorted.sort_by(|a, b| self.order(a).cmp(&self.order(b)));
        sorted
    }

    fn order<'a>(&self, peer: &'a pb::PeerStatus) -> (Reverse<u64>, bool, &'a str) {
        let rates = self.rates(&peer.name).unwrap_or_default();
        let traffic = rates.received.saturating_add(rates.sent);
        (Reverse(traffic), peer.state != "up", peer.name.as_str())
    }

    /// Returns the round-trip times of the last minute as a line of at most `width` bars, the newest at
    /// the right. Blanks stand for samples without one. The lowest bar is the lowest time of the line.
    pub fn sparkline(&self, peer: &str, width: usize, is_utf8: bool) -> String {
        let Some(samples) = self.peers.get(peer) else { return String::new() };
        let skipped = samples.rtt.len().saturating_sub(width);
        let shown = || samples.rtt.iter().skip(skipped);
        let (least, most) = (shown().flatten().min(), shown().flatten().max());
        let (Some(least), Some(most)) = (least, most) else { return String::new() };
        let bars = if is_utf8 { BARS } else { ASCII_BARS };
        // Less than a tenth of the time is no change to look at.
        let range = (most - least).max(most / 10).max(1);
        let bar = |rtt: &Option<u64>| {
            let level = ((*rtt)? - least).saturating_mul(bars.len() as u64 - 1) / range;
            bars.get(usize::try_from(level).ok()?).copied()
        };
        shown().map(|rtt| bar(rtt).unwrap_or(' ')).collect()
    }
}

impl Samples {
    fn add(&mut self, peer: &pb::PeerStatus, now: Instant) {
        if self.rtt.len() == SAMPLES {
            self.rtt.pop_front();
        }
        self.rtt.push_back(peer.rtt_us.filter(|_| peer.state == "up"));
        self.rates = self.last.and_then(|(at, received, sent)| {
            let time = now.checked_duration_since(at).filter(|time| !time.is_zero())?;
            Some(Rates {
                received: per_second(peer.rx_bytes.saturating_sub(received), time),
                sent: per_second(peer.tx_bytes.saturating_sub(sent), time),
            })
        });
        self.last = Some((now, peer.rx_bytes, peer.tx_bytes));
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let micros = time.as_micros().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, rtt_us: Option<u64>, bytes: u64) -> pb::PeerStatus {
        pb::PeerStatus {
            name: name.into(),
            state: "up".into(),
            rtt_us,
            rx_bytes: bytes,
            tx_bytes: 2 * bytes,
            ..Default::default()
        }
    }

    #[test]
    fn rates_are_those_between_the_last_two_samples() {
        let (mut history, begin) = (History::default(), Instant::now());
        history.add(&[peer("a", None, 100)], begin);
        assert_eq!(history.rates("a"), None);
        history.add(&[peer("a", None, 1_100)], begin + Duration::from_millis(500));
        assert_eq!(history.rates("a"), Some(Rates { received: 2_000, sent: 4_000 }));
        // The agent was restarted.
        history.add(&[peer("a", None, 5)], begin + Duration::from_secs(2));
        assert_eq!(history.rates("a"), Some(Rates::default()));
        history.add(&[peer("b", None, 0)], begin + Duration::from_secs(3));
        assert_eq!(history.rates("a"), None);
    }

    #[test]
    fn the_busiest_peer_comes_first_and_without_traffic_what_is_up() {
        let (mut history, begin) = (History::default(), Instant::now());
        let down = pb::PeerStatus { state: "down".into(), ..peer("a", None, 0) };
        let first = [down.clone(), peer("b", None, 0), peer("c", None, 0)];
        history.add(&first, begin);
        let names = |history: &History, peers: &[pb::PeerStatus]| -> Vec<String> {
            history.sorted(peers).into_iter().map(|peer| peer.name.clone()).collect()
        };
        assert_eq!(names(&history, &first), ["b", "c", "a"]);
        let second = [down, peer("b", None, 0), peer("c", None, 9)];
        history.add(&second, begin + Duration::from_secs(1));
        assert_eq!(names(&history, &second), ["c", "b", "a"]);
    }

    #[test]
    fn a_sparkline_spans_its_own_range_and_shows_gaps() {
        let (mut history, begin) = (History::default(), Instant::now());
        for (second, rtt) in [Some(100), Some(800), None, Some(450)].into_iter().enumerate() {
            let at = begin + Duration::from_secs(second as u64);
            history.add(&[peer("a", rtt, 0)], at);
        }
        assert_eq!(history.sparkline("a", 60, true), "▁█ ▄");
        assert_eq!(history.sparkline("a", 60, false), "_# ~");
        assert_eq!(history.sparkline("a", 2, true), " ▁");
        assert_eq!(history.sparkline("b", 60, true), "");
        for second in 0..100 {
            history.add(&[peer("a", Some(100), 0)], begin + Duration::from_secs(10 + second));
        }
        assert_eq!(history.sparkline("a", 100, false), "_".repeat(SAMPLES));
    }
}
