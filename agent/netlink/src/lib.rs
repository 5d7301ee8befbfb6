//! Synchronous netlink transport, and typed operations on links, addresses, routes and rules.
//!
//! This package knows nothing of Towline. It runs no program.
//!
//! # Contract
//!
//! - A socket belongs to the network namespace of the thread that opened it, and stays there.
//! - A call blocks only while the kernel handles the request. No call waits for a network event.
//! - Links and routes of other programs never make a call fail: unknown attributes and kinds are
//!   skipped. For that reason messages are read and written attribute by attribute ([`codec`]), not
//!   through types that must know all attributes.
//! - An error names the failed request, and contains the kernel's message if there is one.

#![deny(clippy::indexing_slicing)]

mod address;
pub mod codec;
mod connection;
mod error;
#[doc(hidden)]
pub mod internals;
mod link;
mod monitor;
mod route;
mod rule;
mod socket_owner;
mod stand_in;
mod traffic_control;

use std::net::IpAddr;

pub use address::{Address, AddressFlags, AddressOptions};
pub use connection::{Connection, Failure, Protocol};
pub use error::{NetlinkError, Refusal};
pub use link::{Link, Overlay, OverlayKind, TunInfo, VethPeer};
pub use monitor::{Group, Monitor, Notified};
pub use route::{MAIN_TABLE, MainTables, NextHop, Route, RouteChange, RouteKind, RouteLookup};
pub use rule::{Rule, RuleAction};
pub use socket_owner::SocketOwners;
pub use traffic_control::QueueingDiscipline;

/// Address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both address families, IPv4 first.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Returns `AF_INET` or `AF_INET6`.
    pub fn number(self) -> u8 {
        match self {
            Self::V4 => libc::AF_INET as u8,
            Self::V6 => libc::AF_INET6 as u8,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.number() == number)
    }
}

/// Connection to the kernel for links, addresses, routes and rules of one network namespace.
#[derive(Debug)]
pub struct Rtnetlink {
    connection: Connection,
}

impl Rtnetlink {
    /// See [`Connection::shrink_buffers`].
    #[doc(hidden)]
    pub fn shrink_buffers(&mut self, bytes: usize) {
        self.connection.shrink_buffers(bytes);
    }

    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self { connection: Connection::open(Protocol::Route)? })
    }

    /// See [`Connection::port`].
    pub fn port(&self) -> u32 {
        self.connection.port()
    }

    /// Returns true if the kernel supports sockets of a family. With `ipv6.disable=1` it supports none
    /// for IPv6. Every error except `EAFNOSUPPORT` counts as support.
    pub fn has_sockets(&self, family: Family) -> bool {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        if self.connection.lacks(family) {
            return false;
        }
        let domain = match family {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        let opened = socket(domain, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        !matches!(opened, Err(nix::errno::Errno::EAFNOSUPPORT))
    }

    /// See [`Connection::lack_ipv6`].
    #[doc(hidden)]
    pub fn lack_ipv6(&mut self) {
        self.connection.lack_ipv6();
    }
}

/// Request flags: create an object that must not exist yet.
const CREATE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
/// Request flags: create an object, or replace the existing one.
const CREATE_OR_REPLACE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
