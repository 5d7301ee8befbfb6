//! Attacks on the UDP port of a relay: datagrams that are longer or shorter than those of an agent,
//! or malformed.
//!
//! The attacker reads the channel's number from the wire, where it is in clear, as every host on
//! the path can.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::Context;

use super::stage::{ARRIVAL, Stage, WIREGUARD};
use super::{Attacker, Case, Outcome};
use crate::lab::capture::udp_payload;
use crate::lab::spoof::{self, Spoofer};

/// Length in bytes of the header of a relayed datagram: kind, version, two zero bytes, channel
/// number.
const CHANNEL_HEADER: usize = 12;
/// First bytes of a relayed datagram: kind, version, two zero bytes.
const RELAYED: [u8; 4] = [0x52, 1, 0, 0];
/// MTU of the uplinks, in bytes.
const MTU: usize = 1_500;
/// Longest UDP payload over IPv4, in bytes.
const LONGEST_V4: usize = 65_507;
/// Longest UDP payload over IPv6, in bytes.
const LONGEST_V6: usize = 65_527;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for size in [65_487, 65_488, 65_494, 65_500, LONGEST_V4] {
        let is_short = matches!(size, 65_488 | LONGEST_V4);
        let case = |who: Attacker, name: &str, attempt: fn(&mut Stage<'_>, usize) -> _| {
            let name = format!("oversized/{name}/v4/{size}");
            let case = Case::new(name, who, Outcome::Works, move |stage| attempt(stage, size));
            if is_short { case } else { case.long() }
        };
        cases.push(case(Attacker::Stranger, "stranger", |stage, size| by_stranger(stage, 0, size)));
        cases.push(case(Attacker::Member, "end", |stage, size| by_end(stage, 0, size)));
    }
    for size in [65_488, 65_508, LONGEST_V6] {
        let case = |who: Attacker, name: &str, attempt: fn(&mut Stage<'_>, usize) -> _| {
            let name = format!("oversized/{name}/v6/{size}");
            let case = Case::new(name, who, Outcome::Works, move |stage| attempt(stage, size));
            if size == LONGEST_V6 { case } else { case.long() }
        };
        cases.push(case(Attacker::Stranger, "stranger", |stage, size| by_stranger(stage, 1, size)));
        cases.push(case(Attacker::Member, "end", |stage, size| by_end(stage, 1, size)));
    }
    let stranger = |name, attempt: fn(&mut Stage<'_>) -> _| {
        Case::new(name, Attacker::Stranger, Outcome::Works, attempt)
    };
    cases.push(stranger("oversized/stranger/without-channel", without_channel));
    cases.push(stranger("oversized/stranger/every-kind-cut-short", cut_short));
    cases.push(stranger("oversized/stranger/then-sigterm", then_sigterm));
    cases
}

/// Returns the header of a channel that `a` uses, as it is on the wire.
fn channel(stage: &Stage<'_>) -> anyhow::Result<[u8; CHANNEL_HEADER]> {
    anyhow::ensure!(stage.relay_works()?, "a and b do not reach each other through the relay");
    let mut tap = stage.tap()?;
    // The probes of the pair use the channel twice a second, an echo request at once.
    let works = stage.relay_works()?;
    let header = tap.find(ARRIVAL, |frame| {
        let (_, payload) = udp_payload(frame)?;
        let header = payload.first_chunk::<CHANNEL_HEADER>()?;
        header.starts_with(&RELAYED).then_some(*header)
    })?;
    anyhow::ensure!(works, "a and b do not reach each other through the relay");
    header.context("no relayed datagram was seen on the wire")
}

/// Returns a datagram of this size with the header of a channel that `a` uses.
fn datagram(stage: &Stage<'_>, size: usize) -> anyhow::Result<Vec<u8>> {
    let mut datagram = channel(stage)?.to_vec();
    datagram.resize(size, 0x5a);
    Ok(datagram)
}

/// Sends a datagram from a host that is neither end of the channel.
fn by_stranger(stage: &mut Stage<'_>, family: usize, size: usize) -> anyhow::Result<Outcome> {
    let datagram = datagram(stage, size)?;
    stage_send(stage, family, &[datagram])?;
    verdict(stage)
}

