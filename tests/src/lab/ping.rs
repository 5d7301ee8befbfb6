//! ICMP echo over raw sockets: round-trip times, loss, and the longest gap.

use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::interrupt;
use super::namespace::Namespace;
use super::traffic::Pattern;

/// Results of a series of echo requests.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Echoes {
    /// Number of requests sent.
    pub sent: u32,
    /// Number of replies whose payload was unchanged.
    pub received: u32,
    /// Median round-trip time of those replies.
    pub median: Option<Duration>,
}

/// Returns when the first reply arrived. Requests are sent every few milliseconds, only through the
/// link `link` (which need not exist yet), so that none leaves by another link. Returns `None` if
/// `deadline` passed first.
pub fn first_reply(
    namespace: &Namespace,
    target: IpAddr,
    link: &str,
    deadline: Instant,
) -> anyhow::Result<Option<Instant>> {
    /// Interval between two requests.
    const PACE: Duration = Duration::from_millis(4);
    namespace.run(|| {
        let mut echo = Echo::open(target)?;
        while echo.socket.bind_device(Some(link.as_bytes())).is_err() {
            interrupt::check()?;
            if Instant::now() > deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut sequence = 0;
        while Instant::now() < deadline {
            interrupt::check()?;
            // A link that is not up yet refuses the request; the next request tries again.
            let _ = echo.request(sequence, &[]);
            if let Some((_, at)) = echo.reply(Instant::now() + PACE)? {
                return Ok(Some(at));
            }
            sequence = sequence.wrapping_add(1);
        }
        Ok(None)
    })
}

/// Sends `count` requests with a payload of the pattern, one after the other, and waits up to
/// `timeout` for each reply.
pub fn echoes(
    namespace: &Namespace,
    target: IpAddr,
    count: u32,
    timeout: Duration,
    pattern: Pattern,
) -> anyhow::Result<Echoes> {
    namespace.run(|| {
        let mut echo = Echo::open(target)?;
        let mut times = Vec::new();
        for number in 0..count {
            interrupt::check()?;
            let sequence = number as u16;
            let mut payload = pattern.cell(number.into()).to_vec();
            payload.extend(pattern.cell(u64::from(number) + 1));
            let sent = Instant::now();
            echo.request(sequence, &payload)
                .with_context(|| format!("cannot send an echo request to {target}"))?;
            while let Some((reply, at)) = echo.reply(sent + timeout)? {
                if reply == sequence && echo.payload() == payload {
                    times.push(at - sent);
                    break;
                }
            }
        }
        times.sort_unstable();
        Ok(Echoes {
            sent: count,
            received: times.len() as u32,
            median: times.get(times.len() / 2).copied(),
        })
    })
}

/// Sends a request every `pace` (or when the reply has arrived, if that is later) until `over`.
/// Returns the median round-trip time, or `None` without any reply.
pub fn paced(
    namespace: &Namespace,
    target: IpAddr,
    pace: Duration,
    over: &AtomicBool,
) -> anyhow::Result<Option<Duration>> {
    const TIMEOUT: Duration = Duration::from_secs(1);
    namespace.run(|| {
        let mut echo = Echo::open(target)?;
        let mut times = Vec::new();
        let mut sequence = 0u16;
        while !over.load(Ordering::Relaxed) && !interrupt::raised() {
            let sent = Instant::now();
            // A request that cannot be sent has no reply.
            let _ = echo.request(sequence, &[]);
            while let Some((reply, at)) = echo.reply(sent + TIMEOUT)? {
                if reply == sequence {
                    times.push(at - sent);
                    break;
                }
            }
            sequence = sequence.wrapping_add(1);
            std::thread::sleep(pace.saturating_sub(sent.elapsed()));
        }
        times.sort_unstable();
        Ok(times.get(times.len() / 2).copied())
    })
}

/// Sends a request every few milliseconds and records when replies arrived.
#[derive(Debug, Default)]
pub struct Ticker {
    arrivals: Mutex<Vec<Instant>>,
}

impl Ticker {
    /// Sends requests to `target` from `namespace`, every `pace`, until `stop`.
    pub fn run(
        &self,
        namespace: &Namespace,
        target: IpAddr,
        pace: Duration,
        stop: &AtomicBool,
    ) -> anyhow::Result<()> {
        namespace.run(|| {
            let mut echo = Echo::open(target)?;
            let mut sequence = 0;
            let mut next = Instant::now();
            while !stop.load(Ordering::Relaxed) && !interrupt::raised() {
                // A request that cannot be sent has no reply.
                let _ = echo.request(sequence, &[]);
                sequence = sequence.wrapping_add(1);
                next += pace;
                while let Some((_, at)) = echo.reply(next)? {
                    self.arrivals.lock().push(at);
                }
            }
            Ok(())
        })
    }

    /// Returns when the last reply arrived.
    pub fn last(&self) -> Option<Instant> {
        self.arrivals.lock().last().copied()
    }

    /// Returns the longest time without a reply between two moments.
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let arrivals = self.arrivals.lock();
        let inside = arrivals.iter().copied().filter(|at| (from..to).contains(at));
        let mut before = from;
        inside
            .chain([to])
            .map(|at| at.saturating_duration_since(std::mem::replace(&mut before, at)))
            .max()
            .unwrap_or_default()
    }
}

