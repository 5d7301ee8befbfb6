//! Opening of a mesh at the start of a controller: its store and its ledger, the count of the start, the configuration,
//! and the key of the local administrator.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::sync::Arc;

use ipnet::Ipv6Net;
use towline_proto::id::IdentityKey;
use towline_proto::node::MeshConfig;
use towline_proto::token::ControllerAddress;

use super::ServeError;
use crate::authority::{self, Authority};
use crate::config::{LEASE, MeshSettings, OVERLAY_V4};
use crate::entropy::{NoEntropy, random};
use crate::ledger::Ledger;
use crate::state_dir::StateDir;
use crate::store::{CommitError, Identity, Place, Store};
use crate::writer;
use towline_registry::{LOCAL_ADMIN, Now, Starts};

/// Consequence of a sequence number that is not written, for the log.
pub(crate) const SEQUENCE_NOT_WRITTEN: &str = "a restored snapshot of the store may not be noticed";

/// Returns the identity of the CA's mesh in a store.
pub(crate) fn identity(authority: &Authority) -> Identity {
    let (mesh, ca) = (authority.mesh_id().to_string(), authority.fingerprint().to_string());
    Identity { mesh, ca }
}

/// Returns whether no mesh was ever set up in this directory and at the place of the store. A directory
/// with the counter of starts but without the store is an error: a new mesh in it would overwrite what
/// is left. The CA's files alone are left by a first start that was interrupted, and are used again.
pub(crate) fn is_fresh(dir: &StateDir, place: &Place) -> Result<bool, ServeError> {
    match (place.has_mesh()?, dir.starts()?.is_some()) {
        (false, false) => Ok(true),
        (false, true) => Err(place.missing().into()),
        // Also after a kill during the first start, once the store exists.
        (true, _) => Ok(false),
    }
}

/// What a mesh is opened with.
#[derive(Clone, Copy)]
pub(crate) struct Opening<'a> {
    /// State directory.
    pub(crate) dir: &'a StateDir,
    /// CA of the mesh.
    pub(crate) authority: &'a Arc<Authority>,
    /// Settings that are applied to the mesh.
    pub(crate) settings: &'a MeshSettings,
    /// Addresses that this controller advertises.
    pub(crate) advertise: &'a [ControllerAddress],
    /// True if records that are not authenticated are taken.
    pub(crate) migrate: bool,
    /// Time of the start.
    pub(crate) now: Now,
}

/// Opens the store, or creates one for a new mesh, and begins with it.
pub(crate) fn open_ledger(
    opening: Opening<'_>,
    place: Place,
    fresh: bool,
) -> Result<(Box<dyn Store>, Ledger), ServeError> {
    let Opening { dir, authority, settings, .. } = opening;
    let identity = identity(authority);
    let store = if fresh {
        let mut ledger = Ledger::create(authority.clone(), first_mesh(authority, settings)?);
        let is_file = matches!(place, Place::File(_));
        let store = place.create(&identity, &ledger.take_changes(BTreeMap::new).writes)?;
        if is_file && let Ok(file) = std::fs::File::open(dir.store()) {
            dir.give(&file)?;
        }
        tracing::info!(mesh = %authority.mesh_id(), ca = %authority.fingerprint(), "mesh created");
        store
    } else {
        place.store(&identity)?
    };
    begin(opening, store)
}

