//! The network side: batches of datagrams through UDP sockets.

use std::ffi::c_int;
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::Offloads;
use super::arena::{RecvBatch, SLOT_BYTES, SendBatch, Train};
use super::drops::{DropReason, Drops};
use super::switch::{Switch, switched_off};
pub(super) use damage::Damage;
use messages::{Headers, MESSAGES};
use whole::Unsent;

mod damage;
mod messages;
mod whole;

/// A way to send and receive datagrams in batches. Two stand behind it: [`Udp`], and
/// [`MemoryUdp`](super::memory::MemoryUdp).
pub trait UdpIo: Send + 'static {
    /// What to wait on for something to receive, at most eight.
    fn fds(&self) -> Vec<BorrowedFd<'_>>;

    /// Fills the batch with what has arrived, without waiting. What cannot be taken is counted.
    /// Of those that [`UdpIo::fds`] gave only the ready ones are looked at.
    ///
    /// # Errors
    ///
    /// Only when nothing can be received any more.
    fn receive(&mut self, ready: Ready, batch: &mut RecvBatch, drops: &Drops) -> io::Result<()>;

    /// Sends the whole batch in order; waits a little where the kernel has no room. What cannot
    /// be sent is counted.
    fn send(&mut self, now: Instant, batch: &SendBatch, drops: &Drops) {
        self.send_trains(now, batch.bytes(), batch.trains(), drops);
    }

    /// As [`UdpIo::send`], for trains that lie in `bytes`, wherever that is.
    fn send_trains(&mut self, now: Instant, bytes: &[u8], trains: &[Train], drops: &Drops);

    /// Sends a batch of one datagram, which nobody may fragment.
    ///
    /// # Errors
    ///
    /// The kernel knows already that it is too big for its path.
    fn send_whole(&mut self, now: Instant, batch: &SendBatch, drops: &Drops) -> Result<(), TooBig>;

    /// So many datagrams of the last batch came joined, `damaged` of which were not authentic.
    fn came_joined(&mut self, now: Instant, datagrams: usize, damaged: usize);

    /// What speeds it up. Clones look on while it runs.
    fn features(&self) -> Vec<Switch>;
}

/// Which of several descriptors have something, by their place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ready(u8);

impl Ready {
    /// Each may have something.
    pub const ALL: Self = Self(u8::MAX);

    /// So has this one.
    #[must_use]
    pub fn with(self, place: usize) -> Self {
        Self(self.0 | 1 << place)
    }

    /// Whether this one has.
    pub fn has(self, place: usize) -> bool {
        self.0 & 1 << place != 0
    }

    /// None has.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// A datagram does not fit its path unfragmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooBig {
    /// UDP payload that fits, in bytes, as far as the kernel knows; 0: it does not.
    pub payload: u16,
}

/// Why the UDP port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenUdpError {
    /// Somebody has it.
    #[error(
        "cannot bind UDP port {0}: address in use: stop the other program or set [wireguard] port"
    )]
    Busy(u16),
    /// The mark is what keeps our own datagrams out of the tunnel.
    #[error("marking the socket was not permitted: run as root or grant CAP_NET_ADMIN")]
    MarkNotPermitted,
    /// A port below 1,024, or the like.
    #[error("UDP port {0} was not permitted: configure a port from 1024, or run as root")]
    NotPermitted(u16),
    /// Anything else.
    #[error("UDP port {port} could not be opened: {error}")]
    Other {
        /// The port.
        port: u16,
        /// How it failed.
        error: io::Error,
    },
}

/// `linux/udp.h`: the length of each segment of a send.
const UDP_SEGMENT: c_int = 103;
/// `linux/udp.h`: joins what arrives, and says the length of each segment.
const UDP_GRO: c_int = 104;

