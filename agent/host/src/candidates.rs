//! Selects the host's addresses to publish as local candidates.
//!
//! A wrong candidate costs every peer probes that get no answer, or that reach another machine with the
//! same address. A missing candidate can cost the direct path. So an address is left out only if it
//! clearly does not lead outside the host.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use towline_core::prefixes::is_host;

use super::LocalAddress;

/// Addresses to leave out in this mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CandidatePolicy {
    /// Name of Towline's link, whose addresses are left out.
    pub own_link: String,
    /// Networks whose addresses are left out: the overlay, pod and service networks.
    pub excluded: Vec<IpNet>,
}

/// Returns the addresses to publish, sorted, each once.
///
/// Left out are:
///
/// - addresses of links that are down, the loopback or Towline's own;
/// - addresses of links of a container runtime, CNI plugin, virtual machine manager, overlay or VPN,
///   which are known by name or kind;
/// - addresses of bridges without a port that leads outside;
/// - unspecified, loopback, link-local, site-local, multicast and broadcast addresses;
/// - addresses that may vanish soon or are not yet usable: temporary, deprecated, tentative;
/// - service addresses that move between machines: an IPv4 secondary address, or a single host address
///   on a link that has a network too;
/// - addresses in the excluded networks.
pub fn candidates(addresses: &[LocalAddress], policy: &CandidatePolicy) -> Vec<IpAddr> {
    let chosen: BTreeSet<IpAddr> = addresses
        .iter()
        .filter(|address| {
            leads_outside(address, policy)
                && is_usable_elsewhere(address, policy)
                && is_lasting(address)
                && !is_floating(address, addresses)
        })
        .map(|address| address.prefix.addr())
        .collect();
    chosen.into_iter().collect()
}

/// Returns the networks of the links that lead outside, sorted, each once.
pub(super) fn connected_networks(
    addresses: &[LocalAddress],
    policy: &CandidatePolicy,
) -> Vec<IpNet> {
    let connected: BTreeSet<IpNet> = addresses
        .iter()
        .filter(|address| leads_outside(address, policy) && is_usable_elsewhere(address, policy))
        .map(|address| address.prefix.trunc())
        .filter(|net| !is_host(net))
        .collect();
    connected.into_iter().collect()
}

/// Returns the networks of all links that are connected to something, Towline's own link excepted.
pub(super) fn link_networks(addresses: &[LocalAddress], own_link: &str) -> BTreeSet<IpNet> {
    let is_connected = |address: &&LocalAddress| {
        address.carrier
            && !address.loopback
            && address.link != own_link
            && is_global(address.prefix.addr())
    };
    let networks = addresses.iter().filter(is_connected).map(|address| address.prefix.trunc());
    networks.filter(|net| !is_host(net)).collect()
}

/// Prefixes of the names of links that lead to containers, virtual machines or other overlays.
const INNER_NAMES: &[&str] = &[
    "antrea",
    "cali",
    "cbr",
    "cilium",
    "cni",
    "docker",
    "dummy",
    "flannel",
    "genev_sys",
    "gre",
    "incusbr",
    "ip6tnl",
    "ipvs",
    "kube-",
    "kubespan",
    "lxc",
    "lxdbr",
    "nebula",
    "nerdctl",
    "nodelocaldns",
    "ovn",
    "ovs-",
    "podman",
    "sit",
    "tailscale",
    "tun",
    "tunl",
    "utun",
    "veth",
    "vibr",
    "virbr",
    "vmnet",
    "vnet",
    "vti",
    "vxlan",
    "weave",
    "wg",
    "zt",
];

/// Kinds of links that never lead directly outside the host.
const INNER_KINDS: &[&str] = &[
    "amt",
    "bareudp",
    "dummy",
    "erspan",
    "fou",
    "geneve",
    "gre",
    "gretap",
    "gtp",
    "ifb",
    "ip6erspan",
    "ip6gre",
    "ip6gretap",
    "ip6tnl",
    "ipip",
    "netkit",
    "ovpn",
    "sit",
    "tun",
    "vcan",
    "vti",
    "vti6",
    "vxlan",
    "wireguard",
    "xfrm",
];

