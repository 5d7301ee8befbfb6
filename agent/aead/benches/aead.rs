//! Nanoseconds per packet, every backend of this CPU: `cargo bench -p towline-aead`.
//!
//! Packets lie behind each other as in a send buffer, each after the 16 bytes of WireGuard's header.
//! Each figure is the fastest of many runs, so other load on the machine changes it little. The
//! first column of the result is ring's figure divided by the backend's.

#![expect(clippy::print_stdout, reason = "the result of the benchmark")]

use std::time::{Duration, Instant};

use towline_aead::internals::backends;
use towline_aead::{Key, Packet, TAG_BYTES};

/// Lengths of the packets: the smallest, a common middle, and a full segment.
const LENGTHS: [usize; 3] = [64, 576, 1_420];
/// Sizes of the batches: alone, small, one group, and one super-packet of 64 KiB.
const COUNTS: [usize; 6] = [1, 2, 4, 8, 16, 45];
/// Bytes before each packet.
const HEADER: usize = 16;
/// Time for each figure.
const WINDOW: Duration = Duration::from_millis(150);

/// Returns the fastest time of a call, in nanoseconds.
fn fastest(mut call: impl FnMut()) -> f64 {
    for _ in 0..20 {
        call();
    }
    let (start, mut fastest) = (Instant::now(), f64::MAX);
    while start.elapsed() < WINDOW {
        let run = Instant::now();
        for _ in 0..8 {
            call();
        }
        fastest = fastest.min(run.elapsed().as_nanos() as f64 / 8.0);
    }
    fastest
}

fn main() {
    println!("{:>6} {:>7}  {:12} {:>16} {:>16}", "bytes", "packets", "backend", "seal", "open");
    for len in LENGTHS {
        for count in COUNTS {
            let stride = HEADER + len + TAG_BYTES;
            let packets: Vec<Packet> = (0..count)
                .map(|i| Packet { start: i * stride + HEADER, len, counter: i as u64 })
                .collect();
            let mut figures = Vec::new();
            for backend in backends().into_iter().rev() {
                let key = Key::new(&[7; 32], backend);
                let mut arena = vec![1; count * stride];
                let seal = fastest(|| key.seal(&mut arena, &packets).expect("they fit"));
                arena.fill(1);
                key.seal(&mut arena, &packets).expect("they fit");
                let sealed = arena.clone();
                // What was opened is replaced by the sealed packets; that time does not count.
                let copy = fastest(|| arena.copy_from_slice(std::hint::black_box(&sealed)));
                let mut authentic = Vec::with_capacity(count);
                let open = fastest(|| {
                    arena.copy_from_slice(std::hint::black_box(&sealed));
                    key.open(&mut arena, &packets, &mut authentic).expect("they fit");
                });
                assert!(authentic.iter().all(|authentic| *authentic));
                figures.push((backend.name(), [seal, open - copy].map(|ns| ns / count as f64)));
            }
            let ring = figures[0].1;
            for (name, [seal, open]) in figures {
                let columns = [(seal, ring[0]), (open, ring[1])]
                    .map(|(ns, ring)| format!("{:.2} {ns:7.1} ns", ring / ns));
                println!("{len:6} {count:7}  {name:12} {:>16} {:>16}", columns[0], columns[1]);
            }
        }
    }
}
