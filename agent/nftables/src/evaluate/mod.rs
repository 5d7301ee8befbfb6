//! What a base chain of another program does with a packet.
//!
//! The evaluation is an interpretation of the rules with one packet whose bytes are known. What cannot
//! be known (a mark, which other chains set; a rate limit, a user, an unknown match) may be true or false:
//! both ways are followed. An unknown statement may accept. So a chain surely drops a packet if it may be
//! dropped and can never be accepted.

mod iptables;

use std::collections::BTreeMap;
use std::net::IpAddr;

use towline_netlink::Family;

use crate::expression::{Expression, Verdict, key};
use crate::foreign::{Element, ForeignTable};
use crate::rule::{CtState, LINK_NAME_BYTES, Rule, octets};
use crate::set::KeyType;
use crate::table::{Chain, ChainKind, Hook, Policy, TableFamily};

/// Packet that begins a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Hook at which the packet is.
    pub hook: Hook,
    /// Link on which it arrived; `None` for a packet of this host.
    pub input: Option<PacketLink>,
    /// Link by which it leaves; `None` for a packet to this host.
    pub output: Option<PacketLink>,
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// Transport protocol: `IPPROTO_TCP` or `IPPROTO_UDP`.
    pub protocol: u8,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
}

/// Link of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketLink {
    /// Index of the link.
    pub index: u32,
    /// Name of the link.
    pub name: String,
}

/// What may happen to a packet in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fate {
    /// True if the packet may pass.
    pub can_pass: bool,
    /// True if it may be dropped, by a rule or by the policy of the base chain.
    pub can_drop: bool,
}

impl Fate {
    /// Returns true if the packet is dropped in any case.
    pub fn is_dropped(self) -> bool {
        self.can_drop && !self.can_pass
    }
}

/// Greatest depth of jumps; the kernel allows 16.
const DEPTH: usize = 16;
/// Greatest number of rules that are evaluated for one packet. With more, the packet may pass.
const RULES: usize = 20_000;
/// Conntrack state of a new connection, which iptables numbers alike.
const NEW: u32 = CtState::NEW.0;
/// States that a packet that begins a connection does not have.
const ORDINARY: u32 = CtState::INVALID.0 | CtState::ESTABLISHED.0 | CtState::RELATED.0;
const LOCAL: u32 = libc::RTN_LOCAL as u32;
const UNICAST: u32 = libc::RTN_UNICAST as u32;
const REJECT_TARGETS: [&str; 2] = ["REJECT", "DROP"];
/// Expressions that are not decoded, after which the next expression is evaluated. Any other one may give a
/// verdict, as `queue` does.
const MATCHES: [&str; 16] = [
    "bitwise",
    "byteorder",
    "cmp",
    "connlimit",
    "exthdr",
    "hash",
    "inner",
    "limit",
    "lookup",
    "numgen",
    "objref",
    "osf",
    "quota",
    "range",
    "socket",
    "xfrm",
];
/// Expressions that are not decoded and decide nothing.
const STATEMENTS: [&str; 5] = ["dup", "dynset", "flow_offload", "last", "log"];
/// Targets of iptables after which the next rule is evaluated.
const PASSING_TARGETS: [&str; 12] = [
    "AUDIT", "CHECKSUM", "CLASSIFY", "CONNMARK", "CT", "DSCP", "LOG", "MARK", "NFLOG", "TCPMSS",
    "TOS", "TRACE",
];

impl ForeignTable {
    /// Returns true if packets of this family pass the table.
    pub fn covers(&self, family: Family) -> bool {
        match self.family {
            TableFamily::Inet => true,
            TableFamily::Ip => family == Family::V4,
            TableFamily::Ip6 => family == Family::V6,
        }
    }

    /// Returns the filter chains at the packet's hook that drop it in any case.
    pub fn chains_that_drop(&self, packet: &Packet) -> impl Iterator<Item = &str> {
        let covers = self.covers(Family::of(packet.source));
        let is_hooked = |chain: &Chain| {
            chain
                .base
                .is_some_and(|base| base.hook == packet.hook && base.kind == ChainKind::Filter)
        };
        let hooked = self.chains.iter().filter(move |(_, chain)| covers && is_hooked(chain));
        let dropping = hooked.filter(|(name, _)| self.evaluate(name, packet).is_dropped());
        dropping.map(|(name, _)| name.as_str())
    }

