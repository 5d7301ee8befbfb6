//! What keeps the host from being as planned.

use towline_netlink::{NetlinkError, Refusal};
use towline_nftables::{NftError, TableFamily};

/// Why nothing was applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Our routing table holds routes that we did not make.
    #[error(
        "routing table {table} holds a route to {destination} that Towline did not make: set \
         another number in routing.table"
    )]
    TableInUse {
        /// The number.
        table: u32,
        /// One of the routes.
        destination: ipnet::IpNet,
    },
    /// A policy rule that we did not make has one of our priorities.
    #[error(
        "policy rule priority {priority} is used by a rule that Towline did not make: set another \
         number in routing.priority"
    )]
    PriorityInUse {
        /// The number.
        priority: u32,
    },
    /// An nftables table of our name that we did not make.
    #[error(
        "Towline did not make the nftables table {family} {name}: delete it, or set another name \
         in routing.nftables_table"
    )]
    FirewallTableInUse {
        /// Its family.
        family: TableFamily,
        /// The name.
        name: String,
    },
    /// A link of our name that is no TUN.
    #[error("the link {name} is a {kind}, not Towline's: set another name in link.name")]
    LinkInUse {
        /// The name.
        name: String,
        /// What it is.
        kind: String,
    },
    /// The kernel cannot be spoken to.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// nftables cannot be spoken to.
    #[error(transparent)]
    Nft(NftError),
}

impl From<NftError> for ApplyError {
    fn from(error: NftError) -> Self {
        match error {
            NftError::Netlink(error) => Self::Netlink(error),
            other => Self::Nft(other),
        }
    }
}

/// Something that is not as planned, while the rest is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The TUN link is not there (yet): the guards stand, nothing passes.
    #[error("the link {0} is missing: mesh traffic goes nowhere until it is there")]
    LinkMissing(String),
    /// The second guard cannot stand on this kernel.
    #[error(
        "no nftables guard ({0}): only the unreachable routes keep mesh traffic from leaving in clear, \
         and nothing drops packets from elsewhere with mesh sources: load the kernel module nf_tables \
         (`modprobe nf_tables`), or use a kernel that has it"
    )]
    NoFirewall(String),
    /// Some rules of the firewall cannot stand on this kernel; the guard does.
    #[error(
        "the nftables guard is installed, but not the rest of its table: {0}: connections to plain \
         ports are not answered outside the tunnel, and TCP is not fitted to it: use a newer kernel"
    )]
    FirewallReduced(String),
    /// Another's firewall may drop what is forwarded.
    #[error("forwarded mesh traffic may be dropped by another's firewall: {0}")]
    Hook(String),
    /// firewalld does not know our link.
    #[error(
        "firewalld has {0} in no zone, so that it may refuse what comes out of the tunnel: run \
         `firewall-cmd --permanent --zone=trusted --add-interface={0}` and `firewall-cmd --reload`"
    )]
    NoZone(String),
    /// Somebody else put something under a name or number of ours.
    #[error("{0}")]
    Intruder(String),
    /// A rule of another program takes packets by a mark that holds ours.
    #[error(
        "the policy rule of priority {priority} takes packets by the mark {mark:#x}/{mask:#x}, which \
         Towline's sockets carry too: set other bits in [routing] mark and mask"
    )]
    MarkInUse {
        /// The rule's priority.
        priority: u32,
        /// The rule's mark.
        mark: u32,
        /// The rule's mask.
        mask: u32,
    },
    /// Packets of others with our mark were dropped.
    #[error(
        "{packets} packets for mesh networks carried Towline's mark but were not Towline's, and were \
         dropped: another program sets marks with these bits: set others in [routing] mark and mask"
    )]
    MarkSeen {
        /// Since the firewall's rules were made.
        packets: u64,
    },
    /// A setting of our link cannot be written.
    #[error(
        "cannot set rp_filter of {link} to 2: {reason}: the strict filter drops what comes out of \
         the tunnel: run `sysctl net.ipv4.conf.{link}.rp_filter=2`"
    )]
    Setting {
        /// The link.
        link: String,
        /// Why not.
        reason: String,
    },
    /// The kernel refused one piece.
    #[error("cannot {what}: {refusal}")]
    Refused {
        /// What the piece is for.
        piece: Piece,
        /// What was asked for.
        what: String,
        /// Why not.
        refusal: Refusal,
    },
    /// The kernel has no IPv6.
    #[error(
        "this kernel runs without IPv6 (ipv6.disable=1): the tunnel carries IPv4 alone, and there \
         is no IPv6 traffic to guard"
    )]
    NoIpv6,
    /// The kernel has IPv6, but no policy rules for it.
    #[error(
        "this kernel has no policy rules for IPv6: the tunnel carries IPv4 alone, and only \
         nftables keeps IPv6 traffic for the mesh from leaving in clear"
    )]
    NoIpv6Rules,
    /// Our link takes no IPv6 addresses.
    #[error("the link {link} takes no IPv6 addresses ({reason}): the tunnel carries IPv4 alone")]
    NoIpv6OnLink {
        /// The link.
        link: String,
        /// Why not.
        reason: NoIpv6Reason,
    },
}

