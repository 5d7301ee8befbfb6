//! Address families in which this host can be configured.
//!
//! This is the only module that probes the kernel for IPv6. [`super::state`] and [`super::firewall`]
//! use its result, which is probed again whenever the host's state is read.

use nix::errno::Errno;

use towline_netlink::{Family, NetlinkError, Rtnetlink};

use super::problem::Problem;

/// Address families of this host. IPv4 is always available.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Families {
    ipv6: Ipv6,
}

/// IPv6 support of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Ipv6 {
    /// Addresses, routes and policy rules are supported.
    #[default]
    Full,
    /// Addresses are supported, but no policy rules (built without `CONFIG_IPV6_MULTIPLE_TABLES`), so
    /// that no IPv6 traffic can be routed into the tunnel.
    WithoutRules,
    /// IPv6 is not supported: `ipv6.disable=1`, or a kernel that was built without it.
    Absent,
}

impl Families {
    /// Probes the kernel for IPv6 policy rules, and then for IPv6 sockets.
    pub(super) fn probe(rtnetlink: &mut Rtnetlink) -> Result<Self, NetlinkError> {
        let ipv6 = match rtnetlink.rules(Family::V6) {
            Ok(_) => Ipv6::Full,
            Err(error) if error.errno().is_some_and(is_lacking) => {
                if rtnetlink.has_sockets(Family::V6) { Ipv6::WithoutRules } else { Ipv6::Absent }
            }
            Err(error) => return Err(error),
        };
        Ok(Self { ipv6 })
    }

    /// Returns true if addresses, routes and policy rules of a family can be set.
    pub(super) fn is_routed(self, family: Family) -> bool {
        family == Family::V4 || self.ipv6 == Ipv6::Full
    }

    /// Returns the families whose addresses, routes and policy rules can be set.
    pub(super) fn routed(self) -> impl Iterator<Item = Family> {
        Family::ALL.into_iter().filter(move |family| self.is_routed(*family))
    }

    /// Returns true if this host can send packets of a family, so that they must be guarded.
    pub(super) fn exists(self, family: Family) -> bool {
        family == Family::V4 || self.ipv6 != Ipv6::Absent
    }

    /// Returns the problem of a host whose IPv6 support is incomplete.
    pub(super) fn problem(self) -> Option<Problem> {
        match self.ipv6 {
            Ipv6::Full => None,
            Ipv6::WithoutRules => Some(Problem::NoIpv6Rules),
            Ipv6::Absent => Some(Problem::NoIpv6),
        }
    }
}

/// Returns true for the error codes of a kernel that lacks a family or a part of it.
fn is_lacking(errno: Errno) -> bool {
    matches!(errno, Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP | Errno::EPFNOSUPPORT)
}
