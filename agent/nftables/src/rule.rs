//! Rules, built from left to right: first the matches, then the actions.
//!
//! Each method of [`Rule`] appends expressions. A method that matches is documented by the packets that
//! the rule then applies to.

use std::net::IpAddr;
use std::ops::{BitOr, RangeInclusive};
use std::time::Duration;

use ipnet::IpNet;

use towline_netlink::Family;

use super::expression::{Expression, Verdict, key};

/// Rule of a chain. The kernel evaluates its expressions in order, and leaves the rule at the first
/// match that fails.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    /// Comment, which other tools show, and which identifies the rule's counter.
    pub comment: Option<String>,
    /// Expressions in order of evaluation.
    pub expressions: Vec<Expression>,
}

/// Conntrack states of a packet, which can be combined with `|`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CtState(pub(super) u32);

impl CtState {
    /// The packet belongs to no valid connection.
    pub const INVALID: Self = Self(1);
    /// The connection has packets in both directions.
    pub const ESTABLISHED: Self = Self(2);
    /// The packet is related to an existing connection, such as an ICMP error.
    pub const RELATED: Self = Self(4);
    /// The connection has packets in the first direction only.
    pub const NEW: Self = Self(8);
}

impl BitOr for CtState {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Conntrack states of a packet in the encoding of iptables, which can be combined with `|`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IptablesStates(u16);

impl IptablesStates {
    /// The connection has packets in both directions.
    pub const ESTABLISHED: Self = Self(1 << 1);
    /// The packet is related to an existing connection, such as an ICMP error.
    pub const RELATED: Self = Self(1 << 2);
    /// The connection has destination NAT.
    pub const DNAT: Self = Self(1 << 7);
}

impl BitOr for IptablesStates {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Length in bytes of the name of a link (`IFNAMSIZ`), which ends with zeros.
pub(super) const LINK_NAME_BYTES: usize = 16;
const REGISTER: u32 = key::REGISTER_1;
const TCP_OPTION_MSS: u8 = 2;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

impl Rule {
    /// Creates a rule that matches every packet and does nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the comment. Only its first 127 bytes are stored.
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    /// Matches packets that arrive on the named link.
    pub fn input(self, link: &str) -> Self {
        self.link(key::META_IIFNAME, link, key::EQUAL)
    }

    /// Matches packets that arrive on another link, and local packets.
    pub fn not_input(self, link: &str) -> Self {
        self.link(key::META_IIFNAME, link, key::NOT_EQUAL)
    }

    /// Matches local packets, which have no input link.
    pub fn made_here(self) -> Self {
        self.link(key::META_IIFNAME, "", key::EQUAL)
    }

    /// Matches packets of local sockets that a process of this user opened. Packets of closed sockets
    /// and of sockets in other network namespaces have no owner.
    pub fn socket_owner(self, uid: u32) -> Self {
        self.steps([
            Expression::Meta { key: key::META_SKUID, register: REGISTER },
            compare(key::EQUAL, uid.to_ne_bytes().to_vec()),
        ])
    }

    /// Matches packets that leave by the named link.
    pub fn output(self, link: &str) -> Self {
        self.link(key::META_OIFNAME, link, key::EQUAL)
    }

    /// Matches packets that leave by another link.
    pub fn not_output(self, link: &str) -> Self {
        self.link(key::META_OIFNAME, link, key::NOT_EQUAL)
    }

    /// Matches packets unless the name of their input link begins with the prefix.
    pub fn not_input_like(self, prefix: &str) -> Self {
        let name = Expression::Meta { key: key::META_IIFNAME, register: REGISTER };
        self.steps([name, compare(key::NOT_EQUAL, prefix.as_bytes().to_vec())])
    }

    /// Matches packets of this address family.
    pub fn family(self, family: Family) -> Self {
        let steps = [
            Expression::Meta { key: key::META_NFPROTO, register: REGISTER },
            compare(key::EQUAL, vec![family.number()]),
        ];
        // One match of the family is enough.
        if self.expressions.windows(2).any(|pair| pair == steps) {
            return self;
        }
        self.steps(steps)
    }

    /// Matches packets of this transport protocol (`IPPROTO_*`).
    pub fn protocol(self, protocol: u8) -> Self {
        self.steps([
            Expression::Meta { key: key::META_L4PROTO, register: REGISTER },
            compare(key::EQUAL, vec![protocol]),
        ])
    }

    /// Matches packets with a source inside the network.
    pub fn source(self, net: IpNet) -> Self {
        self.address(Side::Source, net, key::EQUAL)
    }

