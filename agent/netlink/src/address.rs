//! Reads, adds and deletes addresses of links.

use ipnet::IpNet;
use nix::errno::Errno;

use super::codec::{Message, Received, attributes, u32_at};
use super::{CREATE_OR_REPLACE, Family, NetlinkError, Rtnetlink};

/// Address of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Index of the link.
    pub index: u32,
    /// Address with its prefix length; host bits are kept.
    pub prefix: IpNet,
    /// Flags of the address.
    pub flags: AddressFlags,
    /// Scope (`RT_SCOPE_*`): 0 is global, 253 the link, 254 the host.
    pub scope: u8,
}

/// Flags of an address (`IFA_F_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AddressFlags(pub u32);

impl AddressFlags {
    /// Returns true for a temporary IPv6 address (RFC 8981), and for a secondary IPv4 address (not the
    /// first one of its network on the link).
    pub fn temporary(self) -> bool {
        self.0 & libc::IFA_F_TEMPORARY != 0
    }

    /// Returns true if duplicate address detection is not complete, or found a duplicate.
    pub fn tentative(self) -> bool {
        self.0 & (libc::IFA_F_TENTATIVE | libc::IFA_F_DADFAILED) != 0
            && self.0 & libc::IFA_F_OPTIMISTIC == 0
    }

    /// Returns true if the address must not be used for new connections (RFC 4862 section 5.5.4).
    pub fn deprecated(self) -> bool {
        self.0 & libc::IFA_F_DEPRECATED != 0
    }

    /// Returns true if the address has no lifetime, unlike a lease.
    pub fn permanent(self) -> bool {
        self.0 & libc::IFA_F_PERMANENT != 0
    }

    /// Returns true if the kernel added no route for the address's network.
    pub fn no_prefix_route(self) -> bool {
        self.0 & IFA_F_NOPREFIXROUTE != 0
    }
}

/// Options for adding an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AddressOptions {
    /// Whether to skip duplicate address detection, so that an IPv6 address is usable at once.
    pub no_dad: bool,
    /// Whether to add no route for the address's network.
    pub no_prefix_route: bool,
}

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
/// Length in bytes of `struct ifaddrmsg`.
pub(super) const ADDRESS_HEADER: usize = 8;

impl Rtnetlink {
    /// Adds an address. If it exists already, the kernel updates its options.
    pub fn add_address(
        &mut self,
        index: u32,
        prefix: IpNet,
        options: AddressOptions,
    ) -> Result<(), NetlinkError> {
        let mut flags = 0;
        if options.no_dad && matches!(prefix, IpNet::V6(_)) {
            flags |= libc::IFA_F_NODAD;
        }
        if options.no_prefix_route {
            flags |= IFA_F_NOPREFIXROUTE;
        }
        let mut request = message(libc::RTM_NEWADDR, CREATE_OR_REPLACE, index, prefix);
        request.u32(IFA_FLAGS, flags);
        self.connection.request(|| format!("add address {prefix} to link {index}"), request)
    }

    /// Deletes an address from a link.
    pub fn delete_address(&mut self, index: u32, prefix: IpNet) -> Result<(), NetlinkError> {
        let request = message(libc::RTM_DELADDR, 0, index, prefix);
        self.connection.request(|| format!("delete address {prefix} of link {index}"), request)
    }

    /// Returns the addresses of one link, or of all links for `None`. A link that does not exist has no
    /// addresses.
    pub fn addresses(&mut self, index: Option<u32>) -> Result<Vec<Address>, NetlinkError> {
        let request = Message::new(
            libc::RTM_GETADDR,
            0,
            &header(libc::AF_UNSPEC as u8, 0, index.unwrap_or(0)),
        );
        let listed = self.connection.dump("list addresses", &request, |received| {
            parse(&received).filter(|address| index.is_none_or(|index| index == address.index))
        });
        match listed {
            Err(error) if index.is_some() && error.errno() == Some(Errno::ENODEV) => Ok(Vec::new()),
            listed => listed,
        }
    }
}

fn message(kind: u16, flags: u16, index: u32, prefix: IpNet) -> Message {
    let family = Family::of(prefix.addr()).number();
    let mut message = Message::new(kind, flags, &header(family, prefix.prefix_len(), index));
    message.ip(IFA_LOCAL, prefix.addr()).ip(IFA_ADDRESS, prefix.addr());
    message
}

/// Encodes `struct ifaddrmsg`: family, prefix length, flags, scope, index.
fn header(family: u8, prefix_length: u8, index: u32) -> [u8; ADDRESS_HEADER] {
    let mut header = [0; ADDRESS_HEADER];
    header[0] = family;
    header[1] = prefix_length;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}

/// Parses a message of a dump. Returns `None` unless it describes an address.
pub fn parse(received: &Received<'_>) -> Option<Address> {
    if received.kind != libc::RTM_NEWADDR {
        return None;
    }
    let [_, length, flags, scope] = received.payload.first_chunk::<4>()?;
    let mut flags = u32::from(*flags);
    let (mut local, mut address) = (None, None);
    for attribute in attributes(received.payload, ADDRESS_HEADER) {
        match attribute.kind {
            IFA_LOCAL => local = attribute.ip(),
            IFA_ADDRESS => address = attribute.ip(),
            IFA_FLAGS => flags = attribute.u32()?,
            _ => {}
        }
    }
    Some(Address {
        index: u32_at(received.payload, 4)?,
        // On a point-to-point link, IFA_ADDRESS is the address of the other end.
        prefix: IpNet::new(local.or(address)?, *length).ok()?,
        flags: AddressFlags(flags),
        scope: *scope,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_netns::{add_link, namespace_test};

    namespace_test! {
        fn addresses_come_and_go() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
        let index = add_link("d0");
            let options = AddressOptions { no_dad: true, no_prefix_route: true };
            let prefixes: [IpNet; 2] =
                ["198.19.0.7/16".parse().unwrap(), "fd00::7/64".parse().unwrap()];
            for prefix in prefixes {
                rtnetlink.add_address(index, prefix, options).unwrap();
                rtnetlink.add_address(index, prefix, options).unwrap();
            }
            let mut listed = rtnetlink.addresses(Some(index)).unwrap();
            listed.retain(|address| prefixes.contains(&address.prefix));
            assert_eq!(listed.len(), 2);
            for address in &listed {
                assert!(address.flags.no_prefix_route());
                assert!(!address.flags.tentative());
            }
            for prefix in prefixes {
                rtnetlink.delete_address(index, prefix).unwrap();
            }
            let left = rtnetlink.addresses(Some(index)).unwrap();
            assert!(!left.iter().any(|address| prefixes.contains(&address.prefix)));
            // The link may vanish at any moment, with its addresses.
            rtnetlink.delete_link(index).unwrap();
            assert_eq!(rtnetlink.addresses(Some(index)).unwrap(), []);
        }
    }
}
