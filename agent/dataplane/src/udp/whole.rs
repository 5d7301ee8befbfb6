//! Sending of datagrams with fragmentation forbidden, and the largest length that fits if the
//! kernel refuses one.
//!
//! The kernel reports that length in the error queue of the sending socket (`IP_RECVERR`), so it is
//! the length for the route that the datagram would take, including policy rules. Another socket
//! would give a wrong answer: it has another port, and Towline's own rules would send its datagrams
//! into the tunnel.

use std::ffi::c_int;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::AsRawFd;
use std::ptr;

use socket2::Socket;

use super::endpoint::{Endpoint, set};
use super::messages::Headers;
use crate::arena::GsoBatch;

/// Largest number of queued errors that are searched for the error of the datagram. Replies from
/// the network may have queued others.
const ERRORS: usize = 8;
/// Bytes for the control messages of one error: a `sock_extended_err`, an address, and the
/// datagram's interface.
const CONTROL: usize = 256;
/// Length of the IPv4 and UDP headers of a datagram, in bytes.
const HEADERS_V4: u32 = 20 + 8;
/// Length of the IPv6 and UDP headers of a datagram, in bytes.
const HEADERS_V6: u32 = 40 + 8;

/// Socket options of one address family.
#[derive(Clone, Copy)]
struct Options {
    level: c_int,
    discover: c_int,
    /// Value of `discover` while the datagram is sent.
    whole: c_int,
    /// Value of `discover` after that.
    after: c_int,
    /// Option that queues errors.
    errors: c_int,
    /// Length of the headers of a datagram, in bytes.
    headers: u32,
}

const V4: Options = Options {
    level: libc::IPPROTO_IP,
    discover: libc::IP_MTU_DISCOVER,
    whole: libc::IP_PMTUDISC_PROBE,
    after: libc::IP_PMTUDISC_DONT,
    errors: libc::IP_RECVERR,
    headers: HEADERS_V4,
};
const V6: Options = Options {
    level: libc::IPPROTO_IPV6,
    discover: libc::IPV6_MTU_DISCOVER,
    whole: libc::IPV6_PMTUDISC_PROBE,
    after: libc::IPV6_PMTUDISC_DONT,
    errors: libc::IPV6_RECVERR,
    headers: HEADERS_V6,
};

/// Error of a datagram that was not sent.
#[derive(Debug)]
pub(super) struct Unsent {
    pub(super) error: io::Error,
    /// UDP payload that fits, in bytes. Set if the datagram was too long and the kernel reported
    /// the length that fits.
    pub(super) payload: Option<u16>,
}

impl From<io::Error> for Unsent {
    fn from(error: io::Error) -> Self {
        Self { error, payload: None }
    }
}

impl Endpoint {
    /// Sends one datagram with fragmentation forbidden, even if the kernel has cached a smaller
    /// path MTU.
    pub(super) fn send_whole(&mut self, bytes: &[u8], gso: &GsoBatch) -> Result<(), Unsent> {
        let options = if self.v4 { V4 } else { V6 };
        let Self { socket, headers, .. } = self;
        set(socket, options.level, options.discover, options.whole)?;
        let sent = send_listening(socket, headers, bytes, gso, options);
        set(socket, options.level, options.discover, options.after)?;
        sent
    }
}

/// Sends the datagram while the socket's error queue is enabled.
fn send_listening(
    socket: &Socket,
    headers: &mut Headers,
    bytes: &[u8],
    gso: &GsoBatch,
    options: Options,
) -> Result<(), Unsent> {
    // Without the error queue the length that fits stays unknown.
    let listening = set(socket, options.level, options.errors, 1).is_ok();
    let sent = headers.send(socket, bytes, &[*gso]);
    let mtu = match &sent {
        Err(error) if listening && error.raw_os_error() == Some(libc::EMSGSIZE) => {
            (0..ERRORS).map_while(|_| next_error(socket)).flatten().next()
        }
        _ => None,
    };
    if listening {
        set(socket, options.level, options.errors, 0)?;
        // A pending error would otherwise fail the next datagram.
        let _ = socket.take_error();
    }
    let payload = mtu.and_then(|mtu| u16::try_from(mtu.checked_sub(options.headers)?).ok());
    sent.map(drop).map_err(|error| Unsent { error, payload })
}

