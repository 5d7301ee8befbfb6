//! A private state directory: who owns it, who may read it, and how its files are written.
//!
//! - **Files belong to the owner of the directory.** Root may write into the directory of a
//!   service (`towline join`, run by an administrator): what it creates there is given to the
//!   directory's owner, or the service could not read it.
//! - **Nobody else reads it.** A directory that its group or others can enter, or a key that they
//!   can read, is refused, and the error names the command that repairs it. Two directories are
//!   accepted nevertheless: an empty one of our own is closed (the kubelet creates the directory of
//!   a `hostPath` with mode 0755), and a volume of Kubernetes with an `fsGroup` (owned by root,
//!   set-group-id, of our own group) is as closed as it can be.
//! - **Root trusts nothing in a directory of somebody else.** It follows no symbolic link there,
//!   opens only regular files, and never writes into a file that exists.
//! - **A file is replaced whole**: written beside its place, synced and renamed. A reader finds the
//!   old one or the new one.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::fs::{PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use nix::libc::{EINVAL, ELOOP, EPERM, O_NOFOLLOW, O_NONBLOCK};
use nix::unistd::{getegid, geteuid};
use zeroize::Zeroizing;

use crate::account::{self, Account};

/// Permission bits of the group and of others.
const NOT_OWNER: u32 = 0o077;
const SET_GROUP_ID: u32 = 0o2000;
/// Longest file that is read, in bytes. The signed map of the largest mesh is far below it.
const FILE_BYTES: u64 = 256 * 1024 * 1024;

/// Why a private directory, or a file in it, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The file system refused.
    #[error("cannot {act} {path}: {source}{}", advice(path, source))]
    Io {
        /// What was tried.
        act: &'static str,
        /// File or directory.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// The directory can be entered by its group or by others.
    #[error(
        "state directory {path} is readable by others: mode {mode:04o}: run `chmod 700 {path}`"
    )]
    Open {
        /// Directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A key can be read by its group or by others.
    #[error("{path} is readable by others: mode {mode:04o}: run `chmod 600 {path}`")]
    OpenKey {
        /// File.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Directory or key belongs to a user who is neither the caller, nor root, nor the service.
    #[error(
        "{path} belongs to another user: uid {uid}: run `chown -R {wanted} {path}`, or name \
         another state directory"
    )]
    Foreign {
        /// Directory or file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Owner that it should have, as `chown` takes it.
        wanted: u32,
    },
    /// Something that is no regular file has the name of one of ours.
    #[error("{path} is no regular file: remove it, and restore the file from a backup")]
    NotRegular {
        /// File.
        path: PathBuf,
    },
}

impl DirectoryError {
    /// Returns the kind of a file system's refusal.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}

/// Says what to do about a refusal.
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
    /// Owner of the directory, whom new files are given to.
    owner: Account,
}

impl PrivateDirectory {
    /// Opens the directory, and creates it if it does not exist. A directory that root creates, or
    /// finds empty, is given to `service`, the account that the daemon runs as, if there is one.
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
                // Root of a container or of a user namespace: the directory stays its own.
                Err(error) if matches!(error.raw_os_error(), Some(EPERM | EINVAL)) => {}
                Err(source) => return Err(failed("change the owner of", source)),
            }
        }
        Self::open(path, service)
    }

    /// Opens a directory that exists. Nothing is written, except that an empty directory of our
    /// own is closed to others.
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

    /// Reads a file that holds a key; `None` if it does not exist. It must be closed to others and
    /// belong to the caller, to root or to the directory's owner.
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
            // The kubelet opens the files of a volume to the pod's own group.
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
        // Whoever may put a link into our own directory has our rights already.
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
        // Room for all of it at once: a buffer that grows leaves copies behind.
        let length = usize::try_from(metadata.len().min(FILE_BYTES)).unwrap_or(0);
        let mut bytes = Zeroizing::new(Vec::with_capacity(length + 1));
        file.take(FILE_BYTES).read_to_end(&mut bytes).map_err(failed)?;
        Ok(Some(bytes))
    }

    /// Replaces a file whole, or not at all. It belongs to the directory's owner; `mode` is
    /// narrowed by the umask.
    ///
    /// # Errors
    ///
    /// See [`DirectoryError`].
    pub fn replace(&self, name: &str, mode: u32, bytes: &[u8]) -> Result<(), DirectoryError> {
        let path = self.path.join(name);
        let write = || -> io::Result<()> {
            let beside = self.path.join(format!(".{name}.new"));
            // One that a crash left behind has whatever mode it has.
            match std::fs::remove_file(&beside) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            // Creating a file follows no link at the end of its path.
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
            self.give(&file)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&beside, &path)?;
            self.sync()
        };
        write().map_err(|source| DirectoryError::Io { act: "write", path: path.clone(), source })
    }

    /// Opens a file that is locked and never read, and creates it if it does not exist.
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
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(DirectoryError::Io { act: "remove", path, source })
            }
            _ => Ok(()),
        }
    }

    /// Makes renames and removals in the directory last.
    ///
    /// # Errors
    ///
    /// If the file system refuses.
    pub fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    /// Gives a file that root created to the directory's owner.
    ///
    /// # Errors
    ///
    /// If the file system refuses.
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

/// Opens what a daemon keeps its state in, by the name of its account, see
/// [`PrivateDirectory::create`].
///
/// # Errors
///
/// See [`DirectoryError`].
pub fn create_for(path: &Path, service: &str) -> Result<PrivateDirectory, DirectoryError> {
    PrivateDirectory::create(path, service_account(service)?)
}

/// Opens a state directory that exists, by the name of the daemon's account, see
/// [`PrivateDirectory::open`].
///
/// # Errors
///
/// See [`DirectoryError`].
pub fn open_for(path: &Path, service: &str) -> Result<PrivateDirectory, DirectoryError> {
    PrivateDirectory::open(path, service_account(service)?)
}

/// Only root needs to know the account: nobody else may give files away.
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

/// Whether a directory is the root of a Kubernetes volume with an `fsGroup`: the kubelet leaves it
/// to root, and opens it to the pod's own group.
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
