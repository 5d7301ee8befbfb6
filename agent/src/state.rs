//! The state directory: what survives a restart, a crash and a reboot.
//!
//! | file | holds | written |
//! |---|---|---|
//! | `lock` | nothing; locked by the one agent that runs | once |
//! | `identity.key`, `wireguard.key` | the node's private keys, 0600 | once, when first needed |
//! | `membership.json` | mesh, CA certificate, controllers, grant | at the join, at renewals |
//! | `certificate.pem` | the client certificate chain | at the join, at renewals |
//! | `counters.json` | boot epoch and record generation | before each use of a new value |
//! | `prefixes.json` | what this node announced, and what of others' is still guarded | when it changes |
//! | `map.bin` | the signed network map, as last seen | after changes, debounced |
//! | `down` | when `towline down` was run (`down.rs`) | by `towline down`; removed by `towline up` |
//!
//! The directory is 0700. A file is replaced whole (written beside, synced, renamed), so at any
//! moment a reader finds the old one or the new one.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use ipnet::IpNet;
use nix::fcntl::{Flock, FlockArg};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use towline_proto::id::IdentityKey;
use towline_proto::node::{Grant, MeshConfig};
use towline_proto::token::ControllerAddress;
use towline_proto::{pb, signed};

use crate::keys::{Identity, InvalidKey, Wireguard};
use crate::map_cache::MapCache;

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent runs on it.
    #[error(
        "another agent is using {path}: stop it first, or give this one a `state_dir` of its own"
    )]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// The node is not a member yet.
    #[error(
        "this machine has not joined a mesh: run `towline join --token-file FILE` first ({path} is missing)"
    )]
    NotJoined {
        /// The membership file.
        path: PathBuf,
    },
    /// A key file that holds no key.
    #[error(
        "{path}: {source}; restore it from a backup, or remove {dir} and join again with a new token"
    )]
    Key {
        /// Which file.
        path: PathBuf,
        /// Its directory.
        dir: PathBuf,
        /// What is wrong.
        source: InvalidKey,
    },
    /// A file that does not hold what it should.
    #[error(
        "{path} is damaged ({what}): restore it from a backup, or remove {dir} and join again with a new token"
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Its directory.
        dir: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// Both key pairs.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Signs.
    pub identity: Identity,
    /// Tunnels.
    pub wireguard: Wireguard,
}

/// What a join gave us: everything the CA says of us and of the mesh.
#[derive(Debug, Clone)]
pub struct Membership {
    /// The CA's certificate, pinned.
    pub ca: CertificateDer<'static>,
    /// The CA's public key, taken from the certificate.
    pub ca_key: IdentityKey,
    /// Where the controllers are.
    pub controllers: Vec<ControllerAddress>,
    /// Our grant, and the bytes that the CA signed.
    pub grant: Grant,
    /// The signed form of `grant`.
    pub signed_grant: pb::Signed,
    /// The mesh's configuration.
    pub mesh: MeshConfig,
    /// The signed form of `mesh`.
    pub signed_mesh: pb::Signed,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MembershipFile {
    version: u32,
    ca_certificate: String,
    controllers: Vec<String>,
    grant: SignedFile,
    mesh: SignedFile,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SignedFile {
    body: String,
    signature: String,
}

/// Numbers that must never go back, also over a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Starts of the agent.
    pub boot_epoch: u64,
    /// Generation of the last record that was published or about to be.
    pub generation: u64,
}

/// What the guards follow from, besides membership and map.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CachedPrefixes {
    /// What this node announced: reached by the host's own routes.
    pub announced: Vec<IpNet>,
    /// Its own addresses among that.
    pub node_ips: Vec<IpAddr>,
    /// What others announced once and nobody does now.
    pub withdrawn: Vec<IpNet>,
}

/// An open state directory. One process at a time holds it.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// `None`: only looked at.
    _lock: Option<Flock<File>>,
}

