//! The network side of the data plane: sends and receives batches of datagrams through UDP sockets.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use socket2::Domain;
use towline_core::path::{LocalPort, Path};

use super::Offloads;
use super::arena::{GsoBatch, RecvBatch, SendBatch};
use super::drops::{DropReason, Drops};
use super::switch::Switch;
pub(super) use corruption::GroCorruption;
use endpoint::{Endpoint, SendDeadlines, SocketOptions, open_family, send_reason, set};
pub(super) use second::open_second_port;
use self_test::probe;
use whole::Unsent;

mod corruption;
mod endpoint;
mod messages;
mod second;
mod self_test;
mod whole;

/// I/O with the network in batches of datagrams. Implemented by [`Udp`] and
/// [`MemoryUdp`](super::memory::MemoryUdp).
pub trait UdpIo: Send + 'static {
    /// Returns the descriptors that are readable when there is a datagram. At most eight.
    fn fds(&self) -> Vec<BorrowedFd<'_>>;

    /// Fills the batch with datagrams that have arrived, without waiting. Reads only from those of
    /// [`UdpIo::fds`] that are in `ready`. A datagram that cannot be received is counted.
    ///
    /// # Errors
    ///
    /// Returns the system's error if the socket can no longer receive.
    fn receive(&mut self, ready: Ready, batch: &mut RecvBatch, drops: &Drops) -> io::Result<()>;

    /// Sends the whole batch, which is sealed, in order. Waits a short time if a socket buffer is
    /// full. Datagrams that cannot be sent are counted.
    fn send(&mut self, now: Instant, batch: &SendBatch, drops: &Drops) {
        self.send_gso_batches(now, batch.bytes(), batch.gso_batches(), drops);
    }

    /// Seals what is unsealed in a batch, sends all of it like [`UdpIo::send`], and clears it.
    fn flush(&mut self, now: Instant, batch: &mut SendBatch, drops: &Drops) {
        if batch.is_empty() {
            return;
        }
        let lost = batch.seal();
        drops.add(DropReason::NoSession, lost as u64);
        self.send(now, batch, drops);
        batch.clear();
    }

    /// Sends GSO batches like [`UdpIo::send`], with offsets into `bytes`.
    fn send_gso_batches(
        &mut self,
        now: Instant,
        bytes: &[u8],
        gso_batches: &[GsoBatch],
        drops: &Drops,
    );

    /// Sends a batch of one datagram with fragmentation forbidden.
    ///
    /// # Errors
    ///
    /// Returns [`TooBig`] if the kernel already knows that the datagram is too big for its path.
    fn send_whole(&mut self, now: Instant, batch: &SendBatch, drops: &Drops) -> Result<(), TooBig>;

    /// Sends a batch of one datagram with a hop limit (TTL) of `hops`: at most `hops - 1` routers forward it.
    fn send_limited(&mut self, now: Instant, batch: &SendBatch, hops: u8, drops: &Drops) {
        let _ = hops;
        self.send(now, batch, drops);
    }

    /// Replaces the sockets of the second port. Those of [`UdpIo::fds`] that come before them stay.
    fn set_second_port(&mut self, sockets: Option<Udp>) {
        drop(sockets);
    }

    /// Records that `datagrams` of the last batch arrived coalesced, and that `corrupted` of them
    /// were not authentic.
    fn record_gro(&mut self, now: Instant, datagrams: usize, corrupted: usize);

    /// Returns the switches of the offloads, as clones that show their state at any time.
    fn features(&self) -> Vec<Switch>;
}

/// Set of readable descriptors, by their index in [`UdpIo::fds`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ready(u8);

impl Ready {
    /// The set of all descriptors.
    pub const ALL: Self = Self(u8::MAX);

    /// Adds a descriptor to the set.
    #[must_use]
    pub fn with(self, place: usize) -> Self {
        Self(self.0 | 1 << place)
    }

    /// Returns whether a descriptor is in the set.
    pub fn has(self, place: usize) -> bool {
        self.0 & 1 << place != 0
    }

    /// Returns the set without the first `count` places.
    #[must_use]
    pub fn after(self, count: usize) -> Self {
        Self(self.0.checked_shr(count as u32).unwrap_or(0))
    }

    /// Returns whether the set is empty.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Error of a datagram that is too big for its path without fragmentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooBig {
    /// UDP payload that fits, in bytes, if the kernel knows it; otherwise 0.
    pub payload: u16,
}

