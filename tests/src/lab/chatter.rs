//! Datagrams of the pattern from each node to all others, without pause, whatever becomes of them: so
//! that whichever guard is gone at any moment, there is something that could leak.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use super::interrupt;
use super::namespace::Namespace;
use super::traffic::{CELL, MARK, Pattern};

/// Where every member listens.
pub const PORT: u16 = 4_444;
/// Between two rounds of one member to all others.
const PACE: Duration = Duration::from_millis(5);
/// How often a listener looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// Who takes part.
#[derive(Debug)]
pub struct Member<'a> {
    /// Its machine.
    pub namespace: &'a Namespace,
    /// Its addresses in the mesh.
    pub addresses: Vec<IpAddr>,
    heard: Heard,
}

/// What reached a member.
#[derive(Debug, Default)]
struct Heard {
    /// Of the pattern, by family.
    v4: AtomicU64,
    v6: AtomicU64,
    /// With the tag of what is forged.
    forged: AtomicU64,
}

/// Members and what they say.
#[derive(Debug)]
pub struct Chatter<'a> {
    members: Vec<Member<'a>>,
    pattern: Pattern,
    tag: [u8; MARK],
    stop: AtomicBool,
}

impl<'a> Member<'a> {
    /// One that has heard nothing yet.
    pub fn new(namespace: &'a Namespace, addresses: Vec<IpAddr>) -> Self {
        Self { namespace, addresses, heard: Heard::default() }
    }

    /// Datagrams of others that arrived: by IPv4, by IPv6.
    pub fn heard(&self) -> [u64; 2] {
        [&self.heard.v4, &self.heard.v6].map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Forged datagrams that a socket was given.
    pub fn forged(&self) -> u64 {
        self.heard.forged.load(Ordering::Relaxed)
    }
}

impl<'a> Chatter<'a> {
    /// Of the pattern; what begins with `tag` is forged.
    pub fn new(members: Vec<Member<'a>>, pattern: Pattern, tag: [u8; MARK]) -> Self {
        Self { members, pattern, tag, stop: AtomicBool::new(false) }
    }

    /// The members.
    pub fn members(&self) -> &[Member<'a>] {
        &self.members
    }

    /// Starts listening everywhere; each listener listens once this returns.
    pub fn listen<'scope, 'env>(
        &'scope self,
        scope: &'scope Scope<'scope, 'env>,
    ) -> anyhow::Result<Vec<ScopedJoinHandle<'scope, anyhow::Result<()>>>> {
        let listen = |member: &'scope Member<'a>| {
            let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT);
            let socket = member.namespace.run(|| Ok(UdpSocket::bind(any)?))?;
            socket.set_read_timeout(Some(LOOK))?;
            member.namespace.thread(scope, "listen", move || self.hear(member, &socket))
        };
        self.members.iter().map(listen).collect()
    }

    /// Starts talking everywhere.
    pub fn talk<'scope, 'env>(
        &'scope self,
        scope: &'scope Scope<'scope, 'env>,
    ) -> anyhow::Result<Vec<ScopedJoinHandle<'scope, anyhow::Result<()>>>> {
        let talk = |index: usize| {
            let namespace = self.members[index].namespace;
            namespace.thread(scope, "talk", move || self.speak(index))
        };
        (0..self.members.len()).map(talk).collect()
    }

    /// Ends listeners and talkers, soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether it was stopped.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || interrupt::raised()
    }

    fn hear(&self, member: &Member<'_>, socket: &UdpSocket) -> anyhow::Result<()> {
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
                add(&member.heard.forged);
            } else if bytes.starts_with(self.pattern.mark()) {
                let v4 = from.ip().to_canonical().is_ipv4();
                add(if v4 { &member.heard.v4 } else { &member.heard.v6 });
            }
        }
        Ok(())
    }

    /// Each destination is sent to in three ways, since the kernel treats them apart: from a socket
    /// that is bound to nothing, from one bound to our own mesh address, and from a connected one,
    /// which remembers its route. A refusal is what a guard does.
    fn speak(&self, index: usize) -> anyhow::Result<()> {
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
            next = (next + PACE).max(Instant::now());
            interrupt::pass(next.saturating_duration_since(Instant::now()))?;
        }
        Ok(())
    }
}

/// Stops the chatter when it is dropped, also while unwinding: its threads would be waited for.
#[derive(Debug)]
pub struct StopOnDrop<'a, 'b>(pub &'a Chatter<'b>);

impl Drop for StopOnDrop<'_, '_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}