/// Returns true if packets to an address may arrive from outside: it is no special address, and in none
/// of the excluded networks.
pub(super) fn is_usable_elsewhere(address: &LocalAddress, policy: &CandidatePolicy) -> bool {
    let ip = address.prefix.addr();
    address.up
        && address.link != policy.own_link
        && is_global(ip)
        && !address.flags.tentative()
        && !policy.excluded.iter().any(|net| net.contains(&ip))
}

/// Returns true for an address in a network of other machines, which may be virtual machines or
/// containers of this host.
pub(super) fn is_lan(address: &LocalAddress, policy: &CandidatePolicy) -> bool {
    let kind = address.kind.as_deref().unwrap_or_default();
    !address.loopback
        && !INNER_KINDS.contains(&kind)
        && !is_host(&address.prefix)
        && is_usable_elsewhere(address, policy)
}

/// Returns true if the link of an address leads to other machines.
pub(super) fn leads_outside(address: &LocalAddress, policy: &CandidatePolicy) -> bool {
    let name = address.link.as_str();
    if !address.up || address.loopback || name == policy.own_link {
        return false;
    }
    let kind = address.kind.as_deref().unwrap_or_default();
    if INNER_KINDS.contains(&kind) || INNER_NAMES.iter().any(|inner| name.starts_with(inner)) {
        return false;
    }
    kind != "bridge" || address.outward
}

pub(super) fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let this_network = v4.octets()[0] == 0;
            !(this_network
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4 == Ipv4Addr::BROADCAST)
        }
        IpAddr::V6(v6) => {
            let site_local = v6.segments()[0] & 0xffc0 == 0xfec0;
            !(v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_multicast()
                || v6.to_ipv4_mapped().is_some()
                || site_local)
        }
    }
}

/// Returns true if an address is not expected to vanish soon.
fn is_lasting(address: &LocalAddress) -> bool {
    let flags = address.flags;
    // The bit of temporary IPv6 addresses (IFA_F_SECONDARY) marks secondary addresses in IPv4.
    !(flags.temporary() || flags.deprecated())
}

