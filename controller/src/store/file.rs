//! The store of one controller: one redb file.
//!
//! - [`Store::commit`] returns after the data is on the disk (fsync).
//! - If the process is killed at any moment, the file has the state of the last commit.
//! - A truncated or altered file is an error, never an empty store: opening never creates a store,
//!   the checksum of every page is verified, and a file that fails is not changed.

use std::io;
use std::path::{Path, PathBuf};

use towline_service::file;

use super::{CommitError, FORMAT, OLDEST_FORMAT, OpenError, Record, Store, Write};

use redb::backends::InMemoryBackend;
use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};

/// Table of the records: key to sequence number of the commit that wrote it, and value.
const RECORDS: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("records");
/// Table of two numbers: `sequence` and `format`.
const HEAD: TableDefinition<'_, &str, u64> = TableDefinition::new("head");
/// Size of redb's cache, in bytes. It is small because all records are read once at the start and
/// kept in memory.
pub(super) const CACHE_BYTES: usize = 4 * 1024 * 1024;

/// An open store file.
pub struct FileStore {
    path: PathBuf,
    /// Open database; `None` after a failed commit, until [`Store::reopen`].
    database: Option<Database>,
    /// Sequence number of the last commit.
    sequence: u64,
    #[cfg(test)]
    failing: std::cell::Cell<u32>,
}

impl FileStore {
    /// Creates a store with `records`. The file appears complete or not at all. A file that exists is
    /// not replaced.
    pub fn create(path: &Path, records: &[Write]) -> Result<Self, OpenError> {
        let failed = |why: String| OpenError::Io { path: path.to_owned(), why };
        let temporary = file::beside(path);
        // A crash may have left it behind.
        file::remove(&temporary).map_err(|error| failed(error.to_string()))?;
        let created = fill(&temporary, records)
            .and_then(|()| publish(&temporary, path).map_err(|error| error.to_string()));
        if created.is_err() {
            // The first error is the one to tell.
            let _ = file::remove(&temporary);
        }
        created.map_err(failed)?;
        file::sync_parent(path).map_err(|error| failed(error.to_string()))?;
        Self::open(path)
    }

    /// Opens an existing store and verifies it.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let mut store = Self {
            path: path.to_owned(),
            database: None,
            sequence: 0,
            #[cfg(test)]
            failing: std::cell::Cell::default(),
        };
        store.reopen()?;
        Ok(store)
    }

    /// Opens a copy in memory first. redb repairs a file while it opens it, even if the repair
    /// fails in the end, and the operator would be left with less data than before.
    fn rehearse(&self) -> Result<(), redb::DatabaseError> {
        let storage_error = |error| redb::DatabaseError::Storage(redb::StorageError::Io(error));
        let bytes = std::fs::read(&self.path).map_err(storage_error)?;
        let copy = InMemoryBackend::new();
        copy.set_len(bytes.len() as u64).map_err(storage_error)?;
        copy.write(0, &bytes).map_err(storage_error)?;
        drop(bytes);
        Database::builder()
            .set_cache_size(CACHE_BYTES)
            .set_check_integrity_on_open(true)
            .create_with_backend(copy)
            .map(drop)
    }

    fn open_error(&self, error: &redb::DatabaseError) -> OpenError {
        use redb::{DatabaseError, StorageError};
        let path = self.path.clone();
        match error {
            DatabaseError::DatabaseAlreadyOpen => OpenError::Locked(path),
            // redb reports a file that is too short or is not a redb file as an I/O error of
            // these kinds, the last one for the copy in memory.
            DatabaseError::Storage(StorageError::Io(io))
                if !matches!(
                    io.kind(),
                    std::io::ErrorKind::InvalidData
                        | std::io::ErrorKind::UnexpectedEof
                        | std::io::ErrorKind::InvalidInput
                ) =>
            {
                OpenError::Io { path, why: io.to_string() }
            }
            other => OpenError::Damaged { path, why: other.to_string() },
        }
    }

    fn read_all(&self) -> Result<Vec<Record>, redb::Error> {
        let database = self.database.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        let table = database.begin_read()?.open_table(RECORDS)?;
        let mut records = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            records.push((key.value().to_owned(), value.value().1.to_vec()));
        }
        Ok(records)
    }

    fn try_commit(&self, writes: &[Write]) -> Result<u64, redb::Error> {
        #[cfg(test)]
        if let Some(left) = self.failing.get().checked_sub(1) {
            self.failing.set(left);
            return Err(redb::Error::PreviousIo);
        }
        let database = self.database.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        write(database, self.sequence, writes)
    }

    /// Makes the next commits fail as on a full disk.
    #[cfg(test)]
    pub(crate) fn fail_next_commits(&self, count: u32) {
        self.failing.set(count);
    }
}

