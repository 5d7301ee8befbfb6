//! The keys of a mesh in etcd, and how a commit becomes transactions of etcd. No I/O.
//!
//! | key, below the prefix | value |
//! |---|---|
//! | `head` | format, sequence number, mesh, CA, the newest commits, and a staged change if there is one |
//! | `owner` | name of the controller that uses the store, or whose turn it is to write, under its lease |
//! | `presence/CONTROLLER/PART` | nodes that are connected to a controller, under its lease |
//! | `signals/CONTROLLER/ID` | signals to nodes of a controller, under the lease of the sender |
//! | `records/KEY` | one record |
//! | `staged/ID/PART` | a part of a change that is too large for one transaction |
//!
//! Every transaction compares the revision of `head`, and every commit writes it. So the whole
//! store is compared and set.
//!
//! etcd limits a transaction to 128 operations and 1.5 MiB. A larger change is written in parts under
//! `staged/` first, which nobody reads yet. Then one transaction names it in the head: with that it is
//! committed. Its writes are then copied to `records/`, and one more transaction removes the name and
//! the parts. A reader that finds a name in the head adds the staged writes to the records. After a
//! crash the next controller copies them.

use bytes::Bytes;
use prost::Message;

use super::errors::EtcdError;
use super::wire::RequestOp;
use crate::store::{FORMAT, OLDEST_FORMAT, Record, Write};

/// Largest number of records in one transaction. etcd allows 128 operations; the head and the staged
/// parts are among them.
const OPERATIONS: usize = 120;
/// Largest size of the records in one transaction or one staged part, in bytes. etcd allows 1.5 MiB for a
/// request.
const BYTES: usize = 1024 * 1024;
/// Largest number of parts of a staged change. Each is compared when the change is committed.
const PARTS: usize = 64;
/// Number of commits that the head remembers. A controller recognizes its own commit among them, if it
/// did not get the answer.
const RECENT: usize = 16;
/// Size of a record in a request beyond its key and its value, in bytes: tags and lengths.
const OVERHEAD: usize = 32;

/// Names of the keys.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: String,
}

/// Value of the key `head`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Head {
    /// Version of the format of the records.
    #[prost(uint64, tag = "1")]
    pub(super) format: u64,
    /// Sequence number of the last commit.
    #[prost(uint64, tag = "2")]
    pub(super) sequence: u64,
    /// Id of the mesh.
    #[prost(string, tag = "3")]
    pub(super) mesh: String,
    /// Fingerprint of the CA.
    #[prost(string, tag = "4")]
    pub(super) ca: String,
    /// Random ids of the newest writes of the head, the newest last.
    #[prost(fixed64, repeated, tag = "5")]
    recent: Vec<u64>,
    /// Change that is committed but not yet copied to the records.
    #[prost(message, optional, tag = "6")]
    pub(super) staged: Option<Staged>,
}

/// Name of a staged change.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Staged {
    /// Random id.
    #[prost(fixed64, tag = "1")]
    pub(super) id: u64,
    /// Number of parts.
    #[prost(uint32, tag = "2")]
    pub(super) parts: u32,
}

/// Part of a staged change.
#[derive(Clone, PartialEq, Message)]
struct StagedPart {
    #[prost(message, repeated, tag = "1")]
    writes: Vec<StagedWrite>,
}

/// Write of a staged change.
#[derive(Clone, PartialEq, Message)]
struct StagedWrite {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
    /// True if the record is removed.
    #[prost(bool, tag = "3")]
    removed: bool,
}

/// How a commit is written.
#[derive(Debug)]
pub(super) enum Plan {
    /// Operations of one transaction.
    Direct(Vec<RequestOp>),
    /// Encoded parts, which are staged first.
    Staged(Vec<Bytes>),
}

/// What became of a commit whose answer was lost or that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is the newest one.
    Newest,
    /// It is in the store, and others came after it; or the head does not remember that far.
    Unclear,
    /// It is not in the store, and cannot come into it any more.
    Refused,
}

impl Keys {
    /// Returns the names below a prefix that ends with a slash.
    pub(super) fn new(prefix: String) -> Self {
        Self { prefix }
    }

