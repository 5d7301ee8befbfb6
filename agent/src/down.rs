//! The marker of `towline down`: while it exists, nothing of ours is brought up on this machine.
//!
//! `down` is written into the state directory, so that it outlives a reboot. Where that directory
//! cannot be written, the marker is beside the agent's socket instead, and lasts until the next
//! boot. Its existence is what counts; the content only says since when.
//!
//! Order, so that nobody brings the mesh up unseen: who opens the machine writes the marker first
//! and takes the state directory's lock afterwards; who brings it up takes the lock first and
//! looks for the marker afterwards.

use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::config::Config;

/// Name of the marker in the state directory.
pub const NAME: &str = "down";

/// Where the marker of one agent is.
#[derive(Debug, Clone)]
pub struct DownMarker {
    /// In the state directory; outlives a reboot.
    durable: PathBuf,
    /// Beside the socket; gone after a reboot.
    volatile: PathBuf,
}

/// What a marker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Down {
    /// When `towline down` was run; `None` if the marker does not say.
    pub since: Option<SystemTime>,
}

/// How long a marker lasts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lasts {
    /// Until `towline up`.
    UntilUp,
    /// Until `towline up` or a reboot: the state directory cannot be written, for this reason.
    UntilReboot(String),
}

#[derive(Serialize, Deserialize)]
struct Content {
    /// Seconds since 1970.
    since: u64,
}

impl DownMarker {
    /// Returns the marker's place for this configuration.
    pub fn of(config: &Config) -> Self {
        let mut volatile = config.socket.clone().into_os_string();
        volatile.push(".down");
        Self { durable: config.state_dir.join(NAME), volatile: volatile.into() }
    }

    /// Returns what the marker says; `None`: there is none.
    pub fn read(&self) -> Option<Down> {
        [&self.durable, &self.volatile].into_iter().find_map(|path| match std::fs::read(path) {
            Ok(bytes) => Some(Down { since: since(&bytes) }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // It is there, whatever it says.
            Err(_) => path.symlink_metadata().is_ok().then_some(Down { since: None }),
        })
    }

    /// Writes the marker, unless there is one already.
    ///
    /// # Errors
    ///
    /// When it can be written in neither of its places.
    pub fn set(&self, now: SystemTime) -> io::Result<Lasts> {
        if self.durable.symlink_metadata().is_ok() {
            return Ok(Lasts::UntilUp);
        }
        let Err(error) = write(&self.durable, now) else { return Ok(Lasts::UntilUp) };
        write(&self.volatile, now)?;
        Ok(Lasts::UntilReboot(format!("cannot write {}: {error}", self.durable.display())))
    }

    /// Removes the marker. One that is not there is no error.
    pub fn clear(&self) -> io::Result<()> {
        for path in [&self.durable, &self.volatile] {
            match std::fs::remove_file(path) {
                Ok(()) => sync_parent(path),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
                Err(error) => {
                    let text = format!("cannot remove {}: {error}", path.display());
                    return Err(io::Error::new(error.kind(), text));
                }
            }
        }
        Ok(())
    }
}

fn since(bytes: &[u8]) -> Option<SystemTime> {
    let content: Content = serde_json::from_slice(bytes).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(content.since))
}

/// Writes the file in one step. Everybody may read it: the agent runs as another user than the one
/// who runs `towline down`.
fn write(path: &Path, now: SystemTime) -> io::Result<()> {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let beside = path.with_extension("new");
    // Made, never opened: root writes into a directory of another user, who may have put a symbolic
    // link there.
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file =
        std::fs::OpenOptions::new().create_new(true).write(true).mode(0o644).open(&beside)?;
    // Not left to the umask.
    file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.write_all(&serde_json::to_vec(&Content { since })?)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    sync_parent(path);
    Ok(())
}

/// A file system that cannot be synced has the file all the same.
fn sync_parent(path: &Path) {
    if let Some(parent) = path.parent() {
        let _ = std::fs::File::open(parent).and_then(|directory| directory.sync_all());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marker(directory: &Path) -> DownMarker {
        DownMarker::of(&Config {
            state_dir: directory.join("state"),
            socket: directory.join("agent.sock"),
            ..Config::default()
        })
    }

    #[test]
    fn a_marker_lasts_until_it_is_cleared_and_keeps_its_first_time() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("state")).unwrap();
        let marker = marker(directory.path());
        assert_eq!(marker.read(), None);
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(marker.set(at(100)).unwrap(), Lasts::UntilUp);
        assert_eq!(marker.set(at(200)).unwrap(), Lasts::UntilUp);
        assert_eq!(marker.read(), Some(Down { since: Some(at(100)) }));
        marker.clear().unwrap();
        marker.clear().unwrap();
        assert_eq!(marker.read(), None);
    }

    #[test]
    fn any_file_of_that_name_is_a_marker() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        std::fs::create_dir(&state).unwrap();
        for content in ["", "{", "{\"since\": -1}", "\0"] {
            std::fs::write(state.join(NAME), content).unwrap();
            assert_eq!(marker(directory.path()).read(), Some(Down { since: None }), "{content}");
        }
    }

    #[test]
    fn a_state_directory_that_cannot_be_written_is_named() {
        let directory = tempfile::tempdir().unwrap();
        // Root may write anywhere; a file where the directory should be stops root, too.
        std::fs::write(directory.path().join("state"), "").unwrap();
        let marker = marker(directory.path());
        let Lasts::UntilReboot(why) = marker.set(SystemTime::now()).unwrap() else {
            panic!("it cannot be in the state directory");
        };
        assert!(why.contains("state/down"), "{why}");
        assert!(marker.read().is_some());
        marker.clear().unwrap();
        assert_eq!(marker.read(), None);
    }
}
