//! STUN server (RFC 8489 binding) on UDP, on the port number that gRPC uses on TCP. It tells a
//! client its public address.
//!
//! The server only answers requests that are at least as long as the response, and limits the rate
//! of each source, so it cannot be used to flood other hosts. It keeps no state except the rate
//! limiter. On a machine with several addresses that listens on all of them, a response may leave
//! from another address than the request was sent to, and the client ignores it. Listen on one
//! address there.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};

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
            let Ok((len, from)) = socket.recv_from(&mut datagram).await else { continue };
            let admitted = limiter.admit(from.ip(), clock::now().mono);
            let answer = admitted.then(|| stun::answer(&datagram[..len], from)).flatten();
            match answer {
                Some((answer, len)) => {
                    answered += 1;
                    let _ = socket.try_send_to(&answer[..len], from);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
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
}
