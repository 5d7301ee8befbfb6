//! Asks a STUN server with a second port how the NAT filters (RFC 5780 section 4.4). What its other port
//! and address see shows more of the mapping (section 4.3).
//!
//! ```text
//! fresh socket ── "answer from your other port" ──► port asked     the NAT lets the answer in, or drops it
//! known socket ── request ──► other port, other address            opens the NAT for them
//!              ── "answer from your other port" ──► port asked     the answer arrives if it is sent at all
//! ```
//!
//! An answer at the fresh socket shows that the NAT lets it in. A missing one shows a filter only if the
//! server was heard at the port that was asked, and if the known socket gets the same answers. A server
//! whose second port is blocked, or whose budget is used up, looks the same otherwise. A NAT that maps each
//! remote port by itself lets the known socket get no answer either: what it filters stays unknown.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_core::prefixes::is_private;
use towline_netlink::{Family, NetlinkError, RouteLookup, Rtnetlink};
use towline_proto::stun::behaviour::{Change, Request, ServerAddresses};
use towline_proto::stun::{self, Message, Transaction};

use super::socket::{DATAGRAM_BYTES, open};
use super::{FilterTest, Passage};

/// Time between two rounds. In each round every request is sent once.
const ROUND: Duration = Duration::from_millis(150);
/// Number of answers that show that a missing one was not lost by chance: most of those of [`TEST`].
const PROOF: usize = 3;
/// Search for a server with a second port.
const SEARCH: Schedule = Schedule { rounds: 2, answers: 1, limit: Duration::from_millis(700) };
/// Requests of the fresh socket.
const TEST: Schedule = Schedule { rounds: 5, answers: 1, limit: Duration::from_secs(1) };
/// Requests of the known socket.
const CONTROL: Schedule = Schedule { answers: PROOF, ..TEST };

/// Asks the servers, in less than 3 s. Returns `None` if none of them has a second port. `link` is the
/// name of Towline's link.
pub(super) fn ask(family: Family, reflectors: &[SocketAddr], link: &str) -> Option<FilterTest> {
    let known = open(family).ok()?;
    let plain = |reflector: &SocketAddr| Ask::new(*reflector, Some(Change::NONE), *reflector);
    let mut search: Vec<Ask> = reflectors.iter().map(plain).collect();
    exchange(&known, &mut search, SEARCH);
    let servers: Vec<Server> =
        search.iter().filter_map(|ask| Server::new(ask.to, ask.server?, link)).collect();
    let server = servers.iter().find(|server| server.elsewhere.is_some()).or(servers.first())?;

    // The fresh socket sends to the port that is asked, and to nothing else. The request without a change
    // comes last: if the server has the budget for that, it usually had it for the others. Its budget may
    // grow between two requests of a round. That names a filter where there is none only if three of the
    // five rounds have that answer alone, no round any other, and the known socket then gets three of them.
    let fresh = open(family).ok()?;
    let mut test = server.changes();
    test.push(plain(&server.asked));
    exchange(&fresh, &mut test, TEST);

    let mut control: Vec<Ask> = server.others().map(|other| Ask::new(other, None, other)).collect();
    control.extend(server.changes());
    exchange(&known, &mut control, CONTROL);

    let passage = |from: SocketAddr| {
        let is_heard = answers(&test, server.asked, Some(Change::NONE)) >= PROOF;
        let changed = |asks: &[Ask]| {
            let of = |change| answers(asks, from, Some(change));
            of(Change::PORT) + of(Change::ADDRESS_AND_PORT)
        };
        if changed(&test) > 0 {
            Passage::Passes
        } else if is_heard && changed(&control) >= PROOF {
            Passage::Dropped
        } else {
            Passage::Unproven
        }
    };
    // Answers from elsewhere say nothing new: they repeat what the port that was asked has seen.
    let seen = |ask: &Ask| Some((ask.to, ask.mapped.filter(|_| ask.to == ask.from)?));
    Some(FilterTest {
        reflector: server.asked,
        other_port: passage(server.other_port),
        other_address: server.elsewhere.map(passage),
        mapped: search.iter().chain(&control).filter_map(seen).collect(),
    })
}

/// A server with a second port.
#[derive(Debug)]
struct Server {
    asked: SocketAddr,
    /// Its second port, at the address that was asked.
    other_port: SocketAddr,
    /// Its second port at another address; `None` if it names no address that may be asked.
    elsewhere: Option<SocketAddr>,
}

