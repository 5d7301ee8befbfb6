//! Implements `towline join`.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use towline_proto::id::{InvalidId, NodeName};
use towline_proto::limits;
use towline_service::output::{self, Format};
use zeroize::Zeroizing;

use super::local::runtime;
use crate::api_endpoint::DEFAULT_API_PORT;
use crate::config::Config;
use crate::confirm;
use crate::join::{Joined, Operator, TOKEN_VARIABLE, join_as};
use crate::state::{Membership, StateDir};
#[cfg(feature = "otel")]
use crate::telemetry;

#[derive(Debug, Args)]
pub(super) struct JoinArgs {
    /// The token itself. Other users of this machine can read it in the process list: use
    /// --token-file, TOWLINE_TOKEN or standard input instead
    #[arg(value_name = "TOKEN")]
    token: Option<String>,
    /// File that contains the token; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// This node's name, a DNS label; of a longer name, the part up to its first dot. In the
    /// environment, it is ignored on a member [default: the host name up to its first dot]
    #[arg(long, env = NAME)]
    name: Option<String>,
    /// Set up this machine as a node that survives reboots: write the configuration and the units,
    /// join, start the agent, wait until the mesh is up, and print the node's address
    #[arg(long)]
    install: bool,
    /// Join even if the mesh cuts off the SSH session that runs this command
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    how: InstallArgs,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Arguments of `towline join --install`.
#[derive(Debug, Args)]
pub(super) struct InstallArgs {
    /// Directory to install into, instead of the machine; its init system starts the agent later
    #[arg(long, value_name = "DIR", requires = "install")]
    pub(super) root: Option<PathBuf>,
    /// Address and port at which other nodes reach this one: a cloud's public address or a
    /// forwarded port (can be repeated; only applied when the configuration is created)
    #[arg(long, value_name = "ADDRESS:PORT", requires = "install")]
    pub(super) advertise: Vec<SocketAddr>,
    /// TCP port of this host that must be reachable outside the tunnel too, such as the API
    /// server's (can be repeated; only applied when the configuration is created)
    #[arg(long, value_name = "PORT", requires = "install")]
    pub(super) plain_port: Vec<u16>,
    /// This machine is a control-plane node: other nodes may use its API server, at this port. Needs a token
    /// of `token create --control-plane` (only applied when the configuration is created)
    // Text, because clap repeats a value that it cannot parse: it could be a token that follows the flag.
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = DEFAULT_API_PORT,
          requires = "install")]
    pub(super) control_plane: Option<String>,
    /// Try for this many seconds, then store the reason and start a timer that tries again
    #[arg(long, default_value_t = 300, value_name = "SECONDS", requires = "install")]
    pub(super) timeout: u64,
    /// Undo everything this many seconds after the agent's start, unless `towline confirm` is run
    /// before: a way back if the mesh locks you out
    #[arg(long, value_name = "SECONDS", requires = "install",
          value_parser = clap::value_parser!(u64).range(1..=confirm::MAX_SECONDS))]
    pub(super) confirm: Option<u64>,
}

impl JoinArgs {
    /// Returns whether the machine is to be set up too.
    pub(super) fn install(&self) -> bool {
        self.install
    }

    /// Returns the arguments that [`super::install`] needs.
    pub(super) fn parts(self) -> Parts {
        let Self { token, token_file, name, force, how, output, install: _ } = self;
        Parts { source: Source { argument: token, file: token_file }, name, force, how, output }
    }
}

/// Arguments for [`super::install`].
pub(super) struct Parts {
    pub(super) source: Source,
    pub(super) name: Option<String>,
    pub(super) force: bool,
    pub(super) how: InstallArgs,
    pub(super) output: Format,
}

/// Source of the token.
#[derive(Debug)]
pub(super) struct Source {
    argument: Option<String>,
    file: Option<PathBuf>,
}

#[derive(serde::Serialize)]
struct Report {
    /// Name of this node.
    name: String,
    /// Id of this node.
    node_id: String,
    /// Id of the mesh.
    mesh_id: String,
    /// Addresses of this node in the mesh.
    overlay_addresses: Vec<String>,
    /// True if the machine was a member before.
    already: bool,
}

