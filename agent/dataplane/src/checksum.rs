//! The internet checksum (RFC 1071) over whole packets. It is computed for most packets in both
//! directions, so it must be fast.

use std::net::IpAddr;

/// Returns the ones' complement sum of `bytes` added to `sum`, neither folded nor complemented.
/// Bytes are paired from the start, so only the last of several blocks may have an odd length.
#[inline]
pub fn add(sum: u64, bytes: &[u8]) -> u64 {
    // Headers are too short to benefit from wide registers.
    if bytes.len() < 128 {
        return sum + u64::from(narrow(bytes));
    }
    sum + u64::from(wide(bytes))
}

/// Copies `from` to `to`, which is as long, and returns what [`add`] returns for it. Each byte is read once.
#[inline]
pub fn copy_and_add(sum: u64, from: &[u8], to: &mut [u8]) -> u64 {
    if from.len() < 128 {
        to.copy_from_slice(from);
        return sum + u64::from(narrow(from));
    }
    sum + u64::from(copy_wide(from, to))
}

/// Folds a sum to 16 bits. Its complement is the checksum.
#[inline]
pub fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

/// Returns the sum of the pseudo-header of TCP and UDP without the length (RFC 9293 section 3.1,
/// RFC 8200 section 8.1).
#[inline]
pub fn pseudo(source: &IpAddr, destination: &IpAddr, protocol: u8) -> u64 {
    let sum = u64::from(protocol);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            sum + u64::from(u32::from(*source)) + u64::from(u32::from(*destination))
        }
        _ => [source, destination].iter().fold(sum, |sum, address| match address {
            IpAddr::V4(v4) => sum + u64::from(u32::from(*v4)),
            IpAddr::V6(v6) => add(sum, &v6.octets()),
        }),
    }
}

/// Sums words of 64 bits in the processor's byte order, each with its carry. The sum is swapped once at the
/// end (RFC 1071 section 2). The rest is added without a copy: most headers are a few words long.
#[inline]
fn narrow(bytes: &[u8]) -> u16 {
    let carried = |sum: u64, word: u64| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u64::from(carry)
    };
    let (words, mut rest) = bytes.as_chunks::<8>();
    let mut sum = words.iter().fold(0, |sum, word| carried(sum, u64::from_ne_bytes(*word)));
    if let Some((word, more)) = rest.split_first_chunk::<4>() {
        (sum, rest) = (carried(sum, u32::from_ne_bytes(*word).into()), more);
    }
    if let Some((word, more)) = rest.split_first_chunk::<2>() {
        (sum, rest) = (carried(sum, u16::from_ne_bytes(*word).into()), more);
    }
    if let Some(last) = rest.first() {
        sum = carried(sum, u16::from_ne_bytes([*last, 0]).into());
    }
    u16::from_be(fold(sum))
}

#[cfg(not(target_arch = "x86_64"))]
fn wide(bytes: &[u8]) -> u16 {
    lanes(bytes)
}

#[cfg(target_arch = "x86_64")]
fn wide(bytes: &[u8]) -> u16 {
    #[target_feature(enable = "avx2")]
    fn lanes_avx2(bytes: &[u8]) -> u16 {
        lanes(bytes)
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor supports AVX2.
        unsafe { lanes_avx2(bytes) }
    } else {
        lanes(bytes)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn copy_wide(from: &[u8], to: &mut [u8]) -> u16 {
    copy_lanes(from, to)
}

#[cfg(target_arch = "x86_64")]
fn copy_wide(from: &[u8], to: &mut [u8]) -> u16 {
    #[target_feature(enable = "avx2")]
    fn copy_lanes_avx2(from: &[u8], to: &mut [u8]) -> u16 {
        copy_lanes(from, to)
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor supports AVX2.
        unsafe { copy_lanes_avx2(from, to) }
    } else {
        copy_lanes(from, to)
    }
}

/// Sums 32-bit words in 64-bit lanes, which the compiler places in wide registers. The sum does not
/// depend on the byte order of the words if it is swapped once at the end (RFC 1071 section 2). A lane
/// cannot overflow before 2^32 words. Checks for that would keep the compiler from using wide registers.
#[inline(always)]
fn lanes(bytes: &[u8]) -> u16 {
    const LANES: usize = 16;
    let mut lanes = [0u64; LANES];
    let (blocks, rest) = bytes.as_chunks::<{ LANES * 4 }>();
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = lane.wrapping_add(u32::from_ne_bytes(*word).into());
        }
    }
    let sum = fold(lanes.iter().map(|lane| (lane >> 32) + (lane & 0xffff_ffff)).sum());
    fold(u64::from(u16::from_be(sum)) + u64::from(narrow(rest)))
}

