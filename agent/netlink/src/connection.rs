//! The transport: one socket, requests and their answers.
//!
//! The kernel works off a request while it is being sent, so its answers are queued when `send`
//! returns. A failure is always answered, success only when asked for. From that follows how
//! many requests travel cheaply: they are sent in chunks whose failures fit the receive buffer,
//! and only a chunk's last message asks for its acknowledgement.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::codec::{Message, Received, attributes, messages};
use super::error::{NetlinkError, Refusal};

/// Which part of the kernel is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, rules.
    Route,
    /// nftables.
    Netfilter,
}

impl Protocol {
    pub(super) fn number(self) -> isize {
        match self {
            Self::Route => libc::NETLINK_ROUTE as isize,
            Self::Netfilter => libc::NETLINK_NETFILTER as isize,
        }
    }
}

/// A failed message of a chunk: its place in what was given, and why.
pub type Failure = (usize, Refusal);

/// A socket bound to the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
    send_bytes: usize,
    chunk_messages: usize,
    /// Answers as a kernel without IPv6 does; set in tests alone.
    lacks_ipv6: bool,
}

/// What is asked of the kernel for each buffer.
const BUFFER_BYTES: usize = 8 << 20;
/// A dump's datagrams are at most 32 KiB; an answer quotes no more than its request's header.
const RECEIVE_BYTES: usize = 64 << 10;
/// Messages per send, at most.
const CHUNK_MESSAGES: usize = 128;
/// Bytes of the receive buffer that one refusal takes, at most.
const REFUSAL_BYTES: usize = 2 << 10;
/// The kernel answers before `send` returns; an answer that is this late never comes.
const ANSWER_SECONDS: i64 = 10;
/// Bytes per send.
const CHUNK_BYTES: usize = 64 << 10;
/// How often a dump is begun again when a change ran through it. The last one then counts: what
/// it missed shows up at the next reading.
const DUMP_ATTEMPTS: usize = 8;