/// What the kernel may hold for us, in bytes, where we may force it.
const RECEIVE_BUFFER: usize = 4 << 20;
const SEND_BUFFER: usize = 2 << 20;
/// How long a self-test waits for what it sent over the loopback.
const SELF_TEST_PATIENCE: Duration = Duration::from_millis(200);
/// How long a datagram may wait for room in the socket before it is dropped.
const SEND_PATIENCE: Duration = Duration::from_millis(20);
/// How long all datagrams of one batch together may wait for room. A device that takes one now and
/// then would otherwise keep the worker from everything else.
const BATCH_PATIENCE: Duration = Duration::from_secs(1);
/// Before, `UDP_GRO` delivered wrong lengths.
const GRO_SINCE: [u32; 3] = [5, 12, 0];
/// From the first to before the second, segments of equal length were sent damaged.
const SEGMENT_DAMAGED: [[u32; 3]; 2] = [[7, 0, 0], [7, 1, 5]];

/// A socket for each family, on one port. IPv6 may be missing.
#[derive(Debug)]
pub struct Udp {
    v4: Option<Endpoint>,
    v6: Option<Endpoint>,
    port: u16,
    /// Datagrams are sent many at a time.
    segment: Switch,
    /// Datagrams are received many at a time.
    gro: Switch,
    /// As the sockets are set.
    joining: bool,
    damage: Damage,
    /// Whose turn it is to receive first, so that a flood on one cannot starve the other.
    v6_first: bool,
}

/// Opens the port (0: any) for IPv4 and IPv6. `mark` goes on every datagram (0: none). Uses every
/// offload that the kernel has.
///
/// # Errors
///
/// One line for the operator, see [`OpenUdpError`].
pub fn open_udp(port: u16, mark: u32) -> Result<Udp, OpenUdpError> {
    open_udp_with(port, mark, Offloads::default())
}

/// As [`open_udp`], with only these offloads.
///
/// # Errors
///
/// One line for the operator, see [`OpenUdpError`].
pub fn open_udp_with(port: u16, mark: u32, offloads: Offloads) -> Result<Udp, OpenUdpError> {
    let (segment, gro) = probe(offloads);
    let switches = [Switch::new("udp_segment", segment), Switch::new("udp_gro", gro)];
    open_pair(port, mark, switches, false)
}

/// Opens the port as often as asked for, for one worker each: all datagrams from one address come
/// by one of them.
///
/// # Errors
///
/// One line for the operator, see [`OpenUdpError`].
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
    // Nobody else has the port; now it can be shared.
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
    // With port 0 the second family may find the first one's choice taken: choose again.
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
                let (joining, damage) = (options.gro, Damage::default());
                let v6_first = false;
                return Ok(Udp { v4, v6, port, segment, gro, joining, damage, v6_first });
            }
        }
    }
    Err(OpenUdpError::Busy(port))
}

impl Udp {
    /// The port, as chosen by the kernel where 0 was asked for.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets the sockets as the switch stands, which another worker may have turned.
    fn set_joining(&mut self) {
        let wanted = self.gro.is_on();
        if wanted == self.joining {
            return;
        }
        self.joining = wanted;
        for endpoint in self.v4.iter().chain(&self.v6) {
            // What was switched on can be switched off. Refused the other way round, datagrams
            // come one by one, as before.
            let _ = set(&endpoint.socket, libc::SOL_UDP, UDP_GRO, wanted.into());
        }
    }
}