    /// Matches packets of the same family with a source outside the network.
    pub fn not_source(self, net: IpNet) -> Self {
        self.address(Side::Source, net, key::NOT_EQUAL)
    }

    /// Matches packets with a destination inside the network.
    pub fn destination(self, net: IpNet) -> Self {
        self.address(Side::Destination, net, key::EQUAL)
    }

    /// Matches packets of the same family with a destination outside the network.
    pub fn not_destination(self, net: IpNet) -> Self {
        self.address(Side::Destination, net, key::NOT_EQUAL)
    }

    /// Matches packets with a destination inside the network, encoded as iptables encodes it. The table
    /// must be of the network's family.
    pub fn iptables_destination(self, net: IpNet) -> Self {
        let family = Family::of(net.addr());
        self.load_address_of_table(Side::Destination, family).compare_address(net, key::EQUAL)
    }

    /// Matches packets whose connection is in one of the states, encoded as iptables encodes it.
    pub fn iptables_conntrack(self, states: IptablesStates) -> Self {
        // struct xt_conntrack_mtinfo3: eight addresses, two times, five ports, then these fields.
        const BYTES: usize = 168;
        const MATCH_FLAGS: usize = 146;
        const STATE_MASK: usize = 150;
        const BY_STATE: u16 = 1;
        let mut info = [0; BYTES];
        info[MATCH_FLAGS..MATCH_FLAGS + 2].copy_from_slice(&BY_STATE.to_ne_bytes());
        info[STATE_MASK..STATE_MASK + 2].copy_from_slice(&states.0.to_ne_bytes());
        let (name, info) = ("conntrack".to_owned(), info.to_vec());
        self.step(Expression::Match { name, revision: 3, info })
    }

    /// Matches packets of this family with a source in the named set.
    pub fn source_in(self, family: Family, set: &str) -> Self {
        self.load_address(Side::Source, family).lookup(set)
    }

    /// Matches packets of this family with a destination in the named set.
    pub fn destination_in(self, family: Family, set: &str) -> Self {
        self.load_address(Side::Destination, family).lookup(set)
    }

    /// Adds the destination to a dynamic set.
    pub fn remember_destination(self, family: Family, set: &str) -> Self {
        let set = set.to_owned();
        let rule = self.load_address(Side::Destination, family);
        rule.step(Expression::Remember { set, register: REGISTER, expires: None })
    }

    /// Matches packets of connections whose conntrack id is in the named set.
    pub fn connection_in(self, set: &str) -> Self {
        self.step(Expression::Ct { key: key::CT_ID, register: REGISTER }).lookup(set)
    }

    /// Adds the connection's conntrack id to an expiring set, or restarts the element's timeout.
    pub fn remember_connection(self, set: &str, time: Duration) -> Self {
        let expires = Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        self.steps([
            Expression::Ct { key: key::CT_ID, register: REGISTER },
            Expression::Remember { set: set.to_owned(), register: REGISTER, expires },
        ])
    }

    /// Removes the connection's conntrack id from a dynamic set.
    pub fn forget_connection(self, set: &str) -> Self {
        self.steps([
            Expression::Ct { key: key::CT_ID, register: REGISTER },
            Expression::Forget { set: set.to_owned(), register: REGISTER },
        ])
    }

    /// Matches packets with this source port. The protocol must be matched before.
    pub fn source_port(self, port: u16) -> Self {
        self.load_port(Side::Source).step(compare(key::EQUAL, port.to_be_bytes().to_vec()))
    }

    /// Matches packets with this destination port. The protocol must be matched before.
    pub fn destination_port(self, port: u16) -> Self {
        self.load_port(Side::Destination).step(compare(key::EQUAL, port.to_be_bytes().to_vec()))
    }

    /// Matches packets with a destination port in the range. The protocol must be matched before.
    pub fn destination_ports(self, ports: RangeInclusive<u16>) -> Self {
        self.load_port(Side::Destination)
            .step(compare(key::NOT_LESS, ports.start().to_be_bytes().to_vec()))
            .step(compare(key::NOT_GREATER, ports.end().to_be_bytes().to_vec()))
    }

    /// Matches packets with a source port in the named set. The protocol must be matched before.
    pub fn source_port_in(self, set: &str) -> Self {
        self.load_port(Side::Source).lookup(set)
    }

    /// Matches packets with a destination port in the named set. The protocol must be matched before.
    pub fn destination_port_in(self, set: &str) -> Self {
        self.load_port(Side::Destination).lookup(set)
    }

