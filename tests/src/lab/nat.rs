//! NAT and firewall rules of routers, as nftables, installed with the module that the agent uses.
//!
//! The classes are those of RFC 4787, under their older names. IPv6 is filtered in the same way and
//! not translated.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;
use towline_netlink::Family;
use towline_nftables::{
    Chain, ChainKind, CtState, Hook, KeyType, Nft, Rule, Set, Table, TableFamily,
};

/// The NAT or firewall class of a router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nat {
    /// The behaviour of most home and datacenter routers, and of Linux's masquerade: IPv4 leaves
    /// from the router's address, from the same port for every destination while it is free, and
    /// only answers come in (RFC 4787: address- and port-dependent filtering).
    #[serde(rename = "port-restricted")]
    Masquerade,
    /// A Linux machine with one masquerade rule and no filter: what arrives for its own address is not
    /// dropped, so that a peer's first probe creates a conntrack entry that takes the port.
    Unfiltered,
    /// The mapping of [`Nat::Masquerade`]; every remote endpoint may send to [`PORT`].
    FullCone,
    /// The mapping of [`Nat::Masquerade`]; a remote address that was sent to may answer from any port.
    AddressRestricted,
    /// A different external port for each destination; only answers come in.
    Symmetric,
    /// As [`Nat::Symmetric`], with random external ports.
    SymmetricRandom,
    /// A firewall: as [`Nat::Masquerade`], but UDP is dropped in both directions.
    UdpBlocked,
}

/// UDP port of the inside host to which the classes apply.
pub const PORT: u16 = 51830;

/// Name of the nftables table with the rules.
pub const TABLE: &str = "lab";
/// nftables priority before routing, at which the destination is translated.
const TRANSLATE_DESTINATION: i32 = -100;
/// nftables priority after connection tracking.
const FILTER: i32 = 0;
const TRANSLATE_SOURCE: i32 = 100;
const SEEN: [(Family, &str); 2] = [(Family::V4, "seen4"), (Family::V6, "seen6")];

/// Installs the rules in the calling thread's namespace. `uplink` leads to the internet; `inside`
/// are the addresses of the host to which the class applies.
pub fn install(nat: Nat, uplink: &str, inside: [IpAddr; 2]) -> anyhow::Result<()> {
    let answers =
        Rule::new().input(uplink).ct_state(CtState::ESTABLISHED | CtState::RELATED).accept();
    let unsolicited = Rule::new().input(uplink).drop();
    let ping = |protocol| Rule::new().protocol(protocol).accept();
    let udp = libc::IPPROTO_UDP as u8;
    let leaving = Rule::new().family(Family::V4).output(uplink);
    let mut translate = Chain::base(ChainKind::Nat, Hook::Postrouting, TRANSLATE_SOURCE);
    translate = match nat {
        Nat::Symmetric | Nat::SymmetricRandom => translate
            .rule(leaving.clone().protocol(udp).masquerade_random())
            .rule(leaving.masquerade()),
        _ => translate.rule(leaving.masquerade()),
    };
    let mut table = Table::new(TableFamily::Inet, TABLE).chain("translate", translate);
    if nat == Nat::Unfiltered {
        Nft::open()?.load(&table)?;
        return Ok(());
    }
    let mut forward = Chain::base(ChainKind::Filter, Hook::Forward, FILTER);
    match nat {
        Nat::Masquerade | Nat::Unfiltered | Nat::Symmetric | Nat::SymmetricRandom => {}
        Nat::UdpBlocked => {
            forward = forward
                .rule(Rule::new().output(uplink).protocol(udp).drop())
                .rule(Rule::new().input(uplink).protocol(udp).drop());
        }
        Nat::FullCone | Nat::AddressRestricted => {
            let mut enter = Chain::base(ChainKind::Nat, Hook::Prerouting, TRANSLATE_DESTINATION);
            for (family, set) in SEEN {
                let key = if family == Family::V4 { KeyType::Ipv4 } else { KeyType::Ipv6 };
                table = table.set(set, Set::dynamic(key));
                forward = forward.rule(
                    Rule::new().output(uplink).protocol(udp).remember_destination(family, set),
                );
            }
            let known = |rule: Rule, (family, set): (Family, &str)| match nat {
                Nat::AddressRestricted => rule.source_in(family, set),
                _ => rule.family(family),
            };
            let knock = |rule: Rule| rule.protocol(udp).destination_port(PORT);
            let outside = || Rule::new().input(uplink);
            let [v4, _] = inside;
            enter = enter.rule(knock(known(outside(), SEEN[0])).dnat(v4, Some(PORT)));
            table = table.chain("enter", enter);
            for (inside, seen) in inside.into_iter().zip(SEEN) {
                let rule = known(outside(), seen).destination(IpNet::from(inside));
                forward = forward.rule(knock(rule).accept());
            }
        }
    }
    let table = table
        .chain("forward", forward.rules([answers.clone(), unsolicited.clone()]))
        // Packets that are not for the router itself must not create an entry in its conntrack
        // table: the entry would take the port that an inside host is about to use towards that
        // peer.
        .chain(
            "input",
            Chain::base(ChainKind::Filter, Hook::Input, FILTER).rules([
                answers,
                ping(libc::IPPROTO_ICMP as u8),
                ping(libc::IPPROTO_ICMPV6 as u8),
                unsolicited,
            ]),
        );
    Nft::open()?.load(&table)?;
    Ok(())
}

/// Deletes all conntrack entries of the calling thread's namespace, as a router's restart does.
pub fn forget_connections() -> anyhow::Result<()> {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    };
    use std::os::fd::AsRawFd;

    /// Message type `NFNL_SUBSYS_CTNETLINK` with `IPCTNL_MSG_CT_DELETE`: without a tuple it deletes
    /// all entries.
    const DELETE: u16 = 1 << 8 | 2;
    const REQUEST_AND_ACK: u16 = 1 | 4;
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    let mut message = Vec::new();
    message.extend_from_slice(&20u32.to_ne_bytes());
    message.extend_from_slice(&DELETE.to_ne_bytes());
    message.extend_from_slice(&REQUEST_AND_ACK.to_ne_bytes());
    message.extend_from_slice(&[0; 12]);
    sendto(netlink.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 128];
    let len = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // The error number of `nlmsgerr` follows the header; 0 is an acknowledgement.
    let error = answer[..len].get(16..20).and_then(|bytes| bytes.first_chunk());
    match error.map(|bytes| i32::from_ne_bytes(*bytes)) {
        Some(0) => Ok(()),
        Some(number) => Err(std::io::Error::from_raw_os_error(-number).into()),
        None => anyhow::bail!("the kernel sent no answer"),
    }
}
