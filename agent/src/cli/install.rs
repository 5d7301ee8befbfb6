//! Implements `towline join --install`, which turns a machine into a node in one command, for
//! people and for cloud-init.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rand::Rng as _;
use towline_proto::backoff::{Backoff, Jitter};
use towline_proto::id::NodeName;
use towline_proto::token::JoinToken;
use towline_service::output;

use super::join::{InstallArgs, JoinArgs, NameError, Parts};
use super::local::{self, runtime};
use super::{Global, wait};
use crate::api_endpoint::DEFAULT_ADDRESS;
use crate::config::{Addressing, Config, DEFAULT_PATH};
use crate::confirm::{self, Confirmation, Moment, Unconfirmed};
use crate::install::{Changes, TOKEN, Tree};
#[cfg(feature = "otel")]
use crate::join::Joined;
use crate::join::{JoinError, join_as};
use crate::kubelet_files;
use crate::node_ip;
use crate::state::StateDir;
#[cfg(feature = "otel")]
use crate::telemetry::report_join;

#[derive(serde::Serialize)]
struct Report {
    /// Name of this node.
    name: String,
    /// Value of the kubelet's `--node-ip`.
    node_ip: String,
    /// Addresses of this node in the mesh.
    overlay_addresses: Vec<String>,
    /// True if the machine was a member before.
    already: bool,
}

/// Delay between attempts to join.
const RETRY: Backoff =
    Backoff::new(Duration::from_millis(500), Duration::from_secs(5), Jitter::Half);

/// Options of an attempt to join.
struct Attempt {
    /// True to join even if the mesh cuts off the operator.
    force: bool,
    /// Maximum time until the confirmation, in seconds. `None`: no confirmation is needed.
    confirm: Option<u64>,
    /// Maximum duration of all attempts, in seconds.
    timeout: u64,
    /// Time at which the attempts end.
    deadline: Instant,
    /// True if the retry timer finds the token, see [`Tree::keep_token`].
    has_token: bool,
}

/// A machine that is being installed.
struct Machine {
    tree: Tree,
    /// Configuration with its paths as the agent will see them.
    config: Config,
    /// The same configuration with its paths as seen from this process.
    outside: Config,
}

pub(super) fn run(global: &Global, args: JoinArgs) -> anyhow::Result<()> {
    let Parts { source, name, force, how, output: format } = args.parts();
    let deadline = Instant::now() + Duration::from_secs(how.timeout);
    let machine = Machine::prepare(global, &how)?;
    let already = machine.member(name.as_deref())?;
    if already {
        super::machine::refuse_down(&machine.outside)?;
        if how.confirm.is_some() {
            eprintln!("this machine is a member already: --confirm is not applied");
        }
    } else {
        // An invalid token fails before anything is tried.
        let text = source.read()?;
        let token: JoinToken = text.parse()?;
        let kept = machine.tree.keep_token(&text);
        if let Err(error) = &kept {
            // On a read-only disk, a join that succeeds is worth more than the retry of one that fails.
            eprintln!("warning: no timer can try again: {}", output::error_line(error.as_ref()));
        }
        let attempt = Attempt {
            force,
            confirm: how.confirm,
            timeout: how.timeout,
            deadline,
            has_token: kept.is_ok(),
        };
        machine.join(&token, name, &attempt)?;
    }
    // The join comes first: a machine that cannot be written to is a member then, and the same command
    // installs the rest once it can.
    let installed = machine.tree.install().and_then(|changes| {
        report_written(&changes);
        machine.tree.succeeded(&machine.config)?;
        machine.tree.start()
    });
    installed.context(
        "joined, but not installed: nothing starts the agent at the next boot (start `towline agent`, \
         or repair this and run `towline join --install` again, without a token)",
    )?;
    warn_of_cloud_provider(&machine);
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(10));
    let mesh = wait::until_up(&machine.outside.socket, &[], Some(left))
        .context("joined and enabled the agent, but it is not ready")?;
    let report = machine.report(already)?;
    let joined = if already { "this machine is already" } else { "joined as" };
    match mesh {
        wait::Mesh::Up => eprintln!("{joined} `{}`; the mesh is up", report.name),
        wait::Mesh::Unreached(reason) => {
            eprintln!("{joined} `{}`", report.name);
            eprintln!("{}", wait::unreached(&reason));
        }
    }
    if let Confirmation::Due(left) = confirm::status(&machine.outside.state_dir, &Moment::now()) {
        eprintln!("run `towline confirm` within {} s, or the join is undone", left.as_secs());
    }
    Ok(output::write(format, &report, |_| report.node_ip.clone())?)
}