impl Server {
    /// Returns what a server says that it has; `None` if it has no second port.
    fn new(asked: SocketAddr, names: ServerAddresses, link: &str) -> Option<Self> {
        let ServerAddresses { origin, other } = names;
        if other.port() == asked.port() || other.port() == 0 {
            return None;
        }
        let has_other = other.ip() != origin.ip() && other.ip() != asked.ip();
        let may_ask = has_other && may_ask(link, asked.ip(), other.ip()).unwrap_or_default();
        Some(Self {
            asked,
            other_port: SocketAddr::new(asked.ip(), other.port()),
            elsewhere: Some(other).filter(|_| may_ask),
        })
    }

    /// Returns its other ports and addresses.
    fn others(&self) -> impl Iterator<Item = SocketAddr> {
        [Some(self.other_port), self.elsewhere].into_iter().flatten()
    }

    /// Returns requests to the port that is asked, to be answered from each of the others.
    fn changes(&self) -> Vec<Ask> {
        let port = Ask::new(self.asked, Some(Change::PORT), self.other_port);
        let elsewhere =
            self.elsewhere.map(|from| Ask::new(self.asked, Some(Change::ADDRESS_AND_PORT), from));
        elsewhere.into_iter().chain([port]).collect()
    }
}

/// Returns whether requests may go to another address that the server at `asked` names. The server chooses
/// it, so these are few, and go to no place of this machine, its networks or the mesh.
fn may_ask(link: &str, asked: IpAddr, other: IpAddr) -> Result<bool, NetlinkError> {
    let mut rtnetlink = Rtnetlink::open()?;
    let own: Vec<IpNet> = rtnetlink.addresses(None)?.iter().map(|address| address.prefix).collect();
    if !has_scope_of(asked, other, &own) {
        return Ok(false);
    }
    let tunnel = rtnetlink.link(link)?.map(|link| link.index);
    let route = rtnetlink.look_up_route(&RouteLookup::new(other))?;
    let is_inside = tunnel.is_some() && route.is_some_and(|route| route.link == tunnel);
    Ok(!is_inside)
}

/// Returns whether an address is of the same family as the one that was asked, and of the same scope or a
/// wider one. `own` are the addresses of this machine, with their networks.
fn has_scope_of(asked: IpAddr, other: IpAddr, own: &[IpNet]) -> bool {
    // A socket of IPv6 sends to an IPv4 address in IPv6 form, too.
    let [asked, other] = [asked, other].map(|ip| ip.to_canonical());
    let scopes = Scope::of(asked, own).zip(Scope::of(other, own));
    asked.is_ipv4() == other.is_ipv4() && scopes.is_some_and(|(asked, other)| asked <= other)
}

/// Where an address means one and the same host, the narrowest scope first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Scope {
    /// This machine.
    Machine,
    /// Networks of its links.
    Link,
    /// Some private network.
    Site,
    /// The whole internet.
    Internet,
}

impl Scope {
    /// Returns the scope of an address; `None` if it belongs to no host.
    fn of(ip: IpAddr, own: &[IpNet]) -> Option<Self> {
        let is_link_local = match ip {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if ip.is_unspecified() || ip.is_multicast() {
            None
        } else if ip.is_loopback() || own.iter().any(|own| own.addr() == ip) {
            Some(Self::Machine)
        } else if is_link_local || own.iter().any(|own| own.contains(&ip)) {
            Some(Self::Link)
        } else if is_private(ip) {
            Some(Self::Site)
        } else {
            Some(Self::Internet)
        }
    }
}

/// Times at which requests are sent, and when to stop.
#[derive(Debug, Clone, Copy)]
struct Schedule {
    rounds: u32,
    /// Number of answers to each request after which nothing more is sent.
    answers: usize,
    limit: Duration,
}

/// A request that is sent in each round, and its answers.
#[derive(Debug)]
struct Ask {
    to: SocketAddr,
    /// Change that it asks for; `None` for a request of RFC 8489.
    change: Option<Change>,
    /// Address and port from which an answer counts.
    from: SocketAddr,
    /// Transactions that have no answer yet.
    open: Vec<Transaction>,
    /// Number of answers.
    answers: usize,
    /// Address in the last answer.
    mapped: Option<SocketAddr>,
    /// Addresses of the server in the last answer that has them.
    server: Option<ServerAddresses>,
}

impl Ask {
    fn new(to: SocketAddr, change: Option<Change>, from: SocketAddr) -> Self {
        Self { to, change, from, open: Vec::new(), answers: 0, mapped: None, server: None }
    }