    /// Matches packets that carry the mark, in the bits of the mask.
    pub fn mark(self, mark: u32, mask: u32) -> Self {
        self.masked(Expression::Meta { key: key::META_MARK, register: REGISTER }, mask)
            .step(compare(key::EQUAL, mark.to_ne_bytes().to_vec()))
    }

    /// Matches packets that do not carry the mark, in the bits of the mask.
    pub fn not_mark(self, mark: u32, mask: u32) -> Self {
        self.masked(Expression::Meta { key: key::META_MARK, register: REGISTER }, mask)
            .step(compare(key::NOT_EQUAL, mark.to_ne_bytes().to_vec()))
    }

    /// Matches packets whose connection carries the mark, in the bits of the mask.
    pub fn ct_mark(self, mark: u32, mask: u32) -> Self {
        self.masked(Expression::Ct { key: key::CT_MARK, register: REGISTER }, mask)
            .step(compare(key::EQUAL, mark.to_ne_bytes().to_vec()))
    }

    /// Matches packets whose connection is in one of the states.
    pub fn ct_state(self, states: CtState) -> Self {
        self.masked(Expression::Ct { key: key::CT_STATE, register: REGISTER }, states.0)
            .step(compare(key::NOT_EQUAL, vec![0; 4]))
    }

    /// Matches packets in the reply direction of their connection.
    pub fn ct_reply(self) -> Self {
        self.steps([
            Expression::Ct { key: key::CT_DIRECTION, register: REGISTER },
            compare(key::EQUAL, vec![1]),
        ])
    }

    /// Matches packets in the original direction of their connection.
    pub fn ct_original(self) -> Self {
        self.steps([
            Expression::Ct { key: key::CT_DIRECTION, register: REGISTER },
            compare(key::EQUAL, vec![0]),
        ])
    }

    /// Matches packets whose destination is an address of this host.
    pub fn destination_is_local(self) -> Self {
        self.local(key::FIB_DESTINATION)
    }

    /// Matches packets whose destination is the broadcast address of a connected network.
    pub fn destination_is_broadcast(self) -> Self {
        self.address_type(key::FIB_DESTINATION, libc::RTN_BROADCAST)
    }

    /// Matches packets whose source has no return route, or one by another link than the input link.
    /// Valid only at [`Hook::Prerouting`](super::Hook::Prerouting).
    pub fn source_leads_elsewhere(self) -> Self {
        let flags = key::FIB_SOURCE | key::FIB_BY_INPUT;
        self.steps([
            Expression::Fib { flags, result: key::FIB_LINK, register: REGISTER },
            compare(key::EQUAL, vec![0; 4]),
        ])
    }

    /// Matches packets whose source is an address of this host.
    pub fn source_is_local(self) -> Self {
        self.local(key::FIB_SOURCE)
    }

    /// Matches random packets: `numerator` out of `denominator`, which must be above 0.
    pub fn chance(self, numerator: u32, denominator: u32) -> Self {
        self.steps([
            Expression::Random { modulus: denominator, register: REGISTER },
            // The comparisons "less" and "greater" work byte by byte, in network byte order.
            Expression::ByteOrder { register: REGISTER, size: 4 },
            compare(key::LESS, numerator.to_be_bytes().to_vec()),
        ])
    }

    /// Matches TCP segments that open a connection, from either side.
    pub fn tcp_syn(self) -> Self {
        self.tcp_flags(SYN | RST).step(compare(key::EQUAL, vec![SYN]))
    }

    /// Matches TCP segments that end one or both directions of a connection (FIN or RST).
    pub fn tcp_ends(self) -> Self {
        self.tcp_flags(FIN | RST).step(compare(key::NOT_EQUAL, vec![0]))
    }

    fn tcp_flags(self, mask: u8) -> Self {
        const FLAGS_OFFSET: u32 = 13;
        self.protocol(libc::IPPROTO_TCP as u8).steps([
            Expression::Payload {
                base: key::PAYLOAD_TRANSPORT,
                offset: FLAGS_OFFSET,
                length: 1,
                register: REGISTER,
            },
            Expression::Bitwise {
                source: REGISTER,
                target: REGISTER,
                mask: vec![mask],
                xor: vec![0],
            },
        ])
    }

