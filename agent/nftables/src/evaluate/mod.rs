//! What a base chain of another program does with a packet.
//!
//! The evaluation is an interpretation of the rules with one packet whose bytes are known. What cannot
//! be known (a mark, which other chains set; a rate limit, a user, an unknown match) may be true or false:
//! both ways are followed. An unknown statement may accept. So a chain surely drops a packet if it may be
//! dropped and can never be accepted.

use std::collections::BTreeMap;
use std::net::IpAddr;

use towline_netlink::Family;

use super::expression::{Expression, Verdict, key};
use super::foreign::{Element, ForeignTable};
use super::rule::Rule;
use super::set::KeyType;
use super::table::{Hook, Policy, TableFamily};

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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fate {
    /// True if the packet may pass.
    pub can_pass: bool,
    /// Chain in which it may be dropped, by a rule or by the policy of the base chain.
    pub dropped_in: Option<String>,
}

impl Fate {
    /// Returns true if the packet is dropped in any case.
    pub fn is_dropped(&self) -> bool {
        self.dropped_in.is_some() && !self.can_pass
    }
}

/// Greatest depth of jumps; the kernel allows 16.
const DEPTH: usize = 16;
/// Greatest number of rules that are evaluated for one packet. With more, the packet may pass.
const RULES: usize = 20_000;
/// Conntrack state of a new connection (`NF_CT_STATE_BIT(IP_CT_NEW)`), which iptables numbers alike.
const NEW: u32 = 8;
/// States that a packet that begins a connection does not have: invalid, established, related.
const ORDINARY: u32 = 0b111;
const LOCAL: u32 = libc::RTN_LOCAL as u32;
const UNICAST: u32 = libc::RTN_UNICAST as u32;
/// Bytes of a name of a link.
const NAME: usize = 16;
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

    /// Returns what happens to a packet in a base chain.
    pub fn evaluate(&self, chain: &str, packet: &Packet) -> Fate {
        let mut run = Run { table: self, packet, bytes: packet.bytes(), rules: 0 };
        let flow = run.chain(chain, 0);
        let mut fate = Fate { can_pass: flow.accepts || run.rules > RULES, dropped_in: flow.drops };
        if flow.continues {
            let base = self.chains.get(chain).and_then(|chain| chain.base);
            match base.map(|base| base.policy) {
                Some(Policy::Drop) => fate.dropped_in = Some(chain.to_owned()),
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
    drops: Option<String>,
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
                Verdict::Drop => flow.drops = Some(name.to_owned()),
                Verdict::Return => flow.continues = true,
                Verdict::Jump(to) => {
                    let inner = self.chain(&to, depth + 1);
                    flow.accepts |= inner.accepts;
                    flow.drops = inner.drops.or(flow.drops);
                    ends &= !inner.continues;
                }
                Verdict::Goto(to) => {
                    let inner = self.chain(&to, depth + 1);
                    flow.accepts |= inner.accepts;
                    flow.drops = inner.drops.or(flow.drops);
                    flow.continues |= inner.continues;
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
                Expression::Target { name, .. } => {
                    if REJECT_TARGETS.contains(&name.as_str()) {
                        return Effect::Verdict(Verdict::Drop, truth);
                    }
                    if !PASSING_TARGETS.contains(&name.as_str()) {
                        return Effect::Unknown;
                    }
                    Truth::Yes
                }
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

    /// Evaluates a match of iptables.
    fn iptables(&self, name: &str, revision: u32, info: &[u8]) -> Truth {
        let short = |at: usize| {
            info.get(at..at + 2)
                .and_then(|bytes| bytes.first_chunk())
                .map(|b| u16::from_ne_bytes(*b))
        };
        let long = |at: usize| {
            info.get(at..at + 4)
                .and_then(|bytes| bytes.first_chunk())
                .map(|b| u32::from_ne_bytes(*b))
        };
        let known = match (name, revision) {
            ("comment", _) => Some(true),
            // struct xt_conntrack_mtinfo3: flags at 146, inverted flags at 148, states at 150.
            ("conntrack", 2 | 3) => (|| {
                const STATE: u16 = 1;
                (short(146)? == STATE).then_some(())?;
                let states = u32::from(short(150)?);
                // Another chain may have translated an address, or excluded the packet from conntrack.
                let is_known = states & NEW != 0 || states & !(ORDINARY | NEW) == 0;
                is_known.then_some((states & NEW != 0) != (short(148)? & STATE != 0))
            })(),
            ("state", _) => long(0).map(|states| states & NEW != 0),
            // struct xt_multiport_v1: flags, count, 15 ports, 15 flags of ranges, inversion.
            ("multiport", 1) => (|| {
                let (flags, count) = (info.first().copied()?, info.get(1).copied()?);
                let has = |port: u16| {
                    let mut found = false;
                    let mut at = 0;
                    while at < usize::from(count.min(15)) {
                        let first = short(2 + 2 * at)?;
                        let is_range = info.get(32 + at).copied()? != 0;
                        at += 1 + usize::from(is_range);
                        let last = if is_range { short(2 + 2 * (at - 1))? } else { first };
                        found |= (first..=last).contains(&port);
                    }
                    Some(found)
                };
                let (source, destination) =
                    (has(self.packet.source_port)?, has(self.packet.destination_port)?);
                let found = match flags {
                    0 => source,
                    1 => destination,
                    2 => source || destination,
                    _ => return None,
                };
                Some(found != (info.get(47).copied()? != 0))
            })(),
            ("addrtype", 1) => (|| {
                const INVERT_SOURCE: u32 = 1;
                const INVERT_DESTINATION: u32 = 2;
                let (source, destination, flags) = (short(0)?, short(2)?, long(4)?);
                (flags & !(INVERT_SOURCE | INVERT_DESTINATION) == 0).then_some(())?;
                let fits = |mask: u16, kind: u32, inverted: bool| {
                    mask == 0 || (u32::from(mask) & 1 << kind != 0) != inverted
                };
                Some(
                    fits(source, self.kind_of_source(), flags & INVERT_SOURCE != 0)
                        && fits(
                            destination,
                            self.kind_of_destination(),
                            flags & INVERT_DESTINATION != 0,
                        ),
                )
            })(),
            ("tcp" | "udp", 0) => (|| {
                let is_tcp = name == "tcp";
                let protocol = if is_tcp { libc::IPPROTO_TCP } else { libc::IPPROTO_UDP };
                if i32::from(self.packet.protocol) != protocol {
                    return Some(false);
                }
                let range =
                    |at: usize, port: u16| Some((short(at)?..=short(at + 2)?).contains(&port));
                let inverted = info.get(if is_tcp { 11 } else { 8 }).copied()?;
                let flags = if is_tcp { info.get(9).copied()? } else { 0 };
                // A match of flags: the packet is a SYN.
                let syn =
                    flags == 0 || (flags & 2 == info.get(10).copied()?) != (inverted & 4 != 0);
                Some(
                    range(0, self.packet.source_port)? != (inverted & 1 != 0)
                        && range(4, self.packet.destination_port)? != (inverted & 2 != 0)
                        && syn,
                )
            })(),
            ("icmp" | "icmp6", _) => Some(false),
            _ => None,
        };
        known.map_or(Truth::Maybe, Truth::from)
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
    name.resize(NAME, 0);
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
        let network = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut header = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, self.protocol, 0, 0];
                header.extend(source.octets());
                header.extend(destination.octets());
                header
            }
            (source, destination) => {
                let mut header = vec![0x60, 0, 0, 0, 0, 20, self.protocol, 64];
                for address in [source, destination] {
                    header.extend(match address {
                        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                        IpAddr::V6(v6) => v6.octets(),
                    });
                }
                header
            }
        };
        (network, transport)
    }
}

