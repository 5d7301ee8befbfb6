//! Implements `towline down`, `up`, `leave`, `confirm` and the root-only steps of the units. Each
//! command asks a running agent; without an agent it does the work itself.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use clap::Args;
use tonic::transport::Channel;
use towline_proto::code::Coded as _;
use towline_proto::pb;
use towline_proto::pb::local_client::LocalClient;

use super::local::{runtime, status, status_error, with_agent};
use crate::config::Config;
use crate::control::DownAnswer;
use crate::daemon;
use crate::down::{DownMarker, MachineState};
use crate::guard;
use crate::install::Tree;
use crate::join::Operator;
use crate::lockout;
use crate::reserved_port;
use crate::state::{StateDir, StateError};
use towline_host::HostNetwork;
use towline_service::grpc;

/// Maximum time for an agent to start or to end. After it the command fails.
const AGENT_LIMIT: Duration = Duration::from_secs(15);
/// Maximum time for an answer that the agent gives without contacting another machine.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Maximum time for an agent to leave: it tries every controller.
const LEAVE_LIMIT: Duration = Duration::from_secs(300);
/// Interval between checks of the agent, which is on this machine.
const PERIOD: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
pub(super) struct LeaveArgs {
    /// Forget the mesh on this machine even if no controller can be reached (an operator must then
    /// remove the node there)
    #[arg(long)]
    force: bool,
    /// Directory whose units are disabled, instead of the machine's
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct UpArgs {
    /// Give up after this many seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    timeout: u64,
    /// Bring the mesh up even if it cuts off the SSH session that runs this command
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub(super) struct AfterStopArgs {
    /// Directory to work on, instead of the machine
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

/// Executor of a command: the running agent, or this process.
enum Doer<T> {
    /// The agent executed the command and returned this answer.
    Agent(T),
    /// No agent runs, and none can start while this lock is held.
    Us(StateDir),
    /// No agent is known to run, and the state directory cannot be locked for this reason.
    Unlocked(StateError),
}

/// Sends the command to the agent. If none runs, locks the state directory so that the caller can
/// do the work. Waits for an agent that is starting or ending.
fn ask_or_replace<T>(
    config: &Config,
    limit: Duration,
    ask: impl AsyncFn(LocalClient<Channel>) -> Result<T, tonic::Status>,
) -> anyhow::Result<Doer<T>> {
    let begun = Instant::now();
    let stuck = loop {
        let stuck = if daemon::is_running(&config.socket) {
            let answer = with_agent(&config.socket, async |agent| {
                let answer = tokio::time::timeout(limit, ask(agent)).await;
                answer.map_err(|_| {
                    let seconds = limit.as_secs();
                    anyhow::anyhow!(
                        "the agent did not answer within {seconds} s: stop its process, then \
                         repeat the command"
                    )
                })
            });
            match answer {
                Ok(Ok(answer)) => return Ok(Doer::Agent(answer)),
                Ok(Err(status)) if !is_no_answer(&status) => {
                    return Err(status_error(&status));
                }
                Ok(Err(status)) => {
                    status_error(&status).context("the agent ended before it answered")
                }
                Err(error) if begun.elapsed() >= limit => return Err(error),
                Err(error) => error,
            }
        } else {
            match StateDir::open(&config.state_dir) {
                Ok(state) => return Ok(Doer::Us(state)),
                Err(error @ StateError::Locked { .. }) => error.into(),
                Err(error) => return Ok(Doer::Unlocked(error)),
            }
        };
        if begun.elapsed() >= AGENT_LIMIT {
            break stuck;
        }
        std::thread::sleep(PERIOD);
    };
    Err(stuck.context(format!("no answer at {}", config.socket.display())))
}

/// Returns whether the connection ended, or the agent is ending. Such a status does not answer the
/// request. An agent never answers with an internal error: HTTP/2 reports a connection that broke as one.
fn is_no_answer(status: &tonic::Status) -> bool {
    grpc::is_of_the_transport(status) || status.code() == tonic::Code::Internal
}

/// Waits until an agent that was asked to end has ended.
fn await_end(config: &Config) {
    let begun = Instant::now();
    while begun.elapsed() < AGENT_LIMIT
        && (daemon::is_running(&config.socket)
            || matches!(StateDir::open(&config.state_dir), Err(StateError::Locked { .. })))
    {
        std::thread::sleep(PERIOD);
    }
}

/// Returns whether an agent of this machine would have something to run.
fn has_something_to_run(config: &Config) -> bool {
    !config.peers.is_empty() || config.state_dir.join("membership.json").exists()
}

pub(super) fn down(config: &Config) -> anyhow::Result<()> {
    let marker = DownMarker::of(config);
    let already = marker.read().is_some();
    let answer = if has_something_to_run(config) || daemon::is_running(&config.socket) {
        // The marker is set first: an agent that starts after this does not bring the mesh up.
        let written = marker.set(SystemTime::now());
        let done = ask_or_replace(config, ANSWER_LIMIT, async |mut agent| {
            agent.down(pb::DownRequest {}).await.map(|answer| answer.into_inner())
        })?;
        match done {
            Doer::Agent(answer) => {
                await_end_unless(config, answer.already);
                let warning = (!answer.warning.is_empty()).then_some(answer.warning);
                DownAnswer { already: already && answer.already, warning }
            }
            // The host is opened with or without the lock, because the operator wants it open.
            Doer::Us(_) | Doer::Unlocked(_) => {
                daemon::open_host(config)?;
                DownAnswer::new(already, written)
            }
        }
    } else {
        daemon::open_host(config)?;
        DownAnswer { already: false, warning: None }
    };
    if let Some(warning) = answer.warning {
        eprintln!("warning: {warning}");
    }
    release_port(config);
    eprintln!(
        "{}; link, routes and guards of Towline are removed until `towline up`",
        if answer.already { "this machine was down already" } else { "agent stopped" }
    );
    Ok(())
}

/// Reserves the tunnels' port, unless this machine is down.
pub(super) fn reserve_port(config: &Config) -> anyhow::Result<()> {
    if DownMarker::of(config).read().is_some() {
        return Ok(());
    }
    let port = config.wireguard.port;
    reserved_port::reserve(port)
        .map(drop)
        .with_context(|| format!("cannot reserve UDP port {port}"))
}

/// Releases the reservation of the tunnels' port.
fn release_port(config: &Config) {
    let port = config.wireguard.port;
    if let Err(error) = reserved_port::release(port) {
        eprintln!(
            "warning: cannot release UDP port {port} from net.ipv4.ip_local_reserved_ports: {error}"
        );
    }
}

/// Waits for the end of the agent, unless it was down before and keeps running.
fn await_end_unless(config: &Config, runs_on: bool) {
    if !runs_on {
        await_end(config);
    }
}

pub(super) fn up(config: &Config, args: &UpArgs) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    if !has_something_to_run(config) {
        StateDir::peek(&config.state_dir).require_membership()?;
    }
    if daemon::is_running(&config.socket)
        && status(&config.socket)?.state != MachineState::Down.code()
    {
        await_applied(config, deadline)?;
        eprintln!("this machine is up already");
        return Ok(());
    }
    if !args.force {
        operator(config).refuse_cut_off(&guard::networks(config)?)?;
    }
    let marker = DownMarker::of(config);
    let done =
        ask_or_replace(config, ANSWER_LIMIT, async |mut agent| agent.up(pb::UpRequest {}).await)
            .context("this machine stays down")?;
    match done {
        Doer::Agent(_) => {}
        Doer::Us(_) | Doer::Unlocked(_) => {
            marker.clear().context("this machine stays down")?;
            // Dropping releases the lock, so that an agent can start.
            drop(done);
            let tree = Tree::new(None);
            if !(tree.has_systemd() && tree.serves(&config.state_dir) && tree.has_agent_unit()) {
                eprintln!("this machine is no longer down, but no agent runs: run `towline agent`");
                return Ok(());
            }
            tree.start_agent()?;
        }
    }
    await_applied(config, deadline)?;
    eprintln!("up: link, routes and guards are in place (`towline wait` waits for the peers)");
    Ok(())
}

/// Waits until the agent has applied its plan. Prints what is missing whenever that changes.
fn await_applied(config: &Config, deadline: Instant) -> anyhow::Result<()> {
    let mut reported = String::new();
    loop {
        let missing = match status(&config.socket) {
            Ok(status) => match missing(&status) {
                None => return Ok(()),
                Some(missing) => missing,
            },
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() >= deadline {
            bail!("the mesh is not up: {missing}: run `towline status`");
        }
        if missing != reported {
            eprintln!("waiting: {missing}");
            reported = missing;
        }
        std::thread::sleep(PERIOD);
    }
}

fn missing(status: &pb::StatusResponse) -> Option<String> {
    if status.state == MachineState::Down.code() {
        return Some("this machine is down".to_owned());
    }
    // An older agent does not send this field.
    (status.applied == Some(false))
        .then(|| format!("link, routes or guards are not in place: {}", status.applied_reason))
}

pub(super) fn leave(config: &Config, args: &LeaveArgs) -> anyhow::Result<()> {
    let force = args.force;
    if !daemon::is_running(&config.socket) {
        // A machine that never joined must not get a state directory.
        not_joined(config)?;
    }
    let request = pb::LocalLeaveRequest { force };
    let done = ask_or_replace(config, LEAVE_LIMIT, async |mut agent| agent.leave(request).await)
        .context(
            "still a member (`towline leave --force` forgets the mesh on this machine anyway)",
        )?;
    match done {
        Doer::Agent(_) => await_end(config),
        Doer::Us(state) => {
            // An agent that ended during the request may have left already.
            if state.membership()?.is_some() {
                runtime()?.block_on(daemon::leave(config, &state, force))?;
            }
        }
        Doer::Unlocked(error) => return Err(error.into()),
    }
    release_port(config);
    eprintln!("left the mesh; this machine is open again");
    let tree = Tree::new(args.root.as_deref());
    if tree.serves(&config.state_dir) {
        tree.remove_networkd_settings()?;
        for line in tree.disable().context("left the mesh, but the units stay enabled")? {
            eprintln!("{line}");
        }
    }
    Ok(())
}

/// Fails if the machine has not joined. The error contains the reason if its join was undone.
fn not_joined(config: &Config) -> anyhow::Result<()> {
    let state = StateDir::peek(&config.state_dir);
    if state.membership()?.is_some() {
        return Ok(());
    }
    let error = state.require_membership().map(drop);
    match state.join_failure()? {
        Some(reason) => error.context(format!("the last join failed: {}", reason.trim())),
        None => Ok(error?),
    }
}

pub(super) fn confirm(config: &Config) -> anyhow::Result<()> {
    if !daemon::is_running(&config.socket) {
        not_joined(config)?;
    }
    let done = ask_or_replace(config, ANSWER_LIMIT, async |mut agent| {
        agent.confirm(pb::ConfirmRequest {}).await.map(|answer| answer.into_inner().was_due)
    })?;
    let was_due = match done {
        Doer::Agent(was_due) => was_due,
        Doer::Us(state) => state.confirm()?,
        Doer::Unlocked(error) => return Err(error.into()),
    };
    eprintln!(
        "{}",
        if was_due {
            "confirmed: this machine stays in the mesh"
        } else {
            "nothing to confirm: this machine's membership is permanent"
        }
    );
    Ok(())
}

/// Finishes as root what the agent's user cannot do: disabling the units after a join was undone.
pub(super) fn after_stop(config: &Config, args: &AfterStopArgs) -> anyhow::Result<()> {
    let state = StateDir::peek(&config.state_dir);
    if !state.is_undone() || state.membership()?.is_some() {
        return Ok(());
    }
    let tree = Tree::new(args.root.as_deref());
    if tree.serves(&config.state_dir) {
        tree.remove_networkd_settings()?;
        for line in tree.disable()? {
            eprintln!("{line}");
        }
    }
    // The reason stays stored as the failure of the join.
    Ok(state.forget_undone()?)
}

/// Returns how the operator is connected to this machine.
pub(super) fn operator(config: &Config) -> Operator {
    let own = HostNetwork::open().and_then(|mut network| network.local_addresses());
    let own: Vec<_> = own.unwrap_or_default().iter().map(|address| address.prefix.addr()).collect();
    Operator { sessions: lockout::sessions(&own), plain_ports: config.routing.plain_ports.clone() }
}

/// Fails if the machine is down.
pub(super) fn refuse_down(config: &Config) -> anyhow::Result<()> {
    if DownMarker::of(config).read().is_some() {
        bail!("this machine is already a member and is down: run `towline up`");
    }
    Ok(())
}
