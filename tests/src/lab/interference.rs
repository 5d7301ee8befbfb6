//! What an evil relay does to the datagrams that it forwards: a hook on its uplink, so that its
//! agent answers requests as every relay does.

use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use super::ping::checksum;

/// Treatment of the datagrams that a relay sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misdeed {
    /// Sends nothing that it should forward.
    Drop,
    /// Sends each datagram three times.
    Duplicate,
    /// Delays every second datagram, so that the next one overtakes it.
    Reorder,
    /// Sends each datagram again, and once more, seconds later.
    Replay,
    /// Changes each datagram, so that its UDP checksum still holds.
    Damage,
    /// Sends each datagram to another node: to the first address (IPv4) or the second one (IPv6).
    Misdirect([IpAddr; 2]),
    /// Sends each datagram many times.
    Flood,
    /// Sends its own sealed messages, such as answers to requests, again and damaged.
    RepeatAnswers,
}

/// Hook on an uplink. By default it changes nothing.
#[derive(Debug, Default)]
pub struct Interference(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    misdeed: Option<Misdeed>,
    /// Number of datagrams that were treated.
    treated: u64,
}

/// Delay of a datagram that is overtaken.
const OVERTAKEN: Duration = Duration::from_millis(30);
/// Delays of replays.
const REPLAYS: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(2)];
/// Number of copies of a flood.
const FLOOD: usize = 50;

const ETHERNET: usize = 14;
const UDP_HEADER: usize = 8;
/// Bytes of a relayed data message before its encrypted part: channel, and WireGuard header.
const BEFORE_DATA: usize = 12 + 16;
/// Bytes of a sealed message before its encrypted part.
const BEFORE_BODY: usize = 24;

impl Interference {
    /// Sets what happens to datagrams from now on; `None`: nothing.
    pub fn set(&self, misdeed: Option<Misdeed>) {
        self.state().misdeed = misdeed;
    }

