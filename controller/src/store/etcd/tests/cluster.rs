//! Real etcd clusters on the loopback.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;
use towline_service::pem;

use crate::store::etcd::client::Client;
use crate::store::etcd::thread::EtcdThread;
use crate::store::etcd::wire::{self, RangeRequest, RangeResponse};
use crate::store::etcd::{EtcdError, EtcdSettings, EtcdUrl, TlsFiles};

/// Number of times that a new cluster is asked whether it is ready. Each takes a few seconds at most.
const READY: usize = 20;
/// Number of times that a cluster is started: another program may take a port that was free a moment ago.
const ATTEMPTS: usize = 5;

/// A running cluster. It ends on drop.
pub(super) struct Cluster {
    members: Vec<Member>,
    tls: Option<TlsFiles>,
    _directory: tempfile::TempDir,
}

struct Member {
    process: Child,
    port: u16,
}

/// Certificates of a cluster's members.
pub(super) struct ServerTls {
    pub(super) ca: PathBuf,
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    /// Files of a client that the members accept.
    pub(super) client: TlsFiles,
}

impl Cluster {
    /// Starts a cluster. `None` if this machine has no etcd, after it said so.
    pub(super) fn start(count: usize, arguments: &[&str]) -> Option<Self> {
        Self::start_with(count, arguments, None)
    }

    /// Starts a cluster whose members use TLS, and ask clients for certificates.
    pub(super) fn start_with(
        count: usize,
        arguments: &[&str],
        tls: Option<&ServerTls>,
    ) -> Option<Self> {
        for _ in 0..ATTEMPTS {
            let mut cluster = Self::spawn(count, arguments, tls)?;
            if cluster.becomes_ready() {
                return Some(cluster);
            }
        }
        panic!("etcd does not become ready");
    }

    /// Starts the members of a cluster. `None` if this machine has no etcd, after it said so.
    fn spawn(count: usize, arguments: &[&str], tls: Option<&ServerTls>) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let client = |port: u16| format!("{scheme}://127.0.0.1:{port}");
        let peer = |port: u16| format!("http://127.0.0.1:{port}");
        let ports = free_ports(count * 2);
        let (clients, peers) = ports.split_at(count);
        let all: Vec<String> =
            peers.iter().enumerate().map(|(n, port)| format!("m{n}={}", peer(*port))).collect();
        let mut members = Vec::new();
        for (n, (&port, &peer_port)) in clients.iter().zip(peers).enumerate() {
            let mut command = Command::new(program());
            command
                .args(["--name", &format!("m{n}"), "--log-level", "error"])
                .arg("--data-dir")
                .arg(directory.path().join(format!("m{n}")))
                .args(["--listen-client-urls", &client(port)])
                .args(["--advertise-client-urls", &client(port)])
                .args(["--listen-peer-urls", &peer(peer_port)])
                .args(["--initial-advertise-peer-urls", &peer(peer_port)])
                .args(["--initial-cluster", &all.join(",")])
                .args(arguments)
                .env("ETCD_UNSUPPORTED_ARCH", "arm64")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            if let Some(tls) = tls {
                command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(&tls.ca);
                command.arg("--cert-file").arg(&tls.certificate).arg("--key-file").arg(&tls.key);
            }
            match command.spawn() {
                Ok(process) => members.push(Member { process, port }),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    eprintln!("skipped: etcd is missing: apt-get install etcd-server");
                    return None;
                }
                Err(error) => panic!("cannot start etcd: {error}"),
            }
        }
        let tls = tls.map(|tls| tls.client.clone());
        Some(Self { members, tls, _directory: directory })
    }

    /// Waits until the cluster answers. Returns false if a member ends, or it takes too long.
    fn becomes_ready(&mut self) -> bool {
        for _ in 0..READY {
            let read = RangeRequest::of("ready".into());
            let answers = self.call::<_, RangeResponse>(wire::RANGE, read).is_ok();
            let mut members = self.members.iter_mut();
            if members.any(|member| member.process.try_wait().unwrap().is_some()) {
                return false;
            }
            if answers {
                return true;
            }
        }
        false
    }

    /// Returns the settings of a store below a prefix.
    pub(super) fn settings(&self, prefix: &str) -> EtcdSettings {
        let addresses: Vec<String> =
            self.members.iter().map(|member| format!("127.0.0.1:{}", member.port)).collect();
        let url = EtcdUrl::parse(&format!("etcd://{}/{prefix}", addresses.join(","))).unwrap();
        EtcdSettings { url, tls: self.tls.clone(), login: None, is_shared: false }
    }

    /// Sends a request to the cluster.
    pub(super) fn call<Q, A>(&self, path: &'static str, request: Q) -> Result<A, EtcdError>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        call(self.settings("test"), path, request)
    }

    /// Stops a member until [`Cluster::resume`].
    pub(super) fn pause(&self, member: usize) {
        self.signal(member, Signal::SIGSTOP);
    }

    /// Continues a paused member.
    pub(super) fn resume(&self, member: usize) {
        self.signal(member, Signal::SIGCONT);
    }

    /// Ends a member like a crash.
    pub(super) fn kill(&mut self, member: usize) {
        let process = &mut self.members[member].process;
        process.kill().unwrap();
        process.wait().unwrap();
    }

    fn signal(&self, member: usize, signal: Signal) {
        let pid = i32::try_from(self.members[member].process.id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for Member { process, .. } in &mut self.members {
            // It may have ended already.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Sends a request to the cluster of these settings.
pub(super) fn call<Q, A>(
    settings: EtcdSettings,
    path: &'static str,
    request: Q,
) -> Result<A, EtcdError>
where
    Q: Message + Clone + 'static,
    A: Message + Default + 'static,
{
    let client = Arc::new(Client::new(settings)?);
    let thread = EtcdThread::start()?;
    thread.wait(async move { client.call(path, request).await })
}

fn program() -> PathBuf {
    std::env::var_os("TOWLINE_TEST_ETCD").map_or("etcd".into(), PathBuf::from)
}

/// Returns ports that were free a moment ago, each another one.
fn free_ports(count: usize) -> Vec<u16> {
    let bind = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listeners: Vec<TcpListener> = (0..count).map(bind).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

/// Writes the files of a CA, of a server on the loopback and of a client into a directory.
pub(super) fn certificates(directory: &Path) -> ServerTls {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    let write = |name: &str, text: &str| {
        let path = directory.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let signed = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let certificate = write(&format!("{name}.crt"), &pem::certificate(certificate.der()));
        (certificate, write(&format!("{name}.key"), &pem::private_key(key.serialized_der())))
    };
    let (certificate, key) = signed("server");
    let (client_certificate, client_key) = signed("client");
    let ca = write("ca.crt", &pem::certificate(ca_certificate.der()));
    let client =
        crate::store::etcd::CertificateFiles { certificate: client_certificate, key: client_key };
    let client = TlsFiles { ca: ca.clone(), client: Some(client) };
    ServerTls { ca, certificate, key, client }
}
