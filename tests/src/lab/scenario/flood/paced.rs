//! Paced datagrams between two hosts: how many of them arrive.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use towline_dataplane::arena::{RecvBatch, SendBatch};
use towline_dataplane::drops::Drops;
use towline_dataplane::{Offloads, Ready, Udp, UdpIo, open_udp_with};

use crate::lab::interrupt::sleep;
use crate::lab::namespace::Namespace;

/// Size of a datagram in bytes. It fits into the tunnel's MTU in both families.
const SIZE: usize = 1_280;
/// Number of datagrams that are sent together. At 500 Mb/s this is a burst every 0.7 ms.
const BURST: usize = 32;
/// Time by which a sender that had no processor may catch up. Beyond it, its datagrams are not sent, and not
/// counted as lost.
const CATCH_UP: Duration = Duration::from_millis(5);
/// Time for the last datagrams to arrive after the sender ended.
const DRAIN: Duration = Duration::from_millis(300);
/// Number of receive buffers.
const SLOTS: usize = 16;
/// Interval at which an idle receiver checks whether the run is over, in milliseconds.
const LOOK: u16 = 50;

/// One direction of paced traffic.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) from: &'a Namespace,
    pub(super) to: &'a Namespace,
    /// Address of the host `to`.
    pub(super) address: IpAddr,
    /// Payload in megabits per second.
    pub(super) mbit_per_s: u64,
}

/// Traffic of one run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Carried {
    sent: u64,
    arrived: u64,
    took: Duration,
}

impl Carried {
    /// Returns the payload that was sent, in megabits per second.
    pub(super) fn sent_mbit_per_s(&self) -> f64 {
        self.mbit_per_s(self.sent)
    }

    /// Returns the payload that arrived, in megabits per second.
    pub(super) fn arrived_mbit_per_s(&self) -> f64 {
        self.mbit_per_s(self.arrived)
    }

    /// Returns the share of the sent datagrams that did not arrive, in percent.
    pub(super) fn lost_pct(&self) -> f64 {
        if self.sent == 0 {
            return 100.0;
        }
        self.sent.saturating_sub(self.arrived) as f64 / self.sent as f64 * 100.0
    }

    fn mbit_per_s(&self, datagrams: u64) -> f64 {
        datagrams as f64 * (SIZE * 8) as f64 / 1e6 / self.took.as_secs_f64()
    }
}

/// Flags and counters that sender and receiver share.
#[derive(Debug, Default)]
struct Shared {
    is_sent: AtomicBool,
    is_over: AtomicBool,
    sent: AtomicU64,
    arrived: AtomicU64,
}

/// Sends paced datagrams while `action` runs. Returns its result and the traffic.
pub(super) fn send_while<T>(
    way: &Way<'_>,
    action: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Carried)> {
    let open = |host: &Namespace| host.run(|| Ok(open_udp_with(0, 0, Offloads::default())?));
    let (sender, receiver) = (open(way.from)?, open(way.to)?);
    let to = SocketAddr::new(way.address, receiver.port());
    let shared = &Shared::default();
    let begun = Instant::now();
    let (result, took) = std::thread::scope(|scope| {
        scope.spawn(move || send(sender, to, way.mbit_per_s, shared));
        scope.spawn(move || receive(receiver, shared));
        let result = action();
        shared.is_sent.store(true, Ordering::Relaxed);
        let took = begun.elapsed();
        let drained = sleep(DRAIN);
        shared.is_over.store(true, Ordering::Relaxed);
        (result.and_then(|result| Ok(drained.map(|()| result)?)), took)
    });
    let carried = Carried {
        sent: shared.sent.load(Ordering::Relaxed),
        arrived: shared.arrived.load(Ordering::Relaxed),
        took,
    };
    Ok((result?, carried))
}

fn send(mut socket: Udp, to: SocketAddr, mbit_per_s: u64, shared: &Shared) {
    let pace = Duration::from_secs_f64((BURST * SIZE * 8) as f64 / (mbit_per_s as f64 * 1e6));
    let mut batch = SendBatch::new(BURST * SIZE, BURST);
    let drops = Drops::default();
    let mut next = Instant::now();
    while !shared.is_sent.load(Ordering::Relaxed) {
        batch.clear();
        for _ in 0..BURST {
            batch.push(to.into(), &[0x5a; SIZE]);
        }
        let now = Instant::now();
        socket.send(now, &batch, &drops);
        shared.sent.fetch_add(BURST as u64, Ordering::Relaxed);
        next = (next + pace).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn receive(mut socket: Udp, shared: &Shared) {
    let mut batch = RecvBatch::new(SLOTS);
    let drops = Drops::default();
    loop {
        batch.clear();
        if socket.receive(Ready::ALL, &mut batch, &drops).is_err() {
            return;
        }
        let mut arrived = 0;
        for received in batch.received() {
            if let Ok(run) = batch.datagrams(received) {
                arrived += run.iter().count() as u64;
            }
        }
        shared.arrived.fetch_add(arrived, Ordering::Relaxed);
        if arrived == 0 {
            if shared.is_over.load(Ordering::Relaxed) {
                return;
            }
            let fds = socket.fds();
            let mut fds: Vec<_> =
                fds.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
            // If polling fails, the next receive call returns the error.
            let _ = poll(&mut fds, PollTimeout::from(LOOK));
        }
    }
}
