//! Attacks of a member: inner packets with any source, destination and form, sent through a
//! WireGuard session without an agent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use towline_netlink::{AddressOptions, Rtnetlink};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily};

use super::stage::{
    ARRIVAL, CONFIGURED, Condition, DESK_ELSEWHERE, DESK_FOREIGN, DETOUR, GROUP_V4, GROUP_V6,
    METADATA, PORT, Place, Stage, TIMES,
};
use super::{Attacker, Case, Outcome};
use crate::lab::spoof;
use crate::lab::tamper::LINK;

/// Destination of an inner packet. A number selects the address family: 0 is IPv4, 1 is IPv6.
#[derive(Debug, Clone, Copy)]
enum To {
    /// A fixed address.
    Address(IpAddr),
    /// Mesh address of the victim.
    OverlayOfA(usize),
    /// Mesh address of `b`.
    OverlayOfB(usize),
    /// Mesh address of `cp`.
    OverlayOfCp(usize),
    /// Address of a link of the victim, by its index: IPv4 and IPv6 of the first uplink, then of
    /// the LAN.
    OwnOfA(usize),
    /// Address of `desk` in the LAN of the router.
    Desk(usize),
    /// Address of the victim's pod.
    Pod(usize),
    /// Address of the victim's container.
    Container(usize),
}

/// Source of an inner packet.
#[derive(Debug, Clone, Copy)]
enum From {
    /// Mesh address of the attacker.
    Own,
    /// Address of another host.
    Of(To),
}

/// Form of an inner packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// One packet without extension headers.
    Plain,
    /// Fragments of a packet.
    Fragments,
    /// IPv6 packet with an extension header of this kind.
    Extended(u8),
}

/// UDP port on the victim's mesh address that is published for the container.
const PUBLISHED: u16 = 30_080;

const fn v4(a: u8, b: u8, c: u8, d: u8) -> To {
    To::Address(IpAddr::V4(Ipv4Addr::new(a, b, c, d)))
}

const fn v6(address: Ipv6Addr) -> To {
    To::Address(IpAddr::V6(address))
}

