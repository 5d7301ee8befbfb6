//! Reads one port of a bridge frame by frame: what a host sends, in order.

use std::io::{ErrorKind, Read};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use ipnet::IpNet;
use memchr::memmem::find;
use socket2::{Domain, Socket, Type};
use towline_netlink::Rtnetlink;

use super::frame::Outer;
use crate::lab::interrupt::wait_up_to;
use crate::lab::namespace::Namespace;

/// A packet socket on one link. Each frame is read once: two calls never see the same frame.
#[derive(Debug)]
pub struct Tap {
    socket: Socket,
}

/// Receive buffer in bytes, for what a host sends between two reads.
const BUFFER: usize = 4 << 20;
const FRAME_BYTES: usize = 65_536 + 14;

impl Tap {
    /// Opens a tap on the link `link` of `namespace`.
    pub fn open(namespace: &Namespace, link: &str) -> anyhow::Result<Self> {
        namespace.run(|| {
            let link = Rtnetlink::open()?.link_index(link)?;
            let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
            socket.set_nonblocking(true)?;
            // The kernel limits the buffer to what the machine allows.
            socket.set_recv_buffer_size(BUFFER)?;
            let address = libc::sockaddr_ll {
                sll_family: libc::AF_PACKET as u16,
                sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
                sll_ifindex: link.cast_signed(),
                sll_hatype: 0,
                sll_pkttype: 0,
                sll_halen: 0,
                sll_addr: [0; 8],
            };
            // SAFETY: the pointer and the length describe one sockaddr_ll.
            let bound = unsafe {
                libc::bind(
                    socket.as_raw_fd(),
                    (&raw const address).cast(),
                    size_of_val(&address) as libc::socklen_t,
                )
            };
            if bound == -1 {
                return Err(std::io::Error::last_os_error().into());
            }
            Ok(Self { socket })
        })
    }

    /// Passes frames to `each` until it returns a value, for at most `limit`.
    pub fn find<T>(
        &mut self,
        limit: Duration,
        mut each: impl FnMut(&[u8]) -> Option<T>,
    ) -> anyhow::Result<Option<T>> {
        let mut frame = vec![0; FRAME_BYTES];
        wait_up_to(limit, || {
            loop {
                match self.socket.read(&mut frame) {
                    Ok(length) => {
                        if let Some(found) = each(&frame[..length]) {
                            return Ok(Some(found));
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
            }
        })
    }

    /// Counts the frames that contain `mark`, or whose source or destination is in one of these
    /// networks, up to the frame that contains `last`. Returns `None` if that frame did not arrive
    /// within `limit`.
    pub fn in_clear(
        &mut self,
        mark: &[u8],
        networks: &[IpNet],
        last: &[u8],
        limit: Duration,
    ) -> anyhow::Result<Option<u32>> {
        let mut count = 0;
        self.find(limit, |frame| {
            let inside = |address: IpAddr| networks.iter().any(|net| net.contains(&address));
            let outer = Outer::parse(frame);
            let is_inner =
                outer.is_some_and(|outer| inside(outer.source) || inside(outer.destination));
            count += u32::from(is_inner || find(frame, mark).is_some());
            find(frame, last).map(|_| count)
        })
    }
}

/// Returns the payload of a UDP datagram in a frame, with its destination.
pub fn udp_payload(frame: &[u8]) -> Option<(IpAddr, &[u8])> {
    let outer = Outer::parse(frame)?;
    Some((outer.destination, outer.udp_payload?))
}
