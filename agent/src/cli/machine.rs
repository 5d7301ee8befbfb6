//! `towline down`, `up`, `leave` and `confirm`: what becomes of this machine, with a running agent
//! and without.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use clap::Args;
use tonic::transport::Channel;
use towline_proto::pb;
use towline_proto::pb::local_client::LocalClient;

use super::local::{runtime, said, with_agent};
use crate::config::Config;
use crate::control::DownAnswer;
use crate::daemon;
use crate::down::DownMarker;
use crate::guard;
use crate::install::Tree;
use crate::join::Operator;
use crate::lockout;
use crate::reserved_port;
use crate::state::{StateDir, StateError};
use towline_host::HostNetwork;

/// How long an agent may take to start or to end before it is called stuck.
const AGENT_LIMIT: Duration = Duration::from_secs(15);
/// How long an agent may take for an answer that needs nobody else.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long an agent may take to leave: it tries every controller.
const LEAVE_LIMIT: Duration = Duration::from_secs(300);
/// Between two looks at the agent, which is on this machine.
const PERIOD: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
pub(super) struct LeaveArgs {
    /// Forget the mesh here even though no controller can be told (an operator then removes the
    /// node there)
    #[arg(long)]
    force: bool,
    /// Disable the units in this directory instead of the machine's
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct UpArgs {
    /// Give up after this many seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    timeout: u64,
    /// Bring the mesh up even though it cuts off the SSH session from which this is run
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub(super) struct AfterStopArgs {
    /// Look at this directory instead of the machine
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

/// Who does what a command asks for.
enum Doer<T> {
    /// The agent did it, and this is its answer.
    Agent(T),
    /// No agent runs, and none can start while this is held.
    Us(StateDir),
    /// No agent is known to run; the state directory cannot be locked, for this reason.
    Unlocked(StateError),
}

/// Asks the agent; without one, takes its place. An agent that starts or ends meanwhile is waited
/// for.
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
                Ok(Err(status)) if !is_of_the_transport(&status) => return Err(said(&status)),
                Ok(Err(status)) => said(&status).context("the agent ended before it answered"),
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

/// The connection ended, or the agent is ending: not its answer to the request.
fn is_of_the_transport(status: &tonic::Status) -> bool {
    matches!(
        status.code(),
        tonic::Code::Unavailable
            | tonic::Code::Unknown
            | tonic::Code::Cancelled
            | tonic::Code::Internal
    )
}

/// Waits until the agent that was told to end has ended.
fn await_end(config: &Config) {
    let begun = Instant::now();
    while begun.elapsed() < AGENT_LIMIT
        && (daemon::is_running(&config.socket)
            || matches!(StateDir::open(&config.state_dir), Err(StateError::Locked { .. })))
    {
        std::thread::sleep(PERIOD);
    }
}

/// Something on this machine could bring the tunnel up.
fn has_something_to_run(config: &Config) -> bool {
    !config.peers.is_empty() || config.state_dir.join("membership.json").exists()
}

pub(super) fn down(config: &Config) -> anyhow::Result<()> {
    let marker = DownMarker::of(config);
    let already = marker.read().is_some();
    let answer = if has_something_to_run(config) || daemon::is_running(&config.socket) {
        // The marker first: an agent that starts from here on does not bring the mesh up.
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
            // What is held or not, the operator wants the host open.
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
        "{}; no link, route or guard of ours is on this machine; it stays so until `towline up`",
        if answer.already { "this machine was down already" } else { "agent stopped" }
    );
    Ok(())
}

/// Keeps the tunnels' port from others, unless this machine is down.
pub(super) fn reserve_port(config: &Config) -> anyhow::Result<()> {
    if DownMarker::of(config).read().is_some() {
        return Ok(());
    }
    let port = config.wireguard.port;
    reserved_port::reserve(port)
        .map(drop)
        .with_context(|| format!("cannot reserve UDP port {port}"))
}

/// Gives the tunnels' port back.
fn release_port(config: &Config) {
    let port = config.wireguard.port;
    if let Err(error) = reserved_port::release(port) {
        eprintln!("warning: UDP port {port} stays in net.ipv4.ip_local_reserved_ports: {error}");
    }
}

/// An agent that was down before goes on running.
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
    if daemon::is_running(&config.socket) && status(config)?.state != "down" {
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
            // The lock is released: an agent may start.
            drop(done);
            let tree = Tree::new(None);
            if !(tree.has_systemd() && tree.serves(&config.state_dir) && tree.has_agent_unit()) {
                eprintln!(
                    "this machine may come up again, and no agent runs: start it with `towline agent`"
                );
                return Ok(());
            }
            tree.start_agent()?;
        }
    }
    await_applied(config, deadline)?;
    eprintln!("up: link, routes and guards are in place (`towline wait` waits for the peers)");
    Ok(())
}

fn status(config: &Config) -> anyhow::Result<pb::StatusResponse> {
    with_agent(&config.socket, async |mut agent| {
        let answer = agent.status(pb::StatusRequest {}).await.map_err(|status| said(&status))?;
        Ok(answer.into_inner())
    })
}

/// Waits until the agent has applied its plan, and says meanwhile what is missing.
fn await_applied(config: &Config, deadline: Instant) -> anyhow::Result<()> {
    let mut told = String::new();
    loop {
        let missing = match status(config) {
            Ok(status) => match missing(&status) {
                None => return Ok(()),
                Some(missing) => missing,
            },
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() >= deadline {
            bail!("the mesh is not up: {missing}: `towline status` says more");
        }
        if missing != told {
            eprintln!("waiting: {missing}");
            told = missing;
        }
        std::thread::sleep(PERIOD);
    }
}

fn missing(status: &pb::StatusResponse) -> Option<String> {
    if status.state == "down" {
        return Some("this machine is down".to_owned());
    }
    // An agent of an older version does not say it.
    (status.applied == Some(false))
        .then(|| format!("the host's network is not as planned: {}", status.applied_reason))
}

pub(super) fn leave(config: &Config, args: &LeaveArgs) -> anyhow::Result<()> {
    let force = args.force;
    if !daemon::is_running(&config.socket) {
        // Nothing is made on a machine that never joined.
        not_joined(config)?;
    }
    let request = pb::LocalLeaveRequest { force };
    let done = ask_or_replace(config, LEAVE_LIMIT, async |mut agent| agent.leave(request).await)
        .context("still a member (to forget the mesh here anyway: `towline leave --force`)")?;
    match done {
        Doer::Agent(_) => await_end(config),
        Doer::Us(state) => {
            // An agent that ended while it was asked may have left.
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

/// The error of a machine that has not joined, with the reason if its join was undone.
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

/// What is left to do by root after the agent ended: it undid a join, and cannot disable units.
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
    // The reason of the undoing stays, as that of a join that failed.
    Ok(state.forget_undone()?)
}

/// How the operator reaches this machine.
pub(super) fn operator(config: &Config) -> Operator {
    let own = HostNetwork::open().and_then(|mut network| network.local_addresses());
    let own: Vec<_> = own.unwrap_or_default().iter().map(|address| address.prefix.addr()).collect();
    Operator { sessions: lockout::sessions(&own), plain_ports: config.routing.plain_ports.clone() }
}

/// The error of a machine that is a member and down.
pub(super) fn refuse_down(config: &Config) -> anyhow::Result<()> {
    if DownMarker::of(config).read().is_some() {
        bail!("this machine is a member already, and it is down: run `towline up`");
    }
    Ok(())
}
