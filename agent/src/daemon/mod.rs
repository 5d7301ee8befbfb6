//! The daemon: one task that owns the [`Mesh`] and connects it with everything that does I/O.
//!
//! ```text
//!   discovery ──map──────────►┐                ┌──PeerTable, handshakes, probes──► data plane
//!   data plane ─observations─►│  Mesh, owned   ├──Plan────────────────────────────► host
//!   host ───────addresses────►│  by this task  ├──candidates──────────────────────► discovery
//!   control ────requests─────►┘                └──answers─────────────────────────► control
//! ```
//!
//! Every input carries the time. After each input the outputs are drained and the next deadline is
//! armed. The task never blocks on another part.

mod announced_prefixes;
mod host;
mod leave;
mod node_prefixes;
mod paths;
mod report;
mod requests;
mod standby;
mod start;
mod start_report;
mod termination;
#[cfg(test)]
mod tests;
mod watchdog;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use towline_core::mesh::{MapChange, Mesh, Output, PeerState};
use towline_core::peer_table::{Observation, PeerTable};
use towline_core::prefixes::is_host;
use towline_dataplane::{self as dataplane, DataPlane, HostTunnels, Relay};
use towline_host::HostEvent;
use towline_proto::id::{NodeId, WireguardKey};

use crate::config::Config;
use crate::confirm::{self, Confirmation, Moment};
use crate::control::{ControlServer, PingAnswer};
use crate::discovery::{self, Announcement};
use crate::down::DownMarker;
use crate::notify::Notifier;
use crate::prefixes::{PrefixSender, PrefixUpdate, Prefixes, Selection};
use crate::probe::ProbeKeys;
use crate::state::{CachedPrefixes, Keys, Membership, StateDir};
use crate::{kubernetes, static_peers};
use host::Host;
use requests::{path_kind, with_heartbeat};
use standby::Standby;
use start::{Stored, start_data_plane};
use start_report::StartReport;
use termination::{GRACE, Termination};
use watchdog::{Verdict, Watchdog};

pub use leave::{leave, open_host};
pub(crate) use report::down_line;
pub(crate) use start::core_config;

/// Longest interval between two checks of the time that is left for a confirmation.
const CONFIRMATION_PERIOD: Duration = Duration::from_secs(10);

/// Role in which the daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A node: its traffic for the mesh enters the tunnel.
    Node,
    /// A relay alone: no link, no routes and no guards. Its overlay addresses are not reachable.
    Relay,
}

/// Reason why the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    /// The host has to be opened, and the agent keeps running to do it: a join was not confirmed in
    /// time, or `towline down` could not open the host.
    Standby,
    /// The agent received a signal to end. Link, routes and guards stay.
    Stopped,
    /// `towline down` opened the host.
    Down,
    /// `towline leave` opened the host and removed the membership.
    Left,
}

/// Runs the agent until a signal, `towline down` or `towline leave` ends it.
///
/// `config_path` is read again on SIGHUP and at `towline up`.
pub fn run(config: Config, config_path: Option<PathBuf>, purpose: Purpose) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Blocking threads resolve names and write the cached map.
        .max_blocking_threads(4)
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(serve(config, config_path, purpose));
    // A name resolution that is still running must not delay the exit.
    runtime.shutdown_timeout(Duration::from_millis(500));
    result
}

/// Runs the daemon. Waits for `towline up` if the machine is down.
async fn serve(
    config: Config,
    config_path: Option<PathBuf>,
    purpose: Purpose,
) -> anyhow::Result<()> {
    let state = Arc::new(StateDir::open(&config.state_dir)?);
    let mut signals = Signals::new()?;
    let notifier = Notifier::from_environment();
    // This is read after the lock is taken: see `down.rs`.
    let is_down = DownMarker::of(&config).read().is_some()
        || confirm::status(state.path(), &Moment::now()) == Confirmation::Missed;
    let (mut daemon, mut control) = if is_down {
        (None, ControlServer::start(&config.socket)?)
    } else {
        let stored = Stored::read(&config, &state)?;
        let control = ControlServer::start(&config.socket)?;
        let path = config_path.clone();
        let daemon = Daemon::start(config.clone(), path, purpose, state.clone(), stored)?;
        (Some((daemon, None)), control)
    };
    let mut standby = Standby::new(config, config_path, purpose, state);
    let exit = loop {
        let (daemon, asked) = match daemon.take() {
            Some(daemon) => daemon,
            None => match standby.run(&mut control, &mut signals, &notifier).await {
                standby::Ended::Stopped => break Ok(Exit::Stopped),
                standby::Ended::Left => break Ok(Exit::Left),
                standby::Ended::Up(daemon, asked) => (*daemon, Some(asked)),
            },
        };
        match daemon.run(&mut control, &mut signals, &notifier, asked).await {
            Ok(Exit::Standby) => {}
            exit => break exit,
        }
    };
    notifier.stopping();
    // The responses to `down` and `leave` are delivered before the process ends.
    control.stop().await;
    let exit = exit?;
    tracing::info!(?exit, "agent stopped");
    Ok(())
}

