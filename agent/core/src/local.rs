//! What a peer's logic needs to know of ourselves.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use towline_proto::id::{Label, WireguardKey};
use towline_proto::limits;
use towline_proto::node::{Candidate, CandidateKind, Grant, MeshConfig};

use crate::mesh::Membership;
use crate::prefixes::is_private;

/// Ourselves.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) key: Option<WireguardKey>,
    pub(crate) site: Option<Label>,
    candidates: Vec<Candidate>,
    /// The overlay's ranges: a datagram to an address in there would enter the tunnel.
    overlay: Vec<IpNet>,
}

impl Local {
    pub(crate) fn new(membership: Option<&Membership>) -> Self {
        let mut local = Self { key: None, site: None, candidates: Vec::new(), overlay: Vec::new() };
        if let Some(Membership { grant, mesh }) = membership {
            local.set_grant(grant);
            local.set_mesh(mesh);
        }
        local
    }

    pub(crate) fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    pub(crate) fn set_grant(&mut self, grant: &Grant) {
        self.key = grant.wireguard_keys.first().copied();
        self.site = grant.site.clone();
    }

    pub(crate) fn set_mesh(&mut self, mesh: &MeshConfig) {
        self.overlay = vec![IpNet::V6(mesh.overlay_v6), IpNet::V4(mesh.overlay_v4)];
    }

    /// Takes our candidates: sorted, each address once (as the best kind that names it), no more
    /// than a record holds. Says whether they changed.
    pub(crate) fn set_candidates(&mut self, candidates: Vec<Candidate>) -> bool {
        let mut candidates: Vec<Candidate> =
            candidates.into_iter().filter(|c| !self.inside(c.address().ip())).collect();
        candidates.sort_unstable_by_key(|c| (preference(c.kind()), c.address()));
        let mut seen = BTreeSet::new();
        candidates.retain(|c| seen.insert(c.address()));
        candidates.truncate(limits::CANDIDATES);
        let changed = candidates != self.candidates;
        self.candidates = candidates;
        changed
    }

    /// Whether others can begin a conversation with us.
    pub(crate) fn reachable(&self) -> bool {
        reachable(&self.candidates)
    }

    /// Whether a datagram to `ip` would enter the tunnel, or never leave.
    pub(crate) fn inside(&self, ip: IpAddr) -> bool {
        self.overlay.iter().any(|net| net.contains(&ip))
    }

    /// Whether we may send datagrams of ours there.
    pub(crate) fn may_send_to(&self, to: SocketAddr) -> bool {
        Candidate::new(CandidateKind::Local, to).is_some()
            && !self.inside(to.ip())
            && !self.candidates.iter().any(|own| own.address() == to)
    }
}

/// Whether a node with these candidates can be called by one that it never called: it has a
/// public or a configured one.
pub(crate) fn reachable(candidates: &[Candidate]) -> bool {
    candidates.iter().any(|c| match c.kind() {
        CandidateKind::Configured => true,
        CandidateKind::Local => !is_private(c.address().ip()),
        CandidateKind::Reflexive | CandidateKind::Relayed => false,
    })
}

/// The lower the better.
pub(crate) fn preference(kind: CandidateKind) -> u8 {
    match kind {
        CandidateKind::Configured => 0,
        CandidateKind::Local => 1,
        CandidateKind::Reflexive => 2,
        CandidateKind::Relayed => 3,
    }
}
