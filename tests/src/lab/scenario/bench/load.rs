//! Traffic that costs as little as it can, and what comes out at the other end.
//!
//! TCP: 128 KiB writes; the reader lets the kernel discard what it has checked. UDP: numbered
//! datagrams by `sendmmsg`, each by itself, as fast as the sender can, into a sink that the kernel
//! hands many at a time (`UDP_GRO`). The sender does without segmentation offload: so does what
//! sends small datagrams in life, and a tunnel has to take them one by one.

use std::io::Write;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;
use socket2::{Domain, Protocol, Socket, Type};
use towline_dataplane::arena::{RecvBatch, SendBatch};
use towline_dataplane::drops::Drops;
use towline_dataplane::{Offloads, Ready, Udp, UdpIo, open_udp_with};

use crate::lab::interrupt::pass;
use crate::lab::namespace::Namespace;
use crate::lab::process::processor_time;

/// For how long is measured, and what goes before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) warm_up: Duration,
    pub(super) length: Duration,
}

/// How the senders of TCP find their pace. Not as the machine has it: how much lies in a tunnel's
/// queues depends on it, and so what is found.
#[derive(Debug, Clone, Copy)]
pub(super) enum Congestion {
    /// RFC 9438, what Linux does unless it is told otherwise.
    Cubic,
    /// What many servers are told to do; a module that not every kernel has.
    Bbr,
}

impl Congestion {
    fn name(self) -> &'static str {
        match self {
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
        }
    }
}

/// One direction of traffic.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) from: &'a Namespace,
    pub(super) to: &'a Namespace,
    /// One of `to`.
    pub(super) address: IpAddr,
}

/// What went through within a window.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Carried {
    /// Of payload.
    pub(super) bytes: u64,
    /// UDP.
    pub(super) datagrams: u64,
    /// UDP: came after one with a higher number, in the whole run.
    pub(super) reordered: u64,
    /// UDP: arrived, in the whole run.
    pub(super) arrived: u64,
    pub(super) seconds: f64,
    /// Of the daemons.
    pub(super) cpu_seconds: f64,
}

impl Carried {
    pub(super) fn gbit_per_s(&self) -> f64 {
        self.bytes as f64 * 8e-9 / self.seconds
    }

    pub(super) fn mpps(&self) -> f64 {
        self.datagrams as f64 / 1e6 / self.seconds
    }

    /// CPU-seconds of the daemons for each gigabit of payload.
    pub(super) fn cpu_per_gbit(&self) -> f64 {
        self.cpu_seconds / (self.bytes as f64 * 8e-9)
    }
}

#[derive(Debug, Default)]
struct Counters {
    stop: AtomicBool,
    bytes: AtomicU64,
    datagrams: AtomicU64,
    reordered: AtomicU64,
}

