//! The agent on a machine that is down. It keeps the host open and serves its socket, so that units
//! that start after it can start, and `towline up` has an agent to ask.
//!
//! It has no link, no UDP port and no controller connection. It holds the lock of the state
//! directory, so that no other process brings the mesh up in the meantime.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;
use towline_proto::code::Coded as _;
use towline_proto::pb;
use towline_service::notify::Notifier;

use super::problem::Problem;
use super::signals::{SignalMeaning, Signals};
use super::start::Stored;
use super::{CONFIRMATION_PERIOD, Daemon, Purpose, host_controller, leave, report};
use crate::config::Config;
use crate::confirm::{self, Confirmation, Moment};
use crate::control::{ControlServer, DownAnswer, NoPong, PingAnswer, Request};
use crate::down::{Down, DownMarker, MachineState};
use crate::events::EventLog;
use crate::state::StateDir;
use crate::timing::at;

/// Delay after a failure until the host is opened again.
const RETRY: Duration = Duration::from_secs(1);

/// State of the agent while the machine is down.
pub(super) struct Standby {
    pub(super) config: Config,
    pub(super) config_path: Option<PathBuf>,
    pub(super) purpose: Purpose,
    pub(super) state: Arc<StateDir>,
    pub(super) marker: DownMarker,
    started: Instant,
    /// Why state that Towline created may still be on the host. `None`: the host is open.
    problem: Option<String>,
    /// Why a join that was not confirmed could not be undone yet. `None`: nothing is to be undone,
    /// or it was not tried.
    undo: Option<Problem>,
}

/// Reason why the standby ended.
pub(super) enum Ended {
    /// The agent received a signal to end.
    Stopped,
    /// `towline leave` removed the membership.
    Left,
    /// `towline up` started this daemon. The request is answered once the plan is applied.
    Up(Box<Daemon>, oneshot::Sender<Result<bool, String>>),
}

impl Standby {
    pub(super) fn new(
        config: Config,
        config_path: Option<PathBuf>,
        purpose: Purpose,
        state: Arc<StateDir>,
    ) -> Self {
        let marker = DownMarker::of(&config);
        let started = Instant::now();
        Self { config, config_path, purpose, state, marker, started, problem: None, undo: None }
    }

    /// Runs until a signal, `towline leave` or `towline up` ends it.
    pub(super) async fn run(
        &mut self,
        control: &mut ControlServer,
        signals: &mut Signals,
        notifier: &Notifier,
    ) -> Ended {
        tracing::info!("this machine is down: run `towline up` to bring the mesh up");
        self.open();
        notifier.ready();
        let period = notifier.period();
        let mut alive_at = period.map(|_| Instant::now());
        let mut retry_at = self.retry_at();
        let mut confirm_at = self.confirm_at();
        loop {
            if alive_at.is_some_and(|at| at <= Instant::now()) {
                notifier.alive();
                alive_at = period.map(|period| Instant::now() + period);
            }
            tokio::select! {
                () = at(alive_at) => {}
                () = at(retry_at) => {
                    self.open();
                    retry_at = self.retry_at();
                }
                () = at(confirm_at) => {
                    if self.confirmation() == Confirmation::Missed {
                        let undoing = Box::pin(leave::undo_join(&self.config, &self.state));
                        let undone = tokio::select! {
                            undone = with_heartbeat(notifier, undoing) => undone,
                            () = signals.end() => return Ended::Stopped,
                        };
                        match undone {
                            Ok(()) => return Ended::Left,
                            Err(error) => {
                                let problem = Problem::NotUndone { reason: format!("{error:#}") };
                                tracing::error!(error = %problem, "join not undone");
                                self.undo = Some(problem);
                            }
                        }
                    }
                    confirm_at = self.confirm_at();
                }
                Some(request) = control.next() => match request {
                    Request::Up(reply) => match self.up() {
                        Ok(daemon) => return Ended::Up(Box::new(daemon), reply),
                        Err(error) => {
                            let _ = reply.send(Err(format!("{error:#}")));
                            retry_at = self.retry_at();
                        }
                    },
                    Request::Leave { force, reply } => {
                        let leaving = Box::pin(leave::leave(&self.config, &self.state, force));
                        let result = tokio::select! {
                            result = with_heartbeat(notifier, leaving) => result,
                            () = signals.end() => return Ended::Stopped,
                        };
                        let left = result.is_ok();
                        let _ = reply.send(result.map_err(|error| format!("{error:#}")));
                        if left {
                            return Ended::Left;
                        }
                    }
                    request => {
                        self.answer(request);
                        confirm_at = self.confirm_at();
                    }
                },
                meaning = signals.next() => match meaning {
                    SignalMeaning::End => return Ended::Stopped,
                    // The configuration is read when the mesh is brought up.
                    SignalMeaning::Reload => {}
                },
            }
        }
    }