/// Signals that the agent handles.
struct Signals {
    termination: Termination,
    hangup: tokio::signal::unix::Signal,
}

/// Meaning of a signal for the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SignalMeaning {
    /// SIGTERM or SIGINT: end the agent.
    End,
    /// SIGHUP: read the configuration again.
    Reload,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            termination: Termination::watch(GRACE).context("cannot receive signals")?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal. No signal is lost when the future is dropped.
    async fn next(&mut self) -> SignalMeaning {
        tokio::select! {
            () = self.termination.requested() => SignalMeaning::End,
            _ = self.hangup.recv() => SignalMeaning::Reload,
        }
    }

    /// Waits for a signal that ends the agent.
    async fn end(&mut self) {
        while self.next().await != SignalMeaning::End {}
    }
}

/// The state of a running agent, and its connections to the parts that do I/O.
struct Daemon {
    config: Config,
    config_path: Option<PathBuf>,
    state: Arc<StateDir>,
    keys: Keys,
    /// Membership of this node. `None`: there is no mesh, only static peers.
    membership: Option<Membership>,
    started: Instant,

    mesh: Mesh,
    data_plane: DataPlane,
    host_tunnels: HostTunnels,
    probe_keys: ProbeKeys,
    relay: Relay,
    relay_swept: Instant,
    purpose: Purpose,
    host: Host,

    prefixes: Prefixes,
    /// Node IPs of this host, by which other nodes reach it.
    node_ips: Vec<IpAddr>,
    announced: Selection,
    remembered: watch::Sender<CachedPrefixes>,
    /// Value that was last read from `inputs.kubernetes`.
    kubernetes: kubernetes::View,
    /// Sender for prefix updates. Each task that is a source of prefixes gets a clone.
    _prefix_sender: PrefixSender,
    announcements: watch::Sender<Option<Announcement>>,
    commands: Option<mpsc::Sender<discovery::Command>>,
    controller: ControllerView,
    /// Result of the last publication of the record: remarks about prefixes that other nodes hold,
    /// or why the controller refused the record.
    published: Result<Vec<String>, String>,
    /// End of the client certificate that is in use, in seconds since 1970.
    certificate_expires_at: i64,

    /// Reply channel of each `towline ping` probe in flight, by probe id.
    pings: BTreeMap<u64, oneshot::Sender<PingAnswer>>,
    next_ping: u64,

    inputs: Inputs,
}

/// Channels on which the other parts send their events.
struct Inputs {
    data_plane: mpsc::Receiver<dataplane::Event>,
    /// Latest fault of the data plane. `None` while it works.
    faults: watch::Receiver<Option<dataplane::Fault>>,
    discovery: mpsc::Receiver<discovery::Event>,
    prefixes: mpsc::Receiver<PrefixUpdate>,
    kubernetes: watch::Receiver<kubernetes::View>,
}

/// Last known state of the controller connection, for status output.
#[derive(Debug, Default)]
struct ControllerView {
    connected: bool,
    address: String,
    revision: u64,
    /// When the controller last sent something.
    last_heard: Option<Instant>,
    /// Why there is no connection. Empty while connected.
    reason: String,
}