    /// Returns the key of the head.
    pub(super) fn head(&self) -> Bytes {
        self.key("head")
    }

    /// Returns the key of the owner.
    pub(super) fn owner(&self) -> Bytes {
        self.key("owner")
    }

    /// Returns the range of all records: its first possible key, and its end.
    pub(super) fn records(&self) -> (Bytes, Bytes) {
        (self.key("records/"), self.key("records0"))
    }

    /// Returns the range of all staged parts.
    pub(super) fn all_staged(&self) -> (Bytes, Bytes) {
        (self.key("staged/"), self.key("staged0"))
    }

    /// Returns the range of the parts of one staged change.
    pub(super) fn staged(&self, id: u64) -> (Bytes, Bytes) {
        (self.key(&format!("staged/{id:016x}/")), self.key(&format!("staged/{id:016x}0")))
    }

    /// Returns the key of a part of a staged change.
    pub(super) fn part(&self, id: u64, part: u32) -> Bytes {
        self.key(&format!("staged/{id:016x}/{part:04}"))
    }

    /// Returns the key of a part of what a controller says about presence.
    pub(super) fn presence(&self, controller: u64, part: u8) -> Bytes {
        self.key(&format!("presence/{controller:016x}/{part:02x}"))
    }

    /// Returns the range of the presence at all controllers.
    pub(super) fn all_presence(&self) -> (Bytes, Bytes) {
        (self.key("presence/"), self.key("presence0"))
    }

    /// Returns the controller and the part in a key of presence; `None` if the key is none.
    pub(super) fn presence_of(&self, key: &[u8]) -> Option<(u64, u8)> {
        let key = std::str::from_utf8(key).ok()?;
        let name = key.strip_prefix(self.prefix.as_str())?.strip_prefix("presence/")?;
        let (controller, part) = name.split_once('/')?;
        let parsed =
            (u64::from_str_radix(controller, 16).ok()?, u8::from_str_radix(part, 16).ok()?);
        (self.presence(parsed.0, parsed.1) == key.as_bytes()).then_some(parsed)
    }

    /// Returns the key of a signal to a node of a controller.
    pub(super) fn signal(&self, controller: u64, id: u64) -> Bytes {
        self.key(&format!("signals/{controller:016x}/{id:016x}"))
    }

    /// Returns the range of the signals to nodes of a controller.
    pub(super) fn signals(&self, controller: u64) -> (Bytes, Bytes) {
        (
            self.key(&format!("signals/{controller:016x}/")),
            self.key(&format!("signals/{controller:016x}0")),
        )
    }

    /// Returns the record in a key and a value of etcd; `None` if the key is not one of a record.
    pub(super) fn record(&self, key: &[u8], value: &[u8]) -> Option<Record> {
        let key = std::str::from_utf8(key).ok()?;
        let name = key.strip_prefix(self.prefix.as_str())?.strip_prefix("records/")?;
        Some((name.to_owned(), value.to_vec()))
    }

    /// Returns the operation of a write.
    pub(super) fn write(&self, (key, value): &Write) -> RequestOp {
        let key = self.key(&format!("records/{key}"));
        match value {
            Some(value) => RequestOp::put(key, Bytes::copy_from_slice(value), 0),
            None => RequestOp::delete(key, Bytes::new()),
        }
    }

    fn key(&self, name: &str) -> Bytes {
        format!("{}{name}", self.prefix).into()
    }
}

impl Head {
    /// Returns the head of a store without a commit.
    pub(super) fn new(mesh: String, ca: String) -> Self {
        Self { format: FORMAT, sequence: 0, mesh, ca, recent: Vec::new(), staged: None }
    }

