//! `towline-controller store`: copies the records of a mesh out of a store and into another one. No
//! controller is called: the commands open the store themselves.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

use super::{Common, examples};
use crate::authority::Authority;
use crate::clock;
use crate::config::{self, Settings};
use crate::ledger::Ledger;
use crate::server::opening;
use crate::state_dir::StateDir;
use crate::store::etcd::EtcdStore;
use crate::store::{FileStore, Location, Place, Record, Store as _, Write};

/// Commands for the store.
#[derive(Debug, Subcommand)]
pub(super) enum Store {
    /// Copy the store of a controller that is stopped, or one in etcd, into a new file
    #[command(after_help = examples::STORE_EXPORT)]
    Export(Transfer),
    /// Fill an empty store from a file of `store export` or `backup`
    #[command(after_help = examples::STORE_IMPORT)]
    Import(Transfer),
}

/// Arguments of the commands.
#[derive(Debug, Args)]
pub(super) struct Transfer {
    /// File with the records
    file: PathBuf,
    /// Store of the mesh: `file`, or `etcd://HOST:PORT,HOST:PORT` [default: the one of the configuration]
    #[arg(long, env = "TOWLINE_CONTROLLER_STORE", value_name = "STORE")]
    store: Option<String>,
}

impl Store {
    /// Runs the command and returns the line to print.
    pub(super) fn run(self, common: &Common) -> anyhow::Result<String> {
        match self {
            Self::Export(transfer) => transfer.export(common),
            Self::Import(transfer) => transfer.import(common),
        }
    }
}

impl Transfer {
    fn export(self, common: &Common) -> anyhow::Result<String> {
        let shown = self.file.display();
        if self.file.try_exists().with_context(|| format!("cannot access {shown}"))? {
            bail!("cannot export to {shown}: it exists: name a new file");
        }
        let (dir, location) = self.place(common)?;
        let mut records = match location {
            Location::File => {
                let place = Place::File(dir.store());
                if !place.has_mesh()? {
                    return Err(place.missing().into());
                }
                let lock = dir.lock().context(
                    "cannot export while the controller runs: use `towline-controller backup`",
                )?;
                let records = FileStore::open(&dir.store())?.load()?;
                drop(lock);
                records
            }
            Location::Etcd(settings) => EtcdStore::read(settings)?,
        };
        mark(&dir, &mut records)?;
        let count = records.len();
        FileStore::create(&self.file, &writes(records))?;
        Ok(format!(
            "{count} records exported to {shown}: keep the controller's ca.key, ca.crt and store.key with it"
        ))
    }

    fn import(self, common: &Common) -> anyhow::Result<String> {
        let shown = self.file.display();
        let mut records = FileStore::open(&self.file)?.load()?;
        let (dir, location) = self.place(common)?;
        let lock = dir.lock().context("cannot import while the controller runs: stop it")?;
        // The mark: the file may be old, and its controller may have gone on since.
        let authority = mark(&dir, &mut records)?;
        let count = records.len();
        let is_file = location == Location::File;
        let place = Place::open(&location, dir.store())?;
        if place.has_mesh()? {
            bail!(
                "cannot import {shown}: the store has a mesh: name an empty one, or move {} away",
                if is_file { "its file" } else { "its keys" }
            );
        }
        let store = place.create(&opening::identity(&authority), &writes(records))?;
        if is_file {
            let file = std::fs::File::open(dir.store()).context("cannot open the new store")?;
            dir.give(&file)?;
        }
        let name = store.name();
        drop((store, lock));
        Ok(format!("{count} records imported into {name}: start the controller"))
    }

    /// Returns the state directory and the location of the store.
    fn place(&self, common: &Common) -> anyhow::Result<(StateDir, Location)> {
        let flags = Settings { store: self.store.clone(), ..Settings::default() };
        let settings = flags.or(common.settings()?);
        let dir = StateDir::new(settings.state_dir()).with_credentials(config::credentials());
        Ok((dir, settings.location()?))
    }
}

/// Verifies the records with the CA of the state directory, and marks them as a backup.
fn mark(dir: &StateDir, records: &mut [Record]) -> anyhow::Result<Arc<Authority>> {
    let now = clock::now();
    let authority = Arc::new(Authority::load_or_create(dir, false, now.unix)?);
    let ledger = Ledger::load(authority.clone(), records, false, now)
        .context("the store is damaged, or is not of the mesh of ca.crt")?;
    ledger.mark_backup(records);
    Ok(authority)
}

fn writes(records: Vec<Record>) -> Vec<Write> {
    records.into_iter().map(|(key, value)| (key, Some(value))).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::server::Controller;

    /// Creates a state directory with a mesh, as a first start does.
    fn new_mesh(root: &Path) -> Common {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let common = common(root);
        let flags =
            Settings { listen: Some("127.0.0.1:0".parse().unwrap()), ..Settings::default() };
        let config = flags.or(common.settings().unwrap()).resolve().unwrap();
        let _context = runtime.enter();
        drop(Controller::start(config).unwrap());
        common
    }

    fn common(root: &Path) -> Common {
        let config = root.join("controller.toml");
        std::fs::write(&config, "").unwrap();
        let state_dir = Some(root.join("state"));
        Common { config: Some(config), state_dir, controller: None }
    }

    fn transfer(file: &Path) -> Transfer {
        Transfer { file: file.to_owned(), store: None }
    }

    /// Returns the keys of the store in a state directory, once the thread of a dropped controller has
    /// closed it.
    fn keys(store: &Path) -> Vec<String> {
        let records = loop {
            match FileStore::open(store) {
                Ok(mut store) => break store.load().unwrap(),
                Err(crate::store::OpenError::Locked(_)) => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        };
        records.into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn a_mesh_moves_to_an_empty_store_of_the_same_ca_and_nowhere_else() {
        let root = tempfile::tempdir().unwrap();
        let common = new_mesh(root.path());
        let (store, file) = (root.path().join("state/towline.redb"), root.path().join("export"));
        let before = keys(&store);
        let line = transfer(&file).export(&common).unwrap();
        assert!(line.starts_with(&format!("{} records", before.len())), "{line}");
        let error = transfer(&file).export(&common).unwrap_err().to_string();
        assert!(error.contains("it exists"), "{error}");

        let error = transfer(&file).import(&common).unwrap_err().to_string();
        assert!(error.contains("the store has a mesh"), "{error}");
        std::fs::remove_file(&store).unwrap();
        transfer(&file).import(&common).unwrap();
        assert_eq!(keys(&store), before);

        let other = tempfile::tempdir().unwrap();
        let theirs = new_mesh(other.path());
        let store = other.path().join("state/towline.redb");
        keys(&store);
        std::fs::remove_file(&store).unwrap();
        let error = format!("{:#}", transfer(&file).import(&theirs).unwrap_err());
        assert!(error.contains("different meshes"), "{error}");
        assert!(!store.exists(), "nothing was written");
    }
}