impl StateDir {
    /// Opens it, making it if it is not there, and locks it.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| StateError::Io { path: path.into(), source })?;
        let lock_path = path.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(|source| StateError::Io { path: lock_path.clone(), source })?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path: path.into(), _lock: Some(lock) }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                Err(StateError::Locked { path: path.into() })
            }
            Err((_, errno)) => Err(StateError::Io { path: lock_path, source: errno.into() }),
        }
    }

    /// To be read only, whoever holds it: files are replaced whole.
    pub fn peek(path: &Path) -> Self {
        Self { path: path.into(), _lock: None }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The node's keys, made and stored if they are not there.
    pub fn keys_or_generate(&self) -> Result<Keys, StateError> {
        if self.read("identity.key")?.is_none() {
            let identity = Identity::generate().map_err(|e| self.key_error("identity.key", e))?;
            self.replace("identity.key", identity.to_pem().as_bytes())?;
        }
        if self.read("wireguard.key")?.is_none() {
            let wireguard =
                Wireguard::generate().map_err(|e| self.key_error("wireguard.key", e))?;
            self.replace("wireguard.key", wireguard.to_base64().as_bytes())?;
        }
        self.keys()
    }

    /// The node's keys.
    pub fn keys(&self) -> Result<Keys, StateError> {
        let text = |name| -> Result<zeroize::Zeroizing<String>, StateError> {
            let bytes = self.read(name)?.ok_or_else(|| self.not_joined(name))?;
            String::from_utf8(bytes)
                .map(zeroize::Zeroizing::new)
                .map_err(|_| self.damaged(name, "not text"))
        };
        let identity = Identity::from_pem(&text("identity.key")?)
            .map_err(|source| self.key_error("identity.key", source))?;
        let wireguard = Wireguard::from_base64(&text("wireguard.key")?)
            .map_err(|source| self.key_error("wireguard.key", source))?;
        Ok(Keys { identity, wireguard })
    }

    /// What the join gave; `None` before it.
    pub fn membership(&self) -> Result<Option<Membership>, StateError> {
        let name = "membership.json";
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let file: MembershipFile = serde_json::from_slice(&bytes)
            .map_err(|error| self.damaged(name, &error.to_string()))?;
        if file.version != 1 {
            return Err(self.damaged(name, "made by another version of towline"));
        }
        let ca = CertificateDer::from_pem_slice(file.ca_certificate.as_bytes())
            .map_err(|_| self.damaged(name, "the CA certificate is not PEM"))?;
        let signed = |signed: SignedFile| -> Option<pb::Signed> {
            Some(pb::Signed {
                body: BASE64.decode(signed.body.as_bytes()).ok()?.into(),
                signature: BASE64.decode(signed.signature.as_bytes()).ok()?.into(),
            })
        };
        let grant = signed(file.grant).ok_or_else(|| self.damaged(name, "grant"))?;
        let mesh = signed(file.mesh).ok_or_else(|| self.damaged(name, "mesh"))?;
        let controllers = file
            .controllers
            .iter()
            .map(|text| text.parse::<ControllerAddress>())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| self.damaged(name, &error.to_string()))?;
        Membership::new(ca, controllers, grant, mesh)
            .map(Some)
            .map_err(|error| self.damaged(name, &error.to_string()))
    }

    /// What the join gave, or the error that says to join.
    pub fn require_membership(&self) -> Result<Membership, StateError> {
        self.membership()?.ok_or_else(|| self.not_joined("membership.json"))
    }

    /// Stores what the join gave.
    pub fn store_membership(&self, membership: &Membership) -> Result<(), StateError> {
        let signed = |signed: &pb::Signed| SignedFile {
            body: BASE64.encode(&signed.body),
            signature: BASE64.encode(&signed.signature),
        };
        let file = MembershipFile {
            version: 1,
            ca_certificate: pem_certificate(&membership.ca),
            controllers: membership.controllers.iter().map(ToString::to_string).collect(),
            grant: signed(&membership.signed_grant),
            mesh: signed(&membership.signed_mesh),
        };
        let mut json = serde_json::to_vec_pretty(&file)
            .map_err(|error| self.damaged("membership.json", &error.to_string()))?;
        json.push(b'\n');
        self.replace("membership.json", &json)
    }

    /// The client certificate chain, leaf first; `None` before the join.
    pub fn certificate(&self) -> Result<Option<Vec<CertificateDer<'static>>>, StateError> {
        let name = "certificate.pem";
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let chain = CertificateDer::pem_slice_iter(&bytes)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| self.damaged(name, "not PEM"))?;
        if chain.is_empty() {
            return Err(self.damaged(name, "no certificate in it"));
        }
        Ok(Some(chain))
    }

    /// Stores the client certificate chain.
    pub fn store_certificate(&self, chain: &[CertificateDer<'_>]) -> Result<(), StateError> {
        let pem: String = chain.iter().map(pem_certificate).collect();
        self.replace("certificate.pem", pem.as_bytes())
    }

    /// The counters; zero before the first start.
    pub fn counters(&self) -> Result<Counters, StateError> {
        let name = "counters.json";
        match self.read(name)? {
            None => Ok(Counters::default()),
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| self.damaged(name, &error.to_string())),
        }
    }

    /// Stores the counters; to be done before a new value is used.
    pub fn store_counters(&self, counters: Counters) -> Result<(), StateError> {
        let json = serde_json::to_vec(&counters)
            .map_err(|error| self.damaged("counters.json", &error.to_string()))?;
        self.replace("counters.json", &json)
    }

    /// The cached map. A damaged one counts as absent (and is logged): the controller, or the
    /// peers, bring it again.
    pub fn map(&self, membership: &Membership) -> Result<MapCache, StateError> {
        let empty = MapCache::new(membership.ca_key, membership.grant.node_id);
        let Some(bytes) = self.read("map.bin")? else { return Ok(empty) };
        match empty.restore(&bytes) {
            Ok(map) => Ok(map),
            Err(error) => {
                tracing::warn!(path = %self.path.join("map.bin").display(), %error, "cached map ignored");
                Ok(MapCache::new(membership.ca_key, membership.grant.node_id))
            }
        }
    }

    /// Stores the map.
    pub fn store_map(&self, encoded: &[u8]) -> Result<(), StateError> {
        self.replace("map.bin", encoded)
    }

    /// What the guards follow from besides; nothing before the first run. A damaged file counts as
    /// absent (and is logged).
    pub fn prefixes(&self) -> Result<CachedPrefixes, StateError> {
        let name = "prefixes.json";
        let Some(bytes) = self.read(name)? else { return Ok(CachedPrefixes::default()) };
        Ok(serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            tracing::warn!(path = %self.path.join(name).display(), %error, "cached prefixes ignored");
            CachedPrefixes::default()
        }))
    }

    /// Stores it.
    pub fn store_prefixes(&self, prefixes: &CachedPrefixes) -> Result<(), StateError> {
        let json = serde_json::to_vec(prefixes)
            .map_err(|error| self.damaged("prefixes.json", &error.to_string()))?;
        self.replace("prefixes.json", &json)
    }

    /// The last good word of Kubernetes, as it was stored.
    pub fn kubernetes(&self) -> Result<Option<Vec<u8>>, StateError> {
        self.read("kubernetes.json")
    }

    /// Keeps the last good word of Kubernetes.
    pub fn store_kubernetes(&self, encoded: &[u8]) -> Result<(), StateError> {
        self.replace("kubernetes.json", encoded)
    }

    /// Forgets the membership, the certificate and the map, and the keys with them: the next join
    /// is another node's.
    pub fn forget(&self) -> Result<(), StateError> {
        // The membership first: a crash half-way leaves a machine that has not joined.
        for name in [
            "membership.json",
            "certificate.pem",
            "map.bin",
            "prefixes.json",
            "counters.json",
            "kubernetes.json",
            "wireguard.key",
            "identity.key",
            crate::down::NAME,
        ] {
            let path = self.path.join(name);
            match std::fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(StateError::Io { path, source }),
            }
        }
        self.sync_dir()
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StateError::Io { path, source }),
        }
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let path = self.path.join(name);
        let beside = self.path.join(format!(".{name}.new"));
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&beside)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&beside, &path)
        };
        write().map_err(|source| StateError::Io { path: path.clone(), source })?;
        self.sync_dir()
    }

    fn sync_dir(&self) -> Result<(), StateError> {
        File::open(&self.path)
            .and_then(|dir| dir.sync_all())
            .map_err(|source| StateError::Io { path: self.path.clone(), source })
    }

    fn damaged(&self, name: &str, what: &str) -> StateError {
        StateError::Damaged {
            path: self.path.join(name),
            dir: self.path.clone(),
            what: what.to_owned(),
        }
    }

    fn key_error(&self, name: &str, source: InvalidKey) -> StateError {
        StateError::Key { path: self.path.join(name), dir: self.path.clone(), source }
    }

    fn not_joined(&self, name: &str) -> StateError {
        StateError::NotJoined { path: self.path.join(name) }
    }
}