    /// Matches IPv6 neighbour and router discovery (RFC 4861) with hop limit 255, which cannot come from
    /// another link.
    pub fn neighbour_discovery(self) -> Self {
        const ROUTER_SOLICITATION: u8 = 133;
        const REDIRECT: u8 = 137;
        const HOP_LIMIT_OFFSET: u32 = 7;
        self.family(Family::V6).protocol(libc::IPPROTO_ICMPV6 as u8).steps([
            Expression::Payload {
                base: key::PAYLOAD_NETWORK,
                offset: HOP_LIMIT_OFFSET,
                length: 1,
                register: REGISTER,
            },
            compare(key::EQUAL, vec![u8::MAX]),
            Expression::Payload {
                base: key::PAYLOAD_TRANSPORT,
                offset: 0,
                length: 1,
                register: REGISTER,
            },
            compare(key::NOT_LESS, vec![ROUTER_SOLICITATION]),
            compare(key::NOT_GREATER, vec![REDIRECT]),
        ])
    }

    /// Counts the packets that matched up to here.
    pub fn counter(self) -> Self {
        self.step(Expression::Counter)
    }

    /// Sets the packet's mark in the bits of the mask; the other bits stay.
    pub fn set_mark(self, mark: u32, mask: u32) -> Self {
        self.steps([
            Expression::Meta { key: key::META_MARK, register: REGISTER },
            change_bits(mark, mask),
            Expression::SetMeta { key: key::META_MARK, register: REGISTER },
        ])
    }

    /// Sets the connection's mark in the bits of the mask; the other bits stay.
    pub fn set_ct_mark(self, mark: u32, mask: u32) -> Self {
        self.steps([
            Expression::Ct { key: key::CT_MARK, register: REGISTER },
            change_bits(mark, mask),
            Expression::SetCt { key: key::CT_MARK, register: REGISTER },
        ])
    }

    /// Lowers the MSS in a TCP SYN to the MTU of the packet's routes, in both directions.
    pub fn clamp_mss_to_route(self) -> Self {
        self.tcp_syn().steps([
            Expression::Route { key: key::ROUTE_TCP_MSS, register: REGISTER },
            Expression::ByteOrder { register: REGISTER, size: 2 },
            write_mss(),
        ])
    }

    /// Lowers the MSS in a TCP SYN to `bytes`.
    pub fn clamp_mss(self, bytes: u16) -> Self {
        let value = bytes.to_be_bytes().to_vec();
        self.tcp_syn().steps([Expression::Immediate { register: REGISTER, value }, write_mss()])
    }

    /// Accepts the packet in this base chain. Later chains may still drop it.
    pub fn accept(self) -> Self {
        self.step(Expression::Verdict(Verdict::Accept))
    }

    /// Drops the packet.
    pub fn drop(self) -> Self {
        self.step(Expression::Verdict(Verdict::Drop))
    }

    /// Returns to the calling chain; in a base chain, applies the policy.
    pub fn return_(self) -> Self {
        self.step(Expression::Verdict(Verdict::Return))
    }

    /// Continues in another chain, and returns after it.
    pub fn jump(self, chain: &str) -> Self {
        self.step(Expression::Verdict(Verdict::Jump(chain.to_owned())))
    }

    /// Continues in another chain, without returning to this one.
    pub fn goto(self, chain: &str) -> Self {
        self.step(Expression::Verdict(Verdict::Goto(chain.to_owned())))
    }

    /// Drops the packet and answers with an ICMP error (administratively prohibited).
    pub fn reject(self) -> Self {
        const PROHIBITED: u8 = 3;
        self.step(Expression::Reject { kind: key::REJECT_ICMPX, code: PROHIBITED })
    }

    /// Drops a TCP segment and answers with a reset. The protocol must be matched before.
    pub fn reject_tcp(self) -> Self {
        self.step(Expression::Reject { kind: key::REJECT_TCP_RESET, code: 0 })
    }

    /// Exempts the packet from conntrack. The chain's priority must be -300 or lower.
    pub fn notrack(self) -> Self {
        self.step(Expression::Notrack)
    }

    /// Translates the source to the address of the output link. The source port is kept if it is free,
    /// so most mappings are endpoint-independent (RFC 4787).
    pub fn masquerade(self) -> Self {
        self.step(Expression::Masquerade { flags: 0 })
    }

    /// Translates the source to the address of the output link, with a random port for every
    /// connection: an endpoint-dependent mapping.
    pub fn masquerade_random(self) -> Self {
        self.step(Expression::Masquerade { flags: key::NAT_RANDOM_FULLY })
    }

    /// Translates the source address, and the port if there is one. With a port, the protocol must be
    /// matched before.
    pub fn snat(self, address: IpAddr, port: Option<u16>) -> Self {
        self.nat(false, address, port)
    }

