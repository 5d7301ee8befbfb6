//! Reads the host's addresses, each with the properties of its link. It changes nothing.

use std::collections::BTreeMap;

use ipnet::IpNet;

use towline_netlink::{Address, AddressFlags, Link, NetlinkError, Rtnetlink};

/// Address of the host, with the properties of its link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalAddress {
    /// Address with the prefix length of its network.
    pub prefix: IpNet,
    /// Kernel's flags of the address (`IFA_F_*`).
    pub flags: AddressFlags,
    /// Name of the link.
    pub link: String,
    /// Index of the link.
    pub index: u32,
    /// Kind of the link, such as `bridge` or `vxlan`; `None` for hardware.
    pub kind: Option<String>,
    /// Whether the link is up.
    pub up: bool,
    /// Whether the link is up and has a carrier.
    pub carrier: bool,
    /// Whether the link is the loopback.
    pub loopback: bool,
    /// Whether the link is point-to-point (`IFF_POINTOPOINT`).
    pub point_to_point: bool,
    /// Whether the link is a bridge to other machines: one of its ports is hardware, a bond or a VLAN.
    pub outward: bool,
}

#[cfg(test)]
impl LocalAddress {
    /// Returns a permanent address on a hardware link that is up, or on the loopback `lo`.
    pub(super) fn on(index: u32, link: &str, prefix: &str) -> Self {
        Self {
            prefix: prefix.parse().unwrap(),
            flags: AddressFlags(libc::IFA_F_PERMANENT),
            link: link.to_owned(),
            index,
            kind: None,
            up: true,
            carrier: true,
            loopback: link == "lo",
            point_to_point: false,
            outward: false,
        }
    }
}

/// Reads all addresses of the host.
pub(super) fn read(rtnetlink: &mut Rtnetlink) -> Result<Vec<LocalAddress>, NetlinkError> {
    Ok(on_links(&rtnetlink.links()?, rtnetlink.addresses(None)?))
}

/// Joins addresses with the links that they are on.
pub(super) fn on_links(links: &[Link], addresses: Vec<Address>) -> Vec<LocalAddress> {
    let links: BTreeMap<u32, &Link> = links.iter().map(|link| (link.index, link)).collect();
    let outward = |bridge: u32| {
        links.values().any(|port| {
            port.master == Some(bridge)
                && matches!(port.kind.as_deref(), None | Some("bond" | "team" | "vlan"))
        })
    };
    let found = addresses.into_iter().filter_map(|address| {
        // A link may have appeared or vanished between the two requests; a notification follows.
        let link = links.get(&address.index)?;
        Some(LocalAddress {
            prefix: address.prefix,
            flags: address.flags,
            link: link.name.clone(),
            index: link.index,
            kind: link.kind.clone(),
            up: link.up,
            carrier: link.running,
            loopback: link.loopback,
            point_to_point: link.point_to_point,
            outward: link.kind.as_deref() == Some("bridge") && outward(link.index),
        })
    });
    found.collect()
}