/// Why what a join gave is not believed.
#[derive(Debug, thiserror::Error)]
pub enum InvalidMembership {
    /// The CA certificate holds no Ed25519 key.
    #[error("the CA certificate holds no Ed25519 key")]
    Ca,
    /// Not signed by the CA, or malformed.
    #[error(transparent)]
    Untrusted(#[from] signed::Untrusted),
}

impl Membership {
    /// Verifies both statements against the CA.
    pub fn new(
        ca: CertificateDer<'static>,
        controllers: Vec<ControllerAddress>,
        signed_grant: pb::Signed,
        signed_mesh: pb::Signed,
    ) -> Result<Self, InvalidMembership> {
        let ca_key = crate::tls::public_key(&ca).ok_or(InvalidMembership::Ca)?;
        let grant = signed::grant(Some(&signed_grant), &ca_key)?;
        let mesh = signed::mesh(Some(&signed_mesh), &ca_key)?;
        Ok(Self { ca, ca_key, controllers, grant, signed_grant, mesh, signed_mesh })
    }
}

fn pem_certificate(certificate: &CertificateDer<'_>) -> String {
    let body = BASE64.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in body.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn keys_are_made_once_and_readable_by_the_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("state")).unwrap();
        let first = state.keys_or_generate().unwrap();
        let second = state.keys_or_generate().unwrap();
        assert_eq!(first.identity.public(), second.identity.public());
        assert_eq!(first.wireguard.public(), second.wireguard.public());
        for (name, mode) in [("identity.key", 0o600), ("wireguard.key", 0o600), (".", 0o700)] {
            let meta = std::fs::metadata(state.path().join(name)).unwrap();
            assert_eq!(meta.permissions().mode() & 0o777, mode, "{name}");
        }
    }

    #[test]
    fn a_second_agent_is_told_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let _first = StateDir::open(dir.path()).unwrap();
        let second = StateDir::open(dir.path()).unwrap_err();
        assert!(matches!(second, StateError::Locked { .. }), "{second}");
    }

    #[test]
    fn a_machine_that_has_not_joined_is_told_to() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let error = state.require_membership().unwrap_err().to_string();
        assert!(error.contains("towline join"), "{error}");
    }

    #[test]
    fn damaged_files_name_themselves_and_the_way_back() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        state.keys_or_generate().unwrap();
        for name in ["identity.key", "wireguard.key"] {
            let good = std::fs::read(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name), &good[..good.len() / 2]).unwrap();
            let error = state.keys().unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("join again"), "{error}");
            std::fs::write(dir.path().join(name), good).unwrap();
        }
        std::fs::write(dir.path().join("membership.json"), "{").unwrap();
        let error = state.membership().unwrap_err().to_string();
        assert!(error.contains("membership.json") && error.contains("join again"), "{error}");
    }

    #[test]
    fn counters_survive() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!(state.counters().unwrap(), Counters::default());
        let counters = Counters { boot_epoch: 3, generation: 9 };
        state.store_counters(counters).unwrap();
        assert_eq!(state.counters().unwrap(), counters);
    }
}
