//! The command line. Stdout is data, stderr is diagnostics. Exit status: 0 done, 1 failed, 2 wrong
//! usage.
//!
//! `serve` runs the controller. The commands `token`, `node`, `mesh`, `admin` and `backup` call a running one
//! over gRPC: by its local socket, or with the administrator's credential from the state directory. They
//! never open its store. The command `store` opens a store that no running controller has.

#![expect(clippy::print_stderr, reason = "diagnostics of the command line")]

mod admin;
mod backup;
mod client;
mod events;
mod examples;
mod mesh;
mod node;
#[cfg(feature = "kubernetes")]
mod publish;
mod store;
mod token;
mod tunnels;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use jiff::SignedDuration;
use tokio::signal::unix::{SignalKind, signal};
use towline_proto::id::Label;
use towline_proto::status::Version;
use towline_proto::token::ControllerAddress;
use towline_service::log::LogArgs;
use towline_service::manual::{self, Shell};
use towline_service::notify::Notifier;
use towline_service::output::{self, Format, OutputError};

use crate::config::{Config, EtcdTable, MetricsSettings, Settings, StunSettings, UiSettings};
use crate::server::{Controller, ServeError};

/// Interval at which a controller that waits for its turn asks whether the store is free.
const STANDBY: Duration = Duration::from_secs(2);

/// Least number of threads that serve connections, also on a machine with one processor.
const LEAST_THREADS: usize = 2;
/// Largest number of threads that serve connections: the map has one writer, so more would only wait.
const MOST_THREADS: usize = 8;

