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
use crate::doctor::{Agent, Answers, examine};

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
    let mut parts = of_agent(config);
    parts.extend(host::parts(config));
    let bytes = archive(parts, &Secrets::of_machine(config), SystemTime::now())
        .context("cannot create the archive")?;
    write(&path, &bytes)?;
    output::print(&path.display().to_string())?;
    eprintln!("it contains names, addresses and public keys of the mesh, and no private key");
    Ok(())
}

/// Asks the agent for everything that it reports, and checks the node with the same answers.
fn of_agent(config: &Config) -> Vec<Part> {
    let agent = doctor::agent(config);
    let mut parts = match &agent {
        Agent::Answered(answers) => of_answers(config, answers),
        Agent::Silent { reason, .. } => vec![Part::new("status.json", Err(reason.clone()))],
    };
    let checks = examine(&doctor::facts(config, agent));
    parts.push(Part::json("doctor.json", &doctor::Report::of(&checks)));
    parts
}

/// Returns the answers of the agent, and asks it for the details of peers and for the events.
fn of_answers(config: &Config, answers: &Answers) -> Vec<Part> {
    let Answers { status, peers } = answers;
    let mut parts = vec![Part::json("status.json", status), Part::json("peers.json", peers)];
    let of_state = |is_up| peers.iter().filter(move |peer| (peer.state == "up") == is_up);
    let chosen = of_state(false).chain(of_state(true)).take(PEERS);
    let names: Vec<String> = chosen.map(|peer| peer.name.clone()).collect();
    let details = with_agent(&config.socket, async |mut agent| {
        let mut parts = Vec::new();
        let failed = |status: tonic::Status| status_error(&status).to_string();
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
    });
    parts.extend(details.unwrap_or_else(|error| {
        let reason = output::error_line(error.as_ref());
        vec![Part::new("events.json", Err(reason))]
    }));
    parts
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
    fn the_checks_are_the_report_of_doctor_also_without_an_agent() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let config = Config { socket, state_dir: directory.path().to_owned(), ..Config::default() };
        let parts = of_agent(&config);
        let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
        assert_eq!(names, ["status.json", "doctor.json"]);
        assert!(parts[0].text.is_err());
        let report: serde_json::Value =
            serde_json::from_str(parts[1].text.as_ref().unwrap()).unwrap();
        for key in ["schema_version", "healthy", "checks"] {
            assert!(report.get(key).is_some(), "{key}: {report}");
        }
    }

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
