//! Message headers of `sendmmsg` and `recvmmsg`: addresses, segment lengths, and the local address
//! that a datagram leaves from or arrived at.

use std::ffi::{c_int, c_uint, c_void};
use std::io;
use std::mem::zeroed;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::ptr;

use socket2::{SockAddr, Socket};
use towline_core::path::{LocalAddress, Path};

use super::{UDP_GRO, UDP_SEGMENT};
use crate::arena::{GsoBatch, SLOT_BYTES};

/// Largest number of messages in one system call.
pub(super) const MESSAGES: usize = 64;
/// Bytes for the control messages of one datagram: a segment length, a local address and a traffic
/// class.
const CONTROL: usize = 96;

#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

impl Control {
    /// Appends a control message after `used` bytes. Returns the number of bytes in use after that.
    fn put(&mut self, used: usize, level: c_int, kind: c_int, value: &[u8]) -> usize {
        let length = value.len() as c_uint;
        // SAFETY: the calls only compute lengths.
        let (header, len, space) =
            unsafe { (libc::CMSG_LEN(0), libc::CMSG_LEN(length), libc::CMSG_SPACE(length)) };
        let (header, end) = (header as usize, used + space as usize);
        if end > CONTROL {
            return used;
        }
        self.0[used + header..][..value.len()].copy_from_slice(value);
        // SAFETY: a `cmsghdr` is plain data. The check above leaves room for it, and the write does
        // not need alignment.
        unsafe {
            let mut message: libc::cmsghdr = zeroed();
            message.cmsg_len = len as _;
            message.cmsg_level = level;
            message.cmsg_type = kind;
            ptr::write_unaligned(self.0[used..].as_mut_ptr().cast(), message);
        }
        end
    }

    /// Appends the traffic class of the datagram.
    fn put_traffic_class(&mut self, used: usize, v4: bool, class: u8) -> usize {
        let value = c_int::from(class).to_ne_bytes();
        if v4 {
            self.put(used, libc::IPPROTO_IP, libc::IP_TOS, &value)
        } else {
            self.put(used, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &value)
        }
    }

    /// Appends the local address and interface that the datagram leaves from.
    fn put_local(&mut self, used: usize, local: LocalAddress) -> usize {
        match local.address {
            IpAddr::V4(address) => {
                // `in_pktinfo` has an interface, a source, and a third field that the kernel does
                // not read.
                let mut info = [0; 12];
                info[..4].copy_from_slice(&local.interface.to_ne_bytes());
                info[4..8].copy_from_slice(&address.octets());
                self.put(used, libc::IPPROTO_IP, libc::IP_PKTINFO, &info)
            }
            IpAddr::V6(address) => {
                // `in6_pktinfo` has a source and an interface.
                let mut info = [0; 20];
                info[..16].copy_from_slice(&address.octets());
                info[16..].copy_from_slice(&local.interface.to_ne_bytes());
                self.put(used, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info)
            }
        }
    }
}

/// A message that was received.
pub(super) struct ReceivedMessage {
    /// Path that it arrived by.
    pub(super) from: Path,
    /// Number of bytes.
    pub(super) len: usize,
    /// Length of each datagram except the last. 0 for one datagram.
    pub(super) segment_size: usize,
    /// Traffic class of the outer packets.
    pub(super) traffic_class: u8,
}

/// Message headers of `sendmmsg` and `recvmmsg`, allocated once. The pointers in `messages` are set
/// before each call and are invalid after it.
pub(super) struct Headers {
    messages: Box<[libc::mmsghdr]>,
    vectors: Box<[libc::iovec]>,
    addresses: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
}

// SAFETY: the raw pointers inside are only used within a call that has just written them, under
// `&mut self`.
unsafe impl Send for Headers {}

