//! Poly1305 of 4 packets, one in each lane of 64 bits, with AVX2.
//!
//! A number of 130 bits is five limbs of 26 bits, so that a product of two limbs fits a lane. A
//! product beyond the fifth limb comes back multiplied by 5, since 2^130 is 5.
//!
//! Bounds: limbs of `r` and `r^2` have at most 26 bits and a bit of carry, their fivefold less than
//! 30. The accumulator has at most 27 bits per limb, 28 with a block added. AVX2 multiplies the
//! lower 32 bits of a lane, so every factor fits; a product has at most 58 bits, and ten fit 62.

use std::arch::x86_64::*;

use crate::poly1305::{CLAMP_HIGH, CLAMP_LOW, tag};

/// Vector of 4 words of 64 bits.
type V = __m256i;
/// Numbers of 130 bits as five limbs.
type Limbs = [V; 5];

/// Multiplier: its limbs, and all but the first times 5.
#[derive(Clone, Copy)]
struct Factor {
    limbs: Limbs,
    times_5: [V; 4],
}

/// State of 4 computations.
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
    #[target_feature(enable = "avx2")]
    pub(super) fn new(key: &[V; 4]) -> Self {
        let low = _mm256_and_si256(key[0], _mm256_set1_epi64x(CLAMP_LOW as i64));
        let high = _mm256_and_si256(key[1], _mm256_set1_epi64x(CLAMP_HIGH as i64));
        let r = factor(split(low, high));
        let r2 = factor(carry(multiply([(r.limbs, r)])));
        Self { r, r2, accumulator: [_mm256_setzero_si256(); 5], s: [key[2], key[3]] }
    }

    /// Processes a whole block of 16 bytes of each packet.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn add(&mut self, low: V, high: V) {
        self.accumulator = carry(multiply([(self.plus_block(low, high), self.r)]));
    }

    /// Processes two blocks of each packet with one carry: (accumulator + first) r^2 + second r.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn add_two(&mut self, first: [V; 2], second: [V; 2]) {
        let first = self.plus_block(first[0], first[1]);
        let second = with_high_bit(split(second[0], second[1]));
        self.accumulator = carry(multiply([(second, self.r), (first, self.r2)]));
    }

    /// Returns the one-time key of each packet as numbers, for tags that are computed one by one.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn one_by_one(key: &[V; 4]) -> [[u128; 2]; 4] {
        let [r0, r1, s0, s1] = key.map(|half| words(half));
        std::array::from_fn(|l| {
            [
                u128::from(r0[l]) | u128::from(r1[l]) << 64,
                u128::from(s0[l]) | u128::from(s1[l]) << 64,
            ]
        })
    }

    /// Processes a block of the packets whose lane of `lanes` is all ones. The other lanes are 0.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn add_where(&mut self, lanes: V, low: V, high: V) {
        let before = self.accumulator;
        self.add(low, high);
        for (limb, before) in self.accumulator.iter_mut().zip(before) {
            *limb = _mm256_blendv_epi8(before, *limb, lanes);
        }
    }

    /// Returns the tags.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn tags(&self) -> [u128; 4] {
        let h = self.accumulator.map(|limb| words(limb));
        let [s0, s1] = self.s.map(|half| words(half));
        std::array::from_fn(|l| {
            let shifted = |i: usize| u128::from(h[i][l]) << (26 * i);
            let low = shifted(0) + shifted(1) + shifted(2) + shifted(3);
            let (low, carry) = low.overflowing_add(shifted(4));
            let s = u128::from(s0[l]) | (u128::from(s1[l]) << 64);
            tag(low, (h[4][l] >> 24) + u64::from(carry), s)
        })
    }

    /// Returns the accumulator plus a whole block.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn plus_block(&self, low: V, high: V) -> Limbs {
        let mut sum = with_high_bit(split(low, high));
        for (sum, limb) in sum.iter_mut().zip(self.accumulator) {
            *sum = _mm256_add_epi64(*sum, limb);
        }
        sum
    }
}

