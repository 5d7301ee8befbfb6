//! Tests of `towline netcheck` with a STUN server of two ports and addresses, behind simulated NATs.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use towline_agent::netcheck::{self, NatFiltering, NatMapping, judge, probe};
use towline_proto::stun;
use towline_proto::stun::behaviour::{Request, ServerAddresses};
use towline_tests::sim::nat::{Behaviour, Nat};

/// What the STUN server has, beside the address and port that is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    /// It has another port and another address.
    TwoAddresses,
    /// It has another port of the same address.
    OneAddress,
    /// It names both, and a firewall drops what it sends from there without being asked there.
    Blocked,
}

/// Place of a socket of the server: the indices of its address and its port.
type Place = (usize, usize);

/// A STUN server on the loopback, and the NAT that its clients are behind.
struct World {
    server: Server,
    /// Sockets of each address, by port.
    sockets: [[UdpSocket; 2]; 2],
    nat: Nat,
    rng: StdRng,
}

impl World {
    /// Starts the server on addresses that belong to this number. Returns the one to ask.
    fn start(number: u8, server: Server, behaviour: Behaviour) -> SocketAddr {
        let [one, other] = [2, 3].map(|host| Ipv4Addr::new(127, 0, number, host));
        let first = [0, 0].map(|port| UdpSocket::bind((one, port)).unwrap());
        let ports = first.each_ref().map(|socket| socket.local_addr().unwrap().port());
        let second = ports.map(|port| UdpSocket::bind((other, port)).unwrap());
        first[0].set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        for socket in [&first[1], &second[0], &second[1]] {
            socket.set_nonblocking(true).unwrap();
        }
        let nat = Nat::new(behaviour, IpAddr::from([127, 0, number, 9]));
        let rng = StdRng::from_seed([number; 32]);
        let world = Self { server, sockets: [first, second], nat, rng };
        let asked = world.at((0, 0));
        std::thread::spawn(move || world.serve());
        asked
    }

    fn at(&self, (address, port): Place) -> SocketAddr {
        self.sockets[address][port].local_addr().unwrap()
    }

    /// Answers what the sockets receive. What a client sent to the others before it asked the first one passes the
    /// NAT before that, too, as on a real way.
    fn serve(mut self) {
        let (mut asked, mut buffer) = ([0; 2048], [0; 2048]);
        loop {
            let received = self.sockets[0][0].recv_from(&mut asked);
            for place in [(0, 1), (1, 0), (1, 1)] {
                while let Ok((len, inside)) = self.sockets[place.0][place.1].recv_from(&mut buffer)
                {
                    self.pass(place, &buffer[..len], inside);
                }
            }
            if let Ok((len, inside)) = received {
                self.pass((0, 0), &asked[..len], inside);
            }
        }
    }

    /// Answers a datagram to one socket. Everything passes the NAT in both directions.
    fn pass(&mut self, place: Place, datagram: &[u8], inside: SocketAddr) {
        let (now, at) = (Instant::now(), self.at(place));
        let Some(outside) = self.nat.outbound(now, &mut self.rng, inside, at) else { return };
        let Some((answer, origin)) = self.answer(datagram, outside, place) else { return };
        let from = self.at(origin);
        if let Some(inside) = self.nat.inbound(now, from, outside) {
            self.sockets[origin.0][origin.1].send_to(&answer, inside).unwrap();
        }
    }

    /// Returns the answer, and the place that it leaves from.
    fn answer(
        &self,
        datagram: &[u8],
        from: SocketAddr,
        (address, port): Place,
    ) -> Option<(Vec<u8>, Place)> {
        let Some(request) = Request::decode(datagram) else {
            let (answer, len) = stun::answer(datagram, from)?;
            return Some((answer[..len].to_vec(), (address, port)));
        };
        let other_address = if self.server == Server::OneAddress { address } else { 1 - address };
        let change = request.change;
        let origin = (
            if change.address { other_address } else { address },
            if change.port { 1 - port } else { port },
        );
        if self.server == Server::Blocked && origin != (address, port) {
            return None;
        }
        let server =
            ServerAddresses { origin: self.at(origin), other: self.at((other_address, 1 - port)) };
        Some((request.answer(from, server), origin))
    }
}

/// Returns the findings about a NAT.
fn found(number: u8, server: Server, behaviour: Behaviour) -> netcheck::Nat {
    let reflector = World::start(number, server, behaviour);
    let (ipv4, ipv6) = probe::observe(&[reflector], "towline0");
    let nat = judge(&ipv4, &ipv6, None).ipv4.nat;
    assert_eq!(nat.filtering_reflector, Some(reflector));
    nat
}

#[test]
fn mapping_and_filter_of_each_kind_of_nat_are_named_as_far_as_the_server_shows_them() {
    use Server::{Blocked, OneAddress, TwoAddresses};
    let cases = [
        (
            (TwoAddresses, Behaviour::FULL_CONE),
            (NatMapping::EndpointIndependent, NatFiltering::EndpointIndependent),
        ),
        (
            (TwoAddresses, Behaviour::RESTRICTED),
            (NatMapping::EndpointIndependent, NatFiltering::AddressDependent),
        ),
        (
            (TwoAddresses, Behaviour::PORT_RESTRICTED),
            (NatMapping::EndpointIndependent, NatFiltering::AddressAndPortDependent),
        ),
        (
            (TwoAddresses, Behaviour::UNFILTERED),
            (NatMapping::EndpointIndependent, NatFiltering::AddressAndPortDependent),
        ),
        // Nothing comes back to the mapping of another port, so nothing shows that it was sent.
        (
            (TwoAddresses, Behaviour::SYMMETRIC),
            (NatMapping::AddressAndPortDependent, NatFiltering::Unknown),
        ),
        (
            (OneAddress, Behaviour::FULL_CONE),
            (
                NatMapping::EndpointIndependentOrAddressDependent,
                NatFiltering::EndpointIndependentOrAddressDependent,
            ),
        ),
        (
            (OneAddress, Behaviour::PORT_RESTRICTED),
            (
                NatMapping::EndpointIndependentOrAddressDependent,
                NatFiltering::AddressAndPortDependent,
            ),
        ),
        ((Blocked, Behaviour::FULL_CONE), (NatMapping::EndpointIndependent, NatFiltering::Unknown)),
    ];
    std::thread::scope(|scope| {
        for (number, ((server, behaviour), expected)) in (1..).zip(cases) {
            scope.spawn(move || {
                let nat = found(number, server, behaviour);
                assert_eq!((nat.mapping, nat.filtering), expected, "{server:?} {behaviour:?}");
            });
        }
    });
}
