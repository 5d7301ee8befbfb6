//! Attacks of a neighbour on the LAN of an uplink: packets whose source address belongs to this
//! node or to the mesh.

use std::net::{IpAddr, UdpSocket};

use super::stage::{ARRIVAL, Condition, DESK_ANNOUNCED, DETOUR, PORT, Place, Stage, TIMES};
use super::{Attacker, Case, Outcome};

/// Source address of a forged packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// An address in the pod network of the victim that no pod uses.
    OwnPod,
    /// A host in the LAN that the victim announces.
    OwnLan,
    /// The mesh address of the victim.
    OwnOverlay,
    /// The mesh address of another node.
    OtherOverlay,
    /// An address on the internet that no host uses. The control.
    Stranger,
}

/// Destination of a forged packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The mesh address of another node, which the victim would forward to through its tunnel.
    OtherNode,
    /// The victim's address on the uplink.
    Uplink,
    /// The mesh address of the victim.
    Overlay,
    /// The victim's address on the bridge of its pods.
    PodGateway,
    /// The pod of the victim.
    Pod,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::OwnPod => "own-pod",
            Self::OwnLan => "own-lan",
            Self::OwnOverlay => "own-overlay",
            Self::OtherOverlay => "other-overlay",
            Self::Stranger => "stranger",
        }
    }

    fn address(self, stage: &Stage<'_>, family: usize) -> anyhow::Result<IpAddr> {
        let of = |v4: [u8; 4], v6: [u16; 8]| -> IpAddr {
            if family == 0 { v4.into() } else { v6.into() }
        };
        Ok(match self {
            Self::OwnPod => of([10, 9, 1, 7], [0xfd09, 1, 0, 0, 0, 0, 0, 7]),
            Self::OwnLan => DESK_ANNOUNCED.into(),
            Self::OwnOverlay => stage.overlay()?.a[family],
            Self::OtherOverlay => stage.overlay()?.b[family],
            Self::Stranger => of([203, 0, 113, 77], [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77]),
        })
    }
}

impl Target {
    const ALL: [Self; 5] =
        [Self::OtherNode, Self::Uplink, Self::Overlay, Self::PodGateway, Self::Pod];

    fn name(self) -> &'static str {
        match self {
            Self::OtherNode => "other-node",
            Self::Uplink => "uplink",
            Self::Overlay => "overlay",
            Self::PodGateway => "pod-gateway",
            Self::Pod => "pod",
        }
    }

    fn place(self) -> Place {
        match self {
            Self::OtherNode => Place::B,
            Self::Uplink | Self::Overlay | Self::PodGateway => Place::A,
            Self::Pod => Place::Pod,
        }
    }

    fn address(self, stage: &Stage<'_>, family: usize) -> anyhow::Result<IpAddr> {
        Ok(match self {
            Self::OtherNode => stage.overlay()?.b[family],
            Self::Uplink => stage.hosts.a.addresses()[family],
            Self::Overlay => stage.overlay()?.a[family],
            Self::PodGateway if family == 0 => [10, 9, 1, 1].into(),
            Self::PodGateway => [0xfd09, 1, 0, 0, 0, 0, 0, 1].into(),
            Self::Pod => stage.hosts.pod.addresses()[family],
        })
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut case =
        |source: Source, target: Target, family: usize, filter: u8, is_short, expected| {
            let version = if family == 0 { "v4" } else { "v6" };
            let name = format!(
                "sources/{}/to-{}/{version}/rp_filter-{filter}",
                source.name(),
                target.name()
            );
            let case = Case::new(name, Attacker::Neighbour, expected, move |stage| {
                send(stage, source, target, family, filter)
            });
            cases.push(if is_short { case } else { case.long() });
        };
    let dropped = Outcome::Dropped;
    for filter in [0, 2, 1] {
        for target in Target::ALL {
            for family in [0, 1] {
                let is_short = match family {
                    0 => filter == 0,
                    // The strict reverse path filter (`rp_filter` 1) has no effect on IPv6.
                    _ => filter == 1 && matches!(target, Target::OtherNode | Target::Uplink),
                };
                case(Source::OwnPod, target, family, filter, is_short, dropped);
            }
        }
        for source in [Source::OwnOverlay, Source::OtherOverlay] {
            for family in [0, 1] {
                case(source, Target::Uplink, family, filter, filter == 0, dropped);
            }
        }
        case(Source::OwnLan, Target::OtherNode, 0, filter, filter == 0, dropped);
        case(Source::OwnLan, Target::Uplink, 0, filter, false, dropped);
        for family in [0, 1] {
            let delivered = Outcome::Delivered;
            case(Source::Stranger, Target::Uplink, family, filter, filter == 0, delivered);
        }
    }
    let case = Case::new(
        "sources/announced-lan-by-its-own-link",
        Attacker::Neighbour,
        Outcome::Delivered,
        by_its_own_link,
    );
    cases.push(case);
    cases
}

/// Sends a forged packet as a neighbour, and returns whether the victim lets it through.
fn send(
    stage: &mut Stage<'_>,
    source: Source,
    target: Target,
    family: usize,
    filter: u8,
) -> anyhow::Result<Outcome> {
    stage.be(Condition::Running)?;
    for link in ["all", "eth0"] {
        let setting = format!("net.ipv4.conf.{link}.rp_filter");
        // The kernel uses the higher value of the two.
        let value = if link == "all" { "0".to_owned() } else { filter.to_string() };
        stage.hosts.a.namespace().sysctl(&setting, &value)?;
    }
    let spoofer = stage.neighbour()?;
    let (from, to) = (source.address(stage, family)?, target.address(stage, family)?);
    let (number, packet) = stage.packet(from, to)?;
    for _ in 0..TIMES {
        spoofer.send(&packet)?;
    }
    if target == Target::OtherNode {
        stage.finish_through_tunnel(family == 1)?;
    } else {
        // A stranger's packet is accepted. When it arrives, all packets before it were processed.
        let (from, to) =
            (Source::Stranger.address(stage, family)?, Target::Uplink.address(stage, family)?);
        let (last, packet) = stage.packet(from, to)?;
        spoofer.send(&packet)?;
        let passed = stage.listener(Place::A)?.receives(last, ARRIVAL)?;
        anyhow::ensure!(passed, "the control packet of a stranger does not arrive");
    }
    let received = stage.listener(target.place())?.receives(number, DETOUR)?;
    Ok(if received { Outcome::Delivered } else { Outcome::Dropped })
}

/// Checks that the hosts of the announced LAN itself reach the mesh: the main routing table leads
/// back to them over the link on which their packets arrive.
fn by_its_own_link(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    stage.be(Condition::Running)?;
    let (number, to) = (stage.number(), stage.overlay()?.b[0]);
    let payload = stage.tag.payload(number);
    stage.hosts.desk.namespace().run(|| {
        let socket = UdpSocket::bind((DESK_ANNOUNCED, 0))?;
        for _ in 0..TIMES {
            socket.send_to(&payload, (to, PORT))?;
        }
        Ok(())
    })?;
    let received = stage.listener(Place::B)?.receives(number, ARRIVAL)?;
    Ok(if received { Outcome::Delivered } else { Outcome::Dropped })
}
