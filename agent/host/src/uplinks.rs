//! Makes the kernel's reverse path filter (`rp_filter`) use the marks of incoming packets.
//!
//! If `src_valid_mark` is set on the link that a packet arrives on, the filter looks up the return
//! route with the packet's mark. The firewall marks Towline's own outer packets before that lookup, so
//! that their return route skips Towline's tables, see `rules`. IPv6 has no such filter. This module
//! changes only that setting, and over netlink, because `/proc/sys` may be read-only. It also selects the
//! uplinks for other modules.

use std::collections::BTreeSet;
use std::net::IpAddr;

use towline_netlink::Rtnetlink;

use super::address::LocalAddress;
use super::problem::{ApplyError, Piece};
use super::state::note;
use super::{Changes, NetlinkError};

/// Sets `src_valid_mark` on every link on which outer packets may arrive.
pub(super) fn mark(
    rtnetlink: &mut Rtnetlink,
    addresses: &[LocalAddress],
    own_link: &str,
    changes: &mut Changes,
) -> Result<(), ApplyError> {
    for (index, name) in uplinks(addresses, own_link) {
        if !is_set(name) {
            note(rtnetlink.set_source_valid_mark(index, true), Piece::Route, changes)?;
        }
    }
    Ok(())
}

/// Clears `src_valid_mark` on these links, unless it is set for new links by default. Returns the
/// number of links changed.
pub(super) fn unmark(
    rtnetlink: &mut Rtnetlink,
    addresses: &[LocalAddress],
    own_link: &str,
) -> Result<usize, NetlinkError> {
    let mut changed = 0;
    for (index, name) in uplinks(addresses, own_link) {
        if is_set(name) && !is_set("default") {
            match rtnetlink.set_source_valid_mark(index, false) {
                Ok(()) => changed += 1,
                // The link vanished in the meantime.
                Err(error) if error.errno().is_some() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(changed)
}

/// Returns the links with IPv4 addresses that lead to other machines, each once.
fn uplinks<'a>(addresses: &'a [LocalAddress], own_link: &str) -> BTreeSet<(u32, &'a str)> {
    let v4 = |address: &&LocalAddress| address.prefix.addr().is_ipv4();
    leading_out(addresses, own_link).filter(v4).map(of_link).collect()
}

/// Returns the links with addresses of either family that lead to other machines, each once. A link of
/// a pod that has only a link-local address is none.
pub(super) fn of_both_families<'a>(
    addresses: &'a [LocalAddress],
    own_link: &str,
) -> BTreeSet<(u32, &'a str)> {
    let is_routed = |address: &&LocalAddress| match address.prefix.addr() {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            matches!(address.kind.as_deref(), None | Some("bond" | "team" | "vlan" | "bridge"))
        }
        _ => true,
    };
    leading_out(addresses, own_link).filter(is_routed).map(of_link).collect()
}

fn leading_out<'a>(
    addresses: &'a [LocalAddress],
    own_link: &str,
) -> impl Iterator<Item = &'a LocalAddress> {
    let leads_out = |address: &&LocalAddress| match address.kind.as_deref() {
        Some("bridge") => address.outward,
        _ => !address.loopback && !address.point_to_point,
    };
    addresses.iter().filter(move |address| address.link != own_link).filter(leads_out)
}

fn of_link(address: &LocalAddress) -> (u32, &str) {
    (address.index, &address.link)
}

fn is_set(link: &str) -> bool {
    let path = format!("/proc/sys/net/ipv4/conf/{link}/src_valid_mark");
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
}
