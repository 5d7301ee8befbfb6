//! Files that are replaced atomically.
//!
//! A new file is written beside the old one, synced and renamed, so that a reader and a crash find
//! the old one or the new one.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Replaces a file, or creates it, with exactly this mode. `prepare` gets the new file while it is
/// empty, for example to change its owner.
///
/// The file is created and never opened, so that no symbolic link of another user is followed. The
/// replacement survives a crash once the directory is synced too, see [`sync_parent`].
///
/// # Errors
///
/// If the file cannot be written. The old file is in place then.
pub fn replace(
    path: &Path,
    mode: u32,
    bytes: &[u8],
    prepare: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<()> {
    let beside = beside(path);
    // A file that a crash left behind may have any mode.
    remove(&beside)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    // The umask was applied to the mode.
    file.set_permissions(Permissions::from_mode(mode))?;
    prepare(&file)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)
}

/// Removes a file, if it exists.
///
/// # Errors
///
/// If the file exists and cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Syncs the directory of a file, so that a rename or a removal in it survives a crash.
///
/// # Errors
///
/// If the directory cannot be opened or synced.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Returns the temporary path of a new file: hidden, in the same directory.
pub fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let left_behind = directory.path().join(".state.json.new");
        std::fs::write(&left_behind, "half").unwrap();
        for (mode, text) in [(0o644, "one"), (0o600, "two")] {
            replace(&path, mode, text.as_bytes(), |_| Ok(())).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            let found = std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
            assert_eq!(found, mode);
            assert!(!left_behind.exists());
        }
        let refused = replace(&path, 0o600, b"three", |_| Err(io::ErrorKind::Other.into()));
        assert!(refused.is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two");
        remove(&path).unwrap();
        remove(&path).unwrap();
    }
}
