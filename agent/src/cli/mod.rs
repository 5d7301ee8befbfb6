//! Command line of the agent: `towline`.
//!
//! Data goes to stdout, diagnostics to stderr. Exit status: 0 done, 1 failed, 2 wrong usage. Flags
//! take precedence over the environment, and the environment over the file.

#![expect(clippy::print_stderr, reason = "diagnostics of the command line")]

mod bundle;
mod daemon;
mod doctor;
mod events;
mod examples;
mod explain;
mod guard;
mod install;
mod join;
pub(crate) mod local;
mod machine;
mod netcheck;
mod peer;
mod peers;
mod ping;
mod status;
mod top;
mod trace;
mod wait;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use serde::Serialize;
use towline_proto::status::SCHEMA_VERSION;
use towline_service::event_output::EventsArgs;
use towline_service::log::LogArgs;
use towline_service::manual::{self, Shell};
use towline_service::output::{self, Format, OutputError};

use crate::config::Config;
use crate::daemon::Purpose;
use crate::state::StateError;

/// Exit status of a service on a machine that has not joined a mesh ("not configured" of the Linux
/// Standard Base). The unit is then not restarted (`RestartPreventExitStatus`).
const NOT_JOINED: u8 = 6;

/// Joins this machine to an encrypted node network and shows its state.
#[derive(Debug, Parser)]
#[command(name = "towline", version, propagate_version = true, after_help = examples::TOWLINE)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Configuration file [default: /etc/towline/agent.toml, if it exists]
    #[arg(long, env = "TOWLINE_CONFIG", global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// State directory; overrides the configuration
    #[arg(long, env = "TOWLINE_STATE_DIR", global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The agent's socket; overrides the configuration
    #[arg(long, env = "TOWLINE_SOCKET", global = true, value_name = "FILE")]
    socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join a mesh with a token (from a file, the environment, or standard input)
    #[command(after_help = examples::JOIN)]
    Join(join::JoinArgs),
    /// Run the agent in the foreground
    #[command(after_help = examples::AGENT)]
    Agent(LogArgs),
    /// Run as a relay only, for nodes that have no direct path: no link, no routes
    #[command(after_help = examples::RELAY)]
    Relay(LogArgs),
    /// Wait until the mesh can be used: link, routes and guards are in place. Waits for any other
    /// node for at most 30 s
    #[command(after_help = examples::WAIT)]
    Wait(wait::WaitArgs),
    /// Show the state of this node
    #[command(after_help = examples::STATUS)]
    Status(watch::WatchArgs),
    /// Show every peer: state, path, round-trip time, traffic
    #[command(after_help = examples::PEERS)]
    Peers(watch::WatchArgs),
    /// Show everything about one peer: every path that was tried, and what happened to it
    #[command(after_help = examples::PEER)]
    Peer(peer::PeerArgs),
    /// Show the peers live, by traffic: state, path, throughput, round-trip times of the last minute
    #[command(after_help = examples::TOP)]
    Top,
    /// Show what happened on this node lately: peers, paths, controllers, problems
    #[command(after_help = examples::EVENTS)]
    Events(EventsArgs),
    /// Show this machine's WireGuard public key, for the other end of a static peer
    #[command(after_help = examples::PUBKEY)]
    Pubkey,
    /// Probe the path to a node
    #[command(after_help = examples::PING)]
    Ping(ping::PingArgs),
    /// Check this node and its host, and show what to do about what is wrong
    #[command(after_help = examples::DOCTOR)]
    Doctor(OutputArgs),
    /// Explain why a peer is down, relayed or slow
    #[command(after_help = examples::EXPLAIN)]
    Explain(explain::ExplainArgs),
    /// Show what happens to a packet from this node to an address: peer, rule, route, guards,
    /// firewalls, path
    #[command(after_help = examples::TRACE)]
    Trace(trace::TraceArgs),
    /// Check what the network allows: UDP, IPv4, IPv6, the behaviour of the NAT, round-trip times, MTU
    #[command(after_help = examples::NETCHECK)]
    Netcheck(netcheck::NetcheckArgs),
    /// Write an archive for somebody who looks into a problem: status, peers, events, checks, routes,
    /// firewall, log. Without keys and tokens
    #[command(after_help = examples::BUNDLE)]
    Bundle(bundle::BundleArgs),
    /// Leave the mesh permanently: remove the node, its guards and routes, and disable its units
    #[command(after_help = examples::LEAVE)]
    Leave(machine::LeaveArgs),
    /// Open the machine until `towline up`, across reboots too: stop the agent and remove its link,
    /// routes and guards
    #[command(after_help = examples::DOWN)]
    Down,
    /// Bring the mesh up again after `towline down`
    #[command(after_help = examples::UP)]
    Up(machine::UpArgs),
    /// Make a join with --confirm permanent
    #[command(after_help = examples::CONFIRM)]
    Confirm,
    /// Install the guards before any agent runs, from the stored state (for the boot); list and release what
    /// is guarded
    #[command(after_help = examples::GUARD)]
    Guard(guard::GuardArgs),
    /// Show the address by which other nodes reach this one, for the kubelet's --node-ip
    #[command(after_help = examples::NODE_IP)]
    NodeIp(guard::NodeIpArgs),
    /// Reserve the tunnels' UDP port, so that no socket gets it by chance, as root (for the unit)
    #[command(hide = true)]
    ReservePort,
    /// Finish, as root, what an agent that undid its join cannot do (for the unit)
    #[command(hide = true)]
    AfterStop(machine::AfterStopArgs),
    /// Check or show the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the completions of this command line for a shell
    #[command(after_help = examples::COMPLETIONS)]
    Completions {
        /// Shell that reads them
        shell: Shell,
    },
    /// Write the man pages into a directory, one for each command (for packages)
    #[command(hide = true)]
    Man {
        /// Directory, which must exist
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Show the version
    #[command(after_help = examples::VERSION)]
    Version(OutputArgs),
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Document of a diagnosis: its fields, and the version of their form.
#[derive(Serialize)]
struct Versioned<'a, T> {
    schema_version: u32,
    #[serde(flatten)]
    document: &'a T,
}