    fn send(&mut self, socket: &UdpSocket) {
        let transaction: Transaction = rand::random();
        let request = match self.change {
            Some(change) => Request { transaction, change }.encode(),
            None => stun::request(transaction).to_vec(),
        };
        // What cannot be sent is not answered.
        if socket.send_to(&request, self.to).is_ok() {
            self.open.push(transaction);
        }
    }

    /// Handles a datagram. One that is no answer to this request is ignored.
    fn receive(&mut self, datagram: &[u8], source: SocketAddr) {
        let Some(Message::Success { transaction, mapped }) = Message::decode(datagram) else {
            return;
        };
        let is_meant = (source.ip(), source.port()) == (self.from.ip(), self.from.port());
        let open = self.open.iter().position(|own| *own == transaction);
        if let Some(place) = open.filter(|_| is_meant) {
            self.open.swap_remove(place);
            self.answers += 1;
            self.mapped = Some(mapped);
            self.server = ServerAddresses::decode(datagram).or(self.server);
        }
    }
}

/// Returns the number of answers that came from an address to requests for this change.
fn answers(asks: &[Ask], from: SocketAddr, change: Option<Change>) -> usize {
    let meant = asks.iter().filter(|ask| ask.from == from && ask.change == change);
    meant.map(|ask| ask.answers).sum()
}

/// Sends the requests in rounds, and handles what the socket receives until each has as many answers as
/// the schedule says, or the time is over.
fn exchange(socket: &UdpSocket, asks: &mut [Ask], schedule: Schedule) {
    let begin = Instant::now();
    let mut sent = 0;
    let mut datagram = [0; DATAGRAM_BYTES];
    loop {
        let elapsed = begin.elapsed();
        let is_done = asks.iter().all(|ask| ask.answers >= schedule.answers);
        if elapsed >= schedule.limit || is_done {
            return;
        }
        if sent < schedule.rounds && elapsed >= ROUND * sent {
            asks.iter_mut().for_each(|ask| ask.send(socket));
            sent += 1;
            continue;
        }
        let next = if sent < schedule.rounds { ROUND * sent } else { schedule.limit };
        let wait = next.saturating_sub(elapsed).max(Duration::from_millis(1));
        if socket.set_read_timeout(Some(wait)).is_err() {
            return;
        }
        // The time is over, or an ICMP error of an earlier datagram is reported.
        let Ok((len, source)) = socket.recv_from(&mut datagram) else { continue };
        if let Some(datagram) = datagram.get(..len) {
            asks.iter_mut().for_each(|ask| ask.receive(datagram, source));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_request_goes_to_a_narrower_scope_than_that_of_the_server_that_names_the_address() {
        let own = ["192.168.1.7/24", "203.0.113.7/28", "2001:db8:1::7/64", "fe80::7/64"];
        let own = own.map(|own| own.parse::<IpNet>().unwrap());
        let (public, v6) = ("198.51.100.1", "2001:db8:2::1");
        let cases: [(&str, &[&str], bool); 12] = [
            (public, &["198.51.100.2", "203.0.113.77"], true),
            (public, &["127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0"], false),
            (public, &["192.168.1.7", "203.0.113.7", "192.168.1.1", "203.0.113.1"], false),
            (public, &["10.0.0.1", "172.16.0.1", "192.168.2.1", "100.64.0.1"], false),
            (v6, &["2001:db8:2::2"], true),
            (v6, &["::1", "fe80::1", "ff02::1", "::", "fd00::1"], false),
            (v6, &["2001:db8:1::7", "2001:db8:1::1", "::ffff:127.0.0.1", public], false),
            // It is in a private network itself, and may have another address there.
            ("10.0.0.1", &["10.0.0.2", "172.16.0.1", public], true),
            ("10.0.0.1", &["127.0.0.1", "192.168.1.7", "192.168.1.1", "169.254.0.1"], false),
            ("203.0.113.1", &["203.0.113.2", "192.168.1.1", "10.0.0.1", public], true),
            ("203.0.113.1", &["127.0.0.1", "203.0.113.7"], false),
            ("127.0.0.2", &["127.0.0.3", public], true),
        ];
        for (asked, others, expected) in cases {
            for other in others {
                let [asked, other] = [asked, *other].map(|ip| ip.parse::<IpAddr>().unwrap());
                assert_eq!(has_scope_of(asked, other, &own), expected, "{other} of {asked}");
            }
        }
    }
}