/// Returns true for a service address that may move to another machine: a permanent host address on a
/// link that also has a network of the same family. An operator or a failover daemon adds such an
/// address. An address leased by DHCPv6 looks the same but is not permanent.
fn is_floating(address: &LocalAddress, all: &[LocalAddress]) -> bool {
    let same_family = |other: &IpNet| other.addr().is_ipv4() == address.prefix.addr().is_ipv4();
    is_host(&address.prefix)
        && address.flags.permanent()
        && !address.point_to_point
        && all.iter().any(|other| {
            other.index == address.index
                && same_family(&other.prefix)
                && !is_host(&other.prefix)
                && is_global(other.prefix.addr())
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_netlink::AddressFlags;

    fn on(link: &str, kind: Option<&str>, prefix: &str) -> LocalAddress {
        let index = link.bytes().map(u32::from).sum();
        LocalAddress { kind: kind.map(str::to_owned), ..LocalAddress::on(index, link, prefix) }
    }

    fn chosen(addresses: &[LocalAddress]) -> Vec<String> {
        let policy = CandidatePolicy {
            own_link: "towline0".to_owned(),
            excluded: vec!["198.19.0.0/16".parse().unwrap(), "10.244.0.0/16".parse().unwrap()],
        };
        candidates(addresses, &policy).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_machines_own_addresses_are_told() {
        let mut bridge = on("vmbr0", Some("bridge"), "192.0.2.5/24");
        bridge.outward = true;
        let addresses = [
            on("eth0", None, "203.0.113.7/24"),
            on("eth0", None, "2001:db8::7/64"),
            on("eth1", Some("veth"), "192.168.1.7/24"),
            on("bond0.12", Some("vlan"), "10.0.0.7/8"),
            on("ens4", None, "10.128.0.9/32"),
            bridge,
        ];
        let expected =
            ["10.0.0.7", "10.128.0.9", "192.0.2.5", "192.168.1.7", "203.0.113.7", "2001:db8::7"];
        assert_eq!(chosen(&addresses), expected);
    }

    #[test]
    fn what_leads_inward_or_into_another_overlay_is_not() {
        let mut down = on("eth7", None, "203.0.113.8/24");
        down.up = false;
        let addresses = [
            down,
            on("lo", None, "203.0.113.9/32"),
            on("towline0", Some("tun"), "203.0.113.10/32"),
            on("docker0", Some("bridge"), "172.17.0.1/16"),
            on("br-0123456789ab", Some("bridge"), "172.18.0.1/16"),
            on("cni0", Some("bridge"), "172.19.0.1/24"),
            on("virbr0", Some("bridge"), "192.168.122.1/24"),
            on("flannel.1", Some("vxlan"), "172.20.0.0/32"),
            on("kube-ipvs0", Some("dummy"), "10.96.0.1/32"),
            on("nodelocaldns", Some("dummy"), "169.254.20.10/32"),
            on("cilium_host", Some("veth"), "172.21.0.1/32"),
            on("tailscale0", Some("tun"), "100.64.0.9/32"),
            on("wg0", Some("wireguard"), "172.22.0.1/24"),
            on("office", Some("wireguard"), "172.22.0.2/24"),
            on("vetha1b2", Some("veth"), "172.23.0.1/24"),
        ];
        assert_eq!(chosen(&addresses), [""; 0]);
    }

    #[test]
    fn the_networks_of_outer_links_are_connected() {
        let addresses = [
            on("eth0", None, "192.168.1.10/24"),
            on("eth0", None, "192.168.1.11/24"),
            on("eth0", None, "203.0.113.9/32"),
            on("eth1", None, "2001:db8::7/64"),
            on("eth1", None, "fe80::7/64"),
            on("docker0", Some("bridge"), "172.17.0.1/16"),
            on("lo", None, "127.0.0.1/8"),
        ];
        let found = connected_networks(&addresses, &CandidatePolicy::default());
        let found: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.168.1.0/24", "2001:db8::/64"]);
    }

    #[test]
    fn the_network_of_a_link_without_carrier_is_not_connected() {
        let mut unplugged = on("eth2", None, "192.168.2.10/24");
        unplugged.carrier = false;
        let addresses = [
            unplugged,
            on("eth0", None, "192.168.1.10/24"),
            on("eth0", None, "203.0.113.9/32"),
            on("docker0", Some("bridge"), "172.17.0.1/16"),
            on("towline0", Some("tun"), "10.9.0.1/24"),
            on("eth1", None, "fe80::7/64"),
            on("lo", None, "127.0.0.1/8"),
        ];
        let found = link_networks(&addresses, "towline0");
        let found: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["172.17.0.0/16", "192.168.1.0/24"]);
    }

    #[test]
    fn addresses_without_a_future_are_not() {
        let with = |flags: u32, prefix: &str| LocalAddress {
            flags: AddressFlags(flags),
            ..on("eth0", None, prefix)
        };
        let addresses = [
            with(libc::IFA_F_TEMPORARY, "2001:db8::a/64"),
            with(libc::IFA_F_DEPRECATED, "2001:db8::b/64"),
            with(libc::IFA_F_TENTATIVE, "2001:db8::c/64"),
            with(libc::IFA_F_PERMANENT, "fe80::1/64"),
            with(libc::IFA_F_PERMANENT, "169.254.1.1/16"),
            with(libc::IFA_F_PERMANENT, "198.19.0.7/32"),
            with(libc::IFA_F_PERMANENT, "10.244.1.1/24"),
        ];
        assert_eq!(chosen(&addresses), [""; 0]);
    }

    #[test]
    fn service_addresses_that_wander_are_not_but_leased_ones_are() {
        let leased =
            LocalAddress { flags: AddressFlags(0), ..on("eth0", None, "2001:db8::1234/128") };
        let addresses = [
            on("eth0", None, "192.0.2.5/24"),
            on("eth0", None, "192.0.2.100/32"),
            on("eth0", None, "2001:db8::5/64"),
            on("eth0", None, "2001:db8::100/128"),
            leased,
        ];
        assert_eq!(chosen(&addresses), ["192.0.2.5", "2001:db8::5", "2001:db8::1234"]);
    }
}
