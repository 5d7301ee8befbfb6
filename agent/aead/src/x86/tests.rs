//! Poly1305 alone: with the keys of RFC 8439's edge cases, which no known ChaCha20 key leads to, and
//! against slow arithmetic.

use std::arch::x86_64::*;

use data_encoding::HEXLOWER_PERMISSIVE;
use proptest::prelude::*;

use super::{poly1305x4, poly1305x8};
use crate::poly1305::{CLAMP_HIGH, CLAMP_LOW};

/// One-time key of a packet, and its blocks.
#[derive(Debug, Clone)]
struct Input {
    r: u128,
    s: u128,
    blocks: Vec<u128>,
}

/// Number below 2^130 - 5: bits 128 and 129, and those below.
type Number = (u64, u128);

/// Adds modulo 2^130 - 5.
fn add(a: Number, b: Number) -> Number {
    let (low, carry) = a.1.overflowing_add(b.1);
    let high = a.0 + b.0 + u64::from(carry);
    if high > 3 || (high == 3 && low > u128::MAX - 5) {
        let (low, carry) = low.overflowing_add(5);
        return (high + u64::from(carry) - 4, low);
    }
    (high, low)
}

/// Returns the tag, by double and add.
fn expected(input: &Input) -> u128 {
    let r = input.r & (u128::from(CLAMP_LOW) | (u128::from(CLAMP_HIGH) << 64));
    let mut accumulator = (0, 0);
    for block in &input.blocks {
        let sum = add(accumulator, (1, *block));
        accumulator = (0, 0);
        for bit in (0..128).rev() {
            accumulator = add(accumulator, accumulator);
            if r >> bit & 1 == 1 {
                accumulator = add(accumulator, sum);
            }
        }
    }
    accumulator.1.wrapping_add(input.s)
}

/// Defines a function that computes the tags of one lane for each input.
macro_rules! tags {
    ($name:ident, $module:ident, $lanes:literal, $features:literal, $vector:ty, $load:ident) => {
        #[target_feature(enable = $features)]
        #[allow(unsafe_code)]
        fn $name(inputs: &[Input; $lanes], pairs: bool) -> [u128; $lanes] {
            let vector = |word: &dyn Fn(&Input) -> u128, shift: u32| -> $vector {
                let words = inputs.each_ref().map(|input| (word(input) >> shift) as u64);
                // SAFETY: the array covers the bytes that are read.
                unsafe { $load(words.as_ptr().cast()) }
            };
            let both = |word: &dyn Fn(&Input) -> u128| [vector(word, 0), vector(word, 64)];
            let ([r0, r1], [s0, s1]) = (both(&|input| input.r), both(&|input| input.s));
            let mut state = $module::Poly1305::new(&[r0, r1, s0, s1]);
            let mut index = 0;
            while index < inputs[0].blocks.len() {
                let block = |index: usize| both(&|input: &Input| input.blocks[index]);
                if pairs && index + 1 < inputs[0].blocks.len() {
                    state.add_two(block(index), block(index + 1));
                    index += 2;
                } else {
                    let [low, high] = block(index);
                    state.add(low, high);
                    index += 1;
                }
            }
            state.tags()
        }
    };
}

tags!(of_4, poly1305x4, 4, "avx2", __m256i, _mm256_loadu_si256);
tags!(of_8, poly1305x8, 8, "avx512f,avx512bw,avx512ifma,avx512vbmi2", __m512i, _mm512_loadu_si512);

/// Checks inputs with equal numbers of blocks, on the instructions that this CPU has.
#[allow(unsafe_code)]
fn check(inputs: &[Input; 8]) {
    let expected = inputs.each_ref().map(expected);
    let has = |name| super::Batch::of_this_cpu().any(|batch| batch.name() == name);
    for pairs in [false, true] {
        if has("avx2") {
            for (inputs, expected) in inputs.as_chunks().0.iter().zip(expected.as_chunks().0) {
                // SAFETY: the CPU has AVX2.
                assert_eq!(unsafe { of_4(inputs, pairs) }, *expected, "avx2 {inputs:?}");
            }
        }
        if has("avx512-ifma") {
            // SAFETY: the CPU has the features of this backend.
            assert_eq!(unsafe { of_8(inputs, pairs) }, expected, "avx512-ifma {inputs:?}");
        }
    }
}

#[test]
fn rfc_8439_appendix_a_3_edge_cases() {
    // r, s, blocks, tag
    const ONES: &str = "ffffffffffffffffffffffffffffffff";
    const ZERO: &str = "00000000000000000000000000000000";
    const ONE: &str = "01000000000000000000000000000000";
    const TWO: &str = "02000000000000000000000000000000";
    let one_and_four = "01000000000000000400000000000000";
    let blocks =
        ["e33594d7505e43b90000000000000000", "3394d7505e4379cd0100000000000000", ZERO, ONE];
    let number = |text: &str| {
        let bytes = HEXLOWER_PERMISSIVE.decode(text.as_bytes()).unwrap();
        u128::from_le_bytes(bytes.try_into().unwrap())
    };
    for (r, s, blocks, tag) in [
        (ZERO, ZERO, &[ZERO; 4] as &[&str], ZERO),
        (TWO, ZERO, &[ONES], "03000000000000000000000000000000"),
        (TWO, ONES, &[TWO], "03000000000000000000000000000000"),
        (
            ONE,
            ZERO,
            &[ONES, "f0ffffffffffffffffffffffffffffff", "11000000000000000000000000000000"],
            "05000000000000000000000000000000",
        ),
        (
            ONE,
            ZERO,
            &[ONES, "fbfefefefefefefefefefefefefefefe", "01010101010101010101010101010101"],
            ZERO,
        ),
        (TWO, ZERO, &["fdffffffffffffffffffffffffffffff"], "faffffffffffffffffffffffffffffff"),
        (one_and_four, ZERO, &blocks, "14000000000000005500000000000000"),
        (one_and_four, ZERO, &blocks[..3], "13000000000000000000000000000000"),
    ] {
        let blocks: Vec<u128> = blocks.iter().map(|block| number(block)).collect();
        let input = Input { r: number(r), s: number(s), blocks };
        assert_eq!(expected(&input), number(tag));
        check(&std::array::from_fn(|_| input.clone()));
    }
}

/// Returns a strategy for numbers, also extreme ones.
fn number() -> impl Strategy<Value = u128> {
    prop_oneof![any::<u128>(), Just(u128::MAX), Just(0), (0u128..8).prop_map(|n| u128::MAX - n)]
}

proptest! {
    #[test]
    fn tags_are_those_of_slow_arithmetic(
        lanes in (0usize..12).prop_flat_map(|blocks| {
            let input = (number(), number(), proptest::collection::vec(number(), blocks));
            proptest::array::uniform8(input)
        }),
    ) {
        check(&lanes.map(|(r, s, blocks)| Input { r, s, blocks }));
    }
}
