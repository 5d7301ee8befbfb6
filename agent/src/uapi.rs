//! WireGuard's cross-platform userspace interface (UAPI), read-only: the request of `wg show` and its answer,
//! without I/O.
//!
//! ```text
//! request   get=1\n\n
//! answer    listen_port=51830\n ... public_key=HEX\n endpoint=...\n ... errno=0\n\n
//! ```
//!
//! `set=1` is answered with `errno=-1` (EPERM). The mesh decides about peers, keys and addresses: what `wg set`
//! changed would be undone by the next peer table, and a peer that it added would pass neither the ownership of
//! prefixes nor the guards. Static peers are in `agent.toml`. Private and preshared keys are not part of
//! [`Device`], so no answer can contain one; that of a `wg` without them is `(none)`.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use towline_proto::id::WireguardKey;

/// Greatest length of a request in bytes. `wg setconf` with 10,000 peers sends less, and is read to its end so
/// that it receives the answer.
pub const REQUEST_BYTES: usize = 4 * 1024 * 1024;

/// Greatest length of the first line in bytes.
const FIRST_LINE_BYTES: usize = 16;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// The state of the device.
    Get,
    /// A change of the device, which is refused.
    Set,
}

/// State of a request that arrives in pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The request has not ended yet.
    More,
    /// The request is complete.
    Done(Operation),
    /// The bytes are no request, or too long a request.
    Invalid,
}

/// Parser of a request that arrives in pieces. It keeps the first line alone, since the rest of a `set` has keys.
#[derive(Debug, Default)]
pub struct RequestParser {
    first: Vec<u8>,
    operation: Option<Operation>,
    /// True if the last byte ended a line.
    is_line_start: bool,
    bytes: usize,
    ended: Option<Progress>,
}

impl RequestParser {
    /// Takes the next bytes. Bytes after the end of the request are ignored.
    pub fn feed(&mut self, bytes: &[u8]) -> Progress {
        for byte in bytes {
            if let Some(ended) = self.ended {
                return ended;
            }
            self.bytes += 1;
            let progress =
                if self.bytes > REQUEST_BYTES { Progress::Invalid } else { self.step(*byte) };
            if progress != Progress::More {
                self.ended = Some(progress);
            }
        }
        self.ended.unwrap_or(Progress::More)
    }

    fn step(&mut self, byte: u8) -> Progress {
        let is_end = byte == b'\n';
        let Some(operation) = self.operation else {
            if !is_end {
                self.first.push(byte);
                let is_too_long = self.first.len() > FIRST_LINE_BYTES;
                return if is_too_long { Progress::Invalid } else { Progress::More };
            }
            self.operation = match self.first.as_slice() {
                b"get=1" => Some(Operation::Get),
                b"set=1" => Some(Operation::Set),
                _ => return Progress::Invalid,
            };
            self.is_line_start = true;
            return Progress::More;
        };
        match (is_end, self.is_line_start, operation) {
            (true, true, operation) => Progress::Done(operation),
            // Only a change has more lines.
            (false, _, Operation::Get) => Progress::Invalid,
            (is_end, _, _) => {
                self.is_line_start = is_end;
                Progress::More
            }
        }
    }
}

/// Answer to a request without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The device cannot be changed here (EPERM).
    ReadOnly,
    /// The bytes are no request (EINVAL).
    Malformed,
    /// The agent cannot answer now (EAGAIN).
    Busy,
}

impl Refusal {
    /// Returns the answer that a client gets.
    pub fn answer(self) -> String {
        let number = match self {
            Self::ReadOnly => libc::EPERM,
            Self::Malformed => libc::EINVAL,
            Self::Busy => libc::EAGAIN,
        };
        format!("errno=-{number}\n\n")
    }
}

/// State of the tunnels, as `wg show` prints it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// UDP port of the tunnels.
    pub listen_port: u16,
    /// Mark of the agent's own packets.
    pub fwmark: u32,
    /// Peers of the mesh and of the configuration.
    pub peers: Vec<Peer>,
}

/// State of one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Public key of the peer.
    pub public_key: WireguardKey,
    /// Remote address of its path: its own, or that of the relay. `None` while no path is known.
    pub endpoint: Option<SocketAddr>,
    /// Time of the last handshake since 1970; `None` before the first.
    pub last_handshake: Option<Duration>,
    /// Bytes received from the peer.
    pub rx_bytes: u64,
    /// Bytes sent to the peer.
    pub tx_bytes: u64,
    /// Interval of WireGuard keepalives; `None` if none are sent.
    pub keepalive: Option<Duration>,
    /// Networks that are reached through the peer.
    pub allowed_ips: Vec<IpNet>,
}

