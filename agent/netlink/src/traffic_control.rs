//! Finds the links that have eBPF programs of traffic control (tc).

use super::codec::{Message, attributes, u32_at};
use super::link::Link;
use super::{NetlinkError, Rtnetlink};

/// Attribute with the kind of a queueing discipline or filter (`linux/rtnetlink.h`).
const TCA_KIND: u16 = 1;
/// Length in bytes of `struct tcmsg`: family, padding, link, handle, parent, information.
const TRAFFIC_HEADER: usize = 20;
/// Offset in bytes of the link's index in `struct tcmsg`.
const LINK_AT: usize = 4;
/// Parent of filters for packets that enter a link (`linux/pkt_sched.h`).
const INGRESS: u32 = 0xffff_fff2;
/// Parent of filters for packets that leave a link.
const EGRESS: u32 = 0xffff_fff3;
/// Greatest number of links whose filters are read. Each takes two requests.
const LINKS: usize = 256;

impl Rtnetlink {
    /// Returns the first of the links that has an eBPF program of traffic control: a filter of kind
    /// `bpf` under `clsact` or `ingress`. Does not find programs that are attached by TCX (Linux 6.6).
    pub fn classified_by_program<'a>(
        &mut self,
        links: impl Iterator<Item = &'a Link>,
    ) -> Result<Option<&'a Link>, NetlinkError> {
        let request = Message::new(libc::RTM_GETQDISC, 0, &header(0, 0));
        let holders = self.connection.dump("list queueing disciplines", &request, |received| {
            let kind = attributes(received.payload, TRAFFIC_HEADER).find(|a| a.kind == TCA_KIND)?;
            let holds = matches!(kind.string().as_str(), "clsact" | "ingress");
            u32_at(received.payload, LINK_AT).filter(|_| holds)
        })?;
        for link in links.filter(|link| holders.contains(&link.index)).take(LINKS) {
            for parent in [INGRESS, EGRESS] {
                let request = Message::new(libc::RTM_GETTFILTER, 0, &header(link.index, parent));
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

fn header(link: u32, parent: u32) -> [u8; TRAFFIC_HEADER] {
    let mut header = [0; TRAFFIC_HEADER];
    header[LINK_AT..8].copy_from_slice(&link.to_ne_bytes());
    header[12..16].copy_from_slice(&parent.to_ne_bytes());
    header
}
