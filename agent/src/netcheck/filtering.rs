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
        // The server chooses where requests go, so these are few, and go to no place of this machine,
        // its links or the mesh.
        let has_other = other.ip() != origin.ip() && other.ip() != asked.ip();
        let may_ask = other.is_ipv4() == asked.is_ipv4()
            && (!is_local(other) || is_local(asked))
            && is_inside(link, other.ip()).is_ok_and(|is_inside| !is_inside);
        Some(Self {
            asked,
            other_port: SocketAddr::new(asked.ip(), other.port()),
            elsewhere: Some(other).filter(|_| has_other && may_ask),
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

/// Returns whether an address belongs to this machine, to one of its links or to no host.
fn is_local(address: SocketAddr) -> bool {
    let ip = address.ip();
    let is_of_link = match address {
        SocketAddr::V4(v4) => v4.ip().is_link_local(),
        SocketAddr::V6(v6) => v6.ip().is_unicast_link_local(),
    };
    ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_of_link
}

/// Returns whether the kernel would reach an address through the tunnel.
fn is_inside(link: &str, to: IpAddr) -> Result<bool, NetlinkError> {
    let mut rtnetlink = Rtnetlink::open()?;
    let tunnel = rtnetlink.link(link)?.map(|link| link.index);
    let route = rtnetlink.look_up_route(&RouteLookup::new(to))?;
    Ok(tunnel.is_some() && route.is_some_and(|route| route.link == tunnel))
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