/// Error of opening the UDP port.
#[derive(Debug, thiserror::Error)]
pub enum OpenUdpError {
    /// Another socket uses the port.
    #[error(
        "cannot bind UDP port {0}: address in use: stop the other program or set [wireguard] port"
    )]
    Busy(u16),
    /// The process may not set a mark. The mark keeps the node's own datagrams out of the tunnel.
    #[error("cannot mark the UDP socket: permission denied: run as root or grant CAP_NET_ADMIN")]
    MarkNotPermitted,
    /// The process may not use the port, for example one below 1024.
    #[error(
        "cannot bind UDP port {0}: permission denied: configure a port from 1024, or run as root"
    )]
    NotPermitted(u16),
    /// Another error of the system.
    #[error("cannot open UDP port {port}: {error}")]
    Other {
        /// UDP port.
        port: u16,
        /// Error of the system.
        error: io::Error,
    },
}

/// Control message that gives the length of each segment of a send (`linux/udp.h`).
const UDP_SEGMENT: c_int = 103;
/// Socket option that coalesces arriving datagrams, and control message that gives the length of
/// each (`linux/udp.h`).
const UDP_GRO: c_int = 104;

/// UDP sockets for IPv4 and IPv6 on one port. At least one of them exists.
#[derive(Debug)]
pub struct Udp {
    v4: Option<Endpoint>,
    v6: Option<Endpoint>,
    port: u16,
    /// Switch of sending several datagrams with one call (`UDP_SEGMENT`).
    segment: Switch,
    /// Switch of receiving coalesced datagrams (`UDP_GRO`).
    gro: Switch,
    /// True if `UDP_GRO` is set on the sockets. It follows the switch at the next receive.
    gro_enabled: bool,
    corruption: GroCorruption,
    /// Sockets of the second port, while it is open.
    second: Option<Box<Udp>>,
    /// True if the IPv6 socket is read first. It alternates, so that a flood on one socket cannot
    /// starve the other.
    v6_first: bool,
}

/// Opens a UDP port for IPv4 and IPv6; the kernel chooses the port if it is 0. Every datagram gets
/// `mark`, unless that is 0. Uses every offload that the kernel has.
///
/// # Errors
///
/// Returns [`OpenUdpError`], one line for the operator.
pub fn open_udp(port: u16, mark: u32) -> Result<Udp, OpenUdpError> {
    open_udp_with(port, mark, Offloads::default())
}

/// Opens a UDP port like [`open_udp`], with only these offloads.
///
/// # Errors
///
/// Returns [`OpenUdpError`], one line for the operator.
pub fn open_udp_with(port: u16, mark: u32, offloads: Offloads) -> Result<Udp, OpenUdpError> {
    open_pair(port, mark, probed(offloads), false)
}

/// Opens the port `count` times, once for each worker. All datagrams from one address arrive by the
/// same socket.
///
/// # Errors
///
/// Returns [`OpenUdpError`], one line for the operator.
pub fn open_udp_group(
    port: u16,
    mark: u32,
    offloads: Offloads,
    count: usize,
) -> Result<Vec<Udp>, OpenUdpError> {
    open_group(port, mark, probed(offloads), count)
}

/// Returns the switches of the offloads, as their self-tests found them.
fn probed(offloads: Offloads) -> [Switch; 2] {
    let (segment, gro) = probe(offloads);
    [Switch::new("udp_segment", segment), Switch::new("udp_gro", gro)]
}

/// Opens a port `count` times, with these switches.
fn open_group(
    port: u16,
    mark: u32,
    switches: [Switch; 2],
    count: usize,
) -> Result<Vec<Udp>, OpenUdpError> {
    let alone = open_pair(port, mark, switches.clone(), false)?;
    if count < 2 {
        return Ok(vec![alone]);
    }
    // No other program has the port, so it can be opened again with SO_REUSEPORT.
    let port = alone.port;
    drop(alone);
    (0..count).map(|_| open_pair(port, mark, switches.clone(), true)).collect()
}

fn open_pair(
    port: u16,
    mark: u32,
    [segment, gro]: [Switch; 2],
    shared: bool,
) -> Result<Udp, OpenUdpError> {
    // With port 0, the port that the kernel chose for IPv4 may be taken on IPv6. Then another one
    // is tried.
    for _ in 0..16 {
        let options = SocketOptions { mark, gro: gro.is_on(), shared };
        let v4 = open_family(Domain::IPV4, port, options)?;
        let chosen = match &v4 {
            Some(v4) => v4.port().map_err(|error| OpenUdpError::Other { port, error })?,
            None => port,
        };
        match open_family(Domain::IPV6, chosen, options) {
            Err(OpenUdpError::Busy(_)) if port == 0 => {}
            Err(error) => return Err(error),
            Ok(None) if v4.is_none() => {
                let error = io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
                return Err(OpenUdpError::Other { port, error });
            }
            Ok(v6) => {
                let port = match (&v4, &v6) {
                    (None, Some(v6)) => v6.port().unwrap_or(chosen),
                    _ => chosen,
                };
                let (gro_enabled, corruption) = (options.gro, GroCorruption::default());
                return Ok(Udp {
                    v4,
                    v6,
                    port,
                    segment,
                    gro,
                    gro_enabled,
                    corruption,
                    second: None,
                    v6_first: false,
                });
            }
        }
    }
    Err(OpenUdpError::Busy(port))
}

