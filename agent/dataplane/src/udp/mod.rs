//! The network side of the data plane: sends and receives batches of datagrams through UDP sockets.

use std::ffi::c_int;
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use towline_core::path::{LocalPort, Path};

use super::Offloads;
use super::arena::{GsoBatch, RecvBatch, SLOT_BYTES, SendBatch};
use super::drops::{DropReason, Drops};
use super::switch::{OffReason, Switch};
pub(super) use corruption::GroCorruption;
use messages::{Headers, MESSAGES, ReceivedMessage};
pub(super) use second::open_second_port;
use whole::Unsent;

mod corruption;
mod messages;
mod second;
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

    /// Sends the whole batch in order. Waits a short time if a socket buffer is full. Datagrams
    /// that cannot be sent are counted.
    fn send(&mut self, now: Instant, batch: &SendBatch, drops: &Drops) {
        self.send_gso_batches(now, batch.bytes(), batch.gso_batches(), drops);
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

    /// Sends a batch of one datagram that at most `hops` routers forward.
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

/// Size of a socket's receive buffer, in bytes, if the process may exceed the system's limit.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Size of a socket's send buffer, in bytes, if the process may exceed the system's limit.
const SEND_BUFFER: usize = 2 << 20;
/// Longest time that a self-test waits for its datagrams on the loopback.
const SELF_TEST_TIMEOUT: Duration = Duration::from_millis(200);
/// Longest time that a datagram waits for room in the socket buffer before it is dropped.
const SEND_TIMEOUT: Duration = Duration::from_millis(20);
/// Longest time that all datagrams of one batch together wait for room. It keeps a slow device from
/// blocking the worker's other work.
const BATCH_TIMEOUT: Duration = Duration::from_secs(1);
/// First kernel version in which `UDP_GRO` reports correct lengths.
const GRO_SINCE: [u32; 3] = [5, 12, 0];
/// Kernel versions, from the first up to but excluding the second, that corrupt segments of equal
/// length when sending.
const SEGMENT_CORRUPTED: [[u32; 3]; 2] = [[7, 0, 0], [7, 1, 5]];

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
    let (segment, gro) = probe(offloads);
    let switches = [Switch::new("udp_segment", segment), Switch::new("udp_gro", gro)];
    open_pair(port, mark, switches, false)
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
    let alone = open_udp_with(port, mark, offloads)?;
    if count < 2 {
        return Ok(vec![alone]);
    }
    // No other program has the port, so it can be opened again with SO_REUSEPORT.
    let (port, switches) = (alone.port, [alone.segment.clone(), alone.gro.clone()]);
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

    /// Sends from the configured port.
    fn send_own(
        &mut self,
        now: Instant,
        bytes: &[u8],
        mut gso_batches: &[GsoBatch],
        drops: &Drops,
    ) {
        let mut deadlines = SendDeadlines::default();
        while let Some(first) = gso_batches.first() {
            let same =
                |gso: &&GsoBatch| gso.to.path.remote.is_ipv4() == first.to.path.remote.is_ipv4();
            let run = gso_batches.iter().take_while(same).count();
            let endpoint = if first.to.path.remote.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
            match endpoint {
                Some(endpoint) => {
                    let gso_batches = &gso_batches[..run];
                    endpoint.send(now, bytes, gso_batches, &self.segment, &mut deadlines, drops);
                }
                None => {
                    let datagrams: usize = gso_batches[..run].iter().map(|gso| gso.segments).sum();
                    drops.add(DropReason::SendRefused, datagrams as u64);
                }
            }
            gso_batches = &gso_batches[run..];
        }
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
        gso_batches: &[GsoBatch],
        drops: &Drops,
    ) {
        self.segment.retry(now);
        self.gro.retry(now);
        match self.second.take() {
            None => self.send_own(now, bytes, gso_batches, drops),
            Some(mut second) => {
                self.send_by_port(&mut second, now, bytes, gso_batches, drops);
                self.second = Some(second);
            }
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
            let udp = match &mut self.second {
                Some(second) if gso.to.path.port == LocalPort::Second => &mut **second,
                _ => &mut *self,
            };
            let v4 = gso.to.path.remote.is_ipv4();
            let Some(endpoint) = (if v4 { &mut udp.v4 } else { &mut udp.v6 }) else {
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

/// One socket, with the message headers for its system calls, which are allocated once.
struct Endpoint {
    socket: Socket,
    headers: Headers,
    v4: bool,
    /// Port that the socket is bound to.
    port_kind: LocalPort,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy)]
struct SocketOptions {
    mark: u32,
    gro: bool,
    /// True if several sockets of this process share the port.
    shared: bool,
}

fn open_family(
    domain: Domain,
    port: u16,
    SocketOptions { mark, gro, shared }: SocketOptions,
) -> Result<Option<Endpoint>, OpenUdpError> {
    let other = |error| OpenUdpError::Other { port, error };
    let socket = match Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP)) {
        Ok(socket) => socket,
        // The address family is disabled on this machine.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
        Err(error) => return Err(other(error)),
    };
    if mark != 0 {
        socket.set_mark(mark).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => OpenUdpError::MarkNotPermitted,
            _ => other(error),
        })?;
    }
    let any = if domain == Domain::IPV4 {
        // Routers on the path may fragment, as with WireGuard in the kernel.
        set(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
            .map_err(other)?;
        set(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1).map_err(other)?;
        set(&socket, libc::IPPROTO_IP, libc::IP_RECVTOS, 1).map_err(other)?;
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        socket.set_only_v6(true).map_err(other)?;
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
            .map_err(other)?;
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1).map_err(other)?;
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1).map_err(other)?;
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    };
    buffer(&socket, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_BUFFER);
    buffer(&socket, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_BUFFER);
    if gro {
        set(&socket, libc::SOL_UDP, UDP_GRO, 1).map_err(other)?;
    }
    if shared {
        socket.set_reuse_port(true).map_err(other)?;
    }
    match socket.bind(&SockAddr::from(SocketAddr::new(any, port))) {
        Ok(()) => {}
        Err(error) => {
            return match error.raw_os_error() {
                Some(libc::EADDRINUSE) => Err(OpenUdpError::Busy(port)),
                Some(libc::EACCES | libc::EPERM) => Err(OpenUdpError::NotPermitted(port)),
                // IPv6 is disabled on this machine, but compiled into the kernel.
                Some(libc::EADDRNOTAVAIL) if domain == Domain::IPV6 => Ok(None),
                _ => Err(other(error)),
            };
        }
    }
    Ok(Some(Endpoint {
        socket,
        headers: Headers::new(),
        v4: domain == Domain::IPV4,
        port_kind: LocalPort::Configured,
    }))
}

