//! What could not be written to the disk, kept in memory until it can.
//!
//! A full or read-only disk stops neither the agent nor what it does with the state: only what is
//! listed here would not outlive a restart.

use std::collections::BTreeMap;

/// Files whose last write failed, by name.
#[derive(Debug, Default)]
pub(super) struct Unsaved {
    files: BTreeMap<&'static str, Waiting>,
}

/// A file that waits for room.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    /// The whole content.
    pub(super) bytes: Vec<u8>,
    /// Why the last attempt failed.
    pub(super) reason: String,
}

impl Unsaved {
    /// Notes a write that failed; it replaces an earlier one of the same file.
    pub(super) fn failed(&mut self, name: &'static str, bytes: &[u8], reason: String) {
        self.files.insert(name, Waiting { bytes: bytes.to_vec(), reason });
    }

    /// Forgets a file: it was written, or is to be gone.
    pub(super) fn settled(&mut self, name: &str) {
        self.files.remove(name);
    }

    /// The files that wait.
    pub(super) fn waiting(&self) -> Vec<(&'static str, Waiting)> {
        self.files.iter().map(|(name, waiting)| (*name, waiting.clone())).collect()
    }

    /// One line that names them; `None`: all is on the disk.
    pub(super) fn problem(&self, directory: &std::path::Path) -> Option<String> {
        let reason = &self.files.values().next()?.reason;
        let names: Vec<_> = self.files.keys().copied().collect();
        Some(format!(
            "{} would not outlive a restart: {reason}: make {} writable, with room for it",
            names.join(", "),
            directory.display()
        ))
    }
}
