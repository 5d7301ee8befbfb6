//! ChaCha20 in 8 lanes of 32 bits, with Poly1305 in 4 lanes of 64 bits.
//!
//! The code exists twice: for AVX2, which rotates by shuffles and shifts, and for AVX-512 on
//! vectors of 256 bits, which has a rotation and twice as many registers.
//!
//! A vector holds the same word of 8 blocks. Lane `l` belongs to packet `l / BLOCKS`, and is block
//! `l % BLOCKS` of the `BLOCKS` blocks that one pass makes of each packet. After the rounds, a
//! transposition turns the 16 vectors into 8 blocks of key stream, two vectors each.

use std::arch::x86_64::*;
use std::array;

use super::poly1305x4::Poly1305;
use super::{KeyWords, SIGMA};
use crate::lanes::{BLOCK, Lane, keep_authentic};
use crate::packets::Context;
use crate::poly1305::tag_of;

/// Vector of 8 words of 32 bits, or of 4 of 64 bits.
type V = __m256i;

/// Packets that one pass serves at most.
const LANES: usize = 8;
/// Number of packets whose tags one [`Poly1305`] computes.
const HALF: usize = 4;
/// Number of packets up to which their tags are faster one by one.
const FEW: usize = 2;
/// Block for a lane that has none.
const ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Four quarter rounds, step by step: the CPU then finds four independent instructions in a row.
macro_rules! quarter_rounds {
    ($x:ident, $(($a:literal, $b:literal, $c:literal, $d:literal)),*) => {
        quarter_rounds!(@ $x, 16, 16, $(($a, $b, $d))*);
        quarter_rounds!(@ $x, 12, 20, $(($c, $d, $b))*);
        quarter_rounds!(@ $x, 8, 24, $(($a, $b, $d))*);
        quarter_rounds!(@ $x, 7, 25, $(($c, $d, $b))*);
    };
    (@ $x:ident, $left:literal, $right:literal, $(($a:literal, $b:literal, $d:literal))*) => {
        $($x[$a] = _mm256_add_epi32($x[$a], $x[$b]);)*
        $($x[$d] = rotate::<$left, $right>(_mm256_xor_si256($x[$d], $x[$a]));)*
    };
}

