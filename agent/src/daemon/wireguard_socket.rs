//! The server of `wg show`: WireGuard's userspace interface at `/run/wireguard/LINK.sock`, see
//! [`uapi`](crate::uapi).
//!
//! The agent opens the socket itself where it may write the directory (as root), and otherwise asks the root
//! helper for it. Only root and the agent's user are answered. A connection has one request, a bounded time and
//! a bounded size; the number of connections is bounded too. If the socket cannot be opened, `towline status`
//! has a note, and everything else works.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use towline_helper::client;
use towline_helper::protocol::{Request as HelperRequest, TunnelLink};
use towline_helper::wireguard_socket::{self, DIRECTORY};
use towline_proto::codes;
use towline_service::local_socket;
use zeroize::Zeroizing;

use crate::control::{Request, Requests};
use crate::uapi::{Operation, Progress, Refusal, RequestParser};

/// Longest duration of a connection.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Largest number of connections at the same time; further ones are closed at once.
const CONNECTIONS: usize = 8;
/// Pause after an attempt to open the socket that failed.
const RETRY: Duration = Duration::from_secs(60);
/// Pause after a connection that could not be accepted: the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Reason why `wg show` shows nothing of this agent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotServed {
    /// Another program serves the socket of this name.
    #[error(
        "`wg show {link}` does not show this agent, and the mesh works without it: another program serves \
         /run/wireguard/{link}.sock: to use `wg`, stop that program, or else set [wireguard] uapi = false"
    )]
    Taken {
        /// Name of the link.
        link: String,
    },
    /// The socket cannot be opened.
    #[error(
        "cannot answer `wg show {link}`: {reason}: start towline-helper.socket, or set [wireguard] uapi = \
         false"
    )]
    NotOpened {
        /// Name of the link.
        link: String,
        /// Error of opening the socket.
        reason: String,
    },
}

codes! {
    NotServed {
        Taken => "wireguard-socket-taken",
        NotOpened => "wireguard-socket-not-opened",
    }
}

/// The socket of this agent's link, and the task that serves it.
#[derive(Debug)]
pub(super) struct WireguardSocket {
    link: String,
    task: JoinHandle<()>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    problem: Option<NotServed>,
    /// Duplicate of the listening socket, for closing it at once; `None` while it is not open.
    listener: Option<OwnedFd>,
    is_closed: bool,
}

impl WireguardSocket {
    /// Starts to serve the socket of `link`, which must exist.
    pub(super) fn start(link: &str, requests: Requests) -> Self {
        let shared = Arc::<Mutex<Shared>>::default();
        let task = tokio::spawn(run(link.to_owned(), shared.clone(), requests));
        Self { link: link.to_owned(), task, shared }
    }

    /// Returns the reason why the socket is not served.
    pub(super) fn problem(&self) -> Option<NotServed> {
        self.shared.lock().problem.clone()
    }

    /// Closes the socket and removes it. Must be called while the link exists, because the helper removes the
    /// socket of a link that belongs to this user. A socket that stays refuses connections; `wg` and the next
    /// start of the agent remove it.
    pub(super) fn close(&self) {
        self.task.abort();
        let listener = {
            let mut shared = self.shared.lock();
            shared.is_closed = true;
            shared.listener.take()
        };
        let Some(listener) = listener else { return };
        // The aborted task still holds the socket. From now on it refuses connections.
        if let Err(error) = shutdown(listener.as_raw_fd(), Shutdown::Both) {
            tracing::debug!(%error, "socket of wg show not shut down");
        }
        if let Err(error) = remove(&self.link) {
            tracing::debug!(%error, link = %self.link, "socket of wg show not removed");
        }
    }
}

/// Opens the socket, as often as it takes, and serves it.
async fn run(link: String, shared: Arc<Mutex<Shared>>, requests: Requests) {
    let listener = loop {
        match open_and_keep(&link, &shared).await {
            Ok(listener) => break listener,
            Err(error) => {
                let taken = error.kind() == io::ErrorKind::AddrInUse;
                let problem = if taken {
                    NotServed::Taken { link: link.clone() }
                } else {
                    NotServed::NotOpened { link: link.clone(), reason: error.to_string() }
                };
                let mut shared = shared.lock();
                if shared.problem.as_ref() != Some(&problem) {
                    tracing::info!(%problem, "wg show is not answered");
                    shared.problem = Some(problem);
                }
            }
        }
        sleep(RETRY).await;
    };
    shared.lock().problem = None;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection of wg show");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if !local_socket::is_allowed(&stream) {
            continue;
        }
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let requests = requests.clone();
        tokio::spawn(async move {
            // The client may be gone, or too slow: both end the connection.
            let _ = timeout(TIMEOUT, answer(stream, &requests)).await;
            drop(place);
        });
    }
}

