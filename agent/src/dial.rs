//! Connection to a controller: TCP with the routing mark, TLS under the pinned CA, one HTTP/2
//! channel.
//!
//! The TLS handshake is done here, before the channel exists, so that a wrong CA or a wrong clock
//! is a separate error with advice. The channel has exactly one connection. When it fails, the
//! caller dials again with its own backoff.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::{CertificateError, ClientConfig, Error as TlsError};
use rustls_pki_types::CertificateDer;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use towline_netlink::Rtnetlink;
use towline_proto::codes;
use towline_proto::token::ControllerAddress;
use towline_service::{grpc, tcp, tls};

/// Maximum time for one address to accept the TCP connection, and for the TLS handshake after that.
const STEP: Duration = Duration::from_secs(5);
/// Delay before the next address of the same name is tried in parallel (RFC 8305).
const STAGGER: Duration = Duration::from_millis(250);

/// Greatest number of addresses of one name that are tried.
const REMOTES: usize = 8;

/// Error of connecting to a controller.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name cannot be resolved.
    #[error("cannot resolve {address}: {source}")]
    Resolve {
        /// Address that was dialled.
        address: ControllerAddress,
        /// Error of the resolver.
        source: io::Error,
    },
    /// No TCP connection could be opened.
    #[error("cannot reach the controller at {address}: {source}")]
    Connect {
        /// Address that was dialled.
        address: ControllerAddress,
        /// Error of the address that failed last.
        source: io::Error,
    },
    /// The controller's certificate is not from the pinned CA.
    #[error(
        "{address} is not this mesh's controller: its certificate is not from the pinned CA: check the address and the token"
    )]
    WrongCa {
        /// Address that was dialled.
        address: ControllerAddress,
    },
    /// The certificate is not valid at this machine's time.
    #[error(
        "the certificate of {address} is not valid at this machine's time: check both clocks, for example with `timedatectl`"
    )]
    Clock {
        /// Address that was dialled.
        address: ControllerAddress,
    },
    /// The TLS handshake failed for another reason.
    #[error("TLS handshake with {address} failed: {source}")]
    Tls {
        /// Address that was dialled.
        address: ControllerAddress,
        /// Error of the handshake.
        source: io::Error,
    },
    /// The HTTP/2 channel could not be opened on the connection.
    #[error("cannot open an HTTP/2 connection to {address}: {source}")]
    Http {
        /// Address that was dialled.
        address: ControllerAddress,
        /// Error of the channel.
        source: tonic::transport::Error,
    },
}

codes! {
    DialError {
        Resolve => "controller-name-unresolved",
        Connect => "controller-unreachable",
        WrongCa => "controller-of-other-mesh",
        Clock => "controller-certificate-not-valid",
        Tls => "controller-tls-failed",
        Http => "controller-http-failed",
    }
}

/// Open connection to a controller.
#[derive(Debug)]
pub struct Connection {
    /// Channel for one or more gRPC clients.
    pub channel: Channel,
    /// Certificate chain of the controller, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Address of the controller.
    pub remote: SocketAddr,
    /// Address of this machine that the connection is bound to.
    pub local: SocketAddr,
}

/// Dials `address`. The socket gets `mark`, so that it bypasses the tunnel. If the kernel refuses
/// that (a join without privileges), the socket has no mark; the tunnel is not up then.
pub async fn dial(
    address: &ControllerAddress,
    config: Arc<ClientConfig>,
    mark: u32,
) -> Result<Connection, DialError> {
    let remotes = resolve(address).await?;
    dial_any(remotes, address, config, mark).await
}

/// Dials those of `remotes`, the addresses of `address`, that accept. See [`dial`].
pub async fn dial_any(
    remotes: Vec<SocketAddr>,
    address: &ControllerAddress,
    config: Arc<ClientConfig>,
    mark: u32,
) -> Result<Connection, DialError> {
    over(connect(remotes, address, mark).await?, address, config).await
}

/// Returns the addresses of a controller, at most [`REMOTES`].
pub async fn resolve(address: &ControllerAddress) -> Result<Vec<SocketAddr>, DialError> {
    let resolve_failed = |source| DialError::Resolve { address: address.clone(), source };
    let resolved = timeout(STEP, tokio::net::lookup_host(address.as_str()))
        .await
        .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
        .map_err(resolve_failed)?;
    Ok(resolved.take(REMOTES).collect())
}

