//! One short packet with AVX2. Its blocks are beside each other, not those of many packets.
//!
//! A vector holds one row of ChaCha20's state, 4 words, of two blocks. Two groups of four rows make 4
//! blocks in one pass: the one-time key, and key stream for [`SHORT`] bytes. A batch backend computes 8
//! or 16 blocks of which one packet uses 1, and as many again for its bytes.
//!
//! | group | lower half | upper half |
//! |---|---|---|
//! | 0 | block 0, the one-time key | block 1 |
//! | 1 | block 2 | block 3 |

use std::arch::x86_64::*;

use super::avx2::{bytes, plain::rotate};
use super::{KeyWords, SIGMA};
use crate::lanes::{BLOCK, Lane};
use crate::packets::Context;
use crate::poly1305::tag_of;

/// Row of two blocks.
type V = __m256i;

/// Number of blocks of key stream that one pass makes for the bytes of a packet.
const BLOCKS: usize = 3;
/// Largest length of a packet in bytes.
pub(crate) const SHORT: usize = BLOCKS * BLOCK;

/// First blocks of a packet's key stream.
struct KeyStream {
    /// One-time key of Poly1305, the first half of block 0: `r`, then `s`.
    one_time: [u128; 2],
    /// Blocks for the bytes of the packet, from block 1 on.
    blocks: [[u8; BLOCK]; BLOCKS],
}

impl KeyStream {
    /// Encrypts or decrypts the packet.
    fn add_to(&self, lane: &mut Lane<'_>) {
        for (index, block) in self.blocks.iter().enumerate() {
            lane.xor(index, block);
        }
    }

    /// Returns the tag of the encrypted packet.
    fn tag(&self, context: &Context<'_>, lane: &Lane<'_>) -> u128 {
        let [r, s] = self.one_time;
        tag_of(r, s, context, lane)
    }
}

/// Encrypts the packet, which has at most [`SHORT`] bytes, and writes its tag.
#[target_feature(enable = "avx2")]
pub(super) fn seal(key: &KeyWords, context: &Context<'_>, lane: &mut Lane<'_>) {
    let stream = key_stream(key, context, lane.counter);
    stream.add_to(lane);
    let tag = stream.tag(context, lane);
    lane.set_tag(tag);
}

/// Verifies the packet, which has at most [`SHORT`] bytes, and decrypts it if it is authentic. Returns
/// whether it is.
#[target_feature(enable = "avx2")]
pub(super) fn open(key: &KeyWords, context: &Context<'_>, lane: &mut Lane<'_>) -> bool {
    let stream = key_stream(key, context, lane.counter);
    let is_authentic = lane.has_tag(stream.tag(context, lane));
    if is_authentic {
        stream.add_to(lane);
    }
    is_authentic
}

#[inline]
#[target_feature(enable = "avx2")]
fn key_stream(key: &KeyWords, context: &Context<'_>, counter: u64) -> KeyStream {
    /// One step of the quarter rounds of both groups.
    macro_rules! step {
        ($to:ident, $from:ident, $turned:ident, $left:literal, $right:literal) => {
            $to[0] = _mm256_add_epi32($to[0], $from[0]);
            $to[1] = _mm256_add_epi32($to[1], $from[1]);
            $turned[0] = rotate::<$left, $right>(_mm256_xor_si256($turned[0], $to[0]));
            $turned[1] = rotate::<$left, $right>(_mm256_xor_si256($turned[1], $to[1]));
        };
    }
    /// Moves the words of a row: word `i` gets the one that bits `2 * i` and `2 * i + 1` number.
    macro_rules! shift {
        ($row:ident, $order:literal) => {
            $row[0] = _mm256_shuffle_epi32::<$order>($row[0]);
            $row[1] = _mm256_shuffle_epi32::<$order>($row[1]);
        };
    }

    let [k0, k1, k2, k3, k4, k5, k6, k7] = *key;
    let nonce = [context.nonce_prefix, counter as u32, (counter >> 32) as u32];
    // The rows, each of group 0 and of group 1.
    let start = [
        [row(SIGMA); 2],
        [row([k0, k1, k2, k3]); 2],
        [row([k4, k5, k6, k7]); 2],
        [last_row(0, nonce), last_row(2, nonce)],
    ];
    let [mut a, mut b, mut c, mut d] = start;
    for _ in 0..10 {
        step!(a, b, d, 16, 16);
        step!(c, d, b, 12, 20);
        step!(a, b, d, 8, 24);
        step!(c, d, b, 7, 25);
        // The diagonals become columns.
        shift!(b, 0x39);
        shift!(c, 0x4e);
        shift!(d, 0x93);
        step!(a, b, d, 16, 16);
        step!(c, d, b, 12, 20);
        step!(a, b, d, 8, 24);
        step!(c, d, b, 7, 25);
        shift!(b, 0x93);
        shift!(c, 0x4e);
        shift!(d, 0x39);
    }
    let [a0, b0, c0, d0] = start;
    let sum = |x: V, start: V| _mm256_add_epi32(x, start);
    // Each has two halves of 32 bytes.
    let blocks_of = |group: usize| {
        let (a, b) = (sum(a[group], a0[group]), sum(b[group], b0[group]));
        let (c, d) = (sum(c[group], c0[group]), sum(d[group], d0[group]));
        [
            [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x20>(c, d)],
            [_mm256_permute2x128_si256::<0x31>(a, b), _mm256_permute2x128_si256::<0x31>(c, d)],
        ]
    };
    let [[first, _], second] = blocks_of(0);
    let [third, fourth] = blocks_of(1);
    let number = |low: i64, high: i64| u128::from(low as u64) | u128::from(high as u64) << 64;
    KeyStream {
        one_time: [
            number(_mm256_extract_epi64::<0>(first), _mm256_extract_epi64::<1>(first)),
            number(_mm256_extract_epi64::<2>(first), _mm256_extract_epi64::<3>(first)),
        ],
        blocks: [bytes(second), bytes(third), bytes(fourth)],
    }
}

/// Returns a row that is the same in both blocks of a group.
#[inline]
#[target_feature(enable = "avx2")]
fn row(words: [u32; 4]) -> V {
    let [a, b, c, d] = words.map(u32::cast_signed);
    _mm256_setr_epi32(a, b, c, d, a, b, c, d)
}

/// Returns the row with the number of the block, `first` and the one after it, and the nonce.
#[inline]
#[target_feature(enable = "avx2")]
fn last_row(first: i32, nonce: [u32; 3]) -> V {
    let [a, b, c] = nonce.map(u32::cast_signed);
    _mm256_setr_epi32(first, a, b, c, first + 1, a, b, c)
}
