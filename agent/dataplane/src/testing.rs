//! Fixtures of tests: inner packets with checksums computed by their definition, and tunnels with the
//! context of their calls.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc::{Receiver, channel};
use towline_core::path::Path;
use towline_core::peer_table::Observation;
use towline_types::id::WireguardKey;

use super::arena::{Datagrams, SendBatch};
use super::counters::PeerCounters;
use super::drops::Drops;
use super::events::{Event, EventSink};
use super::headers::{PROTOCOL_TCP, PROTOCOL_UDP};
use super::newly_live::NewlyLive;
use super::runs::Run;
use super::tunnel::{Tunnel, TunnelContext};
use towline_wireguard::{Buffers, MessageKind, Scratch, Secrets};

/// Description of a TCP or UDP packet.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) ports: (u16, u16),
    pub(super) tcp: Option<Tcp>,
    pub(super) identification: u16,
    pub(super) traffic_class: u8,
    pub(super) hops: u8,
    pub(super) payload: Vec<u8>,
}

/// Fields of the TCP header.
#[derive(Debug, Clone)]
pub(super) struct Tcp {
    pub(super) sequence: u32,
    pub(super) acknowledged: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// TCP options: a multiple of four bytes, at most 40.
    pub(super) options: Vec<u8>,
}

/// Computes the folded ones' complement sum by its definition.
pub(super) fn slow_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

impl Recipe {
    pub(super) fn protocol(&self) -> u8 {
        if self.tcp.is_some() { PROTOCOL_TCP } else { PROTOCOL_UDP }
    }

    /// Returns the length of the IP header and of all headers, in bytes.
    pub(super) fn headers(&self) -> (usize, usize) {
        let ip = if self.source.is_ipv4() { 20 } else { 40 };
        (ip, ip + self.tcp.as_ref().map_or(8, |tcp| 20 + tcp.options.len()))
    }

    /// Builds the packet with correct checksums.
    pub(super) fn build(&self) -> Vec<u8> {
        let (ip_len, headers_len) = self.headers();
        let mut packet = vec![0; headers_len];
        packet.extend_from_slice(&self.payload);
        let total = packet.len();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                packet[0] = 0x45;
                packet[1] = self.traffic_class;
                packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
                packet[4..6].copy_from_slice(&self.identification.to_be_bytes());
                packet[6] = 0x40;
                packet[8] = self.hops;
                packet[9] = self.protocol();
                packet[12..16].copy_from_slice(&source.octets());
                packet[16..20].copy_from_slice(&destination.octets());
                let sum = !slow_sum(&packet[..20]);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                packet[0] = 0x60 | self.traffic_class >> 4;
                packet[1] = self.traffic_class << 4;
                packet[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
                packet[6] = self.protocol();
                packet[7] = self.hops;
                packet[8..24].copy_from_slice(&source.octets());
                packet[24..40].copy_from_slice(&destination.octets());
            }
            _ => panic!("source and destination have different address families"),
        }
        let transport = &mut packet[ip_len..];
        transport[0..2].copy_from_slice(&self.ports.0.to_be_bytes());
        transport[2..4].copy_from_slice(&self.ports.1.to_be_bytes());
        let at = match &self.tcp {
            Some(tcp) => {
                transport[4..8].copy_from_slice(&tcp.sequence.to_be_bytes());
                transport[8..12].copy_from_slice(&tcp.acknowledged.to_be_bytes());
                transport[12] = (((20 + tcp.options.len()) / 4) << 4) as u8;
                transport[13] = tcp.flags;
                transport[14..16].copy_from_slice(&tcp.window.to_be_bytes());
                transport[20..20 + tcp.options.len()].copy_from_slice(&tcp.options);
                16
            }
            None => {
                let length = (transport.len() as u16).to_be_bytes();
                transport[4..6].copy_from_slice(&length);
                6
            }
        };
        let sum = match !slow_sum(&self.covered(&packet)) {
            0 => 0xffff,
            sum => sum,
        };
        packet[ip_len + at..ip_len + at + 2].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    /// Returns the bytes that the checksum covers: the pseudo-header, then the transport part of
    /// `packet`.
    pub(super) fn covered(&self, packet: &[u8]) -> Vec<u8> {
        let mut covered = Vec::new();
        for address in [self.source, self.destination] {
            match address {
                IpAddr::V4(v4) => covered.extend_from_slice(&v4.octets()),
                IpAddr::V6(v6) => covered.extend_from_slice(&v6.octets()),
            }
        }
        let transport = &packet[self.headers().0..];
        covered.extend_from_slice(&(transport.len() as u32).to_be_bytes());
        covered.extend_from_slice(&[0, 0, 0, self.protocol()]);
        covered.extend_from_slice(transport);
        covered
    }

