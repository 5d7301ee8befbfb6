//! STUN server (RFC 8489 binding) on UDP, on the port number that gRPC uses on TCP. It tells a
//! client its public address.
//!
//! The server only answers requests that are at least as long as the response, and limits the rate
//! of each source, so it cannot be used to flood other hosts. It keeps no state except the rate
//! limiter. A response leaves from the address that the request was sent to, also on a machine with
//! several addresses: a NAT drops what comes from another one.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd as _;

use nix::libc;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use towline_proto::rate::Rate;
use towline_proto::source_limiter::SourceLimiter;
use towline_proto::stun;

use crate::clock;

/// Requests per second and source, and their burst. Many nodes behind one NAT share a source.
const RATE: Rate = Rate::per_second(32, 128);
/// Longest datagram that is read, in bytes. A request is far shorter.
const DATAGRAM_BYTES: usize = 1500;
/// Number of refused requests between two log messages.
const REFUSED_PER_LINE: u64 = 10_000;

/// Socket of the STUN server.
pub(crate) struct Reflector {
    socket: std::net::UdpSocket,
}

impl Reflector {
    /// Binds the socket. If the address is `[::]` and cannot be bound, as on a machine without
    /// IPv6, it binds all IPv4 addresses.
    pub(crate) fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = match std::net::UdpSocket::bind(address) {
            Err(_) if address.ip() == Ipv6Addr::UNSPECIFIED => {
                std::net::UdpSocket::bind(("0.0.0.0", address.port()))
            }
            result => result,
        }?;
        // The kernel then tells with each datagram at which address it arrived.
        if socket.local_addr()?.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        }
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// Answers requests until the task is aborted. Must be called within a tokio runtime.
    pub(crate) async fn run(self) {
        let socket = match UdpSocket::from_std(self.socket) {
            Ok(socket) => socket,
            Err(error) => return tracing::error!(%error, "cannot start the STUN server"),
        };
        let mut limiter = SourceLimiter::new(RATE);
        let mut datagram = [0; DATAGRAM_BYTES];
        let (mut answered, mut refused) = (0u64, 0u64);
        loop {
            // An error belongs to a datagram that was sent earlier (an ICMP error).
            let receiving = socket.async_io(Interest::READABLE, || receive(&socket, &mut datagram));
            let Ok((len, from, local)) = receiving.await else { continue };
            let admitted = limiter.admit(from.ip(), clock::now().mono);
            let answer = admitted.then(|| stun::answer(&datagram[..len], from)).flatten();
            match answer {
                Some((answer, len)) => {
                    answered += 1;
                    let sending = || respond(&socket, &answer[..len], from, local);
                    let _ = socket.try_io(Interest::WRITABLE, sending);
                }
                None => {
                    refused += 1;
                    if refused.is_multiple_of(REFUSED_PER_LINE) {
                        tracing::warn!(answered, refused, "STUN requests refused");
                    }
                }
            }
        }
    }
}

/// Address of this machine at which a datagram arrived, as the kernel reports it and takes it. The link
/// is 0, except that of an address which belongs to one link alone: the routes choose the way back.
#[derive(Debug, Clone, Copy)]
enum LocalAddress {
    V4(libc::in_pktinfo),
    /// IPv6 address, or an IPv4 address in IPv6 form.
    V6(libc::in6_pktinfo),
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
    use std::net::Ipv4Addr;

    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn it_says_where_a_padded_request_came_from_and_nothing_else() {
        let reflector = Reflector::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
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
            let reflector = Reflector::bind(all).unwrap();
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
}
