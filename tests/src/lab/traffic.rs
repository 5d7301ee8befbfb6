//! TCP transfers that verify every byte, of a pattern that a capture can recognise.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use ring::rand::{SecureRandom, SystemRandom};
use socket2::{Domain, Protocol, Socket, Type};

use super::interrupt;
use super::namespace::{Namespace, join};

/// Bytes in a cell of the pattern.
pub const CELL: usize = 64;
/// Bytes of a cell that are the same in every cell: what a capture looks for.
pub const MARK: usize = 16;

/// A stream of cells: the mark, the cell's number, and bytes mixed from that number. Any 79 bytes
/// of it hold the mark, and a byte that is lost, doubled, moved or changed is noticed.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    mark: [u8; MARK],
}

/// What a transfer showed.
#[derive(Debug, Clone, Copy)]
pub struct Transferred {
    /// Bytes that arrived as they were sent.
    pub bytes: u64,
    /// From the first byte written to the last byte read.
    pub took: Duration,
}

impl Transferred {
    /// Megabits a second of payload.
    pub fn mbit_per_s(&self) -> f64 {
        self.bytes as f64 * 8.0 / 1e6 / self.took.as_secs_f64().max(1e-9)
    }
}

impl Pattern {
    /// A pattern whose mark occurs nowhere else: random, new for each run.
    pub fn random() -> anyhow::Result<Self> {
        Ok(Self { mark: random_bytes()? })
    }

    /// What a capture looks for.
    pub fn mark(&self) -> &[u8; MARK] {
        &self.mark
    }

    /// The cell of this number.
    pub fn cell(&self, number: u64) -> [u8; CELL] {
        let mut cell = [0; CELL];
        cell[..MARK].copy_from_slice(&self.mark);
        for (index, word) in cell[MARK..].chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&mix(number, index as u64).to_be_bytes());
        }
        cell
    }

    /// Fills whole cells, the first of them being number `first`.
    pub fn fill(&self, first: u64, cells: &mut [u8]) {
        for (number, cell) in (first..).zip(cells.chunks_exact_mut(CELL)) {
            cell.copy_from_slice(&self.cell(number));
        }
    }

    /// Whether these whole cells are the ones that begin at number `first`.
    pub fn verify(&self, first: u64, cells: &[u8]) -> bool {
        (first..).zip(cells.chunks_exact(CELL)).all(|(number, cell)| cell == self.cell(number))
    }
}

/// Bytes that nobody can foretell.
pub fn random_bytes<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| anyhow!("the system has no randomness"))?;
    Ok(bytes)
}

/// Sends `bytes` (rounded up to whole cells) over one TCP connection from a host to an address of
/// another, then as many back, each way verified: the figures of both directions.
///
/// # Errors
/// No connection, no progress for [`STALL`], a byte that is not as it was sent, or Ctrl-C.
pub fn tcp_both_ways(
    from: &Namespace,
    to: &Namespace,
    address: IpAddr,
    bytes: u64,
    pattern: Pattern,
    progress: impl Fn(u64) + Sync,
) -> anyhow::Result<[Transferred; 2]> {
    let listen = SocketAddr::new(address, 0);
    transfer(from, to, listen, None, bytes, pattern, &progress)
        .with_context(|| format!("tcp from {} to {address} on {}", from.name(), to.name()))
}

/// As [`tcp_both_ways`], where the client connects to another address than the server listens on: there
/// is a translation between them.
///
/// # Errors
/// As there.
pub fn tcp_between(
    from: &Namespace,
    to: &Namespace,
    listen: SocketAddr,
    target: SocketAddr,
    bytes: u64,
    pattern: Pattern,
) -> anyhow::Result<[Transferred; 2]> {
    transfer(from, to, listen, Some(target), bytes, pattern, &|_| ())
        .with_context(|| format!("tcp from {} to {target}", from.name()))
}

fn transfer(
    from: &Namespace,
    to: &Namespace,
    listen_on: SocketAddr,
    target: Option<SocketAddr>,
    bytes: u64,
    pattern: Pattern,
    progress: &(impl Fn(u64) + Sync),
) -> anyhow::Result<[Transferred; 2]> {
    let cells = bytes.div_ceil(CELL as u64);
    std::thread::scope(|scope| {
        let (bound, when_bound) = std::sync::mpsc::channel();
        let server = to.thread(scope, "tcp-server", move || {
            let listener = listen(listen_on)?;
            // The client may have given up: then accept ends by its time limit.
            let _ = bound.send(listener.local_addr()?);
            let mut stream = accept(&listener)?;
            let there = receive(&mut stream, cells, pattern, progress)?;
            send(&mut stream, cells, pattern)?;
            Ok(there)
        })?;
        let client = from.thread(scope, "tcp-client", move || {
            let Ok(bound) = when_bound.recv() else { bail!("the other end does not listen") };
            let target = target.unwrap_or(bound);
            let mut stream = connect(target)?;
            let begun = Instant::now();
            send(&mut stream, cells, pattern)?;
            let back = receive(&mut stream, cells, pattern, progress)?;
            Ok((begun, back))
        })?;
        let (server, client) = (join(server), join(client));
        let (begun, back_end) = client?;
        let there_end = server?;
        let bytes = cells * CELL as u64;
        anyhow::Ok([
            Transferred { bytes, took: there_end - begun },
            Transferred { bytes, took: back_end - there_end },
        ])
    })
}

