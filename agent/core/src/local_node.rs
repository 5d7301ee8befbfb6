//! This node as the logic of a peer sees it: key, site, candidates, uplinks.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_types::id::{Label, WireguardKey};
use towline_types::limits;
use towline_types::mtu::Mtu;
use towline_types::node::{Candidate, CandidateKind, Grant, MeshConfig};

use crate::config::Membership;
use crate::effects::Effects;
use crate::output::Output;
use crate::path::{LocalAddress, LocalPort, Path};
use crate::prefixes::{is_behind_nat, is_private};

/// Uplinks of one family that are used: each multiplies the paths that are tried.
const UPLINKS: usize = 4;
/// Time after which peers know our record, once a controller got it: some round trips, and a write to
/// its store.
const PUBLISHED: Duration = Duration::from_secs(1);

/// This node. Paths are named by its uplinks.
#[derive(Debug)]
pub(crate) struct LocalNode {
    /// Our WireGuard key; `None` if we are no node.
    key: Option<WireguardKey>,
    /// Site of our grant.
    site: Option<Label>,
    /// MTU of the TUN link.
    link_mtu: Mtu,
    /// Candidates of host and configuration: without reflexive ones.
    host_candidates: Vec<Candidate>,
    /// All our candidates, as they were handed out last.
    candidates: Vec<Candidate>,
    /// Number of `candidates` that are not reflexive; they come first.
    own: usize,
    /// Time since which a public IPv4 address of ours is known. Begins again when all of them are
    /// replaced. `None` while none is known.
    outer_since: Option<Instant>,
    /// Addresses that datagrams may leave from, the preferred ones first.
    uplinks: Vec<LocalAddress>,
    /// Uplinks by which paths are named. Differs from `uplinks` from [`Self::set_uplinks`] until
    /// [`Self::named`].
    named_by: Vec<LocalAddress>,
    /// Time since which a controller takes signals. `None` while none does.
    connected_since: Option<Instant>,
    /// The overlay's ranges: a datagram to an address in there would enter the tunnel.
    overlay: Vec<IpNet>,
    /// Port that datagrams to public addresses leave from, unless they answer what arrived at the
    /// other one. See [`crate::second_port`].
    outward_port: LocalPort,
}

impl LocalNode {
    pub(crate) fn new(membership: Option<&Membership>, link_mtu: Mtu) -> Self {
        let mut local = Self {
            key: None,
            site: None,
            link_mtu,
            host_candidates: Vec::new(),
            candidates: Vec::new(),
            own: 0,
            outer_since: None,
            uplinks: Vec::new(),
            named_by: Vec::new(),
            connected_since: None,
            overlay: Vec::new(),
            outward_port: LocalPort::Configured,
        };
        if let Some(Membership { grant, mesh }) = membership {
            local.set_grant(grant);
            local.set_mesh(mesh);
        }
        local
    }

    /// Returns our WireGuard key, if we are a node.
    pub(crate) fn key(&self) -> Option<WireguardKey> {
        self.key
    }

    pub(crate) fn site(&self) -> Option<&Label> {
        self.site.as_ref()
    }

    /// Returns the MTU of the TUN link.
    pub(crate) fn link_mtu(&self) -> Mtu {
        self.link_mtu
    }

