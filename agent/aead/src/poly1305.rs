//! Poly1305 (RFC 8439 section 2.5) of one packet, and what all forms of it share: the constants, and
//! the last step of a tag.
//!
//! One packet alone does not fill the lanes of a vector, so for a few packets the batch backends
//! compute tags with this form.

use crate::lanes::Lane;
use crate::packets::Context;

/// Bits of the lower 8 bytes of `r` that clamping keeps.
pub(crate) const CLAMP_LOW: u64 = 0x0fff_fffc_0fff_ffff;
/// Bits of the upper 8 bytes of `r` that clamping keeps.
pub(crate) const CLAMP_HIGH: u64 = 0x0fff_fffc_0fff_fffc;

/// State of the computation for one packet. The accumulator is `low + high * 2^128`.
struct Poly1305 {
    r: [u64; 2],
    /// The upper half of `r` times 5/4. Clamping makes that a whole number: a product with it is one
    /// at 2^128 that comes back from 2^130 five times.
    r1_times_5_4: u64,
    low: u128,
    /// At most 4, since each block is reduced.
    high: u64,
}

impl Poly1305 {
    fn new(r: u128) -> Self {
        let r = [r as u64 & CLAMP_LOW, (r >> 64) as u64 & CLAMP_HIGH];
        Self { r, r1_times_5_4: r[1] + (r[1] >> 2), low: 0, high: 0 }
    }

    /// Processes a whole block. Factors have at most 64 and 61 bits, so no sum of products overflows.
    #[inline]
    fn add(&mut self, block: u128) {
        let (low, carry) = self.low.overflowing_add(block);
        let high = self.high + 1 + u64::from(carry);
        let (h0, h1) = (low as u64, (low >> 64) as u64);
        let product = |a: u64, b: u64| u128::from(a) * u128::from(b);
        let [r0, r1] = self.r;
        let d0 = product(h0, r0) + product(h1, self.r1_times_5_4);
        let d1 = product(h0, r1) + product(h1, r0) + product(high, self.r1_times_5_4) + (d0 >> 64);
        // Less than 2^63 + 2^62, since `high` is at most 6 and `r0` has 60 bits.
        let d2 = high * r0 + (d1 >> 64) as u64;
        let low = u128::from(d0 as u64) | d1 << 64;
        // What is above bit 130 comes back five times.
        let (low, carry) = low.overflowing_add(u128::from((d2 >> 2) + (d2 & !3)));
        (self.low, self.high) = (low, (d2 & 3) + u64::from(carry));
    }

    /// Processes bytes, filled with zeros to whole blocks.
    fn add_padded(&mut self, bytes: &[u8]) {
        let (blocks, rest) = bytes.as_chunks();
        for block in blocks {
            self.add(u128::from_le_bytes(*block));
        }
        if !rest.is_empty() {
            let byte = |word, byte: &u8| word << 8 | u128::from(*byte);
            self.add(rest.iter().rev().fold(0, byte));
        }
    }
}

/// Returns the tag of one packet with this one-time key: `r`, then `s`.
pub(crate) fn tag_of(r: u128, s: u128, context: &Context<'_>, lane: &Lane<'_>) -> u128 {
    let mut state = Poly1305::new(r);
    state.add_padded(context.aad);
    state.add_padded(lane.blocks.as_flattened());
    state.add_padded(lane.tail);
    state.add(context.aad.len() as u128 | u128::from(lane.bytes()) << 64);
    tag(state.low, state.high, s)
}

/// Returns the tag: the accumulator `low + high * 2^128`, reduced modulo 2^130 - 5, plus `s`.
/// `high` is less than 2^60.
#[inline]
pub(crate) fn tag(low: u128, high: u64, s: u128) -> u128 {
    // 2^130 is 5, so what is above bit 130 comes back five times.
    let (low, carry) = low.overflowing_add(u128::from(high >> 2) * 5);
    let high = (high & 3) + u64::from(carry);
    // The number is now less than 2^130 + 2^63. If it is 2^130 - 5 or more, then 5 more reach bit
    // 130, and the lower 128 bits of that sum are the remainder.
    let (reduced, carry) = low.overflowing_add(5);
    let reaches = (high + u64::from(carry)) >> 2;
    let mask = u128::from(reaches & 1).wrapping_neg();
    ((low & !mask) | (reduced & mask)).wrapping_add(s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_around_the_modulus_are_reduced() {
        // (high, low, remainder)
        let below = u128::MAX - 5;
        for (high, low, remainder) in [
            (0, 0, 0),
            (3, below, below),
            (3, u128::MAX - 4, 0),
            (3, u128::MAX, 4),
            (4, 0, 5),
            (4, below, below + 5),
            (8, 1, 11),
        ] {
            assert_eq!(tag(low, high, 0), remainder, "{high} {low:x}");
            assert_eq!(tag(low, high, 7), remainder.wrapping_add(7));
        }
    }
}
