//! Netlink transport: one socket, requests and their answers.
//!
//! The kernel handles a request inside the `send` call, so its answers are queued when `send` returns.
//! It always answers a failure, and a success only if the request asks for an acknowledgement.
//! Therefore many requests are sent in chunks whose failures fit the receive buffer, and only a
//! chunk's last message asks for an acknowledgement.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::codec::{Message, Received, attributes, messages};
use super::error::{NetlinkError, Refusal};

/// Netlink protocol: the kernel subsystem at the other end of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `NETLINK_ROUTE`: links, addresses, routes, rules.
    Route,
    /// `NETLINK_NETFILTER`: nftables.
    Netfilter,
    /// `NETLINK_SOCK_DIAG`: sockets.
    SocketDiag,
}

/// Number of the protocol `NETLINK_SOCK_DIAG`, which libc lacks for Linux.
const SOCK_DIAG: isize = 4;

impl Protocol {
    pub(super) fn number(self) -> isize {
        match self {
            Self::Route => libc::NETLINK_ROUTE as isize,
            Self::Netfilter => libc::NETLINK_NETFILTER as isize,
            Self::SocketDiag => SOCK_DIAG,
        }
    }
}

/// Failed message of a batch: its index in the batch, and the kernel's refusal.
pub type Failure = (usize, Refusal);

/// Netlink socket, bound to the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
    send_bytes: usize,
    chunk_messages: usize,
    /// Whether to simulate the answers of a kernel without IPv6. Only tests set it.
    lacks_ipv6: bool,
}

/// Size in bytes to request for each of the socket's buffers.
const BUFFER_BYTES: usize = 8 << 20;
/// Size in bytes of the buffer for one datagram. A dump's datagrams have at most 32 KiB, and an answer
/// quotes at most the header of its request.
const RECEIVE_BYTES: usize = 64 << 10;
/// Greatest number of messages per send.
const CHUNK_MESSAGES: usize = 128;
/// Upper bound, in bytes, of the receive buffer space that one refusal takes.
const REFUSAL_BYTES: usize = 2 << 10;
/// Receive timeout in seconds. The kernel answers before `send` returns, so a later answer is lost.
const ANSWER_SECONDS: i64 = 10;
/// Greatest number of bytes per send of independent requests.
const CHUNK_BYTES: usize = 64 << 10;
/// Greatest number of attempts at a dump that concurrent changes interrupt. The result of the last
/// attempt is used; the next dump returns what it missed.
const DUMP_ATTEMPTS: usize = 8;

