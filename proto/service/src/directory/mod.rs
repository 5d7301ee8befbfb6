//! A private state directory: its owner, its permissions, and how its files are written.
//!
//! - **Files belong to the owner of the directory.** Root may write into the directory of a
//!   service (`towline join`, run by an administrator). The files that it creates are given to the
//!   directory's owner, so that the service can read them.
//! - **No other user can read it.** A directory that its group or others can enter, or a key that
//!   they can read, is refused, and the error names the command that repairs it. There are two
//!   exceptions: an empty directory of the caller gets mode 0700 (the kubelet creates the directory
//!   of a `hostPath` with mode 0755), and a Kubernetes volume with an `fsGroup` (owned by root,
//!   set-group-id, of the caller's own group) is accepted as it is.
//! - **Root trusts nothing in a directory of another user.** It follows no symbolic link there,
//!   opens only regular files, and never writes into an existing file.
//! - **A file is replaced atomically**, see [`mod@file`].

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::fs::{PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use nix::libc::{EINVAL, ELOOP, EPERM, O_NOFOLLOW, O_NONBLOCK};
use nix::unistd::{getegid, geteuid};
use zeroize::Zeroizing;

use crate::account::{self, Account};
use crate::file;

/// Permission bits of the group and of others.
const NOT_OWNER: u32 = 0o077;
/// Set-group-id bit of a directory's mode.
const SET_GROUP_ID: u32 = 0o2000;
/// Longest file that is read, in bytes. The signed map of the largest mesh is far smaller.
const FILE_BYTES: u64 = 256 * 1024 * 1024;

/// Error of using a private directory or a file in it.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// An operation of the file system failed.
    #[error("cannot {act} {path}: {source}{}", advice(path, source))]
    Io {
        /// Operation that failed, as a verb for the message.
        act: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The directory can be entered by its group or by others.
    #[error(
        "state directory {path} is readable by others: mode {mode:04o}: run `chmod 700 {path}`"
    )]
    Open {
        /// Path of the directory.
        path: PathBuf,
        /// Permission bits of the directory.
        mode: u32,
    },
    /// A key can be read by its group or by others.
    #[error("{path} is readable by others: mode {mode:04o}: run `chmod 600 {path}`")]
    OpenKey {
        /// Path of the file.
        path: PathBuf,
        /// Permission bits of the file.
        mode: u32,
    },
    /// The directory or key belongs to a user that is neither the caller, nor root, nor the
    /// service.
    #[error(
        "{path} belongs to another user: uid {uid}: run `chown -R {wanted} {path}`, or name \
         another state directory"
    )]
    Foreign {
        /// Path of the directory or file.
        path: PathBuf,
        /// User id of its owner.
        uid: u32,
        /// User id that it should belong to.
        wanted: u32,
    },
    /// A path of the state directory is not a regular file.
    #[error("{path} is not a regular file: remove it, and restore the file from a backup")]
    NotRegular {
        /// Path of the file.
        path: PathBuf,
    },
}

impl DirectoryError {
    /// Returns the kind of the operating system's error, if this is one.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}

/// Returns the advice at the end of an error message; empty if there is none.
fn advice(path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let directory = if path.is_dir() { Some(path) } else { path.parent() };
            let owner = directory.and_then(|directory| Some((directory, owner_of(directory)?)));
            match owner {
                Some((directory, owner)) if owner == geteuid().as_raw() => {
                    format!(": run `chown -R {owner} {}`", directory.display())
                }
                Some((_, owner)) => {
                    format!(": run as root, or as the directory's owner (uid {owner})")
                }
                None => ": run as root".to_owned(),
            }
        }
        io::ErrorKind::StorageFull => ": free space".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => {
            ": name a state directory that can be written".to_owned()
        }
        _ => String::new(),
    }
}

fn owner_of(path: &Path) -> Option<u32> {
    Some(std::fs::metadata(path).ok()?.uid())
}

/// A state directory whose owner and permissions were checked.
#[derive(Debug, Clone)]
pub struct PrivateDirectory {
    path: PathBuf,
    /// Owner of the directory. New files are given to it.
    owner: Account,
}

