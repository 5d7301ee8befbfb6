//! Attempts to make traffic for the mesh leave in clear: by its ports, marks and form, from the
//! host and from a pod, while the agent runs, and while it does not run and one guard is gone.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use memchr::memmem::find;
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily};

use super::stage::{ARRIVAL, Condition, PLAIN_PORT, PORT, Place, Stage, TIMES, WIREGUARD};
use super::{Attacker, Case, Outcome, Unavailable};
use crate::lab::actor::Actor;
use crate::lab::capture::Tap;
use crate::lab::redirect::{Choice, Redirect};
use crate::lab::spoof::{self, Spoofer};
use crate::lab::tamper::LINK;
use crate::lab::unusual::{FromHost, FromPod, Transport, Way};

/// Packet marks of the attempts: the bypass mark of the agent (0x10), and marks of other programs,
/// some of which contain its bit.
const MARKS: [u32; 6] = [0x10, 0x110, 0x1_bd10, 0x51, 0xc350, 0x1_0f10];
/// Priority of the foreign chain. It is close to that of the usual mangle chains (-150).
const MANGLE: i32 = -145;
/// Number of repetitions that makes a payload larger than one packet.
const LARGE: usize = 200;
/// Name of another program's nftables table.
const FOREIGN: &str = "foreign";
/// Port of the bridge `cni0` that leads to the pod.
const POD_PORT: &str = "veth0";

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // Cases are grouped by condition, because most changes of the condition restart the agent.
    for condition in Condition::ALL {
        let is_gone = condition != Condition::Running;
        let one_guard = matches!(condition, Condition::NoTable | Condition::NoRoutes);
        let mut local = |name: &str, is_short: bool, how: FromHost, is_large: bool| {
            let actor = match how.actor {
                Actor::Root => "root",
                Actor::User => "user",
                Actor::RawUser => "raw-user",
            };
            let name = format!("outward/{actor}/{name}/{}", condition.name());
            let case = Case::new(name, Attacker::LocalUser, Outcome::Held, move |stage| {
                stage.require(how.actor)?;
                stage.be(condition)?;
                watch(stage, |stage| send_from_host(stage, how, is_large))
            });
            cases.push(if is_short { case } else { case.long() });
        };
        let udp = |actor, port| FromHost { port, ..FromHost::udp(actor) };
        let tcp = |actor| FromHost { transport: Transport::Tcp, ..udp(actor, PLAIN_PORT) };
        local("udp", one_guard, udp(Actor::Root, 0), false);
        local("tcp-6443", one_guard, tcp(Actor::Root), false);
        local("tcp-6443", false, tcp(Actor::User), false);
        if is_gone {
            // While the agent runs, its port is in use.
            let root = udp(Actor::Root, WIREGUARD);
            local("udp-51830", one_guard, root, false);
            local("udp-51830", one_guard, udp(Actor::User, WIREGUARD), false);
            local("udp-51830-fragments", condition == Condition::NoTable, root, true);
        }
        for mark in MARKS {
            let marked = |actor| FromHost { mark: Some(mark), ..udp(actor, 0) };
            let name = format!("mark-{mark:#x}");
            let is_short = condition == Condition::Running || one_guard && mark == 0x10;
            local(&name, is_short, marked(Actor::Root), false);
            local(&name, is_short && mark == 0x10, marked(Actor::RawUser), false);
        }
        let marked = FromHost { mark: Some(0x10), ..udp(Actor::User, 0) };
        local("mark-0x10", false, marked, false);
        // The packet has the mark and the port of the agent, but another owner.
        let own = FromHost {
            actor: Actor::RawUser,
            transport: Transport::Raw,
            port: WIREGUARD,
            mark: Some(0x10),
        };
        local("mark-0x10-from-51830", condition == Condition::Running, own, false);

        let mut pod = |name: &str, is_short: bool, how: FromPod, mark: Option<u32>| {
            let name = format!("outward/pod/{name}/{}", condition.name());
            let case = Case::new(name, Attacker::Pod, Outcome::Held, move |stage| {
                stage.be(condition)?;
                let marks = mark.map(|mark| foreign_mark(stage, mark)).transpose()?;
                let outcome = watch(stage, |stage| send_from_pod(stage, how));
                drop(marks);
                outcome
            });
            cases.push(if is_short { case } else { case.long() });
        };
        pod("udp-4444", one_guard, FromPod::Udp(PORT), None);
        pod("udp-51830", true, FromPod::Udp(WIREGUARD), None);
        pod("tcp-6443", one_guard, FromPod::Tcp(PLAIN_PORT), None);
        pod("udp-51830-fragments", one_guard, FromPod::Fragments(WIREGUARD), None);
        pod("udp-4444-fragments", false, FromPod::Fragments(PORT), None);
        let options = FromPod::Extended(WIREGUARD, spoof::DESTINATION_OPTIONS);
        pod("udp-51830-options", one_guard, options, None);
        pod("udp-51830-hop-by-hop", false, FromPod::Extended(WIREGUARD, spoof::HOP_BY_HOP), None);
        for mark in MARKS {
            let is_short = matches!(
                (condition, mark),
                (Condition::Running, 0x10 | 0x1_bd10)
                    | (Condition::NoTable | Condition::NoRoutes, 0x1_bd10)
            );
            pod(&format!("marked-{mark:#x}"), is_short, FromPod::Udp(PORT), Some(mark));
            let name = format!("marked-{mark:#x}-from-51830");
            pod(&name, false, FromPod::Udp(WIREGUARD), Some(mark));
        }
        if condition != Condition::NoRoutes {
            // Only the routing guard can stop these packets: they pass no nftables hook.
            let name = format!("outward/pod/ebpf-redirect/{}", condition.name());
            let case = Case::new(name, Attacker::Pod, Outcome::Held, move |stage| {
                stage.be(condition)?;
                redirected(stage)
            });
            cases.push(case);
        }
        if condition == Condition::Running {
            for mark in MARKS {
                let name = format!("outward/answer/connection-mark-{mark:#x}");
                let case = Case::new(name, Attacker::Member, Outcome::Held, move |stage| {
                    answer(stage, mark)
                });
                cases.push(if mark == 0x1_bd10 { case } else { case.long() });
            }
        }
    }
    cases
}