pub(super) fn cases() -> Vec<Case> {
    use Form::Plain;
    use Outcome::{Delivered, Dropped};
    let mapped = |v4: Ipv4Addr| v6(v4.to_ipv6_mapped());
    let short = [
        ("overlay-v4", To::OverlayOfA(0), Place::A, Plain, Delivered),
        ("overlay-v6", To::OverlayOfA(1), Place::A, Plain, Delivered),
        ("announced-pod-v4", To::Pod(0), Place::Pod, Plain, Delivered),
        ("announced-pod-v6", To::Pod(1), Place::Pod, Plain, Delivered),
        ("announced-lan", v4(192, 168, 88, 5), Place::Desk, Plain, Delivered),
        ("configured-address", To::Address(IpAddr::V4(CONFIGURED)), Place::A, Plain, Delivered),
        ("overlay-v4-in-fragments", To::OverlayOfA(0), Place::A, Form::Fragments, Delivered),
        ("lan-host-v4", To::Desk(0), Place::Desk, Plain, Dropped),
        ("lan-host-v6", To::Desk(1), Place::Desk, Plain, Dropped),
        ("metadata", To::Address(IpAddr::V4(METADATA)), Place::Internet, Plain, Dropped),
        ("own-uplink-v4", To::OwnOfA(0), Place::A, Plain, Dropped),
        ("own-uplink-v6", To::OwnOfA(1), Place::A, Plain, Dropped),
        ("own-lan-v4", To::OwnOfA(2), Place::A, Plain, Dropped),
        ("loopback-v4", v4(127, 0, 0, 1), Place::A, Plain, Dropped),
        ("loopback-v6", v6(Ipv6Addr::LOCALHOST), Place::A, Plain, Dropped),
        ("directed-broadcast", v4(192, 168, 77, 255), Place::A, Plain, Dropped),
        ("limited-broadcast", v4(255, 255, 255, 255), Place::A, Plain, Dropped),
        ("all-hosts-v4", v4(224, 0, 0, 1), Place::A, Plain, Dropped),
        ("group-v6", v6(GROUP_V6), Place::A, Plain, Dropped),
        ("container-v4", To::Container(0), Place::Container, Plain, Dropped),
        ("container-v6", To::Container(1), Place::Container, Plain, Dropped),
        ("unannounced", To::Address(IpAddr::V4(DESK_ELSEWHERE)), Place::Desk, Plain, Dropped),
        ("foreign-unique-local", v6(DESK_FOREIGN), Place::Desk, Plain, Dropped),
        ("lan-host-v4-in-fragments", To::Desk(0), Place::Desk, Form::Fragments, Dropped),
        ("transit-v4", To::OverlayOfB(0), Place::B, Plain, Dropped),
    ];
    let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x544c, 1);
    let extended = Form::Extended;
    let long = [
        ("own-lan-v6", To::OwnOfA(3), Place::A, Plain, Dropped),
        ("loopback-v4-other", v4(127, 0, 0, 53), Place::A, Plain, Dropped),
        ("unspecified", v4(0, 0, 0, 0), Place::A, Plain, Dropped),
        ("uplink-broadcast", v4(203, 0, 113, 255), Place::A, Plain, Dropped),
        ("announced-broadcast", v4(10, 9, 1, 255), Place::A, Plain, Dropped),
        ("container-broadcast", v4(10, 66, 0, 255), Place::A, Plain, Dropped),
        ("container-gateway", v4(10, 66, 0, 1), Place::A, Plain, Dropped),
        ("group-v4", To::Address(IpAddr::V4(GROUP_V4)), Place::A, Plain, Dropped),
        ("all-nodes-v6", v6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)), Place::A, Plain, Dropped),
        ("node-local-v6", v6(Ipv6Addr::new(0xff01, 0, 0, 0, 0, 0, 0, 1)), Place::A, Plain, Dropped),
        ("link-local-v4", v4(169, 254, 7, 7), Place::A, Plain, Dropped),
        ("link-local-v6", v6(link_local), Place::A, Plain, Dropped),
        ("mapped-loopback", mapped(Ipv4Addr::LOCALHOST), Place::A, Plain, Dropped),
        ("mapped-metadata", mapped(METADATA), Place::Internet, Plain, Dropped),
        ("class-e", v4(240, 0, 0, 1), Place::A, Plain, Dropped),
        ("transit-v6", To::OverlayOfB(1), Place::B, Plain, Dropped),
        ("transit-to-cp", To::OverlayOfCp(0), Place::Cp, Plain, Dropped),
        (
            "metadata-in-fragments",
            To::Address(METADATA.into()),
            Place::Internet,
            Form::Fragments,
            Dropped,
        ),
        ("lan-host-v6-in-fragments", To::Desk(1), Place::Desk, Form::Fragments, Dropped),
        (
            "lan-host-v6-options",
            To::Desk(1),
            Place::Desk,
            extended(spoof::DESTINATION_OPTIONS),
            Dropped,
        ),
        ("lan-host-v6-hop-by-hop", To::Desk(1), Place::Desk, extended(spoof::HOP_BY_HOP), Dropped),
        (
            "overlay-v6-options",
            To::OverlayOfA(1),
            Place::A,
            extended(spoof::DESTINATION_OPTIONS),
            Delivered,
        ),
        ("overlay-v6-in-fragments", To::OverlayOfA(1), Place::A, Form::Fragments, Delivered),
    ];
    let own = |(name, to, at, form, expected)| {
        Case::new(format!("inward/to/{name}"), Attacker::Member, expected, move |stage| {
            send(stage, From::Own, to, PORT, at, form)
        })
    };
    let mut cases: Vec<Case> = short.into_iter().map(own).collect();
    cases.extend(long.into_iter().map(own).map(Case::long));
    for (name, from, is_short) in [
        ("victim", To::OverlayOfA(0), true),
        ("other-member", To::OverlayOfB(0), true),
        ("pod-of-victim", To::Pod(0), false),
        ("lan-host", To::Desk(0), false),
        ("loopback", v4(127, 0, 0, 1), false),
        ("unspecified", v4(0, 0, 0, 0), false),
        ("broadcast", v4(255, 255, 255, 255), false),
    ] {
        let case =
            Case::new(format!("inward/from/{name}"), Attacker::Member, Dropped, move |stage| {
                send(stage, From::Of(from), To::OverlayOfA(0), PORT, Place::A, Plain)
            });
        cases.push(if is_short { case } else { case.long() });
    }
    cases.push(Case::new("inward/published-port", Attacker::Member, Delivered, published));
    cases.push(
        Case::new("inward/published-port-by-uplink-address", Attacker::Member, Dropped, |stage| {
            with_published(stage, To::OwnOfA(0))
        })
        .long(),
    );
    cases
}

