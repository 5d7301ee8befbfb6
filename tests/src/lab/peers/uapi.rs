//! WireGuard's cross-platform userspace interface: lines of `key=value` over a Unix socket.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use ipnet::IpNet;

/// Configuration of a device.
#[derive(Debug, Clone)]
pub struct Device {
    /// Private key (X25519).
    pub private_key: [u8; 32],
    /// UDP port on which the device listens.
    pub port: u16,
    /// The complete list of peers; earlier peers are removed.
    pub peers: Vec<Peer>,
}

/// Configuration of a peer.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Public key (X25519).
    pub public_key: [u8; 32],
    /// Optional preshared key.
    pub preshared_key: Option<[u8; 32]>,
    /// Endpoint of the peer; `None` if the peer has to initiate.
    pub endpoint: Option<SocketAddr>,
    /// Networks that are reached through the peer.
    pub allowed_ips: Vec<IpNet>,
    /// Interval of persistent keepalives in seconds; 0 disables them.
    pub keepalive: u16,
}

/// Timeout of a read from the socket.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Returns the path of a link's socket.
pub fn socket(link: &str) -> PathBuf {
    format!("/var/run/wireguard/{link}.sock").into()
}

/// Replaces the configuration of a device.
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

/// Returns the device's state as pairs of key and value. The entries of each peer begin with
/// `public_key`.
pub fn get(link: &str) -> anyhow::Result<Vec<(String, String)>> {
    ask(link, "get=1\n\n")
}

fn ask(link: &str, request: &str) -> anyhow::Result<Vec<(String, String)>> {
    let path = socket(link);
    let mut stream =
        UnixStream::connect(&path).with_context(|| format!("cannot reach {}", path.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
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
    bail!("the answer from {} ended early", path.display())
}

fn hex(key: &[u8; 32]) -> String {
    key.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