/// Opens TLS and HTTP/2 on a connection to `address`.
pub async fn over(
    tcp: TcpStream,
    address: &ControllerAddress,
    config: Arc<ClientConfig>,
) -> Result<Connection, DialError> {
    let failed = |source| tls_error(address, source);
    let remote = tcp.peer_addr().map_err(failed)?;
    let local = tcp.local_addr().map_err(failed)?;
    let stream = timeout(STEP, TlsConnector::from(config).connect(tls::server_name(), tcp))
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer")))
        .map_err(failed)?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let chain = chain.iter().map(|cert| cert.clone().into_owned()).collect();
    let endpoint = Endpoint::from_static("http://controller")
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10));
    let channel = grpc::channel(endpoint, stream)
        .await
        .map_err(|source| DialError::Http { address: address.clone(), source })?;
    Ok(Connection { channel, chain, remote, local })
}

/// Returns true if this machine no longer has an address. A connection that is bound to it is dead, but
/// the kernel keeps it and sends into the void.
pub fn is_gone(address: IpAddr) -> bool {
    match std::net::UdpSocket::bind(SocketAddr::new(address, 0)) {
        Ok(_) => binds_to_any(address) && !address.is_loopback() && !is_listed(address),
        Err(error) => error.kind() == io::ErrorKind::AddrNotAvailable,
    }
}

/// Returns true if programs of this machine may bind to addresses that it does not have, which keepalived and
/// HAProxy ask for (`ip_nonlocal_bind`).
fn binds_to_any(address: IpAddr) -> bool {
    let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
    let setting = std::fs::read_to_string(format!("/proc/sys/net/{family}/ip_nonlocal_bind"));
    setting.is_ok_and(|setting| setting.trim() != "0")
}

/// Returns true if a link of this machine has the address, and if the addresses cannot be read.
fn is_listed(address: IpAddr) -> bool {
    let listed = Rtnetlink::open().and_then(|mut netlink| netlink.addresses(None));
    listed.map_or(true, |listed| listed.iter().any(|known| known.prefix.addr() == address))
}

/// Opens a TCP connection to the first of `remotes` that accepts.
async fn connect(
    remotes: Vec<SocketAddr>,
    address: &ControllerAddress,
    mark: u32,
) -> Result<TcpStream, DialError> {
    let mut attempts = JoinSet::new();
    for (index, remote) in remotes.into_iter().enumerate() {
        let head_start = STAGGER.saturating_mul(u32::try_from(index).unwrap_or(u32::MAX));
        attempts.spawn(async move {
            tokio::time::sleep(head_start).await;
            timeout(STEP, connect_one(remote, mark))
                .await
                .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
        });
    }
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    while let Some(result) = attempts.join_next().await {
        match result {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(join) => last = io::Error::other(join),
        }
    }
    Err(DialError::Connect { address: address.clone(), source: last })
}

/// Opens a TCP connection with the routing mark, or without it if that is not permitted.
async fn connect_one(remote: SocketAddr, mark: u32) -> io::Result<TcpStream> {
    let socket = if remote.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    match socket2::SockRef::from(&socket).set_mark(mark) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::debug!(%remote, "no CAP_NET_ADMIN: connection without a mark");
        }
        Err(error) => return Err(error),
    }
    socket.set_nodelay(true)?;
    tcp::keep_alive(&socket)?;
    socket.connect(remote).await
}

/// Converts an error of the handshake to one that names the likely cause.
fn tls_error(address: &ControllerAddress, source: io::Error) -> DialError {
    let address = address.clone();
    let tls = source.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>());
    match tls {
        Some(TlsError::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        )) => DialError::Clock { address },
        Some(TlsError::InvalidCertificate(_)) => DialError::WrongCa { address },
        _ => DialError::Tls { address, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_netlink::AddressOptions;
    use towline_netns::{add_link, namespace_test};

    namespace_test! {
        fn an_address_is_gone_although_any_can_be_bound() {
            let link = add_link("eth0");
            let options = AddressOptions { no_dad: true, no_prefix_route: false };
            for (family, prefix, other) in
                [("ipv4", "192.0.2.1/24", "192.0.2.7"), ("ipv6", "2001:db8::1/64", "2001:db8::7")]
            {
                let prefix: ipnet::IpNet = prefix.parse().unwrap();
                Rtnetlink::open().unwrap().add_address(link, prefix, options).unwrap();
                for nonlocal in ["0", "1"] {
                    std::fs::write(format!("/proc/sys/net/{family}/ip_nonlocal_bind"), nonlocal).unwrap();
                    assert!(!is_gone(prefix.addr()), "{prefix}, ip_nonlocal_bind {nonlocal}");
                    assert!(is_gone(other.parse().unwrap()), "{other}, ip_nonlocal_bind {nonlocal}");
                }
            }
        }
    }
}
