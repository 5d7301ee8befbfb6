//! Reserves the tunnels' UDP port, so that no socket gets it by chance.
//!
//! The port is inside the range from which the kernel assigns ports (`ip_local_port_range`), so
//! another program could have it when the agent starts. `ip_local_reserved_ports` excludes it.
//! Entries of other programs stay. `/proc/sys` is read-only for the unit's agent, so `towline
//! reserve-port` does this as root before the agent starts.

use std::io;
use std::ops::RangeInclusive;
use std::path::Path;

use towline_dataplane::OpenUdpError;
use towline_service::port_owner::{self, Transport};

/// Path of the setting, which applies to IPv4 and IPv6.
const SETTING: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Adds the port to the reserved ports. Returns whether that changed anything.
///
/// # Errors
///
/// Fails if the setting cannot be read, parsed or written.
pub fn reserve(port: u16) -> io::Result<bool> {
    change(Path::new(SETTING), |ports| ports.add(port))
}

/// Removes the port from the reserved ports. Inside a range that another program reserved it stays.
/// Returns whether that changed anything.
///
/// # Errors
///
/// Same as [`reserve`].
pub fn release(port: u16) -> io::Result<bool> {
    change(Path::new(SETTING), |ports| ports.remove(port))
}

/// Converts the error of the tunnels' sockets to one that names the process that uses the port, if
/// it can be found.
pub fn not_opened(error: OpenUdpError) -> anyhow::Error {
    let OpenUdpError::Busy(port) = error else { return error.into() };
    match port_owner::find(Transport::Udp, port) {
        Some(owner) => anyhow::anyhow!(
            "cannot bind UDP port {port}: address in use by {owner}: stop it or set [wireguard] port"
        ),
        None => error.into(),
    }
}

fn change(path: &Path, what: impl FnOnce(&mut Ports) -> bool) -> io::Result<bool> {
    let text = std::fs::read_to_string(path)?;
    let unknown = || io::Error::new(io::ErrorKind::InvalidData, "not a list of ports");
    let mut ports = Ports::parse(&text).ok_or_else(unknown)?;
    let changed = what(&mut ports);
    if changed {
        // Writing an empty line clears the list.
        std::fs::write(path, format!("{ports}\n"))?;
    }
    Ok(changed)
}

/// Port ranges in the kernel's format: sorted and disjoint.
#[derive(Debug, PartialEq, Eq)]
pub struct Ports(Vec<RangeInclusive<u16>>);

impl Ports {
    /// Parses a list such as `80,8000-8080`.
    pub fn parse(text: &str) -> Option<Self> {
        let range = |item: &str| {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
        };
        let items = text.trim().split(',').filter(|item| !item.trim().is_empty());
        items.map(range).collect::<Option<_>>().map(Self)
    }

    /// Adds a port. Returns whether it was missing.
    pub fn add(&mut self, port: u16) -> bool {
        let missing = !self.0.iter().any(|range| range.contains(&port));
        if missing {
            self.0.push(port..=port);
            self.0.sort_unstable_by_key(|range| *range.start());
        }
        missing
    }

    /// Removes a port at an end of a range. Returns whether there was one.
    pub fn remove(&mut self, port: u16) -> bool {
        let at_an_end =
            |range: &RangeInclusive<u16>| [*range.start(), *range.end()].contains(&port);
        let Some(place) = self.0.iter().position(at_an_end) else { return false };
        let (first, last) = self.0.remove(place).into_inner();
        if first < last {
            let rest = if first == port { first + 1..=last } else { first..=last - 1 };
            self.0.insert(place, rest);
        }
        true
    }
}

impl std::fmt::Display for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (place, range) in self.0.iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            match (range.start(), range.end()) {
                (first, last) if first == last => write!(f, "{comma}{first}")?,
                (first, last) => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use towline_netns::namespace_test;

    use super::*;

    #[test]
    fn what_others_reserved_stays() {
        for (before, reserved, released) in [
            ("", "51830", ""),
            ("\n", "51830", ""),
            ("8080,9148-9200\n", "8080,9148-9200,51830", "8080,9148-9200"),
            ("60000", "51830,60000", "60000"),
            // The kernel then shows these neighbours as one range.
            ("51829", "51829,51830", "51829"),
            // Another program reserved this range.
            ("51000-52000", "51000-52000", "51000-52000"),
        ] {
            let mut ports = Ports::parse(before).unwrap();
            ports.add(51_830);
            assert_eq!(ports.to_string(), reserved, "{before:?}");
            assert!(!ports.add(51_830));
            ports.remove(51_830);
            assert_eq!(ports.to_string(), released, "{before:?}");
        }
        let mut joined = Ports::parse("51829-51830,51832").unwrap();
        assert!(joined.remove(51_830));
        assert_eq!(joined.to_string(), "51829,51832");
        for unknown in ["port", "1-", "70000", "1-2-3"] {
            assert_eq!(Ports::parse(unknown), None);
        }
    }

    namespace_test! {
        fn who_has_the_port_is_named() {
            let _taken = std::net::UdpSocket::bind(("0.0.0.0", 51_830)).unwrap();
            let error = towline_dataplane::open_udp(51_830, 0).unwrap_err();
            let message = not_opened(error).to_string();
            let name = std::fs::read_to_string("/proc/self/comm").unwrap();
            let owner = format!("in use by {} (pid {}): ", name.trim(), std::process::id());
            assert!(message.starts_with("cannot bind UDP port 51830: address "), "{message}");
            assert!(message.contains(&owner), "{message}");
        }
    }

    namespace_test! {
        fn the_kernel_takes_what_is_written() {
            std::fs::write(SETTING, "8080,9148-9200\n").unwrap();
            let read = || std::fs::read_to_string(SETTING).unwrap().trim().to_owned();
            assert!(reserve(51_830).unwrap());
            assert_eq!(read(), "8080,9148-9200,51830");
            assert!(!reserve(51_830).unwrap());
            assert!(release(51_830).unwrap());
            assert_eq!(read(), "8080,9148-9200");
            assert!(!release(51_830).unwrap());
            std::fs::write(SETTING, "\n").unwrap();
            assert!(reserve(51_830).unwrap() && release(51_830).unwrap());
            assert_eq!(read(), "");
        }
    }
}
