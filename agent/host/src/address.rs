//! The host's addresses, each with what is known of its link.

use std::collections::BTreeMap;

use ipnet::IpNet;

use towline_netlink::{AddressFlags, Link, NetlinkError, Rtnetlink};

/// An address of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalAddress {
    /// The address and its network's length.
    pub prefix: IpNet,
    /// What the kernel says of it.
    pub flags: AddressFlags,
    /// The link's name.
    pub link: String,
    /// The link's number.
    pub index: u32,
    /// The link's kind (`bridge`, `vxlan`...); `None`: hardware.
    pub kind: Option<String>,
    /// The link is up.
    pub up: bool,
    /// The link is the loopback.
    pub loopback: bool,
    /// The link has no neighbours, only another end.
    pub point_to_point: bool,
    /// The link is a bridge that reaches the outside: hardware, a bond or a VLAN is part of it.
    pub outward: bool,
}

/// Reads them all.
pub(super) fn read(rtnetlink: &mut Rtnetlink) -> Result<Vec<LocalAddress>, NetlinkError> {
    let links: BTreeMap<u32, Link> =
        rtnetlink.links()?.into_iter().map(|link| (link.index, link)).collect();
    let outward = |bridge: u32| {
        links.values().any(|port| {
            port.master == Some(bridge)
                && matches!(port.kind.as_deref(), None | Some("bond" | "team" | "vlan"))
        })
    };
    let addresses = rtnetlink.addresses(None)?;
    let found = addresses.into_iter().filter_map(|address| {
        // A link may have come or gone between the two readings; a notification follows.
        let link = links.get(&address.index)?;
        Some(LocalAddress {
            prefix: address.prefix,
            flags: address.flags,
            link: link.name.clone(),
            index: link.index,
            kind: link.kind.clone(),
            up: link.up,
            loopback: link.loopback,
            point_to_point: link.point_to_point,
            outward: link.kind.as_deref() == Some("bridge") && outward(link.index),
        })
    });
    Ok(found.collect())
}
