//! The I/O traits in memory: a TUN that is a pair of queues, and a network that records all
//! datagrams. For tests of the data plane and of its users.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex};

use super::arena::{
    GsoBatch, HEADROOM, RecvBatch, SLOT_BYTES, SendBatch, TAILROOM, TunBatch, WriteBatch,
};
use super::coalesce::Coalesce;
use super::drops::{DropReason, Drops};
use super::headers::IpHeader;
use super::split::Split;
use super::switch::Switch;
use super::tun::TunIo;
use super::udp::{GroCorruption, Ready, TooBig, UdpIo};
use super::vnet::VnetHeader;
use towline_wireguard::Segments;

/// A queue whose reader can wait on a condition variable or with epoll.
#[derive(Debug)]
struct Queue<V> {
    items: Mutex<VecDeque<V>>,
    filled: Condvar,
    /// Descriptor that is readable while the queue is not empty.
    readable: EventFd,
}

impl<V> Queue<V> {
    fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            items: Mutex::default(),
            filled: Condvar::new(),
            readable: EventFd::from_value_and_flags(0, flags)?,
        })
    }

    fn push(&self, item: V) {
        let mut items = self.items.lock();
        items.push_back(item);
        let _ = self.readable.write(1);
        self.filled.notify_all();
    }

    fn pop(&self) -> Option<V> {
        let mut items = self.items.lock();
        let item = items.pop_front();
        if items.is_empty() {
            let _ = self.readable.read();
        }
        item
    }

    fn wait(&self, timeout: Duration) -> Option<V> {
        let deadline = Instant::now() + timeout;
        let mut items = self.items.lock();
        while items.is_empty() {
            if self.filled.wait_until(&mut items, deadline).timed_out() {
                break;
            }
        }
        drop(items);
        self.pop()
    }
}

/// Data plane's end of a TUN in memory.
#[derive(Debug)]
pub struct MemoryTun {
    from_host: Arc<Queue<(VnetHeader, Vec<u8>)>>,
    to_host: Arc<Queue<Vec<u8>>>,
    mtu: usize,
}

/// Host's end of a [`MemoryTun`].
#[derive(Debug, Clone)]
pub struct MemoryHost {
    from_host: Arc<Queue<(VnetHeader, Vec<u8>)>>,
    to_host: Arc<Queue<Vec<u8>>>,
}

/// Creates a TUN in memory and returns both ends.
///
/// # Errors
///
/// Returns the system's error if it provides no descriptor.
pub fn tun(mtu: usize) -> io::Result<(MemoryTun, MemoryHost)> {
    let from_host = Arc::new(Queue::new()?);
    let to_host = Arc::new(Queue::new()?);
    let host = MemoryHost { from_host: from_host.clone(), to_host: to_host.clone() };
    Ok((MemoryTun { from_host, to_host, mtu }, host))
}

impl MemoryHost {
    /// Sends a packet from the host.
    pub fn send(&self, packet: &[u8]) {
        self.from_host.push((VnetHeader::default(), packet.to_vec()));
    }

    /// Sends a packet from the host, with work left to the reader as `header` describes.
    pub fn send_with(&self, header: VnetHeader, packet: &[u8]) {
        self.from_host.push((header, packet.to_vec()));
    }

    /// Returns the next packet for the host. `None` if none arrives within `timeout`.
    pub fn receive(&self, timeout: Duration) -> Option<Vec<u8>> {
        self.to_host.wait(timeout)
    }
}

impl TunIo for MemoryTun {
    fn fd(&self) -> BorrowedFd<'_> {
        self.from_host.readable.as_fd()
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn read(&mut self, batch: &mut TunBatch, _drops: &Drops) -> io::Result<()> {
        while let Some(spare) = batch.spare() {
            let Some((header, packet)) = self.from_host.pop() else { break };
            let len = packet.len().min(SLOT_BYTES);
            spare[HEADROOM..HEADROOM + len].copy_from_slice(&packet[..len]);
            batch.commit(header, len);
        }
        Ok(())
    }