impl Udp {
    /// Returns the port. It is the kernel's choice if 0 was requested.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the socket that datagrams on this path leave from, and the switch of its offload.
    fn endpoint(&mut self, path: &Path) -> (Option<&mut Endpoint>, &Switch) {
        let (v4, v6) = match &mut self.second {
            Some(second) if path.port == LocalPort::Second => (&mut second.v4, &mut second.v6),
            _ => (&mut self.v4, &mut self.v6),
        };
        let endpoint = if path.remote.is_ipv4() { v4 } else { v6 };
        (endpoint.as_mut(), &self.segment)
    }

    /// Sets `UDP_GRO` on the sockets as the switch demands. Another worker may have changed the
    /// switch.
    fn sync_gro(&mut self) {
        let wanted = self.gro.is_on();
        if wanted == self.gro_enabled {
            return;
        }
        self.gro_enabled = wanted;
        for endpoint in self.v4.iter().chain(&self.v6) {
            // Disabling what was enabled cannot fail. If enabling fails, datagrams arrive one by
            // one, as before.
            let _ = set(&endpoint.socket, libc::SOL_UDP, UDP_GRO, wanted.into());
        }
    }
}

impl UdpIo for Udp {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let own = self.v4.iter().chain(&self.v6).map(|endpoint| endpoint.socket.as_fd());
        own.chain(self.second.iter().flat_map(|second| second.fds())).collect()
    }

    fn receive(&mut self, ready: Ready, batch: &mut RecvBatch, drops: &Drops) -> io::Result<()> {
        self.sync_gro();
        let set = ready;
        self.v6_first = !self.v6_first;
        // This is the order of the descriptors in `fds`.
        let both = self.v4.iter_mut().chain(&mut self.v6).enumerate();
        let mut ready = both.filter(|(place, _)| ready.has(*place)).map(|(_, endpoint)| endpoint);
        let mut order = [ready.next(), ready.next()];
        if self.v6_first {
            order.reverse();
        }
        for endpoint in order.into_iter().flatten() {
            endpoint.receive(batch, drops)?;
        }
        self.receive_second(set, batch, drops)
    }

    fn send_gso_batches(
        &mut self,
        now: Instant,
        bytes: &[u8],
        mut gso_batches: &[GsoBatch],
        drops: &Drops,
    ) {
        self.segment.retry(now);
        self.gro.retry(now);
        let mut deadlines = SendDeadlines::default();
        while let Some(first) = gso_batches.first() {
            let socket = |gso: &GsoBatch| (gso.to.path.port, gso.to.path.remote.is_ipv4());
            let run = gso_batches.iter().take_while(|gso| socket(gso) == socket(first)).count();
            let (these, others) = gso_batches.split_at(run);
            let (endpoint, segment) = self.endpoint(&first.to.path);
            match endpoint {
                Some(endpoint) => {
                    endpoint.send(now, bytes, these, segment, &mut deadlines, drops);
                }
                None => {
                    let datagrams: usize = these.iter().map(|gso| gso.segments).sum();
                    drops.add(DropReason::SendRefused, datagrams as u64);
                }
            }
            gso_batches = others;
        }
    }

    fn send_limited(&mut self, now: Instant, batch: &SendBatch, hops: u8, drops: &Drops) {
        self.send_hops(now, batch, hops, drops);
    }

    fn set_second_port(&mut self, sockets: Option<Udp>) {
        self.second = sockets.map(Box::new);
    }

    fn send_whole(
        &mut self,
        _now: Instant,
        batch: &SendBatch,
        drops: &Drops,
    ) -> Result<(), TooBig> {
        for gso in batch.gso_batches() {
            let (Some(endpoint), _) = self.endpoint(&gso.to.path) else {
                drops.count(DropReason::SendRefused);
                continue;
            };
            if let Err(Unsent { error, payload }) = endpoint.send_whole(batch.bytes(), gso) {
                drops.count(send_reason(error.raw_os_error()));
                if error.raw_os_error() == Some(libc::EMSGSIZE) {
                    return Err(TooBig { payload: payload.unwrap_or(0) });
                }
            }
        }
        Ok(())
    }

    fn record_gro(&mut self, now: Instant, datagrams: usize, corrupted: usize) {
        self.corruption.evaluate(now, datagrams, corrupted, &self.gro);
    }

    fn features(&self) -> Vec<Switch> {
        vec![self.segment.clone(), self.gro.clone()]
    }
}