    /// Decodes a head. `store` is only used in errors.
    pub(super) fn read(bytes: &[u8], store: &str) -> Result<Self, EtcdError> {
        let damaged = |why: &str| EtcdError::Damaged {
            store: store.to_owned(),
            key: "head".to_owned(),
            why: why.to_owned(),
        };
        let head = Self::decode(bytes).map_err(|_| damaged("is malformed"))?;
        if !(OLDEST_FORMAT..=FORMAT).contains(&head.format) {
            let store = store.to_owned();
            return Err(EtcdError::Format { store, found: head.format, known: FORMAT });
        }
        if head.recent.len() > RECENT {
            return Err(damaged("lists too many commits"));
        }
        if head.staged.is_some_and(|staged| staged.parts as usize > PARTS) {
            return Err(damaged("names too many parts"));
        }
        Ok(head)
    }

    /// Returns the head after the commit `id`, which may be staged.
    pub(super) fn after(&self, id: u64, staged: Option<Staged>) -> Self {
        let mut next = self.clone();
        next.format = FORMAT;
        next.sequence += 1;
        next.staged = staged;
        next.remember(id);
        next
    }

    /// Returns the head after the staged change was copied to the records, by the write `id`.
    pub(super) fn settled(&self, id: u64) -> Self {
        let mut next = self.clone();
        next.staged = None;
        next.remember(id);
        next
    }

    /// Returns what became of the write `id`, which was computed from `before`, when this is the head of
    /// the store now.
    pub(super) fn fate(&self, id: u64, before: &Self) -> Fate {
        if self.recent.last() == Some(&id) {
            return Fate::Newest;
        }
        // All that was written since is remembered if the last write before is, too.
        let remembers = match before.recent.last() {
            Some(last) => self.recent.contains(last),
            None => self.recent.len() < RECENT,
        };
        if self.recent.contains(&id) || !remembers { Fate::Unclear } else { Fate::Refused }
    }

    fn remember(&mut self, id: u64) {
        if self.recent.len() >= RECENT {
            self.recent.drain(..=self.recent.len() - RECENT);
        }
        self.recent.push(id);
    }
}

/// Returns how a commit is written.
pub(super) fn plan(keys: &Keys, writes: &[Write]) -> Result<Plan, EtcdError> {
    let writes = &last_of_each_key(writes);
    let batches = batches(keys, writes)?;
    if batches.len() <= 1 {
        return Ok(Plan::Direct(batches.into_iter().flatten().collect()));
    }
    let parts = chunks(keys, writes, usize::MAX)?;
    if parts.len() > PARTS {
        return Err(EtcdError::TooLarge {
            what: "a change".to_owned(),
            bytes: writes.iter().map(|write| size(keys, write)).sum(),
            most: PARTS * BYTES,
        });
    }
    Ok(Plan::Staged(parts.into_iter().map(encode_part).collect()))
}

/// Returns the operations of the writes, in batches that each fit in a transaction.
pub(super) fn batches(keys: &Keys, writes: &[Write]) -> Result<Vec<Vec<RequestOp>>, EtcdError> {
    let chunks = chunks(keys, writes, OPERATIONS)?.into_iter();
    Ok(chunks.map(|chunk| chunk.iter().map(|write| keys.write(write)).collect()).collect())
}

/// Decodes a staged part. `None` if it is malformed.
pub(super) fn decode_part(bytes: &[u8]) -> Option<Vec<Write>> {
    let part = StagedPart::decode(bytes).ok()?;
    let write = |StagedWrite { key, value, removed }| (key, (!removed).then(|| value.to_vec()));
    Some(part.writes.into_iter().map(write).collect())
}

/// Decodes a head and encodes it again, for fuzzing. `None` if it is malformed.
pub(crate) fn recode_head(bytes: &[u8]) -> Option<Vec<u8>> {
    Some(Head::read(bytes, "").ok()?.encode_to_vec())
}

/// Parses a key of presence and encodes it again, for fuzzing. `None` if it is malformed.
pub(crate) fn recode_presence(bytes: &[u8]) -> Option<Vec<u8>> {
    let keys = Keys::new("/towline/".to_owned());
    let (controller, part) = keys.presence_of(bytes)?;
    Some(keys.presence(controller, part).to_vec())
}

/// Decodes a staged part and encodes it again, for fuzzing. `None` if it is malformed.
pub(crate) fn recode_part(bytes: &[u8]) -> Option<Vec<u8>> {
    Some(encode_part(&decode_part(bytes)?).to_vec())
}