fn set(socket: &Socket, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the option is an `int`, which `value` is, and `length` is its size.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the size of a socket buffer, beyond the system's limit if permitted; otherwise the kernel
/// caps it. Never fails.
fn buffer(socket: &Socket, force: c_int, ask: c_int, bytes: usize) {
    if set(socket, libc::SOL_SOCKET, force, bytes as c_int).is_err() {
        let _ = set(socket, libc::SOL_SOCKET, ask, bytes as c_int);
    }
}

/// Checks whether `UDP_SEGMENT` and `UDP_GRO` work on this machine, in this order. An error is the
/// reason why not.
fn probe(offloads: Offloads) -> (Result<(), OffReason>, Result<(), OffReason>) {
    let version = kernel_version();
    let segment = if !offloads.udp_segment {
        Err(OffReason::Configured)
    } else if SEGMENT_CORRUPTED[0] <= version && version < SEGMENT_CORRUPTED[1] {
        Err(OffReason::Defective("Linux 7.0 to 7.1.4 damages segments that it sends"))
    } else {
        try_out(SelfTest::Segment)
    };
    let gro = if !offloads.udp_gro {
        Err(OffReason::Configured)
    } else if version < GRO_SINCE {
        Err(OffReason::Defective("UDP_GRO is broken before Linux 5.12"))
    } else {
        try_out(SelfTest::Gro)
    };
    (segment, gro)
}

/// Returns the numbers of the kernel's version. A number that cannot be read is 0.
fn kernel_version() -> [u32; 3] {
    let mut version = [0; 3];
    if let Ok(name) = nix::sys::utsname::uname() {
        let release = name.release().to_string_lossy();
        let numbers = release.split(|c: char| !c.is_ascii_digit());
        for (to, from) in version.iter_mut().zip(numbers) {
            *to = from.parse().unwrap_or(0);
        }
    }
    version
}

/// Offload that a self-test checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SelfTest {
    Segment,
    Gro,
}

