//! `towline join`.

use std::io::Read as _;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use towline_proto::id::NodeName;
use towline_proto::token::JoinToken;

use super::local::runtime;
use super::output::{self, Format};
use crate::config::Config;
use crate::join::{Joined, join};
use crate::state::StateDir;

#[derive(Debug, Args)]
pub(super) struct JoinArgs {
    /// The token itself. Other users of this machine can read it in the list of processes: use
    /// --token-file, TOWLINE_TOKEN or standard input instead
    #[arg(value_name = "TOKEN")]
    token: Option<String>,
    /// File that holds the token; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// This node's name, a DNS label [default: the host name up to its first dot]
    #[arg(long, env = "TOWLINE_NAME")]
    name: Option<String>,
    /// How to write what is found
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(serde::Serialize)]
struct Report {
    name: String,
    node_id: String,
    mesh_id: String,
    overlay_addresses: Vec<String>,
    already: bool,
}

pub(super) fn run(config: &Config, args: JoinArgs) -> anyhow::Result<()> {
    let name = name(args.name)?;
    let state = StateDir::open(&config.state_dir)?;
    let joined = match state.membership()? {
        // A member needs no token to be told that it is one.
        Some(membership) if membership.grant.name == name => Joined::Already(membership),
        _ => {
            let token = token(args.token, args.token_file)?;
            runtime()?.block_on(join(&state, &token, &name, config.routing.mark))?
        }
    };
    let (membership, already) = match joined {
        Joined::New(membership) => (membership, false),
        Joined::Already(membership) => (membership, true),
    };
    let grant = &membership.grant;
    if already {
        eprintln!("this machine is already `{}`: nothing was changed", grant.name);
    } else {
        eprintln!("joined as `{}`; now run `towline agent`", grant.name);
    }
    let report = Report {
        name: grant.name.to_string(),
        node_id: grant.node_id.to_string(),
        mesh_id: grant.mesh_id.to_string(),
        overlay_addresses: grant.overlay.iter().map(|address| address.to_string()).collect(),
        already,
    };
    if let Some(document) = output::document(args.output, &report)? {
        output::print(&document)?;
    }
    Ok(())
}

/// From the argument, the file, the environment, or standard input, in this order.
fn token(argument: Option<String>, file: Option<PathBuf>) -> anyhow::Result<JoinToken> {
    if let Some(text) = argument {
        eprintln!(
            "warning: a token on the command line can be read by other users; prefer --token-file"
        );
        return Ok(text.parse()?);
    }
    if let Some(path) = file.filter(|path| path.as_os_str() != "-") {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read the token from {}", path.display()))?;
        return Ok(text.parse()?);
    }
    // Not through clap, which would show the variable's value in its help.
    if let Ok(text) = std::env::var("TOWLINE_TOKEN") {
        return Ok(text.parse()?);
    }
    if std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        bail!("no token: give --token-file FILE, set TOWLINE_TOKEN, or write it to standard input");
    }
    let mut text = String::new();
    // A token is a few hundred bytes; the bound keeps a wrong file from filling the memory.
    std::io::stdin()
        .take(64 * 1024)
        .read_to_string(&mut text)
        .context("cannot read the token from standard input")?;
    Ok(text.parse()?)
}

fn name(given: Option<String>) -> anyhow::Result<NodeName> {
    if let Some(name) = given {
        return Ok(name.parse()?);
    }
    let host = nix::unistd::gethostname().context("cannot read the host name")?;
    let host = host.to_string_lossy().to_lowercase();
    let label = host.split('.').next().unwrap_or_default();
    label
        .parse()
        .with_context(|| format!("the host name `{label}` cannot name a node: give --name"))
}