impl Counters {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Lets the window pass, `meanwhile` beside it.
    fn measure(
        &self,
        window: Window,
        daemons: &[Pid],
        meanwhile: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Carried> {
        pass(window.warm_up)?;
        let look = || {
            let cpu =
                daemons.iter().map(|pid| processor_time(*pid)).sum::<anyhow::Result<Duration>>();
            let (bytes, datagrams) = (&self.bytes, &self.datagrams);
            let now = Instant::now();
            Ok::<_, anyhow::Error>((
                now,
                bytes.load(Ordering::Relaxed),
                datagrams.load(Ordering::Relaxed),
                cpu?,
            ))
        };
        let before = look()?;
        meanwhile()?;
        pass(window.length.saturating_sub(before.0.elapsed()))?;
        let after = look()?;
        if after.1 == before.1 {
            bail!("nothing arrived");
        }
        Ok(Carried {
            bytes: after.1 - before.1,
            datagrams: after.2 - before.2,
            seconds: (after.0 - before.0).as_secs_f64(),
            cpu_seconds: (after.3 - before.3).as_secs_f64(),
            ..Carried::default()
        })
    }
}

/// What takes longer to connect does not connect.
const CONNECT: Duration = Duration::from_secs(5);
const TCP_WRITE: usize = 128 * 1024;
const TCP_READ: usize = 512 * 1024;

/// Sends over one TCP connection for each way, all at once.
pub(super) fn tcp(
    ways: &[Way<'_>],
    congestion: Congestion,
    window: Window,
    daemons: &[Pid],
    meanwhile: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Carried> {
    let streams =
        ways.iter().map(|way| connect(way, congestion)).collect::<anyhow::Result<Vec<_>>>()?;
    let counters = Counters::default();
    std::thread::scope(|scope| {
        for (sender, receiver) in &streams {
            scope.spawn(|| {
                let mut sender: &TcpStream = sender;
                let chunk = vec![0x5a; TCP_WRITE];
                while !counters.stopped() && sender.write_all(&chunk).is_ok() {}
            });
            scope.spawn(|| {
                while let Ok(length @ 1..) = discard(receiver) {
                    counters.bytes.fetch_add(length as u64, Ordering::Relaxed);
                }
            });
        }
        let carried = counters.measure(window, daemons, meanwhile);
        counters.stop.store(true, Ordering::Relaxed);
        for (sender, receiver) in &streams {
            // Fails only where it is shut already.
            let _ = sender.shutdown(Shutdown::Both);
            let _ = receiver.shutdown(Shutdown::Both);
        }
        carried
    })
}

/// Sockets belong to the namespace that they were made in.
fn connect(way: &Way<'_>, congestion: Congestion) -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = way.to.run(|| Ok(TcpListener::bind((way.address, 0))?))?;
    let target = listener.local_addr()?;
    let sender = way.from.run(|| {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
        let name = congestion.name();
        socket
            .set_tcp_congestion(name.as_bytes())
            .with_context(|| format!("this kernel does not offer TCP {name} here"))?;
        socket
            .connect_timeout(&target.into(), CONNECT)
            .with_context(|| format!("cannot connect to {target}"))?;
        Ok(TcpStream::from(socket))
    })?;
    let (receiver, _) = listener.accept()?;
    Ok((sender, receiver))
}

/// Takes what has arrived without copying it; 0 at the end.
fn discard(stream: &TcpStream) -> std::io::Result<usize> {
    use std::os::fd::AsRawFd;
    // SAFETY: with MSG_TRUNC a TCP socket writes nothing to the buffer, which is none.
    let length =
        unsafe { libc::recv(stream.as_raw_fd(), std::ptr::null_mut(), TCP_READ, libc::MSG_TRUNC) };
    if length < 0 { Err(std::io::Error::last_os_error()) } else { Ok(length as usize) }
}

/// Receive calls at once.
const UDP_SLOTS: usize = 8;
/// Datagrams at once.
const UDP_BURST: usize = 64;
/// How often an idle sink looks whether it is over.
const LOOK: u16 = 50;

/// Sends numbered datagrams of `size` bytes as fast as it goes, each way its own.
pub(super) fn udp(
    ways: &[Way<'_>],
    size: usize,
    window: Window,
    daemons: &[Pid],
) -> anyhow::Result<Carried> {
    let sockets = sockets(ways)?;
    let counters = &Counters::default();
    std::thread::scope(|scope| {
        for (sender, sink, to) in sockets {
            scope.spawn(move || send(sender, to, size, counters));
            scope.spawn(move || receive(sink, counters, false));
        }
        let carried = counters.measure(window, daemons, || Ok(()));
        counters.stop.store(true, Ordering::Relaxed);
        carried
    })
    .map(|carried| Carried {
        reordered: counters.reordered.load(Ordering::Relaxed),
        arrived: counters.datagrams.load(Ordering::Relaxed),
        ..carried
    })
}

/// Datagrams of how many bytes, when only their order matters.
const ORDERED_BYTES: usize = 200;
/// How long their number may take to arrive.
const ORDER_LIMIT: Duration = Duration::from_secs(240);

/// Sends numbered datagrams each way until so many have arrived; every flow is answered all the
/// while.
pub(super) fn order(ways: &[Way<'_>], datagrams: u64) -> anyhow::Result<Carried> {
    let sockets = sockets(ways)?;
    let counters = &Counters::default();
    let begun = Instant::now();
    let arrived = || counters.datagrams.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        for (sender, sink, to) in sockets {
            scope.spawn(move || send(sender, to, ORDERED_BYTES, counters));
            scope.spawn(move || receive(sink, counters, true));
        }
        let mut passed = Ok(());
        while passed.is_ok() && arrived() < datagrams && begun.elapsed() < ORDER_LIMIT {
            passed = pass(Duration::from_millis(100));
        }
        counters.stop.store(true, Ordering::Relaxed);
        passed
    })?;
    if arrived() < datagrams {
        bail!("only {} of {datagrams} datagrams arrived", arrived());
    }
    Ok(Carried {
        bytes: counters.bytes.load(Ordering::Relaxed),
        datagrams: arrived(),
        reordered: counters.reordered.load(Ordering::Relaxed),
        arrived: arrived(),
        seconds: begun.elapsed().as_secs_f64(),
        ..Carried::default()
    })
}

/// For each way its sender, its sink, and where that listens.
fn sockets(ways: &[Way<'_>]) -> anyhow::Result<Vec<(Udp, Udp, SocketAddr)>> {
    let single = Offloads { udp_segment: false, ..Offloads::default() };
    let open = |namespace: &Namespace| namespace.run(|| Ok(open_udp_with(0, 0, single)?));
    let of_way = |way: &Way<'_>| {
        let (sender, sink) = (open(way.from)?, open(way.to)?);
        let to = SocketAddr::new(way.address, sink.port());
        Ok((sender, sink, to))
    };
    ways.iter().map(of_way).collect()
}

fn send(mut socket: Udp, to: SocketAddr, size: usize, counters: &Counters) {
    let mut batch = SendBatch::new(UDP_BURST * size, UDP_BURST);
    let drops = Drops::default();
    let mut datagram = vec![0x5a; size];
    let mut number = 0u64;
    while !counters.stopped() {
        batch.clear();
        for _ in 0..UDP_BURST {
            datagram[..8].copy_from_slice(&number.to_be_bytes());
            number += 1;
            batch.push(to.into(), &datagram);
        }
        socket.send(Instant::now(), &batch, &drops);
    }
}

/// Takes what arrives; if `answers`, a small datagram goes back for each batch. Nobody reads those.
fn receive(mut socket: Udp, counters: &Counters, answers: bool) {
    let mut batch = RecvBatch::new(UDP_SLOTS);
    let mut answer = SendBatch::new(ORDERED_BYTES, 1);
    let drops = Drops::default();
    let mut next = 0u64;
    loop {
        batch.clear();
        if socket.receive(Ready::ALL, &mut batch, &drops).is_err() {
            return;
        }
        let (mut bytes, mut datagrams, mut reordered) = (0, 0, 0);
        for received in batch.received() {
            let Ok(train) = batch.datagrams(received) else { continue };
            for datagram in train.iter() {
                let Some(number) = datagram.first_chunk() else { continue };
                let number = u64::from_be_bytes(*number);
                reordered += u64::from(number < next);
                next = next.max(number + 1);
                bytes += datagram.len() as u64;
                datagrams += 1;
            }
        }
        if answers && let Some(first) = batch.received().first() {
            answer.clear();
            answer.push(first.from, &[0x5a; 8]);
            socket.send(Instant::now(), &answer, &drops);
        }
        counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        counters.datagrams.fetch_add(datagrams, Ordering::Relaxed);
        counters.reordered.fetch_add(reordered, Ordering::Relaxed);
        if datagrams == 0 {
            if counters.stopped() {
                return;
            }
            let fds = socket.fds();
            let mut fds: Vec<_> =
                fds.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
            // What fails is tried again: the next receive says what is wrong.
            let _ = poll(&mut fds, PollTimeout::from(LOOK));
        }
    }
}
