//! Datagrams with a tag and a number, and sockets that record which numbers arrived.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use super::interrupt::wait_up_to;
use super::namespace::Namespace;
use super::traffic::{MARK, random_bytes};

/// Random bytes with which the datagrams of one run begin; no other traffic contains them.
#[derive(Debug, Clone, Copy)]
pub struct Tag([u8; MARK]);

/// A UDP socket for every address of a host.
#[derive(Debug)]
pub struct Listener {
    socket: UdpSocket,
    tag: Tag,
    received: BTreeSet<u64>,
    /// Number of datagrams whose number had arrived before.
    repeated: u64,
}

/// Size of a payload in bytes.
pub const PAYLOAD: usize = MARK + size_of::<u64>();

impl Tag {
    /// Generates a random tag.
    pub fn random() -> anyhow::Result<Self> {
        Ok(Self(random_bytes()?))
    }

    /// Returns the bytes with which every payload begins.
    pub fn bytes(&self) -> &[u8; MARK] {
        &self.0
    }

    /// Returns the payload with this number.
    pub fn payload(&self, number: u64) -> [u8; PAYLOAD] {
        let mut payload = [0; PAYLOAD];
        payload[..MARK].copy_from_slice(&self.0);
        payload[MARK..].copy_from_slice(&number.to_be_bytes());
        payload
    }

    /// Returns the number in a payload, or `None` without this tag.
    pub fn number(&self, payload: &[u8]) -> Option<u64> {
        let rest = payload.strip_prefix(&self.0)?;
        Some(u64::from_be_bytes(*rest.first_chunk()?))
    }
}

impl Listener {
    /// Opens a socket in `namespace` on `port` for both address families, and joins these multicast
    /// groups on the link of index `link`.
    pub fn open(
        namespace: &Namespace,
        port: u16,
        tag: Tag,
        groups: (&[Ipv4Addr], &[Ipv6Addr]),
        link: u32,
    ) -> anyhow::Result<Self> {
        namespace.run(|| {
            let socket = UdpSocket::bind(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))?;
            socket.set_nonblocking(true)?;
            let socket = socket2::Socket::from(socket);
            for group in groups.0 {
                let link = socket2::InterfaceIndexOrAddress::Index(link);
                socket.join_multicast_v4_n(group, &link)?;
            }
            for group in groups.1 {
                socket.join_multicast_v6(group, link)?;
            }
            Ok(Self { socket: socket.into(), tag, received: BTreeSet::new(), repeated: 0 })
        })
    }

    /// Returns whether the datagram of this number arrives within `limit`.
    pub fn receives(&mut self, number: u64, limit: Duration) -> anyhow::Result<bool> {
        let arrived = wait_up_to(limit, || {
            self.take()?;
            Ok(self.received.contains(&number).then_some(()))
        })?;
        Ok(arrived.is_some())
    }

    /// Returns how many datagrams arrived so far whose number had arrived before.
    pub fn repeated(&mut self) -> anyhow::Result<u64> {
        self.take()?;
        Ok(self.repeated)
    }

    /// Waits for the datagram of this number and sends the payload of `answer` back to its source,
    /// `times` times. Returns whether the datagram arrived within `limit`.
    pub fn answers(
        &mut self,
        number: u64,
        answer: u64,
        times: u32,
        limit: Duration,
    ) -> anyhow::Result<bool> {
        let mut buffer = [0; 2048];
        let from = wait_up_to(limit, || {
            loop {
                match self.socket.recv_from(&mut buffer) {
                    Ok((length, from)) if self.tag.number(&buffer[..length]) == Some(number) => {
                        return Ok(Some(from));
                    }
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
            }
        })?;
        let Some(from) = from else { return Ok(false) };
        for _ in 0..times {
            // Errors are ignored: guards cause them.
            let _ = self.socket.send_to(&self.tag.payload(answer), from);
        }
        Ok(true)
    }

    fn take(&mut self) -> anyhow::Result<()> {
        let mut buffer = [0; 65_536];
        loop {
            match self.socket.recv_from(&mut buffer) {
                Ok((length, _)) => {
                    if let Some(number) = self.tag.number(&buffer[..length]) {
                        self.repeated += u64::from(!self.received.insert(number));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // An error that an ICMP message caused concerns a datagram that was sent.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_tells_its_number() {
        let (tag, other) = (Tag::random().unwrap(), Tag::random().unwrap());
        let payload = tag.payload(7);
        assert_eq!(tag.number(&payload), Some(7));
        assert_eq!(other.number(&payload), None);
        assert_eq!(tag.number(&payload[..PAYLOAD - 1]), None);
    }
}