/// Sends a GSO batch over the loopback and compares what arrives. Without a usable loopback the
/// test passes.
fn try_out(what: SelfTest) -> Result<(), OffReason> {
    const LENGTHS: [usize; 5] = [1200, 1200, 1200, 1200, 700];
    let refused =
        |error: io::Error| OffReason::Unsupported(format!("the kernel refused it: {error}"));
    let sockets = [0; 2].map(|_| {
        let any = SockAddr::from(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        socket.bind(&any)?;
        socket.set_read_timeout(Some(SELF_TEST_TIMEOUT))?;
        io::Result::Ok(socket)
    });
    let [Ok(sender), Ok(receiver)] = sockets else { return Ok(()) };
    set(&sender, libc::SOL_UDP, UDP_SEGMENT, 0).map_err(refused)?;
    if what == SelfTest::Gro {
        set(&receiver, libc::SOL_UDP, UDP_GRO, 1).map_err(refused)?;
    }
    let Ok(Some(to)) = receiver.local_addr().map(|address| address.as_socket()) else {
        return Ok(());
    };
    let mut batch = SendBatch::new(SLOT_BYTES, LENGTHS.len());
    let mut sent: Vec<u8> = Vec::new();
    for (number, length) in LENGTHS.into_iter().enumerate() {
        let datagram: Vec<u8> = (0..length).map(|at| (at * 7 + at / 256 + number) as u8).collect();
        if !batch.push(to.into(), &datagram) {
            return Err(OffReason::SelfTest("a self-test has no room".to_owned()));
        }
        sent.extend_from_slice(&datagram);
    }
    let mut headers = Headers::new();
    match headers.send(&sender, batch.bytes(), batch.gso_batches()) {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENETUNREACH) => return Ok(()),
        Err(error) => return Err(refused(error)),
    }
    let mut slots = vec![0; SLOT_BYTES];
    let mut received: Vec<u8> = Vec::new();
    while received.len() < sent.len() {
        if headers.receive_waiting(&receiver, &mut slots).is_err() {
            break;
        }
        let Some(ReceivedMessage { len, segment_size, .. }) = headers.received(0) else { break };
        // Either the whole GSO batch arrives at once, or one datagram with the length that was
        // sent.
        let whole = segment_size == LENGTHS[0] && len == sent.len();
        let single = segment_size == 0 && LENGTHS.contains(&len);
        if !whole && !single {
            return Err(OffReason::SelfTest(format!(
                "self-test failed: received {len} bytes in segments of {segment_size}"
            )));
        }
        received.extend_from_slice(&slots[..len]);
    }
    // Nothing arrives if the loopback is down or a firewall drops the datagrams.
    if received.is_empty() || received == sent {
        Ok(())
    } else {
        let why = "self-test failed: the received bytes differ from those sent";
        Err(OffReason::SelfTest(why.to_owned()))
    }
}

impl Endpoint {
    fn port(&self) -> io::Result<u16> {
        Ok(self.socket.local_addr()?.as_socket().map_or(0, |address| address.port()))
    }