impl Machine {
    /// Writes the files that the machine needs, and reads its configuration.
    fn prepare(global: &Global, how: &InstallArgs) -> anyhow::Result<Self> {
        let tree = Tree::new(how.root.as_deref());
        let options =
            !how.advertise.is_empty() || !how.plain_port.is_empty() || how.control_plane.is_some();
        let has_kubelet = kubelet_files::has_kubelet(&tree);
        let changes = match tree.prepare(&configuration(how, has_kubelet)?) {
            Ok(changes) => changes,
            // Without options, the configuration would have the defaults only.
            Err(error) if !options => {
                eprintln!("warning: {}", output::error_line(error.as_ref()));
                Changes::default()
            }
            Err(error) => return Err(error),
        };
        report_written(&changes);
        let fresh = changes.written.iter().any(|path| path == Path::new(DEFAULT_PATH));
        if !fresh && options {
            eprintln!(
                "{DEFAULT_PATH} exists: --advertise, --plain-port and --control-plane are not applied"
            );
        }
        let file = global.config.clone().unwrap_or_else(|| tree.path(DEFAULT_PATH));
        let mut config = match &global.config {
            None if !file.exists() => Config::default(),
            _ => Config::load(Some(&file))?,
        };
        if let Some(directory) = &global.state_dir {
            config.state_dir.clone_from(directory);
        }
        if let Some(socket) = &global.socket {
            config.socket.clone_from(socket);
        }
        let mut outside = config.clone();
        outside.state_dir = tree.path(&config.state_dir);
        outside.socket = tree.path(&config.socket);
        Ok(Self { tree, config, outside })
    }

    /// Returns whether the machine is a member, under `name` if one is given.
    fn member(&self, name: Option<&str>) -> anyhow::Result<bool> {
        // The directory is read without its lock, which a running agent holds.
        let state = StateDir::peek(&self.outside.state_dir);
        Ok(match state.membership()? {
            Some(membership) => super::join::is_meant(&membership, name)?,
            None => false,
        })
    }

    fn join(
        &self,
        token: &JoinToken,
        name: Option<String>,
        attempt: &Attempt,
    ) -> anyhow::Result<()> {
        let result =
            super::join::name(name).and_then(|name| self.keep_trying(token, &name, attempt));
        result.map_err(|error| self.not_joined(error, attempt))
    }

    /// Stores why the join failed, and enables the retry timer if another attempt may succeed. Returns the
    /// error with what happens next.
    fn not_joined(&self, error: anyhow::Error, attempt: &Attempt) -> anyhow::Error {
        // A machine may get its name after its network.
        let is_early = error
            .downcast_ref::<NameError>()
            .is_some_and(|error| matches!(error, NameError::Localhost(_)));
        let may_pass =
            is_early || error.downcast_ref::<JoinError>().is_some_and(JoinError::may_pass);
        let obstacle = if !may_pass {
            Some("it would fail again".to_owned())
        } else if attempt.confirm.is_some() {
            // A timer would join without a confirmation, but this operator asked for one.
            Some("the join needs a confirmation".to_owned())
        } else if !attempt.has_token {
            Some(format!("{TOKEN} is not written"))
        } else {
            // The timer runs the installed program.
            let enabled = self.tree.install().and_then(|_| self.tree.enable_retry());
            enabled.err().map(|error| output::error_line(error.as_ref()))
        };
        // A timer may be left from an earlier attempt.
        let disabled = obstacle.as_ref().map_or(Ok(()), |_| self.tree.disable_retry());
        let stored = self.tree.store_failure(&self.config, &format!("{error:#}"));
        for problem in [disabled, stored].into_iter().filter_map(Result::err) {
            eprintln!("warning: {}", output::error_line(problem.as_ref()));
        }
        error.context(match obstacle {
            None => format!("not joined; towline-join.timer tries again with {TOKEN}"),
            Some(obstacle) => format!("not joined; no timer tries again, because {obstacle}"),
        })
    }