impl Store for FileStore {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn load(&mut self) -> Result<Vec<Record>, OpenError> {
        self.read_all()
            .map_err(|error| OpenError::Damaged { path: self.path.clone(), why: error.to_string() })
    }

    fn commit(&mut self, expected: u64, writes: &[Write]) -> Result<u64, CommitError> {
        if self.sequence != expected {
            return Err(CommitError::Conflict { expected, found: self.sequence });
        }
        match self.try_commit(writes) {
            Ok(sequence) => {
                self.sequence = sequence;
                Ok(sequence)
            }
            Err(error) => {
                self.database = None;
                Err(CommitError::Failed { path: self.path.clone(), why: error.to_string() })
            }
        }
    }

    fn reopen(&mut self) -> Result<(), OpenError> {
        self.database = None;
        let path = || self.path.clone();
        match std::fs::metadata(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(OpenError::Missing(path()));
            }
            Ok(metadata) if metadata.len() == 0 => {
                return Err(OpenError::Damaged { path: path(), why: "it is empty".into() });
            }
            _ => {}
        }
        self.rehearse().map_err(|error| self.open_error(&error))?;
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .set_check_integrity_on_open(true)
            .open(&self.path)
            .map_err(|error| self.open_error(&error))?;
        let damaged = |why: String| OpenError::Damaged { path: path(), why };
        let head = |name: &str| -> Result<Option<u64>, redb::Error> {
            let table = database.begin_read()?.open_table(HEAD)?;
            Ok(table.get(name)?.map(|value| value.value()))
        };
        match head("format").map_err(|error| damaged(error.to_string()))? {
            Some(OLDEST_FORMAT..=FORMAT) => {}
            Some(found) => return Err(OpenError::Format { path: path(), found }),
            None => return Err(damaged("it has no format number".into())),
        }
        let sequence = head("sequence").map_err(|error| damaged(error.to_string()))?;
        self.sequence = sequence.ok_or_else(|| damaged("it has no sequence number".into()))?;
        self.database = Some(database);
        Ok(())
    }
}

/// Creates a database file with `records`.
fn fill(path: &Path, records: &[Write]) -> Result<(), String> {
    use std::os::unix::fs::OpenOptionsExt;
    // redb initializes an empty file. It is created here so that it has its mode at once.
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(path).map_err(|error| error.to_string())?;
    let database = Database::builder()
        .set_cache_size(CACHE_BYTES)
        .create(path)
        .map_err(|error| error.to_string())?;
    write(&database, 0, records).map(drop).map_err(|error| error.to_string())
}

/// Gives a complete file its name, unless another file has it.
fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    match std::fs::hard_link(temporary, path) {
        Ok(()) => file::remove(temporary),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error),
        // The file system has no hard links.
        Err(_) => std::fs::rename(temporary, path),
    }
}