fn encode_part(writes: &[Write]) -> Bytes {
    let write = |(key, value): &Write| StagedWrite {
        key: key.clone(),
        value: value.as_deref().map(Bytes::copy_from_slice).unwrap_or_default(),
        removed: value.is_none(),
    };
    StagedPart { writes: writes.iter().map(write).collect() }.encode_to_vec().into()
}

/// Returns the writes with the last one of each key, in order of the keys. etcd refuses a transaction that
/// writes a key twice.
fn last_of_each_key(writes: &[Write]) -> Vec<Write> {
    let last: std::collections::BTreeMap<_, _> =
        writes.iter().map(|(key, value)| (key, value)).collect();
    last.into_iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Returns the writes in slices of at most `most` writes and [`BYTES`] bytes.
fn chunks<'a>(
    keys: &Keys,
    writes: &'a [Write],
    most: usize,
) -> Result<Vec<&'a [Write]>, EtcdError> {
    let mut chunks = Vec::new();
    let (mut begin, mut bytes) = (0, 0);
    for (place, write) in writes.iter().enumerate() {
        let size = size(keys, write);
        if size > BYTES {
            let what = format!("the record `{}`", write.0);
            return Err(EtcdError::TooLarge { what, bytes: size, most: BYTES });
        }
        if place > begin && (place - begin >= most || bytes + size > BYTES) {
            chunks.push(&writes[begin..place]);
            (begin, bytes) = (place, 0);
        }
        bytes += size;
    }
    if begin < writes.len() {
        chunks.push(&writes[begin..]);
    }
    Ok(chunks)
}

