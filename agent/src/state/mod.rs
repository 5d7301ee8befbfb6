//! State directory: the files that survive a restart, a crash and a reboot.
//!
//! | file | holds | written |
//! |---|---|---|
//! | `lock` | nothing; the running agent locks it, and the directory too | once |
//! | `identity.key`, `wireguard.key` | the node's private keys, 0600 | once, when first needed |
//! | `membership.json` | mesh, CA certificate, controllers, grant | at the join, at renewals, when the mesh changes |
//! | `certificate.pem` | the client certificate chain | at the join, at renewals |
//! | `counters.json` | boot epoch and record generation | before each use of a new value |
//! | `prefixes.json` | announced prefixes, and withdrawn ones that are still guarded | when they change |
//! | `networks.json` | the networks to which the machine was connected when it joined | at the join |
//! | `host.json` | gateways, DNS servers and uplink addresses of the machine when it joined | at the join |
//! | `map.bin` | the signed network map, as last received | at the start, and when the journal would exceed it |
//! | `map.journal` | changes of the map since then | after changes, debounced |
//! | `confirmed` | time of the map's last confirmation | at the start and every 10 minutes, if the age is bounded |
//! | `kubernetes.json` | the last valid facts of this machine's Node object | when they change |
//! | `confirm-by` | the deadline for confirming the join (`confirm.rs`) | at the join; removed by `towline confirm` |
//! | `join-failure` | why the last join failed or was undone | when that happens; removed by a join |
//! | `undone` | why the last join was undone | when it is undone; removed once the units are disabled |
//! | `down` | when `towline down` was run (`down.rs`) | by `towline down`; removed by `towline up` |
//!
//! The directory has mode 0700 and belongs to the system user that the guard and the agent run as.
//! So does every file in it, including those that root writes. See [`towline_service::directory`].
//!
//! A full or read-only disk does not stop the agent. Files that cannot be written are kept in
//! memory, reported by [`StateDir::unsaved`], and written by [`StateDir::save_again`] once that is
//! possible.

mod lock;
mod membership;
#[cfg(test)]
mod tests;
mod unsaved;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use data_encoding::BASE64;
use ipnet::IpNet;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use towline_core::local_limits::HostAddresses;
use towline_core::mesh::Mesh;
use towline_proto::id::NodeId;
use towline_proto::pb;
use towline_proto::token::ControllerAddress;
use towline_service::directory::{self, DirectoryError, PrivateDirectory};
use towline_service::{account, pem};
use zeroize::Zeroizing;

use crate::confirm::{self, Confirmation, Moment, Unconfirmed};
use crate::keys::{Identity, InvalidKey, Wireguard};
use crate::map_cache::MapCache;
use lock::StateLock;
use unsaved::Unsaved;

pub use membership::{InvalidMembership, Membership};
pub use unsaved::NotStored;

/// Name of the marker of `towline down`.
pub const DOWN: &str = "down";

/// Name of the file with the reason why the last join failed. A successful join removes it.
pub const JOIN_FAILURE: &str = "join-failure";
/// Name of the file with the time at which a controller confirmed the map last.
const CONFIRMED: &str = "confirmed";

/// Error of using the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The operating system refused an operation.
    #[error("cannot access {path}: {source}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The directory or a file in it cannot be used, or others can access it.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Another agent uses the directory.
    #[error(
        "cannot lock {path}: another agent uses it: stop that agent, or set another `state_dir`"
    )]
    Locked {
        /// Path of the directory.
        path: PathBuf,
    },
    /// The machine has not joined a mesh.
    #[error(
        "this machine has not joined a mesh: run `towline join --token-file FILE` first ({path} is missing)"
    )]
    NotJoined {
        /// Path of the membership file.
        path: PathBuf,
    },
    /// The deadline for confirming the join has passed.
    #[error("the join was not confirmed in time: it is being undone: join again with a new token")]
    Unconfirmed,
    /// A key file contains no valid key.
    #[error(
        "cannot use the key {path}: {source}: restore it from a backup, or remove {dir} and join again with a new token"
    )]
    Key {
        /// Path of the file.
        path: PathBuf,
        /// State directory that contains the file.
        dir: PathBuf,
        /// Reason why the key is invalid.
        source: InvalidKey,
    },
    /// A file has invalid content.
    #[error(
        "{path} is damaged ({what}): restore it from a backup, or remove {dir} and join again with a new token"
    )]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// State directory that contains the file.
        dir: PathBuf,
        /// Description of the damage.
        what: String,
    },
}

