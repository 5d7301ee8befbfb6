//! Has the kernel's filter of reverse paths (`rp_filter`) see the mark of what comes in.
//!
//! With `src_valid_mark` on the link that a packet came by, the filter looks the way back up with
//! the packet's mark. The firewall marks our own outer packets before that, so that their way
//! back leads past our tables, see `rules`. IPv6 has no such filter. The setting is made over
//! netlink, since `/proc/sys` may be read-only.

use std::collections::BTreeSet;

use towline_netlink::Rtnetlink;

use super::address::LocalAddress;
use super::problem::{ApplyError, Piece};
use super::state::note;
use super::{Changes, NetlinkError};

/// Makes the setting on every link by which others may send us outer packets.
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

/// Gives every such link what new links get; says on how many that changed something.
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
                // It went meanwhile.
                Err(error) if error.errno().is_some() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(changed)
}

/// Links with addresses that lead to other machines, each once.
fn uplinks<'a>(addresses: &'a [LocalAddress], own_link: &str) -> BTreeSet<(u32, &'a str)> {
    let leads_out = |address: &&LocalAddress| match address.kind.as_deref() {
        Some("bridge") => address.outward,
        _ => !address.loopback && !address.point_to_point,
    };
    addresses
        .iter()
        .filter(|address| address.prefix.addr().is_ipv4() && address.link != own_link)
        .filter(leads_out)
        .map(|address| (address.index, address.link.as_str()))
        .collect()
}

fn is_set(link: &str) -> bool {
    let path = format!("/proc/sys/net/ipv4/conf/{link}/src_valid_mark");
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
}
