//! What the network between this machine and the internet allows: UDP, IPv4, IPv6, the behaviour of the
//! NAT (RFC 4787, asked for as in RFC 5780), round-trip times and MTU towards the STUN servers.
//!
//! `probe.rs` asks the STUN servers, from sockets of its own (`socket.rs`), and `filtering.rs` one that has
//! a second port. [`judge`] is a pure function of their answers. What they do not show is `unknown`.

mod filtering;
pub mod probe;
mod socket;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Serialize;

use crate::timing::micros;

/// What was found out about one address family.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// Addresses of this machine in the family that may be used outside.
    pub own: Vec<IpAddr>,
    /// UDP port of the socket that asked; `None` if none could be opened.
    pub local_port: Option<u16>,
    /// One for each STUN server that was asked.
    pub asked: Vec<Asked>,
    /// True if a datagram to the socket's mapped address came back to it; `None` if that was not tried.
    pub came_back: Option<bool>,
    /// Answers of a server with a second port; `None` if no server has one.
    pub filter_test: Option<FilterTest>,
}

/// What a STUN server that answers from other ports and addresses has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterTest {
    /// Address and port that was asked.
    pub reflector: SocketAddr,
    /// Answers from its other port, at the address that was asked.
    pub other_port: Passage,
    /// Answers from its other address; `None` if it has none.
    pub other_address: Option<Passage>,
    /// Servers that answered one and the same socket, each with the address that it saw.
    pub mapped: Vec<(SocketAddr, SocketAddr)>,
}

/// Fate of answers that come from where nothing was sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// They arrive.
    Passes,
    /// They are sent, and do not arrive.
    Dropped,
    /// They do not arrive, and nothing shows that they are sent.
    Unproven,
}

/// One STUN server that was asked, and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Address of the server.
    pub reflector: SocketAddr,
    /// Address of this machine that the kernel sends from; `None` if there is no route.
    pub source: Option<IpAddr>,
    /// Address from which the server saw the request, and the round-trip time.
    pub answer: Option<(SocketAddr, Duration)>,
    /// Size of the largest packet that was answered, in bytes.
    pub answered_packet: Option<u16>,
    /// MTU of the path as the kernel knows it after large packets were sent, in bytes.
    pub route_mtu: Option<u32>,
}

/// Findings, as they are printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Netcheck {
    /// True if a STUN server answered over UDP.
    pub udp: bool,
    /// Findings about IPv4.
    pub ipv4: FamilyFindings,
    /// Findings about IPv6.
    pub ipv6: FamilyFindings,
    /// What the running agent knows about its own UDP port; `None` if none answered.
    pub agent: Option<AgentView>,
}

/// Findings about one address family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FamilyFindings {
    /// Result for the family.
    pub state: FamilyState,
    /// Address of this machine that packets leave from.
    pub address: Option<IpAddr>,
    /// Address at which the first server that answered saw this machine.
    pub public_address: Option<SocketAddr>,
    /// Behaviour of the NAT on the way.
    pub nat: Nat,
    /// STUN servers that were asked.
    pub reflectors: Vec<ReflectorFindings>,
}

/// Result for an address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FamilyState {
    /// A server answered.
    Works,
    /// Servers were asked, and none answered.
    NoAnswer,
    /// This machine has an address, but knows no server of the family.
    NotAsked,
    /// This machine has no usable address of the family, or no route.
    Absent,
}

/// Behaviour of the NAT on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Nat {
    /// Mapping of the socket's address.
    pub mapping: NatMapping,
    /// True if the NAT keeps the source port. Null if there is no NAT, or if it is not known.
    pub preserves_port: Option<bool>,
    /// True if the NAT leads a datagram to its own outer address back inside. Null if there is no NAT, or
    /// if it is not known.
    pub hairpins: Option<bool>,
    /// Filter for datagrams from outside, of the NAT or of firewalls, with that of this machine.
    pub filtering: NatFiltering,
    /// STUN server that was asked about the filter. Null if none has a second port.
    pub filtering_reflector: Option<SocketAddr>,
}

