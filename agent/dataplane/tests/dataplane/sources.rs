//! Tests of the check of inner sources where packets of several peers are handled as one batch.

use towline_dataplane::DropReason;
use towline_dataplane::arena::{RecvBatch, SendBatch};
use towline_dataplane::internals::PacketPath;
use towline_wireguard::internals::seal;
use towline_wireguard::{Answered, MessageKind};

use super::*;

/// Inner address of the node.
const NODE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// Number of receive calls of one batch.
const SLOTS: usize = 8;

/// Peer of the node, with its end of the session.
struct Member {
    session: Session,
    address: SocketAddr,
    inner: Ipv4Addr,
}

/// Packet path of a node with two peers, at one time.
struct Node {
    now: Instant,
    path: PacketPath,
    received: RecvBatch,
    writes: WriteBatch,
    out: SendBatch,
}

impl Node {
    /// Creates a node with this engine, and its peers, which have sessions.
    fn new(engine: Engine) -> (Self, [Member; 2]) {
        let now = Instant::now();
        let mut node = Self {
            now,
            path: PacketPath::new(StaticSecret::from([1; 32]), engine, None, now),
            received: RecvBatch::new(SLOTS),
            writes: WriteBatch::new(SLOTS),
            out: SendBatch::new(1 << 16, 64),
        };
        let mut peers = BTreeMap::new();
        let mut members = [2, 3].map(|number| {
            let secrets = Secrets::new(StaticSecret::from([number; 32]));
            let address = SocketAddr::from(([192, 0, 2, number], 51830));
            let inner = Ipv4Addr::new(10, 0, 0, number);
            let entry = PeerEntry {
                endpoint: Some(address.into()),
                prefixes: vec![ipnet::IpNet::from(std::net::IpAddr::from(inner))],
                ..PeerEntry::default()
            };
            peers.insert(secrets.public_key(), entry);
            let session = Session::new(&secrets, node.path.public_key(), None, number.into());
            Member { session, address, inner }
        });
        let own = OwnNetworks::new([NODE.into()], [], []);
        node.path.apply(now, &PeerTable { peers, own });
        for member in &mut members {
            node.connect(member);
        }
        (node, members)
    }

    /// Completes a handshake that the peer initiates.
    fn connect(&mut self, member: &mut Member) {
        let (session, now) = (&mut member.session, self.now);
        let mut message = [0; HANDSHAKE_BYTES];
        let len = Inputs::system(now, |inputs| session.initiate(inputs, &mut message));
        self.arrive(member.address, &message[..len]);
        assert!(self.inbound().is_empty());
        assert_eq!(self.out.seal(), 0, "nothing is lost");
        let response = self.out.bytes()[..self.out.gso_batches()[0].len].to_vec();
        self.out.clear();
        assert!(matches!(MessageKind::of(&response), Some(MessageKind::Response { .. })));
        let answered =
            Inputs::system(now, |inputs| session.handshake(inputs, &response, &mut message));
        let Answered::Established { len } = answered else { panic!("{answered:?}") };
        self.arrive(member.address, &message[..len]);
        assert!(self.inbound().is_empty());
    }

    /// Adds a datagram to the next batch.
    fn arrive(&mut self, from: SocketAddr, datagram: &[u8]) {
        let slot = self.received.next_slot();
        self.received.bytes_mut()[slot * SLOT_BYTES..][..datagram.len()].copy_from_slice(datagram);
        self.received.push(slot, from.into(), datagram.len(), 0);
    }

    /// Handles the batch. Returns the packets for the host.
    fn inbound(&mut self) -> Vec<Vec<u8>> {
        let Self { now, path, received, writes, out } = self;
        path.inbound(*now, Coalesce::default(), received, writes, out);
        let frames = writes.frames().iter();
        let packets =
            frames.map(|frame| writes.pieces(frame).collect::<Vec<_>>().concat()).collect();
        received.clear();
        writes.clear();
        packets
    }
}

/// Returns a packet to the node that says which peer sent it.
fn packet_of(sender: Ipv4Addr, source: Ipv4Addr) -> Vec<u8> {
    // With its headers the payload is a multiple of 16 bytes, so it needs no padding.
    let mut packet = packet_from(source, NODE, 20);
    packet[28..32].copy_from_slice(&sender.octets());
    packet
}

#[test]
fn the_verdict_on_a_source_holds_for_one_peer_of_a_batch() {
    for engine in [1, 2].map(engine_of) {
        let (mut node, mut members) = Node::new(engine);
        // Whichever peer's packets come first: once it is the owner of the source, once the other.
        for source in [members[0].inner, members[1].inner] {
            for member in &mut members {
                let packet = packet_of(member.inner, source);
                for datagram in seal(&mut member.session, node.now, &[packet]) {
                    node.arrive(member.address, &datagram);
                }
            }
            let before = node.path.drops(DropReason::WrongSource);
            assert_eq!(node.inbound(), [packet_of(source, source)], "{}", engine.name());
            assert_eq!(node.path.drops(DropReason::WrongSource) - before, 1);
        }
    }
}