/// Why our link takes no IPv6 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoIpv6Reason {
    /// A sysctl says so, of the link or of all links.
    #[error("net.ipv6.conf has disable_ipv6=1")]
    Disabled,
    /// Its packets are smaller than IPv6 allows.
    #[error("its MTU is below 1280")]
    Mtu,
}

/// What a piece of the host's network is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// Keeps mesh traffic from leaving in clear: policy rules, unreachable routes.
    Guard,
    /// Our link, its addresses and its state.
    Link,
    /// One way through the link, past the tunnel, or to be removed.
    Route,
}

impl Problem {
    /// Whether it is of [`super::hook`].
    pub(super) fn is_of_hooks(&self) -> bool {
        matches!(self, Self::Hook(_) | Self::NoZone(_))
    }

    /// Whether it may be gone at the next apply, without a notification that says so.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::LinkMissing(_) | Self::Hook(_) | Self::Intruder(_) | Self::Refused { .. } => true,
            Self::NoFirewall(_)
            | Self::FirewallReduced(_)
            | Self::NoZone(_)
            | Self::MarkInUse { .. }
            | Self::MarkSeen { .. }
            | Self::Setting { .. }
            | Self::NoIpv6
            | Self::NoIpv6Rules
            | Self::NoIpv6OnLink { .. } => false,
        }
    }

    /// Whether it only says how this host is, and nothing has to be repaired.
    pub fn is_note(&self) -> bool {
        matches!(self, Self::NoIpv6 | Self::NoIpv6OnLink { .. })
    }

    /// Whether trying again may help, although nothing is heard of the kernel.
    pub fn is_worth_retrying(&self) -> bool {
        !matches!(
            self,
            Self::NoIpv6
                | Self::NoIpv6Rules
                | Self::NoIpv6OnLink { .. }
                | Self::MarkInUse { .. }
                | Self::MarkSeen { .. }
        )
    }

    /// Whether a plan with this problem does not count as applied: a guard is missing, or nothing
    /// can enter the tunnel. The mesh must not be used then.
    pub fn is_blocking(&self) -> bool {
        match self {
            Self::LinkMissing(_) => true,
            Self::Refused { piece, .. } => *piece != Piece::Route,
            Self::NoFirewall(_)
            | Self::FirewallReduced(_)
            | Self::Hook(_)
            | Self::NoZone(_)
            | Self::Intruder(_)
            | Self::MarkInUse { .. }
            | Self::MarkSeen { .. }
            | Self::Setting { .. }
            | Self::NoIpv6
            | Self::NoIpv6Rules
            | Self::NoIpv6OnLink { .. } => false,
        }
    }
}
