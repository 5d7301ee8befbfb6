//! Notifications to the service manager (sd_notify(3)): ready and stopping.
//!
//! A notification is a datagram to the socket that `NOTIFY_SOCKET` names. If the variable is not
//! set, nothing is sent.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// A notification to the service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// The controller serves requests from now on.
    Ready,
    /// The controller has begun to stop.
    Stopping,
}

/// Sends the message to the service manager, if there is one. A failure is only logged: the
/// controller also works without a service manager.
pub fn notify(message: Message) {
    let Ok(path) = std::env::var("NOTIFY_SOCKET") else { return };
    let text = match message {
        Message::Ready => "READY=1",
        Message::Stopping => "STOPPING=1",
    };
    if let Err(error) = send(&path, text) {
        tracing::debug!(%error, "cannot notify the service manager");
    }
}

/// Sends a datagram to a socket: a path, or `@` and a name in the abstract namespace.
fn send(path: &str, text: &str) -> std::io::Result<()> {
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(text.as_bytes(), &address)?;
    Ok(())
}
