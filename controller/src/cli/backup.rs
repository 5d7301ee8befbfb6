//! `towline-controller backup`: copies the store of the running controller into a new file.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use tokio::time::timeout;
use towline_proto::pb;

use super::Common;
use super::client::{TIMEOUT, status_error};
use crate::store::{FileStore, Write};

/// Arguments of `backup`.
#[derive(Debug, Args)]
pub(super) struct Backup {
    /// New file for the copy; it can replace the store of a controller that is stopped
    file: PathBuf,
}

impl Backup {
    /// Runs the command and returns the line to print.
    pub(super) async fn run(self, common: &Common) -> anyhow::Result<String> {
        let shown = self.file.display();
        if self.file.try_exists().with_context(|| format!("cannot access {shown}"))? {
            bail!("cannot back up to {shown}: it exists: name a new file");
        }
        let mut client = common.connect().await?;
        let response = client.admin.backup(pb::BackupRequest {}).await.map_err(status_error)?;
        let mut messages = response.into_inner();
        let mut records: Vec<Write> = Vec::new();
        loop {
            let message = timeout(TIMEOUT, messages.message()).await;
            let message = message.context("the backup is not complete: no answer in time")?;
            let Some(message) = message.map_err(status_error)? else {
                bail!("the backup is not complete: the controller ended: try again");
            };
            records.extend(message.records.into_iter().map(|r| (r.key, Some(r.value))));
            if message.complete {
                break;
            }
        }
        FileStore::create(&self.file, &records)?;
        Ok(format!(
            "{} records saved in {shown}: keep the controller's ca.key, ca.crt and store.key with it",
            records.len()
        ))
    }
}
