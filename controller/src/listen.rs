//! TCP connections: accepting them, their TLS handshakes, and limits on their number.
//!
//! - A handshake must end within [`HANDSHAKE`]. The number of concurrent handshakes is limited, in
//!   total and per source ([`HANDSHAKES`]). Beyond the limit the oldest one of the source with the most
//!   ends, so that clients that keep handshakes open do not make others wait.
//! - Handshakes run on threads of their own ([`Handshakes`]): the signatures of a storm of nodes take no time from the
//!   threads that serve watches.
//! - A connection of a client that is neither a node of the mesh nor an administrator (a joining node, a
//!   removed one, or any stranger) is closed after [`STRANGER_LIFE`]. Their number is limited in total and per source
//!   ([`STRANGERS`]), so that strangers cannot take the places of nodes. Nodes whose certificate has
//!   expired have places of their own ([`EXPIRED`]): after a long outage they all come at once.
//! - A node has at most [`NODES`]`.1` connections: the newest ones.
//! - The kernel probes every connection, and ends one whose peer is gone ([`tcp::keep_alive`]).
//! - Invalid input closes the connection, which is logged at debug, and has no other effect.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use towline_proto::id::NodeId;
use towline_proto::limits;
use towline_proto::source_limiter::source;
use towline_service::tcp;

use crate::peer::Peer;
use crate::slots::{Slot, Slots};

/// Longest duration of a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Largest number of concurrent handshakes: in total, and per source.
const HANDSHAKES: (usize, usize) = (1024, 128);
/// Largest number of threads for handshakes.
const MOST_THREADS: usize = 4;
/// Longest lifetime of a connection of a stranger, or of a node whose certificate has expired.
pub const STRANGER_LIFE: Duration = Duration::from_secs(60);
/// Largest number of connections of strangers: in total, and per source.
const STRANGERS: (usize, usize) = (1024, 128);
/// Largest number of connections of nodes whose certificate has expired: in total, and per node.
const EXPIRED: (usize, usize) = (1024, 1);
/// Largest number of connections of nodes: in total, and per node. Each node has one, and another
/// one while it reconnects.
const NODES: (usize, usize) = (2 * limits::NODES, 3);
/// Largest number of connections of administrators: in total, and per source.
const ADMINS: (usize, usize) = (256, 64);

/// A connection whose TLS handshake is complete.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    info: ConnectionInfo,
    /// Longest duration of the connection of a stranger or of a node whose certificate has expired, until the timer
    /// runs; `None` for all others.
    life: Option<Duration>,
    /// Timer that ends such a connection. It starts with the first read, so that it belongs to the runtime that
    /// serves the connection.
    end: Option<Pin<Box<Sleep>>>,
    slot: Slot<Holder>,
}

/// Address and identity of the client, an extension of each request on the connection.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// Source address of the connection.
    pub address: SocketAddr,
    /// Identity in the client's certificate, if it presented one that has an identity.
    pub peer: Option<Arc<PresentedPeer>>,
}

/// Identity in a client's certificate, and the end of its validity.
#[derive(Debug)]
pub struct PresentedPeer {
    /// Identity of the client.
    pub peer: Peer,
    /// End of the certificate's validity, in seconds since 1970. A connection outlives it, so each request is
    /// compared with it.
    pub expires_at: i64,
}

impl PresentedPeer {
    /// Returns whether the certificate has expired at `now`, in seconds since 1970.
    pub fn is_expired(&self, now: i64) -> bool {
        self.expires_at < now
    }
}

/// Listens on `address`. The address `[::]` means all addresses of both families, or all IPv4
/// addresses on a machine without IPv6.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match bind_one(address) {
        Err(error)
            if address.ip() == Ipv6Addr::UNSPECIFIED
                && matches!(
                    error.raw_os_error(),
                    Some(nix::libc::EAFNOSUPPORT | nix::libc::EADDRNOTAVAIL)
                ) =>
        {
            bind_one((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        result => result,
    }
}

fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // After a restart the port must not stay in use by old connections in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    if address.ip() == Ipv6Addr::UNSPECIFIED {
        setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
    }
    socket.bind(address)?;
    socket.listen(1024)
}

