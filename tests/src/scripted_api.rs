//! A Kubernetes API server whose behaviour a test scripts. It serves real TLS and real HTTP, so
//! that the client under test is the one that ships. It serves Nodes, and authorizes as the node
//! authorizer does: a node may read its own Node, named by a field selector, and no other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context as _;
use parking_lot::Mutex;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::cluster::{ClusterCa, Pair};

/// How the server treats requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Requests are served as a real API server serves them.
    Proper,
    /// Every request gets this HTTP status.
    Refuses(u16),
    /// Every connection is closed once a watch has started.
    Flaps,
    /// No connection is accepted, and existing connections are closed.
    Away,
}

/// A running API server. Dropping it closes every connection.
#[derive(Debug)]
pub struct ScriptedApi {
    /// URL of the server: `https://ADDRESS`.
    pub url: String,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct State {
    nodes: Mutex<BTreeMap<String, Value>>,
    /// Resource version and manner. Every watch is notified when one of them changes.
    now: watch::Sender<(u64, Manner)>,
    /// User names of the requests, in order.
    users: Mutex<Vec<String>>,
}

impl ScriptedApi {
    /// Starts a server on the loopback, with a certificate from `ca`.
    pub async fn start(ca: &ClusterCa) -> anyhow::Result<Self> {
        Self::start_as(ca, &ca.issue(OWN_NAME, "", &[OWN_ADDRESS])?).await
    }

    /// Starts a server whose certificate from `ca` is valid for one day from `from`.
    pub async fn start_valid_from(ca: &ClusterCa, from: SystemTime) -> anyhow::Result<Self> {
        Self::start_as(ca, &ca.issue_from(from, OWN_NAME, "", &[OWN_ADDRESS])?).await
    }

    async fn start_as(ca: &ClusterCa, own: &Pair) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((OWN_ADDRESS, 0)).await?;
        let address: SocketAddr = listener.local_addr()?;
        let acceptor = acceptor(ca, own)?;
        let state = Arc::new(State {
            nodes: Mutex::default(),
            now: watch::channel((1, Manner::Proper)).0,
            users: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        let serving = Arc::clone(&state);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                if serving.now.borrow().1 == Manner::Away {
                    continue;
                }
                let (state, acceptor) = (Arc::clone(&serving), acceptor.clone());
                connections.spawn(async move {
                    let mut away = state.now.subscribe();
                    tokio::select! {
                        // A failed connection concerns only that client.
                        _ = connection(&state, acceptor, stream) => {}
                        _ = away.wait_for(|(_, manner)| *manner == Manner::Away) => {}
                    }
                });
            }
        });
        Ok(Self { url: format!("https://{address}"), state, _tasks: tasks })
    }

    /// Sets a Node, with its internal address and its pod networks.
    pub fn node(&self, name: &str, ip: &str, pods: &[&str]) {
        self.labelled_node(name, ip, pods, &[]);
    }

    /// Creates or replaces a Node that has labels.
    pub fn labelled_node(&self, name: &str, ip: &str, pods: &[&str], labels: &[(&str, &str)]) {
        let labels: BTreeMap<&str, &str> = labels.iter().copied().collect();
        let version = self.state.now.borrow().0 + 1;
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "resourceVersion": version.to_string(), "labels": labels},
            "spec": {"podCIDRs": pods},
            "status": {"addresses": [{"type": "InternalIP", "address": ip}]},
        });
        self.state.nodes.lock().insert(name.to_owned(), node);
        self.state.now.send_modify(|now| now.0 = version);
    }

    /// Changes how requests are treated from now on.
    pub fn behave(&self, manner: Manner) {
        self.state.now.send_modify(|now| now.1 = manner);
    }

    /// Returns the user names of all requests so far, in order.
    pub fn users(&self) -> Vec<String> {
        self.state.users.lock().clone()
    }
}