/// Next ICMP identifier, which distinguishes the sockets of one namespace.
static NEXT_IDENTIFIER: AtomicU16 = AtomicU16::new(1);

/// A raw socket that sends echo requests to one target.
struct Echo {
    socket: Socket,
    target: IpAddr,
    identifier: u16,
    buffer: [MaybeUninit<u8>; 2048],
    payload: Vec<u8>,
}

const HEADER: usize = 8;
const V4_REQUEST: u8 = 8;
const V4_REPLY: u8 = 0;
const V6_REQUEST: u8 = 128;
const V6_REPLY: u8 = 129;

impl Echo {
    fn open(target: IpAddr) -> anyhow::Result<Self> {
        let (domain, protocol) = match target {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket =
            Socket::new(domain, Type::RAW, Some(protocol)).context("cannot open a raw socket")?;
        Ok(Self {
            socket,
            target,
            identifier: NEXT_IDENTIFIER.fetch_add(1, Ordering::Relaxed),
            buffer: [MaybeUninit::uninit(); 2048],
            payload: Vec::new(),
        })
    }

    fn request(&self, sequence: u16, payload: &[u8]) -> std::io::Result<()> {
        let kind = if self.target.is_ipv4() { V4_REQUEST } else { V6_REQUEST };
        let mut message = vec![kind, 0, 0, 0];
        message.extend(self.identifier.to_be_bytes());
        message.extend(sequence.to_be_bytes());
        message.extend(payload);
        if self.target.is_ipv4() {
            // The kernel computes the checksum of ICMPv6.
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        self.socket.send_to(&message, &SockAddr::from(SocketAddr::new(self.target, 0))).map(drop)
    }

    /// Waits for the next reply to this socket and returns its sequence number and arrival time, or
    /// `None` at `until`.
    fn reply(&mut self, until: Instant) -> anyhow::Result<Option<(u16, Instant)>> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left.max(Duration::from_micros(100))))?;
            let (length, from) = match self.socket.recv_from(&mut self.buffer) {
                Ok(got) => got,
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(error).context("cannot receive an echo reply"),
            };
            let now = Instant::now();
            if from.as_socket().map(|address| address.ip()) != Some(self.target) {
                continue;
            }
            // SAFETY: the kernel initialised the first `length` bytes.
            let bytes = unsafe { self.buffer[..length].assume_init_ref() };
            let wanted = (self.target.is_ipv4(), self.identifier);
            if let Some((sequence, payload)) = read_reply(bytes, wanted.0, wanted.1) {
                self.payload = payload.to_vec();
                return Ok(Some((sequence, now)));
            }
        }
    }

    /// Returns the payload of the last reply.
    fn payload(&self) -> &[u8] {
        &self.payload
    }
}

/// Returns sequence number and payload if the packet is an echo reply with this identifier. Raw
/// IPv4 sockets deliver the IP header, raw IPv6 sockets do not.
fn read_reply(packet: &[u8], v4: bool, identifier: u16) -> Option<(u16, &[u8])> {
    let message = if v4 { packet.get(usize::from(packet.first()? & 0x0f) * 4..)? } else { packet };
    let (header, payload) = message.split_first_chunk::<HEADER>()?;
    let kind = if v4 { V4_REPLY } else { V6_REPLY };
    let [found, 0, _, _, i0, i1, s0, s1] = *header else { return None };
    (found == kind && u16::from_be_bytes([i0, i1]) == identifier)
        .then(|| (u16::from_be_bytes([s0, s1]), payload))
}

/// Returns the Internet checksum (RFC 1071).
pub(super) fn checksum(message: &[u8]) -> u16 {
    let mut sum: u32 = message
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_with_its_checksum_sums_to_zero() {
        let mut message = vec![V4_REQUEST, 0, 0, 0, 0x12, 0x34, 0, 1, 0xab, 0xcd, 0xef];
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&message), 0);
    }

    #[test]
    fn a_gap_is_counted_from_edge_to_edge() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let ticker = Ticker { arrivals: Mutex::new(vec![at(10), at(20), at(80), at(90)]) };
        let gap = |from, to| ticker.longest_gap(at(from), at(to)).as_millis();
        assert_eq!(gap(10, 90), 60);
        assert_eq!(gap(0, 20), 10);
        assert_eq!(gap(85, 200), 110);
        assert_eq!(gap(30, 70), 40, "no reply at all");
    }

    #[test]
    fn only_our_own_replies_are_read() {
        let mut packet = vec![0x45; 20];
        packet.extend([V4_REPLY, 0, 9, 9, 0x12, 0x34, 0, 7, 0xaa]);
        assert_eq!(read_reply(&packet, true, 0x1234), Some((7, &[0xaa][..])));
        assert_eq!(read_reply(&packet, true, 0x1235), None);
        assert_eq!(read_reply(&packet[20..], false, 0x1234), None, "another kind in ICMPv6");
        for length in 0..packet.len() - 1 {
            assert_eq!(read_reply(&packet[..length], true, 0x1234), None);
        }
    }
}
