//! Packets that must not get through: unusual ones that a node and its pod send, and forged ones that are sent to a
//! node.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;

use super::absent_pods;
use crate::lab::background_traffic::{BackgroundTraffic, Member, PORT};
use crate::lab::interrupt::{sleep, wait_until_steady, wait_up_to};
use crate::lab::spoof::{self, Spoofer};
use crate::lab::topology::Host;
use crate::lab::traffic::{MARK, Pattern};

/// Pause between two rounds of forged packets to one node.
const FORGING_PACE: Duration = Duration::from_millis(5);
/// Limit for the test packets of the listeners, on a slow machine.
const PROOF_LIMIT: Duration = Duration::from_secs(60);
/// Time without a further test packet after which none is on its way.
const SILENCE: Duration = Duration::from_secs(1);

/// Packets that are sent after each action: their payload and their destinations.
pub(super) struct Unusual {
    /// Destinations by the index of the sending node: the mesh addresses and the pod addresses of
    /// all other members.
    pub(super) targets: Vec<Vec<SocketAddr>>,
    pub(super) payload: Vec<u8>,
}

impl Unusual {
    pub(super) fn new(
        background_traffic: &BackgroundTraffic<'_>,
        pods: &[Host],
        pattern: Pattern,
    ) -> Self {
        let all: Vec<Vec<SocketAddr>> = background_traffic
            .members()
            .iter()
            .zip(pods)
            .map(|(member, pod)| {
                let addresses = member.addresses.iter().chain(pod.addresses());
                addresses.map(|address| (*address, PORT).into()).collect()
            })
            .collect();
        let others = |place: usize| {
            let others = all.iter().enumerate().filter(|(other, _)| *other != place);
            others.flat_map(|(_, targets)| targets.clone()).collect()
        };
        let payload = [pattern.cell(0), pattern.cell(1)].concat();
        Self { targets: (0..all.len()).map(others).collect(), payload }
    }
}

/// Sender of forged packets to one node.
pub(super) struct SpoofedTraffic<'a> {
    spoofer: Spoofer,
    packets: Vec<Vec<u8>>,
    /// Packet with the tag of the forged ones, but with a legitimate source. Shows that the
    /// listener counts packets that get through.
    honest: Vec<u8>,
    unarmed: &'a AtomicBool,
    /// Number of forged packets that were sent.
    pub(super) sent: AtomicU64,
    /// Number of packets with the tag that [`Self::prove`] let the member receive. Not counted as
    /// accepted.
    pub(super) proof: AtomicU64,
}

impl<'a> SpoofedTraffic<'a> {
    /// Builds packets whose sources are all mesh addresses and a pod address of every node, those
    /// of the victim included. Their destinations are the addresses of the victim's uplink, its
    /// mesh addresses, and the mesh addresses of the other members.
    pub(super) fn new(
        spoofer: Spoofer,
        background_traffic: &BackgroundTraffic<'_>,
        uplink: &[IpAddr],
        tag: [u8; MARK],
        unarmed: &'a AtomicBool,
    ) -> Self {
        let mesh = || {
            background_traffic.members().iter().flat_map(|member| member.addresses.iter().copied())
        };
        let mut packets = Vec::new();
        let nodes = background_traffic.members().len() as u8;
        for from in mesh().chain((0..nodes).flat_map(absent_pods)) {
            for to in uplink.iter().copied().chain(mesh()).filter(|to| *to != from) {
                packets.extend(spoof::udp((from, PORT).into(), (to, PORT).into(), &tag));
            }
        }
        let stranger: IpAddr = [192, 0, 2, 99].into();
        let honest = uplink
            .iter()
            .filter(|ip| ip.is_ipv4())
            .find_map(|to| spoof::udp((stranger, PORT).into(), (*to, PORT).into(), &tag).ok());
        let honest = honest.unwrap_or_default();
        Self {
            spoofer,
            packets,
            honest,
            unarmed,
            sent: AtomicU64::new(0),
            proof: AtomicU64::new(0),
        }
    }

    /// Checks the listener: it must receive and count a packet with the tag that no guard has to
    /// drop.
    pub(super) fn prove(&self, member: &Member<'_>) -> anyhow::Result<()> {
        let found = wait_up_to(PROOF_LIMIT, || {
            self.spoofer.send(&self.honest)?;
            Ok((member.spoofed() > 0).then_some(()))
        })?;
        found.context("the listener for forged packets received no test packet")?;
        // The last packets may still be on their way: wait until the count no longer changes.
        let proof = || Ok(Some(member.spoofed()));
        let proof = wait_until_steady("silence", PROOF_LIMIT, SILENCE, proof)?;
        self.proof.store(proof, Ordering::Relaxed);
        Ok(())
    }

    /// Sends forged packets until the traffic stops.
    pub(super) fn run(&self, background_traffic: &BackgroundTraffic<'_>) -> anyhow::Result<()> {
        while !background_traffic.stopped() {
            for packet in &self.packets {
                if self.unarmed.load(Ordering::SeqCst) {
                    break;
                }
                // Sending fails while the cable is disconnected.
                if self.spoofer.send(packet).is_ok() {
                    self.sent.fetch_add(1, Ordering::Relaxed);
                }
            }
            sleep(FORGING_PACE)?;
        }
        Ok(())
    }
}
