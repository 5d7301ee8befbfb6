//! The backends, and what each is called with.

use ring::aead::LessSafeKey;
#[cfg(target_arch = "x86_64")]
use zeroize::Zeroizing;

use crate::fallback;
#[cfg(target_arch = "x86_64")]
use crate::lanes::{GROUP, Lane};
use crate::packets::{Context, Divider, KEY_BYTES, Misplaced, Packet};
#[cfg(target_arch = "x86_64")]
use crate::x86;

/// Largest number of packets that are sealed and opened one by one if all of them are short: more are
/// faster together.
#[cfg(target_arch = "x86_64")]
const FEW: usize = 2;

/// Implementation of the AEAD that this CPU can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backend(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Batch(x86::Batch),
    Ring,
}

impl Backend {
    /// ring, which every CPU can run.
    pub(crate) const RING: Self = Self(Kind::Ring);

    /// Returns the name, for status output: `avx512-ifma`, `avx512vl`, `avx2` or `ring`.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Batch(batch) => batch.name(),
            Kind::Ring => "ring",
        }
    }

    /// Returns whether packets of one batch are sealed and opened together, so that larger batches
    /// cost less per packet.
    pub fn is_batched(self) -> bool {
        self != Self::RING
    }

    /// Returns the backends whose instructions this CPU has, the fastest first. ring is the last.
    pub(crate) fn of_this_cpu() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let batch = x86::Batch::of_this_cpu().map(|batch| Self(Kind::Batch(batch)));
        #[cfg(not(target_arch = "x86_64"))]
        let batch = std::iter::empty();
        batch.chain([Self::RING])
    }

    /// Seals the packets. Those are placed as [`crate::packets::check`] demands.
    pub(crate) fn seal(
        self,
        key: &Keys,
        context: &Context<'_>,
        arena: &mut [u8],
        packets: &[Packet],
    ) -> Result<(), Misplaced> {
        let mut divider = Divider::new(arena);
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Batch(batch) if are_few_and_short(packets) => {
                for packet in packets {
                    let space = divider.next(packet).ok_or(Misplaced)?;
                    batch.seal_short(&key.words, context, &mut Lane::new(packet.counter, space));
                }
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Batch(batch) => {
                for group in packets.chunks(GROUP) {
                    let mut lanes = lanes(&mut divider, group)?;
                    batch.seal(&key.words, context, &mut lanes[..group.len()]);
                }
            }
            Kind::Ring => {
                for packet in packets {
                    let space = divider.next(packet).ok_or(Misplaced)?;
                    if !fallback::seal(&key.ring, context, packet.counter, space) {
                        return Err(Misplaced);
                    }
                }
            }
        }
        Ok(())
    }

    /// Opens the packets, like [`Backend::seal`]. `authentic` has one entry for each.
    pub(crate) fn open(
        self,
        key: &Keys,
        context: &Context<'_>,
        arena: &mut [u8],
        packets: &[Packet],
        authentic: &mut [bool],
    ) -> Result<(), Misplaced> {
        let mut divider = Divider::new(arena);
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Batch(batch) if are_few_and_short(packets) => {
                for (packet, authentic) in packets.iter().zip(authentic) {
                    let space = divider.next(packet).ok_or(Misplaced)?;
                    let mut lane = Lane::new(packet.counter, space);
                    *authentic = batch.open_short(&key.words, context, &mut lane);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Batch(batch) => {
                for (group, authentic) in packets.chunks(GROUP).zip(authentic.chunks_mut(GROUP)) {
                    let mut lanes = lanes(&mut divider, group)?;
                    batch.open(&key.words, context, &mut lanes[..group.len()], authentic);
                }
            }
            Kind::Ring => {
                for (packet, authentic) in packets.iter().zip(authentic) {
                    let space = divider.next(packet).ok_or(Misplaced)?;
                    *authentic = fallback::open(&key.ring, context, packet.counter, space);
                }
            }
        }
        Ok(())
    }
}

/// A key in the form of each backend.
pub(crate) struct Keys {
    /// The key as ChaCha20's 8 words.
    #[cfg(target_arch = "x86_64")]
    pub(crate) words: Zeroizing<[u32; 8]>,
    /// ring's form of the key.
    pub(crate) ring: LessSafeKey,
}

impl Keys {
    /// Converts the bytes of a key.
    pub(crate) fn new(bytes: &[u8; KEY_BYTES]) -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            words: words(bytes),
            ring: fallback::key(bytes),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn words(bytes: &[u8; KEY_BYTES]) -> Zeroizing<[u32; 8]> {
    let mut words = Zeroizing::new([0; 8]);
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

/// Returns whether a batch is sealed and opened packet by packet.
#[cfg(target_arch = "x86_64")]
#[inline]
fn are_few_and_short(packets: &[Packet]) -> bool {
    packets.len() <= FEW && packets.iter().all(|packet| packet.len <= x86::SHORT)
}

/// Returns the lanes of at most [`GROUP`] packets.
#[cfg(target_arch = "x86_64")]
#[inline]
fn lanes<'a>(
    divider: &mut Divider<'a>,
    packets: &[Packet],
) -> Result<[Lane<'a>; GROUP], Misplaced> {
    let mut lanes: [Lane<'a>; GROUP] = Default::default();
    for (lane, packet) in lanes.iter_mut().zip(packets) {
        *lane = Lane::new(packet.counter, divider.next(packet).ok_or(Misplaced)?);
    }
    Ok(lanes)
}
