//! The switch between machines: QEMU sends each Ethernet frame as a datagram over a Unix socket,
//! and the lab forwards it. It needs no root, and sees every frame.
//!
//! The lab is also the gateway of the network. It answers for the gateway's addresses, so that
//! packets to the rest of the world leave the machine and are counted; then it discards them.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::Context as _;
use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;

use super::witness::{Sent, Witness};
use crate::lab::ping::checksum;

/// IPv4 address of the gateway.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// IPv6 address of the gateway.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

type Mac = [u8; 6];
const GATEWAY_MAC: Mac = [2, 0, 0, 0, 0, 1];
/// Size in bytes of the longest frame that QEMU sends.
const FRAME_BYTES: usize = 65536;

/// A network segment with a port for each machine.
#[derive(Debug)]
pub struct Network {
    ports: Vec<Port>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A port of the segment, to which one machine is connected.
#[derive(Debug, Clone)]
pub struct Port {
    index: usize,
    /// Path of the socket that QEMU binds.
    machine: PathBuf,
    /// Path of the socket that the lab binds.
    ours: PathBuf,
}

#[derive(Debug)]
struct Shared {
    witnesses: Vec<Mutex<Witness>>,
    is_plugged: Vec<AtomicBool>,
    ends: AtomicBool,
}

impl Network {
    /// Creates a segment with `count` ports, whose sockets are in `directory`. Packets of the
    /// networks `mesh` must not appear on it in clear.
    pub fn new(directory: &Path, count: usize, mesh: &[IpNet]) -> anyhow::Result<Self> {
        let mut sockets = Vec::new();
        let mut ports = Vec::new();
        for index in 0..count {
            let ours = directory.join(format!("port{index}"));
            let socket = UnixDatagram::bind(&ours)
                .with_context(|| format!("cannot bind {}", ours.display()))?;
            socket.set_nonblocking(true)?;
            sockets.push(socket);
            ports.push(Port { index, machine: directory.join(format!("nic{index}")), ours });
        }
        let gateways = [IpAddr::V4(GATEWAY_V4), IpAddr::V6(GATEWAY_V6)];
        let shared = Arc::new(Shared {
            witnesses: (0..count).map(|_| Mutex::new(Witness::new(mesh, gateways))).collect(),
            is_plugged: (0..count).map(|_| AtomicBool::new(true)).collect(),
            ends: AtomicBool::new(false),
        });
        let switch = Switch {
            sockets,
            peers: ports.iter().map(|port| port.machine.clone()).collect(),
            learned: HashMap::new(),
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new()
            .name("switch".to_owned())
            .spawn(move || switch.run())
            .context("cannot start the switch")?;
        Ok(Self { ports, shared, thread: Some(thread) })
    }

    /// Returns a port of the segment.
    pub fn port(&self, index: usize) -> Port {
        self.ports[index].clone()
    }

    /// Returns what the machine at `port` sent since the last [`Self::reset`].
    pub fn sent(&self, port: &Port) -> Sent {
        self.shared.witnesses[port.index].lock().sent()
    }

    /// Resets the counts of all ports.
    pub fn reset(&self) {
        for witness in &self.shared.witnesses {
            witness.lock().reset();
        }
    }

    /// Connects or disconnects a port. A disconnected port passes nothing, while the machine's
    /// carrier stays up.
    pub fn plug(&self, port: &Port, is_plugged: bool) {
        self.shared.is_plugged[port.index].store(is_plugged, Ordering::Relaxed);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The thread ends within one poll; if it panicked, nothing is lost.
            let _ = thread.join();
        }
    }
}

impl Port {
    /// Returns QEMU's arguments for a network card at this port.
    pub(super) fn qemu_arguments(&self) -> Vec<String> {
        // An earlier QEMU may have left its socket.
        let _ = std::fs::remove_file(&self.machine);
        let mac = format!("52:54:00:00:00:{:02x}", self.index + 10);
        vec![
            "-netdev".to_owned(),
            format!(
                "dgram,id=net0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                self.machine.display(),
                self.ours.display()
            ),
            "-device".to_owned(),
            format!("virtio-net-pci,netdev=net0,mac={mac},romfile="),
        ]
    }
}

struct Switch {
    sockets: Vec<UnixDatagram>,
    peers: Vec<PathBuf>,
    /// Port at which each source address was last seen.
    learned: HashMap<Mac, usize>,
    shared: Arc<Shared>,
}

impl Switch {
    fn run(mut self) {
        let mut frame = vec![0; FRAME_BYTES];
        while !self.shared.ends.load(Ordering::Relaxed) {
            let mut ready: Vec<PollFd<'_>> = self
                .sockets
                .iter()
                .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
                .collect();
            // The timeout bounds how late a stop is noticed.
            if poll(&mut ready, PollTimeout::from(50_u8)).is_err() {
                continue;
            }
            for port in 0..self.sockets.len() {
                // Bounded, so that a machine that floods does not starve the others.
                for _ in 0..256 {
                    match self.sockets[port].recv(&mut frame) {
                        Ok(length) => self.forward(port, &frame[..length]),
                        Err(_) => break,
                    }
                }
            }
        }
    }

