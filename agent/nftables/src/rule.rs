//! Rules, put together from left to right: what to match, then what to do.

use std::net::IpAddr;
use std::ops::{BitOr, RangeInclusive};
use std::time::Duration;

use ipnet::IpNet;

use towline_netlink::Family;

use super::expression::{Expression, Verdict, key};

/// A rule. Steps are worked off in order; the first match that fails ends it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    /// Shown by other tools; names the rule's counter.
    pub comment: Option<String>,
    /// The steps.
    pub expressions: Vec<Expression>,
}

/// States of a packet's connection; they can be combined with `|`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CtState(u32);

impl CtState {
    /// Not part of any valid connection.
    pub const INVALID: Self = Self(1);
    /// Both directions were seen.
    pub const ESTABLISHED: Self = Self(2);
    /// Belongs to another connection (ICMP errors).
    pub const RELATED: Self = Self(4);
    /// The first direction only.
    pub const NEW: Self = Self(8);
}

impl BitOr for CtState {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// States of a connection as iptables numbers them; they can be combined with `|`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IptablesStates(u16);

impl IptablesStates {
    /// Both directions were seen.
    pub const ESTABLISHED: Self = Self(1 << 1);
    /// Belongs to another connection (ICMP errors).
    pub const RELATED: Self = Self(1 << 2);
    /// Its destination was translated.
    pub const DNAT: Self = Self(1 << 7);
}

impl BitOr for IptablesStates {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

const LINK_NAME_BYTES: usize = 16;
const REGISTER: u32 = key::REGISTER_1;
const TCP_OPTION_MSS: u8 = 2;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

impl Rule {
    /// Matches every packet and does nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// With a comment (127 bytes count).
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    /// Came in by the link of that name.
    pub fn input(self, link: &str) -> Self {
        self.link(key::META_IIFNAME, link, key::EQUAL)
    }

    /// Came in by another link; also matches what was made here.
    pub fn not_input(self, link: &str) -> Self {
        self.link(key::META_IIFNAME, link, key::NOT_EQUAL)
    }

    /// Was made on this host, instead of having come in by a link.
    pub fn made_here(self) -> Self {
        self.link(key::META_IIFNAME, "", key::EQUAL)
    }

    /// Was sent by a socket of this host that a process of that user opened. Packets of sockets
    /// that nobody holds any more, and of other network namespaces, have no owner.
    pub fn socket_owner(self, uid: u32) -> Self {
        self.steps([
            Expression::Meta { key: key::META_SKUID, register: REGISTER },
            compare(key::EQUAL, uid.to_ne_bytes().to_vec()),
        ])
    }

    /// Leaves by the link of that name.
    pub fn output(self, link: &str) -> Self {
        self.link(key::META_OIFNAME, link, key::EQUAL)
    }

    /// Leaves by another link.
    pub fn not_output(self, link: &str) -> Self {
        self.link(key::META_OIFNAME, link, key::NOT_EQUAL)
    }

    /// Came in by a link whose name begins otherwise.
    pub fn not_input_like(self, prefix: &str) -> Self {
        let name = Expression::Meta { key: key::META_IIFNAME, register: REGISTER };
        self.steps([name, compare(key::NOT_EQUAL, prefix.as_bytes().to_vec())])
    }

    /// Of that address family.
    pub fn family(self, family: Family) -> Self {
        let steps = [
            Expression::Meta { key: key::META_NFPROTO, register: REGISTER },
            compare(key::EQUAL, vec![family.number()]),
        ];
        // Said once is enough.
        if self.expressions.windows(2).any(|pair| pair == steps) {
            return self;
        }
        self.steps(steps)
    }

    /// Of that transport protocol (`IPPROTO_*`).
    pub fn protocol(self, protocol: u8) -> Self {
        self.steps([
            Expression::Meta { key: key::META_L4PROTO, register: REGISTER },
            compare(key::EQUAL, vec![protocol]),
        ])
    }