/// Defines the backend for these CPU features. `rotate` rotates the words of a vector.
macro_rules! eight_lanes {
    ($features:literal) => {
        /// Encrypts the packets and writes their tags. There are at most [`GROUP`](crate::lanes::GROUP).
        #[target_feature(enable = $features)]
        pub(in crate::x86) fn seal(key: &KeyWords, context: &Context<'_>, lanes: &mut [Lane<'_>]) {
            for lanes in lanes.chunks_mut(LANES) {
                let keys = one_time_keys(key, context, lanes);
                encrypt(key, context, lanes);
                let tags = tags(keys, context, lanes);
                for (lane, tag) in lanes.iter_mut().zip(tags) {
                    lane.set_tag(tag);
                }
            }
        }

        /// Verifies the packets, and decrypts those that are authentic. There are at most [`GROUP`](crate::lanes::GROUP).
        #[target_feature(enable = $features)]
        pub(in crate::x86) fn open(
            key: &KeyWords,
            context: &Context<'_>,
            lanes: &mut [Lane<'_>],
            authentic: &mut [bool],
        ) {
            for (lanes, authentic) in lanes.chunks_mut(LANES).zip(authentic.chunks_mut(LANES)) {
                let keys = one_time_keys(key, context, lanes);
                let tags = tags(keys, context, lanes);
                encrypt(key, context, keep_authentic(lanes, &tags, authentic));
            }
        }

        /// Adds the key stream to the packets. The fewer there are, the more blocks of each one
        /// pass makes.
        #[inline]
        #[target_feature(enable = $features)]
        fn encrypt(key: &KeyWords, context: &Context<'_>, lanes: &mut [Lane<'_>]) {
            match lanes.len() {
                0 => {}
                1 => encrypt_by::<8>(key, context, lanes),
                2 => encrypt_by::<4>(key, context, lanes),
                3..=4 => encrypt_by::<2>(key, context, lanes),
                _ => encrypt_by::<1>(key, context, lanes),
            }
        }

        #[target_feature(enable = $features)]
        fn encrypt_by<const BLOCKS: usize>(
            key: &KeyWords,
            context: &Context<'_>,
            lanes: &mut [Lane<'_>],
        ) {
            let mut state = state::<BLOCKS>(key, context, lanes);
            // Block 0 is the one-time key.
            state[12] = load_words(&array::from_fn(|l| 1 + (l % BLOCKS) as u32));
            let step = _mm256_set1_epi32(BLOCKS as i32);
            let blocks = lanes.iter().map(Lane::block_count).max().unwrap_or_default();
            let common = lanes.iter().map(|lane| lane.blocks.len()).min().unwrap_or_default();
            for first in (0..blocks).step_by(BLOCKS) {
                let stream = transpose(rounds(&state));
                if first + BLOCKS <= common {
                    for (l, stream) in stream.into_iter().enumerate() {
                        let lane = lanes.get_mut(l / BLOCKS);
                        let block = lane.and_then(|lane| lane.blocks.get_mut(first + l % BLOCKS));
                        if let Some(block) = block {
                            xor(block, stream);
                        }
                    }
                } else {
                    // Tails, and blocks that only some packets have.
                    for (l, stream) in stream.into_iter().enumerate() {
                        if let Some(lane) = lanes.get_mut(l / BLOCKS) {
                            lane.xor(first + l % BLOCKS, &bytes(stream));
                        }
                    }
                }
                state[12] = _mm256_add_epi32(state[12], step);
            }
        }

        /// Returns the state before the rounds, with block counter 0.
        #[inline]
        #[target_feature(enable = $features)]
        fn state<const BLOCKS: usize>(
            key: &KeyWords,
            context: &Context<'_>,
            lanes: &[Lane<'_>],
        ) -> [V; 16] {
            let counter = |l: usize| lanes.get(l / BLOCKS).map_or(0, |lane| lane.counter);
            let mut state = [_mm256_setzero_si256(); 16];
            for (vector, word) in state.iter_mut().zip(SIGMA.iter().chain(key)) {
                *vector = _mm256_set1_epi32(*word as i32);
            }
            state[13] = _mm256_set1_epi32(context.nonce_prefix as i32);
            state[14] = load_words(&array::from_fn(|l| counter(l) as u32));
            state[15] = load_words(&array::from_fn(|l| (counter(l) >> 32) as u32));
            state
        }

        /// Returns the state after the 20 rounds, plus the state before them.
        #[inline]
        #[target_feature(enable = $features)]
        fn rounds(state: &[V; 16]) -> [V; 16] {
            let mut x = *state;
            for _ in 0..10 {
                quarter_rounds!(x, (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15));
                quarter_rounds!(x, (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14));
            }
            for (x, state) in x.iter_mut().zip(state) {
                *x = _mm256_add_epi32(*x, *state);
            }
            x
        }

        /// One-time keys of Poly1305, the first half of block 0: a vector holds a word of 4
        /// packets, with 64 bits each. The halves are packets 0 to 3 and 4 to 7.
        type OneTimeKeys = [[V; 4]; 2];

        /// Returns the one-time keys of at most 8 packets.
        #[inline]
        #[target_feature(enable = $features)]
        fn one_time_keys(key: &KeyWords, context: &Context<'_>, lanes: &[Lane<'_>]) -> OneTimeKeys {
            let x = rounds(&state::<1>(key, context, lanes));
            let mut keys = [[_mm256_setzero_si256(); 4]; 2];
            for i in 0..4 {
                let (low, high) = (x[2 * i], x[2 * i + 1]);
                keys[0][i] = wide(_mm256_castsi256_si128(low), _mm256_castsi256_si128(high));
                let upper = _mm256_extracti128_si256::<1>(low);
                keys[1][i] = wide(upper, _mm256_extracti128_si256::<1>(high));
            }
            keys
        }

        /// Returns the tags of at most 8 packets. Those after the last packet are meaningless.
        #[inline]
        #[target_feature(enable = $features)]
        fn tags(keys: OneTimeKeys, context: &Context<'_>, lanes: &[Lane<'_>]) -> [u128; LANES] {
            let mut tags = [0; LANES];
            let halves = keys.into_iter().zip(lanes.chunks(HALF)).zip(tags.as_chunks_mut().0);
            for ((key, lanes), tags) in halves {
                if lanes.len() <= FEW {
                    let keys = Poly1305::one_by_one(&key);
                    for ((tag, [r, s]), lane) in tags.iter_mut().zip(keys).zip(lanes) {
                        *tag = tag_of(r, s, context, lane);
                    }
                } else {
                    *tags = tags_of(key, context, lanes);
                }
            }
            tags
        }

        /// Returns the tags of at most 4 packets.
        #[target_feature(enable = $features)]
        fn tags_of(key: [V; 4], context: &Context<'_>, lanes: &[Lane<'_>]) -> [u128; HALF] {
            let Some(first) = lanes.first() else { return [0; HALF] };
            // Lanes without a packet repeat the first, so that they never are the shortest.
            let packets: [&Lane<'_>; HALF] = array::from_fn(|l| lanes.get(l).unwrap_or(first));
            let mut state = Poly1305::new(&key);
            for chunk in context.aad.chunks(16) {
                let mut padded = [0; 16];
                padded[..chunk.len()].copy_from_slice(chunk);
                let word = u128::from_le_bytes(padded);
                let high = _mm256_set1_epi64x((word >> 64) as i64);
                state.add(_mm256_set1_epi64x(word as i64), high);
            }

            // Blocks that all packets have.
            let common = lanes.iter().map(|lane| lane.blocks.len()).min().unwrap_or_default();
            for index in 0..common {
                let blocks = packets.map(|lane| lane.blocks.get(index).unwrap_or(&ZEROS));
                for half in 0..2 {
                    let [first, second] =
                        transpose_wide(blocks.map(|block| load_half(block, half)));
                    state.add_two(first, second);
                }
            }

            // Blocks that only some have, and tails.
            let longest = lanes.iter().map(Lane::block_count).max().unwrap_or_default();
            for index in common..longest {
                let mut padded = [ZEROS; HALF];
                let mut lengths = [0; HALF];
                for ((padded, length), lane) in padded.iter_mut().zip(&mut lengths).zip(packets) {
                    if let Some(block) = lane.blocks.get(index) {
                        (*padded, *length) = (*block, BLOCK as i64);
                    } else if index == lane.blocks.len() {
                        padded[..lane.tail.len()].copy_from_slice(lane.tail);
                        *length = lane.tail.len() as i64;
                    }
                }
                let lengths = load_wide(&lengths.map(|length| length as u64));
                for half in 0..2 {
                    let blocks = transpose_wide(array::from_fn(|l| load_half(&padded[l], half)));
                    for (i, [low, high]) in blocks.into_iter().enumerate() {
                        let start = _mm256_set1_epi64x((32 * half + 16 * i) as i64);
                        state.add_where(_mm256_cmpgt_epi64(lengths, start), low, high);
                    }
                }
            }

            let lengths = load_wide(&packets.map(|lane| lane.bytes()));
            state.add(_mm256_set1_epi64x(context.aad.len() as i64), lengths);
            state.tags()
        }
    };
}

