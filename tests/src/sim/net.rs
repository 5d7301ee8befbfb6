//! The simulated internet: realms, the NATs and firewalls between them, and the conditions on the
//! links.
//!
//! Realm 0 is the internet. Every other realm is a network with one NAT or firewall towards its
//! parent for each address family that it has. They can be nested (a home NAT behind a carrier's
//! NAT).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

use super::nat::Nat;

/// Index of a host.
pub type HostId = usize;

/// Index of a realm; 0 is the internet.
pub type RealmId = usize;

/// The realm of the internet.
pub const INTERNET: RealmId = 0;

/// The device between a realm and its parent, for one address family.
#[derive(Debug, Clone)]
pub struct Uplink {
    /// The NAT or firewall itself.
    pub nat: Nat,
    /// True if the device drops all UDP in both directions.
    pub blocks_udp: bool,
}

#[derive(Debug)]
struct Realm {
    parent: RealmId,
    v4: Option<Uplink>,
    v6: Option<Uplink>,
}

/// Conditions on the links between realms. Inside a realm nothing is lost.
#[derive(Debug, Clone, Copy)]
pub struct Conditions {
    /// One-way latency from each side to the middle of the internet.
    pub latency: Duration,
    /// Maximum random delay added to each datagram, which reorders datagrams.
    pub jitter: Duration,
    /// Share of datagrams that are lost, from 0 to 1.
    pub loss: f64,
}

/// A datagram that reaches a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Host that receives the datagram.
    pub host: HostId,
    /// Address and port of that host at which it arrives.
    pub at: SocketAddr,
    /// Source address, as the receiving host sees it.
    pub from: SocketAddr,
    /// Time from sending to arrival.
    pub after: Duration,
}

/// The simulated network; see the module's documentation.
#[derive(Debug)]
pub struct Network {
    realms: Vec<Realm>,
    owners: BTreeMap<(RealmId, IpAddr), HostId>,
    /// Conditions on the links between realms.
    pub conditions: Conditions,
    /// Maximum UDP payload in bytes; larger payloads are dropped without an ICMP message.
    pub payload: u16,
    /// Pairs of hosts (source, destination) between which nothing passes in that direction.
    pub cuts: BTreeSet<(HostId, HostId)>,
}

/// Latency inside a realm.
const LAN: Duration = Duration::from_micros(200);

impl Network {
    /// Creates the internet, without hosts.
    pub fn new(conditions: Conditions) -> Self {
        let internet = Realm { parent: INTERNET, v4: None, v6: None };
        Self {
            realms: vec![internet],
            owners: BTreeMap::new(),
            conditions,
            payload: u16::MAX,
            cuts: BTreeSet::new(),
        }
    }

    /// Adds a realm behind `parent`.
    pub fn add_realm(
        &mut self,
        parent: RealmId,
        v4: Option<Uplink>,
        v6: Option<Uplink>,
    ) -> RealmId {
        self.realms.push(Realm { parent, v4, v6 });
        self.realms.len() - 1
    }

    /// Gives a host an address in a realm.
    pub fn attach(&mut self, host: HostId, realm: RealmId, ip: IpAddr) {
        self.owners.insert((realm, ip), host);
    }

    /// Removes an address from a realm.
    pub fn detach(&mut self, realm: RealmId, ip: IpAddr) {
        self.owners.remove(&(realm, ip));
    }

    /// Returns the NATs and firewalls of a realm.
    pub fn uplinks(&mut self, realm: RealmId) -> impl Iterator<Item = &mut Uplink> {
        let realm = &mut self.realms[realm];
        realm.v4.iter_mut().chain(realm.v6.iter_mut())
    }

    /// Removes the mappings of every NAT and firewall.
    pub fn flush_nats(&mut self) {
        for realm in 0..self.realms.len() {
            self.uplinks(realm).for_each(|uplink| uplink.nat.flush());
        }
    }

