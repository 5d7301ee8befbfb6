//! Errors and problems of applying a plan, with the messages that operators read.

use std::io;

use towline_netlink::{NetlinkError, Refusal};
use towline_nftables::{NftError, TableFamily};
use towline_types::codes;

/// Error that ended an apply. After an error about a name or number in use only guards were installed;
/// after others, any part may be.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Another program uses one of Towline's names or numbers.
    #[error(transparent)]
    InUse(#[from] InUse),
    /// A netlink request failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// An nftables transaction failed.
    #[error(transparent)]
    Nft(NftError),
    /// The guard against redirected packets could not be removed.
    #[error(transparent)]
    Redirects(#[from] RedirectError),
}

impl From<NftError> for ApplyError {
    fn from(error: NftError) -> Self {
        match error {
            NftError::Netlink(error) => Self::Netlink(error),
            other => Self::Nft(other),
        }
    }
}

/// Use of one of Towline's names or numbers by another program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InUse {
    /// One of Towline's routing tables holds a route that Towline did not create.
    #[error(
        "cannot use routing table {table}: it holds a route to {destination} that Towline did not \
         create: set another number in routing.table"
    )]
    Table {
        /// Number of the routing table.
        table: u32,
        /// Destination of the first such route.
        destination: ipnet::IpNet,
    },
    /// A policy rule that Towline did not create has one of Towline's priorities.
    #[error(
        "cannot use policy rule priority {priority}: a rule that Towline did not create has it: set \
         another number in routing.priority"
    )]
    Priority {
        /// Priority of the rule.
        priority: u32,
    },
    /// Towline did not create the nftables table that has its name.
    #[error(
        "cannot use the nftables table {family} {name}: Towline did not create it: delete it, or set \
         another name in routing.nftables_table"
    )]
    FirewallTable {
        /// Address family of the table.
        family: TableFamily,
        /// Name of the table.
        name: String,
    },
    /// The link that has Towline's name is not a TUN device.
    #[error(
        "cannot use the link {name}: it is a {kind}, not a TUN device: set another name in link.name"
    )]
    Link {
        /// Name of the link.
        name: String,
        /// Kind of the link, such as `veth`.
        kind: String,
    },
}

/// Part of a plan that could not be applied, while the rest was applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The TUN link does not exist (yet). The guards are installed, so mesh traffic is dropped.
    #[error("the link {0} is missing: mesh traffic is dropped until it exists")]
    LinkMissing(String),
    /// The kernel refused the nftables guard, which is the second one.
    #[error(
        "the nftables guard is not installed: {0}: only the unreachable routes keep mesh traffic from \
         leaving in clear, and packets with spoofed mesh sources are not dropped: load the kernel \
         module nf_tables (`modprobe nf_tables`), or use a kernel that has it"
    )]
    NoFirewall(String),
    /// The kernel refused some rules of the firewall; the guard is installed.
    #[error(
        "only the guard of the nftables table is installed: {0}: packets with spoofed mesh sources are \
         not dropped, connections to plain ports are not answered outside the tunnel, and the MSS of \
         TCP connections is not clamped: use a newer kernel"
    )]
    FirewallReduced(String),
    /// The rules in Docker's chain could not be added, so Docker may drop forwarded packets.
    #[error("Docker's firewall may drop forwarded mesh traffic: {0}")]
    Hook(String),
    /// Towline's link is in no zone of firewalld.
    #[error(
        "firewalld may reject packets from the tunnel: the link {0} is in no zone: run \
         `firewall-cmd --permanent --zone=trusted --add-interface={0}` and `firewall-cmd --reload`"
    )]
    NoZone(String),
    /// Another program created an object under one of Towline's names or numbers.
    #[error(transparent)]
    Intruder(InUse),
    /// A policy rule of another program matches a mark that Towline's sockets carry too.
    #[error(
        "another program uses Towline's packet mark: the policy rule of priority {priority} matches \
         {mark:#x}/{mask:#x}, which Towline's sockets carry too: set other bits in [routing] mark and \
         mask"
    )]
    MarkInUse {
        /// Priority of the rule.
        priority: u32,
        /// Mark that the rule matches.
        mark: u32,
        /// Mask that the rule applies to a packet's mark.
        mask: u32,
    },
    /// Packets of another program carried Towline's mark and were dropped.
    #[error(
        "another program uses Towline's packet mark: {packets} of its packets to mesh networks were \
         dropped: set other bits in [routing] mark and mask"
    )]
    MarkSeen {
        /// Number of packets since the firewall's rules were created.
        packets: u64,
    },
    /// The kernel refused a setting of Towline's link.
    #[error(
        "cannot set rp_filter of {link} to 2: {reason}: the strict mode drops packets from the tunnel: \
         run `sysctl net.ipv4.conf.{link}.rp_filter=2`"
    )]
    Setting {
        /// Name of the link.
        link: String,
        /// Refusal of the kernel.
        reason: String,
    },
    /// The kernel refused one request.
    #[error("cannot {what}: {refusal}")]
    Refused {
        /// Purpose of the object that the request concerns.
        piece: Piece,
        /// Request that was refused, such as `set the route to 10.0.0.0/8`.
        what: String,
        /// Answer of the kernel.
        refusal: Refusal,
    },
    /// The kernel has no IPv6.
    #[error(
        "the tunnel carries IPv4 only: this kernel runs without IPv6 (ipv6.disable=1), so there is no \
         IPv6 traffic to guard"
    )]
    NoIpv6,
    /// The kernel has IPv6, but no IPv6 policy rules.
    #[error(
        "the tunnel carries IPv4 only: this kernel has no IPv6 policy rules, so only nftables keeps \
         IPv6 mesh traffic from leaving in clear: use a kernel with CONFIG_IPV6_MULTIPLE_TABLES"
    )]
    NoIpv6Rules,
    /// Towline's link accepts no IPv6 addresses: the sysctl `disable_ipv6` of the link or of all links
    /// is 1.
    #[error(
        "the tunnel carries IPv4 only: the link {link} accepts no IPv6 addresses: net.ipv6.conf has disable_ipv6=1"
    )]
    NoIpv6OnLink {
        /// Name of the link.
        link: String,
    },
}