    fn forward(&mut self, from: usize, frame: &[u8]) {
        self.shared.witnesses[from].lock().see(&untagged(frame));
        let (Some(destination), Some(source)) = (mac_at(frame, 0), mac_at(frame, 6)) else {
            return;
        };
        if !self.is_plugged(from) {
            return;
        }
        self.learned.insert(source, from);
        if let Some(answer) = gateway_answer(&untagged(frame)) {
            self.send(from, &tagged_as(frame, answer));
            return;
        }
        match self.learned.get(&destination) {
            _ if destination == GATEWAY_MAC => {}
            Some(port) if *port != from => self.send(*port, frame),
            Some(_) => {}
            None => (0..self.sockets.len())
                .filter(|port| *port != from)
                .for_each(|port| self.send(port, frame)),
        }
    }

    fn send(&self, to: usize, frame: &[u8]) {
        if self.is_plugged(to) {
            // If the machine is off or its queue is full, the frame is dropped, as a switch does.
            let _: io::Result<usize> = self.sockets[to].send_to(frame, &self.peers[to]);
        }
    }

    fn is_plugged(&self, port: usize) -> bool {
        self.shared.is_plugged[port].load(Ordering::Relaxed)
    }
}

/// Bytes before the type of a frame: two link addresses.
const ADDRESSES_BYTES: usize = 12;
/// Type of a frame with a VLAN tag (IEEE 802.1Q).
const VLAN_TAG: [u8; 2] = [0x81, 0x00];
/// Bytes in a VLAN tag, with its type.
const VLAN_TAG_BYTES: usize = 4;

/// Returns the VLAN tag of a frame that has one.
fn vlan_tag(frame: &[u8]) -> Option<&[u8]> {
    let tag = frame.get(ADDRESSES_BYTES..ADDRESSES_BYTES + VLAN_TAG_BYTES)?;
    tag.starts_with(&VLAN_TAG).then_some(tag)
}

/// Returns a frame without its VLAN tag.
fn untagged(frame: &[u8]) -> Cow<'_, [u8]> {
    match vlan_tag(frame) {
        Some(tag) => {
            let rest = &frame[ADDRESSES_BYTES + tag.len()..];
            Cow::Owned([&frame[..ADDRESSES_BYTES], rest].concat())
        }
        None => Cow::Borrowed(frame),
    }
}

/// Returns an answer with the VLAN tag of the frame that it answers.
fn tagged_as(question: &[u8], mut answer: Vec<u8>) -> Vec<u8> {
    if let Some(tag) = vlan_tag(question) {
        answer.splice(ADDRESSES_BYTES..ADDRESSES_BYTES, tag.iter().copied());
    }
    answer
}

fn mac_at(frame: &[u8], at: usize) -> Option<Mac> {
    frame.get(at..at + 6)?.try_into().ok()
}

/// Returns the gateway's answer to a request for its link address (ARP; RFC 4861, section 4.3).
fn gateway_answer(frame: &[u8]) -> Option<Vec<u8>> {
    match frame.get(12..14)? {
        [0x08, 0x06] => arp_answer(frame),
        [0x86, 0xdd] => neighbor_answer(frame),
        _ => None,
    }
}

fn ethernet(to: Mac, kind: [u8; 2]) -> Vec<u8> {
    [to.as_slice(), &GATEWAY_MAC, &kind].concat()
}

fn arp_answer(frame: &[u8]) -> Option<Vec<u8>> {
    let question = frame.get(14..42)?;
    let (asker_mac, asker) = (mac_at(question, 8)?, question.get(14..18)?);
    let is_for_us = question[6..8] == [0, 1] && question[24..28] == GATEWAY_V4.octets();
    is_for_us.then(|| {
        let mut answer = ethernet(asker_mac, [0x08, 0x06]);
        // Ethernet, IPv4, lengths, opcode "reply".
        answer.extend([0, 1, 8, 0, 6, 4, 0, 2]);
        answer.extend(GATEWAY_MAC);
        answer.extend(GATEWAY_V4.octets());
        answer.extend(asker_mac);
        answer.extend(asker);
        answer
    })
}

