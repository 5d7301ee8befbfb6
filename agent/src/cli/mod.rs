//! The command line: `towline`.
//!
//! Data goes to stdout, talk to stderr. Exit status 0 done, 1 failed, 2 wrong usage. A flag wins
//! over the environment, the environment over the file.

mod daemon;
mod guard;
mod install;
mod join;
pub(crate) mod local;
mod machine;
mod output;
mod peers;
mod ping;
mod status;
mod wait;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::Config;
use crate::daemon::Purpose;
use crate::state::StateError;
use output::Format;

/// Exit status of a service on a machine that has not joined a mesh ("not configured" of the Linux
/// Standard Base): the unit is not restarted then (`RestartPreventExitStatus`).
const NOT_JOINED: u8 = 6;

/// Joins this machine to an encrypted node network, and shows how it stands.
#[derive(Debug, Parser)]
#[command(name = "towline", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Configuration file [default: /etc/towline/agent.toml, if it is there]
    #[arg(long, env = "TOWLINE_CONFIG", global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// State directory, instead of the configured one
    #[arg(long, env = "TOWLINE_STATE_DIR", global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The agent's socket, instead of the configured one
    #[arg(long, env = "TOWLINE_SOCKET", global = true, value_name = "FILE")]
    socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join a mesh with a token (from a file, the environment, or standard input)
    Join(join::JoinArgs),
    /// Run the agent in the foreground
    Agent,
    /// Relay for nodes that have no direct path, and nothing else: no link, no routes
    Relay,
    /// Wait until the mesh is up
    Wait(wait::WaitArgs),
    /// Show how this node stands
    Status(OutputArgs),
    /// Show every peer: state, path, round-trip time, traffic
    Peers(OutputArgs),
    /// Show this machine's WireGuard public key, for the other end of a static peer
    Pubkey,
    /// Probe the path to a node
    Ping(ping::PingArgs),
    /// Leave the mesh for good: the node is removed, the machine opened, its units disabled
    Leave(machine::LeaveArgs),
    /// Open the machine until `towline up`, also over a reboot: stop the agent and remove its link,
    /// routes and guards
    Down,
    /// Bring up the mesh again after `towline down`
    Up(machine::UpArgs),
    /// Make a join permanent that was made with --confirm
    Confirm,
    /// Guard the mesh's networks before any agent runs, from what is on the disk (for the boot)
    Guard(guard::GuardArgs),
    /// Show the address by which other nodes know this one, for the kubelet's --node-ip
    NodeIp(guard::NodeIpArgs),
    /// Keep the tunnels' UDP port from sockets that ask for any port, as root (for the unit)
    #[command(hide = true)]
    ReservePort,
    /// Do as root what an agent that undid its join left to do (for the unit)
    #[command(hide = true)]
    AfterStop(machine::AfterStopArgs),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Show the version
    Version(OutputArgs),
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// How to write what is found
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Parse the configuration and say what is wrong with it
    Check,
    /// Write the configuration in force, defaults included
    Show,
}

/// Runs the command line.
pub fn run() -> ExitCode {
    // Nearly every command holds a key or a token.
    towline_service::process::forbid_dumps();
    let cli = Cli::parse();
    let is_agent = matches!(cli.command, Command::Agent | Command::Relay);
    let is_service = is_agent && std::env::var_os("NOTIFY_SOCKET").is_some();
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("towline: {error:#}");
            match error.downcast_ref() {
                // To a service manager it is no failure that the next start could end.
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
        Command::Agent => daemon::run(load(&cli.global)?, cli.global.config, Purpose::Node),
        Command::Relay => {
            let mut config = load(&cli.global)?;
            config.relay.enabled = true;
            daemon::run(config, cli.global.config, Purpose::Relay)
        }
        Command::Wait(args) => wait::run(&config()?, &args),
        Command::Status(args) => status::run(&config()?, args.output),
        Command::Peers(args) => peers::run(&config()?, args.output),
        Command::Pubkey => daemon::pubkey(&config()?),
        Command::Ping(args) => ping::run(&config()?, args),
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
            eprintln!("configuration is good");
            Ok(())
        }
        Command::Config(ConfigCommand::Show) => output::print(&toml::to_string(&config()?)?),
        Command::Version(args) => status::version(args.output),
    }
}

/// The configuration in force: the file, then the environment and the flags over it.
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
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
