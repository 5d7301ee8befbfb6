//! The internet checksum, RFC 1071.

/// The ones' complement sum of `bytes`, added to `sum`; not folded, not complemented. Bytes pair
/// up from the start: only the last block of several may have an odd length.
pub fn add(sum: u64, bytes: &[u8]) -> u64 {
    let mut sum = u128::from(sum);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        sum += u128::from(u64::from_be_bytes(*word));
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    sum += u128::from(u64::from_be_bytes(last));
    // Ones' complement sums may be folded at any width that is a multiple of 16.
    let mut folded = (sum >> 64) as u64;
    let (low, carry) = folded.overflowing_add(sum as u64);
    folded = low + u64::from(carry);
    folded
}

/// Folds a sum to 16 bits. Complemented, it is the checksum.
pub fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, word by word.
    fn slow(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    #[test]
    fn the_example_of_rfc_1071_sums_up() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(add(0, &bytes)), 0xddf2);
    }

    proptest! {
        #[test]
        fn sums_are_those_of_the_definition(bytes: Vec<u8>, more: Vec<u8>) {
            // Zero and its complement are one number.
            let same = |a: u16, b: u16| a == b || (a == 0 && b == 0xffff) || (a == 0xffff && b == 0);
            prop_assert!(same(fold(add(0, &bytes)), slow(&bytes)));
            let mut even = bytes;
            even.truncate(even.len() & !1);
            let sum = add(add(0, &even), &more);
            even.extend_from_slice(&more);
            prop_assert!(same(fold(sum), slow(&even)));
        }

        #[test]
        fn the_largest_sums_fold(sum: u64) {
            prop_assert_eq!(u64::from(fold(sum)) % 0xffff, sum % 0xffff);
        }
    }
}
