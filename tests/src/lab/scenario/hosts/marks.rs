//! Hosts whose packets carry marks in their traffic class: congestion (ECN) and priority (DSCP).

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use towline_netlink::Family;

use super::Case;
use crate::lab::capture::Tap;
use crate::lab::mesh::Controller;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{connected, node_with};
use crate::lab::topology::Lab;
use crate::lab::wire::Weather;

/// Traffic class of the inner packets: expedited forwarding (RFC 3246), and endpoints that understand a
/// congestion mark.
const INNER: u8 = EXPEDITED | CAPABLE;
/// DSCP of expedited forwarding, in its place in the traffic class.
const EXPEDITED: u8 = 0xb8;
/// ECN field of a packet whose endpoints understand a congestion mark.
const CAPABLE: u8 = 0x02;
/// ECN field of a packet with a congestion mark.
const CONGESTED: u8 = 0x03;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("marks/congestion-on-the-way", |setting| marked(setting, "", CAPABLE)),
        Case::new("marks/priority-that-is-copied", |setting| {
            marked(setting, "[wireguard]\ncopy_dscp = true\n", INNER)
        }),
    ]
}

/// Two nodes, with links that mark what can be marked. `outer` is the traffic class of the tunnel's
/// datagrams.
fn marked(setting: &Setting, configuration: &str, outer: u8) -> anyhow::Result<()> {
    /// Content by which the inner packet is known.
    const CONTENT: &[u8] = b"a packet with a traffic class";
    const LIMIT: Duration = Duration::from_secs(5);
    /// Length of an Ethernet header, whose last two bytes are the EtherType.
    const ETHERNET: usize = 14;
    /// EtherType of IPv4.
    const IPV4: [u8; 2] = [8, 0];
    let mut lab = Lab::new(setting.rank)?;
    lab.weather(Weather { is_congested: true, ..Weather::default() });
    let host = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.only(Family::V4).build()?;
    let edge = lab.host("edge").public("203.0.113.20", "2001:db8::20")?.only(Family::V4).build()?;
    let controller = Controller::start(&lab, &host, &setting.binaries)?;
    let cp = node_with(setting, &lab, &controller, &host, "cp", configuration)?;
    let node = node_with(setting, &lab, &controller, &edge, "edge", configuration)?;
    connected(&cp, &node)?;
    let mut outside = Tap::open(edge.namespace(), "eth0")?;
    let mut inside = Tap::open(host.namespace(), "towline0")?;
    let to = SocketAddr::new(cp.overlay_v4()?, 9);
    edge.namespace().run(|| {
        let socket = socket2::Socket::from(UdpSocket::bind("0.0.0.0:0")?);
        socket.set_tos_v4(INNER.into())?;
        socket.send_to(CONTENT, &to.into())?;
        Ok(())
    })?;
    let sent = outside.find(LIMIT, |frame| {
        let is_ipv4 = frame.get(ETHERNET - 2..ETHERNET)? == IPV4;
        let class = *frame.get(ETHERNET + 1)?;
        (is_ipv4 && class != 0).then_some(class)
    })?;
    ensure!(sent == Some(outer), "the outer packet has the traffic class {sent:?}, not {outer}");
    let received = inside.find(LIMIT, |packet| {
        let is_ours = packet.windows(CONTENT.len()).any(|window| window == CONTENT);
        is_ours.then(|| packet.get(1).copied()).flatten()
    })?;
    let received = received.context("the inner packet did not arrive")?;
    ensure!(
        received == EXPEDITED | CONGESTED,
        "the inner packet arrived with the traffic class {received:#x}, without the mark"
    );
    Ok(())
}
