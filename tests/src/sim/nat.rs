//! A NAT, or a stateful firewall, in the terms of RFC 4787.
//!
//! The internal side sends outward and thereby makes mappings; what comes from outside passes
//! where a mapping leads and its filter allows. A firewall is a NAT that keeps addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

/// On what of the remote side a decision depends: RFC 4787 sections 4.1 (mapping) and 5
/// (filtering).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dependence {
    /// On nothing.
    Endpoint,
    /// On its address.
    Address,
    /// On its address and port.
    AddressAndPort,
}

/// Which external port a mapping gets: RFC 4787 section 4.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// The internal one while it is free, else the next free one.
    Preserving,
    /// Any.
    Random,
}

/// How a NAT behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behaviour {
    /// When a mapping is used again.
    pub mapping: Dependence,
    /// Who may send to it from outside.
    pub filtering: Dependence,
    /// Its external port.
    pub ports: Ports,
    /// How long it stays without outbound traffic: RFC 4787 section 4.3 asks for 2 minutes, and
    /// many keep 30 seconds.
    pub timeout: Duration,
    /// Whether an internal host may call another one by its external address: section 6.
    pub hairpin: bool,
}

impl Behaviour {
    /// Everybody may send to a mapping.
    pub const FULL_CONE: Self = Self {
        mapping: Dependence::Endpoint,
        filtering: Dependence::Endpoint,
        ports: Ports::Preserving,
        timeout: Duration::from_secs(30),
        hairpin: true,
    };
    /// Whose address was sent to may.
    pub const RESTRICTED: Self = Self { filtering: Dependence::Address, ..Self::FULL_CONE };
    /// Whose address and port was sent to may: the usual home router.
    pub const PORT_RESTRICTED: Self =
        Self { filtering: Dependence::AddressAndPort, hairpin: false, ..Self::FULL_CONE };
    /// A new mapping for each remote address and port; the ports go up.
    pub const SYMMETRIC: Self =
        Self { mapping: Dependence::AddressAndPort, ..Self::PORT_RESTRICTED };
    /// The same with random ports.
    pub const SYMMETRIC_RANDOM: Self = Self { ports: Ports::Random, ..Self::SYMMETRIC };
}

/// A NAT's state.
#[derive(Debug, Clone)]
pub struct Nat {
    /// How it behaves.
    pub behaviour: Behaviour,
    /// Its address outside; `None`: a firewall, which keeps addresses.
    external: Option<IpAddr>,
    mappings: BTreeMap<Key, Mapping>,
    /// Which mapping stands behind an external port.
    ports: BTreeMap<u16, Key>,
}

/// What makes a mapping: the internal address, and as much of the remote one as it depends on.
type Key = (SocketAddr, Option<IpAddr>, Option<u16>);

#[derive(Debug, Clone)]
struct Mapping {
    external: SocketAddr,
    /// When it was last sent through, and to whom when.
    used: Instant,
    remotes: BTreeMap<SocketAddr, Instant>,
}

impl Nat {
    /// A NAT with an external address.
    pub fn new(behaviour: Behaviour, external: IpAddr) -> Self {
        Self {
            behaviour,
            external: Some(external),
            mappings: BTreeMap::new(),
            ports: BTreeMap::new(),
        }
    }

    /// A firewall: the same without translation.
    pub fn firewall(behaviour: Behaviour) -> Self {
        let behaviour = Behaviour { mapping: Dependence::Endpoint, ..behaviour };
        Self { behaviour, external: None, mappings: BTreeMap::new(), ports: BTreeMap::new() }
    }

    /// Its address outside.
    pub fn external(&self) -> Option<IpAddr> {
        self.external
    }

    /// A datagram goes out: the address that it bears outside. `None` when no port is free.
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
            let mapping = Mapping { external, used: now, remotes: BTreeMap::new() };
            self.mappings.insert(key, mapping);
        }
        let mapping = self.mappings.get_mut(&key)?;
        mapping.used = now;
        mapping.remotes.insert(to, now);
        Some(mapping.external)
    }

    /// A datagram comes in: the internal address that it is for, if it may pass.
    pub fn inbound(
        &mut self,
        now: Instant,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Option<SocketAddr> {
        self.expire(now);
        let key = match self.external {
            Some(ip) if ip == to.ip() => *self.ports.get(&to.port())?,
            Some(_) => return None,
            None => (to, None, None),
        };
        let mapping = self.mappings.get(&key)?;
        let allowed = match self.behaviour.filtering {
            Dependence::Endpoint => true,
            Dependence::Address => mapping.remotes.keys().any(|remote| remote.ip() == from.ip()),
            Dependence::AddressAndPort => mapping.remotes.contains_key(&from),
        };
        allowed.then_some(key.0)
    }

    /// Forgets everything, as after a restart.
    pub fn flush(&mut self) {
        self.mappings.clear();
        self.ports.clear();
    }

    /// Gets another external address, which ends all mappings.
    pub fn readdress(&mut self, external: IpAddr) {
        self.external = Some(external);
        self.flush();
    }

    fn expire(&mut self, now: Instant) {
        let timeout = self.behaviour.timeout;
        let ports = &mut self.ports;
        self.mappings.retain(|_, mapping| {
            mapping.remotes.retain(|_, at| now < *at + timeout);
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
    fn a_mapping_ends_when_nothing_goes_out() {
        let mut nat = Box::new(Behaviour::FULL_CONE);
        let outside = nat.out("192.0.2.1:1");
        nat.now += Duration::from_secs(29);
        assert!(nat.passes("192.0.2.1:1", outside));
        nat.now += Duration::from_secs(2);
        assert!(!nat.passes("192.0.2.1:1", outside), "coming in does not prolong it");
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
