//! Named sets and their elements, as values.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;

/// Named set of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Type of the elements.
    pub key: KeyType,
    /// Whether the elements are intervals, which must not overlap. Otherwise they are single values.
    pub interval: bool,
    /// Whether rules may add elements.
    pub dynamic: bool,
    /// Greatest number of elements, if elements have a timeout. Such elements belong to the rules that
    /// add them: they are neither read nor changed here.
    pub expiring: Option<u32>,
    /// Elements of the set; empty if they have a timeout.
    pub elements: BTreeSet<Interval>,
}

/// Type of a set's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyType {
    /// IPv4 addresses.
    Ipv4,
    /// IPv6 addresses.
    Ipv6,
    /// Ports of a transport protocol.
    Port,
    /// Ids of conntrack entries.
    Connection,
    /// Another type, as read from the kernel.
    Other {
        /// Kernel's number of the type.
        number: u32,
        /// Length of an element in bytes.
        length: u32,
    },
}

/// Range of values, both ends included. A single value is a range of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interval {
    first: u128,
    last: u128,
}

impl Set {
    /// Creates an interval set of the networks of one family. Networks of the other family and networks
    /// inside another one are left out.
    pub fn networks<'a>(key: KeyType, networks: impl IntoIterator<Item = &'a IpNet>) -> Self {
        let wanted = |net: &&IpNet| match key {
            KeyType::Ipv4 => matches!(net, IpNet::V4(_)),
            KeyType::Ipv6 => matches!(net, IpNet::V6(_)),
            KeyType::Port | KeyType::Connection | KeyType::Other { .. } => false,
        };
        let mut sorted: Vec<Interval> =
            networks.into_iter().filter(wanted).map(|net| Interval::from(*net)).collect();
        // Among intervals with the same first value the widest comes first. Each next interval lies
        // either inside or beyond the last one that is kept.
        sorted.sort_unstable_by_key(|interval| (interval.first, std::cmp::Reverse(interval.last)));
        sorted.dedup_by(|next, kept| next.last <= kept.last);
        Self {
            key,
            interval: true,
            dynamic: false,
            expiring: None,
            elements: sorted.into_iter().collect(),
        }
    }

    /// Creates a set of single ports.
    pub fn ports(ports: impl IntoIterator<Item = u16>) -> Self {
        let elements = ports.into_iter().map(Interval::from).collect();
        Self { key: KeyType::Port, interval: false, dynamic: false, expiring: None, elements }
    }

    /// Creates an empty set of single values that rules add.
    pub fn dynamic(key: KeyType) -> Self {
        Self { key, interval: false, dynamic: true, expiring: None, elements: BTreeSet::new() }
    }

    /// Creates an empty set of at most `size` single values that rules add with a timeout.
    pub fn expiring(key: KeyType, size: u32) -> Self {
        Self { expiring: Some(size), ..Self::dynamic(key) }
    }

    /// Returns true if both sets differ at most in their elements.
    pub(super) fn same_shape(&self, other: &Self) -> bool {
        self.key == other.key
            && self.interval == other.interval
            && self.dynamic == other.dynamic
            && self.expiring == other.expiring
    }
}

impl KeyType {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Ipv6 => 8,
            // The type "integer": nft has no type for conntrack ids.
            Self::Connection => 4,
            Self::Port => 13,
            Self::Other { number, .. } => number,
        }
    }

    /// Returns the length of an element in bytes.
    pub(super) fn length(self) -> usize {
        match self {
            Self::Ipv4 | Self::Connection => 4,
            Self::Ipv6 => 16,
            Self::Port => 2,
            Self::Other { length, .. } => length as usize,
        }
    }

    pub(super) fn from_number(number: u32, length: u32) -> Self {
        [Self::Ipv4, Self::Ipv6, Self::Port, Self::Connection]
            .into_iter()
            .find(|key| key.number() == number && key.length() == length as usize)
            .unwrap_or(Self::Other { number, length })
    }

    /// Returns the greatest value of this type.
    pub(super) fn max(self) -> u128 {
        match self.length() {
            length @ 1..16 => (1 << (8 * length)) - 1,
            _ => u128::MAX,
        }
    }

    /// Encodes a value in network byte order, with the length of the type.
    pub(super) fn encode(self, value: u128) -> Vec<u8> {
        let bytes = value.to_be_bytes();
        let start = bytes.len().saturating_sub(self.length());
        bytes.into_iter().skip(start).collect()
    }

    /// Decodes a value from network byte order. Returns `None` if it exceeds 16 bytes.
    pub(super) fn decode(bytes: &[u8]) -> Option<u128> {
        let mut value = [0; 16];
        let start = value.len().checked_sub(bytes.len())?;
        value.get_mut(start..)?.copy_from_slice(bytes);
        Some(u128::from_be_bytes(value))
    }
}