/// Returns whether any traffic of the mesh leaves in clear while `attempt` runs.
fn watch(
    stage: &mut Stage<'_>,
    attempt: impl FnOnce(&mut Stage<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let mut tap = stage.tap()?;
    // The first datagram makes the kernel resolve the gateway's link-layer address.
    let ready = stage.finish_in_clear()?;
    count_in_clear(stage, &mut tap, &ready)?;
    attempt(stage)?;
    let last = stage.finish_in_clear()?;
    let in_clear = count_in_clear(stage, &mut tap, &last)?;
    Ok(if in_clear == 0 { Outcome::Held } else { Outcome::InClear })
}

/// Counts the packets in clear that the tap sees, up to the packet with the payload `last`.
fn count_in_clear(stage: &Stage<'_>, tap: &mut Tap, last: &[u8]) -> anyhow::Result<u32> {
    let overlay = stage.overlay()?;
    let inner: Vec<IpNet> = overlay.a.into_iter().chain(overlay.b).map(IpNet::from).collect();
    let seen = tap.in_clear(stage.tag.bytes(), &inner, last, ARRIVAL)?;
    seen.ok_or_else(|| anyhow::anyhow!("the capture does not see the control datagram of a"))
}

/// Returns the ways from these addresses (of `a` or its pod) to both mesh addresses of `b`.
fn ways(stage: &Stage<'_>, from: [IpAddr; 2]) -> anyhow::Result<[Way; 2]> {
    let [v4, v6] = stage.overlay()?.b;
    let way = |from, to| Way { from, to: SocketAddr::new(to, PORT) };
    Ok([way(from[0], v4), way(from[1], v6)])
}

/// Sends datagrams from a socket of the victim to `b`. With `is_large`, each needs fragments.
fn send_from_host(stage: &mut Stage<'_>, how: FromHost, is_large: bool) -> anyhow::Result<()> {
    let number = stage.number();
    let payload = stage.tag.payload(number).repeat(if is_large { LARGE } else { 1 });
    let ways = ways(stage, stage.overlay()?.a)?;
    how.send(stage.hosts.a.namespace(), &ways, &payload, TIMES)
}

/// Sends packets from the pod of the victim to `b`.
fn send_from_pod(stage: &mut Stage<'_>, how: FromPod) -> anyhow::Result<()> {
    let number = stage.number();
    let pod = &stage.hosts.pod;
    let ways = ways(stage, [pod.addresses()[0], pod.addresses()[1]])?;
    let spoofer = Spoofer::new(pod.namespace(), "eth0", stage.hosts.a.namespace(), "cni0")?;
    how.send(&spoofer, &ways, &stage.tag.payload(number), TIMES)
}

/// Checks packets of a pod that an eBPF program on its link redirects by the kernel's routing
/// tables, past the network stack of the host.
fn redirected(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    /// Offset of the IPv4 TTL in a frame. Forwarding decrements the TTL, redirecting does not.
    const HOPS: usize = 14 + 8;
    let redirect = Redirect::attach(stage.hosts.a.namespace(), POD_PORT, Choice::ByLookup)
        .map_err(|error| {
            Unavailable(format!("cannot attach an eBPF program to a link: {error:#}"))
        })?;
    let mut tap = stage.tap()?;
    let number = stage.number();
    let payload = stage.tag.payload(number).map(|byte| !byte);
    let pod = &stage.hosts.pod;
    let to = SocketAddr::new(stage.hosts.cp.addresses()[0], PORT);
    let spoofer = Spoofer::new(pod.namespace(), "eth0", stage.hosts.a.namespace(), "cni0")?;
    let way = Way { from: pod.addresses()[0], to };
    FromPod::Udp(PORT).send(&spoofer, &[way], &payload, TIMES)?;
    let hops =
        tap.find(ARRIVAL, |frame| find(frame, &payload).and_then(|_| frame.get(HOPS).copied()))?;
    anyhow::ensure!(hops == Some(spoof::HOPS), "the eBPF program does not redirect: TTL {hops:?}");
    let outcome = watch(stage, |stage| {
        send_from_pod(stage, FromPod::Udp(PORT))?;
        send_from_pod(stage, FromPod::Udp(WIREGUARD))
    });
    drop(redirect);
    outcome
}

/// Nftables table of another program on `a`. Dropping this value deletes the table.
struct ForeignTable(std::sync::Arc<crate::lab::topology::Host>);

impl ForeignTable {
    /// Loads a table with this rule on `a`.
    fn load(stage: &Stage<'_>, rule: Rule) -> anyhow::Result<Self> {
        let chain = Chain::base(ChainKind::Filter, Hook::Prerouting, MANGLE).rule(rule);
        let table = Table::new(TableFamily::Inet, FOREIGN).chain("mark", chain);
        stage.hosts.a.namespace().run(|| Ok(Nft::open()?.load(&table)?))?;
        Ok(Self(std::sync::Arc::clone(&stage.hosts.a)))
    }
}

impl Drop for ForeignTable {
    fn drop(&mut self) {
        // The table is already gone if the whole ruleset was flushed.
        let _ = self
            .0
            .namespace()
            .run(|| Ok(Nft::open()?.delete(TableFamily::Inet, FOREIGN).map(drop)?));
    }
}

/// Marks packets from pods, as CNI plugins and other meshes do.
fn foreign_mark(stage: &Stage<'_>, mark: u32) -> anyhow::Result<ForeignTable> {
    ForeignTable::load(stage, Rule::new().input("cni0").set_mark(mark, u32::MAX))
}

/// Answers datagrams from the tunnel while another program sets the connection mark.
fn answer(stage: &mut Stage<'_>, mark: u32) -> anyhow::Result<Outcome> {
    stage.be(Condition::Running)?;
    let udp = Rule::new().input(LINK).protocol(libc::IPPROTO_UDP as u8);
    let marks = ForeignTable::load(stage, udp.set_ct_mark(mark, u32::MAX))?;
    let outcome = watch(stage, |stage| {
        for family in 0..2 {
            let (number, answer) = (stage.number(), stage.number());
            let payload = stage.tag.payload(number);
            let to = SocketAddr::new(stage.overlay()?.a[family], PORT);
            stage.hosts.b.namespace().run(|| {
                let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
                let socket = std::net::UdpSocket::bind((any, 0))?;
                for _ in 0..TIMES {
                    socket.send_to(&payload, to)?;
                }
                Ok(())
            })?;
            let asked = stage.listener(Place::A)?.answers(number, answer, TIMES as u32, ARRIVAL)?;
            anyhow::ensure!(asked, "no datagram comes through the tunnel from b to a");
        }
        Ok(())
    });
    drop(marks);
    outcome
}
