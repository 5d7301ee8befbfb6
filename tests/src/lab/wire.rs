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

use super::interference::Interference;
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
    /// Treatment of datagrams that were sent together (`UDP_SEGMENT`).
    pub together: Together,
}

/// How a link treats datagrams that were sent together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Together {
    /// The link takes single ones, so that the kernel splits them before.
    #[default]
    Split,
    /// The link takes them as they are.
    Whole,
    /// The link takes them as they are, and damages all but the first one, as some network cards do when
    /// they split them.
    Damaged,
}

impl Together {
    /// Returns the length of the header before each frame of a TAP link, in bytes.
    fn header_bytes(self) -> usize {
        /// Size of `virtio_net_hdr` (`linux/virtio_net.h`).
        const VIRTIO: usize = 10;
        if self == Self::Split { 0 } else { VIRTIO }
    }
}

/// A simulated link. Dropping it removes it.
#[derive(Debug)]
pub struct Cable {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// Maximum number of frames in flight in one direction.
const UNDER_WAY: usize = 4096;
/// Largest frame: 64 KiB of IP, and the headers before it.
const FRAME_BYTES: usize = 65_536 + 64;
/// Interval at which a thread checks whether to stop.
const LOOK: Duration = Duration::from_millis(100);

impl Cable {
    /// Creates the link `a.1` in the namespace `a.0` and the link `b.1` in `b.0`, and connects
    /// them. `interference` treats what is sent from `a` to `b`.
    pub fn lay(
        a: (&Namespace, &str),
        b: (&Namespace, &str),
        weather: Weather,
        interference: Option<&Arc<Interference>>,
    ) -> anyhow::Result<Self> {
        let [a, b] =
            [a, b].map(|(namespace, name)| namespace.run(|| open_tap(name, weather.together)));
        let (a, b) = (a?, b?);
        let stop = Arc::new(AtomicBool::new(false));
        let ways = [(a.try_clone()?, b.try_clone()?), (b, a)];
        let mut threads = Vec::new();
        for (number, (from, to)) in ways.into_iter().enumerate() {
            let stop = stop.clone();
            let seed = 0x9e37_79b9_7f4a_7c15 ^ (from.as_raw_fd() as u64) << 8 ^ number as u64;
            let interference = interference.filter(|_| number == 0).cloned();
            let carry = move || carry(from, to, weather, interference.as_deref(), seed, &stop);
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
fn carry(
    mut from: File,
    mut to: File,
    weather: Weather,
    interference: Option<&Interference>,
    mut random: u64,
    stop: &AtomicBool,
) {
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut frame = vec![0; FRAME_BYTES];
    let header_bytes = weather.together.header_bytes();
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
                    let (header, packet) = frame[..len].split_at_mut(header_bytes.min(len));
                    if weather.is_congested {
                        mark_congestion(packet);
                    }
                    if weather.together == Together::Damaged {
                        damage_later_datagrams(header, packet);
                    }
                    if lost {
                        continue;
                    }
                    let due = Instant::now() + weather.delay;
                    let frames = match interference {
                        Some(interference) => interference.treat(&frame[..len]),
                        None => vec![(Duration::ZERO, frame[..len].into())],
                    };
                    for (later, frame) in frames {
                        if under_way.len() < UNDER_WAY {
                            let due = due + later;
                            let at = under_way.partition_point(|(other, _)| *other <= due);
                            under_way.insert(at, (due, frame));
                        }
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

/// Damages the datagrams in an Ethernet frame of IPv4 that were sent together, except the first one. Their
/// checksums are added later, so that only decryption notices. `header` is the virtio header of the frame.
fn damage_later_datagrams(header: &[u8], frame: &mut [u8]) {
    /// `VIRTIO_NET_HDR_GSO_UDP_L4` (`linux/virtio_net.h`).
    const UDP_L4: u8 = 5;
    /// Headers of Ethernet, IPv4 without options, and UDP.
    const HEADERS: usize = 14 + 20 + 8;
    let &[_, UDP_L4, _, _, low, high, ..] = header else { return };
    let first = usize::from(u16::from_ne_bytes([low, high]));
    if frame.get(12..15) == Some(&[8, 0, 0x45]) {
        // The same on each link: the second one does not repair what the first one damaged.
        frame.iter_mut().skip(HEADERS + first).for_each(|byte| *byte = 0);
    }
}

/// Creates a TAP link in the calling thread's namespace; the link exists while the file is open.
fn open_tap(name: &str, together: Together) -> anyhow::Result<File> {
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
    let header = if together == Together::Split { 0 } else { libc::IFF_VNET_HDR };
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | header) as libc::c_short;
    // SAFETY: the request is an `ifreq`, which lives until the call returns.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result == -1 {
        let error = std::io::Error::last_os_error();
        return Err(error).with_context(|| format!("cannot create the TAP link {name}"));
    }
    if together != Together::Split {
        let offloads = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        // SAFETY: the argument is a number, which the kernel does not follow.
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, offloads as usize) };
        if result == -1 {
            let error = std::io::Error::last_os_error();
            return Err(error)
                .context("a TAP link cannot take UDP datagrams that were sent together");
        }
    }
    Ok(file)
}
