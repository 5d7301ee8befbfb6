//! `[[peer]]` of the configuration: WireGuard peers that are in no mesh.
//!
//! A pre-shared key stands in a file of its own, never in the configuration: that one is shown
//! (`towline config show`), copied and put into repositories.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use data_encoding::BASE64;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use towline_core::peer_table::PresharedKey;
use towline_core::static_peers::StaticPeer;
use towline_proto::id::{NodeName, WireguardKey};
use towline_proto::limits;
use towline_proto::node::{Candidate, CandidateKind};
use zeroize::Zeroizing;

/// Peers in one configuration.
const PEERS: usize = 4096;

/// One `[[peer]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// What `towline peers` calls it; its public key when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<NodeName>,
    /// As `wg pubkey` writes it.
    pub public_key: WireguardKey,
    /// A file with a pre-shared key as `wg genpsk` writes it, closed to others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preshared_key_file: Option<PathBuf>,
    /// Where it is called, with port; without it, it has to call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<std::net::SocketAddr>,
    /// Networks that are reached through it, and from which alone it may send.
    #[serde(default)]
    pub allowed_ips: Vec<IpNet>,
    /// Seconds of silence after which the tunnel says something; with it, the tunnel is held up
    /// without traffic too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive: Option<u16>,
}

/// Why a pre-shared key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PresharedKeyError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others may read it.
    #[error("{path} can be read by everybody: `chmod 600 {path}`")]
    Open {
        /// Which file.
        path: PathBuf,
    },
    /// No key in it.
    #[error("{path} holds no pre-shared key: it should be 32 bytes in base64, from `wg genpsk`")]
    Malformed {
        /// Which file.
        path: PathBuf,
    },
}

/// What is wrong with these peers, if something is.
pub(crate) fn check(peers: &[PeerConfig]) -> Result<(), String> {
    if peers.len() > PEERS {
        return Err(format!("at most {PEERS}"));
    }
    let mut keys = std::collections::BTreeSet::new();
    let mut names = std::collections::BTreeSet::new();
    let mut held = std::collections::BTreeMap::new();
    for peer in peers {
        let name = peer.display_name();
        if !keys.insert(peer.public_key) {
            return Err(format!("public_key {} stands under two peers", peer.public_key));
        }
        if !names.insert(name.clone()) {
            return Err(format!("two peers are named {name}"));
        }
        if peer.allowed_ips.len() > limits::PREFIXES {
            return Err(format!("{name}: at most {} allowed_ips", limits::PREFIXES));
        }
        for net in &peer.allowed_ips {
            if net.trunc() != *net {
                return Err(format!("{name}: {net} has host bits set: use {}", net.trunc()));
            }
            if net.prefix_len() == 0 {
                return Err(format!("{name}: {net} is the whole internet: it is never routed"));
            }
            if let Some(other) = held.insert(*net, name.clone()) {
                return Err(format!("{net} stands under two peers, {other} and {name}"));
            }
        }
        if let Some(endpoint) = peer.endpoint
            && Candidate::new(CandidateKind::Configured, endpoint).is_none()
        {
            return Err(format!("{name}: nothing can be sent to {endpoint}"));
        }
        if peer.keepalive == Some(0) {
            return Err(format!("{name}: keepalive 0 is none: leave it out"));
        }
    }
    Ok(())
}

/// The peers as the core takes them, each pre-shared key read from its file.
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
            (&peer("endpoint = \"0.0.0.0:1\""), "sent"),
            (&peer("keepalive = 0"), "leave it out"),
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