/// Copies and sums words of 64 bits, each half in a lane of its own, so that one read serves both.
#[inline(always)]
fn copy_lanes(from: &[u8], to: &mut [u8]) -> u16 {
    const WORDS: usize = 8;
    let (mut low, mut high) = ([0u64; WORDS], [0u64; WORDS]);
    let (blocks, rest) = from.as_chunks::<{ WORDS * 8 }>();
    let (copies, rest_copy) = to.as_chunks_mut::<{ WORDS * 8 }>();
    for (block, copy) in blocks.iter().zip(copies) {
        let (words, _) = block.as_chunks::<8>();
        let (copies, _) = copy.as_chunks_mut::<8>();
        let lanes = low.iter_mut().zip(&mut high);
        for ((word, copy), (low, high)) in words.iter().zip(copies).zip(lanes) {
            *copy = *word;
            let word = u64::from_ne_bytes(*word);
            *low = low.wrapping_add(word & 0xffff_ffff);
            *high = high.wrapping_add(word >> 32);
        }
    }
    rest_copy.copy_from_slice(rest);
    let lanes = low.iter().chain(&high);
    let sum = fold(lanes.map(|lane| (lane >> 32) + (lane & 0xffff_ffff)).sum());
    fold(u64::from(u16::from_be(sum)) + u64::from(narrow(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::slow_sum;
    use proptest::prelude::*;

    /// Compares two sums. In ones' complement 0 and 0xffff are equal.
    fn same(a: u16, b: u16) -> bool {
        a % 0xffff == b % 0xffff
    }

    #[test]
    fn the_example_of_rfc_1071_sums_up() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(add(0, &bytes)), 0xddf2);
    }

    #[test]
    fn the_longest_packet_of_ones_does_not_overflow() {
        let bytes = vec![0xff; 65_535];
        assert!(same(fold(add(0, &bytes)), slow_sum(&bytes)));
        assert!(same(lanes(&bytes), slow_sum(&bytes)));
        let mut copy = vec![0; bytes.len()];
        assert!(same(copy_lanes(&bytes, &mut copy), slow_sum(&bytes)));
        assert_eq!(copy, bytes);
    }

    proptest! {
        #[test]
        fn sums_are_those_of_the_definition(
            bytes in proptest::collection::vec(any::<u8>(), 0..3000),
            more in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            prop_assert!(same(fold(add(0, &bytes)), slow_sum(&bytes)));
            prop_assert!(same(lanes(&bytes), slow_sum(&bytes)), "without wide registers");
            let mut copy = vec![0; bytes.len()];
            prop_assert!(same(fold(copy_and_add(0, &bytes, &mut copy)), slow_sum(&bytes)));
            prop_assert!(copy == bytes);
            copy.fill(0);
            prop_assert!(same(copy_lanes(&bytes, &mut copy), slow_sum(&bytes)));
            prop_assert!(copy == bytes, "without wide registers");
            let mut even = bytes;
            even.truncate(even.len() & !1);
            let sum = add(add(0, &even), &more);
            even.extend_from_slice(&more);
            prop_assert!(same(fold(sum), slow_sum(&even)));
        }

        #[test]
        fn the_largest_sums_fold(sum: u64) {
            prop_assert_eq!(u64::from(fold(sum)) % 0xffff, sum % 0xffff);
        }
    }
}
