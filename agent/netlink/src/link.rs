//! Reads and changes links, and creates veth pairs, bridges and overlay links.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use super::codec::{Message, Received, attributes, u32_at};
use super::{CREATE, NetlinkError, Rtnetlink};

/// Link as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Index of the link in its network namespace.
    pub index: u32,
    /// Name of the link, such as `eth0`.
    pub name: String,
    /// Kind of the driver (`bridge`, `veth`, `tun`, `wireguard`...); `None` for hardware.
    pub kind: Option<String>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Index of the bridge or bond that the link belongs to.
    pub master: Option<u32>,
    /// Whether the link is administratively up (`IFF_UP`).
    pub up: bool,
    /// Whether the link is up and has a carrier.
    pub running: bool,
    /// Whether the link is a loopback.
    pub loopback: bool,
    /// Whether the link is point-to-point, such as a tunnel (`IFF_POINTOPOINT`).
    pub point_to_point: bool,
    /// Greatest number of packets in the transmit queue.
    pub queue_length: u32,
    /// UDP port on which a VXLAN or Geneve link receives; `None` for other kinds.
    pub tunnel_port: Option<u16>,
    /// IPv4 `rp_filter` of the link: 0 off, 1 strict, 2 loose; `None` if the kernel does not report it.
    pub reverse_path_filter: Option<u32>,
    /// Whether `disable_ipv6` is set on the link, so that the kernel refuses IPv6 addresses and routes.
    /// `None` if the kernel does not report it, as with an MTU below 1280, with which it runs no IPv6
    /// on the link.
    pub ipv6_disabled: Option<bool>,
    /// Properties of a TUN link; `None` for other kinds.
    pub tun: Option<TunInfo>,
}

/// Properties of a TUN link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunInfo {
    /// User id that may attach to the link without privileges; `None` if every user may.
    pub owner: Option<u32>,
    /// Number of attached queues. The kernel reports it only for a multi-queue link; otherwise 0.
    pub queues: u32,
}

/// Other end of a veth pair.
#[derive(Debug, Clone, Copy)]
pub struct VethPeer<'a> {
    /// Name of the link at the other end.
    pub name: &'a str,
    /// Network namespace of the other end; `None` for the namespace of the first end.
    pub namespace: Option<BorrowedFd<'a>>,
}

/// Parameters of an overlay link, which carries Ethernet frames over UDP.
#[derive(Debug, Clone, Copy)]
pub struct Overlay {
    /// Encapsulation of the frames.
    pub kind: OverlayKind,
    /// Number of the overlay network (VNI).
    pub id: u32,
    /// Address that all frames are sent to.
    pub remote: IpAddr,
    /// Destination UDP port.
    pub port: u16,
}

/// Encapsulation of an [`Overlay`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayKind {
    /// VXLAN (RFC 7348).
    Vxlan,
    /// Geneve (RFC 8926).
    Geneve,
}

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_TXQLEN: u16 = 13;
const IFLA_LINKINFO: u16 = 18;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_GSO_MAX_SEGS: u16 = 40;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
/// Attribute with the settings `net.ipv4.conf.LINK`, inside `IFLA_AF_SPEC` and `AF_INET`
/// (`linux/if_link.h`). The kernel sends an array of 32-bit numbers, and accepts one attribute per
/// setting.
const IFLA_INET_CONF: u16 = 1;
/// Number of `rp_filter` among the IPv4 settings, counted from 1 (`linux/ip.h`).
const IPV4_DEVCONF_RP_FILTER: u16 = 8;
/// Number of `src_valid_mark` among the IPv4 settings, counted from 1.
const IPV4_DEVCONF_SRC_VMARK: u16 = 24;
/// Attribute with the settings `net.ipv6.conf.LINK`, inside `IFLA_AF_SPEC` and `AF_INET6`
/// (`linux/if_link.h`): an array of 32-bit numbers.
const IFLA_INET6_CONF: u16 = 2;
/// Index of `disable_ipv6` among the IPv6 settings, counted from 0 (`linux/ipv6.h`).
const DEVCONF_DISABLE_IPV6: usize = 26;
const IFLA_TUN_OWNER: u16 = 1;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;
const VETH_INFO_PEER: u16 = 1;
const VXLAN_PORT: u16 = 15;
const GENEVE_PORT: u16 = 5;
/// Length in bytes of `struct ifinfomsg`.
pub(super) const LINK_HEADER: usize = 16;

