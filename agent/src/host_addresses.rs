//! Reads the addresses that this machine needs apart from the mesh: its gateways, its DNS servers, and
//! its own addresses on uplinks.

use std::collections::BTreeSet;
use std::net::IpAddr;

use towline_core::local_limits::HostAddresses;
use towline_core::own_networks::is_special;
use towline_host::{CandidatePolicy, HostNetwork};
use towline_netlink::NetlinkError;
use towline_proto::node::MeshConfig;

/// Files that name the machine's DNS servers. systemd-resolved writes its own servers to the second
/// one, and its stub to the first.
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
/// Greatest number of DNS servers that are taken from one file.
const DNS_SERVERS: usize = 16;

/// Returns the addresses that this machine needs. Those in a range that the mesh guards already are left
/// out: this list must not open a guarded range. Nothing that cannot be read prevents a join.
pub(crate) fn read(mesh: &MeshConfig) -> HostAddresses {
    let (gateways, uplinks) = of_links(mesh).unwrap_or_else(|error| {
        tracing::warn!(%error, "gateways and uplinks not read");
        Default::default()
    });
    let texts = RESOLV_CONF.iter().filter_map(|path| std::fs::read_to_string(path).ok());
    let dns_servers = texts.flat_map(|text| nameservers(&text)).collect();
    let outside = |addresses: BTreeSet<IpAddr>| -> BTreeSet<IpAddr> {
        let is_outside = |ip: &IpAddr| {
            !is_special(&(*ip).into()) && !mesh.guarded().any(|range| range.contains(ip))
        };
        addresses.into_iter().filter(is_outside).collect()
    };
    HostAddresses {
        gateways: outside(gateways),
        dns_servers: outside(dns_servers),
        uplinks: outside(uplinks),
    }
}

/// Returns the gateways of the default routes, and the addresses on the links that lead to the internet.
fn of_links(mesh: &MeshConfig) -> Result<(BTreeSet<IpAddr>, BTreeSet<IpAddr>), NetlinkError> {
    let mut network = HostNetwork::open()?;
    let gateways = network.gateways()?.into_iter().collect();
    let policy =
        CandidatePolicy { excluded: mesh.overlays().to_vec(), ..CandidatePolicy::default() };
    let ways_out = network.connectivity(&policy, 0)?.transit.ways_out;
    let addresses = network.local_addresses()?;
    let on_uplinks = addresses.into_iter().filter(|local| ways_out.contains(&local.link));
    Ok((gateways, on_uplinks.map(|local| local.prefix.addr()).collect()))
}

/// Returns the servers in the text of a `resolv.conf` (resolv.conf(5)).
fn nameservers(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        words.next().filter(|_| is_server)?.parse().ok()
    };
    text.lines().filter_map(server).take(DNS_SERVERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_servers_are_read_from_resolv_conf() {
        let text = "# nameserver 192.0.2.9\nsearch example\nnameserver 192.0.2.1 \nnameserver\n\
                    \tnameserver 2001:db8::1\nnameserver fe80::1%eth0\noptions edns0\n";
        let expected: Vec<IpAddr> =
            ["192.0.2.1", "2001:db8::1"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(nameservers(text), expected);
    }
}