/// Removes one error from the queue. Returns the MTU if the error says that a datagram was too long
/// to leave this machine, and `None` if the queue is empty.
fn next_error(socket: &Socket) -> Option<Option<u32>> {
    let mut control = [MaybeUninit::<u64>::uninit(); CONTROL / size_of::<u64>()];
    // SAFETY: a `msghdr` is plain data, and all zeros is a valid value.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL as _;
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // SAFETY: `message` has no address and no vector, and its control buffer lives until the end of
    // this function.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    if received == -1 {
        return None;
    }
    let mut mtu = None;
    // SAFETY: the kernel has filled the control buffer up to `msg_controllen`. The macros stay
    // within that, and each value has the type of its level and kind, possibly unaligned.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(&raw const message);
        while !next.is_null() {
            let kind = ((*next).cmsg_level, (*next).cmsg_type);
            let length = (*next).cmsg_len as usize;
            let least = libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as u32) as usize;
            if matches!(
                kind,
                (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
            ) && length >= least
            {
                let error: libc::sock_extended_err =
                    ptr::read_unaligned(libc::CMSG_DATA(next).cast());
                if error.ee_origin == libc::SO_EE_ORIGIN_LOCAL
                    && error.ee_errno == libc::EMSGSIZE as u32
                {
                    mtu = Some(error.ee_info);
                }
            }
            next = libc::CMSG_NXTHDR(&raw const message, next);
        }
    }
    Some(mtu)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Instant;

    use ipnet::IpNet;
    use towline_core::path::Path;
    use towline_netlink::{
        AddressOptions, Family, Route, RouteChange, Rtnetlink, Rule, RuleAction, VethPeer,
    };
    use towline_netns::namespace_test;

    use crate::arena::{SLOT_BYTES, SendBatch};
    use crate::drops::{DropReason, Drops};
    use crate::udp::{TooBig, Udp, UdpIo as _, open_udp};

    const MARK: u32 = 0x54;
    const TABLE: u32 = 99;

    /// Adds a link with this MTU and these addresses, and returns its index.
    fn add_link(links: &mut Rtnetlink, name: &str, mtu: u32, addresses: &[&str]) -> u32 {
        let peer = format!("{name}p");
        links.add_veth(name, VethPeer { name: &peer, namespace: None }).unwrap();
        for end in [&peer, name] {
            let index = links.link_index(end).unwrap();
            links.set_mtu(index, mtu).unwrap();
            links.set_up(index, true).unwrap();
        }
        let index = links.link_index(name).unwrap();
        for address in addresses {
            let options = AddressOptions { no_dad: true, no_prefix_route: false };
            links.add_address(index, address.parse().unwrap(), options).unwrap();
        }
        index
    }

    fn too_big(udp: &mut Udp, to: &str, length: usize) -> Result<(), TooBig> {
        let to: Path = std::net::SocketAddr::new(to.parse::<IpAddr>().unwrap(), 9).into();
        let mut batch = SendBatch::new(SLOT_BYTES, 1);
        assert!(batch.push(to, &vec![0; length]));
        let drops = Drops::default();
        let sent = udp.send_whole(Instant::now(), &batch, &drops);
        assert_eq!(drops.get(DropReason::SendTooLarge), u64::from(sent.is_err()));
        sent
    }

    namespace_test! {
        /// The routes of the tunnel (here another link with a smaller MTU) contain the peer's outer
        /// address. Only datagrams from the node's own port bypass them.
        fn the_length_that_fits_is_that_of_the_datagrams_own_way() {
            let mut links = Rtnetlink::open().unwrap();
            let uplink = add_link(&mut links, "uplink", 1_400, &["10.1.0.1/24", "fd01::1/64"]);
            let tunnel = add_link(&mut links, "tunnel", 1_300, &["10.2.0.1/24", "fd02::1/64"]);
            let mut udp = open_udp(0, MARK).unwrap();
            let port = udp.port();
            for (family, all) in [(Family::V4, "10.0.0.0/8"), (Family::V6, "fd00::/8")] {
                let all: IpNet = all.parse().unwrap();
                let route = Route::new(all).table(TABLE).dev(tunnel);
                assert!(links.change_routes(&[RouteChange::Set(route)]).unwrap().is_empty());
                links.add_rule(&Rule::new(family, 20, RuleAction::Table(TABLE))).unwrap();
                let past = Rule {
                    input: Some("lo".to_owned()),
                    mark: Some((MARK, u32::MAX)),
                    protocol: Some(libc::IPPROTO_UDP as u8),
                    source_ports: Some(port..=port),
                    ..Rule::new(family, 10, RuleAction::Goto(30))
                };
                links.add_rule(&Rule::new(family, 30, RuleAction::Nop)).unwrap();
                links.add_rule(&past).unwrap();
            }
            for (to, headers) in [("10.1.0.2", 28), ("fd01::2", 48)] {
                let fits = 1_400 - headers;
                assert_eq!(too_big(&mut udp, to, 1_500), Err(TooBig { payload: fits }), "{to}");
                assert_eq!(too_big(&mut udp, to, usize::from(fits) + 1), Err(TooBig { payload: fits }));
                assert_eq!(too_big(&mut udp, to, usize::from(fits)), Ok(()), "{to}");
            }
            assert_ne!(uplink, tunnel);
        }
    }
}
