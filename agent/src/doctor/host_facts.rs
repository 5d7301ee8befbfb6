//! Reads the facts about the host that the checks look at. It changes nothing, and leaves out what
//! cannot be read.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use nix::sys::statvfs::{FsFlags, statvfs};
use towline_netlink::{Family, MAIN_TABLE, NetlinkError, Rtnetlink};
use towline_service::certificate;

use crate::conntrack::Conntrack;
use crate::state::StateDir;

/// Facts about the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// Time of the clock, in seconds since 1970.
    pub now: i64,
    /// True if a program keeps the clock synchronized, as the kernel knows; `None` if it cannot be asked.
    pub is_clock_synchronized: Option<bool>,
    /// Start and end of the node's certificate, in seconds since 1970; `None` if there is none, or if it
    /// cannot be read.
    pub certificate: Option<(i64, i64)>,
    /// Latest change of a file in the state directory, in seconds since 1970.
    pub last_written: Option<i64>,
    /// File system of the state directory; `None` if the directory does not exist.
    pub disk: Option<Disk>,
    /// Entries in the table of connections; `None` if the kernel tracks none.
    pub conntrack: Option<Conntrack>,
    /// True if IPv4 packets that arrive by Towline's link are forwarded. Without the link, of all links.
    pub forwards_ipv4: Option<bool>,
    /// True if IPv6 packets are forwarded.
    pub forwards_ipv6: Option<bool>,
    /// `rp_filter` of all links, which the kernel combines with that of a link: the greater one counts.
    pub reverse_path_filter: Option<u32>,
    /// True if the kernel has IPv6.
    pub has_ipv6: bool,
    /// Links of the host.
    pub links: Vec<LinkFacts>,
}

/// Facts about a link.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkFacts {
    /// Name of the link.
    pub name: String,
    /// MTU of the link, in bytes.
    pub mtu: u32,
    /// True if the link is administratively up (`IFF_UP`).
    pub is_up: bool,
    /// True if a default route leads to the link.
    pub is_uplink: bool,
    /// `rp_filter` of the link: 0 off, 1 strict, 2 loose; `None` if it is not known.
    pub reverse_path_filter: Option<u32>,
    /// True if the link accepts no IPv6 addresses; `None` if it is not known.
    pub is_ipv6_disabled: Option<bool>,
}

/// Facts about a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Space that is left for programs without privileges, in bytes.
    pub free_bytes: u64,
    /// True if no further file can be created.
    pub is_out_of_files: bool,
    /// True if the file system is mounted read-only.
    pub is_read_only: bool,
}

/// Reads the facts. `link` is the name of Towline's link.
pub fn read(link: &str, state_dir: &Path) -> HostFacts {
    HostFacts {
        now: seconds(SystemTime::now()),
        is_clock_synchronized: is_clock_synchronized(),
        certificate: certificate_validity(state_dir),
        last_written: last_written(state_dir),
        disk: disk(state_dir),
        conntrack: Conntrack::read(),
        forwards_ipv4: setting(&format!("ipv4/conf/{link}/forwarding"))
            .or_else(|| setting("ipv4/ip_forward"))
            .map(is_on),
        forwards_ipv6: setting("ipv6/conf/all/forwarding").map(is_on),
        reverse_path_filter: setting("ipv4/conf/all/rp_filter"),
        has_ipv6: Path::new("/proc/net/if_inet6").exists(),
        links: links().unwrap_or_default(),
    }
}

fn is_on(value: u32) -> bool {
    value != 0
}

/// Reads a setting below `/proc/sys/net`.
fn setting(name: &str) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/sys/net/{name}")).ok()?;
    text.trim().parse().ok()
}

/// Returns a time in seconds since 1970.
fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Asks the kernel whether a program, such as chrony or systemd-timesyncd, synchronizes its clock.
fn is_clock_synchronized() -> Option<bool> {
    // SAFETY: `timex` consists of integers, for which zero is a valid value.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid during the call. No mode is set, so that nothing is changed.
    let result = unsafe { libc::adjtimex(&raw mut state) };
    (result >= 0).then_some(state.status & libc::STA_UNSYNC == 0)
}

/// Returns start and end of the stored certificate.
fn certificate_validity(state_dir: &Path) -> Option<(i64, i64)> {
    let chain = StateDir::peek(state_dir).certificate().ok()??;
    certificate::validity(chain.first()?)
}

/// Returns the latest time at which a file of the state directory was written.
fn last_written(state_dir: &Path) -> Option<i64> {
    let entries = std::fs::read_dir(state_dir).ok()?;
    let written = |entry: std::fs::DirEntry| entry.metadata().ok()?.modified().ok();
    entries.filter_map(|entry| written(entry.ok()?)).map(seconds).max()
}

fn disk(state_dir: &Path) -> Option<Disk> {
    let found = statvfs(state_dir).ok()?;
    // The widths of these numbers differ between platforms.
    let free = u128::from(found.blocks_available()) * u128::from(found.fragment_size());
    Some(Disk {
        free_bytes: u64::try_from(free).unwrap_or(u64::MAX),
        // Some file systems do not count files.
        is_out_of_files: found.files() > 0 && found.files_available() == 0,
        is_read_only: found.flags().contains(FsFlags::ST_RDONLY),
    })
}

fn links() -> Result<Vec<LinkFacts>, NetlinkError> {
    let mut rtnetlink = Rtnetlink::open()?;
    let mut uplinks = Vec::new();
    for family in Family::ALL {
        let routes = rtnetlink.routes(family, Some(MAIN_TABLE))?;
        let is_default = |destination: &IpNet| destination.prefix_len() == 0;
        for route in routes.into_iter().filter(|route| is_default(&route.destination)) {
            uplinks.extend(route.link);
            uplinks.extend(route.next_hops.iter().map(|hop| hop.link));
        }
    }
    let links = rtnetlink.links()?.into_iter().map(|link| LinkFacts {
        is_uplink: uplinks.contains(&link.index),
        name: link.name,
        mtu: link.mtu,
        is_up: link.up,
        reverse_path_filter: link.reverse_path_filter,
        is_ipv6_disabled: link.ipv6_disabled,
    });
    Ok(links.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_facts() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), "content").unwrap();
        let facts = read("no-such-link", directory.path());
        assert!(facts.links.iter().any(|link| link.name == "lo"), "{facts:?}");
        assert!(facts.last_written.unwrap() <= facts.now + 1, "{facts:?}");
        assert!(facts.disk.is_some() && facts.certificate.is_none(), "{facts:?}");
    }

    #[test]
    fn a_directory_that_does_not_exist_has_no_facts() {
        let facts = read("no-such-link", Path::new("/nonexistent/towline"));
        assert_eq!((facts.disk, facts.last_written, facts.certificate), (None, None, None));
    }
}
