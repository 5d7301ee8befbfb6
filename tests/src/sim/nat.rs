//! A NAT or a stateful firewall, in the terms of RFC 4787.
//!
//! A datagram from the internal side creates a mapping. A datagram from outside passes if a mapping
//! and its filter allow it. A firewall is a NAT that does not translate addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

/// What part of the remote endpoint a decision depends on: RFC 4787 sections 4.1 (mapping) and 5
/// (filtering).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dependence {
    /// Endpoint-independent: the decision ignores the remote side.
    Endpoint,
    /// Address-dependent: the decision depends on the remote address.
    Address,
    /// Address- and port-dependent: the decision depends on the remote address and port.
    AddressAndPort,
}

/// How the external port of a mapping is chosen: RFC 4787 section 4.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// The internal port if it is free, otherwise the next free port.
    Preserving,
    /// A random port.
    Random,
}

/// The behaviour of a NAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behaviour {
    /// Part of the remote endpoint that a mapping depends on.
    pub mapping: Dependence,
    /// Part of the remote endpoint that the filter compares.
    pub filtering: Dependence,
    /// How external ports are chosen.
    pub ports: Ports,
    /// Lifetime of a mapping without outbound traffic. RFC 4787 section 4.3 requires 2 minutes;
    /// many NATs use 30 seconds.
    pub timeout: Duration,
    /// True if internal hosts can reach each other by their external addresses (RFC 4787 section
    /// 6).
    pub hairpin: bool,
    /// True if a datagram that no mapping expects takes its remote endpoint's place on the external
    /// port: a host that sends there later gets another port. Linux does this without an input filter.
    pub takes_unexpected: bool,
}

impl Behaviour {
    /// A NAT on which any remote endpoint may send to a mapping.
    pub const FULL_CONE: Self = Self {
        mapping: Dependence::Endpoint,
        filtering: Dependence::Endpoint,
        ports: Ports::Preserving,
        timeout: Duration::from_secs(30),
        hairpin: true,
        takes_unexpected: false,
    };
    /// A NAT on which only addresses that were sent to may answer.
    pub const RESTRICTED: Self = Self { filtering: Dependence::Address, ..Self::FULL_CONE };
    /// A NAT on which only addresses and ports that were sent to may answer: the usual home router.
    pub const PORT_RESTRICTED: Self =
        Self { filtering: Dependence::AddressAndPort, hairpin: false, ..Self::FULL_CONE };
    /// A NAT with a new mapping for each remote address and port; external ports increase.
    pub const SYMMETRIC: Self =
        Self { mapping: Dependence::AddressAndPort, ..Self::PORT_RESTRICTED };
    /// A Linux machine with one masquerade rule and no filter.
    pub const UNFILTERED: Self = Self { takes_unexpected: true, ..Self::PORT_RESTRICTED };
    /// A symmetric NAT with random external ports.
    pub const SYMMETRIC_RANDOM: Self = Self { ports: Ports::Random, ..Self::SYMMETRIC };
}

/// A NAT and its mappings.
#[derive(Debug, Clone)]
pub struct Nat {
    /// The NAT's behaviour.
    pub behaviour: Behaviour,
    /// External address; `None` for a firewall, which does not translate.
    external: Option<IpAddr>,
    mappings: BTreeMap<Key, Mapping>,
    /// The mapping of each external port.
    ports: BTreeMap<u16, Key>,
    /// Remote endpoints that took an external port, with the time of their last datagram.
    taken: BTreeMap<(SocketAddr, u16), Instant>,
}

/// The key of a mapping: the internal endpoint, and the part of the remote endpoint that it depends
/// on.
type Key = (SocketAddr, Option<IpAddr>, Option<u16>);

#[derive(Debug, Clone)]
struct Mapping {
    external: SocketAddr,
    /// True if nothing passes in either direction any more. See [`Nat::jam`].
    is_jammed: bool,
    /// When the mapping last carried an outbound datagram.
    used: Instant,
    remotes: BTreeMap<SocketAddr, Instant>,
    /// Remote endpoints that have our external port for themselves: the port that datagrams to each of
    /// them leave from instead, and the time of the last one.
    diverted: BTreeMap<SocketAddr, (u16, Instant)>,
}

impl Nat {
    /// Creates a NAT with an external address.
    pub fn new(behaviour: Behaviour, external: IpAddr) -> Self {
        Self {
            behaviour,
            external: Some(external),
            mappings: BTreeMap::new(),
            ports: BTreeMap::new(),
            taken: BTreeMap::new(),
        }
    }

