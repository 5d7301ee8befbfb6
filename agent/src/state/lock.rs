//! Lock of the state directory.
//!
//! An agent (or a command that changes the state) holds the lock exclusively. The guard only reads,
//! and shares the lock with other guards while it works. Locking needs no write access to the disk:
//! the directory itself is locked, which works on a read-only or full file system. The file `lock`
//! is locked too if it exists or can be created, because earlier versions only lock that file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use towline_service::directory::PrivateDirectory;

use super::StateError;

/// Held lock; released when dropped.
#[derive(Debug)]
pub(super) struct StateLock {
    _file: Option<Flock<File>>,
    /// Lock of the directory. `None` on a file system that cannot lock directories (NFS); the file
    /// is then the only lock.
    _directory: Option<Flock<File>>,
}

/// Maximum time for which a guard holds the lock: it reads the state and installs its plan.
const GUARD_LIMIT: Duration = Duration::from_secs(20);
/// Interval between attempts while a guard holds the lock.
const PERIOD: Duration = Duration::from_millis(5);

impl StateLock {
    /// Takes the exclusive lock. Waits for a guard that holds the shared lock.
    pub(super) fn exclusive(directory: &PrivateDirectory) -> Result<Self, StateError> {
        let path = directory.path();
        let file = match lock_file(directory)? {
            Some(file) => Some(match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, errno)) => return Err(refused(path, errno)),
            }),
            None => None,
        };
        let begun = Instant::now();
        loop {
            match lock_directory(path, FlockArg::LockExclusiveNonblock)? {
                Ok(lock) => return Ok(Self { _file: file, _directory: Some(lock) }),
                Err(Errno::EWOULDBLOCK) if begun.elapsed() < GUARD_LIMIT => {
                    // Without the lock file, the holder may also be an agent, which does not
                    // release the lock soon.
                    if file.is_none() && begun.elapsed() > GUARD_LIMIT / 10 {
                        return Err(StateError::Locked { path: path.into() });
                    }
                    std::thread::sleep(PERIOD);
                }
                Err(Errno::EWOULDBLOCK) => return Err(StateError::Locked { path: path.into() }),
                Err(_) if file.is_some() => return Ok(Self { _file: file, _directory: None }),
                Err(errno) => return Err(refused(path, errno)),
            }
        }
    }

    /// Takes the shared lock. Creates and changes nothing.
    pub(super) fn shared(path: &Path) -> Result<Self, StateError> {
        let lock = match lock_directory(path, FlockArg::LockSharedNonblock) {
            // No process can hold the lock of a directory that does not exist.
            Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { _file: None, _directory: None });
            }
            other => other?,
        };
        match lock {
            Ok(lock) => Ok(Self { _file: None, _directory: Some(lock) }),
            Err(Errno::EWOULDBLOCK) => Err(StateError::Locked { path: path.into() }),
            // If the directory cannot be locked at all, no other process holds its lock.
            Err(_) => Ok(Self { _file: None, _directory: None }),
        }
    }
}

/// Opens the lock file. `None` if it does not exist and the file system is not writable.
fn lock_file(directory: &PrivateDirectory) -> Result<Option<File>, StateError> {
    let error = match directory.open_lock("lock") {
        Ok(file) => return Ok(Some(file)),
        Err(error) => error,
    };
    if !error.io_kind().is_some_and(is_unwritable) {
        return Err(error.into());
    }
    let path = directory.path().join("lock");
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StateError::Io { path, source }),
    }
}

/// Returns whether the file system is not writable: full, read-only, over quota, or without
/// permission.
fn is_unwritable(error: io::ErrorKind) -> bool {
    matches!(
        error,
        io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::PermissionDenied
    )
}

fn lock_directory(path: &Path, how: FlockArg) -> Result<Result<Flock<File>, Errno>, StateError> {
    let directory =
        File::open(path).map_err(|source| StateError::Io { path: path.into(), source })?;
    Ok(Flock::lock(directory, how).map_err(|(_, errno)| errno))
}

fn refused(path: &Path, errno: Errno) -> StateError {
    match errno {
        Errno::EWOULDBLOCK => StateError::Locked { path: path.into() },
        errno => StateError::Io { path: path.join("lock"), source: errno.into() },
    }
}
