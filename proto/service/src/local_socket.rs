//! Who may use a program's local socket: root and the user of the program.
//!
//! The mode of the socket's file keeps others out. The credentials that the kernel has of a connection's peer are checked
//! all the same, since the file is open to others for a moment after it was created.

use nix::unistd::geteuid;
use tokio::net::UnixStream;

/// Returns whether the peer of a connection may use the socket. A peer that may not is logged.
pub fn is_allowed(stream: &UnixStream) -> bool {
    match stream.peer_cred() {
        Ok(peer) if is_allowed_user(peer.uid()) => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "local connection refused");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "local connection without credentials refused");
            false
        }
    }
}

/// Returns whether a user may use the socket.
pub fn is_allowed_user(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn root_and_the_own_user_are_allowed_and_nobody_else_is() {
        let own = geteuid().as_raw();
        assert!(is_allowed_user(0) && is_allowed_user(own));
        assert!(!is_allowed_user(own + 1));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(is_allowed(&ours));
    }
}