impl Connection {
    /// Opens a socket in the calling thread's network namespace; it stays there.
    pub fn open(protocol: Protocol) -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(protocol.number()).map_err(failed("open"))?;
        let port = socket.bind_auto().map_err(failed("bind"))?.port_number();
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connect"))?;
        enlarge_buffers(socket.as_fd());
        let patience = nix::sys::time::TimeVal::new(ANSWER_SECONDS, 0);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &patience)
            .map_err(|errno| failed("set its patience")(errno.into()))?;
        // Older kernels lack some of these; only the words and the filtering get worse.
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

    /// Fits what is sent at once to the buffers there are.
    fn measure(&mut self) -> Result<(), NetlinkError> {
        let unknown = |errno: Errno| failed("read its buffer size")(errno.into());
        let socket = self.socket.as_fd();
        self.send_bytes = getsockopt(&socket, sockopt::SndBuf).map_err(unknown)?;
        let receive_bytes = getsockopt(&socket, sockopt::RcvBuf).map_err(unknown)?;
        self.chunk_messages = (receive_bytes / REFUSAL_BYTES).clamp(1, CHUNK_MESSAGES);
        Ok(())
    }

    /// The socket's number in its namespace: notifications of what it changed carry it.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Bytes that one send can carry.
    pub fn send_limit(&self) -> usize {
        // The kernel keeps 32 bytes for itself.
        self.send_bytes.saturating_sub(32)
    }

    /// Has only this many bytes for each buffer, as on a host whose limits nobody raised.
    #[doc(hidden)]
    pub fn shrink_buffers(&mut self, bytes: usize) {
        let socket = self.socket.as_fd();
        setsockopt(&socket, sockopt::RcvBuf, &bytes).expect("a smaller buffer");
        setsockopt(&socket, sockopt::SndBuf, &bytes).expect("a smaller buffer");
        self.measure().expect("their sizes");
    }

    /// From now on answers as a kernel that was booted with `ipv6.disable=1`.
    #[doc(hidden)]
    pub fn lack_ipv6(&mut self) {
        self.lacks_ipv6 = true;
    }

    /// Whether it answers as a kernel without this family.
    pub(crate) fn lacks(&self, family: super::Family) -> bool {
        self.lacks_ipv6 && family == super::Family::V6
    }

    /// One request; returns when the kernel did it. `what` completes "cannot ...".
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

    /// Many requests, independent of each other: one that fails does not keep the others from
    /// being done. The failures, in order.
    pub fn request_all(&mut self, mut batch: Vec<Message>) -> Result<Vec<Failure>, NetlinkError> {
        let chunk = CHUNK_BYTES.min(self.send_limit());
        let mut failures = Vec::new();
        let mut start = 0;
        while start < batch.len() {
            let mut bytes = 0;
            let end = batch[start..]
                .iter()
                .take(self.chunk_messages)
                .take_while(|message| {
                    bytes += message.len();
                    bytes <= chunk
                })
                .count()
                .max(1)
                + start;
            let failed = self.chunk(&mut batch[start..end])?;
            failures.extend(failed.into_iter().map(|(at, refusal)| (start + at, refusal)));
            start = end;
        }
        Ok(failures)
    }

    /// The one thing that a request asks for; `None` if the kernel's answer was not understood.
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
        loop {
            let Some(length) = self.receive(0).map_err(lost("answer"))? else { continue };
            for received in messages(&self.buffer[..length]) {
                if received.sequence != sequence {
                    continue;
                }
                if i32::from(received.kind) == libc::NLMSG_ERROR {
                    return match outcome(&received) {
                        None => Ok(found),
                        Some(refusal) => Err(NetlinkError::Refused { what: what(), refusal }),
                    };
                }
                found = parse(received);
            }
        }
    }

    /// Everything that a dump request yields; `parse` skips what it does not want.
    pub fn dump<T>(
        &mut self,
        what: &str,
        message: &Message,
        mut parse: impl FnMut(Received<'_>) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let mut message = message.clone();
            if self.lacks_ipv6 {
                super::stand_in::dump_without_ipv6(what, &mut message)?;
            }
            message.add_flags(libc::NLM_F_DUMP as u16);
            let (items, consistent) = self.dump_once(what, message, &mut parse)?;
            if consistent || attempts == DUMP_ATTEMPTS {
                return Ok(items);
            }
        }
    }

    fn dump_once<T>(
        &mut self,
        what: &str,
        mut message: Message,
        parse: &mut impl FnMut(Received<'_>) -> Option<T>,
    ) -> Result<(Vec<T>, bool), NetlinkError> {
        let sequence = self.next_sequence();
        self.send(message.finish(sequence))?;
        let mut items = Vec::new();
        let mut consistent = true;
        loop {
            let Some(length) = self.receive(0).map_err(lost(what))? else { continue };
            for received in messages(&self.buffer[..length]) {
                if received.sequence != sequence {
                    continue;
                }
                consistent &= received.flags & libc::NLM_F_DUMP_INTR as u16 == 0;
                let kind = i32::from(received.kind);
                if kind == libc::NLMSG_DONE || kind == libc::NLMSG_ERROR {
                    return match outcome(&received) {
                        None => Ok((items, consistent)),
                        Some(refusal) => {
                            Err(NetlinkError::Refused { what: what.to_owned(), refusal })
                        }
                    };
                }
                items.extend(parse(received));
            }
        }
    }

    /// Sends the messages at once, the last with a request for acknowledgement, and collects
    /// what failed.
    fn chunk(&mut self, batch: &mut [Message]) -> Result<Vec<Failure>, NetlinkError> {
        if self.lacks_ipv6
            && let Some(failures) = super::stand_in::refused_without_ipv6(batch)
        {
            return Ok(failures);
        }
        let Some(last) = batch.last_mut() else { return Ok(Vec::new()) };
        last.add_flags(libc::NLM_F_ACK as u16);
        let first_sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(batch.iter().map(Message::len).sum());
        for message in batch.iter_mut() {
            let sequence = self.next_sequence();
            bytes.extend_from_slice(message.finish(sequence));
        }
        self.send(&bytes)?;

        let mut failures = Vec::new();
        loop {
            let Some(length) = self.receive(0).map_err(lost("change the network"))? else {
                continue;
            };
            for received in messages(&self.buffer[..length]) {
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

    /// Sends messages that form one transaction, whose answers are failures only, and returns
    /// the failures by place. Since nothing is acknowledged, silence is success.
    pub fn transact(&mut self, batch: &mut [Message]) -> Result<Vec<Failure>, NetlinkError> {
        let first_sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(batch.iter().map(Message::len).sum());
        for message in batch.iter_mut() {
            let sequence = self.next_sequence();
            bytes.extend_from_slice(message.finish(sequence));
        }
        self.send(&bytes)?;

        let mut failures = Vec::new();
        let mut overrun = false;
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(Some(length)) => {
                    for received in messages(&self.buffer[..length]) {
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

    /// Answers that nobody waits for any more: once the kernel dropped one for want of space it
    /// says so, but not again until all that is queued was read.
    fn forget_answers(&mut self) {
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }

    /// One datagram into the buffer; `None` if it did not come from the kernel or there was only
    /// an interruption.
    fn receive(&mut self, flags: libc::c_int) -> io::Result<Option<usize>> {
        receive(&self.socket, &mut self.buffer, flags)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

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

/// 8 MiB each way; without the right to force it, as much as the system's limits leave.
pub(super) fn enlarge_buffers(socket: BorrowedFd<'_>) {
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        let _ = setsockopt(&socket, sockopt::RcvBuf, &BUFFER_BYTES);
    }
    if setsockopt(&socket, sockopt::SndBufForce, &BUFFER_BYTES).is_err() {
        let _ = setsockopt(&socket, sockopt::SndBuf, &BUFFER_BYTES);
    }
}

/// The refusal that an error message or the end of a dump carries; `None` for success.
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

const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;

pub(super) fn failed(action: &'static str) -> impl Fn(io::Error) -> NetlinkError {
    move |source| NetlinkError::Socket { action, source }
}

fn lost(what: &str) -> impl Fn(io::Error) -> NetlinkError {
    move |error| {
        if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN)) {
            NetlinkError::Overrun(what.to_owned())
        } else {
            failed("receive")(error)
        }
    }
}
