//! Tells whoever asks from where it was heard: STUN binding (RFC 8489) on UDP, on the port number
//! that gRPC has on TCP.
//!
//! It answers nothing but requests that are at least as long as the answer, a few per second from
//! one source: nobody is flooded through it. It knows nothing and keeps nothing. On a machine with
//! several addresses, listening on all of them, an answer may leave from another one than was
//! asked; then the asker takes it for nothing. Listen on one address there.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};

use tokio::net::UdpSocket;
use towline_proto::rate::Rate;
use towline_proto::source_limiter::SourceLimiter;
use towline_proto::stun;

use crate::clock::Now;

/// Requests per second and source, and how many at once: many nodes may share one.
const RATE: Rate = Rate::per_second(32, 128);
/// A request is far shorter.
const DATAGRAM_BYTES: usize = 1500;
/// How many are refused between two lines of the log.
const REFUSED_PER_LINE: u64 = 10_000;

/// A socket that reflects.
pub(crate) struct Reflector {
    socket: std::net::UdpSocket,
}

impl Reflector {
    /// On this address; on all of IPv4 alone where the machine has no IPv6, when it is `[::]`.
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

    /// Reflects for ever. Within a tokio runtime.
    pub(crate) async fn run(self) {
        let socket = match UdpSocket::from_std(self.socket) {
            Ok(socket) => socket,
            Err(error) => return tracing::error!(%error, "not reflecting"),
        };
        let mut limiter = SourceLimiter::new(RATE);
        let mut datagram = [0; DATAGRAM_BYTES];
        let (mut answered, mut refused) = (0u64, 0u64);
        loop {
            // An error is of some datagram of before.
            let Ok((len, from)) = socket.recv_from(&mut datagram).await else { continue };
            let admitted = limiter.admit(from.ip(), Now::read().mono);
            let answer = admitted.then(|| stun::answer(&datagram[..len], from)).flatten();
            match answer {
                Some((answer, len)) => {
                    answered += 1;
                    let _ = socket.try_send_to(&answer[..len], from);
                }
                None => {
                    refused += 1;
                    if refused.is_multiple_of(REFUSED_PER_LINE) {
                        tracing::warn!(answered, refused, "reflector refused requests");
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
