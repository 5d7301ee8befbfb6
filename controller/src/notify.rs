//! What the controller tells its service manager (sd_notify(3)): that it serves, that it ends.
//!
//! A datagram to the socket that `NOTIFY_SOCKET` names; without it nothing is sent.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// What a service manager may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Who connects from here on is served.
    Ready,
    /// The end has begun.
    Stopping,
}

/// Sends the message to the service manager, if there is one. One that does not listen is no
/// reason to stop.
pub fn notify(message: Message) {
    let Ok(path) = std::env::var("NOTIFY_SOCKET") else { return };
    let text = match message {
        Message::Ready => "READY=1",
        Message::Stopping => "STOPPING=1",
    };
    if let Err(error) = send(&path, text) {
        tracing::debug!(%error, "service manager not told");
    }
}

/// To a path, or to a name in the abstract namespace after `@`.
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
