//! Batches that helper threads seal, from the link of one end to the link of the other: each flow
//! arrives complete and in order.

use super::*;

/// Number of helpers, on any machine.
const HELPERS: usize = 2;
/// Number of flows between the two ends.
const FLOWS: usize = 4;
/// Payload of a datagram in bytes. It begins with the number of the datagram in its flow.
const PAYLOAD: usize = 1_200;
/// Number of datagrams in a super-packet. A read of the TUN returns several super-packets, and one alone
/// is large enough for a helper.
const SEGMENTS: usize = 40;
/// Largest number of datagrams under way. It bounds the memory, and keeps the worker busy.
const UNDER_WAY: usize = 64 * SEGMENTS;

/// Two ends, and what they sent and received of each flow.
struct Flows {
    from: End,
    to: End,
    sent: [u32; FLOWS],
    received: [u32; FLOWS],
    under_way: usize,
}

impl Flows {
    /// Connects two ends with the batch engine. The first has helpers.
    fn new() -> Self {
        let network = Network::unrecorded();
        let mut from = End::with_helpers(&network, 1, HELPERS);
        let mut to = End::with_helpers(&network, 3, 0);
        assert_eq!((from.plane.seal_helpers(), to.plane.seal_helpers()), (HELPERS, 0));
        introduce(&from, &to);
        connect(&mut from, &mut to);
        Self { from, to, sent: [0; FLOWS], received: [0; FLOWS], under_way: 0 }
    }

    /// Sends the next datagrams of a flow: one, or several as a super-packet.
    fn send(&mut self, flow: usize, datagrams: usize) {
        let mut packet = packet(&self.from, &self.to, datagrams * PAYLOAD);
        packet[20..22].copy_from_slice(&(flow as u16).to_be_bytes());
        for payload in packet[28..].chunks_mut(PAYLOAD) {
            payload[..4].copy_from_slice(&self.sent[flow].to_be_bytes());
            self.sent[flow] += 1;
        }
        self.under_way += datagrams;
        if datagrams == 1 {
            return self.from.host.send(&packet);
        }
        let header = VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type: GSO_UDP_L4,
            hdr_len: 28,
            gso_size: PAYLOAD as u16,
            csum_start: 20,
            csum_offset: 6,
            ..VnetHeader::default()
        };
        self.from.host.send_with(header, &packet);
    }

    /// Receives one datagram, which must be the next one of its flow.
    fn receive(&mut self) {
        let received = self.to.host.receive(TIMEOUT);
        let packet = received.unwrap_or_else(|| panic!("lost: {:?}", self.from.plane.snapshot()));
        assert_eq!(packet.len(), 28 + PAYLOAD);
        let flow = usize::from(u16::from_be_bytes([packet[20], packet[21]]));
        let number = u32::from_be_bytes([packet[28], packet[29], packet[30], packet[31]]);
        assert_eq!(number, self.received[flow], "flow {flow}");
        self.received[flow] += 1;
        self.under_way -= 1;
    }

    /// Carries datagrams until `is_enough`, which gets the number of those sent, and then receives what is
    /// under way.
    fn carry(&mut self, is_enough: impl Fn(&DataPlane, u64) -> bool) {
        let mut packets = 0;
        loop {
            let sent: u64 = self.sent.iter().map(|count| u64::from(*count)).sum();
            let ends = is_enough(&self.from.plane, sent);
            while !ends && self.under_way + SEGMENTS <= UNDER_WAY {
                // Single packets are between the super-packets, so that batches have many lengths.
                self.send(packets % FLOWS, if packets % 7 == 6 { 1 } else { SEGMENTS });
                packets += 1;
            }
            if self.under_way == 0 {
                break;
            }
            self.receive();
        }
        assert_eq!(self.sent, self.received);
    }
}

#[test]
fn what_helpers_seal_arrives_complete_and_in_order() {
    let mut flows = Flows::new();
    let deadline = Instant::now() + TIMEOUT;
    flows.carry(|plane, sent| {
        let is_helped = plane.sealed_ahead() > 0;
        assert!(is_helped || Instant::now() < deadline, "no helper seals");
        sent >= 20_000 && is_helped
    });
    for end in [&flows.from, &flows.to] {
        let drops = end.plane.snapshot().drops;
        assert!(drops.values().all(|count| *count == 0), "{drops:?}");
    }
}

/// The long form of the test above; docs/performance.md has its command.
#[test]
#[ignore = "takes minutes; cargo lab bench checks the order of a million datagrams in each run"]
fn ten_million_datagrams_arrive_complete_and_in_order() {
    let mut flows = Flows::new();
    flows.carry(|_, sent| sent >= 10_000_000);
    assert!(flows.from.plane.sealed_ahead() > 0, "no helper seals");
}

#[test]
fn an_engine_that_seals_one_packet_at_a_time_has_no_helpers() {
    let network = Network::new();
    let end = End::with_helpers(&network, 2, HELPERS);
    assert_eq!(end.plane.engine(), Engine::BORINGTUN);
    assert_eq!(end.plane.seal_helpers(), 0);
}