    /// Has a source inside the network.
    pub fn source(self, net: IpNet) -> Self {
        self.address(Side::Source, net, key::EQUAL)
    }

    /// Has a source outside the network, of the same family.
    pub fn not_source(self, net: IpNet) -> Self {
        self.address(Side::Source, net, key::NOT_EQUAL)
    }

    /// Has a destination inside the network.
    pub fn destination(self, net: IpNet) -> Self {
        self.address(Side::Destination, net, key::EQUAL)
    }

    /// Has a destination outside the network, of the same family.
    pub fn not_destination(self, net: IpNet) -> Self {
        self.address(Side::Destination, net, key::NOT_EQUAL)
    }

    /// Has a destination inside the network, in a table of its family alone, written as iptables writes it.
    pub fn iptables_destination(self, net: IpNet) -> Self {
        let family = Family::of(net.addr());
        self.load_address_of_table(Side::Destination, family).compare_address(net, key::EQUAL)
    }

    /// Its connection is in one of these states, written as iptables writes it.
    pub fn iptables_conntrack(self, states: IptablesStates) -> Self {
        // struct xt_conntrack_mtinfo3: eight addresses, two times, five ports, then these fields.
        const BYTES: usize = 168;
        const MATCH_FLAGS: usize = 146;
        const STATE_MASK: usize = 150;
        const BY_STATE: u16 = 1;
        let mut info = vec![0; BYTES];
        info[MATCH_FLAGS..MATCH_FLAGS + 2].copy_from_slice(&BY_STATE.to_ne_bytes());
        info[STATE_MASK..STATE_MASK + 2].copy_from_slice(&states.0.to_ne_bytes());
        self.step(Expression::Match { name: "conntrack".to_owned(), revision: 3, info })
    }

    /// Has a source in the named set of that family's addresses.
    pub fn source_in(self, family: Family, set: &str) -> Self {
        self.load_address(Side::Source, family).lookup(set)
    }

    /// Has a destination in the named set of that family's addresses.
    pub fn destination_in(self, family: Family, set: &str) -> Self {
        self.load_address(Side::Destination, family).lookup(set)
    }

    /// Adds the destination to a dynamic set.
    pub fn remember_destination(self, family: Family, set: &str) -> Self {
        let set = set.to_owned();
        let rule = self.load_address(Side::Destination, family);
        rule.step(Expression::Remember { set, register: REGISTER, expires: None })
    }

    /// Belongs to a connection whose number is in the named set.
    pub fn connection_in(self, set: &str) -> Self {
        self.step(Expression::Ct { key: key::CT_ID, register: REGISTER }).lookup(set)
    }

    /// Adds the connection's number to an expiring set, or has its time begin again.
    pub fn remember_connection(self, set: &str, time: Duration) -> Self {
        let expires = Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        self.steps([
            Expression::Ct { key: key::CT_ID, register: REGISTER },
            Expression::Remember { set: set.to_owned(), register: REGISTER, expires },
        ])
    }

    /// Takes the connection's number out of a dynamic set.
    pub fn forget_connection(self, set: &str) -> Self {
        self.steps([
            Expression::Ct { key: key::CT_ID, register: REGISTER },
            Expression::Forget { set: set.to_owned(), register: REGISTER },
        ])
    }

    /// Has that source port; the protocol must have been matched before.
    pub fn source_port(self, port: u16) -> Self {
        self.load_port(Side::Source).step(compare(key::EQUAL, port.to_be_bytes().to_vec()))
    }

    /// Has that destination port; the protocol must have been matched before.
    pub fn destination_port(self, port: u16) -> Self {
        self.load_port(Side::Destination).step(compare(key::EQUAL, port.to_be_bytes().to_vec()))
    }

    /// Has one of these destination ports; the protocol must have been matched before.
    pub fn destination_ports(self, ports: RangeInclusive<u16>) -> Self {
        self.load_port(Side::Destination)
            .step(compare(key::NOT_LESS, ports.start().to_be_bytes().to_vec()))
            .step(compare(key::NOT_GREATER, ports.end().to_be_bytes().to_vec()))
    }

