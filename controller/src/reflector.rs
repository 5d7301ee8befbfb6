//! STUN server (RFC 8489 binding) on UDP, on the port number that gRPC uses on TCP. It tells a
//! client its public address.
//!
//! The server only answers requests that are at least as long as the response, and limits the rate
//! of each source, so it cannot be used to flood other hosts. It keeps no state except the rate
//! limiters. A response leaves from the address that the request was sent to, also on a machine with
//! several addresses: a NAT drops what comes from another one.
//!
//! Where the configuration names a second port, requests of RFC 5780 are answered, too: they may ask for
//! a response from the other port or address, which shows how a NAT filters. [`behaviour`] says which
//! requests these are. They have a smaller budget for each source, and one for all of them together.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd as _;
use std::time::Instant;

use nix::libc;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use towline_proto::rate::{Rate, TokenBucket};
use towline_proto::source_limiter::SourceLimiter;
use towline_proto::stun::{self, behaviour};

use crate::clock;
use crate::config::StunConfig;

/// Requests per second and source, and their burst. Many nodes behind one NAT share a source.
const RATE: Rate = Rate::per_second(32, 128);
/// Requests of RFC 5780 per second and source, and their burst: `towline netcheck` sends 27 at most.
const BEHAVIOUR_RATE: Rate = Rate::per_second(8, 64);
/// Requests of RFC 5780 per second of all sources together, and their burst. Sources may be forged.
const BEHAVIOUR_RATE_OF_ALL: Rate = Rate::per_second(256, 512);
/// Longest datagram that is read, in bytes. A request is far shorter.
const DATAGRAM_BYTES: usize = 1500;
/// Number of refused requests between two log messages.
const REFUSED_PER_LINE: u64 = 10_000;

/// Sockets of the STUN server.
pub(crate) struct Reflector {
    socket: std::net::UdpSocket,
    /// Socket of the second port, if there is one.
    second: Option<std::net::UdpSocket>,
    /// Addresses of this machine among which a response can change.
    addresses: Vec<IpAddr>,
}

impl Reflector {
    /// Binds the sockets. If the address is `[::]` and cannot be bound, as on a machine without
    /// IPv6, it binds all IPv4 addresses. Without the second port, the server works without it.
    pub(crate) fn bind(address: SocketAddr, config: Option<&StunConfig>) -> io::Result<Self> {
        let socket = bind(address)?;
        let Some(StunConfig { other_port, addresses }) = config else {
            return Ok(Self { socket, second: None, addresses: Vec::new() });
        };
        let second = bind(SocketAddr::new(address.ip(), other_port.get())).inspect_err(|error| {
            let port = other_port.get();
            tracing::warn!(%error, port, "no second port of the STUN server: cannot bind UDP");
        });
        let is_own = |address: &&IpAddr| {
            let bound = std::net::UdpSocket::bind((**address, 0)).inspect_err(|error| {
                tracing::warn!(%error, %address, "not an address of the STUN server: cannot bind UDP");
            });
            bound.is_ok()
        };
        let addresses = addresses.iter().filter(is_own).copied().collect();
        Ok(Self { socket, second: second.ok(), addresses })
    }

    /// Answers requests until the task is aborted. Must be called within a tokio runtime.
    pub(crate) async fn run(self) {
        let Self { socket, second, addresses } = self;
        let socket = match UdpSocket::from_std(socket) {
            Ok(socket) => socket,
            Err(error) => return tracing::error!(%error, "cannot start the STUN server"),
        };
        let second = second.and_then(|second| {
            let started = UdpSocket::from_std(second).inspect_err(|error| {
                tracing::warn!(%error, "no second port of the STUN server: cannot start it");
            });
            started.ok()
        });
        let server = Server { addresses, state: Mutex::new(State::new()) };
        match &second {
            Some(second) => {
                let first = server.serve(&socket, Some(second));
                tokio::join!(first, server.serve(second, Some(&socket)));
            }
            None => server.serve(&socket, None).await,
        }
    }
}

