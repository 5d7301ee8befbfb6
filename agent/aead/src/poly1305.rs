//! Constants of Poly1305 (RFC 8439 section 2.5), and the last step of a tag.

/// Bits of the lower 8 bytes of `r` that clamping keeps.
pub(crate) const CLAMP_LOW: u64 = 0x0fff_fffc_0fff_ffff;
/// Bits of the upper 8 bytes of `r` that clamping keeps.
pub(crate) const CLAMP_HIGH: u64 = 0x0fff_fffc_0fff_fffc;

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
