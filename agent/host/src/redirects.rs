//! Finds programs that may redirect packets past every nftables hook of this host.
//!
//! An eBPF program on a link may send a packet to another link itself (`bpf_redirect`). CNI plugins
//! with eBPF host routing do so. No nftables hook sees such a packet. Two other guards stop it:
//!
//! - the unreachable routes, if the program looks up the kernel's routing tables (`bpf_fib_lookup`,
//!   `bpf_redirect_neigh`),
//! - a program of Towline at the egress of the uplinks ([`towline_helper::egress`]), where the kernel has
//!   TCX (Linux 6.6) and the agent or its helper may attach it.
//!
//! The kernel does not tell what a program does, so this module finds programs, not redirects. Where it
//! finds one, [`guard`] attaches Towline's program. It changes nothing else.

use std::collections::BTreeSet;
use std::path::Path;
use std::{fmt, io};

use towline_core::plan::Plan;
use towline_helper::egress::Direction;
use towline_helper::protocol::{EgressGuard, LinkIndex, Request, Uplink};
use towline_helper::{client, egress};
use towline_netlink::{Link, NetlinkError, Rtnetlink};
use towline_types::codes;

use super::problem::RedirectError;
use super::{address, uplinks};

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

/// Greatest number of links to query for TCX programs. Each takes two system calls.
const LINKS: usize = 256;

codes! {
    PastNetfilter {
        Cilium => "redirects-by-cilium",
        Calico => "redirects-by-calico",
        Program => "redirects-by-program",
    }
}

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
/// Towline's and is left out, as are Towline's programs on the links of `guarded`.
pub(super) fn find(
    rtnetlink: &mut Rtnetlink,
    own: &str,
    guarded: &EgressState,
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
    let program = program.or_else(|| others().take(LINKS).find(|link| has_programs(link, guarded)));
    Ok(program.map(|link| PastNetfilter::Program(link.name.clone())))
}

/// Returns true if TCX programs of others are attached to a link. Returns false if the kernel lacks TCX
/// or does not permit the query.
fn has_programs(link: &Link, guarded: &EgressState) -> bool {
    [Direction::Ingress, Direction::Egress].into_iter().any(|direction| {
        let is_ours = direction == Direction::Egress && guarded.links.contains(&link.index);
        egress::count_programs(link.index, direction).is_ok_and(|count| count > u32::from(is_ours))
    })
}

/// Uplinks on which Towline's program is attached, as known to this process.
#[derive(Debug, Default)]
pub(super) struct EgressState {
    /// Whether this process has attached or detached programs. Until then, programs of an earlier one
    /// may be attached.
    is_known: bool,
    /// Indices of the links.
    links: BTreeSet<u32>,
    /// Link of the tunnel that the programs know.
    tunnel: Option<LinkIndex>,
}

/// Attaches Towline's program to every uplink, and detaches it from links that are no uplinks any more.
/// Returns true if every uplink of the host has it, and it can look up routes for every family there.
pub(super) fn guard(
    rtnetlink: &mut Rtnetlink,
    plan: &Plan,
    state: &mut EgressState,
) -> Result<bool, RedirectError> {
    let own = &plan.link.name;
    let tunnel = tunnel(rtnetlink, plan)?;
    let addresses = address::read(rtnetlink)?;
    let uplinks = uplinks::of_both_families(&addresses, own);
    let is_uplink = |old: &u32| uplinks.iter().any(|(link, _)| link == old);
    for gone in state.links.iter().filter(|link| !is_uplink(link)) {
        // The link itself is gone in most cases.
        let _ = detach(*gone);
    }
    let mut attached = BTreeSet::new();
    let mut failed = None;
    let mut is_complete = true;
    for (index, name) in uplinks {
        is_complete &= looks_up_routes(name);
        let marks = plan.rules;
        let attach = || {
            let uplink = Uplink::here(index)?.ok_or(io::ErrorKind::InvalidInput)?;
            let guard = EgressGuard::new(uplink, tunnel, marks.mark, marks.mask);
            let guard = guard.ok_or(io::ErrorKind::InvalidInput)?;
            directly_or_by_helper(egress::attach(&guard), Request::GuardUplink(guard))
        };
        match attach() {
            Ok(()) => {
                attached.insert(index);
            }
            Err(source) => {
                failed.get_or_insert(RedirectError::Program { link: name.to_owned(), source });
            }
        }
    }
    let is_guarded = is_complete && !attached.is_empty();
    *state = EgressState { is_known: true, links: attached, tunnel };
    failed.map_or(Ok(is_guarded), Err)
}

/// Returns whether the kernel looks up routes for Towline's program on this uplink, in every family that
/// the host has. It does so only where the link forwards that family; elsewhere the program lets packets
/// pass.
fn looks_up_routes(uplink: &str) -> bool {
    ["ipv4", "ipv6"].into_iter().all(|family| {
        let directory = Path::new("/proc/sys/net").join(family);
        let setting = directory.join("conf").join(uplink).join("forwarding");
        let forwards = std::fs::read_to_string(setting).is_ok_and(|text| text.trim() != "0");
        forwards || !directory.exists()
    })
}

/// Replaces the programs if they know another link of the tunnel than the current one.
pub(super) fn follow_tunnel(
    rtnetlink: &mut Rtnetlink,
    plan: &Plan,
    state: &mut EgressState,
) -> Result<(), RedirectError> {
    if !state.links.is_empty() && state.tunnel != tunnel(rtnetlink, plan)? {
        guard(rtnetlink, plan, state)?;
    }
    Ok(())
}

fn tunnel(rtnetlink: &mut Rtnetlink, plan: &Plan) -> Result<Option<LinkIndex>, NetlinkError> {
    let mut links = rtnetlink.links()?.into_iter();
    let link = links.find(|link| link.name == plan.link.name);
    Ok(link.and_then(|link| LinkIndex::new(link.index)))
}

/// Detaches Towline's program from all uplinks, also those programs that an earlier process attached.
pub(super) fn open(
    rtnetlink: &mut Rtnetlink,
    own: &str,
    state: &mut EgressState,
) -> Result<(), RedirectError> {
    if state.is_known && state.links.is_empty() {
        return Ok(());
    }
    let addresses = address::read(rtnetlink)?;
    let uplinks = uplinks::of_both_families(&addresses, own).into_iter().map(|(link, _)| link);
    let known = std::mem::take(state).links;
    let mut failed = None;
    for index in uplinks.chain(known.iter().copied()).collect::<BTreeSet<_>>() {
        match detach(index) {
            Err(source) if known.contains(&index) => {
                state.links.insert(index);
                let link = index.to_string();
                failed.get_or_insert(RedirectError::Program { link, source });
            }
            // Where neither this process nor a helper may look for programs of an earlier process,
            // that process could not attach any.
            Ok(()) | Err(_) => {}
        }
    }
    state.is_known = true;
    failed.map_or(Ok(()), Err)
}

fn detach(link: u32) -> io::Result<()> {
    match Uplink::here(link)? {
        Some(uplink) => directly_or_by_helper(egress::detach(uplink), Request::OpenUplink(uplink)),
        None => Ok(()),
    }
}

/// Sends the request to the helper if this process was not permitted to carry it out itself.
fn directly_or_by_helper(directly: io::Result<()>, request: Request) -> io::Result<()> {
    match directly {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            client::ask(request).map(drop)
        }
        other => other,
    }
}