/// Accepts connections until the receiver of `connections` is dropped. `standing` returns the kind of a
/// client by its certificate and the map. Handshakes run on `handshakes`.
pub async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connections: mpsc::Sender<io::Result<Connection>>,
    places: Places,
    standing: impl Fn(&PresentedPeer) -> Standing + Clone + Send + 'static,
    handshakes: Handle,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = connections.closed() => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Most likely the process is out of file descriptors; others will be closed.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let mut place = places.handshakes.take(Holder::Source(source(address.ip())));
        let (acceptor, places, connections, standing) =
            (acceptor.clone(), places.clone(), connections.clone(), standing.clone());
        handshakes.spawn(async move {
            let shaken =
                timeout(HANDSHAKE, handshake(stream, address, acceptor, &places, standing));
            let shaken = tokio::select! {
                shaken = shaken => shaken,
                () = poll_fn(|cx| place.poll_ended(cx)) => {
                    tracing::debug!(%address, "connection closed: too many handshakes");
                    return;
                }
            };
            match shaken {
                Ok(Ok(connection)) => drop(connections.send(Ok(connection)).await),
                Ok(Err(error)) => tracing::debug!(%address, %error, "handshake failed"),
                Err(_) => tracing::debug!(%address, "handshake timed out"),
            }
            drop(place);
        });
    }
}

/// Threads that run the TLS handshakes. They end when this is dropped.
pub struct Handshakes {
    /// Runtime of the threads, until it is dropped.
    runtime: Option<Runtime>,
    handle: Handle,
}

impl Handshakes {
    /// Starts the threads: one for each two processors.
    pub fn start() -> io::Result<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let runtime = Builder::new_multi_thread()
            .worker_threads((processors / 2).clamp(1, MOST_THREADS))
            .thread_name("handshakes")
            // The sockets belong to the runtime that accepted them.
            .enable_time()
            .build()?;
        let handle = runtime.handle().clone();
        Ok(Self { runtime: Some(runtime), handle })
    }

    /// Returns the handle with which handshakes are started.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Drop for Handshakes {
    fn drop(&mut self) {
        // Waiting for the threads is not possible in a task of another runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Kind of a client, by its certificate and the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The client is a node of the mesh.
    Node(NodeId),
    /// The client is a node of the mesh whose certificate has expired: it may renew it.
    Expired(NodeId),
    /// The client is an administrator.
    Admin,
    /// The client has no certificate, or one of a removed or unknown node.
    Stranger,
}

/// Who holds a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Holder {
    /// An IPv4 address or an IPv6 /64.
    Source(IpAddr),
    /// A node.
    Node(NodeId),
}

/// Places of the connections by kind, which limit their number.
#[derive(Clone)]
pub struct Places {
    handshakes: Arc<Slots<Holder>>,
    strangers: Arc<Slots<Holder>>,
    expired: Arc<Slots<Holder>>,
    nodes: Arc<Slots<Holder>>,
    admins: Arc<Slots<Holder>>,
}

impl Places {
    /// Creates places without connections.
    pub(crate) fn new() -> Self {
        Self {
            handshakes: Slots::new(HANDSHAKES),
            strangers: Slots::new(STRANGERS),
            expired: Slots::new(EXPIRED),
            nodes: Slots::new(NODES),
            admins: Slots::new(ADMINS),
        }
    }

    /// Returns the number of connections by kind.
    pub fn counts(&self) -> [(&'static str, usize); 5] {
        [
            ("handshake", self.handshakes.taken()),
            ("node", self.nodes.taken()),
            ("expired", self.expired.taken()),
            ("admin", self.admins.taken()),
            ("stranger", self.strangers.taken()),
        ]
    }

    /// Takes a slot for a connection, and returns how long the connection may last.
    fn take(&self, standing: Standing, source: IpAddr) -> (Slot<Holder>, Option<Duration>) {
        let source = Holder::Source(source);
        match standing {
            Standing::Node(node) => (self.nodes.take(Holder::Node(node)), None),
            Standing::Expired(node) => (self.expired.take(Holder::Node(node)), Some(STRANGER_LIFE)),
            Standing::Admin => (self.admins.take(source), None),
            Standing::Stranger => (self.strangers.take(source), Some(STRANGER_LIFE)),
        }
    }
}

async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    places: &Places,
    standing: impl Fn(&PresentedPeer) -> Standing,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    tcp::keep_alive(&stream)?;
    let stream = acceptor.accept(stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let peer = certificate.and_then(|der| {
        let expires_at = crate::peer::expires_at(der)?;
        Some(PresentedPeer { peer: Peer::from_certificate(der)?, expires_at })
    });
    let kind = peer.as_ref().map_or(Standing::Stranger, standing);
    let (slot, life) = places.take(kind, source(address.ip()));
    let peer = peer.map(Arc::new);
    Ok(Connection { stream, info: ConnectionInfo { address, peer }, life, end: None, slot })
}

impl Connected for Connection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.info.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(life) = self.life.take() {
            self.end = Some(Box::pin(sleep(life)));
        }
        if let Some(end) = &mut self.end
            && end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if self.slot.poll_ended(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