const OWN_NAME: &str = "kube-apiserver";
const OWN_ADDRESS: &str = "127.0.0.1";
/// Path at which a client asks for its own user name.
const REVIEWS: &str = "/apis/authentication.k8s.io/v1/selfsubjectreviews";

fn acceptor(ca: &ClusterCa, own: &Pair) -> anyhow::Result<TlsAcceptor> {
    let chain = vec![CertificateDer::from_pem_slice(own.certificate.as_bytes())?];
    let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes())?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()?;
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

type Stream = TlsStream<TcpStream>;

async fn connection(state: &State, acceptor: TlsAcceptor, stream: TcpStream) -> anyhow::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let user = user(&stream).context("the client has no certificate")?;
    while let Some(target) = request(&mut stream).await? {
        state.users.lock().push(user.clone());
        let manner = state.now.borrow().1;
        let selector = target.split_once("metadata.name%3D").map(|(_, rest)| rest);
        let name = selector.and_then(|rest| rest.split('&').next()).unwrap_or_default();
        let own = user.strip_prefix("system:node:").is_some_and(|node| node == name);
        if let Manner::Refuses(code) = manner {
            answer(&mut stream, code, &status(code)).await?;
        } else if target.split('?').next() == Some(REVIEWS) {
            let review = json!({
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "SelfSubjectReview",
                "metadata": {},
                "status": {"userInfo": {"username": user}},
            });
            answer(&mut stream, 201, &review).await?;
        } else if !own || !target.starts_with("/api/v1/nodes?") {
            answer(&mut stream, 403, &status(403)).await?;
        } else if target.contains("watch=") {
            if manner == Manner::Flaps {
                return Ok(());
            }
            return serve_watch(state, &mut stream, name).await;
        } else {
            let items: Vec<Value> = state.nodes.lock().get(name).cloned().into_iter().collect();
            let version = state.now.borrow().0.to_string();
            let list = json!({
                "apiVersion": "v1",
                "kind": "NodeList",
                "metadata": {"resourceVersion": version},
                "items": items,
            });
            answer(&mut stream, 200, &list).await?;
        }
    }
    Ok(())
}

/// Reads the next request and returns its target. The request's body is discarded.
async fn request(stream: &mut Stream) -> anyhow::Result<Option<String>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        anyhow::ensure!(head.len() < 16 << 10, "the request's head is too long");
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) if head.is_empty() => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    let head = String::from_utf8(head)?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    let length: usize = length.unwrap_or_default();
    anyhow::ensure!(length < 64 << 10, "the request's body is too long");
    stream.read_exact(&mut vec![0; length]).await?;
    Ok(Some(head.split(' ').nth(1).unwrap_or_default().to_owned()))
}

async fn answer(stream: &mut Stream, code: u16, body: &Value) -> anyhow::Result<()> {
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {code} Said\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    Ok(stream.flush().await?)
}

async fn serve_watch(state: &State, stream: &mut Stream, name: &str) -> anyhow::Result<()> {
    let mut now = state.now.subscribe();
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    stream.flush().await?;
    loop {
        // Sends the existing Node too: a client that lists first and then watches must not miss a
        // change in between.
        let node = state.nodes.lock().get(name).cloned();
        if let Some(node) = node {
            let line = json!({"type": "MODIFIED", "object": node}).to_string() + "\n";
            stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await?;
            stream.flush().await?;
        }
        now.changed().await?;
        if now.borrow().1 != Manner::Proper {
            return Ok(());
        }
    }
}

fn status(code: u16) -> Value {
    let reason = if code == 403 { "Forbidden" } else { "InternalError" };
    json!({
        "apiVersion": "v1",
        "kind": "Status",
        "metadata": {},
        "status": "Failure",
        "message": "scripted",
        "reason": reason,
        "code": code,
    })
}

fn user(stream: &Stream) -> Option<String> {
    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let name = parsed.subject().iter_common_name().next()?;
    Some(name.as_str().ok()?.to_owned())
}