    /// Has a source port in the named set; the protocol must have been matched before.
    pub fn source_port_in(self, set: &str) -> Self {
        self.load_port(Side::Source).lookup(set)
    }

    /// Has a destination port in the named set; the protocol must have been matched before.
    pub fn destination_port_in(self, set: &str) -> Self {
        self.load_port(Side::Destination).lookup(set)
    }

    /// Carries the mark, as far as the mask goes.
    pub fn mark(self, mark: u32, mask: u32) -> Self {
        self.masked(Expression::Meta { key: key::META_MARK, register: REGISTER }, mask)
            .step(compare(key::EQUAL, mark.to_ne_bytes().to_vec()))
    }

    /// Does not carry the mark, as far as the mask goes.
    pub fn not_mark(self, mark: u32, mask: u32) -> Self {
        self.masked(Expression::Meta { key: key::META_MARK, register: REGISTER }, mask)
            .step(compare(key::NOT_EQUAL, mark.to_ne_bytes().to_vec()))
    }

    /// Its connection carries the mark, as far as the mask goes.
    pub fn ct_mark(self, mark: u32, mask: u32) -> Self {
        self.masked(Expression::Ct { key: key::CT_MARK, register: REGISTER }, mask)
            .step(compare(key::EQUAL, mark.to_ne_bytes().to_vec()))
    }

    /// Its connection is in one of the states.
    pub fn ct_state(self, states: CtState) -> Self {
        self.masked(Expression::Ct { key: key::CT_STATE, register: REGISTER }, states.0)
            .step(compare(key::NOT_EQUAL, vec![0; 4]))
    }

    /// Travels in the direction of its connection's replies.
    pub fn ct_reply(self) -> Self {
        self.steps([
            Expression::Ct { key: key::CT_DIRECTION, register: REGISTER },
            compare(key::EQUAL, vec![1]),
        ])
    }

    /// Travels in the direction in which its connection began.
    pub fn ct_original(self) -> Self {
        self.steps([
            Expression::Ct { key: key::CT_DIRECTION, register: REGISTER },
            compare(key::EQUAL, vec![0]),
        ])
    }

    /// Its destination is an address of this host.
    pub fn destination_is_local(self) -> Self {
        self.local(key::FIB_DESTINATION)
    }

    /// Its destination is the broadcast address of a network that this host is connected to.
    pub fn destination_is_broadcast(self) -> Self {
        self.address_type(key::FIB_DESTINATION, libc::RTN_BROADCAST)
    }

    /// The way back to its source leads nowhere, or out by another link than the one that it came by.
    /// Before routing only.
    pub fn source_leads_elsewhere(self) -> Self {
        let flags = key::FIB_SOURCE | key::FIB_BY_INPUT;
        self.steps([
            Expression::Fib { flags, result: key::FIB_LINK, register: REGISTER },
            compare(key::EQUAL, vec![0; 4]),
        ])
    }

    /// Its source is an address of this host.
    pub fn source_is_local(self) -> Self {
        self.local(key::FIB_SOURCE)
    }

    /// Matches one packet in so many by chance: `numerator` of `denominator` (above 0).
    pub fn chance(self, numerator: u32, denominator: u32) -> Self {
        self.steps([
            Expression::Random { modulus: denominator, register: REGISTER },
            // Less and greater compare byte by byte.
            Expression::ByteOrder { register: REGISTER, size: 4 },
            compare(key::LESS, numerator.to_be_bytes().to_vec()),
        ])
    }

    /// A TCP segment that opens a connection, of either side.
    pub fn tcp_syn(self) -> Self {
        self.tcp_flags(SYN | RST).step(compare(key::EQUAL, vec![SYN]))
    }

    /// A TCP segment that ends one direction of a connection, or all of it.
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

    /// IPv6 neighbour and router discovery (RFC 4861), which never comes from beyond the link.
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

