//! ChaCha20 in 16 lanes of 32 bits (AVX-512), with Poly1305 in 8 lanes of 64 bits.
//!
//! A vector holds the same word of 16 blocks. Lane `l` belongs to packet `l / BLOCKS`, and is block
//! `l % BLOCKS` of the `BLOCKS` blocks that one pass makes of each packet. After the rounds, a
//! transposition turns the 16 vectors into 16 blocks of key stream.

use std::arch::x86_64::*;
use std::array;

use super::poly1305x8::Poly1305;
use super::{KeyWords, SIGMA};
use crate::lanes::{BLOCK, GROUP, Lane, keep_authentic};
use crate::packets::Context;
use crate::poly1305::tag_of;

/// Vector of 16 words of 32 bits, or of 8 of 64 bits.
type V = __m512i;

/// Number of packets whose tags one [`Poly1305`] computes.
const HALF: usize = 8;
/// Number of packets up to which their tags are faster one by one.
const FEW: usize = 3;

/// Encrypts the packets and writes their tags. There are at most [`GROUP`].
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
pub(super) fn seal(key: &KeyWords, context: &Context<'_>, lanes: &mut [Lane<'_>]) {
    let keys = one_time_keys(key, context, lanes);
    encrypt(key, context, lanes);
    let tags = tags(keys, context, lanes);
    for (lane, tag) in lanes.iter_mut().zip(tags) {
        lane.set_tag(tag);
    }
}

/// Verifies the packets, and decrypts those that are authentic. There are at most [`GROUP`].
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
pub(super) fn open(
    key: &KeyWords,
    context: &Context<'_>,
    lanes: &mut [Lane<'_>],
    authentic: &mut [bool],
) {
    let keys = one_time_keys(key, context, lanes);
    let tags = tags(keys, context, lanes);
    encrypt(key, context, keep_authentic(lanes, &tags, authentic));
}

/// Adds the key stream to the packets. The fewer there are, the more blocks of each one pass makes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn encrypt(key: &KeyWords, context: &Context<'_>, lanes: &mut [Lane<'_>]) {
    match lanes.len() {
        0 => {}
        1 => encrypt_by::<16>(key, context, lanes),
        2 => encrypt_by::<8>(key, context, lanes),
        3..=4 => encrypt_by::<4>(key, context, lanes),
        5..=8 => encrypt_by::<2>(key, context, lanes),
        _ => encrypt_by::<1>(key, context, lanes),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn encrypt_by<const BLOCKS: usize>(key: &KeyWords, context: &Context<'_>, lanes: &mut [Lane<'_>]) {
    let mut state = state::<BLOCKS>(key, context, lanes);
    // Block 0 is the one-time key.
    state[12] = load_words(&array::from_fn(|l| 1 + (l % BLOCKS) as u32));
    let step = _mm512_set1_epi32(BLOCKS as i32);
    let blocks = lanes.iter().map(Lane::block_count).max().unwrap_or_default();
    for first in (0..blocks).step_by(BLOCKS) {
        let stream = transpose(rounds(&state));
        for (l, stream) in stream.into_iter().enumerate() {
            if let Some(lane) = lanes.get_mut(l / BLOCKS) {
                let index = first + l % BLOCKS;
                if let Some(block) = lane.blocks.get_mut(index) {
                    store(block, _mm512_xor_si512(load(block), stream));
                } else if index == lane.blocks.len() {
                    store_tail(lane.tail, _mm512_xor_si512(load_tail(lane.tail), stream));
                }
            }
        }
        state[12] = _mm512_add_epi32(state[12], step);
    }
}

/// Returns the state before the rounds, with block counter 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn state<const BLOCKS: usize>(
    key: &KeyWords,
    context: &Context<'_>,
    lanes: &[Lane<'_>],
) -> [V; 16] {
    let counter = |l: usize| lanes.get(l / BLOCKS).map_or(0, |lane| lane.counter);
    let mut state = [_mm512_setzero_si512(); 16];
    for (vector, word) in state.iter_mut().zip(SIGMA.iter().chain(key)) {
        *vector = _mm512_set1_epi32(*word as i32);
    }
    state[13] = _mm512_set1_epi32(context.nonce_prefix as i32);
    state[14] = load_words(&array::from_fn(|l| counter(l) as u32));
    state[15] = load_words(&array::from_fn(|l| (counter(l) >> 32) as u32));
    state
}

/// Returns the state after the 20 rounds, plus the state before them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn rounds(state: &[V; 16]) -> [V; 16] {
    let mut x = *state;
    // Four quarter rounds, step by step: the CPU then finds four independent instructions in a row.
    macro_rules! quarter_rounds {
        ($(($a:literal, $b:literal, $c:literal, $d:literal)),*) => {
            quarter_rounds!(@ 16 $(($a, $b, $d))*);
            quarter_rounds!(@ 12 $(($c, $d, $b))*);
            quarter_rounds!(@ 8 $(($a, $b, $d))*);
            quarter_rounds!(@ 7 $(($c, $d, $b))*);
        };
        (@ $bits:literal $(($a:literal, $b:literal, $d:literal))*) => {
            $(x[$a] = _mm512_add_epi32(x[$a], x[$b]);)*
            $(x[$d] = _mm512_rol_epi32::<$bits>(_mm512_xor_si512(x[$d], x[$a]));)*
        };
    }
    for _ in 0..10 {
        quarter_rounds!((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15));
        quarter_rounds!((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14));
    }
    for (x, state) in x.iter_mut().zip(state) {
        *x = _mm512_add_epi32(*x, *state);
    }
    x
}

