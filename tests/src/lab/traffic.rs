//! TCP transfers that verify every byte, with a pattern that a capture can recognise.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use ring::rand::{SecureRandom, SystemRandom};
use socket2::{Domain, Protocol, Socket, Type};

use super::interrupt;
use super::namespace::{Namespace, join};

/// Size of a cell of the pattern in bytes.
pub const CELL: usize = 64;
/// Size in bytes of the mark, which is the same in every cell and which a capture searches for.
pub const MARK: usize = 16;

/// A stream of cells: the mark, the cell's number, and bytes derived from that number. Any 79 bytes
/// of the stream contain the mark, and a byte that is lost, duplicated, moved or changed is
/// detected.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    mark: [u8; MARK],
}

/// Results of a transfer.
#[derive(Debug, Clone, Copy)]
pub struct Transferred {
    /// Bytes that arrived unchanged.
    pub bytes: u64,
    /// Time from the first byte written to the last byte read.
    pub took: Duration,
}

impl Transferred {
    /// Returns the throughput of payload in megabits per second.
    pub fn mbit_per_s(&self) -> f64 {
        self.bytes as f64 * 8.0 / 1e6 / self.took.as_secs_f64().max(1e-9)
    }
}

impl Pattern {
    /// Generates a pattern with a new random mark, which occurs nowhere else.
    pub fn random() -> anyhow::Result<Self> {
        Ok(Self { mark: random_bytes()? })
    }

    /// Returns the mark that a capture searches for.
    pub fn mark(&self) -> &[u8; MARK] {
        &self.mark
    }

    /// Returns the cell with this number.
    pub fn cell(&self, number: u64) -> [u8; CELL] {
        let mut cell = [0; CELL];
        cell[..MARK].copy_from_slice(&self.mark);
        for (index, word) in cell[MARK..].chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&mix(number, index as u64).to_be_bytes());
        }
        cell
    }

    /// Fills whole cells, starting with cell number `first`.
    pub fn fill(&self, first: u64, cells: &mut [u8]) {
        for (number, cell) in (first..).zip(cells.chunks_exact_mut(CELL)) {
            cell.copy_from_slice(&self.cell(number));
        }
    }

    /// Returns whether these whole cells are those that start at number `first`.
    pub fn verify(&self, first: u64, cells: &[u8]) -> bool {
        (first..).zip(cells.chunks_exact(CELL)).all(|(number, cell)| cell == self.cell(number))
    }
}

/// Returns unpredictable bytes.
pub fn random_bytes<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| anyhow!("cannot get random bytes from the system"))?;
    Ok(bytes)
}

/// Returns the given seed, or else a random one of 32 bits, which is short to type.
pub fn given_or_random(seed: Option<u64>) -> anyhow::Result<u64> {
    match seed {
        Some(seed) => Ok(seed),
        None => Ok(u32::from_be_bytes(random_bytes()?).into()),
    }
}

/// Sends `bytes` (rounded up to whole cells) over one TCP connection from a host to an address of
/// another, then as many back. Verifies both directions and returns their results.
///
/// # Errors
/// If there is no connection, no progress for [`STALL`], a byte that changed, or Ctrl-C.
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

/// Transfers as [`tcp_both_ways`] does, where the client connects to another address than the
/// server listens on, because of a NAT between them.
///
/// # Errors
/// The errors of [`tcp_both_ways`].
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
            // The client may have failed; `accept` then ends at its time limit.
            let _ = bound.send(listener.local_addr()?);
            let mut stream = accept(&listener)?;
            let there = receive(&mut stream, cells, pattern, progress)?;
            send(&mut stream, cells, pattern)?;
            Ok(there)
        })?;
        let client = from.thread(scope, "tcp-client", move || {
            let Ok(bound) = when_bound.recv() else { bail!("the server is not listening") };
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

/// Time without progress after which a stream counts as broken.
pub const STALL: Duration = Duration::from_secs(60);

/// Bytes that are generated, written, read or verified at once; a multiple of [`CELL`].
const CHUNK: usize = 256 * 1024;

/// Interval at which a blocked socket checks for Ctrl-C.
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

/// Receives and verifies `cells` cells. Returns when the last one arrived.
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
            bail!("the received bytes differ from byte {} on", number * CELL as u64);
        }
        number += (whole / CELL) as u64;
        buffer.copy_within(whole..held, 0);
        held -= whole;
        progress(number * CELL as u64);
    }
    Ok(Instant::now())
}

/// Repeats a blocking call, which times out every [`LOOK`], until it succeeds or [`STALL`] passed.
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

/// Mixes both inputs with the finaliser of splitmix64: it is cheap, and all words of a stream
/// differ.
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
        assert!(!pattern.verify(3, &cells), "a duplicated cell");
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
