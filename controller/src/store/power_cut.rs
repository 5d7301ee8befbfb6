//! A power cut at every moment of a commit. What was not synced is lost, as a whole, in part, or out of order.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use redb::{Database, StorageBackend};

use super::conformance::{put, texts};
use super::file::{self, FileStore};
use super::{Store, Write};

/// Number of bytes that a disk writes as a whole.
const BLOCK: usize = 512;

/// A disk that records what happens to it.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Recording>>);

/// Content of a disk, and everything that happened to it, in order.
#[derive(Debug, Default)]
struct Recording {
    bytes: Vec<u8>,
    events: Vec<Event>,
}

#[derive(Debug, Clone)]
enum Event {
    /// The file got this length.
    Length(usize),
    /// Bytes were written.
    Write { offset: usize, bytes: Vec<u8> },
    /// Everything before is on the disk.
    Sync,
    /// A commit returned: it must survive from now on.
    Acknowledged,
}

/// What became of the changes after the last sync.
#[derive(Debug, Clone, Copy)]
enum Fate {
    /// All are lost.
    Lost,
    /// All reached the disk.
    Kept,
    /// Those with an even or an odd number reached the disk.
    Every(usize),
    /// Only the last one reached the disk.
    OnlyLast,
    /// All but the last one reached the disk, and of that the first half.
    Torn,
}

const FATES: [Fate; 6] =
    [Fate::Lost, Fate::Kept, Fate::Every(0), Fate::Every(1), Fate::OnlyLast, Fate::Torn];

impl Disk {
    fn record(&self, event: Event) {
        let mut recording = self.0.lock();
        apply(&mut recording.bytes, &event);
        recording.events.push(event);
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap();
        let recording = self.0.lock();
        let bytes = recording.bytes.get(from..from + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.record(Event::Length(usize::try_from(len).unwrap()));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.record(Event::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).unwrap();
        self.record(Event::Write { offset, bytes: data.to_vec() });
        Ok(())
    }
}

fn apply(disk: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Length(length) => disk.resize(*length, 0),
        Event::Write { offset, bytes } => {
            let end = offset + bytes.len();
            if disk.len() < end {
                disk.resize(end, 0);
            }
            disk[*offset..end].copy_from_slice(bytes);
        }
        Event::Sync | Event::Acknowledged => {}
    }
}

/// Returns the disk after a power cut at the end of `events`.
fn after_cut(events: &[Event], fate: Fate) -> Vec<u8> {
    let synced = events.iter().rposition(|event| matches!(event, Event::Sync));
    let (synced, lost) = events.split_at(synced.map_or(0, |last| last + 1));
    let mut disk = Vec::new();
    synced.iter().for_each(|event| apply(&mut disk, event));
    for (number, event) in lost.iter().enumerate() {
        let is_last = number + 1 == lost.len();
        match (fate, event) {
            (Fate::Lost, _) => {}
            (Fate::Kept, event) => apply(&mut disk, event),
            (Fate::Every(rest), event) if number % 2 == rest => apply(&mut disk, event),
            (Fate::OnlyLast, event) if is_last => apply(&mut disk, event),
            (Fate::Torn, Event::Write { offset, bytes }) if is_last => {
                let half = bytes.len() / 2 / BLOCK * BLOCK;
                let bytes = bytes[..half].to_vec();
                apply(&mut disk, &Event::Write { offset: *offset, bytes });
            }
            (Fate::Torn, event) => apply(&mut disk, event),
            (Fate::Every(_) | Fate::OnlyLast, _) => {}
        }
    }
    disk
}

fn remove(key: &str) -> Write {
    (key.to_owned(), None)
}

#[test]
fn a_commit_survives_a_power_cut_from_its_answer_on_and_is_never_there_in_part() {
    let key = |number: usize| format!("node/{number:03}");
    let commits: [Vec<Write>; 5] = [
        vec![put("a", "1"), put("b", "1")],
        vec![put("b", "2"), remove("a")],
        (0..60).map(|number| put(&key(number), &"x".repeat(700))).collect(),
        (0..60).step_by(2).map(|number| remove(&key(number))).collect(),
        vec![put("a", "3"), put(&key(1), "changed")],
    ];
    let disk = Disk::default();
    let mut builder = Database::builder();
    builder.set_cache_size(file::CACHE_BYTES);
    let database = builder.create_with_backend(disk.clone()).unwrap();
    // What the store has after each commit.
    let (mut states, mut state) = (Vec::new(), BTreeMap::new());
    for (sequence, writes) in (0..).zip(&commits) {
        file::write(&database, sequence, writes).unwrap();
        disk.record(Event::Acknowledged);
        for (key, value) in writes {
            match value {
                Some(value) => state.insert(key.clone(), value.clone()),
                None => state.remove(key),
            };
        }
        let text = |(key, value): (&String, &Vec<u8>)| {
            format!("{key}={}", String::from_utf8(value.clone()).unwrap())
        };
        states.push(state.iter().map(text).collect::<Vec<String>>());
    }
    drop(database);
    let events = std::mem::take(&mut disk.0.lock().events);

    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("towline.redb");
    let is_acknowledged = |event: &&Event| matches!(event, Event::Acknowledged);
    // A store gets its name once it is complete.
    let complete = events.iter().position(|event| is_acknowledged(&event)).unwrap() + 1;
    let (mut cuts, mut unfinished) = (0, 0);
    for end in complete..=events.len() {
        let events = &events[..end];
        let acknowledged = events.iter().filter(is_acknowledged).count();
        let is_synced = !matches!(events.last(), Some(Event::Write { .. } | Event::Length(_)));
        // After a sync nothing can be lost, so one fate shows all.
        for fate in FATES.iter().take(if is_synced { 1 } else { FATES.len() }) {
            std::fs::write(&path, after_cut(events, *fate)).unwrap();
            let mut store = FileStore::open(&path)
                .unwrap_or_else(|error| panic!("cut {end}, {fate:?}: {error}"));
            let found = texts(&mut store);
            let sequence = usize::try_from(store.sequence()).unwrap();
            assert!(sequence >= acknowledged, "cut {end}, {fate:?}: commit {acknowledged} is lost");
            assert!(
                sequence <= acknowledged + 1,
                "cut {end}, {fate:?}: {sequence} is not asked for"
            );
            assert!(found == states[sequence - 1], "cut {end}, {fate:?}: commit in part");
            cuts += 1;
            unfinished += usize::from(sequence == acknowledged);
        }
    }
    assert!(cuts > 50, "only {cuts} power cuts");
    assert!(unfinished < cuts, "no commit was on the disk before its answer: nothing was cut");
}