    /// Returns what happens to a packet in a base chain.
    pub fn evaluate(&self, chain: &str, packet: &Packet) -> Fate {
        let mut run = Run { table: self, packet, bytes: packet.bytes(), rules: 0 };
        let flow = run.chain(chain, 0);
        let mut fate = Fate { can_pass: flow.accepts || run.rules > RULES, can_drop: flow.drops };
        if flow.continues {
            let base = self.chains.get(chain).and_then(|chain| chain.base);
            match base.map(|base| base.policy) {
                Some(Policy::Drop) => fate.can_drop = true,
                _ => fate.can_pass = true,
            }
        }
        fate
    }
}

/// Ways that a packet may take through a chain.
#[derive(Debug, Default)]
struct Flow {
    accepts: bool,
    drops: bool,
    continues: bool,
}

/// Whether a match holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    No,
    Maybe,
    Yes,
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// Effect of one rule.
enum Effect {
    None,
    Verdict(Verdict, Truth),
    /// An unknown target: the packet may take any way.
    Unknown,
}

struct Run<'a> {
    table: &'a ForeignTable,
    packet: &'a Packet,
    /// Network header, followed by the transport header.
    bytes: (Vec<u8>, Vec<u8>),
    /// Number of rules that were evaluated.
    rules: usize,
}

