//! Poly1305 of 8 packets, one in each lane of 64 bits, with AVX-512 IFMA.
//!
//! A number of 130 bits is three limbs of 44, 44 and 42 bits. IFMA multiplies 52 by 52 bits and
//! adds the lower or the upper 52 bits of the product. The upper part counts from bit 52, 8 bits
//! above the next limb. A product beyond the third limb comes back multiplied by 20: the third
//! position is 2^132, which is 4 * 2^130, and 2^130 is 5.
//!
//! Bounds: limbs of `r` and `r^2` have at most 44 bits and a bit of carry, their twentyfold at most
//! 49. The accumulator has at most 45 bits per limb, 46 with a block added. So every factor fits 52
//! bits, six lower parts fit 55, and six upper parts fit 46 bits.

use std::arch::x86_64::*;

use crate::poly1305::{CLAMP_HIGH, CLAMP_LOW, tag};

/// Vector of 8 words of 64 bits.
type V = __m512i;
/// Numbers of 130 bits as three limbs.
type Limbs = [V; 3];

/// Multiplier: its limbs, and its second and third limb times 20.
#[derive(Clone, Copy)]
struct Factor {
    limbs: Limbs,
    times_20: [V; 2],
}

/// State of 8 computations.
pub(super) struct Poly1305 {
    /// `r` of each packet.
    r: Factor,
    /// `r` squared.
    r2: Factor,
    accumulator: Limbs,
    /// `s` of each packet: its lower and its upper 8 bytes.
    s: [V; 2],
}

impl Poly1305 {
    /// Creates the state of packets with these one-time keys.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    pub(super) fn new(key: &[V; 4]) -> Self {
        let low = _mm512_and_si512(key[0], _mm512_set1_epi64(CLAMP_LOW as i64));
        let high = _mm512_and_si512(key[1], _mm512_set1_epi64(CLAMP_HIGH as i64));
        let r = factor(split(low, high));
        let r2 = factor(carry(multiply([(r.limbs, r)])));
        Self { r, r2, accumulator: [_mm512_setzero_si512(); 3], s: [key[2], key[3]] }
    }

    /// Processes a whole block of 16 bytes of each packet.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    pub(super) fn add(&mut self, low: V, high: V) {
        self.accumulator = carry(multiply([(self.plus_block(low, high), self.r)]));
    }

    /// Processes two blocks of each packet with one carry: (accumulator + first) r^2 + second r.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    pub(super) fn add_two(&mut self, first: [V; 2], second: [V; 2]) {
        let first = self.plus_block(first[0], first[1]);
        let second = with_high_bit(split(second[0], second[1]));
        self.accumulator = carry(multiply([(second, self.r), (first, self.r2)]));
    }

    /// Returns the one-time key of each packet as numbers, for tags that are computed one by one.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    pub(super) fn one_by_one(key: &[V; 4]) -> [[u128; 2]; 8] {
        let [r0, r1, s0, s1] = key.map(|half| words(half));
        std::array::from_fn(|l| {
            [
                u128::from(r0[l]) | u128::from(r1[l]) << 64,
                u128::from(s0[l]) | u128::from(s1[l]) << 64,
            ]
        })
    }

    /// Processes a block of the packets whose bit of `lanes` is set.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    pub(super) fn add_where(&mut self, lanes: u8, low: V, high: V) {
        let before = self.accumulator;
        self.add(low, high);
        for (limb, before) in self.accumulator.iter_mut().zip(before) {
            *limb = _mm512_mask_mov_epi64(before, lanes, *limb);
        }
    }

    /// Returns the tags.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    pub(super) fn tags(&self) -> [u128; 8] {
        let [h0, h1, h2] = self.accumulator.map(|limb| words(limb));
        let [s0, s1] = self.s.map(|half| words(half));
        std::array::from_fn(|l| {
            let low = u128::from(h0[l]) + (u128::from(h1[l]) << 44);
            let (low, carry) = low.overflowing_add(u128::from(h2[l]) << 88);
            let s = u128::from(s0[l]) | (u128::from(s1[l]) << 64);
            tag(low, (h2[l] >> 40) + u64::from(carry), s)
        })
    }

    /// Returns the accumulator plus a whole block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    fn plus_block(&self, low: V, high: V) -> Limbs {
        let block = with_high_bit(split(low, high));
        let [h0, h1, h2] = self.accumulator;
        [
            _mm512_add_epi64(h0, block[0]),
            _mm512_add_epi64(h1, block[1]),
            _mm512_add_epi64(h2, block[2]),
        ]
    }
}

