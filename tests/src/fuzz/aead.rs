//! Batches of packets that are sealed and opened.

use towline_aead::internals::backends;
use towline_aead::{Aead, Backend, Key, Packet, TAG_BYTES};

/// Bytes of the arena.
const ARENA: usize = 16 * 1024;
/// Largest batch: more than four groups of a backend.
const PACKETS: usize = 70;

/// Takes the first bytes of the input as a number; 0 beyond its end.
fn number<const N: usize>(bytes: &mut &[u8]) -> u64 {
    let (first, rest) = bytes.split_at(N.min(bytes.len()));
    *bytes = rest;
    first.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Seals and opens a batch with every backend of this CPU: the key and the first counter, the number
/// of packets, for each the length and the distance to the packet before it (which may be negative),
/// then the bits that are changed before the packets are opened.
///
/// Every backend does what ring does: it refuses the same batches, seals to the same bytes, and opens
/// the same packets. It changes no byte outside of the packets.
pub fn aead(bytes: &[u8]) {
    let mut input = bytes;
    let key: [u8; 32] = std::array::from_fn(|_| number::<1>(&mut input) as u8);
    let first = number::<8>(&mut input);
    let count = number::<1>(&mut input) as usize % (PACKETS + 1);
    let mut end = 0usize;
    let packets: Vec<Packet> = (0..count as u64)
        .map(|i| {
            let (len, distance) = (number::<2>(&mut input), number::<1>(&mut input) as i8);
            let start = end.wrapping_add_signed(distance.into());
            let len = (len & 0x0fff) as usize;
            end = start.wrapping_add(len + TAG_BYTES);
            Packet { start, len, counter: first.wrapping_add(i) }
        })
        .collect();
    let plain: Vec<u8> = (0..ARENA).map(|i| (i ^ i >> 8) as u8).collect();

    let ring = Key::new(&key, Backend::select(Aead::Ring));
    let mut sealed = plain.clone();
    let result = ring.seal(&mut sealed, &packets);
    let mut forged = sealed.clone();
    while !input.is_empty() {
        let bit = number::<3>(&mut input) as usize;
        forged[bit / 8 % ARENA] ^= 1 << (bit % 8);
    }
    let (mut expected, mut authentic) = (forged.clone(), Vec::new());
    assert_eq!(ring.open(&mut expected, &packets, &mut authentic), result);

    for backend in backends() {
        let (key, name) = (Key::new(&key, backend), backend.name());
        let mut arena = plain.clone();
        assert_eq!(key.seal(&mut arena, &packets), result, "{name}");
        assert!(arena == sealed, "{name} seals differently");
        let (mut arena, mut opened) = (forged.clone(), Vec::new());
        assert_eq!(key.open(&mut arena, &packets, &mut opened), result, "{name}");
        assert_eq!(opened, authentic, "{name}");
        // ring clears the packets that are not authentic, the others leave them.
        for (packet, _) in packets.iter().zip(&authentic).filter(|(_, authentic)| !**authentic) {
            let range = packet.start..packet.start + packet.len;
            let kept = if backend.is_batched() {
                &forged[range.clone()]
            } else {
                &expected[range.clone()]
            };
            assert_eq!(&arena[range.clone()], kept, "{name}");
            arena[range.clone()].copy_from_slice(&expected[range]);
        }
        assert!(arena == expected, "{name} opens differently");
    }
}

/// Returns a full group and a bit more of mixed lengths, one packet of every backend's largest pass,
/// and a batch whose packets overlap.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let batch = |lengths: &[u16], distance: i8, forged: &[[u8; 3]]| {
        let mut bytes = vec![7; 40];
        bytes.push(lengths.len() as u8);
        for len in lengths {
            bytes.extend(len.to_le_bytes());
            bytes.push(distance as u8);
        }
        bytes.extend(forged.concat());
        bytes
    };
    let mixed: Vec<u16> = (0..19).map(|i| i * 37).collect();
    vec![
        batch(&mixed, 16, &[[0, 1, 0], [0, 9, 0]]),
        batch(&[1_420], 16, &[]),
        batch(&[64; 64], 16, &[[0, 4, 0]]),
        batch(&[100, 100], -1, &[]),
    ]
}