/// Returns the address of a destination.
fn address(stage: &Stage<'_>, to: To) -> anyhow::Result<IpAddr> {
    let hosts = &stage.hosts;
    Ok(match to {
        To::Address(address) => address,
        To::OverlayOfA(family) => stage.overlay()?.a[family],
        To::OverlayOfB(family) => stage.overlay()?.b[family],
        To::OverlayOfCp(family) => stage.overlay()?.cp[family],
        To::OwnOfA(number) => hosts.a.addresses()[number],
        To::Desk(family) => hosts.desk.addresses()[family],
        To::Pod(family) => hosts.pod.addresses()[family],
        To::Container(family) => hosts.container.addresses()[family],
    })
}

/// Sends packets through the raw tunnel, then a control packet that must arrive. Once it has
/// arrived, the outcome of the packets before it is known.
fn send(
    stage: &mut Stage<'_>,
    from: From,
    to: To,
    port: u16,
    at: Place,
    form: Form,
) -> anyhow::Result<Outcome> {
    stage.be(Condition::Running)?;
    lend_link_local(stage)?;
    let to = address(stage, to)?;
    let overlay = stage.overlay()?;
    let from = match from {
        From::Own => overlay.evil[usize::from(to.is_ipv6())],
        From::Of(whose) => address(stage, whose)?,
    };
    let number = stage.number();
    let mut payload = stage.tag.payload(number).to_vec();
    if form == Form::Fragments {
        payload.resize(2_000, 0x5a);
    }
    let packet = spoof::udp((from, PORT).into(), (to, port).into(), &payload)?;
    let packets = match form {
        Form::Plain => vec![packet],
        Form::Fragments => spoof::fragments(&packet, 1_280)?,
        Form::Extended(kind) => vec![spoof::extended(&packet, kind)?],
    };
    let (last, end) = stage.packet(overlay.evil[0], overlay.a[0])?;
    let mut tunnel = stage.raw_tunnel()?;
    for _ in 0..TIMES {
        for packet in &packets {
            tunnel.send(packet)?;
        }
    }
    tunnel.send(&end)?;
    let passed = stage.listener(Place::A)?.receives(last, ARRIVAL)?;
    anyhow::ensure!(passed, "the control packet does not arrive through the raw tunnel");
    let received = stage.listener(at)?.receives(number, DETOUR)?;
    Ok(if received { Outcome::Delivered } else { Outcome::Dropped })
}

/// Adds addresses of link-local and reserved ranges to the victim. A packet to them must be dropped
/// even though the kernel considers them local.
fn lend_link_local(stage: &Stage<'_>) -> anyhow::Result<()> {
    stage.hosts.a.namespace().run(|| {
        let mut netlink = Rtnetlink::open()?;
        let tunnel = netlink.link_index(LINK)?;
        for (link, address) in [
            (tunnel, IpAddr::from(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x544c, 1))),
            (netlink.link_index("lo")?, IpAddr::from([169, 254, 7, 7])),
            (netlink.link_index("lo")?, IpAddr::from([240, 0, 0, 1])),
        ] {
            let has = netlink.addresses(Some(link))?;
            if has.iter().all(|has| has.prefix.addr() != address) {
                let options = AddressOptions { no_dad: true, ..Default::default() };
                netlink.add_address(link, address.into(), options)?;
            }
        }
        Ok(())
    })
}

/// Checks that a published port is reachable at the mesh address.
fn published(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    with_published(stage, To::OverlayOfA(0))
}

/// Publishes a UDP port of the host for the container, as a container engine does, and sends a
/// packet to it.
fn with_published(stage: &mut Stage<'_>, to: To) -> anyhow::Result<Outcome> {
    const TABLE: &str = "published";
    let container = stage.hosts.container.addresses()[0];
    let udp = Rule::new().protocol(libc::IPPROTO_UDP as u8).destination_port(PUBLISHED);
    let enter = Chain::base(ChainKind::Nat, Hook::Prerouting, -100)
        .rule(udp.destination_is_local().dnat(container, Some(PORT)));
    let table = Table::new(TableFamily::Inet, TABLE).chain("enter", enter);
    let host = std::sync::Arc::clone(&stage.hosts.a);
    host.namespace().run(|| Ok(Nft::open()?.load(&table)?))?;
    let outcome = send(stage, From::Own, to, PUBLISHED, Place::Container, Form::Plain);
    host.namespace().run(|| Ok(Nft::open()?.delete(TableFamily::Inet, TABLE).map(drop)?))?;
    outcome
}