    fn coalesce(&self) -> Coalesce {
        Coalesce { tcp: true, udp: true, ..Coalesce::default() }
    }

    /// Writes the packets, with super-packets split as the host's stack would.
    fn write(&mut self, _now: Instant, batch: &WriteBatch, drops: &Drops) {
        for frame in batch.frames() {
            let len = frame.len;
            let mut bytes = vec![0; HEADROOM + len + TAILROOM];
            let packet = batch.pieces(frame).collect::<Vec<_>>().concat();
            bytes[HEADROOM..HEADROOM + len].copy_from_slice(&packet);
            let Ok(mut split) = Split::new(&mut bytes, len, &frame.header, usize::MAX) else {
                drops.add(DropReason::TunRefused, frame.pieces as u64);
                continue;
            };
            while split.next_len().is_some() {
                let padded = split.take();
                let len = IpHeader::parse(padded).map_or(padded.len(), |inner| inner.total_len);
                self.to_host.push(padded[..len].to_vec());
            }
        }
    }

    fn features(&self) -> Vec<Switch> {
        Vec::new()
    }
}

/// Datagram on a [`Network`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    /// Address of the sender.
    pub from: SocketAddr,
    /// Address of the receiver.
    pub to: SocketAddr,
    /// UDP payload.
    pub bytes: Vec<u8>,
}

/// Function that decides whether a datagram is delivered.
type Filter = Box<dyn FnMut(&Datagram) -> bool + Send>;

/// Network in memory, which records every datagram unless it is [`Network::unrecorded`].
#[derive(Clone)]
pub struct Network(Arc<Mutex<Wire>>);

struct Wire {
    sockets: BTreeMap<SocketAddr, Arc<Queue<Datagram>>>,
    /// Every datagram sent, in order, including those not delivered.
    seen: Vec<Datagram>,
    /// False if datagrams are not added to `seen`.
    is_recorded: bool,
    filter: Option<Filter>,
    /// True if coalesced datagrams are corrupted on arrival.
    corrupts_coalesced: bool,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Network").finish_non_exhaustive()
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

impl Network {
    /// Creates a network without sockets that delivers everything.
    pub fn new() -> Self {
        Self::with_record(true)
    }

    /// Creates a network like [`Network::new`] that records nothing, for more datagrams than memory has
    /// room for.
    pub fn unrecorded() -> Self {
        Self::with_record(false)
    }

    fn with_record(is_recorded: bool) -> Self {
        Self(Arc::new(Mutex::new(Wire {
            sockets: BTreeMap::new(),
            seen: Vec::new(),
            is_recorded,
            filter: None,
            corrupts_coalesced: false,
        })))
    }

    /// Opens a socket at this address. A socket that had the address before receives nothing more.
    ///
    /// # Errors
    ///
    /// Returns the system's error if it provides no descriptor.
    pub fn bind(&self, address: SocketAddr) -> io::Result<MemoryUdp> {
        let inbox = Arc::new(Queue::new()?);
        self.0.lock().sockets.insert(address, inbox.clone());
        Ok(MemoryUdp {
            network: self.clone(),
            address,
            inbox,
            held: None,
            gro: Switch::new("udp_gro", Ok(())),
            corruption: GroCorruption::default(),
        })
    }

    /// Corrupts coalesced datagrams on arrival from now on, like a network card or a kernel that
    /// coalesces them wrongly.
    pub fn corrupt_coalesced(&self) {
        self.0.lock().corrupts_coalesced = true;
    }

    /// Sets the filter that decides which datagrams are delivered. All datagrams are still
    /// recorded.
    pub fn filter(&self, filter: impl FnMut(&Datagram) -> bool + Send + 'static) {
        self.0.lock().filter = Some(Box::new(filter));
    }

