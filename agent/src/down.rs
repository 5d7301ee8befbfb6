//! Marker of `towline down`. While it exists, the agent and the guard create nothing on this
//! machine.
//!
//! The marker is the file `down` in the state directory, so that it survives a reboot. If that
//! directory cannot be written, the marker is next to the agent's socket and lasts until the next
//! reboot. Only its existence matters; the content is the time of `towline down`.
//!
//! The order of steps prevents a race. Code that opens the machine writes the marker first and then
//! takes the lock of the state directory. Code that brings the mesh up takes the lock first and
//! then reads the marker.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use towline_proto::codes;
use towline_service::file;

use crate::config::Config;
use crate::state::DOWN;

/// Paths of the marker of one agent.
#[derive(Debug, Clone)]
pub struct DownMarker {
    /// Path in the state directory; the file survives a reboot.
    durable: PathBuf,
    /// Path next to the socket; the file is gone after a reboot.
    volatile: PathBuf,
}

/// Content of a marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Down {
    /// When `towline down` was run. `None` if the marker does not contain the time.
    pub since: Option<SystemTime>,
}

codes! { Down => "machine-down" }

impl fmt::Display for Down {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.since.and_then(|since| jiff::Timestamp::try_from(since).ok());
        let since = since.map(|since| format!(" since {since}")).unwrap_or_default();
        write!(f, "this machine is down{since}: run `towline up`")
    }
}

/// State of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineState {
    /// The agent runs the mesh.
    Running,
    /// `towline down` was run: there is no link, and nothing is guarded.
    Down,
}

codes! {
    MachineState {
        Running => "running",
        Down => "down",
    }
}

/// Lifetime of a marker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lasts {
    /// The marker lasts until `towline up`.
    UntilUp,
    /// The marker lasts until `towline up` or a reboot, because the state directory cannot be
    /// written for this reason.
    UntilReboot(String),
}

#[derive(Serialize, Deserialize)]
struct Content {
    /// Time of `towline down`, in seconds since 1970.
    since: u64,
}

impl DownMarker {
    /// Returns the paths of the marker for this configuration.
    pub fn of(config: &Config) -> Self {
        let mut volatile = config.socket.clone().into_os_string();
        volatile.push(".down");
        Self { durable: config.state_dir.join(DOWN), volatile: volatile.into() }
    }

    /// Returns the content of the marker, or `None` if there is no marker.
    pub fn read(&self) -> Option<Down> {
        [&self.durable, &self.volatile].into_iter().find_map(|path| match std::fs::read(path) {
            Ok(bytes) => Some(Down { since: since(&bytes) }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // An unreadable marker counts too.
            Err(_) => path.symlink_metadata().is_ok().then_some(Down { since: None }),
        })
    }

    /// Writes the marker, unless there is one already.
    ///
    /// # Errors
    ///
    /// Fails if neither file can be written.
    pub fn set(&self, now: SystemTime) -> io::Result<Lasts> {
        if self.durable.symlink_metadata().is_ok() {
            return Ok(Lasts::UntilUp);
        }
        let Err(error) = write(&self.durable, now) else { return Ok(Lasts::UntilUp) };
        write(&self.volatile, now)?;
        Ok(Lasts::UntilReboot(format!("cannot write {}: {error}", self.durable.display())))
    }

    /// Removes the marker, if there is one.
    pub fn clear(&self) -> io::Result<()> {
        for path in [&self.durable, &self.volatile] {
            match std::fs::remove_file(path) {
                Ok(()) => sync(path),
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

/// Writes the file atomically. All users may read it, because the agent and `towline down` run as
/// different users.
fn write(path: &Path, now: SystemTime) -> io::Result<()> {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let content = serde_json::to_vec(&Content { since })?;
    file::replace(path, 0o644, &content, |_| Ok(()))?;
    sync(path);
    Ok(())
}

/// Syncs the parent directory. Errors are ignored: the file exists even if the file system cannot
/// sync.
fn sync(path: &Path) {
    let _ = file::sync_parent(path);
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
            std::fs::write(state.join(DOWN), content).unwrap();
            assert_eq!(marker(directory.path()).read(), Some(Down { since: None }), "{content}");
        }
    }

    #[test]
    fn a_state_directory_that_cannot_be_written_is_named() {
        let directory = tempfile::tempdir().unwrap();
        // Root may write anywhere; but a file in place of the directory stops root too.
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
