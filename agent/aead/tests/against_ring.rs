//! Every backend of this CPU against ring: lengths, batch sizes, mixed lengths, forgeries.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report

use std::ops::Range;

use proptest::prelude::*;
use towline_aead::internals::{backends, open, seal};
use towline_aead::{Aead, Backend, Key, MAX_PACKET_BYTES, Misplaced, Packet, TAG_BYTES};

/// Longest length that is tested with every batch: a jumbo frame.
const LONGEST: usize = 9_000;
/// Largest batch: what one send of the kernel takes.
const LARGEST: usize = 64;
/// Bytes between packets: the header of WireGuard's data message.
const HEADER: usize = 16;

const KEY: [u8; 32] = *b"a key that only these tests use.";

/// A batch in plain text, and the same as ring seals it.
struct Batch {
    packets: Vec<Packet>,
    plain: Vec<u8>,
    sealed: Vec<u8>,
}

impl Batch {
    fn new(lengths: &[usize], first_counter: u64, fill: u8) -> Self {
        let mut end = 0;
        let packets: Vec<Packet> = lengths
            .iter()
            .zip(0..)
            .map(|(len, i)| {
                let start = end + HEADER;
                end = start + len + TAG_BYTES;
                Packet { start, len: *len, counter: first_counter.wrapping_add(i) }
            })
            .collect();
        let byte = |i: usize| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ fill;
        let plain: Vec<u8> = (0..end + HEADER).map(byte).collect();
        let mut sealed = plain.clone();
        Key::new(&KEY, Backend::select(Aead::Ring)).seal(&mut sealed, &packets).unwrap();
        Self { packets, plain, sealed }
    }

    fn payload(packet: &Packet) -> Range<usize> {
        packet.start..packet.start + packet.len
    }

    /// Checks that each backend seals this batch as ring does, and opens it.
    fn check(&self, what: &str) {
        for backend in backends() {
            let key = Key::new(&KEY, backend);
            let mut arena = self.plain.clone();
            key.seal(&mut arena, &self.packets).unwrap();
            assert!(arena == self.sealed, "{}: {what} is sealed differently", backend.name());
            let mut authentic = vec![false; 3];
            key.open(&mut arena, &self.packets, &mut authentic).unwrap();
            assert_eq!(authentic, vec![true; self.packets.len()], "{}: {what}", backend.name());
            for packet in &self.packets {
                arena[packet.start + packet.len..][..TAG_BYTES]
                    .copy_from_slice(&self.plain[packet.start + packet.len..][..TAG_BYTES]);
            }
            assert!(arena == self.plain, "{}: {what} is opened differently", backend.name());
        }
    }

    /// Checks that each backend finds these packets, whose bit was changed, and no other.
    fn check_forged(&self, forged: &[(usize, usize)]) {
        let mut changed = self.sealed.clone();
        for (packet, bit) in forged {
            let packet = &self.packets[*packet];
            let bit = bit % (8 * (packet.len + TAG_BYTES));
            changed[packet.start + bit / 8] ^= 1 << (bit % 8);
        }
        for backend in backends() {
            let (mut arena, mut authentic) = (changed.clone(), Vec::new());
            Key::new(&KEY, backend).open(&mut arena, &self.packets, &mut authentic).unwrap();
            for (i, packet) in self.packets.iter().enumerate() {
                let is_forged = forged.iter().any(|(place, _)| *place == i);
                assert_eq!(authentic[i], !is_forged, "{}: packet {i}", backend.name());
                let range = Self::payload(packet);
                let expected = match (is_forged, backend.is_batched()) {
                    (false, _) => &self.plain[range.clone()],
                    (true, true) => &changed[range.clone()],
                    (true, false) => &vec![0; packet.len],
                };
                assert_eq!(&arena[range], expected, "{}: packet {i}", backend.name());
            }
        }
    }
}

/// Checks batches of these sizes for every length.
fn every_length(sizes: &[usize]) {
    for len in 0..=LONGEST {
        for size in sizes {
            // The lower half of the counter overflows within the batch.
            let first = (len as u64) << 32 | u64::from(u32::MAX - 1);
            Batch::new(&vec![len; *size], first, len as u8)
                .check(&format!("{size} of {len} bytes"));
        }
    }
}

#[test]
fn every_length_alone() {
    every_length(&[1]);
}

#[test]
fn every_length_in_small_batches() {
    every_length(&[2, 4, 5]);
}

#[test]
fn every_length_in_a_full_group() {
    every_length(&[16]);
}

#[test]
fn every_batch_size() {
    for size in 1..=LARGEST {
        for len in [0, 1, 15, 16, 17, 32, 63, 64, 65, 127, 128, 576, 1_024, 1_420, 1_440, LONGEST] {
            Batch::new(&vec![len; size], 0, size as u8).check(&format!("{size} of {len} bytes"));
        }
    }
}

#[test]
fn the_longest_packet() {
    Batch::new(&[MAX_PACKET_BYTES, 0, MAX_PACKET_BYTES - 1], 7, 0).check("the longest packet");
}

#[test]
fn a_forgery_is_found_at_every_place_of_every_batch() {
    for size in 1..=LARGEST {
        let lengths: Vec<usize> = (0..size).map(|i| i * 37 % 300).collect();
        let batch = Batch::new(&lengths, 1 << 40, 0);
        for place in 0..size {
            batch.check_forged(&[(place, place * 101)]);
        }
        batch.check_forged(&(0..size).map(|place| (place, place * 7)).collect::<Vec<_>>());
    }
}