impl PrivateDirectory {
    /// Opens the directory, and creates it if it does not exist. If the caller is root and the
    /// directory is empty and belongs to root, it is given to `service`, the account that the
    /// daemon runs as.
    ///
    /// # Errors
    ///
    /// See [`DirectoryError`].
    pub fn create(path: &Path, service: Option<Account>) -> Result<Self, DirectoryError> {
        let failed = |act, source| DirectoryError::Io { act, path: path.into(), source };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| failed("create", source))?;
        let metadata = std::fs::metadata(path).map_err(|source| failed("read", source))?;
        if let Some(service) = service.filter(|_| geteuid().is_root())
            && metadata.uid() == 0
            && is_empty(path)
        {
            let directory = File::open(path).map_err(|source| failed("open", source))?;
            directory
                .set_permissions(std::fs::Permissions::from_mode(0o700))
                .map_err(|source| failed("close", source))?;
            match fchown(&directory, Some(service.uid), Some(service.gid)) {
                Ok(()) => {}
                // Root of a container or of a user namespace cannot give the directory away.
                Err(error) if matches!(error.raw_os_error(), Some(EPERM | EINVAL)) => {}
                Err(source) => return Err(failed("change the owner of", source)),
            }
        }
        Self::open(path, service)
    }

    /// Opens a directory that exists. Changes nothing, except that an empty directory of the caller
    /// gets mode 0700.
    ///
    /// # Errors
    ///
    /// See [`DirectoryError`].
    pub fn open(path: &Path, service: Option<Account>) -> Result<Self, DirectoryError> {
        let failed = |act, source| DirectoryError::Io { act, path: path.into(), source };
        let metadata = std::fs::metadata(path).map_err(|source| failed("read", source))?;
        let caller = geteuid().as_raw();
        let (uid, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        let of_service = caller == 0 && service.is_some_and(|service| service.uid == uid);
        if uid != caller && uid != 0 && !of_service {
            return Err(DirectoryError::Foreign { path: path.into(), uid, wanted: caller });
        }
        if mode & NOT_OWNER != 0 && !is_volume(&metadata) {
            if (uid != caller && caller != 0) || !is_empty(path) {
                return Err(DirectoryError::Open { path: path.into(), mode });
            }
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
                .map_err(|source| failed("close", source))?;
        }
        Ok(Self { path: path.into(), owner: Account { uid, gid: metadata.gid() } })
    }

    /// Returns the directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a file; `None` if it does not exist.
    ///
    /// # Errors
    ///
    /// See [`DirectoryError`].
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, DirectoryError> {
        Ok(self.read_checked(name, |_| Ok(()))?.map(|mut bytes| std::mem::take(&mut *bytes)))
    }

    /// Reads a file that holds a key; `None` if it does not exist. It must not be readable by
    /// others and must belong to the caller, to root or to the directory's owner.
    ///
    /// # Errors
    ///
    /// See [`DirectoryError`].
    pub fn read_key(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, DirectoryError> {
        self.read_checked(name, |metadata| {
            let path = self.path.join(name);
            let (uid, mode) = (metadata.uid(), metadata.mode() & 0o7777);
            if ![0, self.owner.uid, geteuid().as_raw()].contains(&uid) {
                return Err(DirectoryError::Foreign { path, uid, wanted: self.owner.uid });
            }
            // The kubelet makes the files of a volume readable by the pod's own group.
            let own_group = metadata.gid() == getegid().as_raw() && self.is_volume();
            let open = if own_group { mode & 0o007 } else { mode & NOT_OWNER };
            if open != 0 { Err(DirectoryError::OpenKey { path, mode }) } else { Ok(()) }
        })
    }

    fn read_checked(
        &self,
        name: &str,
        check: impl FnOnce(&Metadata) -> Result<(), DirectoryError>,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, DirectoryError> {
        let path = self.path.join(name);
        let failed = |source| DirectoryError::Io { act: "read", path: path.clone(), source };
        // A user that can create a link in the caller's own directory has its rights already.
        let follow = if self.is_own() { 0 } else { O_NOFOLLOW };
        let opened = OpenOptions::new().read(true).custom_flags(follow | O_NONBLOCK).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(ELOOP) => {
                return Err(DirectoryError::NotRegular { path });
            }
            Err(source) => return Err(failed(source)),
        };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(DirectoryError::NotRegular { path });
        }
        check(&metadata)?;
        // Reserve the whole length: a buffer that grows leaves copies of a key in memory.
        let length = usize::try_from(metadata.len().min(FILE_BYTES)).unwrap_or(0);
        let mut bytes = Zeroizing::new(Vec::with_capacity(length + 1));
        file.take(FILE_BYTES).read_to_end(&mut bytes).map_err(failed)?;
        Ok(Some(bytes))
    }

    /// Replaces a file atomically, see [`file::replace`]. The new file belongs to the directory's
    /// owner.
    ///
    /// # Errors
    ///
    /// See [`DirectoryError`].
    pub fn replace(&self, name: &str, mode: u32, bytes: &[u8]) -> Result<(), DirectoryError> {
        let path = self.path.join(name);
        file::replace(&path, mode, bytes, |file| self.give(file))
            .and_then(|()| self.sync())
            .map_err(|source| DirectoryError::Io { act: "write", path, source })
    }

    /// Appends to a file, and creates it with mode 0600 if it does not exist. With `must_sync`, returns after the
    /// bytes are on the disk.
    ///
    /// # Errors
    ///
    /// See [`DirectoryError`]. A part of the bytes may have been written.
    pub fn append(&self, name: &str, bytes: &[u8], must_sync: bool) -> Result<(), DirectoryError> {
        let path = self.path.join(name);
        let append = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .custom_flags(O_NOFOLLOW | O_NONBLOCK)
                .open(&path)?;
            if file.metadata()?.uid() != self.owner.uid {
                self.give(&file)?;
            }
            file.write_all(bytes)?;
            if must_sync { file.sync_data() } else { Ok(()) }
        };
        append().map_err(|source| DirectoryError::Io { act: "write", path: path.clone(), source })
    }

    /// Opens a lock file, which is never read, and creates it if it does not exist.
    ///
    /// # Errors
    ///
    /// See [`DirectoryError`].
    pub fn open_lock(&self, name: &str) -> Result<File, DirectoryError> {
        let path = self.path.join(name);
        let open = || -> io::Result<File> {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .custom_flags(O_NOFOLLOW | O_NONBLOCK)
                .open(&path)?;
            if file.metadata()?.uid() != self.owner.uid {
                self.give(&file)?;
            }
            Ok(file)
        };
        open().map_err(|source| DirectoryError::Io { act: "open", path: path.clone(), source })
    }

    /// Removes a file, if it exists.
    ///
    /// # Errors
    ///
    /// See [`DirectoryError`].
    pub fn remove(&self, name: &str) -> Result<(), DirectoryError> {
        let path = self.path.join(name);
        file::remove(&path).map_err(|source| DirectoryError::Io { act: "remove", path, source })
    }

    /// Syncs the directory, so that renames and removals in it survive a crash.
    ///
    /// # Errors
    ///
    /// If the directory cannot be opened or synced.
    pub fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    /// Gives a file that root created to the directory's owner.
    ///
    /// # Errors
    ///
    /// If the owner cannot be changed.
    pub fn give(&self, file: &File) -> io::Result<()> {
        if self.is_own() || !geteuid().is_root() {
            return Ok(());
        }
        fchown(file, Some(self.owner.uid), Some(self.owner.gid))
    }

    fn is_own(&self) -> bool {
        self.owner.uid == geteuid().as_raw()
    }

    fn is_volume(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|metadata| is_volume(&metadata))
    }
}