impl UdpIo for Udp {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.v4.iter().chain(&self.v6).map(|endpoint| endpoint.socket.as_fd()).collect()
    }

    fn receive(&mut self, ready: Ready, batch: &mut RecvBatch, drops: &Drops) -> io::Result<()> {
        self.set_joining();
        self.v6_first = !self.v6_first;
        // In the order that `fds` gives them.
        let both = self.v4.iter_mut().chain(&mut self.v6).enumerate();
        let mut ready = both.filter(|(place, _)| ready.has(*place)).map(|(_, endpoint)| endpoint);
        let mut order = [ready.next(), ready.next()];
        if self.v6_first {
            order.reverse();
        }
        for endpoint in order.into_iter().flatten() {
            endpoint.receive(batch, drops)?;
        }
        Ok(())
    }

    fn send_trains(&mut self, now: Instant, bytes: &[u8], mut trains: &[Train], drops: &Drops) {
        self.segment.reconsider(now);
        self.gro.reconsider(now);
        let mut patience = Patience::default();
        while let Some(first) = trains.first() {
            let same = |train: &&Train| train.to.remote.is_ipv4() == first.to.remote.is_ipv4();
            let run = trains.iter().take_while(same).count();
            let endpoint = if first.to.remote.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
            match endpoint {
                Some(endpoint) => {
                    let trains = &trains[..run];
                    endpoint.send(now, bytes, trains, &self.segment, &mut patience, drops);
                }
                None => {
                    let datagrams: usize = trains[..run].iter().map(|train| train.segments).sum();
                    drops.add(DropReason::SendRefused, datagrams as u64);
                }
            }
            trains = &trains[run..];
        }
    }

    fn send_whole(
        &mut self,
        _now: Instant,
        batch: &SendBatch,
        drops: &Drops,
    ) -> Result<(), TooBig> {
        for train in batch.trains() {
            let v4 = train.to.remote.is_ipv4();
            let Some(endpoint) = (if v4 { &mut self.v4 } else { &mut self.v6 }) else {
                drops.count(DropReason::SendRefused);
                continue;
            };
            if let Err(Unsent { error, payload }) = endpoint.send_whole(batch.bytes(), train) {
                drops.count(send_reason(error.raw_os_error()));
                if error.raw_os_error() == Some(libc::EMSGSIZE) {
                    return Err(TooBig { payload: payload.unwrap_or(0) });
                }
            }
        }
        Ok(())
    }

    fn came_joined(&mut self, now: Instant, datagrams: usize, damaged: usize) {
        self.damage.judge(now, datagrams, damaged, &self.gro);
    }

    fn features(&self) -> Vec<Switch> {
        vec![self.segment.clone(), self.gro.clone()]
    }
}

/// One socket, with the headers of its system calls made once.
struct Endpoint {
    socket: Socket,
    headers: Headers,
    v4: bool,
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
    /// With other sockets of this process.
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
        // Switched off on this machine.
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
        // As kernel WireGuard does: a router on the way may fragment.
        set(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
            .map_err(other)?;
        set(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1).map_err(other)?;
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        socket.set_only_v6(true).map_err(other)?;
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
            .map_err(other)?;
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1).map_err(other)?;
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
                // Switched off on this machine, but not compiled out.
                Some(libc::EADDRNOTAVAIL) if domain == Domain::IPV6 => Ok(None),
                _ => Err(other(error)),
            };
        }
    }
    Ok(Some(Endpoint { socket, headers: Headers::new(), v4: domain == Domain::IPV4 }))
}

