//! Measures whether the time of a call depends on secrets, after dudect (Reparaz, Balasch and
//! Verbauwhede, 2017): two classes of input take turns at random, and Welch's t-test compares their
//! times. A |t| above 10 shows a difference; noise gives values below 5. Needs a quiet machine:
//!
//! `cargo test --release -p towline-aead --test timing -- --ignored --nocapture`

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report

use std::hint::black_box;
use std::time::Instant;

use towline_aead::internals::backends;
use towline_aead::{Backend, Key, Packet, TAG_BYTES};

/// Measurements of one comparison.
const ROUNDS: usize = 40_000;
/// |t| from which a comparison fails.
const LIMIT: f64 = 10.0;

/// Number and length of the packets of a batch.
#[derive(Clone, Copy)]
struct Shape {
    count: usize,
    /// Length in bytes.
    len: usize,
}

/// Two groups, the second of them partial; and short packets, which have a form of their own.
const SHAPES: [Shape; 2] = [Shape { count: 21, len: 300 }, Shape { count: 2, len: 160 }];

impl Shape {
    /// Returns the number of bytes of all packets with their tags.
    fn bytes(self) -> usize {
        self.count * (self.len + TAG_BYTES)
    }

    fn packets(self, counter: u64) -> Vec<Packet> {
        let packet = |i: usize| Packet {
            start: i * (self.len + TAG_BYTES),
            len: self.len,
            counter: counter + i as u64,
        };
        (0..self.count).map(packet).collect()
    }
}

/// Generator of random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.number().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Input of one call.
struct Input {
    shape: Shape,
    key: [u8; 32],
    counter: u64,
    arena: Vec<u8>,
}

impl Input {
    fn zeros(shape: Shape) -> Self {
        Self { shape, key: [0; 32], counter: 0, arena: vec![0; shape.bytes()] }
    }

    fn random(rng: &mut Random, shape: Shape) -> Self {
        let mut input = Self::zeros(shape);
        rng.fill(&mut input.key);
        rng.fill(&mut input.arena);
        // Far from the end of the counters.
        input.counter = rng.number() >> 1;
        input
    }

    /// Returns this input and leaves an empty one.
    fn take(&mut self) -> Self {
        Self { arena: std::mem::take(&mut self.arena), ..*self }
    }

    /// Returns this input with its packets sealed.
    fn sealed(mut self, backend: Backend) -> Self {
        let packets = self.shape.packets(self.counter);
        Key::new(&self.key, backend).seal(&mut self.arena, &packets).unwrap();
        self
    }

    /// Returns this input with one byte of each tag changed.
    fn forged(mut self, byte: usize) -> Self {
        for packet in self.arena.chunks_mut(self.shape.len + TAG_BYTES) {
            packet[self.shape.len + byte] ^= 0x55;
        }
        self
    }
}

/// Returns Welch's t of the times of a call with inputs of two classes.
fn t_value(
    rng: &mut Random,
    shape: Shape,
    mut make: impl FnMut(&mut Random, bool) -> Input,
    call: impl Fn(&Key, &mut [u8], &[Packet]),
    backend: Backend,
) -> f64 {
    let mut times: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    // One place for the inputs of both classes.
    let mut arena = vec![0; shape.bytes()];
    let mut slot = shape.packets(0);
    for _ in 0..ROUNDS {
        let class = rng.number() & 1 == 1;
        let input = make(rng, class);
        arena.copy_from_slice(&input.arena);
        slot.copy_from_slice(&shape.packets(input.counter));
        let key = Key::new(&input.key, backend);
        let start = Instant::now();
        call(black_box(&key), black_box(&mut arena), black_box(&slot));
        times[usize::from(class)].push(start.elapsed().as_nanos() as f64);
    }
    // Interrupts lengthen some calls of either class: the slowest fifth is left out.
    let mut all = times.concat();
    all.sort_by(f64::total_cmp);
    let limit = all[all.len() * 4 / 5];
    let [a, b] = times.map(|times| {
        let kept: Vec<f64> = times.into_iter().filter(|time| *time <= limit).collect();
        let count = kept.len() as f64;
        let mean = kept.iter().sum::<f64>() / count;
        let variance = kept.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / (count - 1.0);
        (mean, variance / count)
    });
    (a.0 - b.0) / (a.1 + b.1).sqrt()
}

#[test]
#[ignore = "measures time, which needs a quiet machine and a release build"]
fn the_time_of_a_call_does_not_depend_on_secrets() {
    let mut rng = Random(1);
    let seal = |key: &Key, arena: &mut [u8], packets: &[Packet]| {
        key.seal(arena, packets).unwrap();
    };
    let open = |key: &Key, arena: &mut [u8], packets: &[Packet]| {
        key.open(arena, packets, &mut Vec::with_capacity(packets.len())).unwrap();
    };
    let mut worst: f64 = 0.0;
    let cases = backends().into_iter().flat_map(|backend| SHAPES.map(|shape| (backend, shape)));
    for (backend, shape) in cases {
        // Both are made, so that the caches hold the same before each call, and no branch depends on
        // the class, so that the branch predictor does, too.
        let input = |rng: &mut Random, class: bool| {
            let [mut zeros, mut random] = [Input::zeros(shape), Input::random(rng, shape)];
            [&mut zeros, &mut random][usize::from(class)].take()
        };
        let sealed = |rng: &mut Random, class: bool| input(rng, class).sealed(backend);
        let forged = |rng: &mut Random, class: bool| {
            let byte = if class { 0 } else { TAG_BYTES - 1 };
            Input::random(rng, shape).sealed(backend).forged(byte)
        };
        let values = [
            ("seal", t_value(&mut rng, shape, input, seal, backend)),
            ("open", t_value(&mut rng, shape, sealed, open, backend)),
            ("open forged", t_value(&mut rng, shape, forged, open, backend)),
        ];
        let Shape { count, len } = shape;
        for (what, t) in values {
            println!("{:12} {count:2} x {len} {what:12} t = {t:6.2}", backend.name());
            if backend.is_batched() {
                worst = worst.max(t.abs());
            }
        }
    }
    assert!(worst < LIMIT, "a |t| of {worst:.1}: the time depends on the input");
}
