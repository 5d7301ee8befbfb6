//! Implements `towline bundle`: an archive for somebody who looks into a problem of this node.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, bail};
use clap::Args;
use jiff::Timestamp;
use towline_proto::pb;
use towline_service::output;

use super::doctor;
use super::local::{status_error, with_agent};
use crate::bundle::{Part, Secrets, archive, host};
use crate::config::Config;
use crate::doctor::examine;

/// Number of peers with a file of their own. Those that are not up come first.
const PEERS: usize = 64;
/// Mode of the archive: names and addresses are nothing for other users.
const MODE: u32 = 0o600;

#[derive(Debug, Args)]
pub(super) struct BundleArgs {
    /// Archive to create [default: towline-bundle-TIME.tar.gz in this directory]
    file: Option<PathBuf>,
}

/// Writes the archive, and prints its path. What cannot be found out is named in its manifest.
pub(super) fn run(config: &Config, args: BundleArgs) -> anyhow::Result<()> {
    let path = args.file.unwrap_or_else(|| {
        let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
        format!("towline-bundle-{time}.tar.gz").into()
    });
    let mut parts = of_agent(config).unwrap_or_else(|error| {
        let reason = output::error_line(error.as_ref());
        vec![Part::new("status.json", Err(reason))]
    });
    let agent = doctor::agent(config);
    parts.push(Part::json("doctor.json", &examine(&doctor::facts(config, agent))));
    parts.extend(host::parts(config));
    let bytes = archive(parts, &Secrets::of_machine(config), SystemTime::now())
        .context("cannot create the archive")?;
    write(&path, &bytes)?;
    output::print(&path.display().to_string())?;
    eprintln!("it contains names, addresses and public keys of the mesh, and no private key");
    Ok(())
}

/// Asks the agent for everything that it reports.
fn of_agent(config: &Config) -> anyhow::Result<Vec<Part>> {
    with_agent(&config.socket, async |mut agent| {
        let mut parts = Vec::new();
        let failed = |status: tonic::Status| status_error(&status).to_string();
        let status = agent.status(pb::StatusRequest {}).await;
        parts.push(match status {
            Ok(status) => Part::json("status.json", &status.into_inner()),
            Err(status) => Part::new("status.json", Err(failed(status))),
        });
        let mut names = Vec::new();
        match agent.peers(pb::PeersRequest {}).await {
            Ok(peers) => {
                let peers = peers.into_inner().peers;
                parts.push(Part::json("peers.json", &peers));
                let of_state =
                    |is_up| peers.iter().filter(move |peer| (peer.state == "up") == is_up);
                let chosen = of_state(false).chain(of_state(true)).take(PEERS);
                names.extend(chosen.map(|peer| peer.name.clone()));
            }
            Err(status) => parts.push(Part::new("peers.json", Err(failed(status)))),
        }
        for name in names {
            // The name of a static peer may be its key, in base64.
            let file = format!("peers/{}.json", name.replace('/', "_"));
            parts.push(match agent.peer(pb::PeerRequest { node: name }).await {
                Ok(peer) => Part::json(file, &peer.into_inner()),
                Err(status) => Part::new(file, Err(failed(status))),
            });
        }
        let events = async {
            let mut stream = agent.events(pb::EventsRequest::default()).await?.into_inner();
            let mut events = Vec::new();
            while let Some(event) = stream.message().await? {
                events.push(event);
            }
            Ok::<_, tonic::Status>(events)
        };
        parts.push(match events.await {
            Ok(events) => Part::json("events.json", &events),
            Err(status) => Part::new("events.json", Err(failed(status))),
        });
        Ok(parts)
    })
}

/// Creates the archive. An existing file, or a link of another user in its place, is never written.
fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let cannot = || format!("cannot create {}", path.display());
    let mut options = OpenOptions::new();
    let created = options.write(true).create_new(true).mode(MODE).open(path);
    if created.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists) {
        bail!("{}: it exists: give the name of another file", cannot());
    }
    let mut file = created.with_context(cannot)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half an archive is of no use.
        let _ = std::fs::remove_file(path);
    }
    written.with_context(cannot)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_archive_is_private_and_replaces_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bundle.tar.gz");
        write(&path, b"one").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let error = write(&path, b"two").unwrap_err();
        assert!(error.to_string().starts_with("cannot create "), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
    }
}