    /// Translates the destination address, and the port if there is one. With a port, the protocol must
    /// be matched before.
    pub fn dnat(self, address: IpAddr, port: Option<u16>) -> Self {
        self.nat(true, address, port)
    }

    /// Appends an expression.
    pub fn step(mut self, step: Expression) -> Self {
        self.expressions.push(step);
        self
    }

    fn steps(mut self, steps: impl IntoIterator<Item = Expression>) -> Self {
        self.expressions.extend(steps);
        self
    }

    fn link(self, key: u32, name: &str, operator: u32) -> Self {
        let mut value = name.as_bytes().to_vec();
        value.resize(LINK_NAME_BYTES, 0);
        self.steps([Expression::Meta { key, register: REGISTER }, compare(operator, value)])
    }

    fn address(self, side: Side, net: IpNet, operator: u32) -> Self {
        self.load_address(side, Family::of(net.addr())).compare_address(net, operator)
    }

    fn compare_address(self, net: IpNet, operator: u32) -> Self {
        let rule = self;
        let rule = if net.prefix_len() == net.max_prefix_len() {
            rule
        } else {
            let mask = octets(net.netmask());
            let xor = vec![0; mask.len()];
            rule.step(Expression::Bitwise { source: REGISTER, target: REGISTER, mask, xor })
        };
        rule.step(compare(operator, octets(net.network())))
    }

    fn load_address(self, side: Side, family: Family) -> Self {
        self.family(family).load_address_of_table(side, family)
    }

    /// Loads an address without a match of the family. The table must be of that family.
    fn load_address_of_table(self, side: Side, family: Family) -> Self {
        let (offset, length) = match (family, side) {
            (Family::V4, Side::Source) => (12, 4),
            (Family::V4, Side::Destination) => (16, 4),
            (Family::V6, Side::Source) => (8, 16),
            (Family::V6, Side::Destination) => (24, 16),
        };
        let base = key::PAYLOAD_NETWORK;
        self.step(Expression::Payload { base, offset, length, register: REGISTER })
    }

    fn load_port(self, side: Side) -> Self {
        let offset = match side {
            Side::Source => 0,
            Side::Destination => 2,
        };
        self.step(Expression::Payload {
            base: key::PAYLOAD_TRANSPORT,
            offset,
            length: 2,
            register: REGISTER,
        })
    }

    fn lookup(self, set: &str) -> Self {
        self.step(Expression::Lookup { set: set.to_owned(), register: REGISTER, inverted: false })
    }

    fn masked(self, load: Expression, mask: u32) -> Self {
        self.steps([
            load,
            Expression::Bitwise {
                source: REGISTER,
                target: REGISTER,
                mask: mask.to_ne_bytes().to_vec(),
                xor: vec![0; 4],
            },
        ])
    }

    fn local(self, flags: u32) -> Self {
        self.address_type(flags, libc::RTN_LOCAL)
    }

    fn address_type(self, flags: u32, kind: u8) -> Self {
        self.steps([
            Expression::Fib { flags, result: key::FIB_ADDRESS_TYPE, register: REGISTER },
            compare(key::EQUAL, u32::from(kind).to_ne_bytes().to_vec()),
        ])
    }

    fn nat(self, destination: bool, address: IpAddr, port: Option<u16>) -> Self {
        let family = Family::of(address);
        let rule = self
            .family(family)
            .step(Expression::Immediate { register: key::REGISTER_1, value: octets(address) });
        let rule = match port {
            Some(port) => rule.step(Expression::Immediate {
                register: key::REGISTER_2,
                value: port.to_be_bytes().to_vec(),
            }),
            None => rule,
        };
        rule.step(Expression::Nat {
            destination,
            family: u32::from(family.number()),
            address: key::REGISTER_1,
            port: port.map(|_| key::REGISTER_2),
            flags: 0,
        })
    }
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Source,
    Destination,
}

fn compare(operator: u32, value: Vec<u8>) -> Expression {
    Expression::Compare { register: REGISTER, operator, value }
}

fn change_bits(mark: u32, mask: u32) -> Expression {
    Expression::Bitwise {
        source: REGISTER,
        target: REGISTER,
        mask: (!mask).to_ne_bytes().to_vec(),
        xor: (mark & mask).to_ne_bytes().to_vec(),
    }
}

fn write_mss() -> Expression {
    Expression::SetTcpOption { option: TCP_OPTION_MSS, offset: 2, length: 2, register: REGISTER }
}

/// Returns the bytes of an address, 4 or 16.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}
