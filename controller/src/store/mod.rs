//! The store: the persistent state of the registry, behind one interface.
//!
//! The store maps keys to values. A commit names the sequence number that it was computed from. If
//! the store has a newer one, the commit is refused ([`CommitError::Conflict`]). So a change that was
//! computed from a stale state cannot overwrite a newer one.
//!
//! | module | owns |
//! |---|---|
//! | `file` | the store of one controller: one redb file beside the CA's key |
//!
//! Calls block; the [`writer`](crate::writer) makes them on its own thread.

mod file;

use std::path::PathBuf;

pub use file::FileStore;

/// Version of the format of the records. It is raised with every change that an older controller cannot
/// read. Format 2 added the record `seen`.
const FORMAT: u64 = 2;
/// Oldest format that can still be read. The first commit raises it to [`FORMAT`].
const OLDEST_FORMAT: u64 = 1;

/// An open store.
pub trait Store: Send {
    /// Returns the name of the store, for messages.
    fn name(&self) -> String;

    /// Returns the sequence number of the last commit.
    fn sequence(&self) -> u64;

    /// Returns all records, sorted by key.
    fn load(&mut self) -> Result<Vec<Record>, OpenError>;

    /// Applies all of `writes` or none of them, if the store is still at sequence number
    /// `expected`. Returns the new sequence number once the changes would survive a power cut. After a
    /// failed commit, [`Store::reopen`] finds out whether its changes are in the store.
    fn commit(&mut self, expected: u64, writes: &[Write]) -> Result<u64, CommitError>;

    /// Opens the store again after a failed commit, to find out what is in it.
    fn reopen(&mut self) -> Result<(), OpenError>;
}

/// One change: a key and its new value, or `None` to remove it.
pub type Write = (String, Option<Vec<u8>>);

/// One record: a key and its value.
pub type Record = (String, Vec<u8>);

/// Error of opening or reading the store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file does not exist.
    #[error(
        "{0} is missing: the mesh was set up before: restore it from a backup, and keep `ca.key`"
    )]
    Missing(PathBuf),
    /// Another process has the file open.
    #[error("{0} is in use by another process: stop the other controller")]
    Locked(PathBuf),
    /// The file has invalid content.
    #[error("{path} is damaged: {why}: nothing was changed: restore it from a backup")]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// Description of the damage.
        why: String,
    },
    /// The file was written by a newer controller.
    #[error(
        "cannot read {path}: unsupported format {found}, not {FORMAT}: run the version of the \
         controller that wrote it"
    )]
    Format {
        /// Path of the file.
        path: PathBuf,
        /// Format of the file.
        found: u64,
    },
    /// The file cannot be opened or read.
    #[error("cannot open {path}: {why}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system or of redb.
        why: String,
    },
}

/// Error of a commit.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The store has a newer state than the one that the changes were computed from. Nothing was
    /// changed.
    #[error("the change was computed from sequence {expected}, but the store is at {found}")]
    Conflict {
        /// Sequence number that the change was computed from.
        expected: u64,
        /// Sequence number of the store.
        found: u64,
    },
    /// Writing failed. The store has to be opened again to find out whether the changes are in
    /// it.
    #[error("cannot write {path}: {why}: free space or repair the disk")]
    Failed {
        /// Path of the file.
        path: PathBuf,
        /// Error of redb.
        why: String,
    },
}
