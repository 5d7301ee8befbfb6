//! What a peer's logic needs to know of ourselves.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use towline_types::id::{Label, WireguardKey};
use towline_types::limits;
use towline_types::node::{Candidate, CandidateKind, Grant, MeshConfig};

use crate::config::Membership;
use crate::effects::Effects;
use crate::output::Output;
use crate::path::{LocalAddress, Path};
use crate::prefixes::is_private;

/// Uplinks of one family that are used.
const UPLINKS: usize = 4;

/// Ourselves.
#[derive(Debug)]
pub(crate) struct LocalNode {
    key: Option<WireguardKey>,
    site: Option<Label>,
    /// MTU of the TUN link, in bytes.
    link_mtu: u16,
    /// Candidates of host and configuration: without reflexive ones.
    host_candidates: Vec<Candidate>,
    candidates: Vec<Candidate>,
    /// Where the host's and the configuration's end and the reflexive ones begin.
    own: usize,
    /// One address of each interface and family that leads outwards.
    uplinks: Vec<LocalAddress>,
    /// The same as paths are named by them still, see [`Self::still`].
    named_by: Vec<LocalAddress>,
    /// Whether a controller takes signals.
    is_connected: bool,
    /// The overlay's ranges: a datagram to an address in there would enter the tunnel.
    overlay: Vec<IpNet>,
}

impl LocalNode {
    pub(crate) fn new(membership: Option<&Membership>, link_mtu: u32) -> Self {
        let mut local = Self {
            key: None,
            site: None,
            link_mtu: u16::try_from(link_mtu).unwrap_or(u16::MAX),
            host_candidates: Vec::new(),
            candidates: Vec::new(),
            own: 0,
            uplinks: Vec::new(),
            named_by: Vec::new(),
            is_connected: false,
            overlay: Vec::new(),
        };
        if let Some(Membership { grant, mesh }) = membership {
            local.set_grant(grant);
            local.set_mesh(mesh);
        }
        local
    }

    /// Our WireGuard key, if we are a node.
    pub(crate) fn key(&self) -> Option<WireguardKey> {
        self.key
    }

    pub(crate) fn site(&self) -> Option<&Label> {
        self.site.as_ref()
    }

    /// The largest inner packet, in bytes.
    pub(crate) fn link_mtu(&self) -> u16 {
        self.link_mtu
    }

    /// Whether a controller takes signals.
    pub(crate) fn is_connected(&self) -> bool {
        self.is_connected
    }

    pub(crate) fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    pub(crate) fn set_controller_connected(&mut self, is_connected: bool) {
        self.is_connected = is_connected;
    }

    /// Takes the candidates of host and configuration. Returns whether they changed; if so,
    /// [`Self::advertise`] has to follow.
    pub(crate) fn set_host_candidates(&mut self, candidates: Vec<Candidate>) -> bool {
        let changed = self.host_candidates != candidates;
        self.host_candidates = candidates;
        changed
    }

    pub(crate) fn set_grant(&mut self, grant: &Grant) {
        self.key = grant.wireguard_keys.first().copied();
        self.site = grant.site.clone();
    }

    pub(crate) fn set_mesh(&mut self, mesh: &MeshConfig) {
        self.overlay = vec![IpNet::V6(mesh.overlay_v6), IpNet::V4(mesh.overlay_v4)];
    }

    /// Puts our candidates together, and hands them out if they changed: sorted, each address once
    /// (as the best kind that names it), no more than a record holds; `reflexive` ones come last.
    pub(crate) fn advertise(
        &mut self,
        fx: &mut Effects,
        reflexive: impl Iterator<Item = Candidate>,
    ) {
        let host = self.host_candidates.iter().copied();
        let mut candidates: Vec<Candidate> =
            host.filter(|c| !self.is_inside(c.address().ip())).collect();
        candidates.extend(reflexive);
        candidates.sort_unstable_by_key(|c| (preference(c.kind()), c.address()));
        let mut seen = BTreeSet::new();
        candidates.retain(|c| seen.insert(c.address()));
        candidates.truncate(limits::CANDIDATES);
        self.own = candidates
            .iter()
            .take_while(|c| preference(c.kind()) < preference(CandidateKind::Reflexive))
            .count();
        if candidates != self.candidates {
            self.candidates = candidates;
            fx.output(Output::Advertise(self.candidates.clone()));
        }
    }