    /// Returns whether a controller takes signals.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected_since.is_some()
    }

    /// Returns since when a controller takes signals.
    pub(crate) fn connected_since(&self) -> Option<Instant> {
        self.connected_since
    }

    /// Returns since when a public IPv4 address of ours is known.
    pub(crate) fn outer_since(&self) -> Option<Instant> {
        self.outer_since
    }

    /// Returns the time from which on peers know a public IPv4 address of ours from our record.
    pub(crate) fn published_since(&self) -> Option<Instant> {
        Some(self.outer_since?.max(self.connected_since?) + PUBLISHED)
    }

    /// Returns the port that datagrams to public addresses leave from.
    pub(crate) fn outward_port(&self) -> LocalPort {
        self.outward_port
    }

    /// Sets the port that datagrams to public addresses leave from.
    pub(crate) fn set_outward_port(&mut self, port: LocalPort) {
        self.outward_port = port;
    }

    /// Returns the port that a datagram to an address leaves from, unless it answers another one.
    pub(crate) fn port_to(&self, remote: SocketAddr) -> LocalPort {
        if is_behind_nat(remote) { self.outward_port } else { LocalPort::Configured }
    }

    /// Returns a path with the port that datagrams to its remote address leave from.
    pub(crate) fn on_port(&self, path: Path) -> Path {
        Path { port: self.port_to(path.remote), ..path }
    }

    /// Returns whether others can reach us over IPv4 without our having sent something first.
    pub(crate) fn is_reachable_v4(&self) -> bool {
        is_reachable_v4(&self.candidates)
    }

    pub(crate) fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    pub(crate) fn set_controller_connected(&mut self, now: Instant, is_connected: bool) {
        match self.connected_since {
            Some(_) if is_connected => {}
            _ => self.connected_since = is_connected.then_some(now),
        }
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
        self.overlay = mesh.overlays().to_vec();
    }

    /// Puts our candidates together, and hands them out if they changed: by kind, those of host and
    /// configuration in their own order, each address once (as the best kind that names it), no more than
    /// a record holds; `reflexive` ones come last, by address.
    pub(crate) fn advertise(
        &mut self,
        fx: &mut Effects,
        reflexive: impl Iterator<Item = Candidate>,
    ) {
        let host = self.host_candidates.iter().copied();
        let mut candidates: Vec<Candidate> =
            host.filter(|c| !self.is_inside(c.address().ip())).collect();
        let mut reflexive: Vec<Candidate> = reflexive.collect();
        reflexive.sort_unstable_by_key(Candidate::address);
        candidates.extend(reflexive);
        // Stable: the preferred one of a kind stays the first.
        candidates.sort_by_key(|c| preference(c.kind()));
        let mut seen = BTreeSet::new();
        candidates.retain(|c| seen.insert(c.address()));
        candidates.truncate(limits::CANDIDATES);
        self.own = candidates
            .iter()
            .take_while(|c| preference(c.kind()) < preference(CandidateKind::Reflexive))
            .count();
        if candidates != self.candidates {
            let is_kept = self.candidates.iter().any(|c| is_outer(c) && candidates.contains(c));
            if !is_kept {
                self.outer_since = candidates.iter().any(is_outer).then_some(fx.now);
            }
            self.candidates = candidates;
            fx.output(Output::Advertise(self.candidates.clone()));
        }
    }

    /// Returns whether others can reach us without our having sent something first.
    pub(crate) fn is_reachable(&self) -> bool {
        is_reachable(&self.candidates)
    }

    /// Returns whether a datagram to `ip` would enter the tunnel.
    pub(crate) fn is_inside(&self, ip: IpAddr) -> bool {
        self.overlay.iter().any(|net| net.contains(&ip))
    }

    /// Returns whether we may send outer datagrams there.
    pub(crate) fn can_send_to(&self, to: SocketAddr) -> bool {
        Candidate::new(CandidateKind::Local, to).is_some()
            && !self.is_inside(to.ip())
            && !self.is_own(to)
    }

    /// Returns whether we may send outer datagrams for a node of the mesh there. What others name as their
    /// address must not make us send to this host or to services of its links.
    pub(crate) fn can_send_to_node(&self, to: SocketAddr) -> bool {
        self.can_send_to(to) && !is_host_local(to.ip())
    }

    /// Returns whether it is an address of this host (not one of a NAT before it, behind which there
    /// may be other nodes).
    pub(crate) fn is_own(&self, address: SocketAddr) -> bool {
        self.candidates[..self.own].iter().any(|own| own.address() == address)
    }

    /// Takes our addresses that datagrams may leave from, the preferred ones first. Returns whether
    /// they changed; if so, every path has to be renamed by [`Self::still`], and then
    /// [`Self::named`] has to be called.
    pub(crate) fn set_uplinks(&mut self, uplinks: Vec<LocalAddress>) -> bool {
        let mut seen = BTreeSet::new();
        let kept: Vec<LocalAddress> = uplinks
            .into_iter()
            .filter(|end| !self.is_inside(end.address))
            .filter(|end| seen.insert(end.address))
            .collect();
        let changed = kept != self.uplinks;
        self.uplinks = kept;
        changed
    }

    /// Returns the path under the name that it has after a change of our uplinks. `None` if its
    /// address or its interface is gone.
    pub(crate) fn still(&self, path: Path) -> Option<Path> {
        let v4 = path.remote.is_ipv4();
        // Without a name it began at the only one.
        let mut before = self.named_by.iter().filter(|end| end.address.is_ipv4() == v4);
        let only = before.next().filter(|_| before.next().is_none()).copied();
        let local = path.local.or(only);
        if local.is_some_and(|local| !self.has(local)) {
            return None;
        }
        Some(self.canonical(Path { local, ..path }))
    }

    /// Ends a change of uplinks: every path has its new name.
    pub(crate) fn named(&mut self) {
        self.named_by.clone_from(&self.uplinks);
    }

    /// Returns the addresses to send from, for one family. Where several interfaces lead outwards,
    /// these are the preferred address of each (of the first [`UPLINKS`]), and `None`: what the
    /// kernel chooses is tried too, since its routes may know better. Otherwise only `None`.
    pub(crate) fn ends(&self, v4: bool) -> Vec<Option<LocalAddress>> {
        let mut interfaces = BTreeSet::new();
        let of_family: Vec<_> =
            self.of_family(v4).filter(|end| interfaces.insert(end.interface)).collect();
        if of_family.len() < 2 {
            return vec![None];
        }
        of_family.into_iter().take(UPLINKS).copied().map(Some).chain([None]).collect()
    }

    /// Returns every direct path to an address.
    pub(crate) fn paths_to(&self, remote: SocketAddr) -> impl Iterator<Item = Path> {
        let (ends, port) = (self.ends(remote.is_ipv4()).into_iter(), self.port_to(remote));
        ends.map(move |local| Path { local, port, ..Path::direct(remote) })
    }

    /// Returns the direct path to an address, from where the kernel chooses.
    pub(crate) fn path_to(&self, remote: SocketAddr) -> Path {
        Path { port: self.port_to(remote), ..Path::direct(remote) }
    }

    /// Returns a path by its canonical name. The local address is the one at which the datagram
    /// arrived, so that it is answered from there; it is named only where there are several to choose
    /// from. An address that we do not know stands for the preferred one of its interface.
    pub(crate) fn canonical(&self, path: Path) -> Path {
        let v4 = path.remote.is_ipv4();
        if self.of_family(v4).nth(1).is_none() {
            return Path { local: None, ..path };
        }
        let named = path.local.and_then(|local| {
            let on_interface = || self.of_family(v4).find(|end| end.interface == local.interface);
            if self.has(local) { Some(local) } else { on_interface().copied() }
        });
        Path { local: named, ..path }
    }

    /// Returns whether an address of ours is still there, and its interface too.
    fn has(&self, local: LocalAddress) -> bool {
        self.uplinks.iter().any(|end| end.address == local.address)
            && self.uplinks.iter().any(|end| end.interface == local.interface)
    }

    fn of_family(&self, v4: bool) -> impl Iterator<Item = &LocalAddress> {
        self.uplinks.iter().filter(move |end| end.address.is_ipv4() == v4)
    }

    /// Returns whether this host is known to have an address of the family of `remote`.
    pub(crate) fn has_family(&self, remote: SocketAddr) -> bool {
        self.candidates[..self.own].iter().any(|c| c.address().is_ipv4() == remote.is_ipv4())
    }
}