/// Mapping of a NAT (RFC 4787 section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NatMapping {
    /// There is no NAT: the servers see the machine's own address and port.
    None,
    /// One outer address for all remote addresses.
    EndpointIndependent,
    /// Another outer address for each remote address, the same one for all its ports.
    AddressDependent,
    /// Another outer address for each remote address and port.
    AddressAndPortDependent,
    /// Another outer address for each remote address. Whether the port counts, too, is not known: no
    /// server answered at two ports.
    Dependent,
    /// One outer address for all ports of a remote address. Whether the address counts is not known: no
    /// servers with different addresses answered.
    EndpointIndependentOrAddressDependent,
    /// Fewer than two servers answered.
    Unknown,
}

/// Filter of a NAT (RFC 4787 section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NatFiltering {
    /// Any remote endpoint may send to a mapping, or there is no filter.
    EndpointIndependent,
    /// A remote address that was sent to may answer from any port.
    AddressDependent,
    /// Only a remote address and port that was sent to may answer.
    AddressAndPortDependent,
    /// The port does not count. Whether the address counts is not known: nothing shows that a server answers
    /// from a second address.
    EndpointIndependentOrAddressDependent,
    /// No server named a second port, or nothing shows that it answers from there.
    Unknown,
}

/// Findings about one STUN server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReflectorFindings {
    /// Address of the server.
    pub address: SocketAddr,
    /// Address from which the server saw the request; null if it did not answer.
    pub mapped_address: Option<SocketAddr>,
    /// Round-trip time in microseconds.
    pub rtt_us: Option<u64>,
    /// Size in bytes of the largest packet that was answered, of at most 1,500. The path carries at least
    /// that.
    pub mtu_at_least: Option<u16>,
    /// MTU of the path as the kernel knows it, in bytes: of the link, or what a router reported. The path
    /// carries at most that.
    pub mtu_at_most: Option<u32>,
}

/// What the running agent knows about its own UDP port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AgentView {
    /// UDP port of the tunnels.
    pub port: u32,
    /// Second UDP port, if it is in use.
    pub second_port: Option<u32>,
    /// Mapping: `none`, `endpoint-independent` or `dependent`; null until two servers answered.
    pub mapping: Option<String>,
    /// Candidates that it publishes, each with its kind.
    pub candidates: Vec<String>,
}

/// Judges what was observed in both families.
pub fn judge(ipv4: &Observed, ipv6: &Observed, agent: Option<AgentView>) -> Netcheck {
    let [ipv4, ipv6] = [ipv4, ipv6].map(family);
    let udp = [&ipv4, &ipv6].iter().any(|family| family.state == FamilyState::Works);
    Netcheck { udp, ipv4, ipv6, agent }
}

fn family(observed: &Observed) -> FamilyFindings {
    let first = observed.asked.iter().find_map(|asked| asked.answer);
    let source = observed.asked.iter().find_map(|asked| asked.source);
    let state = if first.is_some() {
        FamilyState::Works
    } else if source.is_some() {
        FamilyState::NoAnswer
    } else if observed.asked.is_empty() && !observed.own.is_empty() {
        FamilyState::NotAsked
    } else {
        FamilyState::Absent
    };
    FamilyFindings {
        state,
        address: source.or_else(|| observed.own.first().copied()),
        public_address: first.map(|(mapped, _)| mapped),
        nat: nat(observed),
        reflectors: observed.asked.iter().map(reflector).collect(),
    }
}

fn reflector(asked: &Asked) -> ReflectorFindings {
    ReflectorFindings {
        address: asked.reflector,
        mapped_address: asked.answer.map(|(mapped, _)| mapped),
        rtt_us: asked.answer.map(|(_, rtt)| micros(rtt)),
        mtu_at_least: asked.answered_packet,
        mtu_at_most: asked.route_mtu,
    }
}

