//! The state directory: what lies in it, who may read it, and how a file there is replaced.
//!
//! | file | holds | mode |
//! |---|---|---|
//! | `ca.key` | the CA's private key, PKCS#8 PEM | 0600 |
//! | `ca.crt` | the CA's certificate, PEM | 0644 |
//! | `admin.key`, `admin.crt` | the administrator's credential | 0600 |
//! | `towline.redb` | the store | 0600 |
//! | `starts` | how often the controller started, and the mesh's epoch: a store that is behind was restored from a backup | 0600 |
//! | `address` | where the running controller listens, for its own command line | 0644 |
//! | `lock` | held while a controller runs | 0600 |
//!
//! The directory itself is 0700. A file is written beside its place, synced and renamed, so a
//! kill at any moment leaves the old one or the new one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// The largest file that is read from the directory besides the store, in bytes.
const FILE_BYTES: u64 = 64 * 1024;

/// A state directory; it need not exist.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

/// Held as long as a controller runs on the directory.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Reading or writing failed.
    #[error("cannot {act} {path}: {source}{}", advice(source))]
    Io {
        /// What was tried.
        act: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another controller has it.
    #[error("another controller runs on {0}: stop it, or give this one its own --state-dir")]
    Locked(PathBuf),
    /// A file that is not what it should be.
    #[error("{path} is damaged: {why}; restore the state directory from a backup")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// In what way.
        why: &'static str,
    },
}

impl StateDir {
    /// The directory at `root`; nothing is touched.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Makes it where it does not exist, and takes it for this process.
    pub fn lock(&self) -> Result<Lock, StateError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.root);
        made.map_err(|source| self.error("create", "", source))?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.root.join("lock"))
            .map_err(|source| self.error("open", "lock", source))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Lock { _file: file }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(StateError::Locked(self.root.clone())),
            Err((_, errno)) => Err(self.error("lock", "lock", errno.into())),
        }
    }

    /// The store's file.
    pub fn store(&self) -> PathBuf {
        self.root.join("towline.redb")
    }

    /// The path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A file's text; `None` when there is none.
    pub fn read(&self, name: &str) -> Result<Option<String>, StateError> {
        let file = match File::open(self.root.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.error("read", name, source)),
        };
        let mut text = String::new();
        match file.take(FILE_BYTES).read_to_string(&mut text) {
            Ok(_) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(self.damaged(name, "it is not text"))
            }
            Err(source) => Err(self.error("read", name, source)),
        }
    }

    /// Replaces a file whole, or not at all.
    pub fn write(&self, name: &str, mode: u32, text: &str) -> Result<(), StateError> {
        self.write_file(name, mode, text).map_err(|source| self.error("write", name, source))
    }

    fn write_file(&self, name: &str, mode: u32, text: &str) -> io::Result<()> {
        let temporary = self.root.join(format!("{name}.new"));
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file =
            OpenOptions::new().create_new(true).write(true).mode(mode).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, self.root.join(name))?;
        self.sync()
    }

    /// Makes renames in the directory last.
    pub fn sync(&self) -> io::Result<()> {
        File::open(&self.root)?.sync_all()
    }

    /// Removes a file, if it is there.
    pub fn remove(&self, name: &str) -> Result<(), StateError> {
        match fs::remove_file(self.root.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.error("remove", name, error))
            }
            _ => Ok(()),
        }
    }

    /// The start counter and the epoch as they stand beside the CA's key.
    pub fn starts(&self) -> Result<Option<Starts>, StateError> {
        let Some(text) = self.read("starts")? else { return Ok(None) };
        let damaged = || self.damaged("starts", "it holds no two numbers");
        let (count, epoch) = text.trim_end().split_once(' ').ok_or_else(damaged)?;
        let number = |text: &str| text.parse::<u64>().map_err(|_| damaged());
        Ok(Some(Starts { count: number(count)?, epoch: number(epoch)? }))
    }

    /// Writes the start counter and the epoch.
    pub fn set_starts(&self, starts: Starts) -> Result<(), StateError> {
        self.write("starts", 0o600, &format!("{} {}\n", starts.count, starts.epoch))
    }

    /// An error about one of its files.
    pub fn damaged(&self, name: &str, why: &'static str) -> StateError {
        StateError::Damaged { path: self.root.join(name), why }
    }

    fn error(&self, act: &'static str, name: &str, source: io::Error) -> StateError {
        let path = if name.is_empty() { self.root.clone() } else { self.root.join(name) };
        StateError::Io { act, path, source }
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run as the user whom the state directory belongs to",
        io::ErrorKind::StorageFull => "; free space",
        io::ErrorKind::ReadOnlyFilesystem => "; choose a --state-dir that can be written",
        _ => "",
    }
}

/// How often the controller started, and the epoch it then had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Starts {
    /// Starts so far.
    pub count: u64,
    /// The mesh's epoch.
    pub epoch: u64,
}

#[cfg(test)]
mod tests {
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
    fn a_damaged_start_counter_is_an_error_rather_than_a_first_start() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        assert_eq!(dir.starts().unwrap(), None);
        let starts = Starts { count: 3, epoch: 2 };
        dir.set_starts(starts).unwrap();
        assert_eq!(dir.starts().unwrap(), Some(starts));
        dir.write("starts", 0o600, "three").unwrap();
        assert!(matches!(dir.starts(), Err(StateError::Damaged { .. })));
    }
}