/// Divides numbers of 128 bits into limbs.
#[inline]
#[target_feature(enable = "avx2")]
fn split(low: V, high: V) -> Limbs {
    let mask = _mm256_set1_epi64x((1 << 26) - 1);
    let middle = _mm256_or_si256(_mm256_srli_epi64::<52>(low), _mm256_slli_epi64::<12>(high));
    [
        _mm256_and_si256(low, mask),
        _mm256_and_si256(_mm256_srli_epi64::<26>(low), mask),
        _mm256_and_si256(middle, mask),
        _mm256_and_si256(_mm256_srli_epi64::<14>(high), mask),
        _mm256_srli_epi64::<40>(high),
    ]
}

/// Adds 2^128, which stands for the byte 1 after a whole block.
#[inline]
#[target_feature(enable = "avx2")]
fn with_high_bit(mut limbs: Limbs) -> Limbs {
    limbs[4] = _mm256_or_si256(limbs[4], _mm256_set1_epi64x(1 << 24));
    limbs
}

#[inline]
#[target_feature(enable = "avx2")]
fn factor(limbs: Limbs) -> Factor {
    let [_, others @ ..] = limbs;
    Factor { limbs, times_5: others.map(|v| _mm256_add_epi64(v, _mm256_slli_epi64::<2>(v))) }
}

/// Returns the sum of the products, not yet carried.
#[inline]
#[target_feature(enable = "avx2")]
fn multiply<const N: usize>(products: [(Limbs, Factor); N]) -> Limbs {
    let mut sum = [_mm256_setzero_si256(); 5];
    for (h, Factor { limbs: [r0, r1, r2, r3, r4], times_5: [t1, t2, t3, t4] }) in products {
        sum[0] = add_dot(sum[0], h, [r0, t4, t3, t2, t1]);
        sum[1] = add_dot(sum[1], h, [r1, r0, t4, t3, t2]);
        sum[2] = add_dot(sum[2], h, [r2, r1, r0, t4, t3]);
        sum[3] = add_dot(sum[3], h, [r3, r2, r1, r0, t4]);
        sum[4] = add_dot(sum[4], h, [r4, r3, r2, r1, r0]);
    }
    sum
}

/// Returns the sum plus the products of the limbs with these factors. Written out, because the
/// compiler would keep a loop.
#[inline]
#[target_feature(enable = "avx2")]
fn add_dot(sum: V, h: Limbs, factors: [V; 5]) -> V {
    let sum = _mm256_add_epi64(sum, _mm256_mul_epu32(h[0], factors[0]));
    let sum = _mm256_add_epi64(sum, _mm256_mul_epu32(h[1], factors[1]));
    let sum = _mm256_add_epi64(sum, _mm256_mul_epu32(h[2], factors[2]));
    let sum = _mm256_add_epi64(sum, _mm256_mul_epu32(h[3], factors[3]));
    _mm256_add_epi64(sum, _mm256_mul_epu32(h[4], factors[4]))
}

/// Carries once around, in two chains side by side. The second and the fifth limb keep a carry of
/// some bits more than 26.
#[inline]
#[target_feature(enable = "avx2")]
fn carry([mut h0, mut h1, mut h2, mut h3, mut h4]: Limbs) -> Limbs {
    let mask = _mm256_set1_epi64x((1 << 26) - 1);
    macro_rules! carry {
        ($from:ident, $to:ident) => {
            let c = _mm256_srli_epi64::<26>($from);
            $from = _mm256_and_si256($from, mask);
            $to = _mm256_add_epi64($to, c);
        };
    }
    carry!(h0, h1);
    carry!(h3, h4);
    carry!(h1, h2);
    // What is above bit 130 comes back five times.
    let c = _mm256_srli_epi64::<26>(h4);
    h4 = _mm256_and_si256(h4, mask);
    h0 = _mm256_add_epi64(h0, _mm256_add_epi64(c, _mm256_slli_epi64::<2>(c)));
    carry!(h2, h3);
    carry!(h0, h1);
    carry!(h3, h4);
    [h0, h1, h2, h3, h4]
}

/// Returns the words of a vector.
#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn words(vector: V) -> [u64; 4] {
    let mut words = [0; 4];
    // SAFETY: the array has the 32 bytes that are written; they need no alignment.
    unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), vector) };
    words
}
