//! TCP connections: accepting them, their TLS handshakes, and limits on their number.
//!
//! - A handshake must end within [`HANDSHAKE`]. The number of concurrent handshakes is limited, in
//!   total and per source ([`HANDSHAKES`]). Connections beyond the limit are closed at once, so
//!   that clients that keep handshakes open do not make others wait.
//! - A connection without a client certificate (a joining node, or any stranger) is closed after
//!   [`STRANGER_LIFE`]. Their number is limited in total and per source ([`STRANGERS`]), so that
//!   strangers cannot take the places of nodes.
//! - The kernel probes every connection, so that one whose peer is gone ends within 15 s, or within 30 s
//!   if data was sent in the meantime: it does not probe while data is unacknowledged.
//! - Invalid input closes the connection, which is logged at debug, and has no other effect.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use towline_proto::limits;
use towline_proto::source_limiter::source;

use crate::peer::Peer;

/// Longest duration of a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Largest number of concurrent handshakes: in total, and per source.
const HANDSHAKES: (usize, usize) = (1024, 128);
/// TCP keepalive of every connection, in seconds: idle time before the first probe, interval between
/// probes, and their number. The kernel ends a connection whose peer is gone after 5 + 3 * 3 = 14 s,
/// without work for this process.
const KEEPALIVE: (u32, u32, u32) = (5, 3, 3);
/// Time in milliseconds after which the kernel ends a connection that has unacknowledged data.
const UNACKNOWLEDGED_MS: u32 = 14_000;
/// Longest lifetime of a connection without a client certificate.
pub const STRANGER_LIFE: Duration = Duration::from_secs(60);
/// Largest number of connections without a client certificate: in total, and per source.
const STRANGERS: (usize, usize) = (1024, 128);
/// Largest number of connections with a client certificate: in total, and per source. Each node
/// has one, and a second one while it reconnects. All nodes may be behind one NAT.
const MEMBERS: (usize, usize) = (2 * limits::NODES, 2 * limits::NODES);

/// A connection whose TLS handshake is complete.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    info: ConnectionInfo,
    /// Timer that ends a connection without a client certificate; `None` for all others.
    end: Option<Pin<Box<Sleep>>>,
    _permit: ConnectionPermit,
}

/// Address and identity of the client, an extension of each request on the connection.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// Source address of the connection.
    pub address: SocketAddr,
    /// Identity in the client's certificate, if it presented one that has an identity.
    pub peer: Option<Arc<PresentedPeer>>,
}

/// Identity in a client's certificate, and whether the certificate had expired.
#[derive(Debug)]
pub struct PresentedPeer {
    /// Identity of the client.
    pub peer: Peer,
    /// True if the certificate had already expired during the handshake.
    pub expired: bool,
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

/// Accepts connections until the receiver of `connections` is dropped.
pub async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connections: mpsc::Sender<io::Result<Connection>>,
    now: fn() -> i64,
) {
    let places = Places {
        handshakes: Places::of(HANDSHAKES),
        strangers: Places::of(STRANGERS),
        members: Places::of(MEMBERS),
    };
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
        let Some(place) = places.handshakes.take(address.ip()) else {
            tracing::debug!(%address, "connection closed: too many handshakes");
            continue;
        };
        let (acceptor, places, connections) =
            (acceptor.clone(), places.clone(), connections.clone());
        tokio::spawn(async move {
            match timeout(HANDSHAKE, handshake(stream, address, acceptor, &places, now)).await {
                Ok(Ok(connection)) => drop(connections.send(Ok(connection)).await),
                Ok(Err(error)) => tracing::debug!(%address, %error, "handshake failed"),
                Err(_) => tracing::debug!(%address, "handshake timed out"),
            }
            drop(place);
        });
    }
}

#[derive(Clone)]
struct Places {
    handshakes: Arc<Bound>,
    strangers: Arc<Bound>,
    members: Arc<Bound>,
}

impl Places {
    fn of((at_once, from_one_source): (usize, usize)) -> Arc<Bound> {
        Arc::new(Bound { at_once, from_one_source, taken: Mutex::default() })
    }
}

/// Limit on the number of connections, in total and per source.
struct Bound {
    at_once: usize,
    from_one_source: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    all: usize,
    by_source: HashMap<IpAddr, usize>,
}

impl Bound {
    /// Takes a place for a source. Returns `None` if a limit is reached. The place is returned on
    /// drop.
    fn take(self: &Arc<Self>, address: IpAddr) -> Option<ConnectionPermit> {
        let source = source(address);
        let mut taken = self.taken.lock();
        let here = taken.by_source.get(&source).copied().unwrap_or(0);
        if taken.all >= self.at_once || here >= self.from_one_source {
            return None;
        }
        taken.all += 1;
        taken.by_source.insert(source, here + 1);
        drop(taken);
        Some(ConnectionPermit { bound: self.clone(), source })
    }
}

/// A place that counts against a [`Bound`] until it is dropped.
struct ConnectionPermit {
    bound: Arc<Bound>,
    source: IpAddr,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut taken = self.bound.taken.lock();
        taken.all -= 1;
        if let Entry::Occupied(mut count) = taken.by_source.entry(self.source) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    places: &Places,
    now: fn() -> i64,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    keep_alive(&stream)?;
    let stream = acceptor.accept(stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let peer = certificate.and_then(|der| Peer::from_certificate(der).map(|peer| (peer, der)));
    let peer = peer.map(|(peer, der)| {
        Arc::new(PresentedPeer { peer, expired: crate::peer::is_expired(der, now()) })
    });
    let places = if peer.is_some() { &places.members } else { &places.strangers };
    let place =
        places.take(address.ip()).ok_or_else(|| io::Error::other("too many connections"))?;
    let end = peer.is_none().then(|| Box::pin(sleep(STRANGER_LIFE)));
    Ok(Connection { stream, info: ConnectionInfo { address, peer }, end, _permit: place })
}

/// Lets the kernel notice a peer that is gone.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    let (idle, interval, count) = KEEPALIVE;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &idle)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &interval)?;
    setsockopt(stream, sockopt::TcpKeepCount, &count)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS)?;
    Ok(())
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
        if let Some(end) = &mut self.end
            && end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_cannot_take_every_place_and_places_come_back() {
        let bound = Places::of((3, 2));
        let (a, b) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let first = bound.take(a).unwrap();
        let second = bound.take(a).unwrap();
        assert!(bound.take(a).is_none());
        let third = bound.take(b).unwrap();
        assert!(bound.take(b).is_none(), "no place is left");
        drop(first);
        assert!(bound.take(b).is_some());
        drop((second, third));
        assert!(bound.taken.lock().by_source.is_empty());
    }
}
