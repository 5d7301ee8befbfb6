//! Files that could not be written to the disk, kept in memory until they can be.
//!
//! A full or read-only disk does not stop the agent. A restart loses only the content that is kept
//! here.

use std::collections::BTreeMap;

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

    /// Returns one line that names the files and the reason. `None` if there are none.
    pub(super) fn problem(&self, directory: &std::path::Path) -> Option<String> {
        let reason = &self.files.values().next()?.reason;
        let names: Vec<_> = self.files.keys().copied().collect();
        Some(format!(
            "cannot store {}: {reason}: make {} writable and free space, or a restart loses them",
            names.join(", "),
            directory.display()
        ))
    }
}