/// Opens the socket in a blocking thread, because the helper may take seconds to answer. A socket that is
/// opened after the end is removed again.
async fn open_and_keep(link: &str, shared: &Arc<Mutex<Shared>>) -> io::Result<UnixListener> {
    let (link, shared) = (link.to_owned(), shared.clone());
    let opening = tokio::task::spawn_blocking(move || {
        let listener = open(&link)?;
        let duplicate = listener.try_clone()?;
        let mut shared = shared.lock();
        if shared.is_closed {
            drop(shared);
            drop((listener, duplicate));
            remove(&link)?;
            return Err(io::Error::from(io::ErrorKind::Interrupted));
        }
        shared.listener = Some(duplicate);
        Ok(listener)
    });
    let listener =
        std::os::unix::net::UnixListener::from(opening.await.map_err(io::Error::other)??);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

fn open(link: &str) -> io::Result<OwnedFd> {
    match wireguard_socket::open(Path::new(DIRECTORY), link) {
        Err(error) if is_not_allowed(&error) => {
            client::ask_for_one(HelperRequest::WireguardSocket(tunnel(link)?))
        }
        opened => opened,
    }
}

fn remove(link: &str) -> io::Result<()> {
    match wireguard_socket::remove(Path::new(DIRECTORY), link) {
        Err(error) if is_not_allowed(&error) => {
            client::ask(HelperRequest::RemoveWireguardSocket(tunnel(link)?)).map(drop)
        }
        removed => removed,
    }
}

/// Returns whether root may be able to do what this user cannot. A socket that exists and cannot be connected
/// to (it is root's) looks served to this user.
fn is_not_allowed(error: &io::Error) -> bool {
    nix::unistd::geteuid().as_raw() != 0
        && matches!(
            error.kind(),
            io::ErrorKind::PermissionDenied
                | io::ErrorKind::ReadOnlyFilesystem
                | io::ErrorKind::NotFound
                | io::ErrorKind::AddrInUse
        )
}

fn tunnel(link: &str) -> io::Result<TunnelLink> {
    let index = nix::net::if_::if_nametoindex(link)?;
    TunnelLink::here(index)?.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Answers the request of a connection.
async fn answer(mut stream: UnixStream, requests: &Requests) -> io::Result<()> {
    let mut parser = RequestParser::default();
    // A request of `wg set` may have a private key.
    let mut buffer = Zeroizing::new([0_u8; 4096]);
    let operation = loop {
        let length = stream.read(&mut buffer[..]).await?;
        if length == 0 {
            return Ok(());
        }
        match parser.feed(&buffer[..length]) {
            Progress::More => {}
            Progress::Done(operation) => break Some(operation),
            Progress::Invalid => break None,
        }
    };
    let answer = match operation {
        Some(Operation::Get) => match requests.ask(Request::Device).await {
            Some(device) => device.answer(),
            None => Refusal::Busy.answer(),
        },
        Some(Operation::Set) => Refusal::ReadOnly.answer(),
        None => Refusal::Malformed.answer(),
    };
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::uapi::Device;

    async fn exchange(request: &[u8]) -> String {
        let (daemon, mut queue) = mpsc::channel(1);
        let requests = Requests::of(&daemon);
        let (mut client, server) = UnixStream::pair().unwrap();
        let serving = tokio::spawn(async move { answer(server, &requests).await });
        let answering = tokio::spawn(async move {
            if let Some(Request::Device(reply)) = queue.recv().await {
                let _ = reply.send(Device { listen_port: 7, ..Device::default() });
            }
        });
        client.write_all(request).await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        serving.await.unwrap().unwrap();
        answering.abort();
        drop(daemon);
        text
    }

    #[tokio::test]
    async fn a_device_is_shown_and_not_changed() {
        assert_eq!(exchange(b"get=1\n\n").await, "listen_port=7\nfwmark=0\nerrno=0\n\n");
        assert_eq!(exchange(b"set=1\nfwmark=1\n\n").await, "errno=-1\n\n");
        assert_eq!(exchange(b"what?\n").await, "errno=-22\n\n");
    }
}
