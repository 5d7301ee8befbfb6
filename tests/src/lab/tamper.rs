//! Changes that other programs make to a host's network, made with netlink alone: the equivalents
//! of `nft flush ruleset`, `ip rule flush` and the like, in the calling thread's namespace.

use towline_netlink::{Family, NetlinkError, Rtnetlink};
use towline_nftables::{Nft, NftError, TableFamily, Transaction};

/// Name of Towline's link on the lab's nodes; below, its routing table and its nftables table.
pub const LINK: &str = "towline0";
const TABLE: u32 = 21_580;
const FIREWALL: &str = "towline";

/// A change that another program makes to state that Towline created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tampering {
    /// `nft flush ruleset`: deletes every table without an owner, in every family.
    FlushRuleset,
    /// `nft delete table inet towline`: deletes Towline's table.
    DeleteTable,
    /// `ip rule flush`: deletes all rules except the kernel's own three of each family.
    FlushRules,
    /// `ip route flush table 21580`: deletes the routes of Towline's table.
    FlushRoutes,
    /// `ip link set towline0 down`: sets Towline's link down.
    LinkDown,
    /// `ip link delete towline0`: deletes Towline's link.
    DeleteLink,
    /// `ip address flush dev towline0`: removes the addresses of Towline's link.
    FlushAddresses,
}

impl Tampering {
    /// All kinds of changes.
    pub const ALL: [Self; 7] = [
        Self::FlushRuleset,
        Self::DeleteTable,
        Self::FlushRules,
        Self::FlushRoutes,
        Self::LinkDown,
        Self::DeleteLink,
        Self::FlushAddresses,
    ];

    /// Returns the equivalent command.
    pub fn name(self) -> &'static str {
        match self {
            Self::FlushRuleset => "nft flush ruleset",
            Self::DeleteTable => "nft delete table inet towline",
            Self::FlushRules => "ip rule flush",
            Self::FlushRoutes => "ip route flush table 21580",
            Self::LinkDown => "ip link set towline0 down",
            Self::DeleteLink => "ip link delete towline0",
            Self::FlushAddresses => "ip address flush dev towline0",
        }
    }

    /// Makes the change in the calling thread's namespace. Missing state, or a refusal because the
    /// state has an owner, is not an error: another program cannot do more either.
    pub fn apply(self) -> anyhow::Result<()> {
        match self {
            Self::FlushRuleset => {
                let mut transaction = Transaction::new();
                transaction.delete_every_table();
                tolerate_nft(Nft::open()?.commit(transaction))?;
            }
            Self::DeleteTable => {
                tolerate_nft(Nft::open()?.delete(TableFamily::Inet, FIREWALL).map(drop))?;
            }
            Self::FlushRules => {
                let mut netlink = Rtnetlink::open()?;
                for family in Family::ALL {
                    for rule in netlink.rules(family)? {
                        if rule.made_by != libc::RTPROT_KERNEL {
                            tolerate(netlink.delete_rule(&rule))?;
                        }
                    }
                }
            }
            Self::FlushRoutes => {
                let mut netlink = Rtnetlink::open()?;
                for family in Family::ALL {
                    for route in netlink.routes(family, Some(TABLE))? {
                        tolerate(netlink.delete_route(&route))?;
                    }
                }
            }
            Self::LinkDown => with_link(|netlink, index| netlink.set_up(index, false))?,
            Self::DeleteLink => with_link(Rtnetlink::delete_link)?,
            Self::FlushAddresses => with_link(|netlink, index| {
                for address in netlink.addresses(Some(index))? {
                    tolerate(netlink.delete_address(index, address.prefix))?;
                }
                Ok(())
            })?,
        }
        Ok(())
    }
}

fn with_link(
    change: impl FnOnce(&mut Rtnetlink, u32) -> Result<(), NetlinkError>,
) -> Result<(), NetlinkError> {
    let mut netlink = Rtnetlink::open()?;
    match netlink.link(LINK)? {
        Some(link) => tolerate(change(&mut netlink, link.index)),
        None => Ok(()),
    }
}

/// Ignores refusals: another process that restores the state at the same time may be faster.
fn tolerate(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(NetlinkError::Refused { .. }) => Ok(()),
        other => other,
    }
}

fn tolerate_nft(result: Result<(), NftError>) -> Result<(), NftError> {
    match result {
        Err(NftError::Refused { .. }) => Ok(()),
        other => other,
    }
}
