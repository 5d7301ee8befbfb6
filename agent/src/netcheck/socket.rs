//! Opens the sockets that ask STUN servers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;

use towline_netlink::Family;

/// Largest datagram that is read, in bytes.
pub(super) const DATAGRAM_BYTES: usize = 2048;

/// Opens a socket with a random port that never fragments.
pub(super) fn open(family: Family) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::new(unspecified(family), 0))?;
    let (level, name, value) = match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO),
    };
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option is an `int`, which `value` is, and `length` is its size.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Returns the address that stands for every address of a family.
pub(super) fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}
