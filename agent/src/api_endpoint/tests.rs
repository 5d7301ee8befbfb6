//! Tests with servers on the loopback.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet, yield_now};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use towline_service::tls;

use super::*;

/// Longest time that a test waits for one thing.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that answers each byte with its own number, over TLS.
struct Server {
    number: u8,
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(number: u8) -> Self {
        let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            // The connections end with this task.
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(answer(acceptor.clone(), stream, number));
            }
        });
        Self { number, address, task }
    }

    fn as_api_server(&self) -> ApiServer {
        ApiServer {
            node: format!("cp-{}", self.number).parse().unwrap(),
            address: self.address,
            rtt: Some(Duration::from_millis(self.number.into())),
            is_up: true,
        }
    }

    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

async fn answer(acceptor: TlsAcceptor, stream: TcpStream, number: u8) -> io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).await?;
        stream.write_all(&[number]).await?;
        stream.flush().await?;
    }
}

/// Waits until `found` returns something.
async fn wait<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let waiting = async {
        loop {
            match found() {
                Some(found) => return found,
                None => yield_now().await,
            }
        }
    };
    timeout(PATIENCE, waiting).await.expect("it happens in time")
}

/// Starts an endpoint on a free port, and returns its address.
async fn start(servers: &[Server]) -> (ApiEndpoint, SocketAddr) {
    let endpoint = ApiEndpoint::start((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    endpoint.set_servers(servers.iter().map(Server::as_api_server).collect());
    let address = wait(|| endpoint.shared.state.lock().bound).await;
    (endpoint, address)
}

async fn connect(endpoint: SocketAddr) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(endpoint).await?;
    let name = ServerName::IpAddress(endpoint.ip().into());
    TlsConnector::from(check::settings().unwrap()).connect(name, stream).await
}

/// Returns the number of the server at the other end.
async fn ask(stream: &mut TlsStream<TcpStream>) -> io::Result<u8> {
    let mut byte = [0];
    stream.write_all(&byte).await?;
    stream.flush().await?;
    stream.read_exact(&mut byte).await?;
    Ok(byte[0])
}

#[tokio::test]
async fn killing_one_of_three_servers_costs_a_client_at_most_one_retry() {
    let mut servers = vec![Server::start(1).await, Server::start(2).await, Server::start(3).await];
    let (endpoint, address) = start(&servers).await;
    let mut client = connect(address).await.unwrap();
    assert_eq!(ask(&mut client).await.unwrap(), 1, "the nearest one");
    servers.remove(0).kill().await;
    assert!(timeout(PATIENCE, ask(&mut client)).await.unwrap().is_err());
    drop(client);
    // This is the retry.
    let mut client = timeout(PATIENCE, connect(address)).await.unwrap().unwrap();
    assert_eq!(ask(&mut client).await.unwrap(), 2);
    let status = wait(|| {
        let status = endpoint.status();
        (status.server == "cp-2" && status.connections == 1).then_some(status)
    })
    .await;
    assert_eq!(status.refused, 0);
    let dead = status.servers.last().unwrap();
    assert_eq!((dead.name.as_str(), dead.state.as_str()), ("cp-1", "failing"));
    assert_eq!(dead.reason_code, "api-check-refused");
}

#[tokio::test]
async fn a_server_that_is_dead_or_removed_loses_its_connections() {
    let servers = [Server::start(1).await, Server::start(2).await];
    let (endpoint, address) = start(&servers).await;
    let mut first = connect(address).await.unwrap();
    assert_eq!(ask(&mut first).await.unwrap(), 1);
    for _ in 0..2 {
        endpoint.shared.handle_check(servers[0].address, Err(Failure::Silent));
    }
    assert!(timeout(PATIENCE, ask(&mut first)).await.unwrap().is_err());
    let mut second = connect(address).await.unwrap();
    assert_eq!(ask(&mut second).await.unwrap(), 2);
    endpoint.set_servers(vec![servers[0].as_api_server()]);
    assert!(timeout(PATIENCE, ask(&mut second)).await.unwrap().is_err());
    let mut third = connect(address).await.unwrap();
    assert_eq!(ask(&mut third).await.unwrap(), 1, "the last resort, although it is dead");
}

#[tokio::test]
async fn servers_are_checked_while_a_client_is_connected_and_only_then() {
    let servers = [Server::start(1).await, Server::start(2).await];
    let (endpoint, address) = start(&servers).await;
    assert_eq!(endpoint.shared.clients(), 0);
    assert!(endpoint.status().servers.iter().all(|server| server.state == "unchecked"));
    let client = connect(address).await.unwrap();
    let all_healthy = || {
        let status = endpoint.status();
        status.servers.iter().all(|server| server.state == "healthy").then_some(())
    };
    wait(all_healthy).await;
    drop(client);
    wait(|| (endpoint.shared.clients() == 0).then_some(())).await;
}

#[tokio::test]
async fn a_server_without_tls_is_not_healthy() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 16];
        stream.read_exact(&mut buffer).await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        // The bytes of the handshake that were not read must not reset the connection too early.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    });
    let result = check::check(address, check::settings().unwrap()).await;
    assert_eq!(result, Err(Failure::NotTls));
}

#[tokio::test]
async fn a_port_that_another_program_has_is_named_with_its_owner() {
    let other = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let endpoint = ApiEndpoint::start(other.local_addr().unwrap()).unwrap();
    let problem = wait(|| endpoint.problem()).await;
    let line = problem.to_string();
    assert_eq!(problem.code(), "api-endpoint-taken");
    assert!(line.contains(&std::process::id().to_string()), "{line}");
    assert!(!endpoint.status().listening);
}

#[tokio::test]
async fn without_servers_a_client_is_refused_and_the_endpoint_says_so() {
    let (endpoint, address) = start(&[]).await;
    assert_eq!(endpoint.without_servers(), Some(endpoint.shared.address));
    assert!(timeout(PATIENCE, connect(address)).await.unwrap().is_err());
    wait(|| (endpoint.status().refused == 1).then_some(())).await;
}