    /// Sends a datagram. Returns `None` if it is lost or blocked, or has no route.
    pub fn send(
        &mut self,
        now: Instant,
        rng: &mut StdRng,
        sender: HostId,
        realm: RealmId,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Option<Arrival> {
        let mut at = Position { realm, from, to, crossed: false };
        let host = self.up(now, rng, &mut at)?;
        if self.cuts.contains(&(sender, host)) {
            return None;
        }
        let mut after = LAN;
        if at.crossed {
            let Conditions { latency, jitter, loss } = self.conditions;
            if rng.random_bool(loss) {
                return None;
            }
            after = latency * 2 + jitter.mul_f64(rng.random());
        }
        Some(Arrival { host, at: at.to, from: at.from, after })
    }

    /// Sends a datagram that is dropped behind the first NAT or firewall.
    pub fn open(
        &mut self,
        now: Instant,
        rng: &mut StdRng,
        realm: RealmId,
        from: SocketAddr,
        to: SocketAddr,
    ) {
        if let Some(uplink) = self.realms[realm].uplink(to) {
            uplink.nat.outbound(now, rng, from, to);
        }
    }

    /// Passes a datagram outwards, from realm to parent realm, until a host there owns the
    /// destination.
    fn up(&mut self, now: Instant, rng: &mut StdRng, at: &mut Position) -> Option<HostId> {
        loop {
            if let Some(host) = self.down(now, at) {
                return host;
            }
            if at.realm == INTERNET {
                return None;
            }
            let realm = &mut self.realms[at.realm];
            let uplink = realm.uplink(at.to)?;
            if uplink.blocks_udp
                || uplink.nat.external() == Some(at.to.ip()) && !uplink.nat.behaviour.hairpin
            {
                return None;
            }
            at.from = uplink.nat.outbound(now, rng, at.from, at.to)?;
            at.realm = realm.parent;
            at.crossed = true;
        }
    }

    /// Passes a datagram inwards from a realm. Returns `None` if no host below owns the
    /// destination, and `Some(None)` if one does and the datagram is filtered.
    fn down(&mut self, now: Instant, at: &mut Position) -> Option<Option<HostId>> {
        loop {
            if let Some(host) = self.owners.get(&(at.realm, at.to.ip())) {
                return Some(Some(*host));
            }
            let child = (1..self.realms.len()).find(|child| self.leads_to(*child, at))?;
            let Some(uplink) = self.realms[child].uplink(at.to) else { return Some(None) };
            if uplink.blocks_udp {
                return Some(None);
            }
            match uplink.nat.inbound(now, at.from, at.to) {
                None => return Some(None),
                Some(inner) => at.to = inner,
            }
            at.realm = child;
            at.crossed = true;
        }
    }

    /// Returns whether a host in a realm, or in a realm behind it, owns an address.
    fn owned_inside(&self, realm: RealmId, ip: IpAddr) -> bool {
        self.owners.contains_key(&(realm, ip))
            || (realm + 1..self.realms.len())
                .any(|child| self.realms[child].parent == realm && self.owned_inside(child, ip))
    }

    /// Returns whether the device of `child` is in the current realm, and either has the
    /// destination address or is a firewall in front of it.
    fn leads_to(&mut self, child: RealmId, at: &Position) -> bool {
        let owned = self.owned_inside(child, at.to.ip());
        let realm = &mut self.realms[child];
        if realm.parent != at.realm {
            return false;
        }
        realm.uplink(at.to).is_some_and(|uplink| match uplink.nat.external() {
            Some(external) => external == at.to.ip(),
            None => owned,
        })
    }
}

impl Realm {
    fn uplink(&mut self, to: SocketAddr) -> Option<&mut Uplink> {
        if to.is_ipv4() { self.v4.as_mut() } else { self.v6.as_mut() }
    }
}

struct Position {
    realm: RealmId,
    from: SocketAddr,
    to: SocketAddr,
    crossed: bool,
}
