//! The local socket, by which the operator of the controller's machine administers the mesh.
//!
//! It is in the state directory, which only the controller's user and root can enter. Each connection is
//! checked by the credentials that the kernel has of its peer
//! ([`local_socket`](towline_service::local_socket)), so no certificate is needed.

use std::io;
use std::os::unix::fs::PermissionsExt;

use tokio::net::UnixListener;

use crate::state_dir::StateDir;

/// Name of the socket in the state directory.
pub const SOCKET: &str = "admin.sock";

/// Binds the socket. Replaces one that a killed controller left behind: the state directory is locked, so no
/// other controller serves it.
pub fn listen(dir: &StateDir) -> io::Result<UnixListener> {
    let path = dir.file(SOCKET);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
