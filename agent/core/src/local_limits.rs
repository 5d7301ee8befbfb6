//! Limits that this host sets: networks that neither other nodes nor the mesh may cover here.
//!
//! | network | refused if it contains | unless |
//! |---|---|---|
//! | prefix of another node | a controller, a gateway or a DNS server of this host | it is one address that the grant names exactly, or the operator accepts it, or it is a LAN around the local network of the address, which stays as it is |
//! | protected range of the mesh | a gateway or an uplink address of this host | |
//!
//! Networks that the operator refuses are neither taken from other nodes nor guarded.
//!
//! What counts are the addresses that the host had when it joined: a DHCP server that names other ones
//! later must not open the mesh. The candidates of other nodes do not count: outer datagrams to them
//! stay outside the tunnel anyway.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use towline_types::codes;
use towline_types::node::Grant;
use towline_types::ownership::overlap;

use crate::prefixes::is_host;

/// Limits that the host and its operator set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalLimits {
    /// Addresses of the host when it joined.
    pub host: HostAddresses,
    /// Addresses of the controllers, without those that are known by name only.
    pub controllers: BTreeSet<IpAddr>,
    /// Local networks of the host, which stay as they are where others announce them as a LAN.
    pub local_networks: Vec<IpNet>,
    /// Networks that are never guarded, and of which no other node holds a part. Without effect in the
    /// overlay.
    pub refused: Vec<IpNet>,
    /// Networks that other nodes may announce although they cover something that the host needs.
    pub accepted: Vec<IpNet>,
    /// What of the mesh's configuration may let traffic leave the tunnel.
    pub in_clear: InClear,
}

/// Parts of the mesh's configuration that let traffic of the mesh travel in clear. The controller sets
/// them; they only apply where the host allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InClear {
    /// True if node IPs of a trusted site are reached outside the tunnel.
    pub trusted_sites: bool,
    /// True if announced prefixes are reached outside the tunnel while the tunnel is down.
    pub bypass_when_down: bool,
}

impl Default for InClear {
    /// Trusted sites only: an attacker who blocks UDP could cause the other one at any time.
    fn default() -> Self {
        Self { trusted_sites: true, bypass_when_down: false }
    }
}

/// Addresses that a host needs, apart from the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostAddresses {
    /// Gateways of the default routes.
    pub gateways: BTreeSet<IpAddr>,
    /// DNS servers of the host.
    pub dns_servers: BTreeSet<IpAddr>,
    /// The host's own addresses on the links that lead to the internet.
    pub uplinks: BTreeSet<IpAddr>,
}

/// Reason why this host refuses a network: what the network covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Covered {
    /// Address of a controller.
    Controller(IpAddr),
    /// Gateway of this host.
    Gateway(IpAddr),
    /// DNS server of this host.
    DnsServer(IpAddr),
    /// Address of this host on an uplink.
    Uplink(IpAddr),
    /// Network that the operator refuses, or a part of it.
    Refused(IpNet),
}

codes! {
    Covered {
        Controller => "covers-controller",
        Gateway => "covers-gateway",
        DnsServer => "covers-dns-server",
        Uplink => "covers-uplink",
        Refused => "refused-here",
    }
}

impl fmt::Display for Covered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller(ip) => write!(f, "the controller {ip}"),
            Self::Gateway(ip) => write!(f, "{ip}, a gateway of this machine"),
            Self::DnsServer(ip) => write!(f, "{ip}, a DNS server of this machine"),
            Self::Uplink(ip) => write!(f, "{ip}, this machine's own address"),
            Self::Refused(net) => write!(f, "{net}, which [trust] refused_networks names"),
        }
    }
}

impl LocalLimits {
    /// Returns why a prefix of another node is refused; `None` if it is not. `is_lan` is true if its
    /// record calls it a network of machines.
    pub(crate) fn refuses(&self, grant: &Grant, prefix: &IpNet, is_lan: bool) -> Option<Covered> {
        if let Some(refused) = self.refused.iter().find(|net| overlap(net, prefix)) {
            return Some(Covered::Refused(*refused));
        }
        let is_named = is_host(prefix) && grant.allowed_prefixes.contains(prefix);
        if is_named || self.accepted.iter().any(|net| net.contains(prefix)) {
            return None;
        }
        let is_kept = |ip: &IpAddr| {
            let is_around = |local: &IpNet| local.contains(ip) && prefix.contains(local);
            is_lan && self.local_networks.iter().any(is_around)
        };
        let HostAddresses { gateways, dns_servers, .. } = &self.host;
        let controllers = self.controllers.iter().map(|ip| (ip, Covered::Controller(*ip)));
        let gateways = gateways.iter().map(|ip| (ip, Covered::Gateway(*ip)));
        let dns_servers = dns_servers.iter().map(|ip| (ip, Covered::DnsServer(*ip)));
        let mut needed = controllers.chain(gateways).chain(dns_servers);
        needed.find(|(ip, _)| prefix.contains(*ip) && !is_kept(ip)).map(|(_, covered)| covered)
    }

    /// Returns why a protected range of the mesh is not guarded here; `None` if it is. What the
    /// operator refuses is only cut out of it, see [`Self::refused`].
    pub(crate) fn refuses_range(&self, range: &IpNet) -> Option<Covered> {
        let HostAddresses { gateways, uplinks, .. } = &self.host;
        let gateways = gateways.iter().map(|ip| (ip, Covered::Gateway(*ip)));
        let uplinks = uplinks.iter().map(|ip| (ip, Covered::Uplink(*ip)));
        gateways.chain(uplinks).find(|(ip, _)| range.contains(*ip)).map(|(_, covered)| covered)
    }
}
