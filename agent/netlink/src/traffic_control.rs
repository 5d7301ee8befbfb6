//! Traffic control (tc): the queueing discipline of a link, and the links that have eBPF programs.

use super::codec::{Message, attributes, u32_at};
use super::link::Link;
use super::{CREATE_OR_REPLACE, NetlinkError, Rtnetlink};

/// Attribute with the kind of a queueing discipline or filter (`linux/rtnetlink.h`).
const TCA_KIND: u16 = 1;
/// Length in bytes of `struct tcmsg`: family, padding, link, handle, parent, information.
const TRAFFIC_HEADER: usize = 20;
/// Offset in bytes of the link's index in `struct tcmsg`.
const LINK_AT: usize = 4;
/// Offset in bytes of the handle in `struct tcmsg`.
const HANDLE_AT: usize = 8;
/// Offset in bytes of the parent in `struct tcmsg`.
const PARENT_AT: usize = 12;
/// Parent of the queueing discipline at the root of a link (`linux/pkt_sched.h`).
const ROOT: u32 = 0xffff_ffff;
/// Parent of filters for packets that enter a link (`linux/pkt_sched.h`).
const INGRESS: u32 = 0xffff_fff2;
/// Parent of filters for packets that leave a link.
const EGRESS: u32 = 0xffff_fff3;
/// Greatest number of links whose filters are read. Each takes two requests.
const LINKS: usize = 256;

/// Queueing discipline at the root of a link: the order and time in which its packets leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueingDiscipline {
    /// Kind, such as `fq_codel`.
    pub kind: String,
    /// Handle, with the major number in the upper 16 bits. 0 if the kernel chose the discipline.
    pub handle: u32,
}

impl Rtnetlink {
    /// Returns the queueing discipline at the root of a link. A link that was never up has none.
    pub fn queueing_discipline(
        &mut self,
        link: u32,
    ) -> Result<Option<QueueingDiscipline>, NetlinkError> {
        let request = Message::new(libc::RTM_GETQDISC, 0, &header(link, 0, 0));
        let found = self.connection.dump("list queueing disciplines", &request, |received| {
            let number = |at| u32_at(received.payload, at);
            if number(LINK_AT)? != link || number(PARENT_AT)? != ROOT {
                return None;
            }
            let kind = attributes(received.payload, TRAFFIC_HEADER).find(|a| a.kind == TCA_KIND)?;
            Some(QueueingDiscipline { kind: kind.string(), handle: number(HANDLE_AT)? })
        })?;
        Ok(found.into_iter().next())
    }

    /// Sets the queueing discipline at the root of a link, with the parameters that the kernel gives
    /// it. The kernel loads the module of the discipline, and refuses with `ENOENT` if there is none.
    pub fn set_queueing_discipline(
        &mut self,
        link: u32,
        discipline: &QueueingDiscipline,
    ) -> Result<(), NetlinkError> {
        let QueueingDiscipline { kind, handle } = discipline;
        let header = header(link, *handle, ROOT);
        let mut request = Message::new(libc::RTM_NEWQDISC, CREATE_OR_REPLACE, &header);
        request.string(TCA_KIND, kind);
        let what = || format!("set the queueing discipline of link {link} to {kind}");
        self.connection.request(what, request)
    }

    /// Removes the queueing discipline with this handle from the root of a link. The kernel then
    /// chooses one.
    pub fn remove_queueing_discipline(
        &mut self,
        link: u32,
        handle: u32,
    ) -> Result<(), NetlinkError> {
        let request = Message::new(libc::RTM_DELQDISC, 0, &header(link, handle, ROOT));
        self.connection
            .request(|| format!("remove the queueing discipline of link {link}"), request)
    }

    /// Returns the first of the links that has an eBPF program of traffic control: a filter of kind
    /// `bpf` under `clsact` or `ingress`. Does not find programs that are attached by TCX (Linux 6.6).
    pub fn classified_by_program<'a>(
        &mut self,
        links: impl Iterator<Item = &'a Link>,
    ) -> Result<Option<&'a Link>, NetlinkError> {
        let request = Message::new(libc::RTM_GETQDISC, 0, &header(0, 0, 0));
        let holders = self.connection.dump("list queueing disciplines", &request, |received| {
            let kind = attributes(received.payload, TRAFFIC_HEADER).find(|a| a.kind == TCA_KIND)?;
            let holds = matches!(kind.string().as_str(), "clsact" | "ingress");
            u32_at(received.payload, LINK_AT).filter(|_| holds)
        })?;
        for link in links.filter(|link| holders.contains(&link.index)).take(LINKS) {
            for parent in [INGRESS, EGRESS] {
                let request = Message::new(libc::RTM_GETTFILTER, 0, &header(link.index, 0, parent));
                let programs = self.connection.dump("list filters", &request, |received| {
                    let kind = attributes(received.payload, TRAFFIC_HEADER)
                        .find(|a| a.kind == TCA_KIND)?;
                    (kind.string() == "bpf").then_some(())
                });
                match programs {
                    Ok(programs) if programs.is_empty() => {}
                    Ok(_) => return Ok(Some(link)),
                    // The link vanished in the meantime, or has no filters in this direction.
                    Err(NetlinkError::Refused { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(None)
    }
}

/// Encodes `struct tcmsg`.
fn header(link: u32, handle: u32, parent: u32) -> [u8; TRAFFIC_HEADER] {
    let mut header = [0; TRAFFIC_HEADER];
    header[LINK_AT..HANDLE_AT].copy_from_slice(&link.to_ne_bytes());
    header[HANDLE_AT..PARENT_AT].copy_from_slice(&handle.to_ne_bytes());
    header[PARENT_AT..16].copy_from_slice(&parent.to_ne_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_netns::{add_link, namespace_test};

    /// A discipline that every kernel with traffic control has.
    const KIND: &str = "pfifo";
    const HANDLE: u32 = 0x1234_0000;

    namespace_test! {
        fn a_queueing_discipline_replaces_the_kernels_choice_until_it_is_removed() {
            let link = add_link("near");
            let mut netlink = Rtnetlink::open().unwrap();
            let is_default = |found: Option<QueueingDiscipline>| {
                found.is_none_or(|found| found.handle == 0)
            };
            assert!(is_default(netlink.queueing_discipline(link).unwrap()));
            let wanted = QueueingDiscipline { kind: KIND.to_owned(), handle: HANDLE };
            netlink.set_queueing_discipline(link, &wanted).unwrap();
            assert_eq!(netlink.queueing_discipline(link).unwrap(), Some(wanted));
            netlink.remove_queueing_discipline(link, HANDLE).unwrap();
            assert!(is_default(netlink.queueing_discipline(link).unwrap()));
        }
    }

    namespace_test! {
        fn a_kind_that_the_kernel_does_not_have_is_refused() {
            let link = add_link("near");
            let mut netlink = Rtnetlink::open().unwrap();
            let wanted = QueueingDiscipline { kind: "no_such_kind".to_owned(), handle: HANDLE };
            let error = netlink.set_queueing_discipline(link, &wanted).unwrap_err();
            assert_eq!(error.errno(), Some(nix::errno::Errno::ENOENT), "{error}");
        }
    }
}