/// A stream without progress for this long is broken.
pub const STALL: Duration = Duration::from_secs(10);

/// Bytes that are generated, written, read or verified at once; whole cells.
const CHUNK: usize = 256 * 1024;

/// How often a blocked socket looks for Ctrl-C.
const LOOK: Duration = Duration::from_millis(200);

fn listen(address: SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn accept(listener: &std::net::TcpListener) -> anyhow::Result<std::net::TcpStream> {
    let stream = interrupt::wait_for("tcp connection", STALL, || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    })?;
    stream.set_nonblocking(false)?;
    prepare(&stream)?;
    Ok(stream)
}

fn connect(target: SocketAddr) -> anyhow::Result<std::net::TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
    socket
        .connect_timeout(&target.into(), STALL)
        .with_context(|| format!("cannot connect to {target}"))?;
    let stream = socket.into();
    prepare(&stream)?;
    Ok(stream)
}

fn prepare(stream: &std::net::TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(LOOK))?;
    stream.set_write_timeout(Some(LOOK))
}

fn send(stream: &mut std::net::TcpStream, cells: u64, pattern: Pattern) -> anyhow::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut number = 0;
    while number < cells {
        let now = (cells - number).min((CHUNK / CELL) as u64);
        let chunk = &mut buffer[..now as usize * CELL];
        pattern.fill(number, chunk);
        let mut rest = &*chunk;
        while !rest.is_empty() {
            let written = patiently(|| stream.write(rest)).context("cannot send")?;
            rest = &rest[written..];
        }
        number += now;
    }
    Ok(())
}

/// When the last of `cells` cells arrived.
fn receive(
    stream: &mut std::net::TcpStream,
    cells: u64,
    pattern: Pattern,
    progress: &(impl Fn(u64) + Sync),
) -> anyhow::Result<Instant> {
    let mut buffer = vec![0; CHUNK];
    let mut held = 0;
    let mut number = 0;
    while number < cells {
        let wanted = usize::try_from(cells - number).unwrap_or(usize::MAX).saturating_mul(CELL);
        let end = CHUNK.min(wanted);
        let read = patiently(|| stream.read(&mut buffer[held..end])).context("cannot receive")?;
        if read == 0 {
            bail!("the stream ended after {} of {cells} cells", number);
        }
        held += read;
        let whole = held / CELL * CELL;
        if !pattern.verify(number, &buffer[..whole]) {
            bail!("bytes are not as they were sent, from byte {} on", number * CELL as u64);
        }
        number += (whole / CELL) as u64;
        buffer.copy_within(whole..held, 0);
        held -= whole;
        progress(number * CELL as u64);
    }
    Ok(Instant::now())
}

/// Repeats a blocking call that times out every [`LOOK`], until it succeeds or [`STALL`] passed.
fn patiently<T>(mut call: impl FnMut() -> std::io::Result<T>) -> anyhow::Result<T> {
    let begun = Instant::now();
    loop {
        interrupt::check()?;
        match call() {
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                if begun.elapsed() > STALL {
                    bail!("no progress for {} s", STALL.as_secs());
                }
            }
            result => return Ok(result?),
        }
    }
}

/// The finaliser of splitmix64 over both inputs: cheap, and no two words of a stream are alike.
fn mix(number: u64, index: u64) -> u64 {
    let mut word = (number << 3 | index).wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_notices_every_kind_of_damage() {
        let pattern = Pattern::random().unwrap();
        let mut cells = vec![0; 8 * CELL];
        pattern.fill(3, &mut cells);
        assert!(pattern.verify(3, &cells));
        assert!(!pattern.verify(4, &cells), "cells that moved");
        for index in 0..cells.len() {
            cells[index] ^= 1;
            assert!(!pattern.verify(3, &cells), "a changed byte at {index}");
            cells[index] ^= 1;
        }
        cells.copy_within(CELL..2 * CELL, 0);
        assert!(!pattern.verify(3, &cells), "a doubled cell");
    }

    #[test]
    fn any_79_bytes_hold_the_mark() {
        let pattern = Pattern::random().unwrap();
        let mut cells = vec![0; 4 * CELL];
        pattern.fill(0, &mut cells);
        for window in cells.windows(CELL + MARK - 1) {
            assert!(window.windows(MARK).any(|bytes| bytes == pattern.mark()));
        }
    }
}
