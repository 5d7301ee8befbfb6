//! One UDP socket: sends and receives batches, and waits for room for a bounded time.

use std::ffi::c_int;
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use towline_core::path::{LocalPort, Path};

use crate::arena::{GsoBatch, RecvBatch, SLOT_BYTES};
use crate::drops::{DropReason, Drops};
use crate::switch::{OffReason, Switch};

use super::messages::{Headers, MESSAGES, ReceivedMessage};
use super::{OpenUdpError, UDP_GRO};

/// Size of a socket's receive buffer, in bytes, if the process may exceed the system's limit.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Size of a socket's send buffer, in bytes, if the process may exceed the system's limit.
const SEND_BUFFER: usize = 2 << 20;
/// Longest time that a datagram waits for room in the socket buffer before it is dropped.
const SEND_TIMEOUT: Duration = Duration::from_millis(20);
/// Longest time that all datagrams of one batch together wait for room. It keeps a slow device from
/// blocking the worker's other work.
const BATCH_TIMEOUT: Duration = Duration::from_secs(1);
/// Smallest MTU of an IPv6 link in bytes (RFC 8200 section 5).
const IPV6_LEAST_MTU: c_int = 1280;

/// One socket, with the message headers for its system calls, which are allocated once.
pub(super) struct Endpoint {
    pub(super) socket: Socket,
    pub(super) headers: Headers,
    pub(super) v4: bool,
    /// Port that the socket is bound to.
    pub(super) port_kind: LocalPort,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// Options of a socket.
#[derive(Debug, Clone, Copy)]
pub(super) struct SocketOptions {
    /// Mark of every datagram that is sent; 0: none.
    pub(super) mark: u32,
    /// True if arriving datagrams are coalesced (`UDP_GRO`).
    pub(super) gro: bool,
    /// True if several sockets of this process share the port.
    pub(super) shared: bool,
}

/// Opens and binds a socket of one address family; `None` if the machine has it disabled.
pub(super) fn open_family(
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

/// Sets an option of a socket.
pub(super) fn set(socket: &Socket, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
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

impl Endpoint {
    /// Returns the port that the socket is bound to.
    pub(super) fn port(&self) -> io::Result<u16> {
        Ok(self.socket.local_addr()?.as_socket().map_or(0, |address| address.port()))
    }

    /// Receives what is there into the free slots of a batch.
    pub(super) fn receive(&mut self, batch: &mut RecvBatch, drops: &Drops) -> io::Result<()> {
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

    /// Sends GSO batches, and counts the datagrams that the kernel does not take.
    pub(super) fn send(
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
                        if sent > 0 {
                            match code {
                                libc::EMSGSIZE => {}
                                libc::EIO => segment.disable(OffReason::NeedsChecksums, now),
                                _ => segment.disable_after_error(&error, now),
                            }
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
    pub(super) fn fragment(&self, fragment: bool) {
        let mtu = if fragment { IPV6_LEAST_MTU } else { 0 };
        // If the call fails, the datagrams are sent unfragmented, and may not get through.
        let _ = set(&self.socket, libc::IPPROTO_IPV6, libc::IPV6_MTU, mtu);
    }

    /// Sends the datagrams of a GSO batch one by one. Returns the number that the kernel accepted.
    pub(super) fn send_singly(
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
    pub(super) fn wait(&self, deadlines: &mut SendDeadlines) -> bool {
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
pub(super) struct SendDeadlines {
    /// Time when the current datagram is dropped. Cleared when one is sent.
    datagram: Option<Instant>,
    /// Time after which no datagram of the batch waits. Set by the first that waits.
    batch: Option<Instant>,
}

impl SendDeadlines {
    /// Records that a datagram was sent.
    pub(super) fn record_progress(&mut self) {
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

/// Returns the reason for which a datagram is dropped, by the error number of its send.
pub(super) fn send_reason(code: Option<i32>) -> DropReason {
    match code {
        Some(libc::EAGAIN | libc::ENOBUFS) => DropReason::SendBufferFull,
        Some(libc::EMSGSIZE) => DropReason::SendTooLarge,
        _ => DropReason::SendRefused,
    }
}

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
}
