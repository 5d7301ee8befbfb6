//! The choice of a backend at start, and its comparison with ring before it is used. A CPU, an
//! emulator or a compiler that executes an instruction differently than the backend expects is found
//! then.

use crate::backend::Backend;
use crate::key::Key;
use crate::packets::{Packet, TAG_BYTES};

/// Choice between the backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Aead {
    /// The fastest that this CPU has and that passes its self-test.
    #[default]
    Auto,
    /// ring.
    Ring,
}

/// Batches of the test: the number of packets, and the length of the first. Each further packet is
/// 13 bytes longer. They cover short packets, every number of lanes per packet, full and partial groups,
/// and every remainder of a block.
const BATCHES: [(usize, usize); 10] =
    [(1, 0), (2, 179), (1, 1420), (2, 500), (3, 61), (7, 0), (8, 64), (13, 120), (16, 1), (35, 0)];

impl Backend {
    /// Returns the backend for this choice. Reads the CPU's features and compares each candidate
    /// with ring, which takes about a millisecond: call it once at start.
    pub fn select(choice: Aead) -> Self {
        match choice {
            Aead::Auto => Self::of_this_cpu().find(|backend| passes(*backend)),
            Aead::Ring => None,
        }
        .unwrap_or(Self::RING)
    }
}

/// Returns whether the backend seals as ring does, opens what ring sealed, and detects a forgery.
fn passes(backend: Backend) -> bool {
    let bytes = std::array::from_fn(|i| (i * 7 + 0x80) as u8);
    let (tested, ring) = (Key::new(&bytes, backend), Key::new(&bytes, Backend::RING));
    BATCHES.iter().all(|(count, first)| agree(&tested, &ring, *count, *first) == Some(true))
}

fn agree(tested: &Key, ring: &Key, count: usize, first: usize) -> Option<bool> {
    let mut end = 0;
    let packets: Vec<Packet> = (0..count)
        .map(|i| {
            let (start, len) = (end + 16, first + 13 * i);
            end = start + len + TAG_BYTES;
            Packet { start, len, counter: u64::from(u32::MAX) + i as u64 }
        })
        .collect();
    let plain: Vec<u8> = (0..end).map(|i| (i * 31 + i / 256) as u8).collect();
    let (mut sealed, mut expected) = (plain.clone(), plain.clone());
    tested.seal(&mut sealed, &packets).ok()?;
    ring.seal(&mut expected, &packets).ok()?;
    if sealed != expected {
        return Some(false);
    }
    // The last byte belongs to the tag of the last packet.
    *sealed.last_mut()? ^= 1;
    let mut authentic = Vec::new();
    tested.open(&mut sealed, &packets, &mut authentic).ok()?;
    let (last, others) = authentic.split_last()?;
    let opened = packets.iter().zip(others).all(|(packet, authentic)| {
        let range = packet.start..packet.start + packet.len;
        *authentic && sealed.get(range.clone()) == plain.get(range)
    });
    Some(!last && opened && others.len() + 1 == count)
}