/// The Towline controller: certificate authority and registry of a mesh.
#[derive(Debug, Parser)]
#[command(
    name = "towline-controller",
    version = towline_proto::VERSION,
    max_term_width = 100,
    after_help = examples::CONTROLLER
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Common {
    /// Configuration file [default: /etc/towline/controller.toml, if it exists]
    #[arg(long, global = true, env = "TOWLINE_CONTROLLER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// State directory of the controller [default: /var/lib/towline-controller]
    #[arg(long, global = true, env = "TOWLINE_CONTROLLER_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Address of the running controller, if it allows remote administrators [default: the one that uses the
    /// state directory, by its local socket]
    #[arg(long, global = true, env = "TOWLINE_CONTROLLER", value_name = "HOST:PORT")]
    controller: Option<ControllerAddress>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the controller; the first start creates the mesh
    #[command(after_help = examples::SERVE)]
    Serve(Serve),
    /// Create, list and revoke join tokens
    #[command(subcommand)]
    Token(token::Token),
    /// List, show and remove nodes
    #[command(subcommand)]
    Node(node::Node),
    /// Show and change the configuration of the mesh
    #[command(subcommand)]
    Mesh(mesh::Mesh),
    /// List and revoke the keys of administrators
    #[command(subcommand)]
    Admin(admin::Admin),
    /// Copy the store of the running controller into a new file
    #[command(after_help = examples::BACKUP)]
    Backup(backup::Backup),
    /// Move a mesh between stores
    #[command(subcommand)]
    Store(store::Store),
    /// Write nodes and paths into the Kubernetes API, as read-only objects, until it is stopped
    #[cfg(feature = "kubernetes")]
    #[command(after_help = examples::PUBLISH)]
    Publish(publish::Publish),
    /// Check the configuration
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
    /// Print the version
    #[command(after_help = examples::VERSION)]
    Version {
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Parse the configuration like `serve`, without starting the controller
    #[command(after_help = examples::CONFIG_CHECK)]
    Check(Serve),
}

#[derive(Debug, Args)]
struct Serve {
    /// Store of the mesh: `file`, or `etcd://HOST:PORT,HOST:PORT` [default: file]
    #[arg(long, env = "TOWLINE_CONTROLLER_STORE", value_name = "STORE")]
    store: Option<String>,
    /// Address to listen on [default: [::]:7443]
    #[allow(rustdoc::broken_intra_doc_links, reason = "text of the command line, not a link")]
    #[arg(long, env = "TOWLINE_CONTROLLER_LISTEN", value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Address at which nodes reach the controller, to be written into tokens; may be repeated. At
    /// the first start, the mesh's list of controllers (`mesh set --controllers` changes it)
    #[arg(
        long,
        env = "TOWLINE_CONTROLLER_ADVERTISE",
        value_name = "HOST:PORT",
        value_delimiter = ','
    )]
    advertise: Vec<ControllerAddress>,
    /// Let administrators also connect over the network, with the certificate in the state directory [default:
    /// by the local socket only]
    #[arg(
        long,
        env = "TOWLINE_CONTROLLER_REMOTE_ADMIN",
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    remote_admin: Option<bool>,
    /// IPv6 range of the overlay [default: a random /64 in fd00::/8]
    #[arg(long, env = "TOWLINE_CONTROLLER_OVERLAY_V6", value_name = "CIDR")]
    overlay_v6: Option<Ipv6Net>,
    /// IPv4 range of the overlay [default: 198.19.0.0/16]
    #[arg(long, env = "TOWLINE_CONTROLLER_OVERLAY_V4", value_name = "CIDR")]
    overlay_v4: Option<Ipv4Net>,
    /// Range in which an address that no node holds is unreachable instead of sent in clear; may be
    /// repeated
    #[arg(long, env = "TOWLINE_CONTROLLER_PROTECTED", value_name = "CIDR", value_delimiter = ',')]
    protected: Vec<IpNet>,
    /// Site whose nodes reach each other's node IPs outside of the tunnel; may be repeated
    #[arg(
        long,
        env = "TOWLINE_CONTROLLER_TRUSTED_SITES",
        value_name = "SITE",
        value_delimiter = ','
    )]
    trusted_site: Vec<Label>,
    /// Range in which a node's announced prefixes are reached in clear while the tunnel to it is
    /// down; may be repeated
    #[arg(
        long,
        env = "TOWLINE_CONTROLLER_BYPASS_WHEN_DOWN",
        value_name = "CIDR",
        value_delimiter = ','
    )]
    bypass_when_down: Vec<IpNet>,
    /// Take a store that an earlier version wrote, whose records are not authenticated, and authenticate them.
    /// Use it for one start after the upgrade, and never for a store from elsewhere
    #[arg(long)]
    migrate_store: bool,
    /// Time that a node may be offline before other nodes may take over its prefixes [default: 10m]
    #[arg(long, env = "TOWLINE_CONTROLLER_LEASE", value_name = "DURATION")]
    lease: Option<SignedDuration>,
    #[command(flatten)]
    log: LogArgs,
    /// Address at which Prometheus reads `GET /metrics`, without TLS and login [default: none]
    #[arg(long, env = "TOWLINE_CONTROLLER_METRICS_LISTEN", value_name = "ADDR:PORT")]
    metrics_listen: Option<SocketAddr>,
    /// Address of the read-only web page, without TLS and login, for example 127.0.0.1:7480 [default:
    /// none]
    #[arg(long, env = "TOWLINE_CONTROLLER_UI_LISTEN", value_name = "ADDR:PORT")]
    ui: Option<SocketAddr>,
}

impl Common {
    fn settings(&self) -> anyhow::Result<Settings> {
        let flags = Settings { state_dir: self.state_dir.clone(), ..Settings::default() };
        Ok(flags.or(Settings::read(self.config.as_deref())?))
    }

    async fn connect(&self) -> anyhow::Result<client::Client> {
        client::connect(&self.settings()?.state_dir(), self.controller.as_ref()).await
    }
}