/// Binds a socket. The kernel tells with each datagram at which address it arrived.
fn bind(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = match std::net::UdpSocket::bind(address) {
        Err(_) if address.ip() == Ipv6Addr::UNSPECIFIED => {
            std::net::UdpSocket::bind(("0.0.0.0", address.port()))
        }
        result => result,
    }?;
    if socket.local_addr()?.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// What the sockets share while they answer.
struct Server {
    addresses: Vec<IpAddr>,
    state: Mutex<State>,
}

/// Budgets and counters.
struct State {
    limiter: SourceLimiter,
    behaviour_limiter: SourceLimiter,
    behaviour_of_all: TokenBucket,
    answered: u64,
    refused: u64,
}

impl State {
    fn new() -> Self {
        Self {
            limiter: SourceLimiter::new(RATE),
            behaviour_limiter: SourceLimiter::new(BEHAVIOUR_RATE),
            behaviour_of_all: TokenBucket::default(),
            answered: 0,
            refused: 0,
        }
    }

    fn admits_behaviour(&mut self, source: IpAddr, now: Instant) -> bool {
        self.behaviour_limiter.admit(source, now)
            && self.behaviour_of_all.take(&BEHAVIOUR_RATE_OF_ALL, now, 1)
    }

    fn count(&mut self, is_answered: bool) {
        if is_answered {
            self.answered += 1;
            return;
        }
        self.refused += 1;
        if self.refused.is_multiple_of(REFUSED_PER_LINE) {
            let Self { answered, refused, .. } = *self;
            tracing::warn!(answered, refused, "STUN requests refused");
        }
    }
}

impl Server {
    /// Answers what one socket receives. `other` is the socket of the other port, if there is one.
    async fn serve(&self, socket: &UdpSocket, other: Option<&UdpSocket>) {
        let mut datagram = [0; DATAGRAM_BYTES];
        loop {
            // An error belongs to a datagram that was sent earlier (an ICMP error).
            let receiving = socket.async_io(Interest::READABLE, || receive(socket, &mut datagram));
            let Ok((len, from, local)) = receiving.await else { continue };
            let is_answered = self.answer((socket, other), &datagram[..len], from, local).is_some();
            self.state.lock().count(is_answered);
        }
    }

    /// Answers a datagram. Returns `None` if it is refused.
    fn answer(
        &self,
        (socket, other): (&UdpSocket, Option<&UdpSocket>),
        datagram: &[u8],
        from: SocketAddr,
        local: Option<LocalAddress>,
    ) -> Option<()> {
        let now = clock::now().mono;
        if !self.state.lock().limiter.admit(from.ip(), now) {
            return None;
        }
        let about_behaviour = other
            .zip(local)
            .and_then(|(other, local)| Some((other, local, behaviour::Request::decode(datagram)?)));
        let Some((other, local, request)) = about_behaviour else {
            let (answer, len) = stun::answer(datagram, from)?;
            send(socket, &answer[..len], from, local);
            return Some(());
        };
        if !self.state.lock().admits_behaviour(from.ip(), now) {
            return None;
        }
        let (asked, other_port) = (local.ip(), other.local_addr().ok()?.port());
        let other_address = self.other_address(asked);
        let source = if request.change.address { local.at(other_address?) } else { local };
        let socket = if request.change.port { other } else { socket };
        let addresses = behaviour::ServerAddresses {
            origin: SocketAddr::new(source.ip(), socket.local_addr().ok()?.port()),
            other: SocketAddr::new(other_address.unwrap_or(asked), other_port),
        };
        send(socket, &request.answer(from, addresses), from, Some(source));
        Some(())
    }

    /// Returns the address from which a request to `asked` is answered if another one is wanted.
    fn other_address(&self, asked: IpAddr) -> Option<IpAddr> {
        let is_other = |one: &IpAddr| one.is_ipv4() == asked.is_ipv4() && *one != asked;
        self.addresses.iter().copied().find(is_other)
    }
}

/// Sends a response. One that cannot be sent at once is lost, and the client asks again.
fn send(socket: &UdpSocket, response: &[u8], to: SocketAddr, local: Option<LocalAddress>) {
    let _ = socket.try_io(Interest::WRITABLE, || respond(socket, response, to, local));
}

/// Address of this machine at which a datagram arrived, as the kernel reports it and takes it. The link
/// is 0, except that of an address which belongs to one link alone: the routes choose the way back.
#[derive(Debug, Clone, Copy)]
enum LocalAddress {
    V4(libc::in_pktinfo),
    /// IPv6 address, or an IPv4 address in IPv6 form.
    V6(libc::in6_pktinfo),
}

impl LocalAddress {
    fn ip(self) -> IpAddr {
        match self {
            Self::V4(info) => Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()).into(),
            Self::V6(info) => IpAddr::from(info.ipi6_addr.s6_addr).to_canonical(),
        }
    }

    /// Returns another address of the same family, in the form of this one.
    fn at(self, address: IpAddr) -> Self {
        match (self, address) {
            (Self::V4(info), IpAddr::V4(v4)) => {
                let s_addr = u32::from_ne_bytes(v4.octets());
                let ipi_spec_dst = libc::in_addr { s_addr };
                Self::V4(libc::in_pktinfo { ipi_spec_dst, ..info })
            }
            (Self::V6(_), IpAddr::V4(v4)) => Self::v6(v4.to_ipv6_mapped()),
            (Self::V6(_), IpAddr::V6(v6)) => Self::v6(v6),
            (Self::V4(_), IpAddr::V6(_)) => self,
        }
    }

    fn v6(address: Ipv6Addr) -> Self {
        let ipi6_addr = libc::in6_addr { s6_addr: address.octets() };
        Self::V6(libc::in6_pktinfo { ipi6_addr, ipi6_ifindex: 0 })
    }
}