/// Loads the ledger, counts this start and applies the configuration. The addresses that this
/// controller advertises become the mesh's list of controllers if it has none yet.
///
/// If the store accepts no writes, the mesh is served unchanged. The start is not counted then, so
/// that the next start finds consistent counters.
fn begin(
    opening: Opening<'_>,
    mut store: Box<dyn Store>,
) -> Result<(Box<dyn Store>, Ledger), ServeError> {
    let Opening { dir, authority, settings, advertise, migrate, now } = opening;
    let mut ledger = writer::read(&mut *store, authority.clone(), migrate, now)?;
    let beside = newest_start(dir.starts()?, dir.sequence()?, &*store, ledger.counters());
    let started = ledger.registry().start(beside, now);
    if started.restored {
        tracing::warn!(
            epoch = started.starts.epoch,
            voided_tokens = started.voided,
            "store was restored from a backup: all watches restart, open tokens are void"
        );
    }
    ledger.registry().configure(|mesh| {
        mesh.overlay_v6 = settings.overlay_v6.unwrap_or(mesh.overlay_v6);
        mesh.overlay_v4 = settings.overlay_v4.unwrap_or(mesh.overlay_v4);
        mesh.lease = settings.lease.unwrap_or(mesh.lease);
        if let Some(protected) = &settings.protected {
            mesh.protected.clone_from(protected);
        }
        if let Some(sites) = &settings.trusted_sites {
            mesh.trusted_sites.clone_from(sites);
        }
        if let Some(ranges) = &settings.bypass_when_down {
            mesh.bypass_when_down.clone_from(ranges);
        }
        if mesh.controllers.is_empty() {
            mesh.controllers = advertise.to_vec();
        }
    })?;
    let listed = &ledger.registry().mesh().config.controllers;
    if let Some(address) = advertise.iter().find(|address| !listed.contains(address)) {
        tracing::warn!(
            %address,
            ?listed,
            "an advertised address is not in the mesh's list of controllers: change the list with \
             `towline-controller mesh set --controllers`"
        );
    }
    let expected = store.sequence();
    match store.commit(expected, &ledger.take_changes(BTreeMap::new).writes) {
        Ok(_) if migrate => writer::log_migrated(),
        Ok(_) => {}
        // The new epoch of a restored store must be on the disk before a client sees it.
        Err(error @ (CommitError::Failed { .. } | CommitError::Etcd(_))) if !started.restored => {
            tracing::error!(%error, "start not counted, changed settings not applied");
            let ledger = writer::reload(&mut *store, authority.clone(), migrate, now)?;
            return Ok((store, ledger));
        }
        Err(error) => return Err(error.into()),
    }
    match dir.set_starts(started.starts) {
        Err(error) if started.restored || dir.starts()?.is_none() => return Err(error.into()),
        stored => warn_unless_stored(stored, "this start is counted in the store only"),
    }
    // Only now: a store that was restored must look like that until its new epoch is on the disk.
    warn_unless_stored(dir.set_sequence(store.sequence()), SEQUENCE_NOT_WRITTEN);
    Ok((store, ledger))
}

/// Returns the counters of the newest start that is known. A store that is behind the sequence number
/// that it had is one from before that start, for example a snapshot of etcd that was restored. Unless
/// its epoch is newer than that number: then another controller has noticed it already.
fn newest_start(
    beside: Option<Starts>,
    last: Option<u64>,
    store: &dyn Store,
    counters: towline_registry::Counters,
) -> Option<Starts> {
    let is_noticed = beside.is_some_and(|beside| counters.epoch > beside.epoch);
    if is_noticed || last.is_none_or(|last| store.sequence() >= last) {
        return beside;
    }
    let beside = beside.unwrap_or(Starts { count: 0, epoch: counters.epoch });
    Some(Starts { count: beside.count.max(counters.starts.saturating_add(1)), ..beside })
}

