//! The user of a TCP socket of this host, found by the socket's two addresses (sock_diag(7)).

use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use super::codec::{Message, Received, u32_at};
use super::{Connection, Family, NetlinkError, Protocol};

/// Message type of requests and answers (`SOCK_DIAG_BY_FAMILY`).
const BY_FAMILY: u16 = 20;
/// States of a socket to look for: all.
const ALL_STATES: u32 = u32::MAX;
/// Both halves of the cookie of a request that knows none (`INET_DIAG_NOCOOKIE`).
const NO_COOKIE: u32 = u32::MAX;
/// Offset of the remote port in an answer (`struct inet_diag_msg`).
const REMOTE_PORT: usize = 6;
/// Offset of the user id in an answer.
const USER: usize = 64;

/// Connection to the kernel for questions about sockets of one network namespace.
#[derive(Debug)]
pub struct SocketOwners {
    connection: Connection,
}

impl SocketOwners {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self { connection: Connection::open(Protocol::SocketDiag)? })
    }

    /// Returns the id of the user whose TCP socket has these addresses, as this process's user namespace numbers it;
    /// `None` if there is no such connection. The kernel looks it up in its table, which does not take longer if
    /// there are many.
    pub fn of_tcp(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> Result<Option<u32>, NetlinkError> {
        let what = || format!("find the user of the connection from {local} to {remote}");
        let found = self
            .connection
            .get(what, request(local, remote), |received| parse(&received, remote.port()));
        match found {
            Err(NetlinkError::Refused { refusal, .. }) if refusal.errno == Errno::ENOENT => {
                Ok(None)
            }
            found => found,
        }
    }
}

/// Builds the request for one socket (`struct inet_diag_req_v2`).
fn request(local: SocketAddr, remote: SocketAddr) -> Message {
    let mut fixed = Vec::with_capacity(56);
    fixed.extend([Family::of(local.ip()).number(), libc::IPPROTO_TCP as u8, 0, 0]);
    fixed.extend(ALL_STATES.to_ne_bytes());
    fixed.extend(local.port().to_be_bytes());
    fixed.extend(remote.port().to_be_bytes());
    fixed.extend(address(local.ip()));
    fixed.extend(address(remote.ip()));
    // Of no particular interface.
    fixed.extend(0_u32.to_ne_bytes());
    fixed.extend(NO_COOKIE.to_ne_bytes());
    fixed.extend(NO_COOKIE.to_ne_bytes());
    Message::new(BY_FAMILY, 0, &fixed)
}

/// Returns an address in the 16 bytes that both families have.
fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Parses an answer. A socket with another remote port is a listening one.
pub fn parse(received: &Received<'_>, remote_port: u16) -> Option<u32> {
    if received.kind != BY_FAMILY {
        return None;
    }
    let port = received.payload.get(REMOTE_PORT..)?.first_chunk::<2>()?;
    let is_wanted = u16::from_be_bytes(*port) == remote_port;
    is_wanted.then(|| u32_at(received.payload, USER)).flatten()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn answer(bytes: &[u8]) -> Received<'_> {
        Received { kind: BY_FAMILY, flags: 0, sequence: 1, port: 0, payload: bytes }
    }

    #[test]
    fn an_answer_for_another_port_or_a_cut_one_names_no_user() {
        let mut bytes = [0; 72];
        bytes[6..8].copy_from_slice(&7_445_u16.to_be_bytes());
        bytes[64..68].copy_from_slice(&1_000_u32.to_ne_bytes());
        assert_eq!(parse(&answer(&bytes), 7_445), Some(1_000));
        assert_eq!(parse(&answer(&bytes), 7_446), None);
        for length in 0..68 {
            assert_eq!(parse(&answer(&bytes[..length]), 7_445), None);
        }
    }

    #[test]
    fn the_user_of_a_connection_is_this_process() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let mut owners = SocketOwners::open().unwrap();
        let found = match owners.of_tcp(local, remote) {
            Ok(found) => found,
            // The kernel may lack the module `tcp_diag`; it then refuses to answer.
            Err(NetlinkError::Refused { .. }) => return,
            Err(error) => panic!("{error}"),
        };
        // Without the module the kernel also answers that there is no such socket.
        assert!(found.is_none_or(|user| user == nix::unistd::getuid().as_raw()), "{found:?}");
        let other = SocketAddr::new(local.ip(), 1);
        assert_eq!(owners.of_tcp(other, remote).unwrap(), None);
    }
}
