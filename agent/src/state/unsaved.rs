//! Files that could not be written to the disk, kept in memory until they can be.
//!
//! A full or read-only disk does not stop the agent. A restart loses only the content that is kept
//! here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use towline_proto::codes;

/// Files whose last write failed, by name.
#[derive(Debug, Default)]
pub(super) struct Unsaved {
    files: BTreeMap<&'static str, Waiting>,
}

/// File that is still to be written.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    /// Whole content of the file.
    pub(super) bytes: Vec<u8>,
    /// Why the last attempt to write it failed.
    pub(super) reason: String,
}

impl Unsaved {
    /// Adds a file whose write failed. Replaces older content of the same file.
    pub(super) fn failed(&mut self, name: &'static str, bytes: &[u8], reason: String) {
        self.files.insert(name, Waiting { bytes: bytes.to_vec(), reason });
    }

    /// Removes a file, because it was written or deleted.
    pub(super) fn settled(&mut self, name: &str) {
        self.files.remove(name);
    }

    /// Returns the files that are still to be written.
    pub(super) fn waiting(&self) -> Vec<(&'static str, Waiting)> {
        self.files.iter().map(|(name, waiting)| (*name, waiting.clone())).collect()
    }

    /// Returns the files and the reason, for the operator. `None` if there are none.
    pub(super) fn problem(&self, directory: &Path) -> Option<NotStored> {
        let reason = self.files.values().next()?.reason.clone();
        let files: Vec<_> = self.files.keys().copied().collect();
        Some(NotStored { files: files.join(", "), reason, directory: directory.to_owned() })
    }
}

/// Files that a restart would lose.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot store {files}: {reason}: make {} writable and free space, or a restart loses them",
    .directory.display()
)]
pub struct NotStored {
    /// Names of the files.
    files: String,
    /// Why the last attempt to write one of them failed.
    reason: String,
    /// State directory.
    directory: PathBuf,
}

codes! { NotStored => "state-not-stored" }
