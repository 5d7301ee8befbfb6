//! Reads, adds and deletes policy rules, which select the routing table for a packet.

use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::codec::{Message, Received, attributes, u32_at};
use super::{CREATE, Family, NetlinkError, Rtnetlink};

/// Policy rule. A matched property that is `None` matches every packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Address family of the packets.
    pub family: Family,
    /// Priority. Rules with lower priorities are evaluated first.
    pub priority: u32,
    /// Action for packets that match.
    pub action: RuleAction,
    /// Whether the rule applies to the packets that do not match.
    pub invert: bool,
    /// Mark to match, and the mask that is applied to a packet's mark first.
    pub mark: Option<(u32, u32)>,
    /// Network of the source address.
    pub source: Option<IpNet>,
    /// Network of the destination address.
    pub destination: Option<IpNet>,
    /// Name of the input link; `lo` matches local packets.
    pub input: Option<String>,
    /// Name of the link that a socket is bound to.
    pub output: Option<String>,
    /// Transport protocol (`IPPROTO_*`).
    pub protocol: Option<u8>,
    /// Range of the source port.
    pub source_ports: Option<RangeInclusive<u16>>,
    /// Range of the destination port.
    pub destination_ports: Option<RangeInclusive<u16>>,
    /// Range of the user id that owns the sending socket. Root (0) stands for packets without a socket:
    /// forwarded packets, and lookups of the kernel itself.
    pub users: Option<RangeInclusive<u32>>,
    /// For [`RuleAction::Table`]: greatest prefix length of routes that the lookup ignores, so that the
    /// next rule is asked. 0 ignores default routes.
    pub suppress_prefix_length: Option<u32>,
    /// Protocol number (`RTPROT_*`) of the program that created the rule.
    pub made_by: u8,
}

/// Action of a rule for packets that match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleAction {
    /// Looks up a routing table. If the table has no route, the next rule is evaluated.
    Table(u32),
    /// Continues at the rule of this higher priority.
    Goto(u32),
    /// Does nothing. The rule is the target of a [`RuleAction::Goto`].
    Nop,
    /// Ends the lookup with "network unreachable".
    Unreachable,
    /// Another action (`FR_ACT_*`), as read from the kernel.
    Other(u8),
}

impl Rule {
    /// Creates a rule that matches every packet of a family.
    pub fn new(family: Family, priority: u32, action: RuleAction) -> Self {
        Self {
            family,
            priority,
            action,
            invert: false,
            mark: None,
            source: None,
            destination: None,
            input: None,
            output: None,
            protocol: None,
            source_ports: None,
            destination_ports: None,
            users: None,
            suppress_prefix_length: None,
            made_by: libc::RTPROT_STATIC,
        }
    }
}

const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
const FRA_GOTO: u16 = 4;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_OIFNAME: u16 = 17;
const FRA_UID_RANGE: u16 = 20;
const FRA_PROTOCOL: u16 = 21;
const FRA_IP_PROTO: u16 = 22;
const FRA_SPORT_RANGE: u16 = 23;
const FRA_DPORT_RANGE: u16 = 24;
const FR_ACT_TO_TBL: u8 = 1;
const FR_ACT_GOTO: u8 = 2;
const FR_ACT_NOP: u8 = 3;
const FR_ACT_UNREACHABLE: u8 = 7;
const FIB_RULE_INVERT: u32 = 2;
/// Length in bytes of `struct fib_rule_hdr`.
pub(super) const RULE_HEADER: usize = 12;

impl Rtnetlink {
    /// Adds a rule, which must not exist yet.
    pub fn add_rule(&mut self, rule: &Rule) -> Result<(), NetlinkError> {
        let request = message(libc::RTM_NEWRULE, CREATE, rule);
        self.connection.request(|| format!("add {rule}"), request)
    }

    /// Deletes a rule by all its properties.
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<(), NetlinkError> {
        let request = message(libc::RTM_DELRULE, 0, rule);
        self.connection.request(|| format!("delete {rule}"), request)
    }