/// Writes a commit, whose number is one more than `sequence`. Returns that number once the changes are on the disk.
pub(super) fn write(
    database: &Database,
    sequence: u64,
    writes: &[Write],
) -> Result<u64, redb::Error> {
    let sequence = sequence + 1;
    let transaction = database.begin_write()?;
    {
        let mut head = transaction.open_table(HEAD)?;
        head.insert("format", FORMAT)?;
        head.insert("sequence", sequence)?;
        let mut records = transaction.open_table(RECORDS)?;
        for (key, value) in writes {
            match value {
                Some(value) => drop(records.insert(key.as_str(), (sequence, value.as_slice()))?),
                None => drop(records.remove(key.as_str())?),
            }
        }
    }
    transaction.commit()?;
    Ok(sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str) -> Write {
        (key.to_owned(), Some(value.as_bytes().to_vec()))
    }

    fn records(store: &mut FileStore) -> Vec<(String, String)> {
        let text = |(key, value)| (key, String::from_utf8(value).unwrap());
        store.load().unwrap().into_iter().map(text).collect()
    }

    fn pair(key: &str, value: &str) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }

    #[test]
    fn a_file_is_a_store() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("towline.redb");
        crate::store::conformance::check(
            |records| Box::new(FileStore::create(&path, records).unwrap()),
            || Box::new(FileStore::open(&path).unwrap()),
        );
    }

    #[test]
    fn what_was_committed_is_there_after_a_reopen_without_a_close() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("towline.redb");
        let mut store = FileStore::create(&path, &[put("a", "1")]).unwrap();
        let first = store.sequence();
        let second = store.commit(first, &[put("b", "2"), ("a".into(), None)]).unwrap();
        assert!(second > first);

        // A copy of the file while it is open is what a killed process leaves.
        let copy = root.path().join("copy.redb");
        std::fs::copy(&path, &copy).unwrap();
        let mut copy = FileStore::open(&copy).unwrap();
        assert_eq!(records(&mut copy), [pair("b", "2")]);
        assert_eq!(copy.sequence(), second);
    }

    #[test]
    fn a_commit_computed_from_a_stale_state_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let mut store = FileStore::create(&root.path().join("s"), &[put("a", "1")]).unwrap();
        let stale = store.sequence();
        store.commit(stale, &[put("a", "2")]).unwrap();
        let error = store.commit(stale, &[put("a", "3")]).unwrap_err();
        assert!(matches!(error, CommitError::Conflict { .. }));
        assert_eq!(records(&mut store), [pair("a", "2")]);
    }

    #[test]
    fn a_failed_commit_leaves_the_state_before_it() {
        let root = tempfile::tempdir().unwrap();
        let mut store = FileStore::create(&root.path().join("s"), &[put("a", "1")]).unwrap();
        let sequence = store.sequence();
        store.fail_next_commits(1);
        let error = store.commit(sequence, &[put("a", "2")]).unwrap_err();
        assert!(matches!(error, CommitError::Failed { .. }));
        store.reopen().unwrap();
        assert_eq!(store.sequence(), sequence);
        assert_eq!(records(&mut store), [pair("a", "1")]);
    }

    #[test]
    fn an_absent_an_empty_and_a_locked_store_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s");
        assert!(matches!(FileStore::open(&path), Err(OpenError::Missing(_))));
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(FileStore::open(&path), Err(OpenError::Damaged { .. })));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0, "an empty file must stay empty");

        let path = root.path().join("t");
        let _store = FileStore::create(&path, &[]).unwrap();
        assert!(matches!(FileStore::open(&path), Err(OpenError::Locked(_))));
    }

    #[test]
    fn a_cut_or_altered_store_is_an_error_and_never_another_content() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s");
        let writes: Vec<_> = (0..300).map(|i| put(&format!("k{i:03}"), &"v".repeat(200))).collect();
        let expected = records(&mut FileStore::create(&path, &writes).unwrap());
        let good = std::fs::read(&path).unwrap();
        let step = good.len() / 40;
        let mut refused = 0;
        for at in (0..good.len()).step_by(step) {
            let mut altered = good.clone();
            altered[at..(at + 64).min(good.len())].iter_mut().for_each(|b| *b ^= 0xa5);
            for bytes in [&good[..at], &altered[..]] {
                std::fs::write(&path, bytes).unwrap();
                match FileStore::open(&path) {
                    // Some bytes of the file are unused.
                    Ok(mut store) => assert_eq!(records(&mut store), expected, "at {at}"),
                    Err(error) => {
                        refused += 1;
                        assert!(std::fs::read(&path).unwrap() == bytes, "changed at {at}");
                        assert!(!error.to_string().contains('\n'), "{error}");
                    }
                }
            }
        }
        assert!(refused > 30, "only {refused} damages were noticed");
    }
}
