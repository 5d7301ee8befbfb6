//! The socket of `wg show`: `/run/wireguard/NAME.sock`, see wg(8) and the cross-platform interface of WireGuard.
//!
//! The directory belongs to root, and every userspace WireGuard of the machine has a socket in it. A socket
//! that accepts connections is another program's: it is never removed or replaced. One that refuses
//! connections is left of a process that ended, and `wg` itself removes those.
//!
//! The agent calls this where it may write the directory, and asks the helper where it may not.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::unistd::geteuid;

/// Directory of the sockets.
pub const DIRECTORY: &str = "/run/wireguard";

/// Mode of the directory: everyone may look up a name in it, and root alone may add one.
const DIRECTORY_MODE: u32 = 0o755;
/// Mode of the socket. Root connects to it, and the process that serves it checks the credentials.
const SOCKET_MODE: u32 = 0o600;
/// Largest number of connections that wait to be accepted.
const WAITING: i32 = 8;

/// Opens the listening socket of the link `name`. Replaces a socket that nobody serves, and creates the
/// directory if it does not exist.
///
/// # Errors
///
/// Returns an error of kind `AddrInUse` if another process serves the socket, and of kind
/// `PermissionDenied` if others than root and this user may write the directory.
pub fn open(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    prepare(directory)?;
    let path = path_of(directory, name);
    remove_stale(&path)?;
    let listener = stream_socket()?;
    bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    listen(&listener, Backlog::new(WAITING)?)?;
    Ok(listener)
}

/// Removes the socket of the link `name` if nobody serves it.
///
/// # Errors
///
/// Returns the same errors as [`open`].
pub fn remove(directory: &Path, name: &str) -> io::Result<()> {
    match std::fs::symlink_metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => check(directory)?,
    }
    remove_stale(&path_of(directory, name))
}

fn path_of(directory: &Path, name: &str) -> PathBuf {
    let mut file = OsString::from(name);
    file.push(".sock");
    directory.join(file)
}

/// Creates the directory, or checks the one that exists.
fn prepare(directory: &Path) -> io::Result<()> {
    match std::fs::create_dir(directory) {
        Ok(()) => {
            let mode = std::fs::Permissions::from_mode(DIRECTORY_MODE);
            std::fs::set_permissions(directory, mode)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => check(directory),
        Err(error) => Err(error),
    }
}

/// Checks that nobody but root and this user can exchange what is in the directory.
fn check(directory: &Path) -> io::Result<()> {
    let metadata = std::fs::symlink_metadata(directory)?;
    let own = geteuid().as_raw();
    let is_trusted = metadata.is_dir()
        && (metadata.uid() == 0 || metadata.uid() == own)
        && metadata.mode() & 0o022 == 0;
    if is_trusted { Ok(()) } else { Err(io::Error::from_raw_os_error(Errno::EPERM as i32)) }
}

/// Removes a socket that refuses connections. Anything else with this name is an error.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err(io::Error::from_raw_os_error(Errno::EEXIST as i32)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    // A full queue of connections answers EAGAIN at once, since the socket does not block.
    let probe = stream_socket()?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED) => match std::fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        },
        Err(Errno::ENOENT) => Ok(()),
        Ok(()) | Err(_) => Err(io::Error::from_raw_os_error(Errno::EADDRINUSE as i32)),
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_stays() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("wireguard");
        let first = open(&directory, "tl0").unwrap();
        let path = directory.join("tl0.sock");
        assert_eq!(std::fs::metadata(&directory).unwrap().mode() & 0o777, DIRECTORY_MODE);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, SOCKET_MODE);
        let error = open(&directory, "tl0").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(remove(&directory, "tl0").unwrap_err().kind(), io::ErrorKind::AddrInUse);
        UnixStream::connect(&path).unwrap();
        drop(first);
        assert!(path.exists(), "the end of a process leaves it");
        let second = open(&directory, "tl0").unwrap();
        UnixStream::connect(&path).unwrap();
        drop(second);
        remove(&directory, "tl0").unwrap();
        assert!(!path.exists());
        remove(&directory, "tl0").unwrap();
    }

    #[test]
    fn a_socket_that_was_shut_down_counts_as_stale() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("wireguard");
        let listener = open(&directory, "tl0").unwrap();
        nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
        remove(&directory, "tl0").unwrap();
        assert!(!directory.join("tl0.sock").exists());
    }

    #[test]
    fn what_is_no_socket_and_what_others_may_write_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("wireguard");
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("tl0.sock"), "mine").unwrap();
        assert_eq!(open(&directory, "tl0").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(remove(&directory, "tl0").is_err());
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(open(&directory, "tl1").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        let missing = root.path().join("missing");
        remove(&missing, "tl0").unwrap();
        std::os::unix::fs::symlink(root.path(), &missing).unwrap();
        assert!(open(&missing, "tl0").is_err(), "a link may lead anywhere");
    }
}
