//! The state directory of the controller: its files, their permissions, and the lock on it.
//!
//! | file | holds | mode |
//! |---|---|---|
//! | `ca.key` | the CA's private key, PKCS#8 PEM | 0600 |
//! | `ca.crt` | the CA's certificate, PEM | 0644 |
//! | `store.key` | the secret that authenticates the store's records | 0600 |
//! | `admin.key`, `admin.crt` | the administrator's credential | 0600 |
//! | `towline.redb` | the store | 0600 |
//! | `starts` | number of the controller's starts, and the mesh's epoch: a store that is behind was restored from a backup | 0600 |
//! | `sequence` | sequence number that the store had, written once a minute and at the end: a store that is behind was restored | 0600 |
//! | `admin.sock` | socket for administrators on this machine | 0600 |
//! | `address` | address on which the running controller listens, for its own command line | 0644 |
//! | `lock` | lock file, locked while a controller runs | 0600 |
//!
//! The directory has mode 0700. It and all files in it, also those that root writes, belong to the
//! system user that the controller runs as. See [`towline_service::directory`].

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use towline_service::account;
use towline_service::directory::{self, DirectoryError, PrivateDirectory};
use zeroize::Zeroizing;

use towline_registry::Starts;

/// Path of a state directory, which need not exist.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
    /// Directory with the credentials that the service manager passes; `None` if it passes none.
    credentials: Option<PathBuf>,
}

/// Lock on a state directory. It is released on drop.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

/// Error of using the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory or a file in it cannot be used, or is not private.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The lock cannot be taken.
    #[error("cannot lock {path}: {source}")]
    Lock {
        /// Path of the lock file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// Another controller holds the lock.
    #[error("another controller uses {0}: stop it, or give this one its own --state-dir")]
    Locked(PathBuf),
    /// A file has invalid content.
    #[error("{path} is damaged: {why}: restore the state directory from a backup")]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// Description of the damage, for people.
        why: &'static str,
    },
}