    fn keep_trying(
        &self,
        token: &JoinToken,
        name: &NodeName,
        attempt: &Attempt,
    ) -> anyhow::Result<()> {
        let state = StateDir::lock(self.tree.state(&self.config)?)?;
        // This is stored before the join, so that a join that a crash interrupts is undone too.
        match attempt.confirm {
            Some(seconds) => {
                let seconds = seconds.saturating_add(attempt.timeout);
                state.store_unconfirmed(&Unconfirmed::new(&Moment::now(), seconds))?;
            }
            None => state.forget_unconfirmed()?,
        }
        let result = self.try_until_joined(&state, token, name, attempt);
        match (&result, attempt.confirm) {
            (Err(_), _) => state.forget_unconfirmed()?,
            (Ok(()), Some(seconds)) => {
                state.store_unconfirmed(&Unconfirmed::new(&Moment::now(), seconds))?;
            }
            (Ok(()), None) => {}
        }
        result
    }

    fn try_until_joined(
        &self,
        state: &StateDir,
        token: &JoinToken,
        name: &NodeName,
        attempt: &Attempt,
    ) -> anyhow::Result<()> {
        let operator = super::join::operator(&self.config, attempt.force);
        let mark = self.config.routing.mark;
        let runtime = runtime()?;
        let mut failures = 0u32;
        #[cfg(feature = "otel")]
        let started = std::time::SystemTime::now();
        loop {
            let joined = runtime.block_on(join_as(state, token, name, mark, &operator));
            let error = match joined {
                Ok(_joined) => {
                    #[cfg(feature = "otel")]
                    if let Joined::New(membership) = &_joined {
                        let telemetry = &self.config.telemetry;
                        runtime.block_on(report_join(telemetry, &membership.grant, started));
                    }
                    return Ok(state.forget_undone()?);
                }
                Err(error) => error,
            };
            let wait = RETRY.pause(failures, rand::rng().random());
            if !error.may_pass() || Instant::now() + wait >= attempt.deadline {
                return Err(error.into());
            }
            eprintln!("{error}: trying again");
            std::thread::sleep(wait);
            failures = failures.saturating_add(1);
        }
    }

    fn report(&self, already: bool) -> anyhow::Result<Report> {
        let node_ips: Vec<String> =
            node_ip::in_force(&self.outside)?.iter().map(|ip| ip.to_string()).collect();
        let status = local::status(&self.outside.socket)?;
        Ok(Report {
            name: status.name,
            node_ip: node_ips.first().cloned().unwrap_or_default(),
            overlay_addresses: status.overlay_addresses,
            already,
        })
    }
}

/// Prints the paths of the files that were written.
fn report_written(changes: &Changes) {
    for path in &changes.written {
        eprintln!("wrote {}", path.display());
    }
}

/// Warns if the kubelet waits for a cloud controller manager that cannot know its node IP.
fn warn_of_cloud_provider(machine: &Machine) {
    if machine.config.node.addressing == Addressing::NodeIp {
        return;
    }
    if let Some(path) = kubelet_files::external_cloud_provider(&machine.tree) {
        eprintln!(
            "warning: {} sets --cloud-provider=external: a cloud controller manager does not know \
             addresses of the mesh and leaves the node uninitialized: set [node] addressing = \
             \"node-ip\" in {DEFAULT_PATH}, and restart agent and kubelet",
            path.display()
        );
    }
}