    /// Returns the packets that splitting this one into payloads of `size` bytes must give.
    pub(super) fn segments(&self, size: usize) -> Vec<Recipe> {
        let count = self.payload.len().div_ceil(size).max(1);
        (0..count)
            .map(|number| {
                let at = number * size;
                let mut segment = self.clone();
                segment.payload = self.payload[at..self.payload.len().min(at + size)].to_vec();
                segment.identification = self.identification.wrapping_add(number as u16);
                if let Some(tcp) = &mut segment.tcp {
                    tcp.sequence = tcp.sequence.wrapping_add(at as u32);
                    if number > 0 {
                        tcp.flags &= !0x80;
                    }
                    if number + 1 < count {
                        tcp.flags &= !0x09;
                    }
                }
                segment
            })
            .collect()
    }
}

/// Tunnel, with the context of its calls.
pub(super) struct Side {
    pub(super) tunnel: Tunnel,
    /// Path on which the other side receives from this one.
    pub(super) address: Path,
    pub(super) out: SendBatch,
    pub(super) drops: Arc<Drops>,
    pub(super) counters: PeerCounters,
    pub(super) newly_live: NewlyLive,
    pub(super) started: Instant,
    events: EventSink,
    observed: Receiver<Event>,
}

impl Side {
    /// Creates a tunnel to `peer` that has the receiver index `index`.
    pub(super) fn new(own: &Arc<Secrets>, peer: WireguardKey, index: u32, address: Path) -> Self {
        let (sender, observed) = channel(64);
        let drops = Arc::new(Drops::default());
        Self {
            tunnel: Tunnel::new(peer, None, index, own),
            address,
            out: SendBatch::new(1 << 16, 64),
            events: EventSink::new(sender, drops.clone()),
            observed,
            drops,
            counters: PeerCounters::default(),
            newly_live: NewlyLive::default(),
            started: Instant::now(),
        }
    }

    /// Calls the tunnel at `now`.
    pub(super) fn with<R>(
        &mut self,
        now: Instant,
        call: impl FnOnce(&mut Tunnel, &mut TunnelContext<'_>) -> R,
    ) -> R {
        let Self { tunnel, out, events, newly_live, drops, counters, started, .. } = self;
        let (started, is_static) = (*started, false);
        let mut context =
            TunnelContext { now, started, out, events, newly_live, drops, counters, is_static };
        call(tunnel, &mut context)
    }

    /// Returns the datagrams sent since the last call.
    pub(super) fn sent(&mut self) -> Vec<Vec<u8>> {
        assert_eq!(self.out.seal(), 0, "nothing is lost");
        let bytes = self.out.bytes();
        let gso_batches = self.out.gso_batches().iter();
        let sent = gso_batches
            .flat_map(|gso| bytes[gso.start..][..gso.len].chunks(gso.segment_size.get()))
            .map(<[u8]>::to_vec)
            .collect();
        self.out.clear();
        sent
    }

    /// Receives a datagram from `from`, while `known` is the peer's endpoint.
    pub(super) fn take(&mut self, now: Instant, from: Path, known: Path, datagram: &[u8]) {
        self.with(now, |tunnel, context| match MessageKind::of(datagram).unwrap() {
            MessageKind::Data { receiver } => {
                let run =
                    Run::new(0, from, receiver, 0, 0, &Datagrams::new(datagram, 0, 0).unwrap());
                let (mut sealed, mut plain) = (datagram.to_vec(), vec![0; datagram.len()]);
                let scratch = &mut Scratch::default();
                let buffers = Buffers { sealed: &mut sealed, plain: &mut plain, scratch };
                tunnel.open(Some(known), &[run], buffers, context, |_| {});
            }
            _ => tunnel.handshake(datagram, from, Some(known), context),
        });
    }

    /// Returns what the tunnel reported since the last call.
    pub(super) fn observations(&mut self) -> Vec<Observation> {
        let mut observations = Vec::new();
        while let Ok(Event::Peer { what, .. }) = self.observed.try_recv() {
            observations.push(what);
        }
        observations
    }
}