/// Renews the credential of the local administrator, and lists its key if it is new.
///
/// If the disk accepts no writes, a controller that was set up before serves its mesh all the same: the local
/// socket needs no credential.
pub(crate) fn admit_local_admin(
    opening: Opening<'_>,
    fresh: bool,
    mut store: Box<dyn Store>,
    mut ledger: Ledger,
) -> Result<(Box<dyn Store>, Ledger), ServeError> {
    let Opening { dir, authority, now, .. } = opening;
    // Once all records are authenticated, none that is not may be taken.
    let migrate = opening.migrate && ledger.needs_rewrite();
    let is_revoked = |key| is_revoked(&mut ledger, key);
    let key = match authority::renew_admin(dir, authority, now.unix, is_revoked) {
        Ok(key) => key,
        Err(error) if fresh => return Err(error.into()),
        Err(error) => {
            warn_unless_stored(Err(error), "the administrator's certificate is not renewed");
            return Ok((store, ledger));
        }
    };
    ledger.registry().add_admin(key, LOCAL_ADMIN, now);
    let writes = ledger.take_changes(BTreeMap::new).writes;
    if writes.is_empty() {
        return Ok((store, ledger));
    }
    let expected = store.sequence();
    match store.commit(expected, &writes) {
        Ok(_) => {
            if migrate {
                writer::log_migrated();
            }
            Ok((store, ledger))
        }
        Err(error @ (CommitError::Failed { .. } | CommitError::Etcd(_))) => {
            tracing::error!(%error, "the administrator's key is not listed: use the local socket");
            let ledger = writer::reload(&mut *store, authority.clone(), migrate, now)?;
            Ok((store, ledger))
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns whether an administrator's key is listed as revoked.
pub(crate) fn is_revoked(ledger: &mut Ledger, key: IdentityKey) -> bool {
    ledger.registry().admin(key).is_some_and(|admin| admin.revoked_at.is_some())
}

/// Logs a file that could not be written, and the consequence of that.
pub(crate) fn warn_unless_stored<E: std::fmt::Display>(stored: Result<(), E>, consequence: &str) {
    if let Err(error) = stored {
        tracing::warn!(%error, consequence, "cannot write the state directory");
    }
}

fn first_mesh(authority: &Authority, settings: &MeshSettings) -> Result<MeshConfig, ServeError> {
    let overlay_v6 = match settings.overlay_v6 {
        Some(range) => range,
        None => random_ula()?,
    };
    let overlay_v4 = match settings.overlay_v4 {
        Some(range) => range,
        // The constant is a valid network.
        None => OVERLAY_V4.parse().unwrap_or_default(),
    };
    Ok(MeshConfig {
        mesh_id: authority.mesh_id(),
        overlay_v6,
        overlay_v4,
        protected: settings.protected.clone().unwrap_or_default(),
        trusted_sites: settings.trusted_sites.clone().unwrap_or_default(),
        bypass_when_down: settings.bypass_when_down.clone().unwrap_or_default(),
        controllers: Vec::new(),
        lease: settings.lease.unwrap_or(LEASE),
        generation: 1,
        epoch: 0,
    })
}

/// Returns a unique local /64: fd00::/8, 40 random bits (RFC 4193 section 3.1) and a random subnet
/// id.
fn random_ula() -> Result<Ipv6Net, NoEntropy> {
    let random: [u8; 7] = random()?;
    let mut address = [0; 16];
    address[0] = 0xfd;
    address[1..8].copy_from_slice(&random);
    // A /64 is a valid length.
    Ok(Ipv6Net::new(Ipv6Addr::from(address), 64).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::*;
    use crate::clock;
    use crate::state_dir::Lock;
    use crate::store::FileStore;

    /// Controller that does not run: what it is opened with, and the lock on its state directory.
    struct Stopped {
        dir: StateDir,
        authority: Arc<Authority>,
        settings: MeshSettings,
        now: Now,
        _lock: Lock,
        _directory: tempfile::TempDir,
    }

    impl Stopped {
        /// Returns one that was never started, with a CA of its own.
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let dir = StateDir::new(directory.path().join("state"));
            let lock = dir.lock().unwrap();
            let now = clock::now();
            let authority = Arc::new(Authority::load_or_create(&dir, true, now.unix).unwrap());
            let settings = MeshSettings::default();
            Self { dir, authority, settings, now, _lock: lock, _directory: directory }
        }

        fn opening(&self) -> Opening<'_> {
            Opening {
                dir: &self.dir,
                authority: &self.authority,
                settings: &self.settings,
                advertise: &[],
                migrate: false,
                now: self.now,
            }
        }

        /// Returns the place of its store.
        fn place(&self) -> Place {
            Place::File(self.dir.store())
        }
    }

    #[test]
    fn a_controller_serves_from_a_disk_that_takes_nothing() {
        let controller = Stopped::new();
        let (dir, opening) = (&controller.dir, controller.opening());
        let mut first = open_ledger(opening, controller.place(), true).unwrap();
        let mesh = first.1.registry().mesh().clone();
        drop(first);
        let before = dir.starts().unwrap().unwrap();

        let store = FileStore::open(&dir.store()).unwrap();
        store.fail_next_commits(1);
        let (mut store, mut ledger) = begin(opening, Box::new(store)).unwrap();
        assert_eq!(*ledger.registry().mesh(), mesh);
        assert_eq!(dir.starts().unwrap(), Some(before));
        // Once the disk has room, commits succeed again.
        let expected = store.sequence();
        store.commit(expected, &[]).unwrap();
        drop(store);

        // A restored backup is not served before its new epoch is on the disk.
        let ahead = Starts { count: before.count + 5, ..before };
        dir.set_starts(ahead).unwrap();
        let store = FileStore::open(&dir.store()).unwrap();
        store.fail_next_commits(1);
        assert!(begin(opening, Box::new(store)).is_err());
        let (_store, _ledger) = open_ledger(opening, controller.place(), false).unwrap();
        assert_eq!(dir.starts().unwrap().unwrap().count, ahead.count + 1);
    }

    #[test]
    fn a_store_is_migrated_once_the_disk_takes_it() {
        let controller = Stopped::new();
        let (dir, opening) = (&controller.dir, controller.opening());
        let (mut store, _) = open_ledger(opening, controller.place(), true).unwrap();
        writer::remove_authentication(&mut *store, opening.authority);
        drop(store);

        let opening = Opening { migrate: true, ..opening };
        let store = FileStore::open(&dir.store()).unwrap();
        store.fail_next_commits(2);
        let (store, ledger) = begin(opening, Box::new(store)).unwrap();
        let (store, ledger) = admit_local_admin(opening, false, store, ledger).unwrap();
        assert!(ledger.needs_rewrite(), "nothing could be written yet");
        let (mut store, ledger) = admit_local_admin(opening, false, store, ledger).unwrap();
        assert!(!ledger.needs_rewrite());
        writer::read(&mut *store, opening.authority.clone(), false, opening.now).unwrap();
    }

    #[test]
    fn a_store_that_is_behind_what_it_was_is_a_restored_one() {
        let controller = Stopped::new();
        let (dir, opening) = (&controller.dir, controller.opening());
        // The store is closed when the result is dropped.
        let epoch_of_start = |fresh| {
            let opened = open_ledger(opening, controller.place(), fresh);
            opened.map(|(_store, ledger)| ledger.counters().epoch).unwrap()
        };
        let epoch = epoch_of_start(true);
        assert_eq!(epoch_of_start(false), epoch);
        dir.set_sequence(1000).unwrap();
        assert_eq!(epoch_of_start(false), epoch + 1);
        assert_eq!(epoch_of_start(false), epoch + 1, "it is noticed once");
        // Another controller on the same store noticed it first.
        dir.set_sequence(1000).unwrap();
        let starts = dir.starts().unwrap().unwrap();
        dir.set_starts(Starts { epoch, ..starts }).unwrap();
        assert_eq!(epoch_of_start(false), epoch + 1);
    }

    #[test]
    fn the_default_overlay_ranges_are_what_they_should_be() {
        let v4: IpNet = OVERLAY_V4.parse().unwrap();
        let carrier: IpNet = "100.64.0.0/10".parse().unwrap();
        assert!(!carrier.contains(&v4));
        let v6 = random_ula().unwrap();
        assert_eq!((v6.prefix_len(), v6.trunc()), (64, v6));
        assert!("fd00::/8".parse::<Ipv6Net>().unwrap().contains(&v6));
        assert_ne!(random_ula().unwrap(), v6);
    }
}
