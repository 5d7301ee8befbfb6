//! Queueing discipline of the TUN link.
//!
//! Senders with BBR pace their packets. With `fq` at the link the kernel does that in the queue, with one
//! timer for all; without it each socket has a timer of its own, which wakes both ends for each packet.
//! Towline replaces only what the kernel chose by itself, and removes only what it set.

use nix::errno::Errno;
use towline_netlink::{NetlinkError, QueueingDiscipline, Rtnetlink};

use crate::config::LinkQueueing;

/// Kind of the discipline that paces.
const FQ: &str = "fq";
/// Kind of the discipline that holds one for each queue of a link with several.
const MULTI_QUEUE: &str = "mq";
/// Handle of Towline's discipline. The major number, "TL", tells it from those of others.
const HANDLE: u32 = 0x544c_0000;

/// Change of a link's discipline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Nothing,
    SetFq,
    Remove,
}

/// Sets the queueing discipline of the link. Without it the link works too, so a failure is only logged.
pub(super) fn apply(link: &str, wanted: LinkQueueing) {
    match change_link(link, wanted) {
        Ok(()) => {}
        // No such discipline, or no traffic control at all.
        Err(error) if matches!(error.errno(), Some(Errno::ENOENT | Errno::EOPNOTSUPP)) => {
            tracing::debug!(link, %error, "queueing discipline not available");
        }
        Err(error) => {
            tracing::warn!(link, %error, "queueing discipline not set");
        }
    }
}

fn change_link(name: &str, wanted: LinkQueueing) -> Result<(), NetlinkError> {
    let mut rtnetlink = Rtnetlink::open()?;
    let link = rtnetlink.link_index(name)?;
    match change(wanted, rtnetlink.queueing_discipline(link)?.as_ref()) {
        Change::Nothing => Ok(()),
        Change::SetFq => {
            let fq = QueueingDiscipline { kind: FQ.to_owned(), handle: HANDLE };
            rtnetlink.set_queueing_discipline(link, &fq)
        }
        Change::Remove => rtnetlink.remove_queueing_discipline(link, HANDLE),
    }
}

/// Returns what to change, given the discipline at the root of the link.
fn change(wanted: LinkQueueing, root: Option<&QueueingDiscipline>) -> Change {
    match wanted {
        // The kernel's own choice has no handle.
        LinkQueueing::Fq
            if root.is_none_or(|root| {
                root.handle == 0 && root.kind != FQ && root.kind != MULTI_QUEUE
            }) =>
        {
            Change::SetFq
        }
        LinkQueueing::Default
            if root.is_some_and(|root| root.handle == HANDLE && root.kind == FQ) =>
        {
            Change::Remove
        }
        LinkQueueing::Fq | LinkQueueing::Default => Change::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(kind: &str, handle: u32) -> QueueingDiscipline {
        QueueingDiscipline { kind: kind.to_owned(), handle }
    }

    #[test]
    fn only_the_kernels_own_choice_is_replaced() {
        let set = |root: Option<QueueingDiscipline>| change(LinkQueueing::Fq, root.as_ref());
        assert_eq!(set(None), Change::SetFq, "a link that was never up");
        assert_eq!(set(Some(root("fq_codel", 0))), Change::SetFq);
        assert_eq!(set(Some(root("pfifo_fast", 0))), Change::SetFq);
        assert_eq!(set(Some(root("fq", 0))), Change::Nothing, "the kernel's default already");
        assert_eq!(set(Some(root("mq", 0))), Change::Nothing, "several queues");
        assert_eq!(set(Some(root("cake", 0x8001_0000))), Change::Nothing, "an operator's");
        assert_eq!(set(Some(root("fq", HANDLE))), Change::Nothing, "set before");
    }

    #[test]
    fn only_our_own_is_removed() {
        let remove =
            |root: Option<QueueingDiscipline>| change(LinkQueueing::Default, root.as_ref());
        assert_eq!(remove(Some(root("fq", HANDLE))), Change::Remove);
        assert_eq!(remove(Some(root("fq", 0x8001_0000))), Change::Nothing, "an operator's");
        assert_eq!(remove(Some(root("cake", HANDLE))), Change::Nothing, "an operator's");
        assert_eq!(remove(Some(root("fq_codel", 0))), Change::Nothing);
        assert_eq!(remove(None), Change::Nothing);
    }
}