impl<'a, T: Serialize> Versioned<'a, T> {
    fn new(document: &'a T) -> Self {
        Self { schema_version: SCHEMA_VERSION, document }
    }
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check the configuration and print its errors
    #[command(after_help = examples::CONFIG_CHECK)]
    Check,
    /// Print the effective configuration, with all defaults
    #[command(after_help = examples::CONFIG_SHOW)]
    Show,
}

/// Returns the definition of the command line, for completions, man pages and documents.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command line and returns its exit status.
pub fn run() -> ExitCode {
    // Nearly every command has a key or a token in memory.
    towline_service::process::forbid_dumps();
    let cli = Cli::parse();
    let is_agent = matches!(cli.command, Command::Agent(_) | Command::Relay(_));
    let is_service = is_agent && std::env::var_os("NOTIFY_SOCKET").is_some();
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.downcast_ref().is_some_and(OutputError::is_broken_pipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("towline: {}", output::error_line(error.as_ref()));
            match error.downcast_ref() {
                // A restart by the service manager would not help.
                Some(StateError::NotJoined { .. }) if is_service => ExitCode::from(NOT_JOINED),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    let config = || load(&cli.global);
    match cli.command {
        Command::Join(args) if args.install() => install::run(&cli.global, args),
        Command::Join(args) => join::run(&config()?, args),
        Command::Agent(log) => {
            daemon::run(load(&cli.global)?, cli.global.config, Purpose::Node, &log)
        }
        Command::Relay(log) => {
            let mut config = load(&cli.global)?;
            config.relay.enabled = true;
            daemon::run(config, cli.global.config, Purpose::Relay, &log)
        }
        Command::Wait(args) => wait::run(&config()?, &args),
        Command::Status(args) => {
            let config = config()?;
            watch::repeat(&args, || status::text_of(&config, args.output))
        }
        Command::Peers(args) => {
            let config = config()?;
            watch::repeat(&args, || peers::text_of(&config, args.output))
        }
        Command::Peer(args) => peer::run(&config()?, args),
        Command::Top => top::run(&config()?),
        Command::Events(args) => events::run(&config()?, args),
        Command::Pubkey => daemon::pubkey(&config()?),
        Command::Ping(args) => ping::run(&config()?, args),
        Command::Doctor(args) => doctor::run(&config()?, args.output),
        Command::Explain(args) => explain::run(&config()?, &args),
        Command::Trace(args) => trace::run(&config()?, &args),
        Command::Netcheck(args) => netcheck::run(&config()?, args),
        Command::Bundle(args) => bundle::run(&config()?, args),
        Command::Leave(args) => machine::leave(&config()?, &args),
        Command::Down => machine::down(&config()?),
        Command::Up(args) => machine::up(&config()?, &args),
        Command::Confirm => machine::confirm(&config()?),
        Command::AfterStop(args) => machine::after_stop(&config()?, &args),
        Command::ReservePort => machine::reserve_port(&config()?),
        Command::Guard(args) => guard::guard(&config()?, &args),
        Command::NodeIp(args) => guard::node_ip(&config()?, &args),
        Command::Config(ConfigCommand::Check) => {
            crate::static_peers::load(&config()?.peers)?;
            eprintln!("the configuration is valid");
            Ok(())
        }
        Command::Config(ConfigCommand::Show) => Ok(output::print(&toml::to_string(&config()?)?)?),
        Command::Completions { shell } => {
            Ok(output::print(&manual::completions(command(), shell))?)
        }
        Command::Man { directory } => Ok(manual::write_pages(command(), &directory)?),
        Command::Version(args) => status::version(args.output),
    }
}

/// Returns the effective configuration: the file, overridden by the environment and the flags.
fn load(global: &Global) -> anyhow::Result<Config> {
    let mut config = Config::load(global.config.as_deref())?;
    if let Some(dir) = &global.state_dir {
        config.state_dir.clone_from(dir);
    }
    if let Some(socket) = &global.socket {
        config.socket.clone_from(socket);
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        command().debug_assert();
    }
}