    /// Sends a datagram with any source address.
    pub fn inject(&self, datagram: Datagram) {
        let mut wire = self.0.lock();
        let delivered = match &mut wire.filter {
            Some(filter) => filter(&datagram),
            None => true,
        };
        if wire.is_recorded {
            wire.seen.push(datagram.clone());
        }
        if let Some(inbox) = wire.sockets.get(&datagram.to).filter(|_| delivered) {
            inbox.push(datagram);
        }
    }

    /// Returns every datagram sent so far, in order.
    pub fn seen(&self) -> Vec<Datagram> {
        self.0.lock().seen.clone()
    }
}

/// Socket on a [`Network`].
#[derive(Debug)]
pub struct MemoryUdp {
    network: Network,
    address: SocketAddr,
    inbox: Arc<Queue<Datagram>>,
    /// Datagram taken from the inbox that did not fit the last batch. It starts the next one.
    held: Option<Datagram>,
    /// Switch of coalescing on arrival.
    gro: Switch,
    corruption: GroCorruption,
}

impl MemoryUdp {
    /// Returns whether `next` may be appended to `len` bytes that start with `first`, by the rules
    /// of `UDP_GRO`: same sender, same length.
    fn can_coalesce(first: &Datagram, len: usize, next: &Datagram) -> bool {
        next.from == first.from
            && !next.bytes.is_empty()
            && len.is_multiple_of(first.bytes.len().max(1))
            && next.bytes.len() <= first.bytes.len()
            && len + next.bytes.len() <= SLOT_BYTES
    }
}

impl UdpIo for MemoryUdp {
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.inbox.readable.as_fd()]
    }

    fn receive(&mut self, _: Ready, batch: &mut RecvBatch, _drops: &Drops) -> io::Result<()> {
        for slot in 0..batch.slots() {
            let Some(first) = self.held.take().or_else(|| self.inbox.pop()) else { break };
            let bytes = &mut batch.bytes_mut()[slot * SLOT_BYTES..][..SLOT_BYTES];
            let mut len = first.bytes.len().min(SLOT_BYTES);
            bytes[..len].copy_from_slice(&first.bytes[..len]);
            while let Some(next) = self.inbox.pop() {
                if !self.gro.is_on() || !Self::can_coalesce(&first, len, &next) {
                    self.held = Some(next);
                    break;
                }
                bytes[len..len + next.bytes.len()].copy_from_slice(&next.bytes);
                len += next.bytes.len();
            }
            if len > first.bytes.len() && self.network.0.lock().corrupts_coalesced {
                for datagram in bytes[..len].chunks_mut(first.bytes.len()) {
                    if let Some(last) = datagram.last_mut() {
                        *last ^= 1;
                    }
                }
            }
            batch.push(slot, first.from.into(), len, first.bytes.len());
        }
        if self.held.is_some() {
            // A datagram is left although the inbox may be empty.
            let _ = self.inbox.readable.write(1);
        }
        Ok(())
    }

    fn send_gso_batches(
        &mut self,
        _now: Instant,
        bytes: &[u8],
        gso_batches: &[GsoBatch],
        drops: &Drops,
    ) {
        for gso in gso_batches {
            let bytes = &bytes[gso.start..gso.start + gso.len];
            if bytes.is_empty() {
                drops.count(DropReason::SendRefused);
            }
            for datagram in bytes.chunks(gso.segment_size.get()) {
                let (from, to) = (self.address, gso.to.path.remote);
                self.network.inject(Datagram { from, to, bytes: datagram.to_vec() });
            }
        }
    }

    fn send_whole(&mut self, now: Instant, batch: &SendBatch, drops: &Drops) -> Result<(), TooBig> {
        self.send(now, batch, drops);
        Ok(())
    }

    fn record_gro(&mut self, now: Instant, datagrams: usize, corrupted: usize) {
        self.corruption.evaluate(now, datagrams, corrupted, &self.gro);
    }

    fn features(&self) -> Vec<Switch> {
        vec![self.gro.clone()]
    }
}