/// Receives a datagram. Returns its length, its sender, and the address at which it arrived.
fn receive(
    socket: &UdpSocket,
    datagram: &mut [u8],
) -> io::Result<(usize, SocketAddr, Option<LocalAddress>)> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(datagram)];
    let received = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let from = received.address.as_ref().and_then(sender);
    let from = from.ok_or_else(|| io::Error::other("a datagram without a sender"))?;
    let local = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(LocalAddress::V4(libc::in_pktinfo { ipi_ifindex: 0, ..info }))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            let is_of_link = Ipv6Addr::from(info.ipi6_addr.s6_addr).is_unicast_link_local();
            let link = if is_of_link { info.ipi6_ifindex } else { 0 };
            Some(LocalAddress::V6(libc::in6_pktinfo { ipi6_ifindex: link, ..info }))
        }
        _ => None,
    });
    Ok((received.bytes, from, local))
}

/// Sends a datagram from an address of this machine.
fn respond(
    socket: &UdpSocket,
    datagram: &[u8],
    to: SocketAddr,
    local: Option<LocalAddress>,
) -> io::Result<usize> {
    let control = local.as_ref().map(|local| match local {
        LocalAddress::V4(info) => ControlMessage::Ipv4PacketInfo(info),
        LocalAddress::V6(info) => ControlMessage::Ipv6PacketInfo(info),
    });
    let to = SockaddrStorage::from(to);
    let parts = [IoSlice::new(datagram)];
    let control = control.as_slice();
    Ok(sendmsg(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_DONTWAIT, Some(&to))?)
}

