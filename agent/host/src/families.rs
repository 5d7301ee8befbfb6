//! Which address families this host can be programmed in.
//!
//! The only place that asks the kernel what it has of IPv6. Everything of [`super::state`] and
//! [`super::firewall`] follows this value, which is read again whenever the host's state is.

use nix::errno::Errno;

use towline_netlink::{Family, NetlinkError, Rtnetlink};

use super::problem::Problem;

/// The address families of this host. IPv4 is always there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Families {
    ipv6: Ipv6,
}

/// What the kernel has of IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Ipv6 {
    /// Addresses, routes and policy rules.
    #[default]
    Full,
    /// Addresses, but no policy rules (built without `CONFIG_IPV6_MULTIPLE_TABLES`), so that
    /// nothing of IPv6 can be led into the tunnel.
    WithoutRules,
    /// Nothing: `ipv6.disable=1`, or built without IPv6.
    Absent,
}

impl Families {
    /// Asks the kernel.
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

    /// Whether addresses, routes and policy rules of a family can be set.
    pub(super) fn is_routed(self, family: Family) -> bool {
        family == Family::V4 || self.ipv6 == Ipv6::Full
    }

    /// The families whose addresses, routes and policy rules can be set.
    pub(super) fn routed(self) -> impl Iterator<Item = Family> {
        Family::ALL.into_iter().filter(move |family| self.is_routed(*family))
    }

    /// Whether packets of a family exist on this host at all, so that they have to be guarded.
    pub(super) fn exists(self, family: Family) -> bool {
        family == Family::V4 || self.ipv6 != Ipv6::Absent
    }

    /// What an operator should know of it.
    pub(super) fn problem(self) -> Option<Problem> {
        match self.ipv6 {
            Ipv6::Full => None,
            Ipv6::WithoutRules => Some(Problem::NoIpv6Rules),
            Ipv6::Absent => Some(Problem::NoIpv6),
        }
    }
}

/// Whether the kernel says that it does not have a family, or not this part of it.
fn is_lacking(errno: Errno) -> bool {
    matches!(errno, Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP | Errno::EPFNOSUPPORT)
}