impl Rtnetlink {
    /// Returns all links of the namespace.
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let request = Message::new(libc::RTM_GETLINK, 0, &header(0, 0, 0));
        self.connection.dump("list links", &request, |received| parse(&received))
    }

    /// Returns the link with this name, or `None` if it does not exist.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut request = Message::new(libc::RTM_GETLINK, 0, &header(0, 0, 0));
        request.string(IFLA_IFNAME, name);
        let found = self.connection.get(|| format!("look up link {name}"), request, |r| parse(&r));
        match found {
            Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(None),
            other => other,
        }
    }

    /// Returns the index of the link with this name.
    pub fn link_index(&mut self, name: &str) -> Result<u32, NetlinkError> {
        let link = self.link(name)?.ok_or_else(|| NetlinkError::NoLink(name.to_owned()))?;
        Ok(link.index)
    }

    /// Creates a veth pair: `name` in this namespace, its peer in this or another namespace. Both ends
    /// are down.
    pub fn add_veth(&mut self, name: &str, peer: VethPeer<'_>) -> Result<(), NetlinkError> {
        let mut request = Message::new(libc::RTM_NEWLINK, CREATE, &header(0, 0, 0));
        request.string(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |data| {
                data.nest(VETH_INFO_PEER, |other| {
                    other.raw(&header(0, 0, 0)).string(IFLA_IFNAME, peer.name);
                    if let Some(namespace) = peer.namespace {
                        other.u32(IFLA_NET_NS_FD, namespace.as_raw_fd() as u32);
                    }
                });
            });
        });
        let what = || format!("create the veth pair {name} and {}", peer.name);
        self.connection.request(what, request)
    }

    /// Creates a bridge without spanning tree. It is down.
    pub fn add_bridge(&mut self, name: &str) -> Result<(), NetlinkError> {
        let mut request = Message::new(libc::RTM_NEWLINK, CREATE, &header(0, 0, 0));
        request.string(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, "bridge");
        });
        self.connection.request(|| format!("create the bridge {name}"), request)
    }

    /// Creates a VXLAN or Geneve link. It is down.
    pub fn add_overlay(&mut self, name: &str, overlay: Overlay) -> Result<(), NetlinkError> {
        let Overlay { kind, id, remote, port } = overlay;
        // Attribute kinds: network number, remote address (IPv4, IPv6), port.
        let (kind, id_key, remote_keys, port_key) = match kind {
            OverlayKind::Vxlan => ("vxlan", 1, (2, 16), VXLAN_PORT),
            OverlayKind::Geneve => ("geneve", 1, (2, 7), GENEVE_PORT),
        };
        let remote_key = if remote.is_ipv4() { remote_keys.0 } else { remote_keys.1 };
        let mut request = Message::new(libc::RTM_NEWLINK, CREATE, &header(0, 0, 0));
        request.string(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, kind).nest(IFLA_INFO_DATA, |data| {
                data.u32(id_key, id).ip(remote_key, remote).bytes(port_key, &port.to_be_bytes());
            });
        });
        self.connection.request(|| format!("create the {kind} link {name}"), request)
    }

    /// Sets a link up or down.
    pub fn set_up(&mut self, index: u32, up: bool) -> Result<(), NetlinkError> {
        const IFF_UP: u32 = libc::IFF_UP as u32;
        let request =
            Message::new(libc::RTM_NEWLINK, 0, &header(index, if up { IFF_UP } else { 0 }, IFF_UP));
        let state = if up { "up" } else { "down" };
        self.connection.request(|| format!("set link {index} {state}"), request)
    }

    /// Sets the MTU, in bytes.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), NetlinkError> {
        self.change(
            index,
            || format!("set the MTU of link {index} to {mtu}"),
            |request| {
                request.u32(IFLA_MTU, mtu);
            },
        )
    }

    /// Sets `net.ipv4.conf.LINK.rp_filter`. Works also where `/proc/sys` is read-only.
    pub fn set_reverse_path_filter(&mut self, index: u32, mode: u32) -> Result<(), NetlinkError> {
        self.change(
            index,
            || format!("set rp_filter of link {index} to {mode}"),
            |request| {
                request.nest(IFLA_AF_SPEC, |families| {
                    families.nest(libc::AF_INET as u16, |settings| {
                        settings.nest(IFLA_INET_CONF, |values| {
                            values.u32(IPV4_DEVCONF_RP_FILTER, mode);
                        });
                    });
                });
            },
        )
    }

    /// Sets the hardware address. A bridge without an address of its own takes the lowest one of its
    /// ports, which may change when a port is added.
    pub fn set_hardware_address(
        &mut self,
        index: u32,
        address: [u8; 6],
    ) -> Result<(), NetlinkError> {
        self.change(
            index,
            || format!("set the hardware address of link {index}"),
            |request| {
                request.bytes(IFLA_ADDRESS, &address);
            },
        )
    }

    /// Adds a link to a bridge or bond, or removes it from there (`None`).
    pub fn set_master(&mut self, index: u32, master: Option<u32>) -> Result<(), NetlinkError> {
        self.change(
            index,
            || format!("set the master of link {index}"),
            |request| {
                request.u32(IFLA_MASTER, master.unwrap_or(0));
            },
        )
    }

    /// Renames a link.
    pub fn rename(&mut self, index: u32, name: &str) -> Result<(), NetlinkError> {
        self.change(
            index,
            || format!("rename link {index} to {name}"),
            |request| {
                request.string(IFLA_IFNAME, name);
            },
        )
    }

    /// Moves a link into another network namespace, where it is down and without addresses.
    pub fn move_link(&mut self, index: u32, namespace: BorrowedFd<'_>) -> Result<(), NetlinkError> {
        self.change(
            index,
            || format!("move link {index} to another namespace"),
            |request| {
                request.u32(IFLA_NET_NS_FD, namespace.as_raw_fd() as u32);
            },
        )
    }

    /// Limits the number of segments of a GSO packet; 1 disables segmentation offload on the link.
    pub fn set_gso_max_segs(&mut self, index: u32, segments: u32) -> Result<(), NetlinkError> {
        self.change(
            index,
            || format!("set gso_max_segs of link {index}"),
            |request| {
                request.u32(IFLA_GSO_MAX_SEGS, segments);
            },
        )
    }

    /// Sets `net.ipv4.conf.LINK.src_valid_mark`: whether the reverse path filter looks up a packet's
    /// return route with the packet's mark.
    pub fn set_source_valid_mark(&mut self, index: u32, on: bool) -> Result<(), NetlinkError> {
        self.change(
            index,
            || format!("set src_valid_mark of link {index}"),
            |request| {
                request.nest(IFLA_AF_SPEC, |families| {
                    families.nest(libc::AF_INET as u16, |inet| {
                        inet.nest(IFLA_INET_CONF, |settings| {
                            settings.u32(IPV4_DEVCONF_SRC_VMARK, u32::from(on));
                        });
                    });
                });
            },
        )
    }

    /// Sets the greatest number of packets in the transmit queue.
    pub fn set_queue_length(&mut self, index: u32, packets: u32) -> Result<(), NetlinkError> {
        self.change(
            index,
            || format!("set the queue length of link {index}"),
            |request| {
                request.u32(IFLA_TXQLEN, packets);
            },
        )
    }

    /// Deletes a link. For one end of a veth pair, the kernel deletes the other end too.
    pub fn delete_link(&mut self, index: u32) -> Result<(), NetlinkError> {
        let request = Message::new(libc::RTM_DELLINK, 0, &header(index, 0, 0));
        self.connection.request(|| format!("delete link {index}"), request)
    }

    fn change(
        &mut self,
        index: u32,
        what: impl FnOnce() -> String,
        fill: impl FnOnce(&mut Message),
    ) -> Result<(), NetlinkError> {
        let mut request = Message::new(libc::RTM_NEWLINK, 0, &header(index, 0, 0));
        fill(&mut request);
        self.connection.request(what, request)
    }
}