impl Run<'_> {
    fn chain(&mut self, name: &str, depth: usize) -> Flow {
        let mut flow = Flow::default();
        let Some(chain) = self.table.chains.get(name).filter(|_| depth <= DEPTH) else {
            flow.continues = true;
            return flow;
        };
        for rule in &chain.rules {
            self.rules += 1;
            if self.rules > RULES {
                flow.accepts = true;
                return flow;
            }
            let (verdict, truth) = match self.rule(rule) {
                Effect::None => continue,
                Effect::Verdict(verdict, truth) => (verdict, truth),
                Effect::Unknown => {
                    flow.accepts = true;
                    continue;
                }
            };
            let mut ends = truth == Truth::Yes;
            match verdict {
                Verdict::Accept => flow.accepts = true,
                Verdict::Drop => flow.drops = true,
                Verdict::Return => flow.continues = true,
                Verdict::Jump(ref to) | Verdict::Goto(ref to) => {
                    let inner = self.chain(to, depth + 1);
                    flow.accepts |= inner.accepts;
                    flow.drops |= inner.drops;
                    match verdict {
                        Verdict::Jump(_) => ends &= !inner.continues,
                        _ => flow.continues |= inner.continues,
                    }
                }
            }
            if ends {
                return flow;
            }
        }
        flow.continues = true;
        flow
    }

    fn rule(&self, rule: &Rule) -> Effect {
        let mut registers = Registers::default();
        let mut truth = Truth::Yes;
        for expression in &rule.expressions {
            let holds = match expression {
                Expression::Verdict(verdict) => return Effect::Verdict(verdict.clone(), truth),
                Expression::Reject { .. } => return Effect::Verdict(Verdict::Drop, truth),
                Expression::Target { name, .. } => match name.as_str() {
                    name if REJECT_TARGETS.contains(&name) => {
                        return Effect::Verdict(Verdict::Drop, truth);
                    }
                    name if PASSING_TARGETS.contains(&name) => Truth::Yes,
                    _ => return Effect::Unknown,
                },
                Expression::VerdictMap { set, register } => {
                    match self.look_up(set, registers.get(*register)) {
                        Some(Some(verdict)) => return Effect::Verdict(verdict, truth),
                        Some(None) => Truth::No,
                        None => return Effect::Unknown,
                    }
                }
                Expression::Lookup { set, register, inverted } => {
                    match self.contains(set, registers.get(*register)) {
                        Some(contains) => (contains != *inverted).into(),
                        None => Truth::Maybe,
                    }
                }
                Expression::Compare { register, operator, value } => {
                    match registers.get(*register) {
                        Some(found) => compare(found, *operator, value),
                        None => Truth::Maybe,
                    }
                }
                Expression::Match { name, revision, info } => self.iptables(name, *revision, info),
                Expression::Counter
                | Expression::Notrack
                | Expression::SetMeta { .. }
                | Expression::SetCt { .. }
                | Expression::SetTcpOption { .. }
                | Expression::Remember { .. }
                | Expression::Forget { .. } => Truth::Yes,
                Expression::Other(name) if STATEMENTS.contains(&name.as_str()) => Truth::Yes,
                Expression::Other(name) if MATCHES.contains(&name.as_str()) => {
                    registers = Registers::default();
                    Truth::Maybe
                }
                Expression::Other(_) => return Effect::Unknown,
                Expression::Masquerade { .. } | Expression::Nat { .. } => return Effect::Unknown,
                load => {
                    registers.load(self, load);
                    Truth::Yes
                }
            };
            match holds {
                Truth::No => return Effect::None,
                Truth::Maybe => truth = Truth::Maybe,
                Truth::Yes => {}
            }
        }
        Effect::None
    }

    /// Returns whether a set contains a value; `None` if that is unknown.
    fn contains(&self, set: &str, value: Option<&[u8]>) -> Option<bool> {
        Some(self.element(set, value)?.is_some())
    }

    /// Returns the verdict of a map for a value, `Some(None)` without one; `None` if that is unknown.
    fn look_up(&self, set: &str, value: Option<&[u8]>) -> Option<Option<Verdict>> {
        match self.element(set, value)? {
            None => Some(None),
            Some(element) => element.verdict.clone().map(Some),
        }
    }

    /// Returns the element of a set for a value, `Some(None)` without one; `None` if that is unknown, as
    /// for a value that consists of several registers.
    fn element(&self, set: &str, value: Option<&[u8]>) -> Option<Option<&Element>> {
        let set = self.table.sets.get(set)?;
        let value = KeyType::decode(value.filter(|value| value.len() == set.length)?)?;
        match set.find(value) {
            None if !set.is_complete => None,
            found => Some(found),
        }
    }

    fn kind_of_source(&self) -> u32 {
        if self.packet.input.is_none() { LOCAL } else { UNICAST }
    }

    fn kind_of_destination(&self) -> u32 {
        if self.packet.output.is_none() { LOCAL } else { UNICAST }
    }

    /// Returns the bytes that an expression loads; `None` if they are unknown.
    fn loaded(&self, expression: &Expression) -> Option<Vec<u8>> {
        let packet = self.packet;
        Some(match expression {
            Expression::Immediate { value, .. } => value.clone(),
            Expression::Payload { base, offset, length, .. } => {
                let (network, transport) = &self.bytes;
                let from = match *base {
                    key::PAYLOAD_NETWORK => network,
                    key::PAYLOAD_TRANSPORT => transport,
                    _ => return None,
                };
                let end = offset.checked_add(*length)?;
                from.get(*offset as usize..end as usize)?.to_vec()
            }
            Expression::Meta { key, .. } => match *key {
                key::META_IIFNAME => name_of(packet.input.as_ref()),
                key::META_OIFNAME => name_of(packet.output.as_ref()),
                key::META_IIF => index_of(packet.input.as_ref()),
                key::META_OIF => index_of(packet.output.as_ref()),
                key::META_NFPROTO => vec![Family::of(packet.source).number()],
                key::META_L4PROTO => vec![packet.protocol],
                key::META_PROTOCOL => {
                    let kind =
                        if packet.source.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 };
                    (kind as u16).to_be_bytes().to_vec()
                }
                key::META_PKTTYPE => vec![libc::PACKET_HOST],
                _ => return None,
            },
            Expression::Ct { key, .. } => match *key {
                key::CT_STATE => NEW.to_ne_bytes().to_vec(),
                key::CT_DIRECTION => vec![0],
                _ => return None,
            },
            Expression::Fib { flags, result, .. } if *result == key::FIB_ADDRESS_TYPE => {
                let kind = if flags & key::FIB_SOURCE != 0 {
                    self.kind_of_source()
                } else {
                    self.kind_of_destination()
                };
                kind.to_ne_bytes().to_vec()
            }
            _ => return None,
        })
    }
}

