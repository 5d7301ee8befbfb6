//! The simulated internet: realms, the boxes between them, and what happens on the way.
//!
//! Realm 0 is the internet. Every other realm is a network behind a box for each address family
//! that it has; boxes may stand behind boxes (a home NAT behind a carrier's).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

use super::nat::Nat;

/// A host's number.
pub type HostId = usize;

/// A network's number; 0 is the internet.
pub type RealmId = usize;

/// The internet.
pub const INTERNET: RealmId = 0;

/// What stands between a realm and its parent, for one address family.
#[derive(Debug, Clone)]
pub struct Uplink {
    /// The NAT or firewall.
    pub nat: Nat,
    /// Drops all UDP, both ways.
    pub blocks_udp: bool,
}

#[derive(Debug)]
struct Realm {
    parent: RealmId,
    v4: Option<Uplink>,
    v6: Option<Uplink>,
}

/// How the way between realms is. Inside a realm nothing is lost.
#[derive(Debug, Clone, Copy)]
pub struct Conditions {
    /// From each side to the middle of the internet.
    pub latency: Duration,
    /// Added to each datagram, up to this: it reorders.
    pub jitter: Duration,
    /// Share of datagrams that get lost.
    pub loss: f64,
}

/// A datagram that arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// At whom.
    pub host: HostId,
    /// At which of its addresses.
    pub at: IpAddr,
    /// From where, as that host sees it.
    pub from: SocketAddr,
    /// After how long.
    pub after: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Network {
    realms: Vec<Realm>,
    owners: BTreeMap<(RealmId, IpAddr), HostId>,
    /// How the way between realms is.
    pub conditions: Conditions,
    /// Larger UDP payloads get lost without a word.
    pub payload: u16,
    /// Nothing passes from the first to the second.
    pub cuts: BTreeSet<(HostId, HostId)>,
}

/// Time inside a realm.
const LAN: Duration = Duration::from_micros(200);

impl Network {
    /// The internet, without hosts.
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

    /// Adds a network behind `parent`.
    pub fn add_realm(
        &mut self,
        parent: RealmId,
        v4: Option<Uplink>,
        v6: Option<Uplink>,
    ) -> RealmId {
        self.realms.push(Realm { parent, v4, v6 });
        self.realms.len() - 1
    }

    /// Gives a host an address in a network.
    pub fn attach(&mut self, host: HostId, realm: RealmId, ip: IpAddr) {
        self.owners.insert((realm, ip), host);
    }

    /// Takes an address away.
    pub fn detach(&mut self, realm: RealmId, ip: IpAddr) {
        self.owners.remove(&(realm, ip));
    }

    /// The boxes of a realm.
    pub fn uplinks(&mut self, realm: RealmId) -> impl Iterator<Item = &mut Uplink> {
        let realm = &mut self.realms[realm];
        realm.v4.iter_mut().chain(realm.v6.iter_mut())
    }

    /// Every box there is forgets its mappings.
    pub fn flush_nats(&mut self) {
        for realm in 0..self.realms.len() {
            self.uplinks(realm).for_each(|uplink| uplink.nat.flush());
        }
    }

    /// Sends a datagram; `None` when it gets lost, blocked, or has nowhere to go.
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
        Some(Arrival { host, at: at.to.ip(), from: at.from, after })
    }

    /// From a realm outward until somebody there owns the destination.
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

    /// Inward from a realm. `None`: nobody here owns the destination; `Some(None)`: somebody
    /// does, and the datagram does not get through.
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

    /// Whether somebody in a realm, or in one behind it, owns an address.
    fn owned_inside(&self, realm: RealmId, ip: IpAddr) -> bool {
        self.owners.contains_key(&(realm, ip))
            || (realm + 1..self.realms.len())
                .any(|child| self.realms[child].parent == realm && self.owned_inside(child, ip))
    }

    /// Whether the box of `child` stands in the present realm and is or guards the destination.
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
