//! The lock of the state directory.
//!
//! An agent (or a command that changes the state) holds it alone; the guard, which only reads,
//! shares it with other guards for as long as it works. Both only need to read the disk: the
//! directory itself is locked, which a read-only or full file system allows. The file `lock` is
//! locked beside it where it exists or can be made, since that is what versions before look at.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use towline_service::directory::PrivateDirectory;

use super::StateError;

/// A held lock; released when dropped.
#[derive(Debug)]
pub(super) struct StateLock {
    _file: Option<Flock<File>>,
    /// `None` on a file system that locks no directories (NFS); then the file is all there is.
    _directory: Option<Flock<File>>,
}

/// How long a guard may hold the lock at most: it reads the state and sets up its plan.
const GUARD_LIMIT: Duration = Duration::from_secs(20);
/// Time between two attempts while a guard holds the lock.
const PERIOD: Duration = Duration::from_millis(5);

impl StateLock {
    /// Takes the lock for this process alone. Waits for a guard that is at work.
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
                    // Without the file it cannot be told from another agent, which does not end.
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

    /// Takes the lock together with others that only read. Makes and changes nothing.
    pub(super) fn shared(path: &Path) -> Result<Self, StateError> {
        let lock = match lock_directory(path, FlockArg::LockSharedNonblock) {
            // Nobody is in a directory that does not exist.
            Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { _file: None, _directory: None });
            }
            other => other?,
        };
        match lock {
            Ok(lock) => Ok(Self { _file: None, _directory: Some(lock) }),
            Err(Errno::EWOULDBLOCK) => Err(StateError::Locked { path: path.into() }),
            // As long as nobody can lock the directory, nobody holds it.
            Err(_) => Ok(Self { _file: None, _directory: None }),
        }
    }
}

/// The file to lock; `None`: it does not exist, and this file system takes no new one now.
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

/// Whether the file system takes no writes now: it is full or read-only, or a quota is used up.
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