/// With AVX2 alone.
pub(super) mod plain {
    use super::*;

    eight_lanes!("avx2");

    /// Rotates the words of a vector to the left.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::x86) fn rotate<const LEFT: i32, const RIGHT: i32>(v: V) -> V {
        const { assert!(LEFT + RIGHT == 32) }
        /// Bytes of a word, rotated to the left by `bytes`, in each 16 bytes.
        const fn shuffle(bytes: usize) -> [u8; 32] {
            let mut places = [0; 32];
            let mut i = 0;
            while i < 32 {
                places[i] = (i % 16 / 4 * 4 + (i + 4 - bytes) % 4) as u8;
                i += 1;
            }
            places
        }
        match LEFT {
            8 => _mm256_shuffle_epi8(v, load(&const { shuffle(1) })),
            16 => _mm256_shuffle_epi8(v, load(&const { shuffle(2) })),
            _ => _mm256_or_si256(_mm256_slli_epi32::<LEFT>(v), _mm256_srli_epi32::<RIGHT>(v)),
        }
    }
}

/// With AVX-512 on vectors of 256 bits.
pub(super) mod vl {
    use super::*;

    eight_lanes!("avx2,avx512f,avx512vl");

    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512vl")]
    fn rotate<const LEFT: i32, const RIGHT: i32>(v: V) -> V {
        const { assert!(LEFT + RIGHT == 32) }
        _mm256_rol_epi32::<LEFT>(v)
    }
}