impl Device {
    /// Returns the answer to `get=1`.
    pub fn answer(&self) -> String {
        let mut text = String::with_capacity(64 + 320 * self.peers.len());
        // Writing to a string cannot fail.
        let _ = write!(text, "listen_port={}\nfwmark={}\n", self.listen_port, self.fwmark);
        for peer in &self.peers {
            peer.write(&mut text);
        }
        text.push_str("errno=0\n\n");
        text
    }
}

impl Peer {
    /// Appends the lines of the peer, in the order of other implementations.
    fn write(&self, text: &mut String) {
        let key = data_encoding::HEXLOWER.encode(&self.public_key.0);
        let _ = write!(text, "public_key={key}\nprotocol_version=1\n");
        if let Some(endpoint) = self.endpoint {
            let _ = writeln!(text, "endpoint={endpoint}");
        }
        let handshake = self.last_handshake.unwrap_or_default();
        let _ = write!(
            text,
            "last_handshake_time_sec={}\nlast_handshake_time_nsec={}\ntx_bytes={}\nrx_bytes={}\n",
            handshake.as_secs(),
            handshake.subsec_nanos(),
            self.tx_bytes,
            self.rx_bytes
        );
        if let Some(keepalive) = self.keepalive {
            let _ = writeln!(text, "persistent_keepalive_interval={}", keepalive.as_secs());
        }
        for network in &self.allowed_ips {
            let _ = writeln!(text, "allowed_ip={network}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Progress {
        RequestParser::default().feed(bytes)
    }

    #[test]
    fn requests_are_told_apart_in_whichever_pieces_they_arrive() {
        assert_eq!(parse(b"get=1\n\n"), Progress::Done(Operation::Get));
        let set = b"set=1\nprivate_key=00\nreplace_peers=true\n\n";
        assert_eq!(parse(set), Progress::Done(Operation::Set));
        let mut parser = RequestParser::default();
        let (last, first) = set.split_last().unwrap();
        for byte in first {
            assert_eq!(parser.feed(&[*byte]), Progress::More);
        }
        assert_eq!(parser.feed(&[*last]), Progress::Done(Operation::Set));
        assert_eq!(parser.feed(b"get=1\n\n"), Progress::Done(Operation::Set), "it has ended");
        for more in [&b""[..], b"get=1", b"get=1\n", b"set=1\n", b"set=1\nfwmark=1\n"] {
            assert_eq!(parse(more), Progress::More, "{more:?}");
        }
        for invalid in [&b"\n"[..], b"get=2\n", b"get=1\nx", b"GET / HTTP/1.1\r\n", &[0; 64]] {
            assert_eq!(parse(invalid), Progress::Invalid, "{invalid:?}");
        }
    }

    #[test]
    fn a_request_without_an_end_is_refused() {
        let mut parser = RequestParser::default();
        assert_eq!(parser.feed(b"set=1\n"), Progress::More);
        let piece = [b'x'; 4096];
        let fed = (0..=REQUEST_BYTES / piece.len()).map(|_| parser.feed(&piece)).last();
        assert_eq!(fed, Some(Progress::Invalid));
        assert_eq!(parser.first, b"set=1", "nothing else is kept");
    }

    #[test]
    fn a_device_is_written_as_wg_reads_it() {
        let peer = Peer {
            public_key: WireguardKey([0xab; 32]),
            endpoint: Some("[2001:db8::1]:51830".parse().unwrap()),
            last_handshake: Some(Duration::new(1_700_000_000, 5)),
            rx_bytes: 1,
            tx_bytes: 2,
            keepalive: Some(Duration::from_secs(25)),
            allowed_ips: vec!["198.19.0.2/32".parse().unwrap(), "fd00::2/128".parse().unwrap()],
        };
        let silent = Peer {
            public_key: WireguardKey([1; 32]),
            endpoint: None,
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
            keepalive: None,
            allowed_ips: Vec::new(),
        };
        let device = Device { listen_port: 51_830, fwmark: 16, peers: vec![peer, silent] };
        let expected = format!(
            "listen_port=51830\nfwmark=16\npublic_key={}\nprotocol_version=1\n\
             endpoint=[2001:db8::1]:51830\nlast_handshake_time_sec=1700000000\n\
             last_handshake_time_nsec=5\ntx_bytes=2\nrx_bytes=1\npersistent_keepalive_interval=25\n\
             allowed_ip=198.19.0.2/32\nallowed_ip=fd00::2/128\npublic_key={}\nprotocol_version=1\n\
             last_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=0\nerrno=0\n\n",
            "ab".repeat(32),
            "01".repeat(32)
        );
        assert_eq!(device.answer(), expected);
        assert!(!device.answer().contains("private_key") && !device.answer().contains("preshared"));
    }

    #[test]
    fn a_change_is_not_permitted() {
        assert_eq!(Refusal::ReadOnly.answer(), "errno=-1\n\n");
        assert_eq!(Refusal::Malformed.answer(), "errno=-22\n\n");
    }
}