impl Connection {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open(protocol: Protocol) -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(protocol.number()).map_err(failed("open"))?;
        let port = socket.bind_auto().map_err(failed("bind"))?.port_number();
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connect"))?;
        enlarge_buffers(socket.as_fd());
        let timeout = nix::sys::time::TimeVal::new(ANSWER_SECONDS, 0);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &timeout)
            .map_err(|errno| failed("set the receive timeout")(errno.into()))?;
        // Older kernels lack some of these. Then error messages have less detail, and dumps return
        // more than was requested.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        let buffer = vec![0; RECEIVE_BYTES];
        let mut opened = Self {
            socket,
            port,
            sequence: 0,
            buffer,
            send_bytes: 0,
            chunk_messages: 0,
            lacks_ipv6: false,
        };
        opened.measure()?;
        Ok(opened)
    }

    /// Reads the sizes of the socket's buffers, and derives the limits of one send from them.
    fn measure(&mut self) -> Result<(), NetlinkError> {
        let unknown = |errno: Errno| failed("read the buffer size")(errno.into());
        let socket = self.socket.as_fd();
        self.send_bytes = getsockopt(&socket, sockopt::SndBuf).map_err(unknown)?;
        let receive_bytes = getsockopt(&socket, sockopt::RcvBuf).map_err(unknown)?;
        self.chunk_messages = (receive_bytes / REFUSAL_BYTES).clamp(1, CHUNK_MESSAGES);
        Ok(())
    }

    /// Returns the socket's port id. Notifications about changes by this socket carry it.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Returns the greatest number of bytes per send.
    pub fn send_limit(&self) -> usize {
        // The kernel reserves 32 bytes.
        self.send_bytes.saturating_sub(32)
    }

    /// Shrinks the socket's buffers to this size in bytes, for tests with the default limits of a host.
    #[doc(hidden)]
    pub fn shrink_buffers(&mut self, bytes: usize) {
        let socket = self.socket.as_fd();
        setsockopt(&socket, sockopt::RcvBuf, &bytes).expect("a smaller buffer");
        setsockopt(&socket, sockopt::SndBuf, &bytes).expect("a smaller buffer");
        self.measure().expect("their sizes");
    }

    /// Simulates a kernel that was booted with `ipv6.disable=1` from now on, for tests.
    #[doc(hidden)]
    pub fn lack_ipv6(&mut self) {
        self.lacks_ipv6 = true;
    }

    /// Returns true if this connection simulates a kernel without this family.
    pub(crate) fn lacks(&self, family: super::Family) -> bool {
        self.lacks_ipv6 && family == super::Family::V6
    }

    /// Sends one request, and returns after the kernel handled it. `what` completes "cannot ...".
    pub fn request(
        &mut self,
        what: impl FnOnce() -> String,
        message: Message,
    ) -> Result<(), NetlinkError> {
        match self.chunk(&mut [message])?.pop() {
            None => Ok(()),
            Some((_, refusal)) => Err(NetlinkError::Refused { what: what(), refusal }),
        }
    }

    /// Sends independent requests in order: the kernel handles all of them, even if some fail. Returns
    /// the failures in order.
    pub fn request_all(&mut self, mut batch: Vec<Message>) -> Result<Vec<Failure>, NetlinkError> {
        let chunk = CHUNK_BYTES.min(self.send_limit());
        let mut failures = Vec::new();
        let (mut rest, mut start) = (&mut *batch, 0);
        while !rest.is_empty() {
            let mut bytes = 0;
            let fitting = rest.iter().take(self.chunk_messages).take_while(|message| {
                bytes += message.len();
                bytes <= chunk
            });
            let count = fitting.count().max(1);
            let (sent, after) = std::mem::take(&mut rest).split_at_mut(count);
            let failed = self.chunk(sent)?;
            failures.extend(failed.into_iter().map(|(at, refusal)| (start + at, refusal)));
            (rest, start) = (after, start + count);
        }
        Ok(failures)
    }

    /// Requests a single object. Returns `None` if `parse` accepts no answer.
    pub fn get<T>(
        &mut self,
        what: impl FnOnce() -> String,
        mut message: Message,
        mut parse: impl FnMut(Received<'_>) -> Option<T>,
    ) -> Result<Option<T>, NetlinkError> {
        let sequence = self.next_sequence();
        message.add_flags(libc::NLM_F_ACK as u16);
        self.send(message.finish(sequence))?;
        let mut found = None;
        self.answers(sequence, what, |received| found = parse(received))?;
        Ok(found)
    }

    /// Returns the objects of a dump for which `parse` returns a value.
    pub fn dump<T>(
        &mut self,
        what: &str,
        message: &Message,
        parse: impl FnMut(Received<'_>) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        let found = self.dump_at_most(what, message, usize::MAX, parse)?;
        Ok(found.unwrap_or_default())
    }

    /// Returns the objects of a dump as [`Self::dump`] does, and `None` if there are more than `most`.
    pub fn dump_at_most<T>(
        &mut self,
        what: &str,
        message: &Message,
        most: usize,
        mut parse: impl FnMut(Received<'_>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, NetlinkError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let mut message = message.clone();
            if self.lacks_ipv6 {
                super::stand_in::dump_without_ipv6(what, &mut message)?;
            }
            message.add_flags(libc::NLM_F_DUMP as u16);
            let (items, consistent) = self.dump_once(what, message, most, &mut parse)?;
            if consistent || items.is_none() || attempts == DUMP_ATTEMPTS {
                return Ok(items);
            }
        }
    }

    /// Makes one attempt at a dump. The first value is `None` if there are more than `most` objects, which
    /// are not kept then. The second one is false if a concurrent change interrupted it.
    fn dump_once<T>(
        &mut self,
        what: &str,
        mut message: Message,
        most: usize,
        parse: &mut impl FnMut(Received<'_>) -> Option<T>,
    ) -> Result<(Option<Vec<T>>, bool), NetlinkError> {
        let sequence = self.next_sequence();
        self.send(message.finish(sequence))?;
        let mut items = Some(Vec::new());
        let mut flags = 0;
        let what = || what.to_owned();
        let last = self.answers(sequence, what, |received| {
            flags |= received.flags;
            // The rest must be read all the same: the kernel makes one dump of a socket at a time.
            items = items.take().and_then(|mut kept| {
                kept.extend(parse(received));
                (kept.len() <= most).then_some(kept)
            });
        })?;
        Ok((items, (flags | last) & libc::NLM_F_DUMP_INTR as u16 == 0))
    }

    /// Passes the answers to a request to `take`, until the kernel acknowledges the request, ends the
    /// dump or reports an error. Returns the flags of that last message.
    fn answers(
        &mut self,
        sequence: u32,
        what: impl FnOnce() -> String,
        mut take: impl FnMut(Received<'_>),
    ) -> Result<u16, NetlinkError> {
        loop {
            let length = match self.receive(0) {
                Ok(Some(length)) => length,
                Ok(None) => continue,
                Err(error) => return Err(lost(&what())(error)),
            };
            for received in messages(self.received(length)) {
                if received.sequence != sequence {
                    continue;
                }
                if !matches!(i32::from(received.kind), libc::NLMSG_DONE | libc::NLMSG_ERROR) {
                    take(received);
                    continue;
                }
                return match outcome(&received) {
                    None => Ok(received.flags),
                    Some(refusal) => Err(NetlinkError::Refused { what: what(), refusal }),
                };
            }
        }
    }

    /// Returns the first `length` bytes of the receive buffer.
    fn received(&self, length: usize) -> &[u8] {
        self.buffer.get(..length).unwrap_or_default()
    }

    /// Sends the messages in one call, with a request to acknowledge the last one, and returns the
    /// failures.
    fn chunk(&mut self, batch: &mut [Message]) -> Result<Vec<Failure>, NetlinkError> {
        if self.lacks_ipv6
            && let Some(failures) = super::stand_in::refused_without_ipv6(batch)
        {
            return Ok(failures);
        }
        let Some(last) = batch.last_mut() else { return Ok(Vec::new()) };
        last.add_flags(libc::NLM_F_ACK as u16);
        let first_sequence = self.send_all(batch)?;
        let mut failures = Vec::new();
        loop {
            let Some(length) = self.receive(0).map_err(lost("change the network"))? else {
                continue;
            };
            for received in messages(self.received(length)) {
                let place = received.sequence.wrapping_sub(first_sequence) as usize;
                if place >= batch.len() || i32::from(received.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                if let Some(refusal) = outcome(&received) {
                    failures.push((place, refusal));
                }
                if place == batch.len() - 1 {
                    return Ok(failures);
                }
            }
        }
    }

    /// Sends the messages of one transaction and returns the failures. The kernel acknowledges no
    /// message of a transaction, so no answer means success.
    pub fn transact(&mut self, batch: &mut [Message]) -> Result<Vec<Failure>, NetlinkError> {
        let first_sequence = self.send_all(batch)?;
        let mut failures = Vec::new();
        let mut overrun = false;
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(Some(length)) => {
                    for received in messages(self.received(length)) {
                        let place = received.sequence.wrapping_sub(first_sequence) as usize;
                        if place < batch.len()
                            && i32::from(received.kind) == libc::NLMSG_ERROR
                            && let Some(refusal) = outcome(&received)
                        {
                            failures.push((place, refusal));
                        }
                    }
                }
                Ok(None) => {}
                Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                    Errno::EAGAIN => break,
                    Errno::ENOBUFS => overrun = true,
                    _ => return Err(failed("receive")(error)),
                },
            }
        }
        if overrun && failures.is_empty() {
            return Err(NetlinkError::Overrun("change a table".to_owned()));
        }
        Ok(failures)
    }

    /// Sends messages in one call. Returns the sequence number of the first; the others follow it.
    fn send_all(&mut self, batch: &mut [Message]) -> Result<u32, NetlinkError> {
        let first_sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(batch.iter().map(Message::len).sum());
        for message in batch.iter_mut() {
            let sequence = self.next_sequence();
            bytes.extend_from_slice(message.finish(sequence));
        }
        self.send(&bytes)?;
        Ok(first_sequence)
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), NetlinkError> {
        self.forget_answers();
        loop {
            match self.socket.send(bytes, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed("send")(error)),
            }
        }
    }

    /// Discards queued answers of earlier requests. After the kernel dropped an answer it reports
    /// `ENOBUFS` once, and not again until the queue was read empty.
    fn forget_answers(&mut self) {
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }

    /// Receives one datagram into the buffer. Returns `None` if it did not come from the kernel, or if
    /// a signal interrupted the call.
    fn receive(&mut self, flags: libc::c_int) -> io::Result<Option<usize>> {
        receive(&self.socket, &mut self.buffer, flags)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Receives one datagram of the kernel and returns its length. Returns `None` for a datagram of another
/// process, and if a signal interrupted the call.
pub(super) fn receive(
    socket: &Socket,
    buffer: &mut [u8],
    flags: libc::c_int,
) -> io::Result<Option<usize>> {
    let room = buffer.len();
    match socket.recv_from(&mut &mut buffer[..], flags) {
        Ok((length, from)) if from.port_number() == 0 => Ok(Some(length.min(room))),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

/// Requests [`BUFFER_BYTES`] for both buffers. Without the privilege to exceed the host's limits, the
/// socket gets what the limits allow.
pub(super) fn enlarge_buffers(socket: BorrowedFd<'_>) {
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        let _ = setsockopt(&socket, sockopt::RcvBuf, &BUFFER_BYTES);
    }
    if setsockopt(&socket, sockopt::SndBufForce, &BUFFER_BYTES).is_err() {
        let _ = setsockopt(&socket, sockopt::SndBuf, &BUFFER_BYTES);
    }
}

/// Returns the refusal in an error message or at the end of a dump, or `None` for success.
fn outcome(received: &Received<'_>) -> Option<Refusal> {
    let code = received.payload.get(..4)?;
    let code = i32::from_ne_bytes(code.try_into().ok()?);
    if code == 0 {
        return None;
    }
    // An error quotes the header of its request; the end of a dump does not.
    let quoted = match i32::from(received.kind) {
        libc::NLMSG_ERROR if received.flags & NLM_F_CAPPED != 0 => 4 + 16,
        libc::NLMSG_ERROR => 4 + super::codec::u32_at(received.payload, 4)? as usize,
        _ => 4,
    };
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let text = (received.flags & NLM_F_ACK_TLVS != 0)
        .then(|| attributes(received.payload, quoted).find(|a| a.kind == NLMSGERR_ATTR_MSG))
        .flatten()
        .map(|attribute| attribute.string());
    Some(Refusal { errno: Errno::from_raw(-code), text })
}

/// Flag of an error message that quotes only the header of its request.
const NLM_F_CAPPED: u16 = 0x100;
/// Flag of an error message that has attributes.
const NLM_F_ACK_TLVS: u16 = 0x200;

/// Returns a conversion of I/O errors. `action` completes "cannot ...".
pub(super) fn failed(action: &'static str) -> impl Fn(io::Error) -> NetlinkError {
    move |source| NetlinkError::Socket { action, source }
}

/// Returns a conversion of I/O errors that maps a full buffer and a timeout to
/// [`NetlinkError::Overrun`]. `what` completes "cannot ...".
fn lost(what: &str) -> impl Fn(io::Error) -> NetlinkError {
    move |error| {
        if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN)) {
            NetlinkError::Overrun(what.to_owned())
        } else {
            failed("receive")(error)
        }
    }
}
