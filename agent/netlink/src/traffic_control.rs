//! Programs of traffic control: which links have some, by netlink.

use super::codec::{Message, attributes, u32_at};
use super::link::Link;
use super::{NetlinkError, Rtnetlink};

/// `linux/rtnetlink.h`: what holds filters of what enters or leaves a link, of any kind.
const TCA_KIND: u16 = 1;
/// Bytes of `struct tcmsg`: family, padding, link, handle, parent, information.
const TRAFFIC_HEADER: usize = 20;
const LINK_AT: usize = 4;
/// `linux/pkt_sched.h`: the parents of filters for what enters and what leaves.
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
/// Links whose filters are read: one request each.
const LINKS: usize = 256;

impl Rtnetlink {
    /// Returns the first of the links on which an eBPF program of traffic control (a filter of
    /// kind `bpf` under `clsact` or `ingress`) looks at what enters or leaves. Programs attached
    /// by the newer way (TCX, Linux 6.6) are not found.
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
                    // The link went meanwhile, or holds no filters of this direction.
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
