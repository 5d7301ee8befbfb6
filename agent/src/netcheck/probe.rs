//! Asks the STUN servers over UDP, from sockets of its own with random ports.
//!
//! The sockets are not marked as the agent's are: the mark alone leads no packet past Towline's routes,
//! since the rules ask for the port of the tunnels as well, and it would be counted as misuse. Servers
//! that the kernel would reach through the tunnel are left out: they would see an address of the mesh.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use towline_netlink::{Address, Family, NetlinkError, RouteLookup, Rtnetlink};
use towline_proto::stun::{self, Message, Transaction};

use super::socket::{DATAGRAM_BYTES, open, unspecified};
use super::{Asked, Observed, filtering, is_without_nat};

/// Longest time for the plain requests.
const ANSWERS_LIMIT: Duration = Duration::from_secs(2);
/// Times at which a plain request is sent, from the beginning.
const ANSWERS_SENT: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(250),
    Duration::from_millis(750),
    Duration::from_millis(1_400),
];
/// Longest time for large packets and for the hairpin.
const DETAILS_LIMIT: Duration = Duration::from_millis(1_500);
/// Times at which those are sent.
const DETAILS_SENT: [Duration; 3] =
    [Duration::ZERO, Duration::from_millis(400), Duration::from_millis(900)];
/// Largest number of servers of a family that are asked.
const REFLECTORS: usize = 8;
/// Largest number of servers of a family that get large packets. Each limits the rate of a source.
const LARGE: usize = 2;
/// Sizes of the large packets, in bytes: of Ethernet, PPPoE, and usual tunnels.
const PACKETS: [u16; 13] =
    [1500, 1492, 1480, 1472, 1460, 1440, 1420, 1400, 1380, 1360, 1340, 1308, 1280];

/// Observes IPv4 and IPv6 at the same time, in less than 5 s. `link` is the name of Towline's link.
pub fn observe(reflectors: &[SocketAddr], link: &str) -> (Observed, Observed) {
    std::thread::scope(|scope| {
        let ipv6 = scope.spawn(|| observe_family(Family::V6, reflectors, link));
        let ipv4 = observe_family(Family::V4, reflectors, link);
        (ipv4, ipv6.join().unwrap_or_default())
    })
}

fn observe_family(family: Family, reflectors: &[SocketAddr], link: &str) -> Observed {
    // What cannot be read or opened is left out: the findings then say that nothing was asked.
    let (own, asked) = plan(family, reflectors, link).unwrap_or_default();
    let mut observed = Observed { own, asked, ..Observed::default() };
    if let Ok(socket) = open(family) {
        observed.local_port = socket.local_addr().ok().map(|address| address.port());
        ask(&socket, &mut observed);
        let answered: Vec<SocketAddr> =
            super::mapped(&observed).map(|(reflector, _)| reflector).collect();
        observed.filter_test = std::thread::scope(|scope| {
            let asking = scope.spawn(|| filtering::ask(family, &answered, link));
            look_closer(family, &socket, &mut observed);
            asking.join().ok().flatten()
        });
    }
    for asked in &mut observed.asked {
        asked.route_mtu = asked.source.and_then(|_| route_mtu(family, asked.reflector).ok());
    }
    observed
}

/// Returns the addresses of this host and the servers to ask, with the source address to each.
fn plan(
    family: Family,
    reflectors: &[SocketAddr],
    link: &str,
) -> Result<(Vec<IpAddr>, Vec<Asked>), NetlinkError> {
    let mut rtnetlink = Rtnetlink::open()?;
    let tunnel = rtnetlink.link(link)?.map(|link| link.index);
    let is_outside = |address: &Address| {
        let ip = address.prefix.addr();
        let is_global = address.scope == libc::RT_SCOPE_UNIVERSE && !ip.is_loopback();
        Family::of(ip) == family && is_global && Some(address.index) != tunnel
    };
    let addresses = rtnetlink.addresses(None)?.into_iter().filter(is_outside);
    let own = addresses.map(|address| address.prefix.addr()).collect();
    let mut asked: Vec<Asked> = Vec::new();
    for reflector in reflectors.iter().filter(|reflector| Family::of(reflector.ip()) == family) {
        let route = rtnetlink.look_up_route(&RouteLookup::new(reflector.ip()))?;
        let is_inside =
            tunnel.is_some() && route.as_ref().is_some_and(|route| route.link == tunnel);
        let is_known = asked.iter().any(|known| known.reflector == *reflector);
        if is_inside || is_known || asked.len() == REFLECTORS {
            continue;
        }
        asked.push(Asked {
            reflector: *reflector,
            source: route.and_then(|route| route.source),
            answer: None,
            answered_packet: None,
            route_mtu: None,
        });
    }
    Ok((own, asked))
}

