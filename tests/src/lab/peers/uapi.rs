//! The cross-platform userspace interface of WireGuard: lines of `key=value` over a Unix socket.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use ipnet::IpNet;

/// What a device is told.
#[derive(Debug, Clone)]
pub struct Device {
    /// X25519.
    pub private_key: [u8; 32],
    /// UDP.
    pub port: u16,
    /// All of its peers: those that it had are gone.
    pub peers: Vec<Peer>,
}

/// What a device is told of a peer.
#[derive(Debug, Clone)]
pub struct Peer {
    /// X25519.
    pub public_key: [u8; 32],
    /// A key that both have beside.
    pub preshared_key: Option<[u8; 32]>,
    /// Where it is; `None`: it has to come.
    pub endpoint: Option<SocketAddr>,
    /// What is reached through it.
    pub allowed_ips: Vec<IpNet>,
    /// Seconds between keepalives; 0: none.
    pub keepalive: u16,
}

/// What does not answer in this time does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the socket of a link is.
pub fn socket(link: &str) -> PathBuf {
    format!("/var/run/wireguard/{link}.sock").into()
}

/// The device is now this.
pub fn set(link: &str, device: &Device) -> anyhow::Result<()> {
    let mut request = String::from("set=1\n");
    let _ = writeln!(request, "private_key={}", hex(&device.private_key));
    let _ = writeln!(request, "listen_port={}", device.port);
    let _ = writeln!(request, "replace_peers=true");
    for peer in &device.peers {
        let _ = writeln!(request, "public_key={}", hex(&peer.public_key));
        if let Some(key) = &peer.preshared_key {
            let _ = writeln!(request, "preshared_key={}", hex(key));
        }
        if let Some(endpoint) = peer.endpoint {
            let _ = writeln!(request, "endpoint={endpoint}");
        }
        let _ = writeln!(request, "persistent_keepalive_interval={}", peer.keepalive);
        let _ = writeln!(request, "replace_allowed_ips=true");
        for net in &peer.allowed_ips {
            let _ = writeln!(request, "allowed_ip={net}");
        }
    }
    request.push('\n');
    ask(link, &request).map(drop)
}

/// What the device says of itself, key by key; peers follow one another, each begins with
/// `public_key`.
pub fn get(link: &str) -> anyhow::Result<Vec<(String, String)>> {
    ask(link, "get=1\n\n")
}

fn ask(link: &str, request: &str) -> anyhow::Result<Vec<(String, String)>> {
    let path = socket(link);
    let mut stream =
        UnixStream::connect(&path).with_context(|| format!("cannot reach {}", path.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    for line in BufReader::new(stream).lines() {
        let line = line?;
        match line.split_once('=') {
            Some(("errno", "0")) => return Ok(answer),
            Some(("errno", number)) => bail!("errno {number}"),
            Some((key, value)) => answer.push((key.to_owned(), value.to_owned())),
            None => {}
        }
    }
    bail!("the answer of {} ended early", path.display())
}

fn hex(key: &[u8; 32]) -> String {
    key.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