/// One or two packets up to a certain length have a form of their own.
#[test]
fn one_or_two_short_packets_of_every_length() {
    for len in 0..=256 {
        for lengths in [vec![len], vec![len, len], vec![len, 256 - len], vec![256 - len, 0]] {
            let first = (len as u64) << 33 | u64::from(u32::MAX);
            let batch = Batch::new(&lengths, first, len as u8);
            batch.check(&format!("{lengths:?} bytes"));
            for place in 0..lengths.len() {
                batch.check_forged(&[(place, len * 37)]);
            }
            batch.check_forged(&(0..lengths.len()).map(|place| (place, len)).collect::<Vec<_>>());
        }
    }
}

/// Short packets of different lengths with a whole nonce and associated data up to a few blocks.
#[test]
fn two_short_packets_with_associated_data() {
    let prefix = [1, 2, 3, 4];
    let data: Vec<u8> = (0..40).collect();
    for len in [0, 1, 63, 64, 130, 192] {
        let batch = Batch::new(&[len, 192 - len], u64::MAX - 1, 9);
        for aad in (0..=data.len()).map(|end| &data[..end]) {
            let sealed = |backend| {
                let (key, mut arena) = (Key::new(&KEY, backend), batch.plain.clone());
                seal(&key, prefix, aad, &mut arena, &batch.packets).unwrap();
                arena
            };
            let expected = sealed(Backend::select(Aead::Ring));
            for backend in backends() {
                let what = format!("{}: {len} bytes with {}", backend.name(), aad.len());
                assert!(sealed(backend) == expected, "{what} are sealed differently");
                let (mut arena, mut authentic) = (expected.clone(), Vec::new());
                let key = Key::new(&KEY, backend);
                open(&key, prefix, aad, &mut arena, &batch.packets, &mut authentic).unwrap();
                assert_eq!(authentic, [true; 2], "{what}");
                for range in batch.packets.iter().map(Batch::payload) {
                    assert_eq!(arena[range.clone()], batch.plain[range], "{what}");
                }
            }
        }
    }
}

#[test]
fn every_bit_of_a_short_packet_is_authenticated() {
    let batch = Batch::new(&[75, 75], 3, 0);
    for bit in 0..8 * (75 + TAG_BYTES) {
        batch.check_forged(&[(0, bit)]);
        batch.check_forged(&[(1, bit)]);
    }
}

#[test]
fn every_bit_of_a_packet_is_authenticated() {
    let batch = Batch::new(&[75, 75, 75], 3, 0);
    for bit in 0..8 * (75 + TAG_BYTES) {
        batch.check_forged(&[(1, bit)]);
    }
    // The counter is authenticated, too.
    for backend in backends() {
        for bit in 0..64 {
            let mut packets = batch.packets.clone();
            packets[1].counter ^= 1 << bit;
            let mut authentic = Vec::new();
            let mut arena = batch.sealed.clone();
            Key::new(&KEY, backend).open(&mut arena, &packets, &mut authentic).unwrap();
            assert_eq!(authentic, [true, false, true], "{}: bit {bit}", backend.name());
        }
    }
}

#[test]
fn a_batch_that_does_not_fit_is_left_as_it_was() {
    let at = |start, len| Packet { start, len, counter: 0 };
    for packets in [
        vec![at(0, 85)],
        vec![at(100, 0)],
        vec![at(usize::MAX, 1)],
        vec![at(0, usize::MAX)],
        vec![at(0, 16), at(31, 16)],
        vec![at(48, 16), at(0, 16)],
        vec![at(0, MAX_PACKET_BYTES + 1)],
    ] {
        for backend in backends() {
            let (key, mut authentic) = (Key::new(&KEY, backend), vec![true; 9]);
            let mut arena = vec![1; 100];
            assert_eq!(key.seal(&mut arena, &packets), Err(Misplaced));
            assert_eq!(key.open(&mut arena, &packets, &mut authentic), Err(Misplaced));
            assert_eq!((arena, authentic), (vec![1; 100], vec![]), "{packets:?}");
        }
    }
}

#[test]
fn an_empty_batch_is_sealed_and_opened() {
    for backend in backends() {
        let (key, mut authentic) = (Key::new(&KEY, backend), vec![true]);
        assert_eq!(key.seal(&mut [], &[]), Ok(()));
        assert_eq!(key.open(&mut [], &[], &mut authentic), Ok(()));
        assert!(authentic.is_empty());
    }
}

#[test]
fn a_key_does_not_show_its_bytes() {
    let shown = format!("{:?}", Key::new(&KEY, Backend::select(Aead::Auto)));
    assert!(!shown.contains("97") && !shown.contains("61"), "{shown}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn mixed_lengths(
        lengths in proptest::collection::vec(
            prop_oneof![0usize..200, 0usize..2_000, Just(1_420), 0usize..=LONGEST],
            1..=LARGEST,
        ),
        counter in any::<u64>(),
        fill in any::<u8>(),
        forged in proptest::collection::btree_map(0usize..LARGEST, any::<u16>(), 0..5),
    ) {
        let batch = Batch::new(&lengths, counter, fill);
        batch.check("mixed lengths");
        let forged: Vec<_> = forged
            .into_iter()
            .filter(|(place, _)| *place < lengths.len())
            .map(|(place, bit)| (place, usize::from(bit)))
            .collect();
        batch.check_forged(&forged);
    }
}