/// Sends the plain requests, and stores the answers.
fn ask(socket: &UdpSocket, observed: &mut Observed) {
    let with_route = observed.asked.iter().filter(|asked| asked.source.is_some());
    let mut questions: Vec<Question<'_>> =
        with_route.map(|asked| Question::new(socket, asked.reflector)).collect();
    exchange(socket, &mut questions, &ANSWERS_SENT, ANSWERS_LIMIT);
    for question in questions {
        let asked = observed.asked.iter_mut().find(|asked| asked.reflector == question.to);
        if let Some(asked) = asked {
            asked.answer = question.answer;
        }
    }
}

/// Sends large packets to the servers that answered, and a datagram to the own mapped address.
fn look_closer(family: Family, socket: &UdpSocket, observed: &mut Observed) {
    let mut questions: Vec<Question<'_>> = Vec::new();
    let other = open(family);
    let answered =
        observed.asked.iter().filter_map(|asked| Some((asked.reflector, asked.answer?.0)));
    let answered: Vec<(SocketAddr, SocketAddr)> = answered.collect();
    for (reflector, _) in answered.iter().take(LARGE) {
        let large = |packet| Question { packet, ..Question::new(socket, *reflector) };
        questions.extend(PACKETS.map(large));
    }
    let mapped = answered.first().filter(|_| !is_without_nat(observed));
    let hairpin = mapped.zip(other.as_ref().ok()).map(|((_, mapped), other)| {
        let question = Question::new(other, *mapped);
        Question { expects: Expected::Itself, ..question }
    });
    let tries_hairpin = hairpin.is_some();
    questions.extend(hairpin);
    exchange(socket, &mut questions, &DETAILS_SENT, DETAILS_LIMIT);
    let is_answered = |question: &&Question<'_>| question.answer.is_some();
    for asked in &mut observed.asked {
        let large = questions.iter().filter(is_answered).filter(|question| {
            question.to == asked.reflector && question.expects == Expected::Answer
        });
        let plain = asked.answer.map(|_| packet_bytes(family, stun::REQUEST_BYTES));
        asked.answered_packet = large.map(|question| question.packet).chain(plain).max();
    }
    let came_back =
        questions.iter().filter(is_answered).any(|question| question.expects == Expected::Itself);
    observed.came_back = tries_hairpin.then_some(came_back);
}

/// What a question waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// The server's answer.
    Answer,
    /// The request itself, which a NAT led back.
    Itself,
}

/// A request, and what came of it.
#[derive(Debug)]
struct Question<'a> {
    /// Socket that sends it.
    from: &'a UdpSocket,
    to: SocketAddr,
    /// Size of the packet in bytes; 0 for a request that is not padded.
    packet: u16,
    expects: Expected,
    /// Transaction id and time of each transmission.
    attempts: Vec<(Transaction, Instant)>,
    /// True if the kernel refused to send it: the packet is larger than it knows the path's MTU to be.
    is_refused: bool,
    /// Address in the answer, and the round-trip time.
    answer: Option<(SocketAddr, Duration)>,
}

impl<'a> Question<'a> {
    fn new(from: &'a UdpSocket, to: SocketAddr) -> Self {
        Self {
            from,
            to,
            packet: 0,
            expects: Expected::Answer,
            attempts: Vec::new(),
            is_refused: false,
            answer: None,
        }
    }

    fn is_done(&self) -> bool {
        self.answer.is_some() || self.is_refused
    }

    fn send(&mut self) {
        let transaction: Transaction = rand::random();
        let headers = header_bytes(Family::of(self.to.ip()));
        let bytes = usize::from(self.packet).saturating_sub(headers);
        // Sizes below that of a plain request are raised to it.
        let request = stun::padded_request(transaction, bytes);
        self.attempts.push((transaction, Instant::now()));
        let sent = self.from.send_to(&request, self.to);
        self.is_refused = sent.is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE));
    }

    /// Handles a datagram. One that belongs to another question is ignored.
    fn receive(&mut self, message: Message, source: SocketAddr, now: Instant) {
        let (transaction, seen) = match (message, self.expects) {
            (Message::Success { transaction, mapped }, Expected::Answer)
                if (source.ip(), source.port()) == (self.to.ip(), self.to.port()) =>
            {
                (transaction, mapped)
            }
            (Message::Request { transaction }, Expected::Itself) => (transaction, source),
            _ => return,
        };
        let attempt = self.attempts.iter().find(|(own, _)| *own == transaction);
        if let Some((_, sent)) = attempt.filter(|_| self.answer.is_none()) {
            self.answer = Some((seen, now.saturating_duration_since(*sent)));
        }
    }
}