/// Returns true if the servers see an address of this machine with the port of its socket.
pub fn is_without_nat(observed: &Observed) -> bool {
    let mut mapped = mapped(observed).peekable();
    mapped.peek().is_some()
        && mapped.all(|(_, mapped)| {
            observed.own.contains(&mapped.ip()) && observed.local_port == Some(mapped.port())
        })
}

/// Returns the servers that answered, each with the mapped address.
fn mapped(observed: &Observed) -> impl Iterator<Item = (SocketAddr, SocketAddr)> + '_ {
    observed.asked.iter().filter_map(|asked| Some((asked.reflector, asked.answer?.0)))
}

fn nat(observed: &Observed) -> Nat {
    let test = observed.filter_test.as_ref();
    let filtering = test.map_or(NatFiltering::Unknown, filtering_shown_by);
    let filtering_reflector = test.map(|test| test.reflector);
    if is_without_nat(observed) {
        let mapping = NatMapping::None;
        let (preserves_port, hairpins) = (None, None);
        return Nat { mapping, preserves_port, hairpins, filtering, filtering_reflector };
    }
    let mut answered = mapped(observed).peekable();
    let preserves_port = answered
        .peek()
        .is_some()
        .then(|| answered.all(|(_, mapped)| observed.local_port == Some(mapped.port())));
    let (mapping, hairpins) = (mapping(observed), observed.came_back);
    Nat { mapping, preserves_port, hairpins, filtering, filtering_reflector }
}

fn filtering_shown_by(test: &FilterTest) -> NatFiltering {
    use Passage::{Dropped, Passes, Unproven};
    match (test.other_address, test.other_port) {
        (Some(Passes), _) => NatFiltering::EndpointIndependent,
        (Some(Dropped), Passes) => NatFiltering::AddressDependent,
        (None | Some(Unproven), Passes) => NatFiltering::EndpointIndependentOrAddressDependent,
        // What the NAT drops from another port of an address that it knows, it drops for the port.
        (_, Dropped) => NatFiltering::AddressAndPortDependent,
        (_, Unproven) => NatFiltering::Unknown,
    }
}

/// Compares each two answers to one socket: from two ports of one address, and from two addresses.
fn mapping(observed: &Observed) -> NatMapping {
    let of_test = observed.filter_test.as_ref().map(|test| test.mapped.clone());
    let (mut ports, mut addresses) = (Comparison::default(), Comparison::default());
    for answers in [mapped(observed).collect::<Vec<_>>(), of_test.unwrap_or_default()] {
        for (place, (reflector, seen)) in answers.iter().enumerate() {
            for (other, other_seen) in answers.iter().skip(place + 1) {
                let same_host = reflector.ip() == other.ip();
                let comparison = if same_host { &mut ports } else { &mut addresses };
                comparison.add(seen == other_seen);
            }
        }
    }
    match (addresses, ports) {
        (_, Comparison { differs: true, .. }) => NatMapping::AddressAndPortDependent,
        (Comparison { differs: true, .. }, Comparison { was_made: true, .. }) => {
            NatMapping::AddressDependent
        }
        (Comparison { differs: true, .. }, _) => NatMapping::Dependent,
        (Comparison { was_made: true, .. }, _) => NatMapping::EndpointIndependent,
        (_, Comparison { was_made: true, .. }) => NatMapping::EndpointIndependentOrAddressDependent,
        _ => NatMapping::Unknown,
    }
}

/// Result of comparing answers by pairs.
#[derive(Debug, Clone, Copy, Default)]
struct Comparison {
    /// True if there was at least one pair.
    was_made: bool,
    /// True if two answers of a pair differ.
    differs: bool,
}

impl Comparison {
    fn add(&mut self, is_equal: bool) {
        self.was_made = true;
        self.differs |= !is_equal;
    }
}