    fn receive(&mut self, batch: &mut RecvBatch, drops: &Drops) -> io::Result<()> {
        // This is not the number of datagrams received: a truncated one leaves its slot unused.
        let taken = batch.next_slot();
        if batch.is_full() {
            return Ok(());
        }
        let free = (batch.slots() - taken).min(MESSAGES);
        let slots = &mut batch.bytes_mut()[taken * SLOT_BYTES..];
        let count = match self.headers.receive(&self.socket, &mut slots[..free * SLOT_BYTES]) {
            Ok(count) => count,
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EBADF | libc::ENOTSOCK | libc::EFAULT | libc::EINVAL) => Err(error),
                    // No datagram is left, or the socket reports an error that an earlier datagram
                    // caused.
                    _ => Ok(()),
                };
            }
        };
        for message in 0..count {
            match self.headers.received(message) {
                Some(ReceivedMessage { from, len, segment_size, traffic_class }) => {
                    let from = Path { port: self.port_kind, ..from };
                    batch.push(taken + message, from, len, segment_size);
                    batch.set_traffic_class(traffic_class);
                }
                None => drops.count(DropReason::Truncated),
            }
        }
        Ok(())
    }

    fn send(
        &mut self,
        now: Instant,
        bytes: &[u8],
        mut gso_batches: &[GsoBatch],
        segment: &Switch,
        deadlines: &mut SendDeadlines,
        drops: &Drops,
    ) {
        while let Some(first) = gso_batches.first() {
            // Another worker may change the switch at any time.
            let segmented = segment.is_on();
            if first.to.fragment && !self.v4 {
                self.fragment(true);
                self.send_singly(bytes, first, deadlines, drops);
                self.fragment(false);
                gso_batches = &gso_batches[1..];
                continue;
            }
            if !segmented && first.segments > 1 {
                self.send_singly(bytes, first, deadlines, drops);
                gso_batches = &gso_batches[1..];
                continue;
            }
            let limit = gso_batches.len().min(MESSAGES);
            let whole =
                |gso: &&GsoBatch| (segmented || gso.segments == 1) && (self.v4 || !gso.to.fragment);
            let run = gso_batches[..limit].iter().take_while(whole).count();
            match self.headers.send(&self.socket, bytes, &gso_batches[..run]) {
                Ok(0) => {
                    drops.add(DropReason::SendRefused, first.segments as u64);
                    gso_batches = &gso_batches[1..];
                }
                Ok(sent) => {
                    gso_batches = &gso_batches[sent..];
                    deadlines.record_progress();
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::ENOBUFS) if self.wait(deadlines) => {}
                    // The device or the route does not take the segments. Either their length is at
                    // fault, which concerns this GSO batch only, or segmentation itself.
                    Some(code @ (libc::EIO | libc::EINVAL | libc::EMSGSIZE))
                        if first.segments > 1 =>
                    {
                        // If sending one by one fails too, segmentation is not at fault: the local
                        // end of the path is gone.
                        let sent = self.send_singly(bytes, first, deadlines, drops);
                        if sent > 0 && code != libc::EMSGSIZE {
                            segment.disable_after_error(&error, now);
                        }
                        gso_batches = &gso_batches[1..];
                    }
                    code => {
                        drops.add(send_reason(code), first.segments as u64);
                        gso_batches = &gso_batches[1..];
                    }
                },
            }
        }
    }

    /// Sets whether datagrams are fragmented to the size that every path takes (RFC 8200 section
    /// 5). IPv4 needs nothing: any router fragments a datagram that is too big.
    fn fragment(&self, fragment: bool) {
        let mtu = if fragment { IPV6_LEAST_MTU } else { 0 };
        // If the call fails, the datagrams are sent unfragmented, and may not get through.
        let _ = set(&self.socket, libc::IPPROTO_IPV6, libc::IPV6_MTU, mtu);
    }

    /// Sends the datagrams of a GSO batch one by one. Returns the number that the kernel accepted.
    fn send_singly(
        &mut self,
        bytes: &[u8],
        gso: &GsoBatch,
        deadlines: &mut SendDeadlines,
        drops: &Drops,
    ) -> usize {
        let mut taken = 0;
        let mut singles = [*gso; MESSAGES];
        let mut at = 0;
        while at < gso.len {
            let mut count = 0;
            for single in &mut singles {
                if at == gso.len {
                    break;
                }
                let len = gso.segment_size.get().min(gso.len - at);
                let start = gso.start + at;
                *single = GsoBatch { start, len, segments: 1, ..*gso };
                at += len;
                count += 1;
            }
            let mut left = &singles[..count];
            while !left.is_empty() {
                match self.headers.send(&self.socket, bytes, left) {
                    Ok(0) => {
                        drops.count(DropReason::SendRefused);
                        left = &left[1..];
                    }
                    Ok(sent) => {
                        taken += sent;
                        left = &left[sent..];
                        deadlines.record_progress();
                    }
                    Err(error) => match error.raw_os_error() {
                        Some(libc::EAGAIN | libc::ENOBUFS) if self.wait(deadlines) => {}
                        code => {
                            drops.count(send_reason(code));
                            left = &left[1..];
                        }
                    },
                }
            }
        }
        taken
    }

    /// Waits for room in the socket buffer. Returns `false` if no time is left.
    fn wait(&self, deadlines: &mut SendDeadlines) -> bool {
        let Some(left) = deadlines.left(Instant::now()) else { return false };
        let fd = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        let mut fds = [fd];
        let milliseconds = left.as_millis().max(1) as c_int;
        // SAFETY: the call gets one `pollfd`, which lives until it returns.
        unsafe { libc::poll(fds.as_mut_ptr(), 1, milliseconds) };
        true
    }
}

