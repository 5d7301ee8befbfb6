//! Flood of handshake initiations from forged sources, and a counter of the cookie replies to it.
//!
//! Each initiation is valid for the victim's key, but from a key that the victim does not know.
//! Such an initiation costs the victim as much processor time as any.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use towline_agent::keys::Wireguard;
use towline_proto::id::WireguardKey;
use towline_wireguard::{HANDSHAKE_BYTES, Inputs, Secrets, Session};

use crate::lab::interrupt;
use crate::lab::namespace::Namespace;

/// Number of different initiations, which are sent repeatedly.
const STRANGERS: u32 = 64;
/// Number of packets that are sent at once.
const BURST: u32 = 100;
/// Pause after each burst. With [`BURST`], this makes about 20,000 packets per second.
const PAUSE: Duration = Duration::from_millis(5);
const IP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
/// Type and length in bytes of a cookie reply.
const COOKIE: (u8, usize) = (3, 64);

/// Sends the flood from `host` to `target`, whose key is `key`, until `stop` is set. If `also` is
/// set, it is the source of every second packet. Returns the number of packets that were sent.
pub(in crate::lab::scenario) fn run(
    host: &Namespace,
    target: SocketAddr,
    key: WireguardKey,
    also: Option<Ipv4Addr>,
    stop: &AtomicBool,
) -> anyhow::Result<u64> {
    let IpAddr::V4(victim) = target.ip() else { bail!("the flood supports only IPv4") };
    let mut packets = Vec::new();
    for index in 0..STRANGERS {
        let stranger = Secrets::new(Wireguard::generate()?.secret().clone());
        let mut message = [0; HANDSHAKE_BYTES];
        let mut session = Session::new(&stranger, key, None, index);
        let len = Inputs::system(Instant::now(), |inputs| session.initiate(inputs, &mut message));
        // The kernel fills in the total length, identification and checksum.
        let mut packet = vec![0; IP_HEADER + UDP_HEADER];
        packet[0] = 0x45;
        packet[8] = 64;
        packet[9] = libc::IPPROTO_UDP as u8;
        packet[16..20].copy_from_slice(&victim.octets());
        packet[20..22].copy_from_slice(&4_000u16.to_be_bytes());
        packet[22..24].copy_from_slice(&target.port().to_be_bytes());
        packet[24..26].copy_from_slice(&((UDP_HEADER + len) as u16).to_be_bytes());
        packet.extend_from_slice(&message[..len]);
        packets.push(packet);
    }
    host.run(|| {
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        let to = SockAddr::from(SocketAddr::new(target.ip(), 0));
        let mut sent = 0u64;
        while !stop.load(Ordering::Relaxed) && !interrupt::raised() {
            for _ in 0..BURST {
                let packet = &mut packets[sent as usize % STRANGERS as usize];
                // Sources in 198.18.0.0/16. Each occurs a few times per minute.
                let [.., high, low] = (sent as u32).to_be_bytes();
                let source = match also {
                    Some(also) if sent.is_multiple_of(2) => also.octets(),
                    _ => [198, 18, high, low],
                };
                packet[12..16].copy_from_slice(&source);
                // Some packets are lost if a queue is full, as in any flood.
                if raw.send_to(packet, &to).is_ok() {
                    sent += 1;
                }
            }
            std::thread::sleep(PAUSE);
        }
        Ok(sent)
    })
}

/// Counts the cookie replies that arrive at `host`, until `stop` is set.
pub(super) fn count_cookies(
    host: &Namespace,
    cookies: &AtomicU64,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    host.run(|| {
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP))?;
        raw.set_read_timeout(Some(Duration::from_millis(50)))?;
        let mut buffer = [MaybeUninit::uninit(); 2048];
        while !stop.load(Ordering::Relaxed) && !interrupt::raised() {
            let len = match raw.recv(&mut buffer) {
                Ok(len) => len,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::TimedOut
                            | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            // SAFETY: the kernel initialised the first `len` bytes.
            let bytes = unsafe { buffer[..len].assume_init_ref() };
            let message = bytes.get(IP_HEADER + UDP_HEADER..).unwrap_or_default();
            if message.first() == Some(&COOKIE.0) && message.len() == COOKIE.1 {
                cookies.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    })
}