pub(super) fn run(config: &Config, args: JoinArgs) -> anyhow::Result<()> {
    let state = StateDir::open(&config.state_dir)?;
    let joined = match state.membership()? {
        // A member needs no token, and no name that can be used.
        Some(membership) if is_meant(&membership, args.name.as_deref())? => {
            Joined::Already(membership)
        }
        _ => {
            let name = name(args.name)?;
            let source = Source { argument: args.token, file: args.token_file };
            let token = source.read()?.parse()?;
            let operator = operator(config, args.force);
            let mark = config.routing.mark;
            #[cfg(feature = "otel")]
            let started = std::time::SystemTime::now();
            let runtime = runtime()?;
            let joined = runtime.block_on(join_as(&state, &token, &name, mark, &operator))?;
            #[cfg(feature = "otel")]
            if let Joined::New(membership) = &joined {
                let report = telemetry::report_join(&config.telemetry, &membership.grant, started);
                runtime.block_on(report);
            }
            state.forget_undone()?;
            joined
        }
    };
    let (membership, already) = match joined {
        Joined::New(membership) => (membership, false),
        Joined::Already(membership) => (membership, true),
    };
    let grant = &membership.grant;
    if already {
        eprintln!("this machine is already a member as `{}`: nothing was changed", grant.name);
    } else {
        eprintln!("joined as `{}`: run `towline agent`", grant.name);
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

/// Returns how the operator is connected to this machine; with `force`, no connection is checked.
pub(super) fn operator(config: &Config, force: bool) -> Operator {
    if force { Operator::default() } else { super::machine::operator(config) }
}

impl Source {
    /// Reads the token from the argument, the file, the environment or standard input, in this
    /// order.
    pub(super) fn read(self) -> anyhow::Result<Zeroizing<String>> {
        if let Some(text) = self.argument {
            eprintln!(
                "warning: other users can read a token on the command line: use --token-file"
            );
            return Ok(Zeroizing::new(text));
        }
        if let Some(path) = self.file.filter(|path| path.as_os_str() != "-") {
            return std::fs::read_to_string(&path)
                .map(Zeroizing::new)
                .with_context(|| format!("cannot read the token from {}", path.display()));
        }
        // clap is not used for this variable, because its help would show the value.
        if let Ok(text) = std::env::var(TOKEN_VARIABLE) {
            return Ok(Zeroizing::new(text));
        }
        if std::io::IsTerminal::is_terminal(&std::io::stdin()) {
            bail!("no token: use --token-file FILE, {TOKEN_VARIABLE} or standard input");
        }
        let mut text = Zeroizing::new(String::new());
        // A token has a few hundred bytes; the bound limits the memory that a wrong file takes.
        std::io::stdin()
            .take(64 * 1024)
            .read_to_string(&mut text)
            .context("cannot read the token from standard input")?;
        Ok(text)
    }
}

/// Environment variable with the name of a node, for example that of a Kubernetes Node.
const NAME: &str = "TOWLINE_NAME";

/// Returns whether a join under the given name is meant for this membership. A name from the
/// environment is a default like the host name, so a member may have another one. Fails if the name
/// cannot be used.
pub(super) fn is_meant(membership: &Membership, given: Option<&str>) -> Result<bool, NameError> {
    let Some(given) = given else { return Ok(true) };
    if std::env::var(NAME).is_ok_and(|from_environment| from_environment == given) {
        return Ok(true);
    }
    Ok(name_of(given)? == membership.grant.name)
}

/// Returns the name of this node: the given one, or by default the host name.
pub(super) fn name(given: Option<String>) -> anyhow::Result<NodeName> {
    let text = match given {
        Some(given) => given,
        None => {
            let host = nix::unistd::gethostname().context("cannot read the host name")?;
            host.to_string_lossy().into_owned()
        }
    };
    Ok(name_of(&text)?)
}

/// Error of deriving the name of a node.
#[derive(Debug, thiserror::Error)]
pub(super) enum NameError {
    /// The machine has not got its own name yet.
    #[error(
        "`{0}` is not a valid node name: every machine has it until it gets its own: set the host \
         name, or use --name"
    )]
    Localhost(String),
    /// The first label has characters that a node's name cannot have.
    #[error("`{given}` gives no valid node name: {source}: use --name")]
    Invalid {
        /// Text that the name was derived from, escaped.
        given: String,
        /// Reason.
        source: InvalidId,
    },
}

/// Returns the name of a node that is called `text`, for example by its DNS name: the first label in
/// lower case, cut to the length that a name may have.
fn name_of(text: &str) -> Result<NodeName, NameError> {
    let lower = text.trim().to_lowercase();
    let label = lower.split('.').next().unwrap_or_default();
    if LOCALHOST.contains(&label) {
        return Err(NameError::Localhost(label.to_owned()));
    }
    let end = label.floor_char_boundary(limits::NAME_BYTES);
    let cut = label.get(..end).unwrap_or(label);
    let cut = if end < label.len() { cut.trim_end_matches('-') } else { cut };
    cut.parse().map_err(|source| {
        let given = text.chars().take(80).flat_map(char::escape_default).collect();
        NameError::Invalid { given, source }
    })
}

/// Host names of machines that did not get their own one yet.
const LOCALHOST: [&str; 4] = ["localhost", "localhost4", "localhost6", "ip6-localhost"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_first_label_of_what_the_machine_is_called() {
        let long = "x".repeat(62);
        for (text, name) in [
            ("gpu-1", "gpu-1"),
            ("GPU-Node1.Site-A.example.com", "gpu-node1"),
            ("ip-10-0-1-5.eu-west-1.compute.internal", "ip-10-0-1-5"),
            ("localhost-1.example", "localhost-1"),
            (&format!("{long}-yz.example.com"), &long),
            (&format!("{long}yz"), &format!("{long}y")),
            (&format!("a.{}", "b.".repeat(100)), "a"),
        ] {
            assert_eq!(name_of(text).unwrap().as_str(), name, "{text}");
        }
    }

    #[test]
    fn a_name_that_says_nothing_or_cannot_be_used_tells_the_way_out() {
        for text in
            ["localhost", "LOCALHOST.localdomain", "ip6-localhost", "my_node", "", ".a", "-a"]
        {
            let line = name_of(text).unwrap_err().to_string();
            assert!(line.contains("--name") && !line.contains('\n'), "{line}");
        }
    }
}
