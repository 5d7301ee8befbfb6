//! A packet socket with a receive ring (`packet(7)`, TPACKET_V3). The kernel copies frames into
//! shared memory, so that no socket buffer limits a burst, also without root.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::poll::{PollFd, PollFlags, poll};
use socket2::{Domain, Socket, Type};
use towline_netlink::Rtnetlink;

/// Size of a block in bytes. A block holds many frames; the kernel hands over one block at a time.
const BLOCK_BYTES: usize = 1 << 18;
/// Number of blocks. A trickle of frames uses one each [`RETIRE_MS`] too, so the reader may be away for
/// 0.6 s before a frame is missed.
const BLOCKS: usize = 128;
/// Time after which the kernel hands over a block that is not full, in milliseconds.
const RETIRE_MS: u32 = 5;
/// Time to wait for a block, in milliseconds; well above [`RETIRE_MS`].
const WAIT_MS: u16 = 200;

/// Offset of the link's address in a frame's header (`TPACKET_ALIGN`).
const ADDRESS_OFFSET: usize =
    size_of::<libc::tpacket3_hdr>().next_multiple_of(libc::TPACKET_ALIGNMENT);

/// A receive ring. It sees every frame that enters a link of its namespace once, and no frame that
/// leaves.
#[derive(Debug)]
pub(super) struct Ring {
    socket: Socket,
    memory: NonNull<u8>,
    next: usize,
    /// Indices of bridges, which only repeat what entered by another link.
    bridges: Vec<u32>,
}

// SAFETY: the memory belongs to the ring alone; nothing about it is bound to a thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Opens a ring for the links of the calling thread's network namespace.
    pub(super) fn open() -> anyhow::Result<Self> {
        // Without a protocol nothing arrives before the ring is complete.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        let version = libc::tpacket_versions::TPACKET_V3 as libc::c_int;
        set(&socket, libc::PACKET_VERSION, &version)?;
        set(&socket, libc::PACKET_IGNORE_OUTGOING, &1)?;
        let request = libc::tpacket_req3 {
            tp_block_size: BLOCK_BYTES as u32,
            tp_block_nr: BLOCKS as u32,
            // Frames have no fixed size in TPACKET_V3; the kernel only requires consistent numbers.
            tp_frame_size: BLOCK_BYTES as u32,
            tp_frame_nr: BLOCKS as u32,
            tp_retire_blk_tov: RETIRE_MS,
            tp_sizeof_priv: 0,
            tp_feature_req_word: 0,
        };
        set(&socket, libc::PACKET_RX_RING, &request)?;
        // SAFETY: a fresh shared mapping of the ring that the socket was just given, of its size.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BLOCK_BYTES * BLOCKS,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                socket.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let memory = NonNull::new(memory.cast()).ok_or_else(io::Error::last_os_error)?;
        let links = Rtnetlink::open()?.links()?;
        let bridges = links.iter().filter(|link| link.kind.as_deref() == Some("bridge"));
        let bridges = bridges.map(|link| link.index).collect();
        let ring = Self { socket, memory, next: 0, bridges };
        ring.begin()?;
        Ok(ring)
    }

    /// Waits briefly for the next block and passes each of its frames to `show`, with the index of
    /// the link that it entered by. Returns `false` if no block came.
    pub(super) fn next_block(&mut self, mut show: impl FnMut(&[u8], u32)) -> io::Result<bool> {
        // SAFETY: `next` is below BLOCKS, so the block lies inside the mapping.
        let block = unsafe { self.memory.add(self.next * BLOCK_BYTES) };
        // SAFETY: each block begins with its descriptor, aligned to the block.
        let header = unsafe {
            let descriptor = block.cast::<libc::tpacket_block_desc>().as_ptr();
            &raw mut (*descriptor).hdr.bh1
        };
        // SAFETY: the status word is a valid, aligned u32 that both sides access atomically.
        let status = unsafe { AtomicU32::from_ptr(&raw mut (*header).block_status) };
        if status.load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            let mut wait = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wait, WAIT_MS) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if status.load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
                return Ok(false);
            }
        }
        // SAFETY: the block is ours until its status is given back; the kernel keeps every offset
        // that it wrote inside the block.
        unsafe {
            let mut offset = (*header).offset_to_first_pkt as usize;
            for _ in 0..(*header).num_pkts {
                let packet = block.add(offset);
                let frame = packet.cast::<libc::tpacket3_hdr>().as_ref();
                let from = packet.add(ADDRESS_OFFSET).cast::<libc::sockaddr_ll>().as_ref();
                let link = from.sll_ifindex.cast_unsigned();
                if !self.bridges.contains(&link) {
                    let bytes = packet.add(usize::from(frame.tp_mac));
                    let length = frame.tp_snaplen as usize;
                    show(std::slice::from_raw_parts(bytes.as_ptr(), length), link);
                }
                offset += frame.tp_next_offset as usize;
            }
        }
        status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % BLOCKS;
        Ok(true)
    }

    /// Returns the number of frames that did not fit into the ring since the last call.
    pub(super) fn missed(&self) -> io::Result<u64> {
        let mut statistics =
            libc::tpacket_stats_v3 { tp_packets: 0, tp_drops: 0, tp_freeze_q_cnt: 0 };
        let mut length = size_of_val(&statistics) as libc::socklen_t;
        // SAFETY: the pointer and the length describe one tpacket_stats_v3.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(statistics.tp_drops.into()) } else { Err(io::Error::last_os_error()) }
    }

    /// Binds the socket to every protocol on every link, which starts the capture.
    fn begin(&self) -> io::Result<()> {
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: 0,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the pointer and the length describe one sockaddr_ll.
        let result = unsafe {
            libc::bind(
                self.socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping of this size was made in `open`; no reference to it outlives `self`.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), BLOCK_BYTES * BLOCKS) };
    }
}

fn set<T>(socket: &Socket, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the pointer and the length describe one `T`, plain data for this option.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