impl Serve {
    fn settings(self, common: &Common) -> anyhow::Result<Settings> {
        fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
            (!list.is_empty()).then_some(list)
        }
        let flags = Settings {
            state_dir: None,
            store: self.store,
            listen: self.listen,
            advertise: some(self.advertise),
            remote_admin: self.remote_admin,
            overlay_v6: self.overlay_v6,
            overlay_v4: self.overlay_v4,
            protected: some(self.protected),
            trusted_sites: some(self.trusted_site),
            bypass_when_down: some(self.bypass_when_down),
            lease: self.lease,
            log: None,
            metrics: MetricsSettings { listen: self.metrics_listen },
            ui: UiSettings { listen: self.ui, ..UiSettings::default() },
            stun: StunSettings::default(),
            etcd: EtcdTable::default(),
        };
        Ok(flags.or(common.settings()?))
    }
}

/// Returns the definition of the command line, for completions, man pages and documents.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command line of this process and returns its exit status.
pub fn main() -> ExitCode {
    // Nearly every command reads a private key.
    towline_service::process::forbid_dumps();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.downcast_ref().is_some_and(OutputError::is_broken_pipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("towline-controller: {}", output::error_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let Cli { common, command } = cli;
    match command {
        Command::Serve(serve) => {
            let (log, migrate_store) = (serve.log.clone(), serve.migrate_store);
            serve_until_signal(serve.settings(&common)?, &log, migrate_store)
        }
        Command::Token(command) => block_on(token::run(command, &common)),
        Command::Node(command) => block_on(node::run(command, &common)),
        Command::Mesh(command) => block_on(mesh::run(command, &common)),
        Command::Admin(command) => block_on(admin::run(command, &common)),
        Command::Backup(command) => Ok(output::print(&block_on(command.run(&common))?)?),
        Command::Store(command) => Ok(output::print(&command.run(&common)?)?),
        #[cfg(feature = "kubernetes")]
        Command::Publish(command) => block_on(command.run(&common)),
        Command::Config(ConfigCommand::Check(serve)) => {
            serve.settings(&common)?.resolve()?;
            eprintln!("the configuration is valid");
            Ok(())
        }
        Command::Completions { shell } => {
            Ok(output::print(&manual::completions(self::command(), shell))?)
        }
        Command::Man { directory } => Ok(manual::write_pages(self::command(), &directory)?),
        Command::Version { output } => {
            let version = Version::of_this_program();
            Ok(output::write(output, &version, |_| version.version.to_owned())?)
        }
    }
}

fn serve_until_signal(
    settings: Settings,
    log: &LogArgs,
    migrate_store: bool,
) -> anyhow::Result<()> {
    let log_config = settings.log.unwrap_or_default();
    let config = Config { migrate_store, ..settings.resolve()? };
    log.init(log_config, "info")?;
    raise_file_limit();
    block_on_all_threads(async {
        // The handlers are installed before the start, so that no signal is missed.
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let notifier = Notifier::from_environment();
        let controller = tokio::select! {
            started = start(config, &notifier) => started?,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        };
        tracing::info!(
            version = towline_proto::VERSION,
            state_dir = %controller.state_dir().display(),
            "started"
        );
        // The address is bound, so connections from now on will be served.
        notifier.ready();
        controller
            .run(async {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                notifier.stopping();
            })
            .await?;
        Ok(())
    })
}

/// Starts the controller. While another one uses the store, it waits for its turn.
async fn start(config: Config, notifier: &Notifier) -> Result<Controller, ServeError> {
    let mut is_waiting = false;
    loop {
        match Controller::start(config.clone()) {
            Err(error) if error.is_in_use() => {
                if !is_waiting {
                    tracing::info!(%error, "waiting: another controller serves the mesh");
                    // The service manager need not wait too.
                    notifier.ready();
                }
                is_waiting = true;
            }
            result => return result,
        }
        tokio::time::sleep(STANDBY).await;
    }
}

/// Raises the limit on open files to the hard limit, since each node holds a connection. A failure
/// is ignored.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Formats a time until or since something. A clock that was set back makes it negative: 0.
fn span(seconds: i64) -> String {
    output::span(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// Runs the controller on several threads.
fn block_on_all_threads<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let threads = std::thread::available_parallelism().map_or(LEAST_THREADS, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads.clamp(LEAST_THREADS, MOST_THREADS))
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(future)
}

fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(future)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }
}