/// Transposes 16 vectors of 16 words: vector `b` of the result is block `b`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn transpose(x: [V; 16]) -> [V; 16] {
    // Quarter `q` of `fours[g][k]` holds words 4g to 4g + 3 of block 4q + k.
    let mut fours = [[_mm512_setzero_si512(); 4]; 4];
    for (fours, x) in fours.iter_mut().zip(x.as_chunks::<4>().0) {
        let (low, high) = (_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
        let (low2, high2) = (_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
        *fours = [
            _mm512_unpacklo_epi64(low, low2),
            _mm512_unpackhi_epi64(low, low2),
            _mm512_unpacklo_epi64(high, high2),
            _mm512_unpackhi_epi64(high, high2),
        ];
    }
    let mut blocks = [_mm512_setzero_si512(); 16];
    for k in 0..4 {
        let [a, b, c, d] = array::from_fn(|g| fours[g][k]);
        let (ab, ab2) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b));
        let (cd, cd2) = (_mm512_shuffle_i32x4::<0x44>(c, d), _mm512_shuffle_i32x4::<0xee>(c, d));
        blocks[k] = _mm512_shuffle_i32x4::<0x88>(ab, cd);
        blocks[k + 4] = _mm512_shuffle_i32x4::<0xdd>(ab, cd);
        blocks[k + 8] = _mm512_shuffle_i32x4::<0x88>(ab2, cd2);
        blocks[k + 12] = _mm512_shuffle_i32x4::<0xdd>(ab2, cd2);
    }
    blocks
}

/// One-time keys of Poly1305, the first half of block 0: a vector holds a word of 8 packets, with
/// 64 bits each. The halves are packets 0 to 7 and 8 to 15.
type OneTimeKeys = [[V; 4]; 2];

/// Returns the one-time keys of at most 16 packets.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn one_time_keys(key: &KeyWords, context: &Context<'_>, lanes: &[Lane<'_>]) -> OneTimeKeys {
    let x = rounds(&state::<1>(key, context, lanes));
    let wide = |low: __m256i, high: __m256i| {
        let high = _mm512_slli_epi64::<32>(_mm512_cvtepu32_epi64(high));
        _mm512_or_si512(_mm512_cvtepu32_epi64(low), high)
    };
    let mut keys = [[_mm512_setzero_si512(); 4]; 2];
    for i in 0..4 {
        let (low, high) = (x[2 * i], x[2 * i + 1]);
        keys[0][i] = wide(_mm512_castsi512_si256(low), _mm512_castsi512_si256(high));
        let (low, high) =
            (_mm512_extracti64x4_epi64::<1>(low), _mm512_extracti64x4_epi64::<1>(high));
        keys[1][i] = wide(low, high);
    }
    keys
}

/// Returns the tags of at most 16 packets. Those after the last packet are meaningless.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn tags(keys: OneTimeKeys, context: &Context<'_>, lanes: &[Lane<'_>]) -> [u128; GROUP] {
    let mut tags = [0; GROUP];
    if lanes.len() <= FEW {
        let keys = Poly1305::one_by_one(&keys[0]);
        for ((tag, [r, s]), lane) in tags.iter_mut().zip(keys).zip(lanes) {
            *tag = tag_of(r, s, context, lane);
        }
    } else if lanes.len() <= HALF {
        tags_of::<1>([keys[0]], context, lanes, &mut tags);
    } else {
        tags_of::<2>(keys, context, lanes, &mut tags);
    }
    tags
}