/// The node's two key pairs.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Ed25519 key pair, which signs records and requests.
    pub identity: Identity,
    /// X25519 key pair, for the tunnels.
    pub wireguard: Wireguard,
}

/// Content of `membership.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MembershipFile {
    version: u32,
    ca_certificate: String,
    controllers: Vec<String>,
    grant: SignedFile,
    mesh: SignedFile,
}

/// Signed statement in `membership.json`, in base64.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SignedFile {
    body: String,
    signature: String,
}

/// Numbers that must never decrease, not even after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Number of the agent's start, in milliseconds since 1970: the time of the start, or the
    /// previous value plus one if the clock was set back. So it increases even if it could not be
    /// stored.
    pub boot_epoch: u64,
    /// Generation of the last record that was published, or is about to be.
    pub generation: u64,
}

/// Prefixes that the guards are derived from, in addition to membership and map.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CachedPrefixes {
    /// Prefixes that this node announced. The host's own routes lead to them.
    pub announced: Vec<IpNet>,
    /// Pod networks of this node among the announced prefixes. Left out of the file when empty,
    /// because versions before 0.2.0 refuse the field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<IpNet>,
    /// Node IPs of this node among the announced prefixes.
    pub node_ips: Vec<IpAddr>,
    /// Prefixes that other nodes announced last and no node announces now.
    pub withdrawn: Vec<IpNet>,
    /// Those of `withdrawn` that are networks of machines rather than of pods. Left out of the file when
    /// empty, because versions before 0.2.0 refuse the field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub withdrawn_lans: Vec<IpNet>,
    /// Those of `withdrawn` whose last node is known, by that node, the oldest first. Left out of the file
    /// when empty, because versions before 0.2.0 refuse the field.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub withdrawn_by_node: BTreeMap<NodeId, Vec<IpNet>>,
}

impl CachedPrefixes {
    /// Gives a new mesh the withdrawn prefixes, which stay guarded.
    pub(crate) fn restore_withdrawn(&self, mesh: &mut Mesh, now: Instant) {
        mesh.set_withdrawn(now, self.withdrawn.iter().copied());
        mesh.set_withdrawn_lans(now, self.withdrawn_lans.iter().copied());
        for (node, networks) in &self.withdrawn_by_node {
            mesh.set_withdrawn_owner(now, *node, networks.iter().copied());
        }
    }
}

/// Content of `host.json`.
#[derive(Debug, Serialize, Deserialize)]
struct HostFile {
    gateways: BTreeSet<IpAddr>,
    dns_servers: BTreeSet<IpAddr>,
    uplinks: BTreeSet<IpAddr>,
}

/// An open state directory. Only one process at a time can lock it exclusively.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// The directory, after its owner and permissions were checked. `None` for a directory that is
    /// only read: it is checked when a file is read.
    directory: Option<PrivateDirectory>,
    /// Lock of the directory. `None` if the directory is only read.
    _lock: Option<StateLock>,
    /// Contents that are still to be written. Locked while a file is replaced, so that the latest
    /// content wins.
    unsaved: Mutex<Unsaved>,
}

