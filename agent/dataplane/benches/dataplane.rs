//! Cost of the parts of the packet path for one batch: `cargo bench -p towline-dataplane`.
//!
//! Each benchmark works on the segments of one super-packet of 64 KiB: 45 segments of 1,408 bytes.

use std::net::{IpAddr, SocketAddr};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use towline_core::path::Path;
use towline_dataplane::arena::{HEADROOM, SendBatch, TAILROOM, WriteBatch};
use towline_dataplane::coalesce::{Coalesce, Coalescer};
use towline_dataplane::headers::IpHeader;
use towline_dataplane::split::Split;
use towline_dataplane::table::Routes;
use towline_dataplane::vnet::VnetHeader;
use towline_wireguard::internals::{World, pair_of};
use towline_wireguard::{
    Aead, Buffers, DATA_HEADER, DATA_OVERHEAD, Engine, EngineChoice, Message, Scratch, Segments,
};

mod fixtures;

use fixtures::{HEADERS, PAYLOAD, SEGMENTS};

/// Length of a segment with its headers in bytes.
const SEGMENT: usize = HEADERS + PAYLOAD;

/// Returns the super-packet in a buffer that can be split, its length and its virtio header.
fn super_packet() -> (Vec<u8>, usize, VnetHeader) {
    let (packet, header) = fixtures::super_packet();
    let mut buffer = vec![0; HEADROOM + packet.len() + TAILROOM];
    buffer[HEADROOM..HEADROOM + packet.len()].copy_from_slice(&packet);
    (buffer, packet.len(), header)
}

/// Returns the segments of the super-packet, in order.
fn segments() -> Vec<Vec<u8>> {
    let (mut buffer, len, header) = super_packet();
    let mut split = Split::new(&mut buffer, len, &header, SEGMENT).expect("it can be split");
    let mut segments = Vec::new();
    while split.next_len().is_some() {
        segments.push(split.take().to_vec());
    }
    segments
}

/// Payloads that are split already.
struct Ready<'a>(std::slice::Iter<'a, Vec<u8>>);

impl Segments for Ready<'_> {
    fn next_len(&self) -> Option<usize> {
        self.0.as_slice().first().map(Vec::len)
    }

    fn take(&mut self) -> &[u8] {
        self.0.next().map_or(&[], Vec::as_slice)
    }
}

fn dataplane(c: &mut Criterion) {
    let to = Path::from(SocketAddr::from(([192, 0, 2, 1], 51830))).into();
    let mut group = c.benchmark_group("train");
    group.throughput(Throughput::Elements(SEGMENTS as u64));

    let (buffer, len, header) = super_packet();
    group.bench_function("split", |bench| {
        bench.iter_batched_ref(
            || buffer.clone(),
            |buffer| {
                let mut split = Split::new(buffer, len, &header, SEGMENT).expect("splittable");
                while split.next_len().is_some() {
                    std::hint::black_box(split.take());
                }
            },
            BatchSize::LargeInput,
        );
    });

    let segments = segments();
    let segment_size = SEGMENT + DATA_OVERHEAD;
    let mut batch = WriteBatch::new(2);
    let places: Vec<(usize, IpHeader)> = segments
        .iter()
        .enumerate()
        .map(|(number, segment)| {
            let at = number * segment_size + DATA_HEADER;
            batch.bytes_mut()[at..at + SEGMENT].copy_from_slice(segment);
            (at, IpHeader::parse(segment).expect("a packet"))
        })
        .collect();
    let pristine = batch.bytes()[..SEGMENTS * segment_size].to_vec();
    let mut coalescer = Coalescer::new(Coalesce { tcp: true, udp: true, ..Coalesce::default() });
    group.bench_function("coalesce", |bench| {
        bench.iter(|| {
            batch.clear();
            // The previous iteration rewrote the header of the first segment.
            batch.bytes_mut()[..segment_size].copy_from_slice(&pristine[..segment_size]);
            for (at, inner) in &places {
                coalescer.add(&mut batch, *at, inner);
            }
            coalescer.finish(&mut batch);
            assert_eq!(batch.frames().len(), 1);
        });
    });

    for engine in [Engine::BORINGTUN, Engine::select(EngineChoice::Batch, Aead::Auto)] {
        let name = |what: &str| format!("{what}/{}/{}", engine.name(), engine.aead());
        let mut world = World::new(1);
        let [mut a, mut b] = pair_of([engine; 2], &mut world);
        let now = world.now;
        let mut out = SendBatch::new(1 << 17, 8);
        group.bench_function(name("seal"), |bench| {
            bench.iter(|| {
                out.clear();
                a.seal(now, &mut Ready(segments.iter()), &mut out.to(&to));
                out.seal()
            });
        });

        let mut plain = vec![0; SEGMENTS * segment_size];
        let mut scratch = Scratch::default();
        group.bench_function(name("open"), |bench| {
            bench.iter_batched_ref(
                || {
                    out.clear();
                    a.seal(now, &mut Ready(segments.iter()), &mut out.to(&to));
                    out.seal();
                    out.bytes()[..SEGMENTS * segment_size].to_vec()
                },
                |sealed| {
                    let mut opened = 0;
                    let messages = (0..SEGMENTS)
                        .map(|number| Message { start: number * segment_size, len: segment_size });
                    let (plain, scratch) = (&mut plain[..], &mut scratch);
                    b.open(now, messages, Buffers { sealed, plain, scratch }, |_, _| opened += 1);
                    assert_eq!(opened, SEGMENTS);
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();

    let mut group = c.benchmark_group("lookup");
    for nodes in [1u32, 1_000] {
        let mut routes = Routes::default();
        for node in 0..nodes {
            let [.., high, low] = node.to_be_bytes();
            let prefixes = [format!("198.19.{high}.{low}/32"), format!("10.{high}.{low}.0/24")];
            for prefix in prefixes {
                routes.insert(prefix.parse().expect("a prefix"), node);
            }
        }
        for (name, address) in [("host", [198, 19, 0, 0]), ("network", [10, 0, 0, 9])] {
            let address = IpAddr::from(address);
            assert_eq!(routes.longest(address), Some(0));
            group.bench_function(format!("{name}/{nodes}"), |bench| {
                bench.iter(|| routes.longest(std::hint::black_box(address)));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, dataplane);
criterion_main!(benches);
