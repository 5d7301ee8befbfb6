//! Tests of the judgement.

use super::*;

const PORT: u16 = 40_000;

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Returns a server that saw the socket at an address, or that did not answer.
fn asked(reflector: &str, mapped: Option<&str>) -> Asked {
    Asked {
        reflector: address(reflector),
        source: Some("192.168.1.7".parse().unwrap()),
        answer: mapped.map(|mapped| (address(mapped), Duration::from_micros(1_500))),
        answered_packet: mapped.map(|_| 1_420),
        route_mtu: Some(1_500),
    }
}

/// A server, and the address that it saw, if it answered.
type Answer<'a> = (&'a str, Option<&'a str>);

fn observed(answers: &[Answer<'_>]) -> Observed {
    Observed {
        own: vec!["192.168.1.7".parse().unwrap()],
        local_port: Some(PORT),
        asked: answers.iter().map(|(reflector, mapped)| asked(reflector, *mapped)).collect(),
        came_back: None,
        filter_test: None,
    }
}

/// Returns what a server showed whose answers from its other port and address had these fates.
fn filter_test(other_address: Option<Passage>, other_port: Passage) -> FilterTest {
    let reflector = address("203.0.113.1:7443");
    FilterTest { reflector, other_port, other_address, mapped: Vec::new() }
}

fn mapping_of(answers: &[Answer<'_>]) -> NatMapping {
    family(&observed(answers)).nat.mapping
}

#[test]
fn the_mapping_follows_from_two_addresses_and_two_ports() {
    let (a, a2, b) = ("203.0.113.1:7443", "203.0.113.1:7444", "203.0.113.2:7443");
    let [one, two, three] =
        ["198.51.100.7:40000", "198.51.100.7:40001", "198.51.100.7:40002"].map(Some);
    let cases: [(&[Answer<'_>], NatMapping); 10] = [
        (&[(a, one), (b, one)], NatMapping::EndpointIndependent),
        (&[(a, one), (a2, one), (b, one)], NatMapping::EndpointIndependent),
        (&[(a, one), (b, two)], NatMapping::Dependent),
        (&[(a, one), (a2, one), (b, two)], NatMapping::AddressDependent),
        (&[(a, one), (a2, two), (b, three)], NatMapping::AddressAndPortDependent),
        // The address was not varied.
        (&[(a, one), (a2, two)], NatMapping::AddressAndPortDependent),
        (&[(a, one), (a2, one)], NatMapping::EndpointIndependentOrAddressDependent),
        (&[(a, one), (b, None)], NatMapping::Unknown),
        (&[(a, None), (b, None)], NatMapping::Unknown),
        (&[], NatMapping::Unknown),
    ];
    for (answers, expected) in cases {
        assert_eq!(mapping_of(answers), expected, "{answers:?}");
    }
}

#[test]
fn a_second_port_shows_more_of_the_mapping() {
    let (a, a2, b2) = ("203.0.113.1:7443", "203.0.113.1:7444", "203.0.113.2:7444");
    let [one, two, three] = ["198.51.100.7:5", "198.51.100.7:6", "198.51.100.7:7"];
    let cases: [(&[(&str, &str)], NatMapping); 4] = [
        (&[(a, one), (a2, one)], NatMapping::EndpointIndependentOrAddressDependent),
        (&[(a, one), (a2, one), (b2, one)], NatMapping::EndpointIndependent),
        (&[(a, one), (a2, one), (b2, two)], NatMapping::AddressDependent),
        (&[(a, one), (a2, two), (b2, three)], NatMapping::AddressAndPortDependent),
    ];
    for (seen, expected) in cases {
        let mut test = filter_test(None, Passage::Unproven);
        test.mapped = seen.iter().map(|(server, seen)| (address(server), address(seen))).collect();
        // Another socket has another mapping: the two are not compared.
        let alone = observed(&[(a, Some("198.51.100.7:40000"))]);
        let observed = Observed { filter_test: Some(test), ..alone };
        assert_eq!(family(&observed).nat.mapping, expected, "{seen:?}");
    }
}

#[test]
fn a_filter_is_named_only_if_the_answers_show_it() {
    use Passage::{Dropped, Passes, Unproven};
    for (other_address, other_port, expected) in [
        (Some(Passes), Passes, NatFiltering::EndpointIndependent),
        (Some(Passes), Unproven, NatFiltering::EndpointIndependent),
        (Some(Dropped), Passes, NatFiltering::AddressDependent),
        (Some(Dropped), Dropped, NatFiltering::AddressAndPortDependent),
        (Some(Dropped), Unproven, NatFiltering::Unknown),
        (Some(Unproven), Passes, NatFiltering::EndpointIndependentOrAddressDependent),
        (Some(Unproven), Dropped, NatFiltering::AddressAndPortDependent),
        (Some(Unproven), Unproven, NatFiltering::Unknown),
        // The server has one address.
        (None, Passes, NatFiltering::EndpointIndependentOrAddressDependent),
        (None, Dropped, NatFiltering::AddressAndPortDependent),
        (None, Unproven, NatFiltering::Unknown),
    ] {
        let test = filter_test(other_address, other_port);
        let reflector = Some(test.reflector);
        let observed = Observed { filter_test: Some(test), ..observed(&[]) };
        let nat = family(&observed).nat;
        assert_eq!(nat.filtering, expected, "{other_address:?} {other_port:?}");
        assert_eq!(nat.filtering_reflector, reflector);
    }
    let nat = family(&observed(&[])).nat;
    assert_eq!((nat.filtering, nat.filtering_reflector), (NatFiltering::Unknown, None));
}

#[test]
fn without_a_nat_the_servers_see_the_own_address() {
    let own = Some("192.168.1.7:40000");
    let seen = observed(&[("203.0.113.1:7443", own)]);
    assert!(is_without_nat(&seen));
    let nat = family(&seen).nat;
    assert_eq!((nat.mapping, nat.preserves_port, nat.hairpins), (NatMapping::None, None, None));
    // A firewall filters all the same.
    let test = filter_test(None, Passage::Dropped);
    let filtered = Observed { filter_test: Some(test), ..seen };
    assert_eq!(family(&filtered).nat.filtering, NatFiltering::AddressAndPortDependent);
    // The own address with another port is a translation as well.
    let other_port = observed(&[("203.0.113.1:7443", Some("192.168.1.7:40001"))]);
    assert!(!is_without_nat(&other_port));
    assert!(!is_without_nat(&observed(&[("203.0.113.1:7443", None)])));
}

#[test]
fn port_and_hairpin_are_those_of_the_nat() {
    let (a, b) = ("203.0.113.1:7443", "203.0.113.2:7443");
    let same = Some("198.51.100.7:40000");
    let kept = Observed { came_back: Some(true), ..observed(&[(a, same), (b, same)]) };
    let nat = family(&kept).nat;
    assert_eq!((nat.preserves_port, nat.hairpins), (Some(true), Some(true)));
    let moved = observed(&[(a, same), (b, Some("198.51.100.7:5"))]);
    assert_eq!(family(&moved).nat.preserves_port, Some(false));
    assert_eq!(family(&observed(&[(a, None)])).nat.preserves_port, None);
}

#[test]
fn the_state_of_a_family_is_told_apart() {
    let a = "203.0.113.1:7443";
    let works = observed(&[(a, None), ("203.0.113.2:7443", Some("198.51.100.7:40000"))]);
    let no_answer = observed(&[(a, None)]);
    let not_asked = observed(&[]);
    let absent = Observed::default();
    let mut no_route = observed(&[(a, None)]);
    no_route.asked[0].source = None;
    for (observed, expected) in [
        (&works, FamilyState::Works),
        (&no_answer, FamilyState::NoAnswer),
        (&not_asked, FamilyState::NotAsked),
        (&absent, FamilyState::Absent),
        (&no_route, FamilyState::Absent),
    ] {
        assert_eq!(family(observed).state, expected, "{observed:?}");
    }
    assert!(judge(&works, &absent, None).udp);
    assert!(judge(&absent, &works, None).udp);
    assert!(!judge(&no_answer, &not_asked, None).udp);
    let found = family(&works);
    assert_eq!(found.public_address, Some(address("198.51.100.7:40000")));
    assert_eq!(found.reflectors[1].rtt_us, Some(1_500));
    assert_eq!(found.reflectors[1].mtu_at_least, Some(1_420));
}
