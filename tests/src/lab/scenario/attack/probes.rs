//! Attacks on probes: replays, floods with a peer's address, and requests to the relay that name
//! somebody else's address.
//!
//! Probes of `a` to the relay `cp` are recorded on the wire, as every host on the path can. `evil` is
//! a member, and seals probes with its own key.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context;
use towline_dataplane::Probes;
use towline_proto::frame::{DatagramKind, PROBE_HEADER_BYTES, Probe, ProbeHeader, ProbeVersion};
use towline_proto::id::WireguardKey;

use super::flooded_path::{self, End};
use super::stage::{ARRIVAL, DETOUR, SILENCE, Stage, WIREGUARD};
use super::{Attacker, Case, Outcome};
use crate::lab::capture::{Tap, udp_payload};
use crate::lab::interrupt;
use crate::lab::output::line;
use crate::lab::spoof::{self, Spoofer};

/// Rounds of replays, twice a second.
const ROUNDS: usize = 10;
/// Pause between two rounds of replays.
const PAUSE: Duration = Duration::from_millis(500);
/// Duration of a flood: some times what a path without pongs lasts.
const FLOOD: Duration = Duration::from_secs(8);
/// Datagrams of a flood in each burst, which is sent 200 times per second: 5,000 per second.
const BURST: usize = 25;
/// Pause between two bursts of a flood.
const BURST_PAUSE: Duration = Duration::from_millis(5);
/// Time for which a path stays the same before it counts as settled.
const SETTLED: Duration = Duration::from_secs(3);
/// Limit for a path to settle.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// Interval at which the path is looked at while a flood lasts.
const LOOK: Duration = Duration::from_millis(250);
/// Address of a host that is no member: the lab's router.
const VICTIM: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 20)), 9);

pub(super) fn cases() -> Vec<Case> {
    let stranger = |name, expected, attempt: fn(&mut Stage<'_>) -> _| {
        Case::new(name, Attacker::Stranger, expected, attempt)
    };
    let member = |name, expected, attempt: fn(&mut Stage<'_>) -> _| {
        Case::new(name, Attacker::Member, expected, attempt)
    };
    vec![
        stranger("probes/replay/from-elsewhere", Outcome::Works, replay),
        stranger("probes/replay/amplified", Outcome::Dropped, amplify),
        stranger("probes/flood/with-a-peers-address", Outcome::Works, flood_with_junk),
        stranger("probes/flood/with-a-peers-pair-id", Outcome::Works, flood_with_pair_id).long(),
        stranger("probes/flood/with-a-peers-replays", Outcome::Works, flood_with_replays),
        member("probes/register/from-own-address", Outcome::Delivered, register),
        member("probes/register/for-a-victim", Outcome::Dropped, register_for_victim),
        member("probes/register/in-version-1", Outcome::Dropped, register_in_version_1),
    ]
}

/// Records the probes that `a` sends to the relay while that starts again.
fn record(stage: &mut Stage<'_>) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut tap = stage.tap()?;
    stage.restart_cp()?;
    let relay = relay(stage).ip();
    let mut recorded = Vec::new();
    let mut record = |frame: &[u8]| -> Option<()> {
        let (to, payload) = udp_payload(frame)?;
        if to == relay && DatagramKind::of(payload) == DatagramKind::Probe {
            recorded.push(payload.to_vec());
        }
        (recorded.len() >= 2).then_some(())
    };
    let enough = tap.find(ARRIVAL, &mut record)?;
    // Those that are on the wire already are taken too.
    tap.find(DETOUR, |frame| record(frame).and(None::<()>))?;
    anyhow::ensure!(enough.is_some(), "{} probes were seen on the wire", recorded.len());
    Ok(recorded)
}

/// Returns the UDP endpoint of the relay.
fn relay(stage: &Stage<'_>) -> SocketAddr {
    SocketAddr::new(stage.hosts.cp.addresses()[0], WIREGUARD)
}