    /// Returns all rules of a family, in the order of evaluation.
    pub fn rules(&mut self, family: Family) -> Result<Vec<Rule>, NetlinkError> {
        let mut header = [0; RULE_HEADER];
        header[0] = family.number();
        let request = Message::new(libc::RTM_GETRULE, 0, &header);
        self.connection.dump("list policy rules", &request, |received| {
            parse(&received).filter(|rule| rule.family == family)
        })
    }
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let family = match self.family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        write!(f, "the {family} policy rule of priority {}", self.priority)
    }
}

/// Builds a request about a rule.
pub fn message(kind: u16, flags: u16, rule: &Rule) -> Message {
    let (action, target) = match rule.action {
        RuleAction::Table(table) => (FR_ACT_TO_TBL, Some((FRA_TABLE, table))),
        RuleAction::Goto(priority) => (FR_ACT_GOTO, Some((FRA_GOTO, priority))),
        RuleAction::Nop => (FR_ACT_NOP, None),
        RuleAction::Unreachable => (FR_ACT_UNREACHABLE, None),
        RuleAction::Other(action) => (action, None),
    };
    let mut header = [0; RULE_HEADER];
    header[0] = rule.family.number();
    header[1] = rule.destination.map_or(0, |net| net.prefix_len());
    header[2] = rule.source.map_or(0, |net| net.prefix_len());
    header[7] = action;
    let flag_bits = if rule.invert { FIB_RULE_INVERT } else { 0 };
    header[8..12].copy_from_slice(&flag_bits.to_ne_bytes());
    let mut message = Message::new(kind, flags, &header);
    message.u32(FRA_PRIORITY, rule.priority).u8(FRA_PROTOCOL, rule.made_by);
    if let Some((kind, number)) = target {
        message.u32(kind, number);
    }
    if let Some(length) = rule.suppress_prefix_length {
        message.u32(FRA_SUPPRESS_PREFIXLEN, length);
    }
    if let Some((mark, mask)) = rule.mark {
        message.u32(FRA_FWMARK, mark).u32(FRA_FWMASK, mask);
    }
    if let Some(net) = rule.destination {
        message.ip(FRA_DST, net.network());
    }
    if let Some(net) = rule.source {
        message.ip(FRA_SRC, net.network());
    }
    if let Some(name) = &rule.input {
        message.string(FRA_IIFNAME, name);
    }
    if let Some(name) = &rule.output {
        message.string(FRA_OIFNAME, name);
    }
    if let Some(protocol) = rule.protocol {
        message.u8(FRA_IP_PROTO, protocol);
    }
    if let Some(ports) = &rule.source_ports {
        message.bytes(FRA_SPORT_RANGE, &port_range(ports));
    }
    if let Some(ports) = &rule.destination_ports {
        message.bytes(FRA_DPORT_RANGE, &port_range(ports));
    }
    if let Some(users) = &rule.users {
        // `struct fib_rule_uid_range`.
        let [start, end] = [users.start().to_ne_bytes(), users.end().to_ne_bytes()];
        message.bytes(FRA_UID_RANGE, &[start, end].concat());
    }
    message
}

/// Encodes `struct fib_rule_port_range`, in host byte order.
fn port_range(ports: &RangeInclusive<u16>) -> [u8; 4] {
    let [a, b] = ports.start().to_ne_bytes();
    let [c, d] = ports.end().to_ne_bytes();
    [a, b, c, d]
}