impl Daemon {
    /// Runs until the agent has to end. Replies on `asked` once the first plan was applied.
    async fn run(
        mut self,
        control: &mut ControlServer,
        signals: &mut Signals,
        notifier: &Notifier,
        mut asked: Option<oneshot::Sender<Result<bool, String>>>,
    ) -> anyhow::Result<Exit> {
        let mut confirm_at = self.next_confirmation();
        let mut start = StartReport::default();
        let mut watchdog = Watchdog::new(Instant::now(), notifier.period());
        self.configured_prefixes();
        self.kubernetes_changed();
        self.prefixes_changed();
        self.addresses_changed();
        let exit = loop {
            self.drain();
            start.report(notifier, self.blocked());
            if let Some(asked) = asked.take() {
                let _ = asked.send(Ok(false));
            }
            // The watchdog is fed here only, so that it also notices a hanging task.
            if watchdog.due() <= Instant::now() {
                match watchdog.check(Instant::now(), self.data_plane.stalled_workers()) {
                    Verdict::Alive => notifier.alive(),
                    Verdict::Stalled { workers, news: true } => {
                        tracing::warn!(workers, "data plane workers stalled");
                    }
                    Verdict::Stalled { .. } => {}
                    Verdict::Stuck(stuck) => return Err(stuck.into()),
                }
            }
            let deadline = self.mesh.poll_timeout().map(|(at, _reason)| at);
            let wake = tokio::time::sleep_until(
                deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600)).into(),
            );
            tokio::select! {
                () = wake, if deadline.is_some() => self.mesh.handle_timeout(Instant::now()),
                () = tokio::time::sleep_until(watchdog.due().into()) => {}
                Ok(()) = self.inputs.faults.changed() => self.data_plane_fault()?,
                Some(event) = self.inputs.data_plane.recv() => self.data_plane_event(event),
                Some(event) = self.inputs.discovery.recv() => self.discovery_event(event),
                event = self.host.next() => match event {
                    HostEvent::AddressesChanged => self.addresses_changed(),
                    HostEvent::OursChanged => self.host.restore(),
                    HostEvent::HooksChanged => self.host.restore_hooks(),
                },
                Some(update) = self.inputs.prefixes.recv() => self.prefix_update(update),
                Ok(()) = self.inputs.kubernetes.changed() => self.kubernetes_changed(),
                Some(request) = control.next() => {
                    if let Some(exit) = self.control_request(request, notifier).await {
                        break exit;
                    }
                    confirm_at = self.next_confirmation();
                }
                () = at(confirm_at) => {
                    if self.confirmation() == Confirmation::Missed {
                        tracing::error!("the join was not confirmed in time: undoing the join");
                        break Exit::Standby;
                    }
                    confirm_at = self.next_confirmation();
                }
                meaning = signals.next() => match meaning {
                    SignalMeaning::End => break Exit::Stopped,
                    SignalMeaning::Reload => self.reload(),
                },
            }
        };
        if let Err(error) = self.data_plane.stop() {
            tracing::error!(%error, "data plane hangs: ending the agent without it");
        }
        Ok(exit)
    }

    /// Returns the state of the join's confirmation.
    fn confirmation(&self) -> Confirmation {
        confirm::status(self.state.path(), &Moment::now())
    }

    /// Returns when to check the confirmation again. The check is periodic because the boot clock
    /// advances while the machine sleeps, but timers do not.
    fn next_confirmation(&self) -> Option<Instant> {
        match self.confirmation() {
            Confirmation::Settled => None,
            Confirmation::Due(left) => Some(Instant::now() + left.min(CONFIRMATION_PERIOD)),
            Confirmation::Missed => Some(Instant::now()),
        }
    }

    /// Returns why this machine must not use the mesh yet: its plan is not applied. A relay alone
    /// has no plan.
    fn blocked(&self) -> Option<&str> {
        match self.purpose {
            Purpose::Node => self.host.blocked(),
            Purpose::Relay => None,
        }
    }

    /// Executes all pending outputs of the core.
    fn drain(&mut self) {
        while let Some(output) = self.mesh.poll_output() {
            match output {
                Output::Transmit(transmit) => self.transmit(transmit),
                Output::Stun { local, to, transaction } => {
                    self.ask_reflector(local, to, transaction);
                }
                Output::Handshake { peer, to } => self.data_plane.handshake(peer, to),
                Output::PeerTable(table) => self.peer_table(&table),
                // A relay alone does not change the host's network.
                Output::Plan(_) if self.purpose == Purpose::Relay => {}
                Output::Plan(plan) => {
                    self.host.apply(plan);
                    self.remember();
                }
                Output::Advertise(candidates) => {
                    let prefixes = self.announced.announced.clone();
                    let relay = self.config.relay.enabled;
                    let announcement = Announcement { candidates, prefixes, relay };
                    self.announcements.send_replace(Some(announcement));
                }
                Output::StateChanged { peer, from, to } => self.state_changed(peer, from, to),
                Output::StaticStateChanged { peer, from, to } => {
                    self.static_state_changed(peer, from, to);
                }
                Output::PingResult { id, answer } => self.ping_result(id, answer),
            }
        }
    }

    /// Applies a new peer table to the data plane, the probe keys and the relay.
    fn peer_table(&mut self, table: &PeerTable) {
        self.probe_keys.follow(&self.keys.wireguard, table.peers.keys());
        self.data_plane.apply(table);
        self.relay.retain(|node| table.peers.contains_key(node));
    }

    fn static_state_changed(&self, peer: WireguardKey, from: PeerState, to: PeerState) {
        let status = self.mesh.static_peers().find(|status| status.public_key == peer);
        let Some(status) = status else { return };
        let endpoint = status.endpoint.map(|path| tracing::field::display(path.remote));
        tracing::info!(peer = %status.name, ?from, ?to, endpoint, reason = %status.reason, "static peer");
    }

    fn state_changed(&self, peer: NodeId, from: PeerState, to: PeerState) {
        let Some(status) = self.mesh.peer(peer) else { return };
        let name = status.node.name();
        match status.path {
            Some(path) => tracing::info!(peer = %name, ?from, ?to, %path, "peer"),
            None => tracing::info!(peer = %name, ?from, ?to, reason = %status.reason, "peer"),
        }
    }

    fn data_plane_event(&mut self, event: dataplane::Event) {
        let now = Instant::now();
        match event {
            dataplane::Event::Peer { peer, what } => self.mesh.handle_observation(now, peer, what),
            dataplane::Event::Probe { from, datagram } => {
                self.message_received(Some(from), &datagram);
            }
            dataplane::Event::Stun { from, datagram } => self.stun_received(from, &datagram),
        }
    }

    /// Restarts the data plane after a fault.
    fn data_plane_fault(&mut self) -> anyhow::Result<()> {
        let fault = self.inputs.faults.borrow_and_update().clone();
        let Some(fault) = fault else { return Ok(()) };
        tracing::error!(%fault, "data plane failed: restarting it");
        self.restart_data_plane()
    }

    /// Starts a new data plane, without sessions, after its link was deleted or a worker failed.
    fn restart_data_plane(&mut self) -> anyhow::Result<()> {
        // A hanging worker keeps the link and the port open. Only the end of the process releases
        // them.
        self.data_plane.stop()?;
        (self.data_plane, self.inputs.data_plane) = start_data_plane(
            &self.config,
            &self.keys,
            self.relay.clone(),
            &self.host_tunnels,
            self.purpose,
        )?;
        self.inputs.faults = self.data_plane.faults();
        self.host.restore();
        let Some(table) = self.mesh.peer_table().cloned() else { return Ok(()) };
        self.data_plane.apply(&table);
        let now = Instant::now();
        for peer in table.peers.keys() {
            self.mesh.handle_observation(now, *peer, Observation::SessionExpired);
        }
        Ok(())
    }

    fn discovery_event(&mut self, event: discovery::Event) {
        let now = Instant::now();
        match event {
            discovery::Event::Connected { address, reflectors } => {
                self.mesh.set_reflectors(now, reflectors);
                self.mesh.set_controller_connected(now, true);
                self.controller.connected = true;
                self.controller.address = address.to_string();
                self.controller.reason.clear();
                self.controller.last_heard = Some(now);
            }
            discovery::Event::Signal(datagram) => self.message_received(None, &datagram),
            discovery::Event::Disconnected { reason } => {
                self.mesh.set_controller_connected(now, false);
                self.controller.connected = false;
                self.controller.reason = reason;
            }
            discovery::Event::Heard { revision } => {
                self.controller.revision = revision;
                self.controller.last_heard = Some(now);
            }
            discovery::Event::Map(changes) => {
                let was_removed = self.mesh.is_removed();
                for change in changes {
                    if let (MapChange::Mesh(mesh), Some(membership)) =
                        (&change, &mut self.membership)
                    {
                        membership.mesh = mesh.clone();
                    }
                    self.mesh.handle_map_change(now, change);
                }
                if self.mesh.is_removed() && !was_removed {
                    tracing::error!("this node was removed from the mesh: run `towline leave`");
                }
            }
            discovery::Event::Grant(grant) => {
                if let Some(membership) = &mut self.membership {
                    membership.grant = (*grant).clone();
                }
                self.mesh.set_grant(now, *grant);
                self.kubernetes_changed();
                self.prefixes_changed();
            }
            discovery::Event::Published(result) => self.published = result,
            discovery::Event::Certificate { expires_at } => {
                self.certificate_expires_at = expires_at;
            }
        }
    }

    /// Updates node IPs, uplinks and candidates after the host's addresses changed.
    fn addresses_changed(&mut self) {
        self.host.look_for_redirects();
        // A LAN may lie inside a protected range. The overlay and this node's pods are never
        // uplinks.
        let mut excluded: Vec<IpNet> =
            self.announced.announced.iter().filter(|net| !is_host(net)).copied().collect();
        if let Some(membership) = &self.membership {
            let mesh = &membership.mesh;
            excluded.extend([IpNet::from(mesh.overlay_v6), IpNet::from(mesh.overlay_v4)]);
        }
        self.node_ips_changed(&excluded);
        self.host_tunnels.set(self.host.tunnel_ports());
        let mut candidates = self.config.candidates();
        let uplinks = self.host.uplinks(excluded);
        candidates.extend(host::local_candidates(&uplinks, self.config.wireguard.port));
        self.mesh.set_uplinks(Instant::now(), uplinks, candidates);
    }

    /// Reads the configuration again on SIGHUP and applies what can change while the agent runs. A
    /// file that does not parse changes nothing.
    fn reload(&mut self) {
        let fresh = match Config::load(self.config_path.as_deref()) {
            Ok(fresh) => fresh,
            Err(error) => {
                tracing::error!(%error, "configuration not reloaded: keeping the current one");
                return;
            }
        };
        let static_peers = match static_peers::load(&fresh.peers) {
            Ok(static_peers) => static_peers,
            Err(error) => {
                tracing::error!(%error, "configuration not reloaded: keeping the current one");
                return;
            }
        };
        let mut kept = fresh.clone();
        kept.node = self.config.node.clone();
        kept.peers.clone_from(&self.config.peers);
        kept.state_dir.clone_from(&self.config.state_dir);
        kept.socket.clone_from(&self.config.socket);
        if kept != self.config {
            tracing::warn!(
                "only [node] and [[peer]] were reloaded: restart the agent to apply the rest"
            );
        }
        self.config.node = fresh.node;
        self.config.peers = fresh.peers;
        self.mesh.set_addresses(Instant::now(), self.config.node.addresses.clone());
        self.mesh.set_forward_to(Instant::now(), self.config.node.forward_to.clone());
        self.mesh.set_static_peers(Instant::now(), static_peers);
        self.configured_prefixes();
        self.prefixes_changed();
        self.addresses_changed();
        tracing::info!("configuration reloaded");
    }
}

/// Interval between attempts to write what a full or read-only disk refused.
const SAVE_PERIOD: Duration = Duration::from_secs(5);

/// Retries failed writes until the disk accepts them.
async fn save_again(state: Arc<StateDir>) {
    let mut period = tokio::time::interval(SAVE_PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        let Some(problem) = state.unsaved() else { continue };
        let state = state.clone();
        match tokio::task::spawn_blocking(move || state.save_again()).await {
            Ok(Ok(())) => tracing::info!("state saved"),
            Ok(Err(_)) => tracing::debug!(%problem, "state not saved"),
            Err(_stopped) => return,
        }
    }
}

/// Waits until `time`, or forever if there is none.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Returns whether an agent accepts connections on `socket`.
pub fn is_running(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}
