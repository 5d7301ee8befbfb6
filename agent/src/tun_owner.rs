//! Restricts the TUN link to the agent's user.
//!
//! Without an owner, any local user who can open `/dev/net/tun` may attach to a persistent TUN
//! link, also while no agent runs. Links of earlier versions have no owner, and the agent's user
//! may have changed since. So both the guard and the agent set the owner before they use the link.

use anyhow::Context as _;
use towline_netlink::Rtnetlink;

use towline_dataplane::{Offloads, OpenTunError, Tun, open_tun_queues, own_tun};

/// Maximum number of attempts to create the link without another process attaching to it in the
/// meantime.
const ATTEMPTS: usize = 8;

/// Opens `count` queues of the TUN link `name`, see [`open_tun_queues`], and verifies that no other
/// process holds one.
pub fn open(name: &str, offloads: Offloads, count: usize) -> anyhow::Result<Vec<Tun>> {
    let mut links = Rtnetlink::open().context("cannot open a netlink socket")?;
    for _ in 0..ATTEMPTS {
        secure(name, nix::unistd::geteuid().as_raw())?;
        let queues = open_tun_queues(name, offloads, count)?;
        // Between the creation of a link and the setting of its owner, all users may attach to it.
        let Some(link) = links.link(name)? else { continue };
        if link.tun.is_none_or(|tun| tun.queues as usize <= queues.len()) {
            return Ok(queues);
        }
        drop(queues);
        remove(&mut links, name, link.index)?;
    }
    anyhow::bail!(
        "cannot open the TUN link {name}: another process attaches to it: stop that process"
    )
}

/// Result of securing the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Secured {
    /// Nothing was done: the link does not exist, or is not a TUN link.
    NoLink,
    /// Nothing was done: the user owns the link already.
    Owned,
    /// The user now owns the link.
    Taken,
    /// The link was removed, because a process of another user had attached to it. The agent
    /// creates it again. Until then the guards drop the packets that would have entered it.
    Removed,
}

/// Sets the owner of the TUN link `name` to the user id `owner`, if the link exists.
///
/// A process that is already attached would keep reading packets, so a link that a process holds is
/// removed. The caller makes sure that this is not an agent of the same state directory.
pub fn secure(name: &str, owner: u32) -> anyhow::Result<Secured> {
    let mut links = Rtnetlink::open().context("cannot open a netlink socket")?;
    let Some(link) = links.link(name)? else { return Ok(Secured::NoLink) };
    let Some(tun) = link.tun else { return Ok(Secured::NoLink) };
    if tun.owner == Some(owner) {
        return Ok(Secured::Owned);
    }
    let held = match own_tun(name, owner) {
        // Another process may have attached to another queue in between.
        Ok(()) => links.link(name)?.and_then(|link| link.tun).is_some_and(|tun| tun.queues > 0),
        Err(OpenTunError::Busy(_)) => true,
        Err(error) => return Err(error.into()),
    };
    if !held {
        return Ok(Secured::Taken);
    }
    remove(&mut links, name, link.index)?;
    Ok(Secured::Removed)
}

/// Removes a link that another process holds, so that this process receives no more packets.
fn remove(links: &mut Rtnetlink, name: &str, index: u32) -> anyhow::Result<()> {
    links.delete_link(index).with_context(|| format!("cannot remove the link {name}"))?;
    tracing::warn!(link = name, "link was held by another process: removed it");
    Ok(())
}