    /// Creates a firewall, which filters in the same way and does not translate.
    pub fn firewall(behaviour: Behaviour) -> Self {
        let behaviour = Behaviour { mapping: Dependence::Endpoint, ..behaviour };
        Self {
            behaviour,
            external: None,
            mappings: BTreeMap::new(),
            ports: BTreeMap::new(),
            taken: BTreeMap::new(),
        }
    }

    /// Returns the external address; `None` for a firewall.
    pub fn external(&self) -> Option<IpAddr> {
        self.external
    }

    /// Handles an outbound datagram and returns its external source. Returns `None` if no port is
    /// free.
    pub fn outbound(
        &mut self,
        now: Instant,
        rng: &mut StdRng,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Option<SocketAddr> {
        self.expire(now);
        let key = match self.behaviour.mapping {
            Dependence::Endpoint => (from, None, None),
            Dependence::Address => (from, Some(to.ip()), None),
            Dependence::AddressAndPort => (from, Some(to.ip()), Some(to.port())),
        };
        if !self.mappings.contains_key(&key) {
            let external = match self.external {
                Some(ip) => SocketAddr::new(ip, self.free_port(rng, from.port())?),
                None => from,
            };
            if self.external.is_some() {
                self.ports.insert(external.port(), key);
            }
            let mapping = Mapping {
                external,
                is_jammed: false,
                used: now,
                remotes: BTreeMap::new(),
                diverted: BTreeMap::new(),
            };
            self.mappings.insert(key, mapping);
        }
        let mapping = self.mappings.get_mut(&key)?;
        mapping.used = now;
        if mapping.is_jammed {
            return None;
        }
        let external = mapping.external;
        let is_new = !mapping.remotes.contains_key(&to);
        let taken = is_new && self.taken.contains_key(&(to, external.port()));
        if let Some((port, used)) = mapping.diverted.get_mut(&to) {
            *used = now;
            return Some(SocketAddr::new(external.ip(), *port));
        }
        if taken {
            // The remote endpoint has the port: what comes from here gets another one, at which
            // nothing is expected, for as long as something comes.
            let port = self.free_port(rng, from.port())?;
            let mapping = self.mappings.get_mut(&key)?;
            mapping.diverted.insert(to, (port, now));
            return Some(SocketAddr::new(external.ip(), port));
        }
        mapping.remotes.insert(to, now);
        Some(external)
    }

    /// Handles an inbound datagram and returns the internal endpoint it is for. Returns `None` if
    /// it is filtered.
    pub fn inbound(
        &mut self,
        now: Instant,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Option<SocketAddr> {
        self.expire(now);
        let inside = self.expected(from, to);
        if inside.is_none() && self.behaviour.takes_unexpected && self.external == Some(to.ip()) {
            self.taken.insert((from, to.port()), now);
        }
        inside
    }

    /// Returns the internal endpoint that expects a datagram, if any.
    fn expected(&self, from: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
        let key = match self.external {
            Some(ip) if ip == to.ip() => *self.ports.get(&to.port())?,
            Some(_) => return None,
            None => (to, None, None),
        };
        let mapping = self.mappings.get(&key).filter(|mapping| !mapping.is_jammed)?;
        let allowed = match self.behaviour.filtering {
            Dependence::Endpoint => true,
            Dependence::Address => mapping.remotes.keys().any(|remote| remote.ip() == from.ip()),
            Dependence::AddressAndPort => mapping.remotes.contains_key(&from),
        };
        allowed.then_some(key.0)
    }

    /// Has nothing pass through the mappings that exist, for as long as they are used: so does a NAT
    /// that keeps a mapping over a change of its own address.
    pub fn jam(&mut self) {
        self.mappings.values_mut().for_each(|mapping| mapping.is_jammed = true);
    }

    /// Removes all mappings, as a restart does.
    pub fn flush(&mut self) {
        self.mappings.clear();
        self.ports.clear();
        self.taken.clear();
    }

    /// Replaces the external address, which removes all mappings.
    pub fn readdress(&mut self, external: IpAddr) {
        self.external = Some(external);
        self.flush();
    }

    fn expire(&mut self, now: Instant) {
        let timeout = self.behaviour.timeout;
        self.taken.retain(|_, at| now < *at + timeout);
        let ports = &mut self.ports;
        self.mappings.retain(|_, mapping| {
            mapping.remotes.retain(|_, at| now < *at + timeout);
            mapping.diverted.retain(|_, (_, at)| now < *at + timeout);
            let live = now < mapping.used + timeout;
            if !live {
                ports.remove(&mapping.external.port());
            }
            live
        });
    }

    fn free_port(&self, rng: &mut StdRng, wanted: u16) -> Option<u16> {
        let free = |port: &u16| !self.ports.contains_key(port);
        match self.behaviour.ports {
            Ports::Preserving => (wanted..=u16::MAX).chain(1024..wanted).find(free),
            Ports::Random => {
                std::iter::repeat_with(|| rng.random_range(1024..=u16::MAX)).take(1_000).find(free)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    struct Box {
        nat: Nat,
        rng: StdRng,
        now: Instant,
    }

    impl Box {
        fn new(behaviour: Behaviour) -> Self {
            let nat = Nat::new(behaviour, addr("203.0.113.1:1").ip());
            Self { nat, rng: StdRng::from_seed([1; 32]), now: Instant::now() }
        }

        fn out(&mut self, to: &str) -> SocketAddr {
            self.nat.outbound(self.now, &mut self.rng, addr("10.0.0.2:5000"), addr(to)).unwrap()
        }

        fn passes(&mut self, from: &str, to: SocketAddr) -> bool {
            self.nat.inbound(self.now, addr(from), to) == Some(addr("10.0.0.2:5000"))
        }
    }

    #[test]
    fn a_cone_keeps_its_mapping_and_a_symmetric_nat_does_not() {
        let mut cone = Box::new(Behaviour::PORT_RESTRICTED);
        assert_eq!(cone.out("192.0.2.1:1"), addr("203.0.113.1:5000"));
        assert_eq!(cone.out("192.0.2.2:1"), addr("203.0.113.1:5000"));
        let mut symmetric = Box::new(Behaviour::SYMMETRIC);
        assert_eq!(symmetric.out("192.0.2.1:1"), addr("203.0.113.1:5000"));
        assert_eq!(symmetric.out("192.0.2.2:1"), addr("203.0.113.1:5001"));
    }

    #[test]
    fn filters_let_in_whom_they_depend_on() {
        for (behaviour, stranger, same_host) in [
            (Behaviour::FULL_CONE, true, true),
            (Behaviour::RESTRICTED, false, true),
            (Behaviour::PORT_RESTRICTED, false, false),
        ] {
            let mut nat = Box::new(behaviour);
            let outside = nat.out("192.0.2.1:1");
            assert!(nat.passes("192.0.2.1:1", outside));
            assert_eq!(nat.passes("192.0.2.1:2", outside), same_host);
            assert_eq!(nat.passes("192.0.2.2:1", outside), stranger);
        }
    }

    #[test]
    fn without_a_filter_who_comes_first_keeps_the_port() {
        let mut nat = Box::new(Behaviour::UNFILTERED);
        let (expected, early) = ("192.0.2.1:1", "192.0.2.2:1");
        let outside = nat.out(expected);
        assert!(nat.passes(expected, outside));
        assert!(!nat.passes(early, outside));
        assert_ne!(nat.out(early), outside);
        nat.now += Duration::from_secs(29);
        assert_ne!(nat.out(early), outside);
        assert_eq!(nat.out(expected), outside);
        nat.now += Duration::from_secs(2);
        assert_ne!(nat.out(early), outside, "what is sent keeps the other port in use");
        nat.now += Duration::from_secs(31);
        assert_eq!(nat.out(early), outside);
        assert!(nat.passes(early, outside));
    }

    #[test]
    fn a_mapping_ends_when_nothing_goes_out() {
        let mut nat = Box::new(Behaviour::FULL_CONE);
        let outside = nat.out("192.0.2.1:1");
        nat.now += Duration::from_secs(29);
        assert!(nat.passes("192.0.2.1:1", outside));
        nat.now += Duration::from_secs(2);
        assert!(!nat.passes("192.0.2.1:1", outside), "inbound traffic does not extend a mapping");
    }

    #[test]
    fn a_firewall_lets_in_only_what_answers() {
        let mut wall = Nat::firewall(Behaviour::SYMMETRIC);
        let (now, mut rng) = (Instant::now(), StdRng::from_seed([1; 32]));
        let (inside, outside) = (addr("[2001:db8::2]:5000"), addr("[2001:db8:1::1]:1"));
        assert_eq!(wall.inbound(now, outside, inside), None);
        assert_eq!(wall.outbound(now, &mut rng, inside, outside), Some(inside));
        assert_eq!(wall.inbound(now, outside, inside), Some(inside));
    }
}
