//! Which inner addresses are this node's: what may come out of the tunnel here, and as whom this node may
//! send into it.
//!
//! | set | destination out of the tunnel | source into the tunnel |
//! |---|---|---|
//! | addresses: overlay, `node.addresses` | accepted | accepted |
//! | announced: prefixes and node IPs | accepted | accepted |
//! | reachable: `node.forward_to`, prefixes of static peers | accepted | only towards static peers |
//! | [`SPECIAL`] and broadcast addresses | never | never |
//!
//! The data plane and the firewall both apply it, each by itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::prefixes::covering;

/// Networks that never come out of the tunnel, even if announced or configured: unspecified,
/// loopback, link-local (the metadata services of clouds), multicast, limited broadcast, and IPv4 addresses
/// mapped into IPv6.
pub const SPECIAL: [IpNet; 10] = [
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([224, 0, 0, 0], 4),
    v4([255, 255, 255, 255], 32),
    v6([0; 8], 128),
    v6([0, 0, 0, 0, 0, 0, 0, 1], 128),
    v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];

/// The addresses and networks of one node. No network lies inside one of [`SPECIAL`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnNetworks {
    addresses: BTreeSet<IpNet>,
    announced: BTreeSet<IpNet>,
    reachable: BTreeSet<IpNet>,
}

impl OwnNetworks {
    /// Collects them: addresses of the link, announced networks, and networks that are only forwarded to.
    /// What is special is left out.
    pub fn new(
        addresses: impl IntoIterator<Item = IpAddr>,
        announced: impl IntoIterator<Item = IpNet>,
        reachable: impl IntoIterator<Item = IpNet>,
    ) -> Self {
        let ordinary = |net: &IpNet| !is_special(net);
        let announced = covering(announced.into_iter().filter(ordinary));
        let more = |net: &IpNet| ordinary(net) && !announced.iter().any(|own| own.contains(net));
        let reachable = covering(reachable.into_iter().filter(more));
        let addresses = addresses.into_iter().map(IpNet::from).filter(ordinary).collect();
        Self { addresses, announced, reachable }
    }

    /// Addresses of the link, as host prefixes. They are on no other link.
    pub fn addresses(&self) -> &BTreeSet<IpNet> {
        &self.addresses
    }

    /// Networks that this node announces, its node IPs among them. None lies inside another.
    pub fn announced(&self) -> &BTreeSet<IpNet> {
        &self.announced
    }

    /// Networks that packets out of the tunnel may be forwarded to, though they are not announced. None lies
    /// inside another, nor inside an announced one.
    pub fn reachable(&self) -> &BTreeSet<IpNet> {
        &self.reachable
    }

    /// Networks whose packets may enter the tunnel towards any node.
    pub fn sources(&self) -> impl Iterator<Item = IpNet> {
        self.addresses.iter().chain(&self.announced).copied()
    }

    /// Networks whose packets may come out of the tunnel, but for [`Self::refused`].
    pub fn destinations(&self) -> impl Iterator<Item = IpNet> {
        self.sources().chain(self.reachable.iter().copied())
    }

    /// Destinations that are refused inside the accepted ones: what is special, and the broadcast address of
    /// each IPv4 network unless it is named as an address. The longest prefix decides.
    pub fn refused(&self) -> impl Iterator<Item = IpNet> {
        let broadcasts = self.destinations().filter_map(|net| broadcast(&net));
        let named = |net: &IpNet| self.destinations().any(|other| other == *net);
        SPECIAL.into_iter().chain(broadcasts.filter(move |net| !named(net)))
    }

    /// Whether a packet to this address may come out of the tunnel.
    pub fn accepts(&self, destination: IpAddr) -> bool {
        let holds = |net: &IpNet| net.contains(&destination);
        self.destinations().any(|net| holds(&net)) && !self.refused().any(|net| holds(&net))
    }

