//! Static peers: the `[[peer]]` sections of the configuration, WireGuard peers outside of a mesh.
//!
//! A pre-shared key is in a file of its own, never in the configuration, because configurations are
//! printed (`towline config show`), copied and committed to repositories.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use data_encoding::BASE64;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use towline_core::static_peers::StaticPeer;
use towline_proto::id::{NodeName, PresharedKey, WireguardKey};
use towline_proto::limits;
use towline_proto::node::{Candidate, CandidateKind};
use zeroize::Zeroizing;

/// Maximum number of peers in one configuration. It bounds the peer table.
const PEERS: usize = 4096;

/// One `[[peer]]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Name of the peer in `towline peers`. Its public key if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<NodeName>,
    /// Public key of the peer, in the format of `wg pubkey`.
    pub public_key: WireguardKey,
    /// Path of a file with a pre-shared key in the format of `wg genpsk`. Other users must not have
    /// access.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preshared_key_file: Option<PathBuf>,
    /// Address and port of the peer. If absent, the peer has to initiate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<std::net::SocketAddr>,
    /// Networks that are reached through the peer. Packets from the peer must have a source in one
    /// of them.
    #[serde(default)]
    pub allowed_ips: Vec<IpNet>,
    /// Interval of persistent keepalives, in seconds. If set, the tunnel is kept up without traffic
    /// too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive: Option<u16>,
}

/// Error of reading a pre-shared key.
#[derive(Debug, thiserror::Error)]
pub enum PresharedKeyError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// Other users have access to the file.
    #[error("{path} can be read by other users: run `chmod 600 {path}`")]
    Open {
        /// Path of the file.
        path: PathBuf,
    },
    /// The file contains no pre-shared key.
    #[error("{path} contains no pre-shared key: write 32 bytes in base64, from `wg genpsk`")]
    Malformed {
        /// Path of the file.
        path: PathBuf,
    },
}

/// Checks the peers of a configuration. The error describes the first problem.
pub(crate) fn check(peers: &[PeerConfig]) -> Result<(), String> {
    if peers.len() > PEERS {
        return Err(format!("at most {PEERS} peers are allowed"));
    }
    let mut keys = std::collections::BTreeSet::new();
    let mut names = std::collections::BTreeSet::new();
    let mut held = std::collections::BTreeMap::new();
    for peer in peers {
        let name = peer.display_name();
        if !keys.insert(peer.public_key) {
            return Err(format!("two peers have the public_key {}", peer.public_key));
        }
        if !names.insert(name.clone()) {
            return Err(format!("two peers are named {name}"));
        }
        if peer.allowed_ips.len() > limits::PREFIXES {
            return Err(format!("{name}: at most {} allowed_ips are allowed", limits::PREFIXES));
        }
        for net in &peer.allowed_ips {
            if net.trunc() != *net {
                return Err(format!("{name}: {net} has host bits set: use {}", net.trunc()));
            }
            if net.prefix_len() == 0 {
                return Err(format!(
                    "{name}: {net} is the whole internet, never routed: use smaller networks"
                ));
            }
            if let Some(other) = held.insert(*net, name.clone()) {
                return Err(format!(
                    "{net} is in the allowed_ips of two peers, {other} and {name}"
                ));
            }
        }
        if let Some(endpoint) = peer.endpoint
            && Candidate::new(CandidateKind::Configured, endpoint).is_none()
        {
            return Err(format!("{name}: {endpoint} is not a valid endpoint"));
        }
        if peer.keepalive == Some(0) {
            return Err(format!("{name}: keepalive must not be 0: remove it for no keepalive"));
        }
    }
    Ok(())
}

/// Converts the peers for the core, and reads the pre-shared keys from their files.
pub fn load(peers: &[PeerConfig]) -> Result<Vec<StaticPeer>, PresharedKeyError> {
    peers.iter().map(PeerConfig::load).collect()
}

impl PeerConfig {
    fn display_name(&self) -> String {
        self.name.as_ref().map_or_else(|| self.public_key.to_string(), ToString::to_string)
    }

    fn load(&self) -> Result<StaticPeer, PresharedKeyError> {
        Ok(StaticPeer {
            name: self.display_name(),
            public_key: self.public_key,
            preshared_key: self.preshared_key_file.as_deref().map(read_key).transpose()?,
            endpoint: self.endpoint,
            prefixes: self.allowed_ips.clone(),
            keepalive: self.keepalive.map(|seconds| Duration::from_secs(seconds.into())),
        })
    }
}

/// Reads a pre-shared key, unless other users have access to its file.
fn read_key(path: &Path) -> Result<PresharedKey, PresharedKeyError> {
    let failed = |source| PresharedKeyError::Read { path: path.into(), source };
    let open = std::fs::metadata(path).map_err(failed)?.permissions().mode() & 0o007 != 0;
    if open {
        return Err(PresharedKeyError::Open { path: path.into() });
    }
    let text = Zeroizing::new(std::fs::read(path).map_err(failed)?);
    let malformed = || PresharedKeyError::Malformed { path: path.into() };
    let bytes = BASE64.decode(text.trim_ascii()).map(Zeroizing::new).map_err(|_| malformed())?;
    bytes.as_slice().try_into().map(PresharedKey).map_err(|_| malformed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("agent.toml")).map_err(|error| error.to_string())
    }

    fn peer(more: &str) -> String {
        format!("[[peer]]\npublic_key = \"{KEY}\"\n{more}\n")
    }

    #[test]
    fn a_peer_reads_back_what_it_writes() {
        let config = parse(&peer(
            "name = \"office\"\nendpoint = \"203.0.113.1:51820\"\nallowed_ips = [\"10.9.0.0/24\"]\nkeepalive = 25",
        ))
        .unwrap();
        assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
        let peers = load(&config.peers).unwrap();
        assert_eq!(peers[0].name, "office");
        assert_eq!(peers[0].keepalive, Some(Duration::from_secs(25)));
    }

    #[test]
    fn what_cannot_be_says_what_would_be_right() {
        let twice = peer("").repeat(2);
        for (text, says) in [
            ("[[peer]]\nname = \"office\"", "public_key"),
            (&peer("preshared_key = \"secret\""), "preshared_key_file"),
            (&peer("allowed_ips = [\"10.9.0.1/24\"]"), "10.9.0.0/24"),
            (&peer("allowed_ips = [\"0.0.0.0/0\"]"), "whole internet"),
            (&peer("endpoint = \"0.0.0.0:1\""), "valid endpoint"),
            (&peer("keepalive = 0"), "must not be 0"),
            (&twice, "two peers"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_preshared_key_is_read_from_a_closed_file_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("office.psk");
        let read = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            read_key(&path).map_err(|error| error.to_string())
        };
        assert_eq!(read(&format!("{KEY}\n"), 0o600).unwrap().0[31], 31);
        assert!(read(KEY, 0o644).unwrap_err().contains("chmod 600"));
        assert!(read("short", 0o600).unwrap_err().contains("wg genpsk"));
        std::fs::remove_file(&path).unwrap();
        assert!(read_key(&path).unwrap_err().to_string().contains("cannot read"));
    }
}
