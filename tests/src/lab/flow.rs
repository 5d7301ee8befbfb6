//! Continuous traffic between two nodes: datagrams in both directions, and a TCP connection. It
//! measures the longest interruption.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::interrupt;
use super::namespace::{Namespace, join};

/// Interval between two datagrams of one direction.
pub const TICK: Duration = Duration::from_millis(10);
/// Interval between two messages on the TCP connection.
const WORD: Duration = Duration::from_millis(20);
/// Port of the echo service (RFC 862).
const PORT: u16 = 7;
/// Time without data after which a TCP connection counts as lost.
const LOST: Duration = Duration::from_secs(15);

/// Results of the two ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// Longest time in which a direction carried no datagram.
    pub outage: Duration,
    /// True if the TCP connection carried messages until the end.
    pub tcp_survived: bool,
}

/// One end: its namespace, and its address in the mesh.
pub type End<'a> = (&'a Namespace, IpAddr);

/// Runs `act` while the two ends exchange traffic, and returns its result with theirs.
pub fn while_talking<T>(
    a: End<'_>,
    b: End<'_>,
    action: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Seen)> {
    let done = AtomicBool::new(false);
    let longest = [AtomicU64::new(0), AtomicU64::new(0)];
    std::thread::scope(|scope| {
        let (done, longest) = (&done, &longest);
        let tickers = [(a, b, 0), (b, a, 1)].map(|(here, there, number)| {
            here.0.thread(scope, "tick", move || tick(here.1, there.1, done, &longest[number]))
        });
        let server = b.0.thread(scope, "echo", move || echo(b.1, done))?;
        let client = a.0.thread(scope, "word", move || words(b.1, done))?;
        let acted = action();
        done.store(true, Ordering::Relaxed);
        for ticker in tickers {
            join(ticker?)?;
        }
        // The client decides: a server that was never reached has no result.
        let _ = join(server);
        let tcp_survived = join(client).is_ok();
        let longest = longest.iter().map(|gap| gap.load(Ordering::Relaxed)).max();
        let outage = Duration::from_micros(longest.unwrap_or_default());
        Ok((acted?, Seen { outage, tcp_survived }))
    })
}

fn tick(here: IpAddr, there: IpAddr, done: &AtomicBool, longest: &AtomicU64) -> anyhow::Result<()> {
    let socket = UdpSocket::bind(SocketAddr::new(here, PORT)).context("cannot bind a ticker")?;
    socket.set_read_timeout(Some(TICK / 2))?;
    // Silence at the start counts like any other outage.
    let mut last_reply = Instant::now();
    let mut next = last_reply;
    let mut datagram = [0; 16];
    while !done.load(Ordering::Relaxed) {
        interrupt::check()?;
        if Instant::now() >= next {
            // An error is an outage, which the other end measures.
            let _ = socket.send_to(b"tick", SocketAddr::new(there, PORT));
            next = (next + TICK).max(Instant::now());
        }
        let received = socket.recv_from(&mut datagram).is_ok();
        let now = Instant::now();
        longest.fetch_max((now - last_reply).as_micros() as u64, Ordering::Relaxed);
        if received {
            last_reply = now;
        }
    }
    Ok(())
}

fn echo(here: IpAddr, done: &AtomicBool) -> anyhow::Result<()> {
    let listener = TcpListener::bind(SocketAddr::new(here, PORT))?;
    listener.set_nonblocking(true)?;
    let mut stream = loop {
        interrupt::check()?;
        if done.load(Ordering::Relaxed) {
            return Ok(());
        }
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(LOST))?;
    stream.set_nodelay(true)?;
    let mut word = [0; 8];
    while stream.read_exact(&mut word).is_ok() {
        stream.write_all(&word)?;
    }
    Ok(())
}

fn words(there: IpAddr, done: &AtomicBool) -> anyhow::Result<()> {
    let target = SocketAddr::new(there, PORT);
    let deadline = Instant::now() + LOST;
    let mut stream = loop {
        interrupt::check()?;
        match TcpStream::connect_timeout(&target, LOST) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    stream.set_read_timeout(Some(LOST))?;
    stream.set_nodelay(true)?;
    let mut number = 0u64;
    loop {
        interrupt::check()?;
        // At least one message follows the end of `act`, to prove that the connection still works.
        let last = done.load(Ordering::Relaxed);
        stream.write_all(&number.to_be_bytes())?;
        let mut word = [0; 8];
        stream.read_exact(&mut word).context("the TCP connection is lost")?;
        if u64::from_be_bytes(word) != number {
            bail!("the TCP connection returned other data");
        }
        if last {
            return Ok(());
        }
        number += 1;
        std::thread::sleep(WORD);
    }
}