fn sender(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddrV4::from(*v4).into());
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::time::Duration;

    use towline_proto::stun::behaviour::{Change, Request, ServerAddresses};

    use super::*;

    #[tokio::test]
    async fn it_says_where_a_padded_request_came_from_and_nothing_else() {
        let reflector = Reflector::bind((Ipv4Addr::LOCALHOST, 0).into(), None).unwrap();
        let address = reflector.socket.local_addr().unwrap();
        let running = tokio::spawn(reflector.run());
        let asker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        asker.connect(address).await.unwrap();
        asker.send(b"what is this").await.unwrap();
        asker.send(&stun::request([7; 12])).await.unwrap();
        let mut answer = [0; 100];
        let receive = asker.recv(&mut answer);
        let len = tokio::time::timeout(Duration::from_secs(10), receive).await.unwrap().unwrap();
        let mapped = asker.local_addr().unwrap();
        let expected = stun::Message::Success { transaction: [7; 12], mapped };
        assert_eq!(stun::Message::decode(&answer[..len]), Some(expected));
        running.abort();
    }

    #[tokio::test]
    async fn it_answers_from_the_address_that_was_asked() {
        for all in [SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), (Ipv6Addr::UNSPECIFIED, 0).into()]
        {
            let reflector = Reflector::bind(all, None).unwrap();
            let port = reflector.socket.local_addr().unwrap().port();
            let running = tokio::spawn(reflector.run());
            let asker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            // Another address of the loopback. A connected socket takes answers from there only.
            asker.connect((Ipv4Addr::new(127, 0, 0, 2), port)).await.unwrap();
            asker.send(&stun::request([7; 12])).await.unwrap();
            let mut answer = [0; 100];
            let receive = asker.recv(&mut answer);
            let answered = tokio::time::timeout(Duration::from_secs(10), receive).await;
            assert!(answered.is_ok_and(|received| received.is_ok()), "{all}");
            running.abort();
        }
    }

    const FIRST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
    const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

    /// Returns a server with two ports on all addresses, and its ports.
    fn with_two_ports(all: SocketAddr, addresses: &[Ipv4Addr]) -> (Reflector, u16, u16) {
        let (socket, second) = (bind(all).unwrap(), bind(all).unwrap());
        let ports = [&socket, &second].map(|socket| socket.local_addr().unwrap().port());
        let addresses = addresses.iter().map(|address| IpAddr::from(*address)).collect();
        (Reflector { socket, second: Some(second), addresses }, ports[0], ports[1])
    }

    /// Receives an answer. Returns its sender, its transaction and the server's addresses.
    async fn answer(asker: &UdpSocket) -> (SocketAddr, u8, Option<ServerAddresses>) {
        let mut datagram = [0; 200];
        let receive = asker.recv_from(&mut datagram);
        let received = tokio::time::timeout(Duration::from_secs(10), receive).await;
        let (len, from) = received.unwrap().unwrap();
        let Some(stun::Message::Success { transaction, mapped }) =
            stun::Message::decode(&datagram[..len])
        else {
            panic!("no answer")
        };
        assert_eq!(mapped, asker.local_addr().unwrap());
        (from, transaction[0], ServerAddresses::decode(&datagram[..len]))
    }

    #[tokio::test]
    async fn it_answers_from_the_other_port_and_address_that_a_request_asks_for() {
        for all in [SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), (Ipv6Addr::UNSPECIFIED, 0).into()]
        {
            let (reflector, first, second) = with_two_ports(all, &[FIRST, OTHER]);
            let running = tokio::spawn(reflector.run());
            let asker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let other = SocketAddr::from((OTHER, second));
            for (number, change, origin) in [
                (1, Change::NONE, (FIRST, first)),
                (2, Change::PORT, (FIRST, second)),
                (3, Change::ADDRESS_AND_PORT, (OTHER, second)),
                (4, Change { address: true, port: false }, (OTHER, first)),
            ] {
                let request = Request { transaction: [number; 12], change };
                asker.send_to(&request.encode(), (FIRST, first)).await.unwrap();
                let origin = SocketAddr::from(origin);
                let expected = Some(ServerAddresses { origin, other });
                assert_eq!(answer(&asker).await, (origin, number, expected), "{all} {change:?}");
            }
            // Asked at the other address and port, the first ones are the others.
            let request = Request { transaction: [5; 12], change: Change::ADDRESS_AND_PORT };
            asker.send_to(&request.encode(), other).await.unwrap();
            let (from, ..) = answer(&asker).await;
            assert_eq!(from, (FIRST, first).into());
            running.abort();
        }
    }

    #[tokio::test]
    async fn without_another_address_it_names_the_one_that_was_asked() {
        let (reflector, first, second) = with_two_ports((Ipv4Addr::UNSPECIFIED, 0).into(), &[]);
        let running = tokio::spawn(reflector.run());
        let asker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        for (number, change) in [(1, Change::ADDRESS_AND_PORT), (2, Change::PORT)] {
            let request = Request { transaction: [number; 12], change };
            asker.send_to(&request.encode(), (FIRST, first)).await.unwrap();
        }
        let second = SocketAddr::from((FIRST, second));
        let expected = Some(ServerAddresses { origin: second, other: second });
        // The first request has no answer.
        assert_eq!(answer(&asker).await, (second, 2, expected));
        running.abort();
    }

    #[tokio::test]
    async fn a_server_with_one_port_answers_from_there_alone() {
        let reflector = Reflector::bind((Ipv4Addr::LOCALHOST, 0).into(), None).unwrap();
        let address = reflector.socket.local_addr().unwrap();
        let running = tokio::spawn(reflector.run());
        let asker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let request = Request { transaction: [1; 12], change: Change::PORT };
        asker.send_to(&request.encode(), address).await.unwrap();
        assert_eq!(answer(&asker).await, (address, 1, None));
        running.abort();
    }

    #[tokio::test]
    async fn without_a_socket_of_the_second_port_it_answers_at_the_first_one() {
        let (mut reflector, first, _) = with_two_ports((Ipv4Addr::UNSPECIFIED, 0).into(), &[]);
        // The kernel does not tell when this can be read, so the runtime refuses it.
        let mut options = std::fs::OpenOptions::new();
        let no_socket = options.read(true).custom_flags(libc::O_NONBLOCK).open("/dev/null");
        reflector.second = Some(OwnedFd::from(no_socket.unwrap()).into());
        let running = tokio::spawn(reflector.run());
        let asker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let request = Request { transaction: [1; 12], change: Change::NONE };
        asker.send_to(&request.encode(), (FIRST, first)).await.unwrap();
        assert_eq!(answer(&asker).await, ((FIRST, first).into(), 1, None));
        running.abort();
    }

    #[tokio::test]
    async fn a_source_gets_few_answers_from_the_other_port() {
        let (reflector, first, _) = with_two_ports((Ipv4Addr::UNSPECIFIED, 0).into(), &[]);
        let running = tokio::spawn(reflector.run());
        let asker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        for number in 0..100 {
            let request = Request { transaction: [number; 12], change: Change::PORT };
            asker.send_to(&request.encode(), (FIRST, first)).await.unwrap();
        }
        // The budget of plain requests is larger, so this one is answered, and last.
        asker.send_to(&stun::request([255; 12]), (FIRST, first)).await.unwrap();
        let mut answered = BTreeSet::new();
        loop {
            match answer(&asker).await {
                (_, 255, _) => break,
                (_, number, _) => answered.insert(number),
            };
        }
        assert!((1..100).contains(&answered.len()), "{answered:?}");
        running.abort();
    }
}