/// Opens or creates the state directory of a daemon, by the name of the daemon's account. See
/// [`PrivateDirectory::create`].
///
/// # Errors
///
/// See [`DirectoryError`].
pub fn create_for(path: &Path, service: &str) -> Result<PrivateDirectory, DirectoryError> {
    PrivateDirectory::create(path, service_account(service)?)
}

/// Opens an existing state directory of a daemon, by the name of the daemon's account. See
/// [`PrivateDirectory::open`].
///
/// # Errors
///
/// See [`DirectoryError`].
pub fn open_for(path: &Path, service: &str) -> Result<PrivateDirectory, DirectoryError> {
    PrivateDirectory::open(path, service_account(service)?)
}

/// Returns the account of that name if the caller is root. Only root needs it, since no other user
/// can give files away.
fn service_account(name: &str) -> Result<Option<Account>, DirectoryError> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    account::find(name).map_err(|source| DirectoryError::Io {
        act: "read",
        path: account::PASSWD.into(),
        source,
    })
}

/// Returns whether a directory is the root of a Kubernetes volume with an `fsGroup`: root owns it,
/// and the kubelet made it accessible for the pod's own group.
fn is_volume(metadata: &Metadata) -> bool {
    !geteuid().is_root()
        && metadata.uid() == 0
        && metadata.mode() & SET_GROUP_ID != 0
        && metadata.gid() == getegid().as_raw()
        && metadata.mode() & 0o002 == 0
}

fn is_empty(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

#[cfg(test)]
mod tests;
