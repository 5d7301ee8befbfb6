//! Runs the fuzz targets under `cargo test`: on the committed corpus, on the well-formed seeds, and
//! on thousands of mutations of both, the same in each run.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report

use std::fs;
use std::panic::catch_unwind;
use std::path::PathBuf;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng, SeedableRng};
use towline_tests::fuzz::{TARGETS, Target};

/// Number of mutations for each target; `FUZZ_ROUNDS` overrides it. `FUZZ_TARGET` selects a single
/// target, `FUZZ_SEED` other mutations.
const ROUNDS: usize = 3_000;

#[test]
fn the_committed_corpus_harms_nobody() {
    for target in TARGETS {
        let corpus = corpus(target);
        assert!(!corpus.is_empty(), "no corpus for {}: run the test `write_corpus`", target.name);
        for (name, bytes) in corpus {
            try_one(target, &bytes, &name);
        }
    }
}

#[test]
fn thousands_of_mutations_harm_nobody() {
    let variable = |name| std::env::var(name).ok();
    let number = |name| variable(name).map(|text| text.parse::<u64>().unwrap());
    let (rounds, seed) = (number("FUZZ_ROUNDS"), number("FUZZ_SEED"));
    let only = variable("FUZZ_TARGET");
    for target in TARGETS.iter().filter(|target| only.as_ref().is_none_or(|o| o == target.name)) {
        let mut inputs = (target.seeds)();
        inputs.extend(corpus(target).into_iter().map(|(_, bytes)| bytes));
        let mut rng = StdRng::seed_from_u64(seed.unwrap_or(1));
        for round in 0..rounds.unwrap_or(ROUNDS as u64) {
            let bytes = mutated(&mut rng, &inputs);
            try_one(target, &bytes, &format!("round {round}"));
        }
    }
}

#[test]
#[ignore = "writes the seeds into tests/fuzz/corpus"]
fn write_corpus() {
    for target in TARGETS {
        fs::create_dir_all(dir(target)).unwrap();
        for (number, bytes) in (target.seeds)().into_iter().enumerate() {
            fs::write(dir(target).join(format!("seed-{number}")), bytes).unwrap();
        }
    }
}

fn try_one(target: &Target, bytes: &[u8], what: &str) {
    if catch_unwind(|| (target.run)(bytes)).is_err() {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        panic!("{} fails on {what}: {hex}", target.name);
    }
}

fn mutated(rng: &mut StdRng, inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = inputs.choose(rng).unwrap().clone();
    for _ in 0..rng.random_range(1..=6) {
        let at = rng.random_range(0..=bytes.len());
        match rng.random_range(0..7) {
            0 if at < bytes.len() => bytes[at] = rng.random(),
            1 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            2 if at < bytes.len() => bytes[at] = *[0, 1, 0x7f, 0x80, 0xff].choose(rng).unwrap(),
            3 => bytes.truncate(at),
            4 => bytes.insert(at, rng.random()),
            5 => {
                let end = (at + rng.random_range(0..8)).min(bytes.len());
                bytes.drain(at..end);
            }
            _ => {
                let other = inputs.choose(rng).unwrap();
                let from = rng.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes
}

fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(dir(target)) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.display().to_string(), fs::read(path).unwrap())).collect()
}

fn dir(target: &Target) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name)
}