/// Registers of one rule, by the number of their first four bytes.
#[derive(Debug, Default)]
struct Registers(BTreeMap<u32, Vec<u8>>);

impl Registers {
    /// Evaluates an expression that writes to a register.
    fn load(&mut self, run: &Run<'_>, expression: &Expression) {
        match expression {
            Expression::Bitwise { source, target, mask, xor } => {
                let value = self.get(*source).map(|value| {
                    let masked = value.iter().zip(mask).zip(xor);
                    masked.map(|((byte, mask), xor)| byte & mask ^ xor).collect()
                });
                self.set(*target, value);
            }
            // Ports and addresses are in network byte order already, and other numbers are not known.
            Expression::ByteOrder { register, .. } => self.set(*register, None),
            Expression::Meta { register, .. }
            | Expression::Payload { register, .. }
            | Expression::Immediate { register, .. }
            | Expression::Ct { register, .. }
            | Expression::Route { register, .. }
            | Expression::Fib { register, .. }
            | Expression::Random { register, .. } => self.set(*register, run.loaded(expression)),
            _ => {}
        }
    }

    fn set(&mut self, register: u32, value: Option<Vec<u8>>) {
        match value {
            Some(value) => self.0.insert(place(register), value),
            None => self.0.remove(&place(register)),
        };
    }

    fn get(&self, register: u32) -> Option<&[u8]> {
        self.0.get(&place(register)).map(Vec::as_slice)
    }
}

/// Returns the place of a register, in four bytes: the registers 1 to 4 have 16 bytes, those from 8 on
/// (`NFT_REG32_00`) have four.
fn place(register: u32) -> u32 {
    if register < 8 { register * 4 } else { register - 4 }
}

fn compare(found: &[u8], operator: u32, value: &[u8]) -> Truth {
    // A name may be compared by its first bytes only.
    let Some(found) = found.get(..value.len()) else { return Truth::Maybe };
    match operator {
        key::EQUAL => (found == value).into(),
        key::NOT_EQUAL => (found != value).into(),
        key::LESS => (found < value).into(),
        key::NOT_LESS => (found >= value).into(),
        key::NOT_GREATER => (found <= value).into(),
        key::GREATER => (found > value).into(),
        _ => Truth::Maybe,
    }
}

fn name_of(link: Option<&PacketLink>) -> Vec<u8> {
    let mut name = link.map(|link| link.name.as_bytes().to_vec()).unwrap_or_default();
    name.resize(LINK_NAME_BYTES, 0);
    name
}

fn index_of(link: Option<&PacketLink>) -> Vec<u8> {
    link.map_or(0, |link| link.index).to_ne_bytes().to_vec()
}

impl Packet {
    /// Returns the network header and the transport header.
    fn bytes(&self) -> (Vec<u8>, Vec<u8>) {
        let mut transport = Vec::new();
        transport.extend(self.source_port.to_be_bytes());
        transport.extend(self.destination_port.to_be_bytes());
        if i32::from(self.protocol) == libc::IPPROTO_TCP {
            transport.extend([0; 8]);
            // Length of the header in words, then the flag SYN.
            transport.extend([0x50, 2]);
            transport.extend([0xff, 0xff, 0, 0, 0, 0]);
        } else {
            transport.extend([0, 8, 0, 0]);
        }
        let mut network = match self.source {
            IpAddr::V4(_) => vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, self.protocol, 0, 0],
            IpAddr::V6(_) => vec![0x60, 0, 0, 0, 0, 20, self.protocol, 64],
        };
        network.extend([self.source, self.destination].into_iter().flat_map(octets));
        (network, transport)
    }
}

#[cfg(test)]
mod tests;
