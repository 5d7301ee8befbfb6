//! The bare limit: the framing and offloads of the data plane, with ChaCha20-Poly1305 in place,
//! between two ends that are configured with each other's address. It has no peers, routes,
//! sessions, replay window or timers. The rest is what a userspace tunnel of this design cannot do
//! without. With `--null` nothing is encrypted either: what remains is the cost of the way through
//! the kernel.

use std::net::SocketAddr;
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use towline_core::path::Path;
use towline_dataplane::arena::{HEADROOM, RecvBatch, SendBatch, TunBatch, WriteBatch};
use towline_dataplane::coalesce::Coalescer;
use towline_dataplane::drops::Drops;
use towline_dataplane::headers::IpHeader;
use towline_dataplane::split::Split;
use towline_dataplane::{Ready, TunIo, UdpIo, open_tun, open_udp};
use towline_wireguard::{DATA_HEADER, DATA_OVERHEAD, Segments};

/// Command line options of one end.
#[derive(Debug, clap::Args)]
pub struct Limit {
    /// Name of the TUN link to create.
    #[arg(long)]
    link: String,
    /// UDP port of both ends.
    #[arg(long)]
    port: u16,
    /// Address and port of the other end.
    #[arg(long)]
    to: SocketAddr,
    /// Do not encrypt the packets.
    #[arg(long)]
    null: bool,
}

/// Fixed key of both ends. It is public, so this tunnel protects nothing.
const KEY: [u8; 32] = [0x42; 32];
/// Number of receive buffers.
const SLOTS: usize = 8;
/// Length of the authentication tag in bytes.
const TAG: usize = 16;
/// MTU of the TUN link in bytes, the same as for all subjects.
pub(super) const MTU: usize = 1420;

impl Limit {
    /// Carries packets until the process is killed.
    pub fn run(&self) -> anyhow::Result<()> {
        let mut tun = open_tun(&self.link)?;
        let mut udp = open_udp(self.port, 0)?;
        let key = UnboundKey::new(&CHACHA20_POLY1305, &KEY)
            .map_err(|_| anyhow::anyhow!("cannot create a key from 32 bytes"))?;
        let key = (!self.null).then(|| LessSafeKey::new(key));
        let drops = Drops::default();
        let (mut received, mut writes) = (RecvBatch::new(SLOTS), WriteBatch::new(SLOTS));
        let mut read = TunBatch::new(4, 256);
        let mut out = SendBatch::new(512 * 1024, 256);
        let mut coalescer = Coalescer::new(tun.coalesce());
        let mut counter = 0u64;
        let to = Path::from(self.to).into();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(tun.fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        for fd in udp.fds() {
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
        }
        loop {
            let mut events = [EpollEvent::empty(); 4];
            let ready = match epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => &events[..count],
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let now = Instant::now();
            let is_ready = |what| ready.iter().any(|event| event.data() == what);
            if is_ready(1) {
                received.clear();
                udp.receive(Ready::ALL, &mut received, &drops)?;
                received.swap(&mut writes);
                for datagrams in received.received() {
                    for (at, len) in datagrams.places() {
                        open(key.as_ref(), &mut writes, at, len, &mut coalescer);
                    }
                }
                coalescer.finish(&mut writes);
                tun.write(now, &writes, &drops);
                writes.clear();
            }
            if is_ready(0) {
                read.clear();
                tun.read(&mut read, &drops)?;
                for number in 0..read.packets().len() {
                    let packet = read.packets()[number];
                    let bytes = read.packet_mut(&packet);
                    let Ok(mut segments) = Split::new(bytes, packet.len, &packet.header, MTU)
                    else {
                        continue;
                    };
                    while let Some(len) = segments.next_len() {
                        let Some(spare) = out.spare(len + DATA_OVERHEAD) else {
                            udp.send(now, &out, &drops);
                            out.clear();
                            continue;
                        };
                        seal(key.as_ref(), counter, segments.take(), spare);
                        counter += 1;
                        out.commit(&to, len + DATA_OVERHEAD);
                    }
                }
                udp.send(now, &out, &drops);
                out.clear();
            }
        }
    }
}

/// Returns the nonce of a message counter, as WireGuard builds it.
fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Seals a segment into `to`, in the format of a WireGuard data message. Without a key it stays in
/// clear, with space for a tag.
fn seal(key: Option<&LessSafeKey>, counter: u64, segment: &[u8], to: &mut [u8]) {
    let (header, rest) = to.split_at_mut(DATA_HEADER);
    header[..4].copy_from_slice(&4u32.to_le_bytes());
    header[4..8].fill(0);
    header[8..].copy_from_slice(&counter.to_le_bytes());
    let (text, rest) = rest.split_at_mut(segment.len());
    text.copy_from_slice(segment);
    let Some(key) = key else { return };
    if let Ok(tag) = key.seal_in_place_separate_tag(nonce(counter), Aad::empty(), text) {
        rest[..TAG].copy_from_slice(tag.as_ref());
    }
}

/// Opens the datagram in the bytes `at..at + len` of the block, and adds its inner packet to the
/// coalescer.
fn open(
    key: Option<&LessSafeKey>,
    writes: &mut WriteBatch,
    at: usize,
    len: usize,
    coalescer: &mut Coalescer,
) {
    let datagram = &mut writes.bytes_mut()[at..at + len];
    let Some((header, text)) = datagram.split_first_chunk_mut::<DATA_HEADER>() else { return };
    let mut counter = [0; 8];
    counter.copy_from_slice(&header[8..]);
    let nonce = nonce(u64::from_le_bytes(counter));
    let plain = match key {
        Some(key) => key.open_in_place(nonce, Aad::empty(), text).ok(),
        None => text.split_last_chunk_mut::<TAG>().map(|(plain, _)| plain),
    };
    let Some(plain) = plain else { return };
    if let Some(inner) = IpHeader::parse(plain) {
        coalescer.add(writes, at + DATA_HEADER, &inner);
    }
}

/// The free bytes in front of a packet from the TUN link must have room for a data header.
const _: () = assert!(HEADROOM >= DATA_HEADER);