/// Purpose of an object in the host's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// A policy rule or unreachable route, which keeps mesh traffic from leaving in clear.
    Guard,
    /// Towline's link, one of its addresses or settings.
    Link,
    /// A route through the link or past the tunnel, or the removal of an object.
    Route,
}

/// Answers of a problem to the questions of those who apply a plan.
#[derive(Debug, Clone, Copy)]
struct Consequences {
    is_of_hooks: bool,
    is_passing: bool,
    has_open_inverse_guard: bool,
    is_note: bool,
    is_worth_retrying: bool,
    is_blocking: bool,
}

impl Consequences {
    /// A part of the plan is missing, and only a later attempt may help.
    const OF_FAULT: Self = Self {
        is_of_hooks: false,
        is_passing: false,
        has_open_inverse_guard: false,
        is_note: false,
        is_worth_retrying: true,
        is_blocking: false,
    };
}

impl Problem {
    /// Returns true if [`super::hook`] reports this problem.
    pub(super) fn is_of_hooks(&self) -> bool {
        self.consequences().is_of_hooks
    }

    /// Returns true if the next apply must read the kernel's state again, even for the same plan.
    pub(super) fn is_passing(&self) -> bool {
        self.consequences().is_passing
    }

    /// Returns true if packets that come from outside the tunnel with a source of the mesh are not dropped.
    pub fn has_open_inverse_guard(&self) -> bool {
        self.consequences().has_open_inverse_guard
    }

    /// Returns true if it only describes the host, and nothing has to be repaired.
    pub fn is_note(&self) -> bool {
        self.consequences().is_note
    }

    /// Returns true if a retry may help although the kernel sends no notification.
    pub fn is_worth_retrying(&self) -> bool {
        self.consequences().is_worth_retrying
    }

    /// Returns true if a plan with this problem is not applied: a policy rule or unreachable route is
    /// missing, or no packet can enter the tunnel. The mesh must not be used then.
    pub fn is_blocking(&self) -> bool {
        self.consequences().is_blocking
    }

    /// Returns the answers to all questions. There is one match, so that a new problem has to be decided once.
    fn consequences(&self) -> Consequences {
        let fault = Consequences::OF_FAULT;
        match self {
            Self::LinkMissing(_) => Consequences { is_passing: true, is_blocking: true, ..fault },
            Self::NoFirewall(_) | Self::FirewallReduced(_) => {
                Consequences { has_open_inverse_guard: true, ..fault }
            }
            Self::Hook(_) => Consequences { is_of_hooks: true, is_passing: true, ..fault },
            Self::NoZone(_) => Consequences { is_of_hooks: true, ..fault },
            Self::Intruder(InUse::FirewallTable { .. }) => {
                Consequences { is_passing: true, has_open_inverse_guard: true, ..fault }
            }
            Self::Intruder(_) => Consequences { is_passing: true, ..fault },
            Self::Setting { .. } => fault,
            Self::Refused { piece, .. } => {
                Consequences { is_passing: true, is_blocking: *piece != Piece::Route, ..fault }
            }
            Self::MarkInUse { .. } | Self::MarkSeen { .. } | Self::NoIpv6Rules => {
                Consequences { is_worth_retrying: false, ..fault }
            }
            Self::NoIpv6 | Self::NoIpv6OnLink { .. } => {
                Consequences { is_note: true, is_worth_retrying: false, ..fault }
            }
        }
    }
}

/// Reason why the uplinks are not guarded against redirected packets.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// A netlink request failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The kernel or the helper refused the program.
    #[error("cannot guard the link {link} against redirected packets: {source}")]
    Program {
        /// Name of the link, or its index if it has no address any more.
        link: String,
        /// Error of the kernel or of the helper.
        source: io::Error,
    },
}

codes! {
    ApplyError {
        InUse(InUse),
        Netlink => "netlink-failed",
        Nft => "nftables-failed",
        Redirects => "redirects-not-guarded",
    }
}

codes! {
    InUse {
        Table => "routing-table-in-use",
        Priority => "rule-priority-in-use",
        FirewallTable => "nftables-table-in-use",
        Link => "link-name-in-use",
    }
}

codes! {
    Problem {
        LinkMissing => "link-missing",
        NoFirewall => "nftables-guard-missing",
        FirewallReduced => "nftables-guard-reduced",
        Hook => "docker-hook-failed",
        NoZone => "firewalld-zone-missing",
        Intruder(InUse),
        MarkInUse => "mark-in-use",
        MarkSeen => "marked-packets-dropped",
        Setting => "rp-filter-strict",
        Refused { piece: Piece },
        NoIpv6 => "ipv6-absent",
        NoIpv6Rules => "ipv6-rules-missing",
        NoIpv6OnLink => "ipv6-disabled",
    }
}

codes! {
    Piece {
        Guard => "guard-refused",
        Link => "link-refused",
        Route => "route-refused",
    }
}