/// Sends a datagram with the forged address and port of an end of the channel.
fn by_end(stage: &mut Stage<'_>, family: usize, size: usize) -> anyhow::Result<Outcome> {
    let datagram = datagram(stage, size)?;
    let from = SocketAddr::new(stage.hosts.a.addresses()[family], WIREGUARD);
    let to = relay(stage, family);
    // Only IPv6 has room for a UDP payload of more than 65507 bytes: the IPv4 total length includes
    // the IP header.
    let packet = spoof::udp(from, to, &datagram)?;
    let spoofer = Spoofer::new(stage.internet(), "cp", stage.hosts.cp.namespace(), "eth0")?;
    for fragment in spoof::fragments(&packet, MTU)? {
        spoofer.send(&fragment)?;
    }
    verdict(stage)
}

/// Returns the UDP endpoint of the relay.
fn relay(stage: &Stage<'_>, family: usize) -> SocketAddr {
    SocketAddr::new(stage.hosts.cp.addresses()[family], WIREGUARD)
}

/// Sends datagrams from `evil` to the relay.
fn stage_send(
    stage: &Stage<'_>,
    family: usize,
    datagrams: &[impl AsRef<[u8]> + Sync],
) -> anyhow::Result<()> {
    let to = relay(stage, family);
    stage.hosts.evil.namespace().run(|| {
        let any: IpAddr =
            if to.is_ipv4() { [0; 4].into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        for datagram in datagrams {
            socket.send_to(datagram.as_ref(), to)?;
        }
        Ok(())
    })
}

/// Returns whether the relay still forwards. Restarts it if not.
fn verdict(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    if stage.relay_works()? {
        return Ok(Outcome::Works);
    }
    stage.restart_cp()?;
    Ok(Outcome::Hangs)
}

/// Sends datagrams of many lengths around the limits: for a channel that does not exist, and of
/// each other kind.
fn without_channel(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let beginnings: [&[u8]; 5] = [
        &[0x52, 1, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9],
        &[0x50, 1, 0, 0],
        &[4, 0, 0, 0, 1, 0, 0, 0],
        &[1, 0, 0, 0],
        &[0xff; 4],
    ];
    let datagrams: Vec<Vec<u8>> = beginnings
        .into_iter()
        .flat_map(|beginning| {
            [65_471, 65_486, 65_487, 65_488, 65_499, 65_507].map(|size| {
                let mut datagram = beginning.to_vec();
                datagram.resize(size, 0);
                datagram
            })
        })
        .collect();
    for family in 0..2 {
        stage_send(stage, family, &datagrams)?;
    }
    verdict(stage)
}

/// Sends the beginning of a datagram of every kind, in every length from zero.
fn cut_short(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let header = channel(stage)?;
    let kinds: [&[u8]; 8] = [
        &header,
        &[0x50, 1, 0, 0],
        &[1, 0, 0, 0],
        &[2, 0, 0, 0],
        &[3, 0, 0, 0],
        &[4, 0, 0, 0],
        // A STUN request: type, length, magic cookie.
        &[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42],
        &[0x41, 0, 0, 0],
    ];
    let datagrams: Vec<Vec<u8>> = kinds
        .into_iter()
        .flat_map(|kind| {
            (0..160).map(|length| {
                let mut datagram = kind.to_vec();
                datagram.resize(length, 0xff);
                datagram
            })
        })
        .collect();
    stage_send(stage, 0, &datagrams)?;
    verdict(stage)
}

/// Sends the longest datagrams, and SIGTERM to the agent while they arrive.
fn then_sigterm(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let datagram = datagram(stage, LONGEST_V4)?;
    stage_send(stage, 0, &[&datagram, &datagram, &datagram])?;
    let agent = stage.mesh()?.cp.take_agent().context("no agent runs on cp")?;
    let ended = agent.stop();
    stage.restart_cp()?;
    Ok(match ended {
        Ok(status) if status.success() => Outcome::Works,
        Ok(_) | Err(_) => Outcome::Hangs,
    })
}