/// Divides numbers of 128 bits into limbs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn split(low: V, high: V) -> Limbs {
    let mask = _mm512_set1_epi64((1 << 44) - 1);
    [
        _mm512_and_si512(low, mask),
        _mm512_and_si512(_mm512_shrdi_epi64::<44>(low, high), mask),
        _mm512_srli_epi64::<24>(high),
    ]
}

/// Adds 2^128, which stands for the byte 1 after a whole block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn with_high_bit(limbs: Limbs) -> Limbs {
    [limbs[0], limbs[1], _mm512_or_si512(limbs[2], _mm512_set1_epi64(1 << 40))]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn factor(limbs: Limbs) -> Factor {
    let times_20 = |v| _mm512_add_epi64(_mm512_slli_epi64::<4>(v), _mm512_slli_epi64::<2>(v));
    Factor { limbs, times_20: [times_20(limbs[1]), times_20(limbs[2])] }
}

/// Returns the sum of the products, not yet carried: the sums of the lower and of the upper parts.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn multiply<const N: usize>(products: [(Limbs, Factor); N]) -> [Limbs; 2] {
    let mut low = [_mm512_setzero_si512(); 3];
    let mut high = [_mm512_setzero_si512(); 3];
    for (h, Factor { limbs: [r0, r1, r2], times_20: [t1, t2] }) in products {
        for (h, row) in h.into_iter().zip([[r0, r1, r2], [t2, r0, r1], [t1, t2, r0]]) {
            low[0] = _mm512_madd52lo_epu64(low[0], h, row[0]);
            low[1] = _mm512_madd52lo_epu64(low[1], h, row[1]);
            low[2] = _mm512_madd52lo_epu64(low[2], h, row[2]);
            high[0] = _mm512_madd52hi_epu64(high[0], h, row[0]);
            high[1] = _mm512_madd52hi_epu64(high[1], h, row[1]);
            high[2] = _mm512_madd52hi_epu64(high[2], h, row[2]);
        }
    }
    [low, high]
}

/// Carries once around. The second limb keeps a carry of some bits more than 44.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn carry([[l0, l1, l2], [u0, u1, u2]]: [Limbs; 2]) -> Limbs {
    let mask44 = _mm512_set1_epi64((1 << 44) - 1);
    let mask42 = _mm512_set1_epi64((1 << 42) - 1);
    let l1 = _mm512_add_epi64(l1, _mm512_slli_epi64::<8>(u0));
    let l2 = _mm512_add_epi64(l2, _mm512_slli_epi64::<8>(u1));
    let c = _mm512_srli_epi64::<44>(l0);
    let l0 = _mm512_and_si512(l0, mask44);
    let l1 = _mm512_add_epi64(l1, c);
    let c = _mm512_srli_epi64::<44>(l1);
    let l1 = _mm512_and_si512(l1, mask44);
    let l2 = _mm512_add_epi64(l2, c);
    // What is above bit 130 comes back five times.
    let c = _mm512_add_epi64(_mm512_srli_epi64::<42>(l2), _mm512_slli_epi64::<10>(u2));
    let l2 = _mm512_and_si512(l2, mask42);
    let l0 = _mm512_add_epi64(l0, _mm512_add_epi64(c, _mm512_slli_epi64::<2>(c)));
    let c = _mm512_srli_epi64::<44>(l0);
    [_mm512_and_si512(l0, mask44), _mm512_add_epi64(l1, c), l2]
}

/// Returns the words of a vector.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
#[allow(unsafe_code)]
fn words(vector: V) -> [u64; 8] {
    let mut words = [0; 8];
    // SAFETY: the array has the 64 bytes that are written; they need no alignment.
    unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), vector) };
    words
}
