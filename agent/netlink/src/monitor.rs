//! Multicast notifications of the kernel about changes.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use netlink_sys::Socket;

use super::codec::{Received, messages};
use super::connection::{enlarge_buffers, failed, receive};
use super::{NetlinkError, Protocol};

/// Multicast group of notifications.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// Links of any kind.
    Links,
    /// IPv4 addresses.
    AddressesV4,
    /// IPv6 addresses.
    AddressesV6,
    /// IPv4 routes.
    RoutesV4,
    /// IPv6 routes.
    RoutesV6,
    /// IPv4 policy rules.
    RulesV4,
    /// IPv6 policy rules.
    RulesV6,
    /// nftables objects (protocol [`Protocol::Netfilter`]).
    Nftables,
}

impl Group {
    fn number(self) -> u32 {
        match self {
            Self::Links => 1,
            Self::AddressesV4 => 5,
            Self::RoutesV4 => 7,
            Self::RulesV4 => 8,
            Self::AddressesV6 => 9,
            Self::RoutesV6 => 11,
            Self::RulesV6 => 19,
            Self::Nftables => 7,
        }
    }
}

/// Result of reading the queued notifications.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notified {
    /// All notifications were read.
    Complete,
    /// The kernel dropped notifications: anything may have changed.
    Overrun,
}

/// Non-blocking socket that receives notifications about the network namespace of the thread that
/// opened it.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

/// Size in bytes of the buffer for one datagram. The longest notifications are batches of nftables set
/// elements.
const NOTIFICATION_BYTES: usize = 128 << 10;

impl Monitor {
    /// Subscribes to multicast groups of one protocol. [`Group::Nftables`] is the only group of
    /// [`Protocol::Netfilter`].
    pub fn open(protocol: Protocol, groups: &[Group]) -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(protocol.number()).map_err(failed("open"))?;
        socket.bind_auto().map_err(failed("bind"))?;
        socket.set_non_blocking(true).map_err(failed("configure"))?;
        enlarge_buffers(socket.as_fd());
        for group in groups {
            socket.add_membership(group.number()).map_err(failed("subscribe"))?;
        }
        Ok(Self { socket, buffer: vec![0; NOTIFICATION_BYTES] })
    }

    /// Passes every queued notification to `take`. Never blocks.
    pub fn drain(&mut self, mut take: impl FnMut(Received<'_>)) -> Result<Notified, NetlinkError> {
        let mut notified = Notified::Complete;
        loop {
            match receive(&self.socket, &mut self.buffer, 0) {
                Ok(Some(length)) => {
                    let received = self.buffer.get(..length).unwrap_or_default();
                    messages(received).for_each(&mut take);
                }
                Ok(None) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Ok(notified);
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    notified = Notified::Overrun;
                }
                Err(error) => return Err(failed("receive")(error)),
            }
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rtnetlink;
    use towline_netns::namespace_test;

    namespace_test! {
        fn changes_are_heard_of() {
            let mut monitor = Monitor::open(Protocol::Route, &[Group::Links]).unwrap();
            let mut count = 0;
            assert_eq!(monitor.drain(|_| count += 1).unwrap(), Notified::Complete);
            assert_eq!(count, 0);
            // Notifications are queued before the request returns.
            Rtnetlink::open().unwrap().add_bridge("br0").unwrap();
            monitor.drain(|received| count += usize::from(received.kind == libc::RTM_NEWLINK)).unwrap();
            assert!(count >= 1);
        }
    }
}