/// Returns the configuration of a new machine: the given options, an API endpoint if it has a kubelet, and
/// defaults for the rest.
fn configuration(how: &InstallArgs, has_kubelet: bool) -> anyhow::Result<String> {
    let mut text =
        String::from("# Every key with its default: /usr/share/doc/towline/agent.toml\n");
    let mut section = |name: &str, key: &str, values: Vec<String>| {
        if !values.is_empty() {
            text.push_str(&format!("\n[{name}]\n{key} = [{}]\n", values.join(", ")));
        }
    };
    let quoted = |address: &SocketAddr| format!("\"{address}\"");
    section("node", "advertise", how.advertise.iter().map(quoted).collect());
    section("routing", "plain_ports", how.plain_port.iter().map(ToString::to_string).collect());
    let mut kubernetes = Vec::new();
    if has_kubelet {
        kubernetes.push(format!("api_endpoint = \"{DEFAULT_ADDRESS}\""));
    }
    if let Some(port) = api_port(how)? {
        kubernetes.push(format!("api_port = {port}"));
    }
    if !kubernetes.is_empty() {
        text.push_str(&format!("\n[kubernetes]\n{}\n", kubernetes.join("\n")));
    }
    // Invalid options fail here, before anything is written.
    Config::parse(&text, Path::new(DEFAULT_PATH))?;
    Ok(text)
}

/// Returns the port of `--control-plane`. The error does not repeat the value, which may be a token.
fn api_port(how: &InstallArgs) -> anyhow::Result<Option<NonZeroU16>> {
    let port = how.control_plane.as_ref().map(|text| text.parse::<NonZeroU16>());
    port.transpose().ok().context(
        "the value of --control-plane is not a port: use 1 to 65535, and give a token with --token-file",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_written_configuration_says_what_was_said() {
        let how = InstallArgs {
            root: None,
            advertise: vec!["203.0.113.10:51830".parse().unwrap()],
            plain_port: vec![6443, 7443],
            control_plane: Some("6444".into()),
            timeout: 0,
            confirm: None,
        };
        let config = Config::parse(&configuration(&how, true).unwrap(), Path::new("x")).unwrap();
        assert_eq!(config.node.advertise, how.advertise);
        assert_eq!(config.routing.plain_ports, how.plain_port);
        assert_eq!(config.kubernetes.api_endpoint, DEFAULT_ADDRESS.parse().ok());
        assert_eq!(config.kubernetes.api_port, NonZeroU16::new(6444));
        let bad = InstallArgs { control_plane: Some("tl1-secret".into()), ..how };
        let line = configuration(&bad, true).unwrap_err().to_string();
        assert!(line.contains("--token-file") && !line.contains("secret"), "{line}");
        let bad = InstallArgs { plain_port: vec![0], control_plane: None, ..bad };
        assert!(configuration(&bad, false).unwrap_err().to_string().contains("plain_ports"));
    }

    #[test]
    fn the_error_of_the_join_is_reported_also_where_nothing_can_be_written() {
        let directory = tempfile::tempdir().unwrap();
        let tree = Tree::new(Some(directory.path()));
        let timer = tree.path("/etc/systemd/system/timers.target.wants/towline-join.timer");
        let config = Config::default();
        let outside = config.clone();
        let machine = Machine { tree, config, outside };
        let attempt = |has_token| Attempt {
            force: false,
            confirm: None,
            timeout: 0,
            deadline: Instant::now(),
            has_token,
        };
        let not_joined = |has_token| {
            let early = NameError::Localhost("localhost".to_owned());
            format!("{:#}", machine.not_joined(early.into(), &attempt(has_token)))
        };
        let line = not_joined(true);
        assert!(line.contains("timer tries again with") && line.contains("`localhost`"), "{line}");
        assert!(timer.is_symlink());
        let line = not_joined(false);
        assert!(line.contains("no timer") && line.contains("`localhost`"), "{line}");
        assert!(!timer.is_symlink(), "the earlier timer is disabled");

        // Nobody, not even root, can create a file below a file.
        for path in ["usr", "opt", "var"] {
            let path = machine.tree.path(path);
            if path.is_dir() {
                std::fs::remove_dir_all(&path).unwrap();
            }
            std::fs::write(&path, "").unwrap();
        }
        let line = not_joined(true);
        assert!(line.contains("no timer tries again, because no directory"), "{line}");
        assert!(line.contains("`localhost`") && !timer.is_symlink(), "{line}");
    }
}