    fn answer(&mut self, request: Request) {
        match request {
            Request::Status(reply) => {
                let _ = reply.send(self.status());
            }
            Request::Peers(reply) => {
                let _ = reply.send(pb::PeersResponse::default());
            }
            Request::Peer { reply, .. } => {
                let _ = reply.send(Err(self.down().to_string()));
            }
            Request::Events { after, reply } => {
                let _ = reply.send(EventLog::new(0).read(after));
            }
            Request::Metrics(reply) => {
                let _ = reply.send((self.status(), pb::PeersResponse::default()));
            }
            // There is no link, and so no socket of `wg show`.
            Request::Device(reply) => drop(reply),
            Request::Ping { reply, .. } => {
                let _ = reply.send(PingAnswer::Silence(NoPong::Down(self.down())));
            }
            Request::Down(reply) => {
                let lasts = self.marker.set(SystemTime::now());
                self.open();
                let _ = reply.send(match (lasts, &self.problem) {
                    (_, Some(problem)) => Err(problem.clone()),
                    (lasts, None) => Ok(DownAnswer::new(true, lasts)),
                });
            }
            // Nothing is guarded.
            Request::Guards(reply) => {
                let _ = reply.send(pb::GuardsResponse::default());
            }
            Request::ReleaseGuard { reply, .. } => {
                let _ = reply.send(Err(self.down().to_string()));
            }
            Request::Confirm(reply) => {
                let _ = reply.send(self.state.confirm().map_err(|error| error.to_string()));
            }
            Request::Up(_) | Request::Leave { .. } => {}
        }
    }

    fn down(&self) -> Down {
        self.marker.read().unwrap_or(Down { since: None })
    }

    /// Removes everything that Towline created on the host.
    fn open(&mut self) {
        // A relay alone creates nothing on the host.
        if self.purpose == Purpose::Relay {
            return;
        }
        let problem = host_controller::remove(&self.config).err().map(|error| format!("{error:#}"));
        if let Some(problem) = problem.as_ref().filter(|_| problem != self.problem) {
            tracing::error!(%problem, "host network not opened");
        }
        self.problem = problem;
    }

    fn confirmation(&self) -> Confirmation {
        confirm::status(self.state.path(), &Moment::now())
    }

    /// Returns when to check the confirmation of the join again.
    fn confirm_at(&self) -> Option<Instant> {
        match (self.confirmation(), &self.undo) {
            (Confirmation::Settled, _) => None,
            (Confirmation::Due(left), _) => Some(Instant::now() + left.min(CONFIRMATION_PERIOD)),
            (Confirmation::Missed, None) => Some(Instant::now()),
            (Confirmation::Missed, Some(_)) => Some(Instant::now() + CONFIRMATION_PERIOD),
        }
    }

    fn retry_at(&self) -> Option<Instant> {
        self.problem.is_some().then(|| Instant::now() + RETRY)
    }

    /// Starts the daemon and then removes the marker. If either fails, the machine stays down.
    fn up(&mut self) -> anyhow::Result<Daemon> {
        let started = self.start();
        if started.is_err() {
            self.open();
        }
        started
    }

    fn start(&self) -> anyhow::Result<Daemon> {
        if self.confirmation() == Confirmation::Missed {
            anyhow::bail!("the join was not confirmed in time: it is being undone");
        }
        // The file may have changed since the agent read it.
        let mut config = Config::load(self.config_path.as_deref())?;
        config.state_dir.clone_from(&self.config.state_dir);
        config.socket.clone_from(&self.config.socket);
        config.relay.enabled |= self.purpose == Purpose::Relay;
        let stored = Stored::read(&config, &self.state)?;
        let path = self.config_path.clone();
        let daemon = Daemon::start(config, path, self.purpose, self.state.clone(), stored)?;
        if let Err(error) = self.marker.clear() {
            if let Err(error) = daemon.tunnels.data_plane().stop() {
                tracing::error!(%error, "data plane hangs");
            }
            anyhow::bail!("{error}: this machine stays down");
        }
        Ok(daemon)
    }

    fn status(&self) -> pb::StatusResponse {
        let membership = self.state.membership();
        let opening = self.problem.iter();
        let mut problems: Vec<Problem> =
            opening.map(|reason| Problem::NotOpened { reason: reason.clone() }).collect();
        problems.extend(self.undo.clone());
        problems.extend(Problem::of_confirmation(self.confirmation()));
        problems.extend(membership.as_ref().err().map(Problem::from));
        let membership = membership.ok().flatten();
        let keys = self.state.keys().ok();
        let down = self.down();
        pb::StatusResponse {
            public_key: keys.map(|k| k.wireguard.public().to_string()).unwrap_or_default(),
            version: towline_proto::VERSION.into(),
            listen_port: self.config.wireguard.port.into(),
            link: self.config.link.name.clone(),
            mtu: self.config.link.mtu.into(),
            controller: membership.as_ref().map(|_| pb::ControllerStatus {
                reason: down.to_string(),
                reason_code: down.code().into(),
                ..Default::default()
            }),
            certificate_expires_at: report::certificate_expires_at(&self.state),
            uptime_ms: report::millis(self.started.elapsed()),
            problems: report::texts(&problems),
            problem_details: report::details(&problems),
            state: MachineState::Down.code().into(),
            confirm_within_ms: report::confirm_within_ms(self.confirmation()),
            down_since: Some(report::unix_seconds(down.since)),
            ..report::identity(membership.as_ref().map(|own| &own.grant), &self.config)
        }
    }
}

/// Runs `work` and notifies the service manager in the meantime that the agent is alive.
async fn with_heartbeat<T>(notifier: &Notifier, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let mut ticks = tokio::time::interval(notifier.period().unwrap_or(CONFIRMATION_PERIOD));
    loop {
        tokio::select! {
            result = &mut work => return result,
            _ = ticks.tick() => notifier.alive(),
        }
    }
}
