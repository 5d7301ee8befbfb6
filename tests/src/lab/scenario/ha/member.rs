//! A member of the etcd cluster.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::lab::process::{Daemon, Program};
use crate::lab::topology::{Host, Lab};

/// TCP port for clients.
pub(in crate::lab::scenario) const CLIENTS: u16 = 2379;
/// TCP port for the other members.
const PEERS: u16 = 2380;
/// Limit for a member to answer a request of the lab.
const ANSWER: Duration = Duration::from_secs(10);

/// A member of the etcd cluster. Other scenarios use it, too.
pub(in crate::lab::scenario) struct Member {
    host: Arc<Host>,
    address: IpAddr,
    program: Program,
    log: PathBuf,
    daemon: Option<Daemon>,
}

impl Member {
    /// Returns a member on each host, which do not run yet.
    pub(in crate::lab::scenario) fn all(
        lab: &Lab,
        hosts: &[Arc<Host>],
    ) -> anyhow::Result<Vec<Self>> {
        let first = |host: &Host| host.addresses().first().copied().context("no address");
        let mut cluster = Vec::new();
        for (number, host) in hosts.iter().enumerate() {
            cluster.push(format!("e{number}=http://{}", SocketAddr::new(first(host)?, PEERS)));
        }
        let path = std::env::var_os("TOWLINE_TEST_ETCD").unwrap_or_else(|| "etcd".into());
        let mut members = Vec::new();
        for (number, host) in hosts.iter().enumerate() {
            let address = first(host)?;
            let url = |port| format!("http://{}", SocketAddr::new(address, port));
            let (client, peer) = (url(CLIENTS), url(PEERS));
            let program = Program::new(&path)
                .args(["--name", &format!("e{number}"), "--log-level", "error"])
                .arg("--data-dir")
                .arg(lab.directory().join(format!("etcd-{number}")))
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                .args(["--initial-cluster", &cluster.join(",")])
                .env("ETCD_UNSUPPORTED_ARCH", "arm64");
            let log = lab.directory().join(format!("etcd-{number}.log"));
            members.push(Self { host: Arc::clone(host), address, program, log, daemon: None });
        }
        Ok(members)
    }

    /// Starts the member, without waiting.
    pub(in crate::lab::scenario) fn start(&mut self) -> anyhow::Result<()> {
        let started = self.program.start(self.host.namespace(), "etcd", &self.log);
        self.daemon = Some(started.context("apt-get install etcd-server")?);
        Ok(())
    }

    /// Returns the process, while it runs.
    pub(in crate::lab::scenario) fn daemon(&mut self) -> anyhow::Result<&mut Daemon> {
        self.daemon.as_mut().context("etcd is not running")
    }

    /// Takes the process, so that the caller can end it.
    pub(super) fn take_daemon(&mut self) -> Option<Daemon> {
        self.daemon.take()
    }

    /// Returns the member's host.
    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    /// Has etcd forget all states but the newest one.
    pub(super) fn compact(&self) -> anyhow::Result<()> {
        // The key of one zero byte: only the header of the answer matters.
        let newest = self.post("/v3/kv/range", r#"{"key":"AA=="}"#)?;
        let newest: serde_json::Value =
            serde_json::from_str(&newest).context("cannot parse the answer of etcd")?;
        let revision = newest["header"]["revision"].as_str().context("etcd sent no revision")?;
        let request = serde_json::json!({ "revision": revision, "physical": true });
        self.post("/v3/kv/compaction", &request.to_string()).map(drop)
    }

    /// Sends a request to the JSON gateway of etcd, and returns the body of the answer.
    fn post(&self, path: &str, body: &str) -> anyhow::Result<String> {
        let remote = SocketAddr::new(self.address, CLIENTS);
        self.host.namespace().run(|| {
            let mut stream = TcpStream::connect_timeout(&remote, ANSWER)?;
            stream.set_read_timeout(Some(ANSWER))?;
            let length = body.len();
            // With this version of HTTP the answer ends with the connection, and is not chunked.
            write!(
                stream,
                "POST {path} HTTP/1.0\r\nHost: etcd\r\nContent-Type: application/json\r\n\
                 Content-Length: {length}\r\n\r\n{body}"
            )?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).context("no answer of etcd")?;
            let (head, body) = answer.split_once("\r\n\r\n").context("etcd sent no answer")?;
            let status = head.lines().next().unwrap_or_default();
            ensure!(status.contains(" 200 "), "etcd refused {path}: {status}: {}", body.trim());
            Ok(body.to_owned())
        })
    }
}
