//! The worker: a thread with a loop that moves packets. A readable TUN queue, a readable socket, a
//! command or a timer wakes it.
//!
//! One worker handles both directions: on two cores it reaches the throughput of two threads with
//! lower latency and less CPU time. More workers (shards) each have their own queue of the TUN and
//! their own sockets, and share the peer table. On an established session no packet passes from one
//! worker to another, so a flow keeps its order: the TUN steers all packets for one address to one
//! queue, and the kernel steers all datagrams between the same two addresses and ports to one socket.
//! Packets that waited for a session are sent by the worker that completes the handshake.
//!
//! A worker may have helpers, which only seal its batches ([`SealAhead`]). It sends them itself, in order.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use towline_core::path::Path;
use towline_core::peer_table::Observation;
use towline_types::id::WireguardKey;

use super::arena::{RecvBatch, SendBatch, TunBatch, WriteBatch};
use super::batch_delay::BatchDelay;
use super::drops::{DropReason, Drops};
use super::events::{Fault, FaultState};
use super::lone::LoneItems;
use super::pipeline::{Coalesced, Pipeline, RECEIVE_SLOTS};
use super::seal_ahead::SealAhead;
use super::spin::Spin;
use super::tick_timer::TickTimer;
use super::tun::TunIo;
use super::udp::{Ready, TooBig, Udp, UdpIo};

/// Interval between two ticks of the tunnel timers while any tunnel is live.
const TICK: Duration = Duration::from_millis(250);
/// Number of ticks between two readings of the link's MTU.
const MTU_TICKS: u32 = 8;
/// Number of full super-packets from the TUN that one batch has room for.
const TUN_LARGE: usize = 4;
/// Largest number of packets from the TUN in one batch.
const TUN_PACKETS: usize = 256;
/// Size of the send batch in bytes.
const SEND_BYTES: usize = 512 * 1024;
/// Largest number of GSO batches in the send batch.
const SEND_GSO_BATCHES: usize = 256;
/// Largest number of commands that wait for the worker. Further commands are dropped and counted;
/// the core repeats those that are still needed.
const MAX_COMMANDS: usize = 4096;

/// A command to the worker.
#[derive(Debug)]
pub(super) enum Command {
    /// Starts a handshake on all these paths.
    Handshake(WireguardKey, Vec<Path>),
    /// Sends a datagram unencrypted.
    Send(Path, Vec<u8>),
    /// Sends a datagram with fragmentation forbidden, to find out whether the path to this peer
    /// takes its size.
    SendWhole(WireguardKey, Path, Vec<u8>),
    /// Sends a datagram unencrypted with this hop limit (TTL).
    SendLimited(Path, Vec<u8>, u8),
    /// Sends datagrams of one length together.
    Train(Path, Vec<Vec<u8>>),
    /// Replaces the sockets of the second port.
    SecondPort(Option<Box<Udp>>),
}

/// The side of a worker that other threads use: commands, stop flag and loop counter.
#[derive(Debug)]
pub(super) struct Inbox {
    /// Commands that wait, at most [`MAX_COMMANDS`].
    commands: Mutex<Vec<Command>>,
    /// Descriptor that wakes the worker.
    wake: EventFd,
    /// True once the worker must end. Never cleared.
    stop: AtomicBool,
    /// Number of commands that were dropped because the queue was full.
    refused: AtomicU64,
    /// Number of loop iterations. Only the worker writes it.
    loops: AtomicU64,
}