fn set(socket: &Socket, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the option is an `int`, which `value` is, and so long.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// As much as we may have: forced, else asked for (the kernel then caps it). Never an error.
fn buffer(socket: &Socket, force: c_int, ask: c_int, bytes: usize) {
    if set(socket, libc::SOL_SOCKET, force, bytes as c_int).is_err() {
        let _ = set(socket, libc::SOL_SOCKET, ask, bytes as c_int);
    }
}

/// What of sending and receiving many at a time can be relied on here.
fn probe(offloads: Offloads) -> (Result<(), String>, Result<(), String>) {
    let version = kernel_version();
    let segment = if !offloads.udp_segment {
        switched_off()
    } else if SEGMENT_DAMAGED[0] <= version && version < SEGMENT_DAMAGED[1] {
        Err("Linux 7.0 to 7.1.4 damages what is sent".to_owned())
    } else {
        try_out(SelfTest::Segment)
    };
    let gro = if !offloads.udp_gro {
        switched_off()
    } else if version < GRO_SINCE {
        Err("it is broken before Linux 5.12".to_owned())
    } else {
        try_out(SelfTest::Gro)
    };
    (segment, gro)
}

/// Numbers of the kernel's version; what cannot be read counts as 0.
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SelfTest {
    Segment,
    Gro,
}

/// Sends a train over the loopback and looks at what arrives. Without a loopback nothing can be
/// found out, and nothing is held against it.
fn try_out(what: SelfTest) -> Result<(), String> {
    const LENGTHS: [usize; 5] = [1200, 1200, 1200, 1200, 700];
    let refused = |error: io::Error| format!("the kernel refused it: {error}");
    let sockets = [0; 2].map(|_| {
        let any = SockAddr::from(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        socket.bind(&any)?;
        socket.set_read_timeout(Some(SELF_TEST_PATIENCE))?;
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
            return Err("a self-test has no room".to_owned());
        }
        sent.extend_from_slice(&datagram);
    }
    let mut headers = Headers::new();
    match headers.send(&sender, batch.bytes(), batch.trains()) {
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
        let Some((_, len, stride)) = headers.received(0) else { break };
        // A whole train, or one datagram that has the length it was sent with.
        let whole = stride == LENGTHS[0] && len == sent.len();
        let single = stride == 0 && LENGTHS.contains(&len);
        if !whole && !single {
            return Err(format!("a self-test received {len} bytes in parts of {stride}"));
        }
        received.extend_from_slice(&slots[..len]);
    }
    // Nothing at all: a loopback that is down, or a firewall.
    if received.is_empty() || received == sent {
        Ok(())
    } else {
        Err("a self-test received other bytes than were sent".to_owned())
    }
}

impl Endpoint {
    fn port(&self) -> io::Result<u16> {
        Ok(self.socket.local_addr()?.as_socket().map_or(0, |address| address.port()))
    }

    fn receive(&mut self, batch: &mut RecvBatch, drops: &Drops) -> io::Result<()> {
        // Not the number of those received: one that was cut off leaves its slot unused.
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
                    // Nothing there, or an error that some datagram of ours brought back.
                    _ => Ok(()),
                };
            }
        };
        for message in 0..count {
            match self.headers.received(message) {
                Some((from, len, stride)) => batch.push(taken + message, from, len, stride),
                None => drops.count(DropReason::Truncated),
            }
        }
        Ok(())
    }

    fn send(
        &mut self,
        now: Instant,
        bytes: &[u8],
        mut trains: &[Train],
        segment: &Switch,
        patience: &mut Patience,
        drops: &Drops,
    ) {
        while let Some(first) = trains.first() {
            // Another worker may turn the switch at any time.
            let segmented = segment.is_on();
            if first.fragment && !self.v4 {
                self.fragment(true);
                self.send_singly(bytes, first, patience, drops);
                self.fragment(false);
                trains = &trains[1..];
                continue;
            }
            if !segmented && first.segments > 1 {
                self.send_singly(bytes, first, patience, drops);
                trains = &trains[1..];
                continue;
            }
            let limit = trains.len().min(MESSAGES);
            let whole =
                |train: &&Train| (segmented || train.segments == 1) && (self.v4 || !train.fragment);
            let run = trains[..limit].iter().take_while(whole).count();
            match self.headers.send(&self.socket, bytes, &trains[..run]) {
                Ok(0) => {
                    drops.add(DropReason::SendRefused, first.segments as u64);
                    trains = &trains[1..];
                }
                Ok(sent) => {
                    trains = &trains[sent..];
                    patience.went_on();
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::ENOBUFS) if self.wait(patience) => {}
                    // Segments that the device or the route does not take. The length may be at
                    // fault, which concerns this train alone, or segmentation itself.
                    Some(code @ (libc::EIO | libc::EINVAL | libc::EMSGSIZE))
                        if first.segments > 1 =>
                    {
                        // Where none goes out one by one either, segmentation is not at fault: our
                        // own end of the path is gone.
                        let sent = self.send_singly(bytes, first, patience, drops);
                        if sent > 0 && code != libc::EMSGSIZE {
                            segment.give_up(&error, now);
                        }
                        trains = &trains[1..];
                    }
                    code => {
                        drops.add(send_reason(code), first.segments as u64);
                        trains = &trains[1..];
                    }
                },
            }
        }
    }

    /// From now on datagrams are fragmented to what every path takes (RFC 8200 section 5). Over
    /// IPv4 nothing is to be done: whoever finds them too big fragments them.
    fn fragment(&self, fragment: bool) {
        let mtu = if fragment { IPV6_LEAST_MTU } else { 0 };
        // Refused, they go as they are, and the path stays as bad as it is.
        let _ = set(&self.socket, libc::IPPROTO_IPV6, libc::IPV6_MTU, mtu);
    }

    /// Returns how many the kernel took.
    fn send_singly(
        &mut self,
        bytes: &[u8],
        train: &Train,
        patience: &mut Patience,
        drops: &Drops,
    ) -> usize {
        let mut taken = 0;
        let mut singles = [*train; MESSAGES];
        let mut at = 0;
        while at < train.len {
            let mut count = 0;
            for single in &mut singles {
                if at == train.len {
                    break;
                }
                let len = train.stride.get().min(train.len - at);
                let start = train.start + at;
                *single = Train { start, len, segments: 1, ..*train };
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
                        patience.went_on();
                    }
                    Err(error) => match error.raw_os_error() {
                        Some(libc::EAGAIN | libc::ENOBUFS) if self.wait(patience) => {}
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

    /// Waits for room in the socket; `false` when it was waited for long enough.
    fn wait(&self, patience: &mut Patience) -> bool {
        let Some(left) = patience.left(Instant::now()) else { return false };
        let fd = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        let mut fds = [fd];
        let milliseconds = left.as_millis().max(1) as c_int;
        // SAFETY: one `pollfd`, which lives until the call returns.
        unsafe { libc::poll(fds.as_mut_ptr(), 1, milliseconds) };
        true
    }
}

/// How long the sends of one batch may still wait for room.
#[derive(Debug, Default)]
struct Patience {
    /// When the present datagram is given up. Cleared when one is sent.
    datagram: Option<Instant>,
    /// When nothing of the batch waits any more. Set by the first that waits.
    batch: Option<Instant>,
}

impl Patience {
    /// Something was sent.
    fn went_on(&mut self) {
        self.datagram = None;
    }

    /// How long to wait now; `None`: not at all.
    fn left(&mut self, now: Instant) -> Option<Duration> {
        let batch = *self.batch.get_or_insert(now + BATCH_PATIENCE);
        let datagram = *self.datagram.get_or_insert(now + SEND_PATIENCE);
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

/// RFC 8200 section 5.
const IPV6_LEAST_MTU: c_int = 1280;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_is_taken_slowly_is_not_waited_for_without_end() {
        let mut patience = Patience::default();
        let start = Instant::now();
        let (mut now, mut waits) = (start, 0);
        while patience.left(now).is_some() {
            // Just in time, each time.
            now += SEND_PATIENCE / 2;
            patience.went_on();
            waits += 1;
            assert!(waits < 1_000, "it never ends");
        }
        assert!(now - start >= BATCH_PATIENCE);

        let mut patience = Patience::default();
        assert!(patience.left(start).is_some());
        assert!(patience.left(start + SEND_PATIENCE).is_none(), "one datagram");
        patience.went_on();
        assert!(patience.left(start + SEND_PATIENCE).is_some(), "the next one");
    }

    /// A probe that fails by its own fault costs half of the throughput, and nothing else tells.
    #[test]
    fn a_kernel_that_has_the_offloads_passes_their_self_tests() {
        for (what, since) in [(SelfTest::Segment, [4, 18, 0]), (SelfTest::Gro, GRO_SINCE)] {
            let damaged =
                SEGMENT_DAMAGED[0] <= kernel_version() && kernel_version() < SEGMENT_DAMAGED[1];
            if kernel_version() >= since && !damaged {
                assert_eq!(try_out(what), Ok(()), "{what:?}");
            }
        }
    }
}