impl Headers {
    pub(super) fn new() -> Self {
        // SAFETY: all three are plain data, and all zeros is a valid value of each.
        let (message, vector, address) = unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            messages: vec![message; MESSAGES].into(),
            vectors: vec![vector; MESSAGES].into(),
            addresses: vec![address; MESSAGES].into(),
            controls: vec![Control([0; CONTROL]); MESSAGES].into(),
        }
    }

    /// Receives up to one message per slot of `slots`, without waiting. Returns the number of
    /// messages, which [`Headers::received`] describes.
    pub(super) fn receive(&mut self, socket: &Socket, slots: &mut [u8]) -> io::Result<usize> {
        self.receive_with(socket, slots, libc::MSG_DONTWAIT)
    }

    /// Receives like [`Headers::receive`], but waits for the receive timeout of the socket.
    pub(super) fn receive_waiting(
        &mut self,
        socket: &Socket,
        slots: &mut [u8],
    ) -> io::Result<usize> {
        self.receive_with(socket, slots, 0)
    }

    pub(super) fn receive_with(
        &mut self,
        socket: &Socket,
        slots: &mut [u8],
        flags: c_int,
    ) -> io::Result<usize> {
        let mut count = 0;
        for slot in slots.chunks_exact_mut(SLOT_BYTES).take(MESSAGES) {
            self.vectors[count] =
                libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: SLOT_BYTES };
            let header = &mut self.messages[count].msg_hdr;
            header.msg_name = (&raw mut self.addresses[count]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.vectors[count];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[count]).cast();
            header.msg_controllen = CONTROL as _;
            header.msg_flags = 0;
            count += 1;
        }
        // SAFETY: `count` headers were filled above; each points to one address, one vector and
        // one control buffer of `self`, and the vector to a slot of `slots`; all of them are
        // exclusively borrowed until the call returns.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.messages.as_mut_ptr(),
                count as c_uint,
                flags as _,
                ptr::null_mut(),
            )
        };
        if received == -1 { Err(io::Error::last_os_error()) } else { Ok(received as usize) }
    }

    /// Returns a message that was just received. `None` if it was truncated or has no sender.
    pub(super) fn received(&self, message: usize) -> Option<ReceivedMessage> {
        let received = &self.messages[message];
        if received.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return None;
        }
        let remote = read_address(&self.addresses[message])?;
        let (mut segment_size, mut local, mut traffic_class) = (0, None, 0);
        // SAFETY: the kernel has filled the control buffer that the header points to, which `self`
        // owns. The macros stay within `msg_controllen`, and each value has the type of its level
        // and kind, possibly unaligned.
        unsafe {
            let mut next = libc::CMSG_FIRSTHDR(&received.msg_hdr);
            while !next.is_null() {
                let data = libc::CMSG_DATA(next);
                match ((*next).cmsg_level, (*next).cmsg_type) {
                    (libc::SOL_UDP, UDP_GRO) => {
                        segment_size = ptr::read_unaligned(data.cast::<c_int>());
                    }
                    (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                        let info = ptr::read_unaligned(data.cast::<libc::in_pktinfo>());
                        let address = Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)).into();
                        local = Some(LocalAddress { address, interface: info.ipi_ifindex as u32 });
                    }
                    (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                        let info = ptr::read_unaligned(data.cast::<libc::in6_pktinfo>());
                        let address = Ipv6Addr::from(info.ipi6_addr.s6_addr).into();
                        local = Some(LocalAddress { address, interface: info.ipi6_ifindex as u32 });
                    }
                    (libc::IPPROTO_IP, libc::IP_TOS) => traffic_class = ptr::read(data),
                    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                        traffic_class = ptr::read_unaligned(data.cast::<c_int>()) as u8;
                    }
                    _ => {}
                }
                next = libc::CMSG_NXTHDR(&received.msg_hdr, next);
            }
        }
        let from = Path { local, ..Path::direct(remote) };
        Some(ReceivedMessage {
            from,
            len: received.msg_len as usize,
            segment_size: usize::try_from(segment_size).unwrap_or(0),
            traffic_class,
        })
    }

    /// Sends as many of the GSO batches as the kernel accepts, at most [`MESSAGES`]. Returns the
    /// number of GSO batches sent.
    pub(super) fn send(
        &mut self,
        socket: &Socket,
        bytes: &[u8],
        gso_batches: &[GsoBatch],
    ) -> io::Result<usize> {
        let mut count = 0;
        for gso in gso_batches.iter().take(MESSAGES) {
            let Some(datagrams) = bytes.get(gso.start..gso.start + gso.len) else {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            };
            self.vectors[count] = libc::iovec {
                iov_base: datagrams.as_ptr().cast_mut().cast(),
                iov_len: datagrams.len(),
            };
            let header = &mut self.messages[count].msg_hdr;
            header.msg_namelen = write_address(&mut self.addresses[count], gso.to.path.remote);
            header.msg_name = (&raw mut self.addresses[count]).cast();
            header.msg_iov = &raw mut self.vectors[count];
            header.msg_iovlen = 1;
            header.msg_flags = 0;
            let control = &mut self.controls[count];
            let mut used = 0;
            if gso.segments > 1 {
                let segment_size = (gso.segment_size.get() as u16).to_ne_bytes();
                used = control.put(used, libc::SOL_UDP, UDP_SEGMENT, &segment_size);
            }
            if let Some(local) = gso.to.path.local {
                used = control.put_local(used, local);
            }
            if gso.to.traffic_class != 0 {
                let v4 = gso.to.path.remote.is_ipv4();
                used = control.put_traffic_class(used, v4, gso.to.traffic_class);
            }
            header.msg_controllen = used as _;
            header.msg_control =
                if used == 0 { ptr::null_mut() } else { ptr::from_mut(control).cast() };
            count += 1;
        }
        // SAFETY: `count` headers were filled above; each points to parts of `self` and, to be
        // read only, of `bytes`, all of which live until the call returns.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.messages.as_mut_ptr(),
                count as c_uint,
                libc::MSG_DONTWAIT as _,
            )
        };
        if sent == -1 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
    }
}

/// Writes a socket address and returns its length.
fn write_address(to: &mut libc::sockaddr_storage, address: SocketAddr) -> libc::socklen_t {
    let address = SockAddr::from(address);
    // SAFETY: both are `sockaddr_storage`, as `SockAddr` promises.
    *to = unsafe { ptr::read(address.as_ptr().cast::<libc::sockaddr_storage>()) };
    address.len()
}

fn read_address(from: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let from = ptr::from_ref(from).cast::<c_void>();
    // SAFETY: the storage is large and aligned enough for either address, and its family says
    // which of them the kernel wrote.
    unsafe {
        match c_int::from((*from.cast::<libc::sockaddr>()).sa_family) {
            libc::AF_INET => {
                let v4 = &*from.cast::<libc::sockaddr_in>();
                let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
                Some(SocketAddr::new(ip.into(), u16::from_be(v4.sin_port)))
            }
            libc::AF_INET6 => {
                let v6 = &*from.cast::<libc::sockaddr_in6>();
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                // The flow label does not identify the sender.
                let port = u16::from_be(v6.sin6_port);
                Some(SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}