    /// Whether others can begin a conversation with us.
    pub(crate) fn is_reachable(&self) -> bool {
        is_reachable(&self.candidates)
    }

    /// Whether a datagram to `ip` would enter the tunnel, or never leave.
    pub(crate) fn is_inside(&self, ip: IpAddr) -> bool {
        self.overlay.iter().any(|net| net.contains(&ip))
    }

    /// Whether we may send datagrams of ours there.
    pub(crate) fn can_send_to(&self, to: SocketAddr) -> bool {
        Candidate::new(CandidateKind::Local, to).is_some()
            && !self.is_inside(to.ip())
            && !self.is_own(to)
    }

    /// Whether it is an address of this very host (not one of a NAT before it, behind which others
    /// may stand too).
    pub(crate) fn is_own(&self, address: SocketAddr) -> bool {
        self.candidates[..self.own].iter().any(|own| own.address() == address)
    }

    /// Takes our uplinks: one address for each interface and family. Says whether they changed; if
    /// so, every path is to be named anew, by [`Self::still`], before [`Self::named`] ends that.
    pub(crate) fn set_uplinks(&mut self, uplinks: Vec<LocalAddress>) -> bool {
        let mut seen = BTreeSet::new();
        let kept: Vec<LocalAddress> = uplinks
            .into_iter()
            .filter(|end| !self.is_inside(end.address))
            .filter(|end| seen.insert((end.interface, end.address.is_ipv4())))
            .collect();
        let changed = kept != self.uplinks;
        self.uplinks = kept;
        changed
    }

    /// The path by the name that it has now that our uplinks changed; `None`: it began at one that
    /// is gone.
    pub(crate) fn still(&self, path: Path) -> Option<Path> {
        let v4 = path.remote.is_ipv4();
        // Without a name it began at the only one.
        let mut before = self.named_by.iter().filter(|end| end.address.is_ipv4() == v4);
        let only = before.next().filter(|_| before.next().is_none()).copied();
        let local = path.local.or(only);
        if local.is_some_and(|local| !self.uplinks.contains(&local)) {
            return None;
        }
        Some(self.canonical(Path { local, ..path })).filter(|path| self.has_uplink_of(path))
    }

    /// Every path has its new name.
    pub(crate) fn named(&mut self) {
        self.named_by.clone_from(&self.uplinks);
    }

    /// What to send from, for one family: each uplink where there are several, else what the kernel
    /// chooses.
    pub(crate) fn ends(&self, v4: bool) -> Vec<Option<LocalAddress>> {
        let of_family: Vec<_> =
            self.uplinks.iter().filter(|end| end.address.is_ipv4() == v4).take(UPLINKS).collect();
        if of_family.len() < 2 {
            return vec![None];
        }
        of_family.into_iter().map(|end| Some(*end)).collect()
    }

    /// Every direct path to an address.
    pub(crate) fn paths_to(&self, remote: SocketAddr) -> impl Iterator<Item = Path> {
        let ends = self.ends(remote.is_ipv4()).into_iter();
        ends.map(move |local| Path { local, remote, channel: None })
    }

    /// The path by the name under which we know it: the local end is named only where there are
    /// several uplinks to choose from.
    pub(crate) fn canonical(&self, path: Path) -> Path {
        let ends = self.ends(path.remote.is_ipv4());
        let named = path.local.and_then(|local| {
            ends.iter().flatten().find(|end| end.interface == local.interface).copied()
        });
        Path { local: named, ..path }
    }

    /// Whether a path begins at an uplink that we (still) have.
    pub(crate) fn has_uplink_of(&self, path: &Path) -> bool {
        self.ends(path.remote.is_ipv4()).contains(&path.local)
    }

    /// Whether this host has an address of the family of `remote`, as far as it is known.
    pub(crate) fn has_family(&self, remote: SocketAddr) -> bool {
        self.candidates[..self.own].iter().any(|c| c.address().is_ipv4() == remote.is_ipv4())
    }
}

/// Whether a node with these candidates can be called by one that it never called: it has a
/// public or a configured one.
pub(crate) fn is_reachable(candidates: &[Candidate]) -> bool {
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
