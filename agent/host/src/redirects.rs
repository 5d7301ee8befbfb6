//! Whether packets may be redirected past every hook of nftables on this host.
//!
//! An eBPF program that looks at what enters or leaves a link may send a packet on by another link
//! itself (`bpf_redirect`): CNI plugins with eBPF host routing do. No nftables hook sees such a
//! packet. The unreachable routes hold it if the program asks the kernel's tables for the way
//! (`bpf_fib_lookup`, `bpf_redirect_neigh`); nothing holds it if the program does not. What a
//! program does cannot be seen from outside, so this finds programs, not redirects.

use std::fmt;
use std::mem::size_of;

use towline_netlink::{Link, NetlinkError, Rtnetlink};

/// What may redirect packets past nftables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PastNetfilter {
    /// Cilium, known by its link.
    Cilium,
    /// Calico with its eBPF data plane, known by its link.
    Calico,
    /// A program on this link.
    Program(String),
}

/// Links that these plugins make.
const CILIUM: &str = "cilium_host";
const CALICO: &str = "bpfin.cali";
/// Links of this kind carry programs by themselves.
const NETKIT: &str = "netkit";

/// `linux/bpf.h`: asks which programs are attached; to what enters and leaves a link (TCX,
/// Linux 6.6).
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
/// Links that are asked for such programs, two system calls each.
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
                "check that it redirects nothing"
            }
        };
        write!(
            f,
            " may redirect packets past nftables: only the unreachable routes then keep mesh traffic \
             from leaving in clear, and nothing does where a program does not ask the kernel's \
             routes: {remedy}"
        )
    }
}

/// Looks for what may redirect packets past nftables. The link `own` is ours and left out.
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

/// Whether programs are attached to a link by TCX. `false` where the kernel has none, or does not
/// let us ask.
fn has_programs(link: &Link) -> bool {
    /// The part of `union bpf_attr` for this command.
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
        // SAFETY: the kernel reads and writes `query` alone, which has the size that is given and
        // lives until the call returns; it holds no pointer.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>())
        };
        result == 0 && query.count > 0
    })
}