    /// Returns what is sent for a frame of the relay: frames, each with its delay.
    pub fn treat(&self, frame: &[u8]) -> Vec<(Duration, Vec<u8>)> {
        let mut state = self.state();
        let unchanged = || vec![(Duration::ZERO, frame.to_vec())];
        let Some(misdeed) = state.misdeed else { return unchanged() };
        let Some(at) = udp_payload(frame) else { return unchanged() };
        let is_treated = match (misdeed, frame.get(at)) {
            (Misdeed::RepeatAnswers, Some(0x50)) => true,
            (Misdeed::RepeatAnswers, _) => false,
            (_, kind) => kind == Some(&0x52),
        };
        if !is_treated {
            return unchanged();
        }
        state.treated += 1;
        let copies = |delays: &[Duration]| -> Vec<(Duration, Vec<u8>)> {
            delays.iter().map(|delay| (*delay, frame.to_vec())).collect()
        };
        match misdeed {
            Misdeed::Drop => Vec::new(),
            Misdeed::Duplicate => copies(&[Duration::ZERO; 3]),
            Misdeed::Reorder if state.treated.is_multiple_of(2) => copies(&[OVERTAKEN]),
            Misdeed::Reorder => unchanged(),
            Misdeed::Replay => copies(&[Duration::ZERO, REPLAYS[0], REPLAYS[1]]),
            Misdeed::Damage => vec![(Duration::ZERO, damaged(frame, at + BEFORE_DATA))],
            Misdeed::Misdirect(to) => vec![(Duration::ZERO, redirected(frame, to))],
            Misdeed::Flood => copies(&[Duration::ZERO; FLOOD]),
            Misdeed::RepeatAnswers => {
                let mut frames = copies(&[Duration::ZERO, REPLAYS[0], REPLAYS[1]]);
                frames.push((Duration::ZERO, damaged(frame, at + BEFORE_BODY)));
                frames
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // A thread that panicked leaves a valid state.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Returns where the payload of a UDP datagram begins in an Ethernet frame, for IPv4 without options
/// and IPv6 without extension headers.
fn udp_payload(frame: &[u8]) -> Option<usize> {
    const UDP: u8 = libc::IPPROTO_UDP as u8;
    let (kind, packet) = (frame.get(12..ETHERNET)?, frame.get(ETHERNET..)?);
    let header = match (kind, packet.first()?) {
        ([8, 0], 0x45) if *packet.get(9)? == UDP => 20,
        ([0x86, 0xdd], _) if *packet.get(6)? == UDP => 40,
        _ => return None,
    };
    Some(ETHERNET + header + UDP_HEADER)
}

/// Returns a frame in which two words are exchanged: the Internet checksum stays the same.
fn damaged(frame: &[u8], at: usize) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if frame.len() >= at + 4 {
        frame.swap(at, at + 2);
        frame.swap(at + 1, at + 3);
    }
    frame
}

/// Returns a frame with another destination, in the same Ethernet segment.
fn redirected(frame: &[u8], to: [IpAddr; 2]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    // A broadcast: the hardware address of the other host is not known here.
    frame[..6].fill(0xff);
    let is_v4 = frame[12] == 8;
    let destination = match (is_v4, to[usize::from(!is_v4)]) {
        (true, IpAddr::V4(v4)) => v4.octets().to_vec(),
        (false, IpAddr::V6(v6)) => v6.octets().to_vec(),
        _ => return frame,
    };
    let (start, header) = if is_v4 { (16, 20) } else { (24, 40) };
    let packet = &mut frame[ETHERNET..];
    packet[start..start + destination.len()].copy_from_slice(&destination);
    if is_v4 {
        packet[10..12].fill(0);
        let sum = checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    // The pseudo header of UDP: both addresses, length, and protocol.
    let addresses = if is_v4 { 12..20 } else { 8..40 };
    let length = u16::from_be_bytes([packet[header + 4], packet[header + 5]]);
    packet[header + 6..header + 8].fill(0);
    let end = (header + usize::from(length)).min(packet.len());
    let pseudo =
        [&packet[addresses], &length.to_be_bytes(), &[0, libc::IPPROTO_UDP as u8]].concat();
    let sum = checksum(&[pseudo.as_slice(), &packet[header..end]].concat());
    packet[header + 6..header + 8].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::lab::spoof;

    fn frame(from: &str, to: &str, payload: &[u8]) -> Vec<u8> {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let kind: [u8; 2] = if from.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
        let packet = spoof::udp(from, to, payload).unwrap();
        [&[2; 12][..], &kind, &packet].concat()
    }

    #[test]
    fn relayed_datagrams_alone_are_treated_and_their_checksums_hold() {
        let payload = [&[0x52u8, 1, 0, 0][..], &(0..60).collect::<Vec<u8>>()].concat();
        for (from, to, other) in [
            ("192.0.2.1:5", "192.0.2.2:6", "192.0.2.3:6"),
            ("[2001:db8::1]:5", "[2001:db8::2]:6", "[2001:db8::3]:6"),
        ] {
            let interference = Interference::default();
            let relayed = frame(from, to, &payload);
            assert_eq!(interference.treat(&relayed), [(Duration::ZERO, relayed.clone())]);
            interference.set(Some(Misdeed::Drop));
            assert!(interference.treat(&relayed).is_empty());
            let sealed = frame(from, to, &[0x50; 60]);
            assert_eq!(interference.treat(&sealed).len(), 1);
            interference.set(Some(Misdeed::RepeatAnswers));
            assert_eq!(interference.treat(&sealed).len(), 4);

            interference.set(Some(Misdeed::Damage));
            let mut swapped = payload.clone();
            swapped.swap(BEFORE_DATA, BEFORE_DATA + 2);
            swapped.swap(BEFORE_DATA + 1, BEFORE_DATA + 3);
            let damaged = interference.treat(&relayed).remove(0).1;
            assert_eq!(damaged, frame(from, to, &swapped), "the checksum fits too");
            let addresses = ["192.0.2.3", "2001:db8::3"].map(|text| text.parse().unwrap());
            interference.set(Some(Misdeed::Misdirect(addresses)));
            let misdirected = interference.treat(&relayed).remove(0).1;
            assert_eq!(misdirected[ETHERNET..], frame(from, other, &payload)[ETHERNET..]);
        }
    }
}