impl StateDir {
    /// Returns the state directory at `root`, without any access to it.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), credentials: None }
    }

    /// Returns the state directory together with the directory of systemd's credentials
    /// (`LoadCredential=`). What is there takes the place of the file of the same name.
    #[must_use]
    pub fn with_credentials(self, credentials: Option<PathBuf>) -> Self {
        Self { credentials, ..self }
    }

    /// Reads a credential that the service manager passed; `None` if it did not pass it. The service manager
    /// sees to it that no other user can read it.
    pub fn credential(&self, name: &str) -> Result<Option<Zeroizing<String>>, StateError> {
        let Some(path) = self.credentials.as_ref().map(|directory| directory.join(name)) else {
            return Ok(None);
        };
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(Zeroizing::new(text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => {
                Err(DirectoryError::Io { act: "read the credential", path, source }.into())
            }
        }
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Creates the directory if it does not exist, and locks it for this process.
    pub fn lock(&self) -> Result<Lock, StateError> {
        let file = directory::create_for(&self.root, account::CONTROLLER)?.open_lock("lock")?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Lock { _file: file }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(StateError::Locked(self.root.clone())),
            Err((_, errno)) => {
                Err(StateError::Lock { path: self.file("lock"), source: errno.into() })
            }
        }
    }

    /// Opens the directory and checks its owner and permissions. Returns `None` if it does not
    /// exist.
    fn existing(&self) -> Result<Option<PrivateDirectory>, StateError> {
        match directory::open_for(&self.root, account::CONTROLLER) {
            Ok(directory) => Ok(Some(directory)),
            Err(error) if error.io_kind() == Some(io::ErrorKind::NotFound) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the path of the store's file.
    pub fn store(&self) -> PathBuf {
        self.root.join("towline.redb")
    }

    /// Returns the path of a file in the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Reads a text file; `None` if it does not exist.
    pub fn read(&self, name: &str) -> Result<Option<String>, StateError> {
        let Some(directory) = self.existing()? else { return Ok(None) };
        let Some(bytes) = directory.read(name)? else { return Ok(None) };
        String::from_utf8(bytes).map(Some).map_err(|_| self.damaged(name, "it is not text"))
    }

    /// Reads a text file that holds a key, and checks that no other user can read it; `None` if it
    /// does not exist.
    pub fn read_key(&self, name: &str) -> Result<Option<Zeroizing<String>>, StateError> {
        let Some(directory) = self.existing()? else { return Ok(None) };
        let Some(mut bytes) = directory.read_key(name)? else { return Ok(None) };
        String::from_utf8(std::mem::take(&mut *bytes))
            .map(|text| Some(Zeroizing::new(text)))
            .map_err(|_| self.damaged(name, "it is not text"))
    }

    /// Replaces a file atomically.
    pub fn write(&self, name: &str, mode: u32, text: &str) -> Result<(), StateError> {
        let directory = directory::create_for(&self.root, account::CONTROLLER)?;
        Ok(directory.replace(name, mode, text.as_bytes())?)
    }

    /// Gives a file that root created to the directory's owner.
    pub fn give(&self, file: &File) -> Result<(), StateError> {
        let failed = |source| DirectoryError::Io {
            act: "change the owner of a file in",
            path: self.root.clone(),
            source,
        };
        let Some(directory) = self.existing()? else { return Ok(()) };
        Ok(directory.give(file).map_err(failed)?)
    }

    /// Syncs the directory, so that renames in it survive a crash.
    pub fn sync(&self) -> io::Result<()> {
        File::open(&self.root)?.sync_all()
    }

    /// Removes a file, if it exists.
    pub fn remove(&self, name: &str) -> Result<(), StateError> {
        Ok(self.existing()?.map_or(Ok(()), |directory| directory.remove(name))?)
    }

    /// Reads the start counter and the epoch; `None` before the first start.
    pub fn starts(&self) -> Result<Option<Starts>, StateError> {
        let Some(text) = self.read("starts")? else { return Ok(None) };
        let damaged = || self.damaged("starts", "it does not contain two numbers");
        let (count, epoch) = text.trim_end().split_once(' ').ok_or_else(damaged)?;
        let number = |text: &str| text.parse::<u64>().map_err(|_| damaged());
        Ok(Some(Starts { count: number(count)?, epoch: number(epoch)? }))
    }

    /// Writes the start counter and the epoch.
    pub fn set_starts(&self, starts: Starts) -> Result<(), StateError> {
        self.write("starts", 0o600, &format!("{} {}\n", starts.count, starts.epoch))
    }

    /// Reads the sequence number that the store had; `None` before the first start.
    pub fn sequence(&self) -> Result<Option<u64>, StateError> {
        let Some(text) = self.read("sequence")? else { return Ok(None) };
        let number = text.trim_end().parse();
        number.map(Some).map_err(|_| self.damaged("sequence", "it does not contain a number"))
    }

    /// Writes the sequence number of the store, which has it on the disk already.
    pub fn set_sequence(&self, sequence: u64) -> Result<(), StateError> {
        self.write("sequence", 0o600, &format!("{sequence}\n"))
    }

    /// Returns an error about a damaged file.
    pub fn damaged(&self, name: &str, why: &'static str) -> StateError {
        StateError::Damaged { path: self.root.join(name), why }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_is_held_by_one_process_and_files_have_their_mode() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path().join("a/b"));
        let lock = dir.lock().unwrap();
        assert!(matches!(dir.lock(), Err(StateError::Locked(_))));
        drop(lock);
        dir.lock().unwrap();

        dir.write("ca.key", 0o600, "one").unwrap();
        dir.write("ca.key", 0o600, "two").unwrap();
        assert_eq!(dir.read("ca.key").unwrap().as_deref(), Some("two"));
        assert_eq!(dir.read("absent").unwrap(), None);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir.file("ca.key")), 0o600);
        assert_eq!(mode(dir.path()), 0o700);
    }

    #[test]
    fn what_others_can_read_is_refused_with_the_command_that_closes_it() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path().join("state"));
        dir.write("ca.key", 0o600, "key").unwrap();
        let open = |mode| fs::Permissions::from_mode(mode);
        fs::set_permissions(dir.path(), open(0o755)).unwrap();
        for error in [dir.lock().unwrap_err(), dir.read("address").unwrap_err()] {
            assert!(error.to_string().contains("run `chmod 700 "), "{error}");
        }
        fs::set_permissions(dir.path(), open(0o700)).unwrap();
        fs::set_permissions(dir.file("ca.key"), open(0o640)).unwrap();
        let error = dir.read_key("ca.key").unwrap_err().to_string();
        assert!(error.contains("run `chmod 600 "), "{error}");
        fs::set_permissions(dir.file("ca.key"), open(0o600)).unwrap();
        assert_eq!(dir.read_key("ca.key").unwrap().unwrap().as_str(), "key");
    }

    #[test]
    fn a_damaged_start_counter_is_an_error_rather_than_a_first_start() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        assert_eq!(dir.starts().unwrap(), None);
        let starts = Starts { count: 3, epoch: 2 };
        dir.set_starts(starts).unwrap();
        assert_eq!(dir.starts().unwrap(), Some(starts));
        dir.write("starts", 0o600, "three").unwrap();
        assert!(matches!(dir.starts(), Err(StateError::Damaged { .. })));
        assert_eq!(dir.sequence().unwrap(), None);
        dir.set_sequence(7).unwrap();
        assert_eq!(dir.sequence().unwrap(), Some(7));
        dir.write("sequence", 0o600, "").unwrap();
        assert!(matches!(dir.sequence(), Err(StateError::Damaged { .. })));
    }
}
