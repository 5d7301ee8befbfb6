//! Background traffic: datagrams of the pattern from each node to all others, without pause and
//! regardless of errors. If a guard is missing at any moment, there is traffic that could leak.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use super::interrupt;
use super::namespace::Namespace;
use super::traffic::{CELL, MARK, Pattern};

/// UDP port on which every member listens.
pub const PORT: u16 = 4_444;
/// Pause between two rounds of one member's datagrams to all others.
const INTERVAL: Duration = Duration::from_millis(5);
/// Interval at which a listener checks whether to stop.
const STOP_CHECK: Duration = Duration::from_millis(50);

/// A node that takes part in the background traffic.
#[derive(Debug)]
pub struct Member<'a> {
    /// The network namespace of the node.
    pub namespace: &'a Namespace,
    /// The node's addresses in the mesh.
    pub addresses: Vec<IpAddr>,
    received: Received,
}

/// Counts of the datagrams that a member received.
#[derive(Debug, Default)]
struct Received {
    /// Datagrams of the pattern over IPv4.
    v4: AtomicU64,
    v6: AtomicU64,
    /// Datagrams with the tag of spoofed packets.
    spoofed: AtomicU64,
}

/// The background traffic between members.
#[derive(Debug)]
pub struct BackgroundTraffic<'a> {
    members: Vec<Member<'a>>,
    pattern: Pattern,
    tag: [u8; MARK],
    stop: AtomicBool,
}

impl<'a> Member<'a> {
    /// Creates a member that has received nothing yet.
    pub fn new(namespace: &'a Namespace, addresses: Vec<IpAddr>) -> Self {
        Self { namespace, addresses, received: Received::default() }
    }

    /// Returns the number of datagrams received from other members: over IPv4, over IPv6.
    pub fn received(&self) -> [u64; 2] {
        [&self.received.v4, &self.received.v6].map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Returns the number of spoofed datagrams that reached a socket.
    pub fn spoofed(&self) -> u64 {
        self.received.spoofed.load(Ordering::Relaxed)
    }
}

impl<'a> BackgroundTraffic<'a> {
    /// Creates background traffic of the pattern. A datagram that begins with `tag` counts as
    /// spoofed.
    pub fn new(members: Vec<Member<'a>>, pattern: Pattern, tag: [u8; MARK]) -> Self {
        Self { members, pattern, tag, stop: AtomicBool::new(false) }
    }

    /// Returns the members.
    pub fn members(&self) -> &[Member<'a>] {
        &self.members
    }

    /// Starts a listener for each member. All sockets are bound when this returns.
    pub fn listen<'scope, 'env>(
        &'scope self,
        scope: &'scope Scope<'scope, 'env>,
    ) -> anyhow::Result<Vec<ScopedJoinHandle<'scope, anyhow::Result<()>>>> {
        let listen = |member: &'scope Member<'a>| {
            let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT);
            let socket = member.namespace.run(|| Ok(UdpSocket::bind(any)?))?;
            socket.set_read_timeout(Some(STOP_CHECK))?;
            member.namespace.thread(scope, "listen", move || self.receive(member, &socket))
        };
        self.members.iter().map(listen).collect()
    }

    /// Starts a sender for each member.
    pub fn send_all<'scope, 'env>(
        &'scope self,
        scope: &'scope Scope<'scope, 'env>,
    ) -> anyhow::Result<Vec<ScopedJoinHandle<'scope, anyhow::Result<()>>>> {
        let send = |index: usize| {
            let namespace = self.members[index].namespace;
            namespace.thread(scope, "send", move || self.send(index))
        };
        (0..self.members.len()).map(send).collect()
    }

    /// Asks listeners and senders to stop.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Returns whether the traffic was stopped or the lab interrupted.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || interrupt::raised()
    }

    fn receive(&self, member: &Member<'_>, socket: &UdpSocket) -> anyhow::Result<()> {
        let mut buffer = [0; 2048];
        let add = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        while !self.stopped() {
            let (length, from) = match socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
                {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let bytes = &buffer[..length];
            if bytes.starts_with(&self.tag) {
                add(&member.received.spoofed);
            } else if bytes.starts_with(self.pattern.mark()) {
                let v4 = from.ip().to_canonical().is_ipv4();
                add(if v4 { &member.received.v4 } else { &member.received.v6 });
            }
        }
        Ok(())
    }

    /// Sends to each destination in three ways that the kernel handles differently: from an unbound
    /// socket, from a socket bound to the own mesh address, and from a connected socket, which
    /// caches its route. Errors are ignored: guards cause them.
    fn send(&self, index: usize) -> anyhow::Result<()> {
        let own = &self.members[index].addresses;
        let others = self.members.iter().enumerate().filter(|(other, _)| *other != index);
        let targets: Vec<_> =
            others.flat_map(|(_, member)| &member.addresses).map(|ip| (*ip, PORT).into()).collect();
        let unspecified = |v4: bool| -> IpAddr {
            if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
        };
        let free = [true, false].map(|v4| UdpSocket::bind((unspecified(v4), 0)));
        let [free4, free6] = free;
        let (free4, free6) = (free4?, free6?);
        let mut bound: BTreeMap<bool, UdpSocket> = BTreeMap::new();
        let mut connected: BTreeMap<SocketAddr, UdpSocket> = BTreeMap::new();
        let mut number = 0;
        let mut next = Instant::now();
        while !self.stopped() {
            for target in &targets {
                let target: &SocketAddr = target;
                let v4 = target.is_ipv4();
                let mut bytes = [0; 2 * CELL];
                self.pattern.fill(number, &mut bytes);
                number += 2;
                let _ = if v4 { &free4 } else { &free6 }.send_to(&bytes, target);
                if let Some(own) = own.iter().find(|own| own.is_ipv4() == v4)
                    && !bound.contains_key(&v4)
                    && let Ok(socket) = UdpSocket::bind((*own, 0))
                {
                    bound.insert(v4, socket);
                }
                if let Some(socket) = bound.get(&v4) {
                    let _ = socket.send_to(&bytes, target);
                }
                if !connected.contains_key(target) {
                    let socket = UdpSocket::bind((unspecified(v4), 0))?;
                    if socket.connect(target).is_ok() {
                        connected.insert(*target, socket);
                    }
                }
                if let Some(socket) = connected.get(target) {
                    let _ = socket.send(&bytes);
                }
            }
            next = (next + INTERVAL).max(Instant::now());
            interrupt::sleep(next.saturating_duration_since(Instant::now()))?;
        }
        Ok(())
    }
}

/// Stops the traffic when it is dropped, also while unwinding: otherwise the scope would wait for
/// its threads.
#[derive(Debug)]
pub struct StopOnDrop<'a, 'b>(pub &'a BackgroundTraffic<'b>);

impl Drop for StopOnDrop<'_, '_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}
