//! Finds programs that may redirect packets past every nftables hook of this host.
//!
//! An eBPF program on a link may send a packet to another link itself (`bpf_redirect`). CNI plugins
//! with eBPF host routing do so. No nftables hook sees such a packet. The unreachable routes stop it if
//! the program looks up the kernel's routing tables (`bpf_fib_lookup`, `bpf_redirect_neigh`). Otherwise
//! no guard stops it. The kernel does not tell what a program does, so this module finds programs, not
//! redirects. It changes nothing.

use std::fmt;
use std::mem::size_of;

use towline_netlink::{Link, NetlinkError, Rtnetlink};

/// Program that may redirect packets past nftables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PastNetfilter {
    /// Cilium, identified by its link.
    Cilium,
    /// Calico's eBPF data plane, identified by its link.
    Calico,
    /// An eBPF program on the link of this name.
    Program(String),
}

/// Link that Cilium creates.
const CILIUM: &str = "cilium_host";
/// Link that Calico creates for its eBPF data plane.
const CALICO: &str = "bpfin.cali";
/// Kind of links that run eBPF programs of their own.
const NETKIT: &str = "netkit";

/// Command of `bpf(2)` that lists the attached programs (`linux/bpf.h`).
const BPF_PROG_QUERY: libc::c_int = 16;
/// Attachment type of programs that see packets entering a link (TCX, Linux 6.6).
const BPF_TCX_INGRESS: u32 = 46;
/// Attachment type of programs that see packets leaving a link.
const BPF_TCX_EGRESS: u32 = 47;
/// Greatest number of links to query for TCX programs. Each takes two system calls.
const LINKS: usize = 256;

impl fmt::Display for PastNetfilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remedy = match self {
            Self::Cilium => {
                f.write_str("Cilium")?;
                "set bpf.hostLegacyRouting=true in Cilium"
            }
            Self::Calico => {
                f.write_str("Calico's eBPF data plane")?;
                "use Calico's iptables or nftables data plane"
            }
            Self::Program(link) => {
                write!(f, "an eBPF program on the link {link}")?;
                "check that it does not redirect packets"
            }
        };
        write!(
            f,
            " may redirect packets past nftables: only the unreachable routes then keep mesh traffic \
             from leaving in clear, and a program that does not look up the kernel's routes skips \
             them too: {remedy}"
        )
    }
}

/// Returns the first program found that may redirect packets past nftables. The link `own` is
/// Towline's and is left out.
pub(super) fn find(
    rtnetlink: &mut Rtnetlink,
    own: &str,
) -> Result<Option<PastNetfilter>, NetlinkError> {
    let links = rtnetlink.links()?;
    for (name, found) in [(CILIUM, PastNetfilter::Cilium), (CALICO, PastNetfilter::Calico)] {
        if links.iter().any(|link| link.name == name) {
            return Ok(Some(found));
        }
    }
    let others = || links.iter().filter(|link| link.name != own && !link.loopback);
    let netkit = others().find(|link| link.kind.as_deref() == Some(NETKIT));
    let program = match netkit {
        Some(link) => Some(link),
        None => rtnetlink.classified_by_program(others())?,
    };
    let program = program.or_else(|| others().take(LINKS).find(|link| has_programs(link)));
    Ok(program.map(|link| PastNetfilter::Program(link.name.clone())))
}

/// Returns true if TCX programs are attached to a link. Returns false if the kernel lacks TCX or does
/// not permit the query.
fn has_programs(link: &Link) -> bool {
    /// Part of `union bpf_attr` that belongs to [`BPF_PROG_QUERY`].
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        link: u32,
        attached: u32,
        flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        padding: u32,
        program_flags: u64,
        links: u64,
        link_flags: u64,
        revision: u64,
    }
    [BPF_TCX_INGRESS, BPF_TCX_EGRESS].into_iter().any(|attached| {
        let mut query = Query { link: link.index, attached, ..Query::default() };
        // SAFETY: the kernel reads and writes only `query`, which has the given size, lives until the
        // call returns, and contains no pointer.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>())
        };
        result == 0 && query.count > 0
    })
}
