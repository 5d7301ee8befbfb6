//! MTU of the mesh's link and of routes through it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Largest inner packet, in bytes: MTU of the mesh's link, or of a route through it.
///
/// It is at least [`Mtu::MIN`], so the link can carry IPv6, and at most [`Mtu::MAX`]. The packet that
/// a path takes may be smaller than this: it is sent in fragments then.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Mtu(u16);

/// Error of a number that is no [`Mtu`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("MTU {0} is outside {min} to {max}", min = Mtu::MIN, max = Mtu::MAX)]
pub struct InvalidMtu(u32);

impl Mtu {
    /// Smallest MTU of a link with IPv6 (RFC 8200 section 5). With a smaller one Linux removes every
    /// IPv6 address of the link. IPv4 would run with less (RFC 791 section 3.2 asks for 576 bytes after
    /// reassembly), but every mesh has IPv6 addresses.
    pub const MIN: Self = Self(1_280);
    /// Largest MTU: an IP packet of 65,535 bytes less the 80 bytes that the tunnel adds over IPv6.
    pub const MAX: Self = Self(65_455);
    /// Default MTU: a packet of 1,500 bytes, as Ethernet carries it, less the same 80 bytes.
    pub const DEFAULT: Self = Self(1_420);

    /// Returns the MTU that is nearest to a number of bytes.
    pub fn clamp(bytes: u16) -> Self {
        Self(bytes).max(Self::MIN).min(Self::MAX)
    }

    /// Returns the number of bytes.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u32> for Mtu {
    type Error = InvalidMtu;

    fn try_from(bytes: u32) -> Result<Self, InvalidMtu> {
        let mtu = u16::try_from(bytes).ok().map(Self);
        mtu.filter(|mtu| (Self::MIN..=Self::MAX).contains(mtu)).ok_or(InvalidMtu(bytes))
    }
}

impl From<Mtu> for u32 {
    fn from(mtu: Mtu) -> Self {
        mtu.0.into()
    }
}

impl From<Mtu> for usize {
    fn from(mtu: Mtu) -> Self {
        mtu.0.into()
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mtu_has_room_for_ipv6_and_for_the_tunnel() {
        for good in [1_280, 1_420, 65_455] {
            assert_eq!(u32::from(Mtu::try_from(good).unwrap()), good);
        }
        for bad in [0, 576, 1_279, 65_456, 65_536, u32::MAX] {
            let error = Mtu::try_from(bad).unwrap_err().to_string();
            assert_eq!(error, format!("MTU {bad} is outside 1280 to 65455"));
        }
        assert_eq!(
            [0, 1_300, u16::MAX].map(|bytes| Mtu::clamp(bytes).get()),
            [1_280, 1_300, 65_455]
        );
    }
}
