//! Who may attach to the TUN link: the agent's user alone.
//!
//! A persistent TUN link without an owner is open to every local user who can open `/dev/net/tun`,
//! also while no agent runs. Links of earlier versions have none, and an installation may have
//! changed its user since. So the guard and the agent both see to it before anything uses the link.

use anyhow::Context as _;
use towline_netlink::Rtnetlink;

use towline_dataplane::{Offloads, OpenTunError, Tun, open_tun_queues, own_tun};

/// How often the link is made again because somebody else attached while it was made.
const ATTEMPTS: usize = 8;

/// Opens as many queues of the TUN link `name` as are asked for, see [`open_tun_queues`], and makes
/// sure that nobody else holds one.
pub fn open(name: &str, offloads: Offloads, count: usize) -> anyhow::Result<Vec<Tun>> {
    let mut links = Rtnetlink::open().context("cannot speak to the kernel's network")?;
    for _ in 0..ATTEMPTS {
        secure(name, nix::unistd::geteuid().as_raw())?;
        let queues = open_tun_queues(name, offloads, count)?;
        // Between its making and the setting of its owner a link is open to everybody.
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

/// What was done about the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Secured {
    /// Nothing: there is no such link, or it is of another kind.
    NoLink,
    /// Nothing: it belongs to the user already.
    Owned,
    /// It belongs to the user from now on.
    Taken,
    /// A process of another user had attached to it, so it was removed. The agent makes it again;
    /// until then the guards drop what would have entered it.
    Removed,
}

/// Gives the TUN link `name` to the user with the id `owner`, if it exists.
///
/// Who had attached to it before would go on reading, so a link that somebody holds is removed. The
/// caller makes sure that this is not an agent of the same state directory.
pub fn secure(name: &str, owner: u32) -> anyhow::Result<Secured> {
    let mut links = Rtnetlink::open().context("cannot speak to the kernel's network")?;
    let Some(link) = links.link(name)? else { return Ok(Secured::NoLink) };
    let Some(tun) = link.tun else { return Ok(Secured::NoLink) };
    if tun.owner == Some(owner) {
        return Ok(Secured::Owned);
    }
    let held = match own_tun(name, owner) {
        // Somebody may have attached to another of its queues in between.
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

/// Removes a link that another process holds: that process reads nothing any more.
fn remove(links: &mut Rtnetlink, name: &str, index: u32) -> anyhow::Result<()> {
    links.delete_link(index).with_context(|| format!("cannot remove the link {name}"))?;
    tracing::warn!(link = name, "link was held by another process: it is made again");
    Ok(())
}
