//! What keeps the host from being as planned.

use towline_netlink::{NetlinkError, Refusal};
use towline_nftables::NftError;

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
        "Towline did not make the nftables table inet {name}: delete it, or set another name in \
         routing.nftables_table"
    )]
    FirewallTableInUse {
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
    #[error("no nftables guard ({0}): only routes keep mesh traffic from leaving in clear")]
    NoFirewall(String),
    /// Some rules of the firewall cannot stand on this kernel; the guard does.
    #[error("the nftables guard stands, but not the rest of its table: {0}")]
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
        /// What was asked for.
        what: String,
        /// Why not.
        refusal: Refusal,
    },
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
            | Self::Setting { .. } => false,
        }
    }
}