/// Transposes 16 vectors of 8 words: the two vectors `b` of the result are block `b`.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(x: [V; 16]) -> [[V; 2]; LANES] {
    // Half `q` of `fours[g][k]` holds words 4g to 4g + 3 of block 4q + k.
    let mut fours = [[_mm256_setzero_si256(); 4]; 4];
    for (fours, x) in fours.iter_mut().zip(x.as_chunks::<4>().0) {
        let (low, high) = (_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
        let (low2, high2) = (_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
        *fours = [
            _mm256_unpacklo_epi64(low, low2),
            _mm256_unpackhi_epi64(low, low2),
            _mm256_unpacklo_epi64(high, high2),
            _mm256_unpackhi_epi64(high, high2),
        ];
    }
    let mut blocks = [[_mm256_setzero_si256(); 2]; LANES];
    for k in 0..4 {
        for half in 0..2 {
            let (a, b) = (fours[2 * half][k], fours[2 * half + 1][k]);
            blocks[k][half] = _mm256_permute2x128_si256::<0x20>(a, b);
            blocks[k + 4][half] = _mm256_permute2x128_si256::<0x31>(a, b);
        }
    }
    blocks
}

/// Transposes two blocks of 16 bytes of each of 4 packets: returns the lower and the upper 8 bytes
/// of the first blocks, then of the second.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_wide([a, b, c, d]: [V; HALF]) -> [[V; 2]; 2] {
    let (low, low2) = (_mm256_unpacklo_epi64(a, b), _mm256_unpacklo_epi64(c, d));
    let (high, high2) = (_mm256_unpackhi_epi64(a, b), _mm256_unpackhi_epi64(c, d));
    [
        [
            _mm256_permute2x128_si256::<0x20>(low, low2),
            _mm256_permute2x128_si256::<0x20>(high, high2),
        ],
        [
            _mm256_permute2x128_si256::<0x31>(low, low2),
            _mm256_permute2x128_si256::<0x31>(high, high2),
        ],
    ]
}

/// Returns words of 64 bits from their lower and upper halves.
#[inline]
#[target_feature(enable = "avx2")]
fn wide(low: __m128i, high: __m128i) -> V {
    let high = _mm256_slli_epi64::<32>(_mm256_cvtepu32_epi64(high));
    _mm256_or_si256(_mm256_cvtepu32_epi64(low), high)
}

/// Adds key stream to a block.
#[inline]
#[target_feature(enable = "avx2")]
fn xor(block: &mut [u8; BLOCK], stream: [V; 2]) {
    let (halves, _) = block.as_chunks_mut();
    for (half, stream) in halves.iter_mut().zip(stream) {
        store(half, _mm256_xor_si256(load(half), stream));
    }
}

/// Returns the bytes of a block.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn bytes(stream: [V; 2]) -> [u8; BLOCK] {
    let mut block = ZEROS;
    xor(&mut block, stream);
    block
}

/// Reads the first or the second 32 bytes of a block.
#[inline]
#[target_feature(enable = "avx2")]
fn load_half(block: &[u8; BLOCK], half: usize) -> V {
    load(&block.as_chunks().0[half])
}

#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn load(bytes: &[u8; 32]) -> V {
    // SAFETY: the reference covers the 32 bytes that are read; they need no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn store(bytes: &mut [u8; 32], vector: V) {
    // SAFETY: the reference covers the 32 bytes that are written; they need no alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn load_words(words: &[u32; 8]) -> V {
    // SAFETY: the reference covers the 32 bytes that are read; they need no alignment.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn load_wide(words: &[u64; 4]) -> V {
    // SAFETY: the reference covers the 32 bytes that are read; they need no alignment.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}