fn neighbor_answer(frame: &[u8]) -> Option<Vec<u8>> {
    const ICMPV6: u8 = 58;
    const SOLICITATION: u8 = 135;
    const ADVERTISEMENT: u8 = 136;
    let header = frame.get(14..54)?;
    let message = frame.get(54..78)?;
    let source: [u8; 16] = header[8..24].try_into().ok()?;
    let is_for_us = header[6] == ICMPV6
        && message[0] == SOLICITATION
        && message[8..24] == GATEWAY_V6.octets()
        // Duplicate address detection has no source address, and an answer would be a conflict.
        && source != [0; 16];
    if !is_for_us {
        return None;
    }
    // Flags router, solicited and override; then the target and its link address.
    let mut advertisement = vec![ADVERTISEMENT, 0, 0, 0, 0xe0, 0, 0, 0];
    advertisement.extend(GATEWAY_V6.octets());
    advertisement.extend([2, 1]);
    advertisement.extend(GATEWAY_MAC);
    let length = u16::try_from(advertisement.len()).ok()?.to_be_bytes();
    let pseudo_header =
        [GATEWAY_V6.octets().as_slice(), &source, &[0, 0, length[0], length[1], 0, 0, 0, ICMPV6]]
            .concat();
    let sum = checksum(&[pseudo_header.as_slice(), &advertisement].concat());
    advertisement[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut answer = ethernet(mac_at(frame, 6)?, [0x86, 0xdd]);
    answer.extend([0x60, 0, 0, 0, length[0], length[1], ICMPV6, 255]);
    answer.extend(GATEWAY_V6.octets());
    answer.extend(source);
    answer.extend(advertisement);
    Some(answer)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::lab::interrupt::wait_for;

    const A: Mac = [0x52, 0x54, 0, 0, 0, 10];
    const B: Mac = [0x52, 0x54, 0, 0, 0, 11];

    fn frame(to: Mac, from: Mac, payload: &[u8]) -> Vec<u8> {
        [to.as_slice(), &from, &[0x08, 0x00], payload].concat()
    }

    /// Binds the machine's end of a port.
    fn machine(network: &Network, index: usize) -> UnixDatagram {
        let port = network.port(index);
        let socket = UnixDatagram::bind(&port.machine).unwrap();
        socket.connect(&port.ours).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    }

    fn received(socket: &UnixDatagram) -> Vec<u8> {
        let mut frame = vec![0; 2048];
        let length = socket.recv(&mut frame).unwrap();
        frame.truncate(length);
        frame
    }

    #[test]
    fn frames_are_flooded_then_forwarded_and_not_returned() {
        let directory = tempfile::tempdir().unwrap();
        let network = Network::new(directory.path(), 3, &[]).unwrap();
        let [a, b, c] = [0, 1, 2].map(|index| machine(&network, index));
        a.send(&frame(B, A, b"flooded")).unwrap();
        assert_eq!(received(&b)[14..], *b"flooded");
        assert_eq!(received(&c)[14..], *b"flooded");
        b.send(&frame(A, B, b"learned")).unwrap();
        assert_eq!(received(&a)[14..], *b"learned");
        b.send(&frame([0xff; 6], B, b"broadcast")).unwrap();
        // The frame addressed to A did not reach C before the broadcast.
        assert_eq!(received(&c)[14..], *b"broadcast");
    }

    #[test]
    fn nothing_passes_a_port_that_is_unplugged_and_it_is_still_counted() {
        let directory = tempfile::tempdir().unwrap();
        let network = Network::new(directory.path(), 2, &["198.19.0.0/16".parse().unwrap()]);
        let network = network.unwrap();
        let [a, b] = [0, 1].map(|index| machine(&network, index));
        let port = network.port(0);
        network.plug(&port, false);
        let mut clear = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 203, 0, 113, 20];
        clear.extend([198, 19, 0, 1]);
        a.send(&frame(B, A, &clear)).unwrap();
        wait_for("the count", Duration::from_secs(5), || {
            Ok((network.sent(&port).clear == 1).then_some(()))
        })
        .unwrap();
        network.plug(&port, true);
        a.send(&frame(B, A, b"plugged")).unwrap();
        assert_eq!(received(&b)[14..], *b"plugged");
    }

    #[test]
    fn the_gateway_answers_for_its_own_addresses_alone() {
        let arp = |target: [u8; 4]| {
            let mut frame = frame([0xff; 6], A, &[0, 1, 8, 0, 6, 4, 0, 1]);
            frame[12..14].copy_from_slice(&[0x08, 0x06]);
            frame.extend(A);
            frame.extend([203, 0, 113, 20, 0, 0, 0, 0, 0, 0]);
            frame.extend(target);
            frame
        };
        let answer = gateway_answer(&arp(GATEWAY_V4.octets())).unwrap();
        assert_eq!(answer[..6], A);
        assert_eq!(answer[22..28], GATEWAY_MAC);
        assert_eq!(answer[28..32], GATEWAY_V4.octets());
        assert_eq!(gateway_answer(&arp([203, 0, 113, 10])), None);

        let solicitation = |source: [u8; 16]| {
            let mut frame = frame([0x33; 6], A, &[0x60, 0, 0, 0, 0, 24, 58, 255]);
            frame[12..14].copy_from_slice(&[0x86, 0xdd]);
            frame.extend(source);
            frame.extend([0xff; 16]);
            frame.extend([135, 0, 0, 0, 0, 0, 0, 0]);
            frame.extend(GATEWAY_V6.octets());
            frame
        };
        let answer = gateway_answer(&solicitation([0xfe; 16])).unwrap();
        let (header, message) = (&answer[14..54], &answer[54..]);
        let pseudo_header = [&header[8..40], &[0, 0, 0, 32, 0, 0, 0, 58]].concat();
        // With a correct checksum the total is zero.
        assert_eq!(checksum(&[pseudo_header.as_slice(), message].concat()), 0);
        assert_eq!(gateway_answer(&solicitation([0; 16])), None);
        for length in 0..78 {
            let _ = gateway_answer(&solicitation([0xfe; 16])[..length]);
        }
    }
}
