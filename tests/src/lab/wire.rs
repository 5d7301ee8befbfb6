//! A simulated link with delay and loss in userspace: two TAP links, and two threads that carry
//! frames between them. Many kernels have no netem.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::namespace::Namespace;
use super::ping::checksum;

/// Delay, loss and congestion of a link, in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Weather {
    /// One-way delay of each frame.
    pub delay: Duration,
    /// Number of frames out of 100,000 that are lost.
    pub lost: u32,
    /// True if each IPv4 packet whose endpoints understand it is marked as congested (ECN, RFC 3168).
    pub is_congested: bool,
    /// True if datagrams that were sent together (`UDP_SEGMENT`) are damaged, except the first one, as some
    /// network cards do when they split them.
    pub damages_trains: bool,
}

/// A simulated link. Dropping it removes it.
#[derive(Debug)]
pub struct Cable {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// Maximum number of frames in flight in one direction.
const UNDER_WAY: usize = 4096;
const FRAME_BYTES: usize = 65_536;
/// Interval at which a thread checks whether to stop.
const LOOK: Duration = Duration::from_millis(100);

impl Cable {
    /// Creates the link `a.1` in the namespace `a.0` and the link `b.1` in `b.0`, and connects
    /// them.
    pub fn lay(
        a: (&Namespace, &str),
        b: (&Namespace, &str),
        weather: Weather,
    ) -> anyhow::Result<Self> {
        let [a, b] = [a, b].map(|(namespace, name)| namespace.run(|| open_tap(name)));
        let (a, b) = (a?, b?);
        let stop = Arc::new(AtomicBool::new(false));
        let ways = [(a.try_clone()?, b.try_clone()?), (b, a)];
        let mut threads = Vec::new();
        for (number, (from, to)) in ways.into_iter().enumerate() {
            let stop = stop.clone();
            let seed = 0x9e37_79b9_7f4a_7c15 ^ (from.as_raw_fd() as u64) << 8 ^ number as u64;
            let carry = move || carry(from, to, weather, seed, &stop);
            threads.push(std::thread::Builder::new().name("cable".to_owned()).spawn(carry)?);
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Carries frames from one TAP link to the other until `stop` is set.
fn carry(mut from: File, mut to: File, weather: Weather, mut random: u64, stop: &AtomicBool) {
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut frame = vec![0; FRAME_BYTES];
    while !stop.load(Ordering::Relaxed) {
        let next = under_way
            .front()
            .map_or(LOOK, |(due, _)| due.saturating_duration_since(Instant::now()).min(LOOK));
        // Rounded up, since waking too early would mean waking twice.
        let next = next + Duration::from_micros(999);
        let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(next).unwrap_or(PollTimeout::ZERO);
        let _ = poll(&mut fds, timeout);
        loop {
            match from.read(&mut frame) {
                Ok(len) => {
                    // xorshift64, Marsaglia 2003.
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let lost = random % 100_000 < u64::from(weather.lost);
                    if weather.is_congested {
                        mark_congestion(&mut frame[..len]);
                    }
                    if weather.damages_trains {
                        damage_later_segment(&mut frame[..len]);
                    }
                    if !lost && under_way.len() < UNDER_WAY {
                        under_way.push_back((Instant::now() + weather.delay, frame[..len].into()));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The link is down: it comes up again, or the lab ends.
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(1));
                    break;
                }
            }
        }
        while under_way.front().is_some_and(|(due, _)| *due <= Instant::now()) {
            if let Some((_, frame)) = under_way.pop_front() {
                let _ = to.write(&frame);
            }
        }
    }
}

/// Marks an IPv4 packet in an Ethernet frame as congested, if its endpoints understand that.
fn mark_congestion(frame: &mut [u8]) {
    const ETHERNET: usize = 14;
    let Some((ethernet, packet)) = frame.split_at_mut_checked(ETHERNET) else { return };
    if ethernet[12..] != [8, 0] || packet.len() < 20 || !matches!(packet[1] & 3, 1 | 2) {
        return;
    }
    packet[1] |= 3;
    packet[10..12].fill(0);
    let sum = checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Damages the UDP datagram in an Ethernet frame if it is one of several that were sent together over
/// IPv4, except the first one. The kernel, which splits them before this link, numbers them from 0;
/// what is sent by itself and must not be fragmented has the number 0 (RFC 6864).
fn damage_later_segment(frame: &mut [u8]) {
    const ETHERNET: usize = 14;
    const HEADERS: usize = 28;
    const DO_NOT_FRAGMENT: u8 = 0x40;
    let Some((ethernet, packet)) = frame.split_at_mut_checked(ETHERNET) else { return };
    let is_udp = ethernet[12..] == [8, 0] && packet.len() > HEADERS && packet[0] == 0x45;
    if !is_udp || packet[9] != libc::IPPROTO_UDP as u8 || packet[6] != DO_NOT_FRAGMENT {
        return;
    }
    if packet[4..6] != [0, 0] {
        // Without a checksum the damage is not noticed before the payload is decrypted.
        packet[26..28].fill(0);
        packet[HEADERS..].iter_mut().for_each(|byte| *byte = !*byte);
    }
}

/// Creates a TAP link in the calling thread's namespace; the link exists while the file is open.
fn open_tap(name: &str) -> anyhow::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun")?;
    // SAFETY: an `ifreq` is plain data; all zero is one of its values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request is an `ifreq`, which lives until the call returns.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result == -1 {
        let error = std::io::Error::last_os_error();
        return Err(error).with_context(|| format!("cannot create the TAP link {name}"));
    }
    Ok(file)
}