/// Sends the questions at each of the times, but those that are done, and handles what `socket`
/// receives until all are done or the time is over.
fn exchange(
    socket: &UdpSocket,
    questions: &mut [Question<'_>],
    times: &[Duration],
    limit: Duration,
) {
    let begin = Instant::now();
    let mut times = times.iter().peekable();
    let mut datagram = [0; DATAGRAM_BYTES];
    loop {
        let elapsed = begin.elapsed();
        if elapsed >= limit || questions.iter().all(Question::is_done) {
            return;
        }
        if times.next_if(|at| elapsed >= **at).is_some() {
            questions.iter_mut().filter(|question| !question.is_done()).for_each(Question::send);
            continue;
        }
        let next = times.peek().map_or(limit, |at| **at).min(limit);
        let wait = next.saturating_sub(elapsed).max(Duration::from_millis(1));
        if socket.set_read_timeout(Some(wait)).is_err() {
            return;
        }
        // The time is over, or an ICMP error of an earlier datagram is reported.
        let Ok((len, source)) = socket.recv_from(&mut datagram) else { continue };
        let now = Instant::now();
        if let Some(message) = datagram.get(..len).and_then(Message::decode) {
            for question in questions.iter_mut() {
                question.receive(message, source, now);
            }
        }
    }
}

/// Asks the kernel for the MTU of the path to an address: that of the link, or what a router reported.
fn route_mtu(family: Family, to: SocketAddr) -> io::Result<u32> {
    let socket = UdpSocket::bind(SocketAddr::new(unspecified(family), 0))?;
    socket.connect(to)?;
    let (level, name) = match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_MTU),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option is an `int`, for which `value` has room, and `length` is its size. Both are valid
    // during the call.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length)
    };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(value).map_err(io::Error::other)
}

/// Returns the number of bytes of the IP and UDP headers.
fn header_bytes(family: Family) -> usize {
    match family {
        Family::V4 => 20 + 8,
        Family::V6 => 40 + 8,
    }
}

/// Returns the size of the packet with a payload of `bytes`.
fn packet_bytes(family: Family, bytes: usize) -> u16 {
    u16::try_from(bytes + header_bytes(family)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use towline_netns::namespace_test;

    use super::*;

    /// Answers requests until the socket's time limit passes without one.
    fn serve(socket: &UdpSocket) {
        let mut datagram = [0; DATAGRAM_BYTES];
        while let Ok((len, from)) = socket.recv_from(&mut datagram) {
            if let Some((answer, len)) = stun::answer(&datagram[..len], from) {
                socket.send_to(&answer[..len], from).unwrap();
            }
        }
    }

    fn server() -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(ANSWERS_LIMIT + DETAILS_LIMIT)).unwrap();
        socket
    }

    #[test]
    fn answers_are_matched_to_their_questions_and_sizes() {
        let (server, silent) = (server(), server());
        let (address, other) = (server.local_addr().unwrap(), silent.local_addr().unwrap());
        std::thread::spawn(move || serve(&server));
        let asked = |reflector| Asked {
            reflector,
            source: Some(Ipv4Addr::LOCALHOST.into()),
            answer: None,
            answered_packet: None,
            route_mtu: None,
        };
        let mut observed = Observed {
            own: vec![Ipv4Addr::LOCALHOST.into()],
            asked: vec![asked(address), asked(other)],
            ..Observed::default()
        };
        let socket = open(Family::V4).unwrap();
        let own = socket.local_addr().unwrap().port();
        observed.local_port = Some(own);
        ask(&socket, &mut observed);
        let (mapped, _) = observed.asked[0].answer.unwrap();
        assert_eq!(mapped, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), own));
        assert_eq!(observed.asked[1].answer, None);
        assert!(is_without_nat(&observed));
        look_closer(Family::V4, &socket, &mut observed);
        assert_eq!(observed.asked[0].answered_packet, Some(1_500));
        assert_eq!(observed.asked[1].answered_packet, None);
        assert_eq!(observed.came_back, None);
        assert!(route_mtu(Family::V4, address).unwrap() >= 1_500);
    }

    #[test]
    fn a_datagram_to_the_mapped_address_comes_back() {
        // The mapped address is none of `own`, as behind a NAT.
        let (socket, silent) = (open(Family::V4).unwrap(), server());
        let port = socket.local_addr().unwrap().port();
        let mapped = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let mut observed = Observed {
            local_port: Some(port),
            asked: vec![Asked {
                reflector: silent.local_addr().unwrap(),
                source: Some(Ipv4Addr::LOCALHOST.into()),
                answer: Some((mapped, Duration::ZERO)),
                answered_packet: None,
                route_mtu: None,
            }],
            ..Observed::default()
        };
        look_closer(Family::V4, &socket, &mut observed);
        assert_eq!(observed.came_back, Some(true));
    }

    namespace_test! {
        fn a_host_without_addresses_asks_nobody() {
            let (ipv4, ipv6) = observe(&["192.0.2.1:7443".parse().unwrap()], "towline0");
            assert!(ipv4.own.is_empty() && ipv6.own.is_empty());
            assert_eq!(ipv4.asked[0].source, None);
            assert!(ipv6.asked.is_empty());
        }
    }
}