fn size(keys: &Keys, (key, value): &Write) -> usize {
    keys.prefix.len() + key.len() + value.as_ref().map_or(0, Vec::len) + OVERHEAD
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys() -> Keys {
        Keys::new("/towline/".to_owned())
    }

    fn put(key: &str, size: usize) -> Write {
        (key.to_owned(), Some(vec![7; size]))
    }

    fn parts(plan: Plan) -> Vec<Bytes> {
        match plan {
            Plan::Staged(parts) => parts,
            Plan::Direct(operations) => panic!("{} operations in one", operations.len()),
        }
    }

    #[test]
    fn a_small_change_is_one_transaction() {
        let writes: Vec<Write> = (0..OPERATIONS).map(|n| put(&format!("k{n}"), 100)).collect();
        let Plan::Direct(operations) = plan(&keys(), &writes).unwrap() else { panic!("staged") };
        assert_eq!(operations.len(), OPERATIONS);
        let Plan::Direct(none) = plan(&keys(), &[]).unwrap() else { panic!("staged") };
        assert!(none.is_empty());
        let twice = [put("a", 1), ("a".to_owned(), None)];
        let Plan::Direct(once) = plan(&keys(), &twice).unwrap() else { panic!("staged") };
        assert_eq!(once, [RequestOp::delete("/towline/records/a".into(), Bytes::new())]);
    }

    #[test]
    fn many_records_and_large_ones_are_staged_in_few_parts() {
        let many: Vec<Write> = (0..500).map(|n| put(&format!("k{n:03}"), 100)).collect();
        assert_eq!(parts(plan(&keys(), &many).unwrap()).len(), 1);
        let large: Vec<Write> = (0..3).map(|n| put(&format!("k{n}"), BYTES - 100)).collect();
        assert_eq!(parts(plan(&keys(), &large).unwrap()).len(), 3);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let error = plan(&keys(), &[put("seen", BYTES)]).unwrap_err().to_string();
        assert!(error.contains("the record `seen`"), "{error}");
        let huge: Vec<Write> = (0..=PARTS).map(|n| put(&format!("k{n}"), BYTES - 100)).collect();
        assert!(matches!(plan(&keys(), &huge), Err(EtcdError::TooLarge { .. })));
    }

    #[test]
    fn records_are_found_by_their_keys_alone() {
        let keys = keys();
        let found = keys.record(b"/towline/records/node/1", b"v").unwrap();
        assert_eq!(found, ("node/1".to_owned(), b"v".to_vec()));
        for other in [&b"/towline/head"[..], b"/other/records/a", b"/towline/records/\xff"] {
            assert_eq!(keys.record(other, b""), None);
        }
        let (first, end) = keys.records();
        assert!(first < end && Bytes::from_static(b"/towline/records/zz") < end);
    }

    #[test]
    fn a_key_of_presence_names_its_controller_and_part() {
        let keys = keys();
        let key = keys.presence(0xab, 7);
        assert_eq!(keys.presence_of(&key), Some((0xab, 7)));
        let (first, end) = keys.all_presence();
        assert!(first < key && key < end);
        let (first, end) = keys.signals(0xab);
        assert!(first < keys.signal(0xab, u64::MAX) && keys.signal(0xab, u64::MAX) < end);
        for other in ["/towline/presence/ab/07", "/towline/presence/x/07", "/towline/head"] {
            assert_eq!(keys.presence_of(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn a_commit_whose_answer_was_lost_is_recognized() {
        let before = Head::new("m".to_owned(), "c".to_owned()).after(1, None);
        let ours = before.after(2, None);
        assert_eq!(ours.fate(2, &before), Fate::Newest);
        assert_eq!(ours.after(3, None).fate(2, &before), Fate::Unclear, "others came after it");
        assert_eq!(before.after(3, None).fate(2, &before), Fate::Refused);
        assert_eq!(before.fate(2, &before), Fate::Refused);
        let mut late = before.after(3, None);
        (4..30).for_each(|id| late = late.after(id, None));
        assert_eq!(late.recent.len(), RECENT);
        assert_eq!(late.fate(2, &before), Fate::Unclear, "it is forgotten");
        let new = Head::new("m".to_owned(), "c".to_owned());
        assert_eq!(new.after(5, None).fate(2, &new), Fate::Refused);
    }

    #[test]
    fn a_head_keeps_its_bounds() {
        let head = Head::new("m".to_owned(), "c".to_owned());
        let staged = head.after(1, Some(Staged { id: 9, parts: 3 }));
        assert_eq!((staged.sequence, staged.settled(2).sequence), (1, 1));
        assert_eq!(Head::read(&staged.encode_to_vec(), "s").unwrap(), staged);
        let newer = Head { format: FORMAT + 1, ..head.clone() };
        let error = Head::read(&newer.encode_to_vec(), "s").unwrap_err();
        assert!(matches!(error, EtcdError::Format { .. }), "{error}");
        let wide = Head { staged: Some(Staged { id: 1, parts: 65 }), ..head.clone() };
        let long = Head { recent: vec![1; RECENT + 1], ..head };
        for head in [wide.encode_to_vec(), long.encode_to_vec(), vec![0xff]] {
            let error = Head::read(&head, "s").unwrap_err();
            assert!(matches!(error, EtcdError::Damaged { .. }), "{error}");
        }
    }

    proptest! {
        #[test]
        fn every_write_is_in_exactly_one_batch_within_the_limits(
            sizes in prop::collection::vec(0_usize..40_000, 0..400),
        ) {
            let writes: Vec<Write> =
                sizes.iter().enumerate().map(|(n, size)| put(&format!("k{n:04}"), *size)).collect();
            let batches = batches(&keys(), &writes).unwrap();
            let all: Vec<RequestOp> = batches.iter().flatten().cloned().collect();
            let expected: Vec<RequestOp> = writes.iter().map(|write| keys().write(write)).collect();
            prop_assert_eq!(all, expected);
            for batch in &batches {
                prop_assert!(!batch.is_empty() && batch.len() <= OPERATIONS);
                let bytes: usize = batch.iter().map(Message::encoded_len).sum();
                prop_assert!(bytes <= BYTES);
            }
            if let Plan::Staged(parts) = plan(&keys(), &writes).unwrap() {
                let staged = parts.iter().flat_map(|part| decode_part(part).unwrap());
                prop_assert_eq!(staged.collect::<Vec<_>>(), writes);
                prop_assert!(parts.iter().all(|part| part.len() <= BYTES));
            }
        }
    }
}
