//! The store: the persistent state of the registry, behind one interface.
//!
//! The store maps keys to values. A commit names the sequence number that it was computed from. If
//! the store has a newer one, the commit is refused ([`CommitError::Conflict`]). So a change that was
//! computed from a stale state cannot overwrite a newer one.
//!
//! | module | owns |
//! |---|---|
//! | `file` | the store of one controller: one redb file beside the CA's key |
//! | [`etcd`] | a store that outlives the machine of a controller |
//!
//! Calls block; the [`writer`](crate::writer) makes them on its own thread.

#[cfg(test)]
mod conformance;
pub mod etcd;
mod file;
#[cfg(test)]
mod power_cut;

use std::path::PathBuf;

use tokio::sync::oneshot;

use etcd::{EtcdError, EtcdSettings, EtcdStore, Replicas};
pub use file::FileStore;

/// Version of the format of the records. It is raised with every change that an older controller cannot
/// read. Format 2 added the record `seen`, format 3 the records `admin/KEY`.
const FORMAT: u64 = 3;
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
    /// failed commit, [`Store::reopen`] finds out whether its changes are in the store. The turn ends in any case.
    fn commit(&mut self, expected: u64, writes: &[Write]) -> Result<u64, CommitError>;

    /// Opens the store again after a failed commit, to find out what is in it. Begins a turn, unless it fails.
    fn reopen(&mut self) -> Result<(), OpenError>;

    /// Lets other controllers use the store at the same time, if its settings allow that. Returns whether they may.
    /// From then on, [`Store::changes`] must be called in a turn before a commit.
    fn share(&mut self) -> bool {
        false
    }

    /// Returns the way to the other controllers that use the store; `None` if it is not shared.
    fn replicas(&self) -> Option<Replicas> {
        None
    }

    /// Begins a turn: until the next commit or [`Store::end_turn`], other controllers do not write. Does nothing if the
    /// store is not shared. A turn that takes too long is ended by others, and its commit fails then. If this fails,
    /// there is no turn.
    fn begin_turn(&mut self) -> Result<(), OpenError> {
        Ok(())
    }

    /// Ends a turn without a commit.
    fn end_turn(&mut self) {}

    /// Reads all records as they are now, outside of a turn, to find out whether they can be used. They may be newer
    /// than [`Store::sequence`]. `None` if the store is not shared: nobody waits for its owner.
    fn peek(&mut self) -> Result<Option<Vec<Record>>, OpenError> {
        Ok(None)
    }

    /// Reads the records that other controllers wrote since the last commit or call, and follows the store to its
    /// newest commit. Records that were deleted may be absent.
    fn changes(&mut self) -> Result<Vec<Write>, OpenError> {
        Ok(Vec::new())
    }

    /// Returns a receiver of the error that ends the use of the store, for example because another
    /// controller took over. `None` if nothing ends it, or after the first call.
    fn lost(&mut self) -> Option<oneshot::Receiver<OpenError>> {
        None
    }
}

/// Mesh that a store belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Id of the mesh.
    pub mesh: String,
    /// Fingerprint of the CA's certificate.
    pub ca: String,
}

/// Location of the store, as the configuration says it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Location {
    /// A file in the state directory.
    #[default]
    File,
    /// An etcd cluster.
    Etcd(EtcdSettings),
}

/// Place of a store, which need not have a mesh yet.
pub enum Place {
    /// Path of a file.
    File(PathBuf),
    /// Store in etcd whose owner is this controller.
    Etcd(Box<EtcdStore>),
}

impl Place {
    /// Opens the place. `file` is the path of the store in the state directory.
    pub fn open(location: &Location, file: PathBuf) -> Result<Self, OpenError> {
        Ok(match location {
            Location::File => Self::File(file),
            Location::Etcd(settings) => Self::Etcd(Box::new(EtcdStore::connect(settings.clone())?)),
        })
    }

    /// Returns whether a mesh was set up at the place.
    pub fn has_mesh(&self) -> Result<bool, OpenError> {
        match self {
            Self::File(path) => path
                .try_exists()
                .map_err(|error| OpenError::Io { path: path.clone(), why: error.to_string() }),
            Self::Etcd(store) => Ok(store.has_mesh()),
        }
    }

    /// Returns the error that no mesh was set up at the place.
    pub fn missing(&self) -> OpenError {
        match self {
            Self::File(path) => OpenError::Missing(path.clone()),
            Self::Etcd(store) => store.missing().into(),
        }
    }

    /// Creates the store of a new mesh with `records`. A store that exists is not replaced.
    pub fn create(
        self,
        identity: &Identity,
        records: &[Write],
    ) -> Result<Box<dyn Store>, OpenError> {
        let store: Box<dyn Store> = match self {
            Self::File(path) => Box::new(FileStore::create(&path, records)?),
            Self::Etcd(mut store) => {
                store.create(identity, records)?;
                store
            }
        };
        Ok(store)
    }

    /// Returns the store, which must have the mesh of this identity.
    pub fn store(self, identity: &Identity) -> Result<Box<dyn Store>, OpenError> {
        let store: Box<dyn Store> = match self {
            // The records in it are signed by the CA.
            Self::File(path) => Box::new(FileStore::open(&path)?),
            Self::Etcd(store) => {
                store.check(identity)?;
                store
            }
        };
        Ok(store)
    }
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
    /// The store in etcd cannot be used.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
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
    /// The store in etcd refused the changes, or it is not known whether they are in it. The store has to
    /// be opened again to find out.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
}