/// Deadlines of the datagrams of one batch that wait for room.
#[derive(Debug, Default)]
struct SendDeadlines {
    /// Time when the current datagram is dropped. Cleared when one is sent.
    datagram: Option<Instant>,
    /// Time after which no datagram of the batch waits. Set by the first that waits.
    batch: Option<Instant>,
}

impl SendDeadlines {
    /// Records that a datagram was sent.
    fn record_progress(&mut self) {
        self.datagram = None;
    }

    /// Returns the time that the current datagram may still wait. `None` if it must not wait.
    fn left(&mut self, now: Instant) -> Option<Duration> {
        let batch = *self.batch.get_or_insert(now + BATCH_TIMEOUT);
        let datagram = *self.datagram.get_or_insert(now + SEND_TIMEOUT);
        let left = datagram.min(batch).checked_duration_since(now)?;
        (!left.is_zero()).then_some(left)
    }
}

fn send_reason(code: Option<i32>) -> DropReason {
    match code {
        Some(libc::EAGAIN | libc::ENOBUFS) => DropReason::SendBufferFull,
        Some(libc::EMSGSIZE) => DropReason::SendTooLarge,
        _ => DropReason::SendRefused,
    }
}

/// Smallest MTU of an IPv6 link in bytes (RFC 8200 section 5).
const IPV6_LEAST_MTU: c_int = 1280;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_is_taken_slowly_is_not_waited_for_without_end() {
        let mut deadlines = SendDeadlines::default();
        let start = Instant::now();
        let (mut now, mut waits) = (start, 0);
        while deadlines.left(now).is_some() {
            // Each datagram is sent just before its own deadline.
            now += SEND_TIMEOUT / 2;
            deadlines.record_progress();
            waits += 1;
            assert!(waits < 1_000, "the wait is not bounded");
        }
        assert!(now - start >= BATCH_TIMEOUT);

        let mut deadlines = SendDeadlines::default();
        assert!(deadlines.left(start).is_some());
        assert!(deadlines.left(start + SEND_TIMEOUT).is_none(), "the deadline of one datagram");
        deadlines.record_progress();
        assert!(
            deadlines.left(start + SEND_TIMEOUT).is_some(),
            "the next datagram has its own deadline"
        );
    }

    /// A self-test that fails wrongly halves the throughput, and nothing else reveals it.
    #[test]
    fn a_kernel_that_has_the_offloads_passes_their_self_tests() {
        for (what, since) in [(SelfTest::Segment, [4, 18, 0]), (SelfTest::Gro, GRO_SINCE)] {
            let corrupted =
                SEGMENT_CORRUPTED[0] <= kernel_version() && kernel_version() < SEGMENT_CORRUPTED[1];
            if kernel_version() >= since && !corrupted {
                assert_eq!(try_out(what), Ok(()), "{what:?}");
            }
        }
    }
}