/// Encodes `struct ifinfomsg`: family, padding, type, index, flags, change mask.
fn header(index: u32, flags: u32, change: u32) -> [u8; LINK_HEADER] {
    let mut header = [0; LINK_HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

/// Parses a message of a dump. Returns `None` unless it describes a link.
pub fn parse(received: &Received<'_>) -> Option<Link> {
    if received.kind != libc::RTM_NEWLINK {
        return None;
    }
    let flags = u32_at(received.payload, 8)? as i32;
    let mut link = Link {
        index: u32_at(received.payload, 4)?,
        name: String::new(),
        kind: None,
        mtu: 0,
        master: None,
        up: flags & libc::IFF_UP != 0,
        running: flags & libc::IFF_LOWER_UP != 0 && flags & libc::IFF_UP != 0,
        loopback: flags & libc::IFF_LOOPBACK != 0,
        point_to_point: flags & libc::IFF_POINTOPOINT != 0,
        queue_length: 0,
        tunnel_port: None,
        reverse_path_filter: None,
        ipv6_disabled: None,
        tun: None,
    };
    for attribute in attributes(received.payload, LINK_HEADER) {
        match attribute.kind {
            IFLA_IFNAME => link.name = attribute.string(),
            IFLA_MTU => link.mtu = attribute.u32()?,
            IFLA_MASTER => link.master = attribute.u32(),
            IFLA_TXQLEN => link.queue_length = attribute.u32()?,
            IFLA_AF_SPEC => {
                let setting = |family: libc::c_int, settings: u16, place: usize| {
                    let family = attribute.nested().find(|inner| inner.kind == family as u16)?;
                    let values = family.nested().find(|inner| inner.kind == settings)?;
                    u32_at(values.value, place * size_of::<u32>())
                };
                let filter = usize::from(IPV4_DEVCONF_RP_FILTER - 1);
                link.reverse_path_filter = setting(libc::AF_INET, IFLA_INET_CONF, filter);
                let disabled = setting(libc::AF_INET6, IFLA_INET6_CONF, DEVCONF_DISABLE_IPV6);
                link.ipv6_disabled = disabled.map(|value| value != 0);
            }
            IFLA_LINKINFO => {
                let info = |kind| attribute.nested().find(|inner| inner.kind == kind);
                link.kind = info(IFLA_INFO_KIND).map(|kind| kind.string());
                link.tun = (link.kind.as_deref() == Some("tun")).then(|| {
                    let value = |kind| {
                        let data = info(IFLA_INFO_DATA)?;
                        data.nested().find(|inner| inner.kind == kind)?.u32()
                    };
                    let queues = [IFLA_TUN_NUM_QUEUES, IFLA_TUN_NUM_DISABLED_QUEUES];
                    let queues = queues.into_iter().filter_map(value).sum();
                    TunInfo { owner: value(IFLA_TUN_OWNER), queues }
                });
                let port = match link.kind.as_deref() {
                    Some("vxlan") => Some(VXLAN_PORT),
                    Some("geneve") => Some(GENEVE_PORT),
                    _ => None,
                };
                link.tunnel_port = port.zip(info(IFLA_INFO_DATA)).and_then(|(port, data)| {
                    let port = data.nested().find(|inner| inner.kind == port)?;
                    Some(u16::from_be_bytes(*port.value.first_chunk()?))
                });
            }
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_netns::{NetworkNamespace, add_link, namespace_test};

    namespace_test! {
        fn a_veth_pair_reaches_into_another_namespace() {
            let other = NetworkNamespace::new();
            let mut here = Rtnetlink::open().unwrap();
            here.add_veth("near", VethPeer { name: "far", namespace: Some(other.as_fd()) })
                .unwrap();
            let near = here.link("near").unwrap().unwrap();
            assert_eq!((near.kind.as_deref(), near.up), (Some("veth"), false));
            here.set_up(near.index, true).unwrap();
            here.set_mtu(near.index, 1_400).unwrap();
            here.set_gso_max_segs(near.index, 1).unwrap();
            other.enter(|| {
                let mut there = Rtnetlink::open().unwrap();
                let far = there.link_index("far").unwrap();
                there.set_up(far, true).unwrap();
                there.rename(far, "eth0").expect("links can be renamed while up, or the test fails");
            });
            let near = here.link("near").unwrap().unwrap();
            assert!(near.up && near.running);
            assert_eq!(near.mtu, 1_400);
            here.delete_link(near.index).unwrap();
            assert_eq!(here.link("near").unwrap(), None);
            other.enter(|| {
                assert_eq!(Rtnetlink::open().unwrap().link("eth0").unwrap(), None);
            });
        }
    }

    namespace_test! {
        fn the_reverse_path_filter_is_what_the_setting_says() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let index = add_link("d0");
            let path = "/proc/sys/net/ipv4/conf/d0/rp_filter";
            for mode in [1, 2, 0] {
                rtnetlink.set_reverse_path_filter(index, mode).unwrap();
                assert_eq!(std::fs::read_to_string(path).unwrap().trim(), mode.to_string());
                let link = rtnetlink.link("d0").unwrap().unwrap();
                assert_eq!(link.reverse_path_filter, Some(mode));
            }
        }
    }

    namespace_test! {
        fn a_link_says_whether_ipv6_is_disabled_on_it() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            add_link("d0");
            for disabled in [true, false, true] {
                let value = if disabled { "1" } else { "0" };
                std::fs::write("/proc/sys/net/ipv6/conf/d0/disable_ipv6", value).unwrap();
                let link = rtnetlink.link("d0").unwrap().unwrap();
                assert_eq!(link.ipv6_disabled, Some(disabled));
            }
        }
    }

    namespace_test! {
        fn the_filter_of_reverse_paths_is_told_to_look_at_marks() {
            let link = add_link("eth0");
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let path = "/proc/sys/net/ipv4/conf/eth0/src_valid_mark";
            for on in [true, false] {
                rtnetlink.set_source_valid_mark(link, on).unwrap();
                let read = std::fs::read_to_string(path).unwrap();
                assert_eq!(read.trim(), if on { "1" } else { "0" });
            }
        }
    }

    namespace_test! {
        fn the_port_of_a_tunnel_is_known() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let remote = "192.0.2.2".parse().unwrap();
            for (name, kind, port) in
                [("vx", OverlayKind::Vxlan, 8_472), ("gnv", OverlayKind::Geneve, 6_082)]
            {
                match rtnetlink.add_overlay(name, Overlay { kind, id: 7, remote, port }) {
                    Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => {
                        println!("skipped: this kernel has no {kind:?}");
                    }
                    made => {
                        made.unwrap();
                        let link = rtnetlink.link(name).unwrap().unwrap();
                        assert_eq!(link.tunnel_port, Some(port));
                    }
                }
            }
            assert_eq!(rtnetlink.link("lo").unwrap().unwrap().tunnel_port, None);
        }
    }

    namespace_test! {
        fn bridges_take_links_and_give_them_back() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            rtnetlink.add_bridge("br0").unwrap();
            let port = add_link("d0");
            let bridge = rtnetlink.link_index("br0").unwrap();
            rtnetlink.set_master(port, Some(bridge)).unwrap();
            assert_eq!(rtnetlink.link("d0").unwrap().unwrap().master, Some(bridge));
            rtnetlink.set_master(port, None).unwrap();
            assert_eq!(rtnetlink.link("d0").unwrap().unwrap().master, None);
            let names: Vec<_> =
                rtnetlink.links().unwrap().into_iter().map(|link| link.name).collect();
            assert!(names.contains(&"lo".to_owned()) && names.contains(&"br0".to_owned()));
        }
    }

    namespace_test! {
        fn a_refusal_says_what_and_why() {
            let mut rtnetlink = Rtnetlink::open().unwrap();
            rtnetlink.add_bridge("br0").unwrap();
            let error = rtnetlink.add_bridge("br0").unwrap_err();
            assert_eq!(error.errno(), Some(Errno::EEXIST));
            assert!(error.to_string().starts_with("cannot create the bridge br0: "), "{error}");
            let error = rtnetlink.link_index("nowhere").unwrap_err();
            assert_eq!(error.to_string(), "there is no link nowhere");
        }
    }
}
