//! Traffic generators and receivers that use as little processor time as possible.
//!
//! TCP: the sender writes 128 KiB at a time, and the receiver lets the kernel discard the data.
//! UDP: the sender sends numbered datagrams with `sendmmsg`, each in its own message, as fast as it
//! can. The receiver gets many at a time (`UDP_GRO`). The sender does not use segmentation offload,
//! like most programs that send small datagrams, so the tunnel receives each datagram separately.

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

use super::quiet::Ticks;
use crate::lab::interrupt::sleep;
use crate::lab::namespace::Namespace;
use crate::lab::process::processor_time;

/// Duration of a measurement, and of the traffic before it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) warm_up: Duration,
    pub(super) length: Duration,
}

/// Congestion control of the TCP senders. It is set explicitly, because the queues in a tunnel
/// depend on it, and so do the results.
#[derive(Debug, Clone, Copy)]
pub(super) enum Congestion {
    /// CUBIC (RFC 9438), the default of Linux.
    Cubic,
    /// BBR, which many servers use. It is a module that not every kernel has.
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
    /// Address of the host `to`.
    pub(super) address: IpAddr,
}

/// Traffic that arrived within a window.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Carried {
    /// Payload in bytes.
    pub(super) bytes: u64,
    /// Number of UDP datagrams.
    pub(super) datagrams: u64,
    /// Number of UDP datagrams that arrived after one with a higher number, in the whole run.
    pub(super) reordered: u64,
    /// Number of UDP datagrams that arrived in the whole run.
    pub(super) arrived: u64,
    /// Length of the window in seconds.
    pub(super) seconds: f64,
    /// Processor time of the daemons in seconds.
    pub(super) cpu_seconds: f64,
    /// Processor time of the whole machine in seconds: daemons, senders, receivers and the kernel.
    pub(super) machine_seconds: f64,
}

/// Processor time for the traffic of a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cpu {
    /// CPU-seconds of both daemons for each gigabit of payload.
    pub(super) daemons: f64,
    /// CPU-seconds of the whole machine for each gigabit of payload.
    pub(super) machine: f64,
}

impl Carried {
    /// Returns the throughput in Gbit/s of payload.
    pub(super) fn gbit_per_s(&self) -> f64 {
        self.bytes as f64 * 8e-9 / self.seconds
    }

    /// Returns the rate in millions of datagrams per second.
    pub(super) fn mpps(&self) -> f64 {
        self.datagrams as f64 / 1e6 / self.seconds
    }

    /// Returns the processor time for each gigabit of payload.
    pub(super) fn cpu_per_gbit(&self) -> Cpu {
        let gbit = self.bytes as f64 * 8e-9;
        Cpu { daemons: self.cpu_seconds / gbit, machine: self.machine_seconds / gbit }
    }
}

/// Counters that the senders and receivers of a run share.
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

    /// Waits for the length of the window, and runs `meanwhile` during it. Returns the traffic
    /// within it.
    fn measure(
        &self,
        window: Window,
        daemons: &[Pid],
        meanwhile: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Carried> {
        sleep(window.warm_up)?;
        let sample = || {
            let cpu =
                daemons.iter().map(|pid| processor_time(*pid)).sum::<anyhow::Result<Duration>>();
            let (bytes, datagrams) = (&self.bytes, &self.datagrams);
            let now = Instant::now();
            Ok::<_, anyhow::Error>((
                now,
                bytes.load(Ordering::Relaxed),
                datagrams.load(Ordering::Relaxed),
                cpu?,
                Ticks::read()?,
            ))
        };
        let before = sample()?;
        meanwhile()?;
        sleep(window.length.saturating_sub(before.0.elapsed()))?;
        let after = sample()?;
        if after.1 == before.1 {
            bail!("no data arrived");
        }
        Ok(Carried {
            bytes: after.1 - before.1,
            datagrams: after.2 - before.2,
            seconds: (after.0 - before.0).as_secs_f64(),
            cpu_seconds: (after.3 - before.3).as_secs_f64(),
            machine_seconds: after.4.worked_since(&before.4),
            ..Carried::default()
        })
    }
}

/// Limit for a TCP connection to be established.
const CONNECT: Duration = Duration::from_secs(5);
/// Size of a write to a TCP socket, in bytes.
const TCP_WRITE: usize = 128 * 1024;
/// Largest read from a TCP socket, in bytes.
const TCP_READ: usize = 512 * 1024;

/// Sends over one TCP connection for each way, all at the same time.
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
            // Fails only if the socket is already shut down.
            let _ = sender.shutdown(Shutdown::Both);
            let _ = receiver.shutdown(Shutdown::Both);
        }
        carried
    })
}

/// Opens a connection. A socket belongs to the network namespace in which it is created.
fn connect(way: &Way<'_>, congestion: Congestion) -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = way.to.run(|| Ok(TcpListener::bind((way.address, 0))?))?;
    let target = listener.local_addr()?;
    let sender = way.from.run(|| {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
        let name = congestion.name();
        socket
            .set_tcp_congestion(name.as_bytes())
            .with_context(|| format!("this kernel does not offer TCP congestion control {name}"))?;
        socket
            .connect_timeout(&target.into(), CONNECT)
            .with_context(|| format!("cannot connect to {target}"))?;
        Ok(TcpStream::from(socket))
    })?;
    let (receiver, _) = listener.accept()?;
    Ok((sender, receiver))
}

/// Discards the data that has arrived, without copying it. Returns its length, 0 at the end.
fn discard(stream: &TcpStream) -> std::io::Result<usize> {
    use std::os::fd::AsRawFd;
    // SAFETY: with MSG_TRUNC, a TCP socket writes nothing to the buffer, so it may be null.
    let length =
        unsafe { libc::recv(stream.as_raw_fd(), std::ptr::null_mut(), TCP_READ, libc::MSG_TRUNC) };
    if length < 0 { Err(std::io::Error::last_os_error()) } else { Ok(length as usize) }
}

/// Number of receive buffers.
const UDP_SLOTS: usize = 8;
/// Number of datagrams in one send call.
const UDP_BURST: usize = 64;
/// Interval at which an idle receiver checks whether the run is over, in milliseconds.
const LOOK: u16 = 50;

/// Sends numbered datagrams of `size` bytes on each way, as fast as possible.
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

/// Size of a datagram when only the order matters, in bytes.
const ORDERED_BYTES: usize = 200;
/// Limit for all datagrams to arrive when only the order matters.
const ORDER_LIMIT: Duration = Duration::from_secs(240);

/// Sends numbered datagrams on each way until this many have arrived in total. The receivers answer
/// all the time.
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
            passed = sleep(Duration::from_millis(100));
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

/// Returns for each way the sending socket, the receiving socket, and the receiver's address.
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

/// Sends numbered datagrams until the run is over.
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

/// Receives datagrams until the run is over. With `answers`, sends back a small datagram for each
/// batch, which no program reads.
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
            let Ok(run) = batch.datagrams(received) else { continue };
            for datagram in run.iter() {
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
            // If polling fails, the next receive call returns the error.
            let _ = poll(&mut fds, PollTimeout::from(LOOK));
        }
    }
}