impl Inbox {
    pub(super) fn new() -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            commands: Mutex::new(Vec::new()),
            wake: EventFd::from_value_and_flags(0, flags)?,
            stop: AtomicBool::new(false),
            refused: AtomicU64::new(0),
            loops: AtomicU64::new(0),
        })
    }

    pub(super) fn push(&self, command: Command) {
        let mut commands = self.commands.lock();
        if commands.len() < MAX_COMMANDS {
            commands.push(command);
        } else {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        drop(commands);
        self.wake();
    }

    /// Returns the number of commands that were dropped because the queue was full.
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Returns the number of loop iterations. A wake-up causes an iteration also in an idle worker.
    pub(super) fn loops(&self) -> u64 {
        self.loops.load(Ordering::Relaxed)
    }

    fn count_loop(&self) {
        // There is one writer, so no locked instruction is needed.
        self.loops.store(self.loops.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    pub(super) fn wake(&self) {
        // It fails only when the counter is at its maximum, and then a wake-up is pending anyway.
        let _ = self.wake.write(1);
    }
}

/// State that all workers share. One of them advances the timers for all.
#[derive(Debug)]
pub(super) struct WorkerShared {
    started: Instant,
    /// Time of the last tick, in milliseconds after the start.
    ticked: AtomicU64,
    /// True if some tunnel needed further ticks at the last tick.
    live: AtomicBool,
    /// MTU of the link in bytes.
    mtu: AtomicUsize,
}

impl WorkerShared {
    pub(super) fn new(started: Instant) -> Self {
        Self {
            started,
            ticked: AtomicU64::new(0),
            live: AtomicBool::new(true),
            mtu: AtomicUsize::new(usize::MAX),
        }
    }

    /// Returns whether the caller must run the tick that is due now. Returns true to one worker
    /// only.
    fn claim(&self, now: Instant) -> bool {
        let now = now.saturating_duration_since(self.started).as_millis() as u64;
        let last = self.ticked.load(Ordering::Relaxed);
        // The ticks of two workers may be due a little apart. The margin accepts a tick that is due
        // slightly less than `TICK` after that of the other worker.
        now >= last + (TICK - TICK / 8).as_millis() as u64
            && self.ticked.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// One worker: its queue of the TUN, its sockets and its buffers.
pub(super) struct Worker<T, U> {
    tun: T,
    udp: SealAhead<U>,
    pipeline: Pipeline,
    shared: Arc<WorkerShared>,
    inbox: Arc<Inbox>,
    drops: Arc<Drops>,
    faults: FaultState,
    epoll: Epoll,
    /// Timer of the next tick. Not set while no tunnel is live and no events wait.
    tick: TickTimer,
    received: RecvBatch,
    writes: WriteBatch,
    read: TunBatch,
    out: SendBatch,
    /// Whether to take one packet from the TUN, or all.
    lone_packets: LoneItems,
    /// Whether to receive one datagram, or all.
    lone_datagrams: LoneItems,
    batch_delay: BatchDelay,
    spin: Spin,
}

/// Returns an empty send batch of a worker.
pub(super) fn send_batch() -> SendBatch {
    SendBatch::new(SEND_BYTES, SEND_GSO_BATCHES)
}

/// Epoll token of the inbox.
const WAKE: u64 = 0;
/// Epoll token of the TUN.
const TUN: u64 = 1;
/// Epoll token of the timer.
const TIMER: u64 = 2;
/// Epoll token of the first socket. The tokens after it belong to the further sockets.
const FIRST_SOCKET: u64 = 3;
/// Largest number of descriptors that are ready at once: the inbox, the TUN, the timer, and a socket of
/// each family for each of two ports.
const READY: usize = 7;

impl<T: TunIo, U: UdpIo> Worker<T, U> {
    pub(super) fn new(
        tun: T,
        udp: SealAhead<U>,
        pipeline: Pipeline,
        shared: Arc<WorkerShared>,
        inbox: Arc<Inbox>,
        drops: Arc<Drops>,
        faults: FaultState,
    ) -> nix::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&inbox.wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        epoll.add(tun.fd(), EpollEvent::new(EpollFlags::EPOLLIN, TUN))?;
        let tick = TickTimer::new()?;
        epoll.add(&tick, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        for (place, fd) in (FIRST_SOCKET..).zip(udp.fds()) {
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, place))?;
        }
        let batch_delay =
            BatchDelay::new(udp.fds().into_iter().chain([inbox.wake.as_fd()])).map_err(errno)?;
        Ok(Self {
            tun,
            udp,
            pipeline,
            shared,
            inbox,
            drops,
            faults,
            epoll,
            tick,
            received: RecvBatch::new(RECEIVE_SLOTS),
            writes: WriteBatch::new(RECEIVE_SLOTS),
            read: TunBatch::new(TUN_LARGE, TUN_PACKETS),
            out: send_batch(),
            lone_packets: LoneItems::default(),
            lone_datagrams: LoneItems::default(),
            batch_delay,
            spin: Spin::new(Duration::ZERO),
        })
    }

    /// Sets for how long the worker looks for more packets before it sleeps.
    pub(super) fn set_spin(&mut self, longest: Duration) {
        self.spin = Spin::new(longest);
    }

    /// Runs the loop until [`Inbox::stop`] is called or a fault occurs.
    pub(super) fn run(mut self) {
        BatchDelay::prepare_thread();
        if let Err(error) = self.serve() {
            self.faults.set(Fault::Worker(error.to_string()));
        }
    }

    fn serve(&mut self) -> nix::Result<()> {
        let mut ticks = 0u32;
        self.refresh_mtu();
        loop {
            let mut ready = [EpollEvent::empty(); READY];
            let ready = match self.wait(&mut ready) {
                Ok(count) => &ready[..count],
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(error),
            };
            // An iteration reads the clock here only, unless the worker spins or delays.
            let now = Instant::now();
            self.inbox.count_loop();
            self.pipeline.set_mtu(self.shared.mtu.load(Ordering::Relaxed));
            let is_ready = |what: u64| ready.iter().any(|event| event.data() == what);
            if is_ready(WAKE) {
                if self.inbox.stop.load(Ordering::Acquire) {
                    self.udp.finish(now, &self.drops);
                    return Ok(());
                }
                self.run_commands(now)?;
            }
            let sockets = ready.iter().filter_map(|event| event.data().checked_sub(FIRST_SOCKET));
            let sockets = sockets.fold(Ready::default(), |all, place| all.with(place as usize));
            if sockets.is_empty() {
                self.lone_datagrams.record_empty();
            } else {
                self.inbound(now, sockets)?;
            }
            if is_ready(TUN) {
                self.outbound(now)?;
                let (packets, bytes) = (self.read.packets().len(), self.read.bytes());
                let delay = BatchDelay::due(packets, bytes, || now.elapsed());
                if !delay.is_zero() {
                    self.udp.finish(now, &self.drops);
                    self.batch_delay.wait(delay);
                }
            } else {
                self.lone_packets.record_empty();
            }
            self.spin.record_work(!sockets.is_empty() || is_ready(TUN));
            if !self.tick.is_set() {
                self.tick.set(now, TICK)?;
            }
            if self.tick.is_due(now) {
                if self.shared.claim(now) {
                    let live = self.pipeline.tick(now, &mut self.out, &mut self.udp);
                    self.shared.live.store(live, Ordering::Relaxed);
                }
                // A worker that runs the tick sends only its own waiting observations, so each
                // worker retries here.
                self.pipeline.events().retry();
                let live = self.shared.live.load(Ordering::Relaxed);
                if live || self.pipeline.needs_tick() {
                    self.tick.set(now, TICK)?;
                } else {
                    self.tick.clear()?;
                }
                ticks = ticks.wrapping_add(1);
                if ticks.is_multiple_of(MTU_TICKS) {
                    self.refresh_mtu();
                }
            }
        }
    }

    /// Waits for input or the timer. Returns the number of descriptors that are ready.
    fn wait(&mut self, ready: &mut [EpollEvent]) -> nix::Result<usize> {
        if self.udp.is_behind() {
            let count = self.epoll.wait(ready, EpollTimeout::ZERO)?;
            if count > 0 {
                self.udp.wake_helpers();
                return Ok(count);
            }
            self.udp.finish(Instant::now(), &self.drops);
        }
        if self.spin.is_off() {
            return self.epoll.wait(ready, EpollTimeout::NONE);
        }
        let began = Instant::now();
        let longest = self.spin.due();
        if !longest.is_zero() {
            loop {
                let count = self.epoll.wait(ready, EpollTimeout::ZERO)?;
                if count > 0 {
                    self.spin.record_found(began.elapsed());
                    return Ok(count);
                }
                if began.elapsed() >= longest {
                    break;
                }
                // Without this the thread that sends the next packet may not run at all.
                std::thread::yield_now();
            }
            self.spin.record_nothing_found();
        }
        let count = self.epoll.wait(ready, EpollTimeout::NONE)?;
        self.spin.record_sleep(began.elapsed());
        Ok(count)
    }

    fn run_commands(&mut self, now: Instant) -> nix::Result<()> {
        let _ = self.inbox.wake.read();
        // Commands follow a plan, and applying the plan may just have changed the link's MTU.
        // Padding beyond the MTU would cause every outer packet to be fragmented.
        self.refresh_mtu();
        let commands = std::mem::take(&mut *self.inbox.commands.lock());
        for command in commands {
            match command {
                Command::Handshake(peer, to) => {
                    self.pipeline.initiate(now, &peer, to, &mut self.out);
                }
                Command::Send(to, datagram) => {
                    if !self.out.push(to, &datagram) {
                        self.drops.count(DropReason::SendBufferFull);
                    }
                }
                Command::SendWhole(peer, to, datagram) => {
                    self.flush(now);
                    if self.out.push(to, &datagram) {
                        let sent = self.udp.send_whole(now, &self.out, &self.drops);
                        self.out.clear();
                        if let Err(TooBig { payload }) = sent {
                            let what = Observation::TooBig { path: to, payload };
                            self.pipeline.events().observe(peer, what);
                        }
                    } else {
                        self.drops.count(DropReason::SendBufferFull);
                    }
                }
                Command::SendLimited(to, datagram, hops) => {
                    self.flush(now);
                    if self.out.push(to, &datagram) {
                        self.udp.send_limited(now, &self.out, hops, &self.drops);
                        self.out.clear();
                    } else {
                        self.drops.count(DropReason::SendBufferFull);
                    }
                }
                Command::Train(to, datagrams) => {
                    self.flush(now);
                    for datagram in datagrams {
                        if !self.out.push(to, &datagram) {
                            self.drops.count(DropReason::SendBufferFull);
                        }
                    }
                    self.flush(now);
                }
                Command::SecondPort(sockets) => {
                    self.flush(now);
                    self.udp.finish(now, &self.drops);
                    self.set_second_port(sockets.map(|sockets| *sockets))?;
                }
            }
            if self.out.spare(super::arena::GSO_MAX_BYTES).is_none() {
                self.flush(now);
            }
        }
        self.flush(now);
        Ok(())
    }

    /// Replaces the sockets of the second port. The last ones leave the epoll set when they close.
    fn set_second_port(&mut self, sockets: Option<Udp>) -> nix::Result<()> {
        self.udp.set_second_port(None);
        let own = self.udp.fds().len();
        self.udp.set_second_port(sockets);
        for (place, fd) in (FIRST_SOCKET..).zip(self.udp.fds()).skip(own) {
            self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, place))?;
        }
        Ok(())
    }

    fn refresh_mtu(&mut self) {
        let mtu = self.tun.mtu();
        self.shared.mtu.store(mtu, Ordering::Relaxed);
        self.pipeline.set_mtu(mtu);
    }

    fn inbound(&mut self, now: Instant, sockets: Ready) -> nix::Result<()> {
        self.received.clear();
        self.received.limit(self.lone_datagrams.limit());
        self.udp.receive(sockets, &mut self.received, &self.drops).map_err(errno)?;
        let count = self.received.received().len();
        self.lone_datagrams.record(count, self.received.received_bytes());
        let allowed = self.tun.coalesce();
        self.pipeline.inbound(now, allowed, &mut self.received, &mut self.writes, &mut self.out);
        let Coalesced { datagrams, corrupted } = self.pipeline.coalesced();
        self.udp.record_gro(now, datagrams, corrupted);
        if !self.pipeline.forwards().is_empty() {
            let forwards = self.pipeline.forwards();
            let bytes = self.pipeline.received_bytes(&self.received, &self.writes);
            self.udp.send_gso_batches(now, bytes, forwards, &self.drops);
        }
        if !self.writes.is_empty() {
            self.tun.write(now, &self.writes, &self.drops);
            self.writes.clear();
        }
        self.flush(now);
        Ok(())
    }

    fn outbound(&mut self, now: Instant) -> nix::Result<()> {
        self.read.clear();
        self.read.limit(self.lone_packets.limit());
        if let Err(error) = self.tun.read(&mut self.read, &self.drops) {
            self.faults.set(Fault::TunGone(error.to_string()));
            // The tunnels stay up, and the core still gets their events. A new link needs a new
            // data plane.
            return self.epoll.delete(self.tun.fd());
        }
        self.lone_packets.record(self.read.packets().len(), self.read.bytes());
        self.pipeline.outbound(now, &mut self.read, &mut self.out, &mut self.udp);
        Ok(())
    }

    fn flush(&mut self, now: Instant) {
        self.udp.flush(now, &mut self.out, &self.drops);
    }
}

fn errno(error: std::io::Error) -> nix::errno::Errno {
    nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