/// Returns whether an address means another host, or none, on each host or link: loopback or
/// link-local. Services that trust their link listen there, such as a cloud's metadata service.
pub(crate) fn is_host_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local(),
    }
}

/// Returns whether a candidate is a public IPv4 address.
pub(crate) fn is_outer(candidate: &Candidate) -> bool {
    is_behind_nat(candidate.address())
}

/// Returns whether a node with these candidates can be reached without its having sent something
/// first: it has a public or a configured one.
pub(crate) fn is_reachable<'a>(candidates: impl IntoIterator<Item = &'a Candidate>) -> bool {
    candidates.into_iter().any(|c| match c.kind() {
        CandidateKind::Configured => true,
        CandidateKind::Local => !is_private(c.address().ip()),
        CandidateKind::Reflexive | CandidateKind::Relayed => false,
    })
}

/// Returns whether a node with these candidates can be reached over IPv4 without its having sent
/// something first.
pub(crate) fn is_reachable_v4(candidates: &[Candidate]) -> bool {
    is_reachable(candidates.iter().filter(|c| c.address().is_ipv4()))
}

/// Returns the rank of a kind of candidate; lower is better.
pub(crate) fn preference(kind: CandidateKind) -> u8 {
    match kind {
        CandidateKind::Configured => 0,
        CandidateKind::Local => 1,
        CandidateKind::Reflexive => 2,
        CandidateKind::Relayed => 3,
    }
}