impl StateDir {
    /// Opens and locks the directory. Creates it if it does not exist.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        Self::lock(directory::create_for(path, account::AGENT)?)
    }

    /// Locks a directory whose owner and permissions were checked.
    pub fn lock(directory: PrivateDirectory) -> Result<Self, StateError> {
        let lock = StateLock::exclusive(&directory)?;
        let path = directory.path().to_owned();
        Ok(Self { directory: Some(directory), ..Self::with(&path, Some(lock)) })
    }

    /// Opens the directory for reading while no agent uses it. Creates and writes nothing.
    pub fn open_shared(path: &Path) -> Result<Self, StateError> {
        Ok(Self::with(path, Some(StateLock::shared(path)?)))
    }

    /// Opens the directory for reading without a lock. Files are replaced atomically, so this is
    /// safe while an agent runs.
    pub fn peek(path: &Path) -> Self {
        Self::with(path, None)
    }

    fn with(path: &Path, lock: Option<StateLock>) -> Self {
        Self { path: path.into(), directory: None, _lock: lock, unsaved: Mutex::default() }
    }

    /// Returns the files that a restart would lose, and why. `None` if all files are on the disk.
    pub fn unsaved(&self) -> Option<NotStored> {
        self.unsaved_files().problem(&self.path)
    }

    /// Writes the files that could not be written before. Stops at the first failure.
    pub fn save_again(&self) -> Result<(), StateError> {
        let mut unsaved = self.unsaved_files();
        for (name, waiting) in unsaved.waiting() {
            self.write(name, &waiting.bytes)?;
            unsaved.settled(name);
        }
        Ok(())
    }

    fn unsaved_files(&self) -> MutexGuard<'_, Unsaved> {
        self.unsaved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the node's keys. Creates and stores those that do not exist.
    pub fn keys_or_generate(&self) -> Result<Keys, StateError> {
        if !self.has("identity.key") {
            let identity = Identity::generate().map_err(|e| self.key_error("identity.key", e))?;
            self.write("identity.key", identity.to_pem().as_bytes())?;
        }
        if !self.has("wireguard.key") {
            let wireguard =
                Wireguard::generate().map_err(|e| self.key_error("wireguard.key", e))?;
            self.write("wireguard.key", wireguard.to_base64().as_bytes())?;
        }
        self.keys()
    }

    fn has(&self, name: &str) -> bool {
        self.path.join(name).symlink_metadata().is_ok()
    }

    /// Returns the node's keys.
    pub fn keys(&self) -> Result<Keys, StateError> {
        let read = |name| -> Result<Zeroizing<Vec<u8>>, StateError> {
            let key = self.existing()?.map(|directory| directory.read_key(name)).transpose()?;
            key.flatten().ok_or_else(|| self.not_joined(name))
        };
        let text =
            |name, bytes| std::str::from_utf8(bytes).map_err(|_| self.damaged(name, "not text"));
        let (identity, wireguard) = (read("identity.key")?, read("wireguard.key")?);
        let identity = Identity::from_pem(text("identity.key", &identity)?)
            .map_err(|source| self.key_error("identity.key", source))?;
        let wireguard = Wireguard::from_base64(text("wireguard.key", &wireguard)?)
            .map_err(|source| self.key_error("wireguard.key", source))?;
        Ok(Keys { identity, wireguard })
    }

    /// Returns the stored membership, or `None` before the join.
    pub fn membership(&self) -> Result<Option<Membership>, StateError> {
        let name = "membership.json";
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let file: MembershipFile = serde_json::from_slice(&bytes)
            .map_err(|error| self.damaged(name, &error.to_string()))?;
        if file.version != 1 {
            return Err(self.damaged(name, "written by an unknown version of towline"));
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

    /// Returns the stored membership, or an error that tells the operator to join.
    pub fn require_membership(&self) -> Result<Membership, StateError> {
        self.membership()?.ok_or_else(|| self.not_joined("membership.json"))
    }

    /// Stores the membership.
    pub fn store_membership(&self, membership: &Membership) -> Result<(), StateError> {
        let signed = |signed: &pb::Signed| SignedFile {
            body: BASE64.encode(&signed.body),
            signature: BASE64.encode(&signed.signature),
        };
        let file = MembershipFile {
            version: 1,
            ca_certificate: pem::certificate(&membership.ca),
            controllers: membership.controllers.iter().map(ToString::to_string).collect(),
            grant: signed(&membership.signed_grant),
            mesh: signed(&membership.signed_mesh),
        };
        let mut json = serde_json::to_vec_pretty(&file)
            .map_err(|error| self.damaged("membership.json", &error.to_string()))?;
        json.push(b'\n');
        self.replace("membership.json", &json)
    }

    /// Returns the client certificate chain, leaf first, or `None` before the join.
    pub fn certificate(&self) -> Result<Option<Vec<CertificateDer<'static>>>, StateError> {
        let name = "certificate.pem";
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let chain = CertificateDer::pem_slice_iter(&bytes)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| self.damaged(name, "not PEM"))?;
        if chain.is_empty() {
            return Err(self.damaged(name, "it contains no certificate"));
        }
        Ok(Some(chain))
    }

    /// Stores the client certificate chain.
    pub fn store_certificate(&self, chain: &[CertificateDer<'_>]) -> Result<(), StateError> {
        let pem: String = chain.iter().map(|certificate| pem::certificate(certificate)).collect();
        self.replace("certificate.pem", pem.as_bytes())
    }

    /// Returns the counters. They are zero before the first start.
    pub fn counters(&self) -> Result<Counters, StateError> {
        let name = "counters.json";
        match self.read(name)? {
            None => Ok(Counters::default()),
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| self.damaged(name, &error.to_string())),
        }
    }

    /// Counts a start of the agent: returns counters with a new boot epoch, and stores them if
    /// possible. `now` is in milliseconds since 1970.
    ///
    /// # Errors
    ///
    /// Fails if the counters cannot be read. A disk that cannot be written is not an error.
    pub fn start(&self, now: u64) -> Result<Counters, StateError> {
        let stored = self.counters()?;
        let boot_epoch = stored.boot_epoch.saturating_add(1).max(now);
        let counters = Counters { boot_epoch, ..stored };
        match self.store_counters(counters) {
            Err(StateError::Directory(DirectoryError::Io { .. })) => Ok(counters),
            stored => stored.map(|()| counters),
        }
    }

    /// Stores the counters. Call it before a new value is used.
    pub fn store_counters(&self, counters: Counters) -> Result<(), StateError> {
        let json = serde_json::to_vec(&counters)
            .map_err(|error| self.damaged("counters.json", &error.to_string()))?;
        self.replace("counters.json", &json)
    }

    /// Returns the cached map. A damaged map is logged and treated as absent, because the
    /// controller or the peers send it again.
    pub fn map(&self, membership: &Membership) -> Result<MapCache, StateError> {
        let empty = MapCache::new(membership.ca_key, membership.grant.node_id);
        let Some(bytes) = self.read("map.bin")? else { return Ok(empty) };
        match empty.restore(&bytes) {
            Ok(mut map) => {
                if let Some(journal) = self.read("map.journal")? {
                    map.replay(&journal);
                }
                Ok(map)
            }
            Err(error) => {
                tracing::warn!(path = %self.path.join("map.bin").display(), %error, "cached map ignored");
                Ok(MapCache::new(membership.ca_key, membership.grant.node_id))
            }
        }
    }

    /// Stores the map.
    pub fn store_map(&self, encoded: &[u8]) -> Result<(), StateError> {
        self.replace("map.bin", encoded)?;
        // The journal belongs to the previous map, and would be ignored.
        self.remove("map.journal")
    }

    /// Stores changes of the map in its journal. With `is_first`, the journal begins with them. With `must_sync`,
    /// returns after they are on the disk.
    pub fn append_map(
        &self,
        bytes: &[u8],
        is_first: bool,
        must_sync: bool,
    ) -> Result<(), StateError> {
        let directory = self.writable()?;
        if is_first {
            return Ok(directory.replace("map.journal", 0o600, bytes)?);
        }
        Ok(directory.append("map.journal", bytes, must_sync)?)
    }

    /// Returns the cached prefixes, empty before the first run. A damaged file is logged and
    /// treated as absent.
    pub fn prefixes(&self) -> Result<CachedPrefixes, StateError> {
        let name = "prefixes.json";
        let Some(bytes) = self.read(name)? else { return Ok(CachedPrefixes::default()) };
        Ok(serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            tracing::warn!(path = %self.path.join(name).display(), %error, "cached prefixes ignored");
            CachedPrefixes::default()
        }))
    }

    /// Stores the cached prefixes.
    pub fn store_prefixes(&self, prefixes: &CachedPrefixes) -> Result<(), StateError> {
        let json = serde_json::to_vec(prefixes)
            .map_err(|error| self.damaged("prefixes.json", &error.to_string()))?;
        self.replace("prefixes.json", &json)
    }

    /// Returns the networks to which the machine was connected when it joined. A file that is damaged or
    /// cannot be read is logged and treated as absent: it only exempts networks from the guards.
    pub fn connected_networks(&self) -> Vec<IpNet> {
        let name = "networks.json";
        let ignored = |error: &dyn std::fmt::Display| {
            tracing::warn!(path = %self.path.join(name).display(), %error, "local networks ignored");
            Vec::new()
        };
        match self.read(name) {
            Ok(None) => Vec::new(),
            Ok(Some(bytes)) => {
                serde_json::from_slice(&bytes).unwrap_or_else(|error| ignored(&error))
            }
            Err(error) => ignored(&error),
        }
    }

    /// Stores the networks to which the machine is connected as it joins.
    pub fn store_connected_networks(&self, networks: &[IpNet]) -> Result<(), StateError> {
        let json = serde_json::to_vec(networks)
            .map_err(|error| self.damaged("networks.json", &error.to_string()))?;
        self.replace("networks.json", &json)
    }

    /// Returns the addresses that the machine needed when it joined. `None` if an earlier version joined. A
    /// file that is damaged or cannot be read is logged and treated as absent: with it, this machine only
    /// refuses more.
    pub fn host_addresses(&self) -> Option<HostAddresses> {
        let name = "host.json";
        let parsed = self.read(name).map_err(|error| error.to_string()).and_then(|bytes| {
            let parse = |bytes: Vec<u8>| serde_json::from_slice::<HostFile>(&bytes);
            bytes.map(parse).transpose().map_err(|error| error.to_string())
        });
        let file = parsed.unwrap_or_else(|error| {
            tracing::warn!(path = %self.path.join(name).display(), %error, "addresses ignored");
            None
        })?;
        let HostFile { gateways, dns_servers, uplinks } = file;
        Some(HostAddresses { gateways, dns_servers, uplinks })
    }

    /// Stores the addresses that the machine needs as it joins.
    pub fn store_host_addresses(&self, addresses: HostAddresses) -> Result<(), StateError> {
        let HostAddresses { gateways, dns_servers, uplinks } = addresses;
        let json = serde_json::to_vec(&HostFile { gateways, dns_servers, uplinks })
            .map_err(|error| self.damaged("host.json", &error.to_string()))?;
        self.replace("host.json", &json)
    }

    /// Returns when a controller confirmed the map last, in seconds since 1970. A file that is damaged or
    /// cannot be read is logged, and the map counts as never confirmed. `None` if there is no file.
    pub fn confirmation(&self) -> Option<u64> {
        let parsed = self.read(CONFIRMED).map_err(|error| error.to_string()).and_then(|bytes| {
            let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().parse::<u64>();
            bytes.map(text).transpose().map_err(|error| error.to_string())
        });
        parsed.unwrap_or_else(|error| {
            tracing::warn!(path = %self.path.join(CONFIRMED).display(), %error, "age of the map unknown");
            Some(0)
        })
    }

    /// Stores when a controller confirmed the map, in seconds since 1970.
    pub fn store_confirmation(&self, time: u64) -> Result<(), StateError> {
        self.replace(CONFIRMED, format!("{time}\n").as_bytes())
    }

    /// Returns the stored facts of the Kubernetes Node object, in encoded form.
    pub fn kubernetes(&self) -> Result<Option<Vec<u8>>, StateError> {
        self.read("kubernetes.json")
    }

    /// Stores the facts of the Kubernetes Node object.
    pub fn store_kubernetes(&self, encoded: &[u8]) -> Result<(), StateError> {
        self.replace("kubernetes.json", encoded)
    }

    /// Stores the deadline after which the join is undone unless it is confirmed.
    pub fn store_unconfirmed(&self, unconfirmed: &Unconfirmed) -> Result<(), StateError> {
        self.replace(confirm::NAME, &unconfirmed.encode())
    }

    /// Makes the join permanent. Returns whether it was still to be confirmed.
    pub fn confirm(&self) -> Result<bool, StateError> {
        match confirm::status(&self.path, &Moment::now()) {
            Confirmation::Settled => Ok(false),
            Confirmation::Due(_) => {
                self.remove(confirm::NAME)?;
                self.sync_dir()?;
                Ok(true)
            }
            Confirmation::Missed => Err(StateError::Unconfirmed),
        }
    }

    /// Removes the deadline for confirming the join.
    pub fn forget_unconfirmed(&self) -> Result<(), StateError> {
        self.remove(confirm::NAME)
    }

    /// Stores why the last join was undone.
    pub fn store_undone(&self, reason: &str) -> Result<(), StateError> {
        let line = format!("{reason}\n");
        self.replace(JOIN_FAILURE, line.as_bytes())?;
        self.replace(confirm::UNDONE, line.as_bytes())
    }

    /// Returns whether the last join was undone and the units are still enabled.
    pub fn is_undone(&self) -> bool {
        self.path.join(confirm::UNDONE).exists()
    }

    /// Returns why the last join failed or was undone, if it did.
    pub fn join_failure(&self) -> Result<Option<String>, StateError> {
        let reason = self.read(JOIN_FAILURE)?;
        Ok(reason.map(|reason| String::from_utf8_lossy(&reason).into_owned()))
    }

    /// Removes the mark of an undone join.
    pub fn forget_undone(&self) -> Result<(), StateError> {
        self.remove(confirm::UNDONE)
    }

    /// Removes the membership, the certificate, the map and the keys. After the next join the
    /// machine is a new node.
    pub fn forget(&self) -> Result<(), StateError> {
        // The membership is removed first, so that a crash halfway leaves a machine that has not
        // joined.
        for name in [
            "membership.json",
            "certificate.pem",
            "map.bin",
            "map.journal",
            CONFIRMED,
            "prefixes.json",
            "networks.json",
            "host.json",
            "counters.json",
            "kubernetes.json",
            "wireguard.key",
            "identity.key",
            DOWN,
            confirm::NAME,
        ] {
            self.remove(name)?;
        }
        self.sync_dir()
    }

    fn remove(&self, name: &str) -> Result<(), StateError> {
        self.unsaved_files().settled(name);
        match self.existing()? {
            Some(directory) => Ok(directory.remove(name)?),
            None => Ok(()),
        }
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        Ok(self.existing()?.map(|directory| directory.read(name)).transpose()?.flatten())
    }

    /// Returns the directory. `None` if it does not exist, which is possible only if it is only
    /// read.
    fn existing(&self) -> Result<Option<PrivateDirectory>, StateError> {
        if let Some(directory) = &self.directory {
            return Ok(Some(directory.clone()));
        }
        match directory::open_for(&self.path, account::AGENT) {
            Ok(directory) => Ok(Some(directory)),
            Err(error) if error.io_kind() == Some(io::ErrorKind::NotFound) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Replaces a file. If that fails, keeps the content in memory for [`Self::save_again`].
    fn replace(&self, name: &'static str, bytes: &[u8]) -> Result<(), StateError> {
        let mut unsaved = self.unsaved_files();
        let written = self.write(name, bytes);
        match &written {
            Ok(()) => unsaved.settled(name),
            Err(StateError::Directory(DirectoryError::Io { source, .. })) => {
                unsaved.failed(name, bytes, source.to_string());
            }
            Err(error) => unsaved.failed(name, bytes, error.to_string()),
        }
        written
    }

    /// Writes a file atomically.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        Ok(self.writable()?.replace(name, 0o600, bytes)?)
    }

    /// Returns the directory for writing. Creates it if it does not exist.
    fn writable(&self) -> Result<PrivateDirectory, StateError> {
        match &self.directory {
            Some(directory) => Ok(directory.clone()),
            None => Ok(directory::create_for(&self.path, account::AGENT)?),
        }
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