/// Parses a message of a dump. Returns `None` unless it describes a policy rule.
pub fn parse(received: &Received<'_>) -> Option<Rule> {
    if received.kind != libc::RTM_NEWRULE {
        return None;
    }
    let [family, destination_length, source_length, _, table, _, _, action] =
        *received.payload.first_chunk::<8>()?;
    let mut table = u32::from(table);
    let mut rule = Rule::new(Family::from_number(family)?, 0, RuleAction::Other(action));
    rule.invert = u32_at(received.payload, 8)? & FIB_RULE_INVERT != 0;
    rule.made_by = libc::RTPROT_UNSPEC;
    let (mut mark, mut mask) = (None, u32::MAX);
    let mut target = 0;
    for attribute in attributes(received.payload, RULE_HEADER) {
        match attribute.kind {
            FRA_DST => rule.destination = IpNet::new(attribute.ip()?, destination_length).ok(),
            FRA_SRC => rule.source = IpNet::new(attribute.ip()?, source_length).ok(),
            FRA_IIFNAME => rule.input = Some(attribute.string()),
            FRA_OIFNAME => rule.output = Some(attribute.string()),
            FRA_PRIORITY => rule.priority = attribute.u32()?,
            FRA_FWMARK => mark = attribute.u32(),
            FRA_FWMASK => mask = attribute.u32()?,
            FRA_TABLE => table = attribute.u32()?,
            // The kernel writes -1 where nothing is suppressed.
            FRA_SUPPRESS_PREFIXLEN => {
                rule.suppress_prefix_length = Some(attribute.u32()?).filter(|n| *n != u32::MAX);
            }
            FRA_GOTO => target = attribute.u32()?,
            FRA_PROTOCOL => rule.made_by = attribute.u8()?,
            FRA_IP_PROTO => rule.protocol = attribute.u8(),
            FRA_SPORT_RANGE => rule.source_ports = Some(read_ports(attribute.value)?),
            FRA_UID_RANGE => {
                let [start, end] = [0, 4].map(|at| u32_at(attribute.value, at));
                rule.users = Some(start?..=end?);
            }
            FRA_DPORT_RANGE => rule.destination_ports = Some(read_ports(attribute.value)?),
            _ => {}
        }
    }
    // The kernel omits a mark of 0 but sends its mask.
    rule.mark = match (mark, mask) {
        (None, u32::MAX | 0) => None,
        (mark, mask) => Some((mark.unwrap_or(0), mask)),
    };
    rule.action = match action {
        FR_ACT_TO_TBL => RuleAction::Table(table),
        FR_ACT_GOTO => RuleAction::Goto(target),
        FR_ACT_NOP => RuleAction::Nop,
        FR_ACT_UNREACHABLE => RuleAction::Unreachable,
        other => RuleAction::Other(other),
    };
    Some(rule)
}

fn read_ports(value: &[u8]) -> Option<RangeInclusive<u16>> {
    let [a, b, c, d] = *value.first_chunk::<4>()?;
    Some(u16::from_ne_bytes([a, b])..=u16::from_ne_bytes([c, d]))
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use towline_netns::namespace_test;

    namespace_test! {
        fn rules_are_read_back_as_they_were_written() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            for family in Family::ALL {
                let before = rtnetlink.rules(family).unwrap();
                let mut marked = Rule::new(family, 21_580, RuleAction::Table(21_580));
                marked.invert = true;
                marked.mark = Some((0x10, 0x30));
                let mut unmarked = Rule::new(family, 21_581, RuleAction::Table(21_580));
                unmarked.mark = Some((0, 0x30));
                let mut by_port = Rule::new(family, 21_582, RuleAction::Unreachable);
                by_port.protocol = Some(libc::IPPROTO_UDP as u8);
                by_port.source_ports = Some(51_830..=51_830);
                by_port.destination_ports = Some(1..=65_534);
                by_port.input = Some("lo".to_owned());
                let mut by_address = Rule::new(family, 21_583, RuleAction::Table(254));
                let (source, destination) = match family {
                    Family::V4 => ("10.0.0.0/8", "192.0.2.1/32"),
                    Family::V6 => ("fd00::/8", "2001:db8::1/128"),
                };
                by_address.source = Some(source.parse().unwrap());
                by_address.destination = Some(destination.parse().unwrap());
                let mut past = Rule::new(family, 21_584, RuleAction::Goto(21_585));
                past.protocol = Some(libc::IPPROTO_TCP as u8);
                past.users = Some(0..=0);
                let target = Rule::new(family, 21_585, RuleAction::Nop);
                let ours = [marked, unmarked, by_port, by_address, past, target];
                for rule in &ours {
                    rtnetlink.add_rule(rule).unwrap();
                    let error = rtnetlink.add_rule(rule).unwrap_err();
                    assert_eq!(error.errno(), Some(Errno::EEXIST));
                }
                let mut listed = rtnetlink.rules(family).unwrap();
                listed.retain(|rule| !before.contains(rule));
                assert_eq!(listed, ours);
                for rule in &ours {
                    rtnetlink.delete_rule(rule).unwrap();
                }
                assert_eq!(rtnetlink.rules(family).unwrap(), before);
            }
        }
    }
}