    /// Whether a packet from this address may enter the tunnel towards any node.
    pub fn owns(&self, source: IpAddr) -> bool {
        self.sources().any(|net| net.contains(&source))
            && !self.refused().any(|net| net.contains(&source))
    }
}

/// Whether the whole network lies inside one of [`SPECIAL`].
pub fn is_special(net: &IpNet) -> bool {
    SPECIAL.iter().any(|special| special.contains(net))
}

/// The broadcast address of an IPv4 network that has one (RFC 3021: a /31 has none).
fn broadcast(net: &IpNet) -> Option<IpNet> {
    match net {
        IpNet::V4(v4) if v4.prefix_len() < 31 => Some(IpAddr::from(v4.broadcast()).into()),
        IpNet::V4(_) | IpNet::V6(_) => None,
    }
}

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), length)
}

const fn v6([a, b, c, d, e, f, g, h]: [u16; 8], length: u8) -> IpNet {
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h)), length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_named_is_accepted_and_nothing_else() {
        let own = OwnNetworks::new(
            [ip("198.19.0.1"), ip("fd00:7::1")],
            [net("10.244.1.0/24"), net("192.168.77.5/32"), net("fd10:244:1::/64")],
            [net("172.30.0.0/16")],
        );
        for accepted in
            ["198.19.0.1", "fd00:7::1", "10.244.1.7", "192.168.77.5", "fd10:244:1::7", "172.30.4.4"]
        {
            assert!(own.accepts(ip(accepted)), "{accepted}");
        }
        for refused in ["198.19.0.2", "10.244.2.7", "192.168.77.6", "8.8.8.8", "fd00:7::2", "::1"] {
            assert!(!own.accepts(ip(refused)), "{refused}");
        }
        assert!(own.owns(ip("10.244.1.7")) && own.owns(ip("198.19.0.1")));
        assert!(!own.owns(ip("172.30.4.4")) && !own.owns(ip("198.19.0.2")));
        assert!(!OwnNetworks::default().accepts(ip("198.19.0.1")), "closed while nothing is known");
    }

    #[test]
    fn what_is_special_is_never_accepted() {
        let everything = [net("0.0.0.0/0"), net("::/0")];
        for own in [
            OwnNetworks::new([], everything, []),
            OwnNetworks::new([], [], everything),
            OwnNetworks::new(SPECIAL.map(|net| net.network()), SPECIAL, SPECIAL),
        ] {
            for special in [
                "0.0.0.0",
                "0.1.2.3",
                "127.0.0.1",
                "127.255.0.1",
                "169.254.169.254",
                "224.0.0.1",
                "239.1.1.1",
                "255.255.255.255",
                "::",
                "::1",
                "::ffff:10.0.0.1",
                "fe80::1",
                "febf::1",
                "ff02::1",
                "ff0e::1",
            ] {
                assert!(!own.accepts(ip(special)), "{special}");
                assert!(!own.owns(ip(special)), "{special}");
            }
        }
        let own = OwnNetworks::new([], [], everything);
        assert!(own.accepts(ip("203.0.113.1")) && own.accepts(ip("2001:db8::1")));
    }

    #[test]
    fn a_networks_broadcast_is_refused_unless_it_is_somebodys_address() {
        let own = OwnNetworks::new(
            [ip("10.1.0.255")],
            [net("192.168.77.0/24"), net("10.1.0.0/24"), net("10.2.0.4/31"), net("10.3.0.4/30")],
            [net("172.16.0.0/12")],
        );
        for refused in ["192.168.77.255", "172.31.255.255", "10.3.0.7"] {
            assert!(!own.accepts(ip(refused)), "{refused}");
            assert!(!own.owns(ip(refused)), "{refused}");
        }
        for accepted in ["192.168.77.254", "10.1.0.255", "10.2.0.5", "172.16.0.1"] {
            assert!(own.accepts(ip(accepted)), "{accepted}");
        }
    }
}