/// Opens a socket of `evil` that waits for nothing.
fn socket(stage: &Stage<'_>) -> anyhow::Result<UdpSocket> {
    let socket =
        stage.hosts.evil.namespace().run(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Returns every datagram that has arrived at a socket.
fn arrived(socket: &UdpSocket) -> Vec<Vec<u8>> {
    let mut buffer = vec![0; 1 << 16];
    let next = || socket.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec());
    std::iter::from_fn(next).collect()
}

/// Replays probes of `a` from the address of `evil`. They move nothing of what the relay forwards.
fn replay(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let (recorded, to, socket) = (record(stage)?, relay(stage), socket(stage)?);
    for _ in 0..ROUNDS {
        for datagram in &recorded {
            socket.send_to(datagram, to)?;
        }
        interrupt::sleep(PAUSE)?;
        if !stage.relay_works()? {
            return Ok(Outcome::Hangs);
        }
        let is_relayed = |datagram: &Vec<u8>| DatagramKind::of(datagram) == DatagramKind::Relayed;
        if arrived(&socket).iter().any(is_relayed) {
            return Ok(Outcome::Delivered);
        }
    }
    Ok(Outcome::Works)
}

/// Replays probes, and compares what comes back with what was sent.
fn amplify(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let (recorded, to, socket) = (record(stage)?, relay(stage), socket(stage)?);
    let (mut sent, mut came) = (0, 0);
    for _ in 0..ROUNDS {
        for datagram in &recorded {
            sent += socket.send_to(datagram, to)?;
        }
        interrupt::sleep(PAUSE)?;
        came += arrived(&socket).iter().map(Vec::len).sum::<usize>();
    }
    Ok(if came > sent { Outcome::Delivered } else { Outcome::Dropped })
}

/// Floods `cp` on its path to `a` with datagrams that have the address of `a`. There has to be a direct path to `a` all
/// the time, which [`flooded_path`] judges.
fn flood(stage: &mut Stage<'_>, datagrams: &[Vec<u8>]) -> anyhow::Result<Outcome> {
    let spoofer = Spoofer::new(stage.internet(), "cp", stage.hosts.cp.namespace(), "eth0")?;
    let (here, there) = (stage.hosts.cp.addresses().to_vec(), stage.hosts.a.addresses().to_vec());
    let mesh = stage.mesh()?;
    let (cp, a) = (&mesh.cp, &mesh.a);
    let ends = [End { node: cp, peer: "a" }, End { node: a, peer: "cp" }];
    let from = settled_path(ends)?;
    let to = here.iter().find(|address| address.is_ipv4() == from.is_ipv4());
    let to = SocketAddr::new(*to.context("cp has no address of that family")?, WIREGUARD);
    let packets = datagrams.iter().map(|datagram| spoof::udp(from, to, datagram));
    let packets = packets.collect::<anyhow::Result<Vec<_>>>()?;
    let fault = flooded_path::judge(ends, || {
        let (end, mut look) = (Instant::now() + FLOOD, Instant::now() + LOOK);
        let mut packets = packets.iter().cycle();
        while Instant::now() < end {
            for packet in packets.by_ref().take(BURST) {
                // A full queue loses it, as any network might.
                let _ = spoofer.send(packet);
            }
            interrupt::sleep(BURST_PAUSE)?;
            if Instant::now() >= look {
                look = Instant::now() + LOOK;
                let now = path(ends[0])?;
                let is_to_a = now.is_some_and(|to| there.contains(&to.ip()));
                if !is_to_a {
                    return Ok(Some(format!("the path of cp to a was {from} and is {now:?}")));
                }
            }
        }
        Ok(None)
    })?;
    if let Some(fault) = fault {
        line(&format!("flood from {from} to {to}: {fault}"));
        return Ok(Outcome::Hangs);
    }
    Ok(if stage.relay_works()? { Outcome::Works } else { Outcome::Hangs })
}

/// Waits until the path of each end has been the same for a while, and returns the remote end of that of `cp`. An agent
/// that just started takes the first path that works, and a better one as soon as it knows one.
fn settled_path(ends: [End<'_>; 2]) -> anyhow::Result<SocketAddr> {
    let what = "settled paths of cp and a";
    let (settled, _) = interrupt::wait_until_steady(what, SETTLE_LIMIT, SETTLED, || {
        Ok(path(ends[0])?.zip(path(ends[1])?))
    })?;
    Ok(settled)
}

/// Returns the remote end of the direct path of a node to its peer, if that is up.
fn path(End { node, peer }: End<'_>) -> anyhow::Result<Option<SocketAddr>> {
    let peer = node.peer(peer)?;
    let path = peer.filter(|peer| peer.is_up()).and_then(|peer| peer.path);
    Ok(path.and_then(|path| path.parse().ok()))
}

fn flood_with_junk(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    // Four bytes are the header of a probe; the second one has a whole header too.
    let short = vec![0x50, 1, 0, 0];
    let mut long = vec![0x50, 2, 0, 0];
    long.resize(120, 0x5a);
    flood(stage, &[short, long])
}

fn flood_with_pair_id(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let mut junk = record(stage)?;
    for datagram in &mut junk {
        datagram[PROBE_HEADER_BYTES..].fill(0x5a);
    }
    flood(stage, &junk)
}

fn flood_with_replays(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let recorded = record(stage)?;
    flood(stage, &recorded)
}

/// Returns the first message of the relay that arrives at the socket within `limit` and that `wanted` accepts.
fn answer(
    probes: &Probes,
    socket: &UdpSocket,
    limit: Duration,
    wanted: impl Fn(&Probe) -> bool,
) -> anyhow::Result<Option<Probe>> {
    interrupt::wait_up_to(limit, || {
        let opened = arrived(socket).into_iter().filter_map(|datagram| {
            // Nothing but the decryption is needed here.
            probes.open_signal(&datagram).map(|(_, message)| message)
        });
        Ok(opened.into_iter().find(|message| wanted(message)))
    })
}

/// Registers as any member does. This is a control.
fn register(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let (probes, cp) = stage.member_probes(ProbeVersion::V2)?;
    let (to, socket) = (relay(stage), socket(stage)?);
    let send = |message: &Probe| {
        let datagram = probes.seal(&cp, message, 0).context("cp is no peer")?;
        anyhow::Ok(socket.send_to(&datagram, to)?)
    };
    let request = Probe::Register { transaction: 7 };
    send(&request)?;
    let is_challenge = |message: &Probe| matches!(message, Probe::Challenge { .. });
    let challenge = answer(&probes, &socket, ARRIVAL, is_challenge)?;
    let Some(Probe::Challenge { token }) = challenge else { return Ok(Outcome::Dropped) };
    send(&Probe::Proof { token })?;
    send(&request)?;
    let is_answer = |message: &Probe| matches!(message, Probe::Registered { transaction: 7, .. });
    Ok(match answer(&probes, &socket, ARRIVAL, is_answer)? {
        Some(_) => Outcome::Delivered,
        None => Outcome::Dropped,
    })
}

/// Registers with the address of a host that is no member, which must not get what the relay
/// forwards, nor more bytes than came.
fn register_for_victim(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let (probes, cp) = stage.member_probes(ProbeVersion::V2)?;
    // The member has proven its epoch, so that its requests are fresh.
    anyhow::ensure!(prove(stage, &probes, &cp)?, "the relay sends no challenge");
    let mut tap = Tap::open(stage.internet(), "cp")?;
    let spoofer = Spoofer::new(stage.internet(), "cp", stage.hosts.cp.namespace(), "eth0")?;
    let mut sent = 0;
    for transaction in 0..20 {
        let request = Probe::Register { transaction };
        let datagram = probes.seal(&cp, &request, 0).context("cp is no peer")?;
        sent += datagram.len();
        spoofer.send(&spoof::udp(VICTIM, relay(stage), &datagram)?)?;
    }
    let (mut came, mut is_registered) = (0, false);
    tap.find(SILENCE, |frame| {
        let (to, payload) = udp_payload(frame)?;
        if to == VICTIM.ip() {
            came += payload.len();
            let opened = probes.open_signal(payload);
            is_registered |= matches!(opened, Some((_, Probe::Registered { .. })));
        }
        None::<()>
    })?;
    let is_harmed = is_registered || came > sent;
    Ok(if is_harmed { Outcome::Delivered } else { Outcome::Dropped })
}

/// Proves the member's epoch to the relay, from the address of `evil`. Returns whether the relay asked
/// for it.
fn prove(stage: &Stage<'_>, probes: &Probes, cp: &WireguardKey) -> anyhow::Result<bool> {
    let (to, socket) = (relay(stage), socket(stage)?);
    let ping = probes.seal(cp, &Probe::Ping { transaction: 1 }, 0).context("cp is no peer")?;
    socket.send_to(&ping, to)?;
    let is_challenge = |message: &Probe| matches!(message, Probe::Challenge { .. });
    let challenge = answer(probes, &socket, ARRIVAL, is_challenge)?;
    let Some(Probe::Challenge { token }) = challenge else { return Ok(false) };
    let proof = probes.seal(cp, &Probe::Proof { token }, 0).context("cp is no peer")?;
    socket.send_to(&proof, to)?;
    Ok(true)
}

/// Registers in version 1, though the member's record names version 2.
fn register_in_version_1(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let (probes, cp) = stage.member_probes(ProbeVersion::V1)?;
    let (to, socket) = (relay(stage), socket(stage)?);
    let request = Probe::Register { transaction: 7 };
    let datagram = probes.seal(&cp, &request, 0).context("cp is no peer")?;
    let version = ProbeHeader::decode(&datagram).map(|(header, _)| header.version);
    anyhow::ensure!(version == Some(ProbeVersion::V1), "the request has version {version:?}");
    socket.send_to(&datagram, to)?;
    Ok(match answer(&probes, &socket, SILENCE, |_| true)? {
        Some(_) => Outcome::Delivered,
        None => Outcome::Dropped,
    })
}