    /// Counts the packets that came this far.
    pub fn counter(self) -> Self {
        self.step(Expression::Counter)
    }

    /// Sets the bits of the mask to those of the mark; the others stay.
    pub fn set_mark(self, mark: u32, mask: u32) -> Self {
        self.steps([
            Expression::Meta { key: key::META_MARK, register: REGISTER },
            change_bits(mark, mask),
            Expression::SetMeta { key: key::META_MARK, register: REGISTER },
        ])
    }

    /// Sets the bits of the mask in the connection's mark; the others stay.
    pub fn set_ct_mark(self, mark: u32, mask: u32) -> Self {
        self.steps([
            Expression::Ct { key: key::CT_MARK, register: REGISTER },
            change_bits(mark, mask),
            Expression::SetCt { key: key::CT_MARK, register: REGISTER },
        ])
    }

    /// Lowers the MSS that a TCP SYN announces to what the packet's routes, both ways, leave.
    pub fn clamp_mss_to_route(self) -> Self {
        self.tcp_syn().steps([
            Expression::Route { key: key::ROUTE_TCP_MSS, register: REGISTER },
            Expression::ByteOrder { register: REGISTER, size: 2 },
            write_mss(),
        ])
    }

    /// Lowers the MSS that a TCP SYN announces to `bytes`.
    pub fn clamp_mss(self, bytes: u16) -> Self {
        let value = bytes.to_be_bytes().to_vec();
        self.tcp_syn().steps([Expression::Immediate { register: REGISTER, value }, write_mss()])
    }

    /// Lets the packet pass this hook's chain.
    pub fn accept(self) -> Self {
        self.step(Expression::Verdict(Verdict::Accept))
    }

    /// Drops the packet.
    pub fn drop(self) -> Self {
        self.step(Expression::Verdict(Verdict::Drop))
    }

    /// Ends this chain.
    pub fn return_(self) -> Self {
        self.step(Expression::Verdict(Verdict::Return))
    }

    /// Goes through another chain, and back.
    pub fn jump(self, chain: &str) -> Self {
        self.step(Expression::Verdict(Verdict::Jump(chain.to_owned())))
    }

    /// Goes through another chain, and not back.
    pub fn goto(self, chain: &str) -> Self {
        self.step(Expression::Verdict(Verdict::Goto(chain.to_owned())))
    }

    /// Answers with an ICMP error (administratively prohibited) and drops.
    pub fn reject(self) -> Self {
        const PROHIBITED: u8 = 3;
        self.step(Expression::Reject { kind: key::REJECT_ICMPX, code: PROHIBITED })
    }

    /// Answers a TCP segment with a reset and drops it; the protocol must have been matched.
    pub fn reject_tcp(self) -> Self {
        self.step(Expression::Reject { kind: key::REJECT_TCP_RESET, code: 0 })
    }

    /// Leaves the packet out of connection tracking (at priority -300 or before).
    pub fn notrack(self) -> Self {
        self.step(Expression::Notrack)
    }

    /// Translates the source to the address of the link by which the packet leaves. A source
    /// port is kept where it is free (the mapping of RFC 4787 is then endpoint-independent for
    /// most).
    pub fn masquerade(self) -> Self {
        self.step(Expression::Masquerade { flags: 0 })
    }

    /// The same with a random port for every connection: a mapping that depends on the endpoint.
    pub fn masquerade_random(self) -> Self {
        self.step(Expression::Masquerade { flags: key::NAT_RANDOM_FULLY })
    }

    /// Translates the source.
    pub fn snat(self, address: IpAddr, port: Option<u16>) -> Self {
        self.nat(false, address, port)
    }

    /// Translates the destination. With a port, the protocol must have been matched before.
    pub fn dnat(self, address: IpAddr, port: Option<u16>) -> Self {
        self.nat(true, address, port)
    }

    /// With any step at the end.
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

    /// In a table of that family alone.
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

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}