/// Computes the tags of at most `HALVES` times 8 packets.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn tags_of<const HALVES: usize>(
    keys: [[V; 4]; HALVES],
    context: &Context<'_>,
    lanes: &[Lane<'_>],
    tags: &mut [u128; GROUP],
) {
    let Some(first) = lanes.first() else { return };
    // Lanes without a packet repeat the first, so that they never are the shortest.
    let packets: [[&Lane<'_>; HALF]; HALVES] =
        array::from_fn(|half| array::from_fn(|l| lanes.get(HALF * half + l).unwrap_or(first)));
    let mut states = keys.map(|key| Poly1305::new(&key));
    for chunk in context.aad.chunks(16) {
        let mut padded = [0; 16];
        padded[..chunk.len()].copy_from_slice(chunk);
        let word = u128::from_le_bytes(padded);
        let low = _mm512_set1_epi64(word as i64);
        let high = _mm512_set1_epi64((word >> 64) as i64);
        for state in &mut states {
            state.add(low, high);
        }
    }

    // Blocks that all packets have.
    let common = lanes.iter().map(|lane| lane.blocks.len()).min().unwrap_or_default();
    for index in 0..common {
        let words: [[V; 8]; HALVES] = array::from_fn(|half| {
            transpose_wide(packets[half].map(|lane| match lane.blocks.get(index) {
                Some(block) => load(block),
                None => _mm512_setzero_si512(),
            }))
        });
        for (state, w) in states.iter_mut().zip(&words) {
            state.add_two([w[0], w[1]], [w[2], w[3]]);
        }
        for (state, w) in states.iter_mut().zip(&words) {
            state.add_two([w[4], w[5]], [w[6], w[7]]);
        }
    }

    // Blocks that only some have, and tails.
    let longest = lanes.iter().map(Lane::block_count).max().unwrap_or_default();
    for index in common..longest {
        for (state, packets) in states.iter_mut().zip(&packets) {
            let mut rows = [_mm512_setzero_si512(); HALF];
            let mut lengths = [0; HALF];
            for ((row, length), lane) in rows.iter_mut().zip(&mut lengths).zip(packets) {
                if let Some(block) = lane.blocks.get(index) {
                    (*row, *length) = (load(block), BLOCK);
                } else if index == lane.blocks.len() {
                    (*row, *length) = (load_tail(lane.tail), lane.tail.len());
                }
            }
            let words = transpose_wide(rows);
            for (quarter, words) in words.as_chunks::<2>().0.iter().enumerate() {
                let mut has = 0;
                for (l, length) in lengths.iter().enumerate() {
                    has |= u8::from(*length > 16 * quarter) << l;
                }
                state.add_where(has, words[0], words[1]);
            }
        }
    }

    for ((state, packets), tags) in states.iter_mut().zip(&packets).zip(tags.as_chunks_mut().0) {
        let lengths = load_wide(&packets.map(|lane| lane.bytes()));
        state.add(_mm512_set1_epi64(context.aad.len() as i64), lengths);
        *tags = state.tags();
    }
}

/// Transposes 64 bytes of each of 8 packets: vector `w` of the result holds word `w` of each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn transpose_wide(rows: [V; 8]) -> [V; 8] {
    let mut words = [_mm512_setzero_si512(); 8];
    let pairs = rows.as_chunks::<2>().0;
    let low: [V; 4] = array::from_fn(|i| _mm512_unpacklo_epi64(pairs[i][0], pairs[i][1]));
    let high: [V; 4] = array::from_fn(|i| _mm512_unpackhi_epi64(pairs[i][0], pairs[i][1]));
    for (odd, [a, b, c, d]) in [low, high].into_iter().enumerate() {
        let (ab, ab2) = (_mm512_shuffle_i64x2::<0x44>(a, b), _mm512_shuffle_i64x2::<0xee>(a, b));
        let (cd, cd2) = (_mm512_shuffle_i64x2::<0x44>(c, d), _mm512_shuffle_i64x2::<0xee>(c, d));
        words[odd] = _mm512_shuffle_i64x2::<0x88>(ab, cd);
        words[2 + odd] = _mm512_shuffle_i64x2::<0xdd>(ab, cd);
        words[4 + odd] = _mm512_shuffle_i64x2::<0x88>(ab2, cd2);
        words[6 + odd] = _mm512_shuffle_i64x2::<0xdd>(ab2, cd2);
    }
    words
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
#[allow(unsafe_code)]
fn load(block: &[u8; BLOCK]) -> V {
    // SAFETY: the reference covers the 64 bytes that are read; they need no alignment.
    unsafe { _mm512_loadu_si512(block.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
#[allow(unsafe_code)]
fn store(block: &mut [u8; BLOCK], vector: V) {
    // SAFETY: the reference covers the 64 bytes that are written; they need no alignment.
    unsafe { _mm512_storeu_si512(block.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
#[allow(unsafe_code)]
fn load_words(words: &[u32; 16]) -> V {
    // SAFETY: the reference covers the 64 bytes that are read; they need no alignment.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
#[allow(unsafe_code)]
fn load_wide(words: &[u64; 8]) -> V {
    // SAFETY: the reference covers the 64 bytes that are read; they need no alignment.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// Reads a tail, followed by zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
#[allow(unsafe_code)]
fn load_tail(tail: &[u8]) -> V {
    // SAFETY: the mask has no bit beyond the slice, and a byte without its bit is not accessed.
    unsafe { _mm512_maskz_loadu_epi8(tail_mask(tail.len()), tail.as_ptr().cast()) }
}

/// Writes the first bytes of the vector to a tail.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
#[allow(unsafe_code)]
fn store_tail(tail: &mut [u8], vector: V) {
    // SAFETY: the mask has no bit beyond the slice, and a byte without its bit is not accessed.
    unsafe { _mm512_mask_storeu_epi8(tail.as_mut_ptr().cast(), tail_mask(tail.len()), vector) }
}

/// Returns the mask of the first `len` bytes of a block, or of all if it has not more.
#[inline]
fn tail_mask(len: usize) -> u64 {
    1u64.checked_shl(len as u32).map_or(u64::MAX, |bit| bit - 1)
}
