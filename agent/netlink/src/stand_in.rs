//! Simulated answers of a kernel without IPv6, for tests: a network namespace cannot run another
//! kernel.

use nix::errno::Errno;

use super::codec::Message;
use super::{Failure, NetlinkError, Refusal};

const V6: u8 = libc::AF_INET6 as u8;

fn is_v6(message: &mut Message) -> bool {
    message.family_mut().is_some_and(|family| *family == V6)
}

/// Handles a dump request as a kernel without IPv6 does. It refuses a dump of IPv6 policy rules, and
/// answers a dump of IPv6 routes with the routes of all families that it has.
pub(crate) fn dump_without_ipv6(what: &str, message: &mut Message) -> Result<(), NetlinkError> {
    match message.kind() {
        libc::RTM_GETRULE if is_v6(message) => {
            let refusal = Refusal { errno: Errno::EAFNOSUPPORT, text: None };
            return Err(NetlinkError::Refused { what: what.to_owned(), refusal });
        }
        libc::RTM_GETROUTE => {
            if let Some(family) = message.family_mut().filter(|family| **family == V6) {
                *family = libc::AF_UNSPEC as u8;
            }
        }
        _ => {}
    }
    Ok(())
}

/// Returns the failures of the changes that a kernel without IPv6 refuses, or `None` if the whole batch
/// may be sent.
pub(crate) fn refused_without_ipv6(batch: &mut [Message]) -> Option<Vec<Failure>> {
    let refused = |message: &Message| match message.kind() {
        libc::RTM_NEWRULE | libc::RTM_DELRULE => Some(Errno::EAFNOSUPPORT),
        libc::RTM_NEWADDR | libc::RTM_DELADDR | libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
            Some(Errno::EOPNOTSUPP)
        }
        _ => None,
    };
    let failures: Vec<_> = batch
        .iter_mut()
        .enumerate()
        .filter_map(|(at, message)| is_v6(message).then_some((at, message)))
        .filter_map(|(at, message)| Some((at, Refusal { errno: refused(message)?, text: None })))
        .collect();
    (!failures.is_empty()).then_some(failures)
}