#[cfg(test)]
mod tests {
    use super::super::foreign::ForeignSet;
    use super::super::set::Interval;
    use super::*;
    use crate::{Chain, ChainKind, CtState, IptablesStates};

    fn packet() -> Packet {
        Packet {
            hook: Hook::Input,
            input: Some(PacketLink { index: 7, name: "towline0".to_owned() }),
            output: None,
            source: "198.19.0.1".parse().unwrap(),
            destination: "198.19.0.2".parse().unwrap(),
            protocol: libc::IPPROTO_TCP as u8,
            source_port: 40_000,
            destination_port: 10_250,
        }
    }

    fn table(chains: impl IntoIterator<Item = (&'static str, Chain)>) -> ForeignTable {
        ForeignTable {
            family: TableFamily::Ip,
            name: "filter".to_owned(),
            chains: chains.into_iter().map(|(name, chain)| (name.to_owned(), chain)).collect(),
            sets: BTreeMap::new(),
        }
    }

    fn input(rules: impl IntoIterator<Item = Rule>) -> Chain {
        Chain::base(ChainKind::Filter, Hook::Input, 0).policy(Policy::Drop).rules(rules)
    }

    fn is_dropped(rules: impl IntoIterator<Item = Rule>) -> bool {
        table([("INPUT", input(rules))]).evaluate("INPUT", &packet()).is_dropped()
    }

    #[test]
    fn a_policy_drops_what_no_rule_accepts() {
        let tcp = libc::IPPROTO_TCP as u8;
        let answers = || Rule::new().ct_state(CtState::ESTABLISHED | CtState::RELATED).accept();
        assert!(is_dropped([]));
        assert!(is_dropped([
            answers(),
            Rule::new()
                .iptables_conntrack(IptablesStates::ESTABLISHED | IptablesStates::RELATED)
                .accept(),
            Rule::new().input("lo").accept(),
            Rule::new().protocol(libc::IPPROTO_UDP as u8).destination_port(51_830).accept(),
            Rule::new().protocol(tcp).destination_port(22).accept(),
            Rule::new().source("10.0.0.0/8".parse().unwrap()).accept(),
        ]));
        for accepts in [
            Rule::new().input("towline0").accept(),
            Rule::new().not_input("eth0").accept(),
            Rule::new().source("198.19.0.0/16".parse().unwrap()).accept(),
            Rule::new().protocol(tcp).destination_ports(10_000..=11_000).accept(),
            Rule::new().ct_state(CtState::NEW).accept(),
            Rule::new().tcp_syn().accept(),
            Rule::new().destination_is_local().accept(),
        ] {
            assert!(!is_dropped([answers(), accepts.clone()]), "{accepts:?}");
        }
    }

    #[test]
    fn what_is_unknown_may_pass() {
        let limit = Rule::new().step(Expression::Other("limit".to_owned()));
        assert!(!is_dropped([limit.clone().accept()]));
        assert!(is_dropped([limit.drop()]));
        assert!(!is_dropped([Rule::new().socket_owner(0).accept()]));
    }

    #[test]
    fn jumps_return_and_a_goto_ends_the_chain() {
        let jump = |inner: Chain| {
            let table = table([
                ("INPUT", input([Rule::new().jump("ufw-user-input")])),
                ("ufw-user-input", inner),
            ]);
            table.evaluate("INPUT", &packet())
        };
        let fate = jump(Chain::regular().rule(Rule::new().input("eth0").accept()));
        assert_eq!(fate, Fate { can_pass: false, dropped_in: Some("INPUT".to_owned()) });
        assert!(!jump(Chain::regular().rule(Rule::new().accept())).is_dropped());
        let fate = jump(Chain::regular().rule(Rule::new().drop()));
        assert_eq!(fate.dropped_in.as_deref(), Some("ufw-user-input"));
        let looped = table([("INPUT", input([Rule::new().goto("INPUT")]))]);
        assert!(looped.evaluate("INPUT", &packet()).is_dropped(), "evaluation ends");
    }

    #[test]
    fn sets_and_verdict_maps_are_looked_up() {
        let mut ours = table([]);
        let map = Rule::new()
            .step(Expression::Ct { key: key::CT_STATE, register: key::REGISTER_1 })
            .step(Expression::VerdictMap { set: "__map0".to_owned(), register: key::REGISTER_1 });
        let ports = Rule::new().protocol(libc::IPPROTO_TCP as u8).destination_port_in("ports");
        ours.chains.insert("INPUT".to_owned(), input([map, ports.accept()]));
        let state = |state: u32| KeyType::decode(&state.to_ne_bytes()).unwrap();
        let element =
            |first, last, verdict| Element { values: Interval::new(first, last), verdict };
        let established = element(state(2), state(2), Some(Verdict::Accept));
        let states = ForeignSet::new(4, vec![established], true);
        ours.sets.insert("__map0".to_owned(), states);
        let numbers = ForeignSet::new(2, vec![element(22, 22, None)], true);
        ours.sets.insert("ports".to_owned(), numbers);
        assert!(ours.evaluate("INPUT", &packet()).is_dropped());
        ours.sets.get_mut("ports").unwrap().elements.push(element(10_000, 11_000, None));
        assert!(!ours.evaluate("INPUT", &packet()).is_dropped());
        let new = element(state(NEW), state(NEW), Some(Verdict::Drop));
        ours.sets.get_mut("__map0").unwrap().elements.push(new);
        assert!(ours.evaluate("INPUT", &packet()).is_dropped());
        ours.sets.get_mut("__map0").unwrap().length = 6;
        assert!(!ours.evaluate("INPUT", &packet()).is_dropped(), "of another kind");
    }

    #[test]
    fn what_is_not_in_a_set_that_is_not_known_whole_is_unknown() {
        for (is_complete, expected) in [(true, true), (false, false)] {
            let ports = Rule::new().protocol(libc::IPPROTO_TCP as u8).destination_port_in("ports");
            let mut ours = table([("INPUT", input([ports.accept()]))]);
            let element = Element { values: Interval::new(22, 22), verdict: None };
            let set = ForeignSet::new(2, vec![element], is_complete);
            ours.sets.insert("ports".to_owned(), set);
            assert_eq!(ours.evaluate("INPUT", &packet()).is_dropped(), expected);
        }
    }

    #[test]
    fn marks_are_unknown_since_other_chains_set_them() {
        // As kube-router and Calico do: accepted packets are marked, all others are rejected.
        let is_marked = |operator| {
            Rule::new()
                .step(Expression::Meta { key: key::META_MARK, register: key::REGISTER_1 })
                .step(Expression::Bitwise {
                    source: key::REGISTER_1,
                    target: key::REGISTER_1,
                    mask: 0x10000u32.to_ne_bytes().to_vec(),
                    xor: vec![0; 4],
                })
                .step(Expression::Compare {
                    register: key::REGISTER_1,
                    operator,
                    value: 0x10000u32.to_ne_bytes().to_vec(),
                })
        };
        let by_iptables = |inverted: u8| {
            let mut info = 0x10000u32.to_ne_bytes().repeat(2);
            info.extend([inverted, 0, 0, 0]);
            let name = "mark".to_owned();
            Rule::new().step(Expression::Match { name, revision: 1, info })
        };
        let status = Rule::new()
            .step(Expression::Ct { key: key::CT_STATUS, register: key::REGISTER_1 })
            .step(Expression::Compare {
                register: key::REGISTER_1,
                operator: key::NOT_EQUAL,
                value: vec![0; 4],
            });
        // The policy of the pod network: a drop of what is not marked.
        assert!(!is_dropped([is_marked(key::NOT_EQUAL).drop(), Rule::new().accept()]));
        assert!(!is_dropped([by_iptables(1).drop(), Rule::new().accept()]));
        // The remedy for Docker's own tables: an accept of what is marked.
        assert!(!is_dropped([is_marked(key::EQUAL).accept()]));
        assert!(!is_dropped([by_iptables(0).accept()]));
        assert!(!is_dropped([status.accept()]));
        // A rule that only sets a mark decides nothing.
        let sets = Rule::new().step(Expression::Target {
            name: "MARK".to_owned(),
            revision: 2,
            info: vec![],
        });
        assert!(is_dropped([sets]));
        assert!(is_dropped([by_iptables(0).drop()]), "the policy drops it otherwise");
    }

    #[test]
    fn an_unknown_statement_may_accept_and_an_unknown_match_may_hold() {
        let other = |name: &str| Rule::new().step(Expression::Other(name.to_owned()));
        for statement in ["queue", "synproxy", "fwd", "tproxy", "immediate", "of the future"] {
            assert!(!is_dropped([other(statement)]), "{statement}");
        }
        for decides_nothing in ["log", "limit", "flow_offload"] {
            assert!(is_dropped([other(decides_nothing)]), "{decides_nothing}");
        }
    }

    #[test]
    fn lists_of_ports_are_decoded() {
        let multiport = |flags: u8, ports: &[u16], ranges: &[u8], inverted: u8| {
            let mut info = vec![flags, ports.len() as u8];
            let mut all = ports.to_vec();
            all.resize(15, 0);
            info.extend(all.iter().flat_map(|port| port.to_ne_bytes()));
            let mut flags = ranges.to_vec();
            flags.resize(15, 0);
            info.extend(flags);
            info.push(inverted);
            let name = "multiport".to_owned();
            let tcp = Rule::new().protocol(libc::IPPROTO_TCP as u8);
            tcp.step(Expression::Match { name, revision: 1, info }).accept()
        };
        const SOURCE: u8 = 0;
        const DESTINATION: u8 = 1;
        const EITHER: u8 = 2;
        for (rule, expected) in [
            (multiport(DESTINATION, &[80, 443], &[], 0), true),
            (multiport(DESTINATION, &[80, 443], &[], 1), false),
            (multiport(DESTINATION, &[80, 10_250], &[], 0), false),
            (multiport(DESTINATION, &[80, 10_000, 11_000], &[0, 1], 0), false),
            (multiport(DESTINATION, &[9_000, 10_000, 11_000], &[1], 0), true),
            (multiport(SOURCE, &[10_250], &[], 0), true),
            (multiport(SOURCE, &[40_000], &[], 0), false),
            (multiport(EITHER, &[10_250], &[], 0), false),
        ] {
            assert_eq!(is_dropped([rule.clone()]), expected, "{rule:?}");
        }
    }

    #[test]
    fn forwarded_packets_and_iptables_targets_are_evaluated_too() {
        let forwarded = Packet {
            hook: Hook::Forward,
            output: Some(PacketLink { index: 9, name: "cni0".to_owned() }),
            destination: "10.244.1.2".parse().unwrap(),
            ..packet()
        };
        let chain = |rule: Rule| {
            table([("FORWARD", Chain::base(ChainKind::Filter, Hook::Forward, 0).rule(rule))])
        };
        let target = |name: &str| {
            Rule::new().step(Expression::Target {
                name: name.to_owned(),
                revision: 0,
                info: vec![],
            })
        };
        assert!(chain(target("REJECT")).evaluate("FORWARD", &forwarded).is_dropped());
        assert!(!chain(target("LOG")).evaluate("FORWARD", &forwarded).is_dropped());
        let out = Rule::new().output("cni0").drop();
        assert!(chain(out).evaluate("FORWARD", &forwarded).is_dropped());
        let other = Rule::new().output("docker0").drop();
        assert!(!chain(other).evaluate("FORWARD", &forwarded).is_dropped());
    }
}