impl Interval {
    pub(super) fn new(first: u128, last: u128) -> Self {
        Self { first, last }
    }

    /// Returns the first value, as a number.
    pub fn first(&self) -> u128 {
        self.first
    }

    /// Returns the last value, as a number.
    pub fn last(&self) -> u128 {
        self.last
    }
}

impl From<IpNet> for Interval {
    fn from(net: IpNet) -> Self {
        Self { first: number(net.network()), last: number(net.broadcast()) }
    }
}

impl From<IpAddr> for Interval {
    fn from(address: IpAddr) -> Self {
        Self { first: number(address), last: number(address) }
    }
}

impl From<u16> for Interval {
    fn from(port: u16) -> Self {
        Self { first: port.into(), last: port.into() }
    }
}

impl From<RangeInclusive<u16>> for Interval {
    fn from(ports: RangeInclusive<u16>) -> Self {
        Self { first: (*ports.start()).into(), last: (*ports.end()).into() }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::to_bits(v4).into(),
        IpAddr::V6(v6) => Ipv6Addr::to_bits(v6),
    }
}

/// Joins the boundaries of an interval set to intervals. A boundary is a value, and true if it ends an
/// interval; then the value is the first one after the interval.
pub(super) fn join(mut boundaries: Vec<(u128, bool)>, max: u128) -> BTreeSet<Interval> {
    // If one interval ends where the next begins, the end sorts first.
    boundaries.sort_unstable_by_key(|(value, end)| (*value, !end));
    let mut intervals = BTreeSet::new();
    let mut open = None;
    for (value, end) in boundaries {
        if let Some(first) = open.take() {
            intervals.insert(Interval::new(first, value.saturating_sub(1)));
        }
        if !end {
            open = Some(value);
        }
    }
    if let Some(first) = open {
        intervals.insert(Interval::new(first, max));
    }
    intervals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boundaries_are_joined_in_any_order() {
        let boundaries = vec![(20, true), (10, false), (20, false), (30, true), (250, false)];
        let expected =
            [Interval::new(10, 19), Interval::new(20, 29), Interval::new(250, 255)].into();
        assert_eq!(join(boundaries, 255), expected);
        assert_eq!(join(vec![(0, true)], 255), BTreeSet::new());
    }

    #[test]
    fn networks_become_ranges_of_their_family() {
        let nets = ["10.255.255.0/24", "10.0.0.0/24", "10.0.0.0/8", "11.0.0.0/8", "::/0"];
        let nets: Vec<IpNet> = nets.map(|net| net.parse().unwrap()).into();
        let v4 = Set::networks(KeyType::Ipv4, &nets);
        let ten = Interval::new(0x0a00_0000, 0x0aff_ffff);
        let eleven = Interval::new(0x0b00_0000, 0x0bff_ffff);
        assert_eq!(v4.elements, [ten, eleven].into());
        let v6 = Set::networks(KeyType::Ipv6, &nets);
        assert_eq!(v6.elements, [Interval::new(0, u128::MAX)].into());
        assert_eq!(KeyType::Ipv4.encode(0x0a00_0001), [10, 0, 0, 1]);
        assert_eq!(KeyType::Ipv4.max(), u128::from(u32::MAX));
    }
}
