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
//! armed. The task never waits for another part: an answer that takes time is one more input.
//!
//! What the mesh knows (membership, peers, who was removed, the peer table) is asked of the
//! [`Mesh`]. The parts own the rest; [`Daemon`] passes each input on to those that it concerns.
//!
//! | part | owns |
//! |---|---|
//! | `Tunnels` | the running data plane |
//! | `HostController` | the plan on the host's network, and what differs from it |
//! | `Announcer` | prefixes of all sources, node IPs, and what is announced |
//! | `ControllerLink` | commands to the discovery client, and its last reports |
//! | `KubernetesNode` | this machine's Node object |
//! | `FirewallSearch` | a search of other programs' firewalls, and the requests that wait for it |
//! | `Prober` | keys of the pairs, and pings of the operator |
//! | `Observer` | events, rates of traffic, and the problems that are known |
//! | `SummarySchedule` | when the next summary of the tunnels goes to the controller |
//! | `RemovalExchange` | questions to peers about removed nodes, and answers |
//! | `StartTrace` | the spans of this start (feature `otel`) |
//! | `Leaving` | a `towline leave` that waits for a controller |
//! | `ApiEndpoint` | the local port that leads to an API server |
//! | `WireguardSocket` | the socket of `wg show`, and its server |
//! | `Reporter` | nothing: it reads all of them for status output |

mod announcer;
mod api_servers;
mod controller_link;
mod firewall_search;
mod host_controller;
mod kubernetes_node;
mod leave;
mod map_age;
mod metrics_server;
mod observer;
mod outputs;
mod prober;
mod problem;
mod queueing;
mod reload;
mod removals;
mod report;
mod restorations;
mod signals;
mod sleep;
#[cfg(feature = "otel")]
mod spans;
mod standby;
mod start;
mod start_report;
mod summary;
mod termination;
#[cfg(test)]
mod tests;
mod tunnels;
mod watchdog;
mod wireguard_socket;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ipnet::IpNet;
use rand::Rng as _;
use tokio::sync::oneshot;
use towline_core::mesh::{Mesh, PeerStatus};
use towline_core::path::Source;
use towline_core::peer_table::Observation;
use towline_core::prefixes::is_private;
use towline_dataplane as dataplane;
use towline_host::HostEvent;
use towline_proto::code::Coded;
use towline_proto::frame::Probe;
use towline_proto::id::WireguardKey;
use towline_proto::stun;
use towline_service::notify::Notifier;

use crate::api_endpoint::ApiEndpoint;
use crate::config::{Addressing, Config};
use crate::confirm::{self, Confirmation, Moment};
use crate::control::{self, ControlServer, Request};
use crate::discovery;
use crate::down::DownMarker;
use crate::events::Event;
use crate::node_ip::NodeIps;
use crate::state::StateDir;
#[cfg(feature = "otel")]
use crate::telemetry::StartTrace;
use crate::timing::at;
use announcer::Announcer;
use controller_link::{ControllerLink, Received};
use firewall_search::FirewallSearch;
use host_controller::HostController;
use kubernetes_node::KubernetesNode;
use leave::Leaving;
use map_age::MapAge;
use observer::Observer;
use prober::Prober;
use removals::RemovalExchange;
use report::Reporter;
use signals::{SignalMeaning, Signals};
use sleep::SleepClock;
use standby::Standby;
use start::{AtJoin, Stored};
use start_report::StartReport;
use summary::SummarySchedule;
use tunnels::{Report, Tunnels};
use watchdog::{Verdict, Watchdog};
use wireguard_socket::WireguardSocket;

pub use leave::{leave, open_host};
pub(crate) use start::{configure, core_config};

/// Returns the codes of problems, notes and reasons that this module reports.
pub(crate) fn codes() -> Vec<&'static str> {
    use problem::{Blocked, Note, Problem};
    [Problem::codes(), Note::codes(), Blocked::codes()].concat()
}

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
    metrics_server::start(&config.metrics, &control.requests());
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

/// A running agent: the mesh, and the parts that do I/O for it.
struct Daemon {
    config: Config,
    config_path: Option<PathBuf>,
    purpose: Purpose,
    state: Arc<StateDir>,
    at_join: AtJoin,
    started: Instant,

    mesh: Mesh,
    tunnels: Tunnels,
    host: HostController,
    announcer: Announcer,
    controller: ControllerLink,
    map_age: MapAge,
    kubernetes: KubernetesNode,
    firewalls: FirewallSearch,
    prober: Prober,
    observer: Observer,
    summaries: SummarySchedule,
    /// Set while `towline leave` waits for a controller.
    leaving: Option<Leaving>,
    /// Set while the daemon runs, if there is a link and the configuration does not disable it.
    wireguard_socket: Option<WireguardSocket>,
    /// Set while the daemon runs, if the configuration has an address for it.
    api_endpoint: Option<ApiEndpoint>,
    #[cfg(feature = "otel")]
    trace: StartTrace,
}

/// # Inputs
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
        let mut sleep = SleepClock::default();
        if self.config.wireguard.uapi && self.purpose == Purpose::Node {
            let socket = WireguardSocket::start(&self.config.link.name, control.requests());
            self.wireguard_socket = Some(socket);
        }
        // A relay alone has no overlay addresses. The task ends with this function.
        let commands = self.controller.commands().filter(|_| self.purpose == Purpose::Node);
        let connected = self.controller.connection();
        let _removals = commands
            .map(|commands| RemovalExchange::start(control.requests(), commands, connected));
        self.start_api_endpoint()?;
        // Pod networks are known before the uplinks are chosen: none of them is one.
        self.kubernetes_changed();
        self.configuration_changed();
        // Nothing of a map that is too old is used, not even until the first input.
        self.begin_map_age();
        let exit = loop {
            if let Some(slept) = sleep.woke(sleep::asleep()) {
                let event = Event::MachineSlept { time: slept };
                tracing::info!(event = event.code(), ?slept, "the machine slept: connecting again");
                self.observer.happened(&event);
                self.map_age.slept(slept);
                self.check_map_age();
                self.mesh.handle_wake(Instant::now());
                self.addresses_changed();
            }
            self.drain();
            start.report(notifier, self.host.blocked());
            if let Some(asked) = asked.take() {
                let _ = asked.send(Ok(false));
            }
            // The watchdog is fed here only, so that it also notices a hanging task.
            if watchdog.due() <= Instant::now() {
                match watchdog.check(Instant::now(), self.tunnels.data_plane().stalled_workers()) {
                    Verdict::Alive => notifier.alive(),
                    Verdict::Stalled { workers, news: true } => {
                        tracing::warn!(workers, "data plane workers stalled");
                    }
                    Verdict::Stalled { .. } => {}
                    Verdict::Stuck(stuck) => return Err(stuck.into()),
                }
            }
            let deadline = self.mesh.poll_timeout().map(|(at, _reason)| at);
            let (search_at, look_at) = (self.firewalls.due(), self.observer.due());
            let report_at = self.summaries.due().filter(|_| self.controller.is_connected());
            let expires_at = self.map_expires_at();
            tokio::select! {
                () = at(deadline) => self.mesh.handle_timeout(Instant::now()),
                () = at(Some(watchdog.due())) => {}
                () = at(search_at) => self.search_firewalls(),
                () = at(Some(look_at)) => self.observe(&sleep),
                () = at(report_at) => self.report_tunnels(),
                () = at(expires_at) => self.check_map_age(),
                found = self.firewalls.finished() => self.firewalls_searched(found),
                report = self.tunnels.next() => self.tunnels_report(report)?,
                Some(event) = self.controller.next() => self.controller_event(event),
                event = self.host.next() => match event {
                    HostEvent::AddressesChanged => self.addresses_changed(),
                    HostEvent::OursChanged => self.host.ours_changed(),
                    HostEvent::HooksChanged => self.host.restore_hooks(),
                    HostEvent::FirewallsChanged => self.firewalls.changed(Instant::now()),
                },
                Some(()) = self.kubernetes.changed() => self.kubernetes_changed(),
                Some(request) = control.next() => {
                    if let Some(exit) = self.control_request(request) {
                        break exit;
                    }
                    confirm_at = self.next_confirmation();
                }
                informed = leave::informed(&mut self.leaving) => {
                    if let Some(exit) = self.finish_leave(informed) {
                        break exit;
                    }
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
        self.abandon_leave();
        self.close_wireguard_socket();
        if let Err(error) = self.tunnels.data_plane().stop() {
            tracing::error!(%error, "data plane hangs: ending the agent without it");
        }
        Ok(exit)
    }

    /// Handles a report of the data plane. Starts it again after a fault.
    fn tunnels_report(&mut self, report: Report) -> anyhow::Result<()> {
        let now = Instant::now();
        match report {
            Report::Event(dataplane::Event::Peer { peer, what }) => {
                #[cfg(feature = "otel")]
                self.trace_observation(&peer, &what);
                self.mesh.handle_observation(now, peer, what);
            }
            Report::Event(dataplane::Event::Probe { peer, from, is_validated, message }) => {
                self.message_received(peer, Source { path: from, is_validated }, message);
            }
            Report::Event(dataplane::Event::Stun { from, datagram }) => {
                if let Some(stun::Message::Success { transaction, mapped }) =
                    stun::Message::decode(&datagram)
                {
                    self.mesh.handle_stun(now, from.remote, transaction, mapped);
                }
            }
            Report::Fault(fault) => {
                let event = Event::DataPlaneRestarted { fault: fault.to_string() };
                tracing::error!(event = event.code(), %fault, "data plane failed: restarting it");
                self.observer.happened(&event);
                let probes = self.prober.handle_for_data_plane();
                let key = self.prober.own_key();
                self.tunnels.restart(&self.config, key, probes, self.purpose)?;
                self.host.restore();
                if self.mesh.second_port().is_some() {
                    self.open_second_port();
                }
                if let Some(table) = self.mesh.forwarding_table() {
                    self.tunnels.data_plane().apply_forwarding(table);
                }
                if let Some(table) = self.mesh.peer_table().cloned() {
                    self.tunnels.apply(&table);
                    for peer in table.peers.keys() {
                        self.mesh.handle_observation(now, *peer, Observation::SessionExpired);
                    }
                }
            }
        }
        Ok(())
    }

    /// Handles a message that the data plane opened.
    fn message_received(&mut self, peer: WireguardKey, source: Source, message: Probe) {
        self.mesh.handle_message(Instant::now(), peer, Some(source), message);
    }

    /// Handles a message that a controller carried. Only a call does not depend on its path.
    fn signal_received(&mut self, datagram: &[u8]) {
        let Some((peer, message)) = self.prober.open_signal(datagram) else { return };
        self.mesh.handle_message(Instant::now(), peer, None, message);
    }

    fn controller_event(&mut self, event: discovery::Event) {
        #[cfg(feature = "otel")]
        self.trace_controller(&event);
        match &event {
            discovery::Event::Connected { address, .. } => {
                let event = Event::ControllerConnected { address: address.to_string() };
                tracing::info!(event = event.code(), controller = %address, "controller connected");
                self.observer.happened(&event);
                self.summaries.connected(Instant::now(), rand::rng().random());
            }
            discovery::Event::Disconnected { reason } if self.controller.is_connected() => {
                let event = Event::ControllerLost(observer::reason(reason));
                tracing::info!(event = event.code(), code = reason.code(), %reason, "controller lost");
                self.observer.happened(&event);
            }
            discovery::Event::Heard { is_synced: true, .. } => self.map_confirmed(),
            _ => {}
        }
        match self.controller.handle(Instant::now(), &mut self.mesh, event) {
            None => {}
            Some(Received::Signal(datagram)) => self.signal_received(&datagram),
            Some(Received::Grant) => {
                self.announcer.set_relay(self.mesh.relay().is_some());
                self.kubernetes_changed();
                self.announcer.select(&mut self.mesh, self.config.prefix_filter());
            }
            Some(Received::Controllers) => {
                let mut underlay = start::underlay(&self.config, self.controller.controllers());
                underlay.controllers.extend(self.controller.resolved());
                self.mesh.set_underlay(Instant::now(), underlay);
                self.update_limits();
            }
        }
    }

    /// Updates node IPs, uplinks and candidates after the host's addresses changed.
    fn addresses_changed(&mut self) {
        self.host.look_for_redirects();
        // A LAN may lie inside a protected range, and this node may announce it. The overlay and this
        // node's pods are never uplinks.
        let mut excluded = self.announcer.pods();
        if let Some(mesh) = self.mesh.config() {
            excluded.extend(mesh.overlays());
        }
        let found = self.host.connectivity(excluded);
        self.mesh.set_connected_networks(Instant::now(), found.networks);
        let node = &self.config.node;
        // With `node.addressing = "overlay"` there are no node IPs to announce.
        let node_ips = match node.addressing {
            Addressing::Overlay => NodeIps::default(),
            Addressing::NodeIp if !node.node_ips.is_empty() => {
                NodeIps::first(node.node_ips.iter().copied())
            }
            Addressing::NodeIp => NodeIps::first(found.node_ips),
        };
        self.announcer.set_node_ips(&mut self.mesh, self.config.prefix_filter(), &node_ips);
        self.tunnels.set_host_tunnels(found.tunnel_ports);
        let mut candidates = self.config.candidates();
        self.mesh.set_transit(Instant::now(), found.transit);
        let outward = found.outward;
        let port = self.config.wireguard.port;
        candidates.extend(host_controller::local_candidates(&outward.candidates, port));
        self.mesh.set_uplinks(Instant::now(), outward.uplinks, candidates);
    }

    /// Updates the announced prefixes after the Node object or the grant changed.
    fn kubernetes_changed(&mut self) {
        let update = self.kubernetes.handle_change(self.mesh.grant());
        self.announcer.handle(&mut self.mesh, self.config.prefix_filter(), update);
    }

    /// Updates the limits of this machine after its configuration or the list of controllers changed.
    fn update_limits(&mut self) {
        let limits = self.at_join.limits(&self.config, self.controller.controllers());
        self.mesh.set_local_limits(Instant::now(), limits);
    }

    /// Updates what follows from `[node]` of the configuration.
    fn configuration_changed(&mut self) {
        let prefixes = self.config.node.prefixes.clone();
        self.announcer.set_configured(&mut self.mesh, self.config.prefix_filter(), prefixes);
        self.addresses_changed();
    }

    /// Closes the socket of `wg show`. It has to be closed before the link is removed.
    fn close_wireguard_socket(&mut self) {
        if let Some(socket) = self.wireguard_socket.take() {
            socket.close();
        }
    }

    /// Handles a request of the command line. Returns why the daemon has to end, if it has to.
    fn control_request(&mut self, request: Request) -> Option<Exit> {
        // What is shown depends on the time, which stands still in the core while nothing happens.
        self.mesh.handle_timeout(Instant::now());
        match request {
            Request::Status(reply) => {
                self.host.read_gateways();
                self.host.look_for_redirects();
                self.search_firewalls();
                // A request waits for the search, so that the status contains what it finds.
                if let Some(reply) = self.firewalls.defer(reply) {
                    let _ = reply.send(Reporter(self).status());
                }
            }
            Request::Peers(reply) => {
                let _ = reply.send(Reporter(self).peers());
            }
            Request::Peer { node, reply } => {
                let peer = Reporter(self).peer(&node);
                let _ = reply.send(peer.ok_or_else(|| control::unknown_node(&node)));
            }
            Request::Events { after, reply } => {
                let _ = reply.send(self.observer.log().read(after));
            }
            Request::Metrics(reply) => {
                let _ = reply.send((Reporter(self).status(), Reporter(self).peers()));
            }
            Request::Device(reply) => {
                let _ = reply.send(Reporter(self).device());
            }
            Request::Ping { node, timeout, reply } => {
                self.prober.ping(Instant::now(), &mut self.mesh, &node, timeout, reply);
            }
            Request::Down(reply) => {
                let result = self.down();
                let exit = if result.is_ok() { Exit::Down } else { Exit::Standby };
                let _ = reply.send(result);
                return Some(exit);
            }
            Request::Leave { force, reply } => self.leave(force, reply),
            Request::Up(reply) => {
                let _ = reply.send(Ok(true));
            }
            Request::Guards(reply) => {
                let _ = reply.send(Reporter(self).guards());
            }
            Request::ReleaseGuard { network, reply } => {
                let is_released = self.mesh.release_withdrawn(Instant::now(), &network);
                let _ = reply.send(control::released(network, is_released));
            }
            Request::Confirm(reply) => {
                let _ = reply.send(self.state.confirm().map_err(|error| error.to_string()));
            }
        }
        None
    }

    /// Looks for networks of this host that the guards cut off, and begins to search the firewalls of
    /// other programs, unless a search runs or has just begun.
    fn search_firewalls(&mut self) {
        let now = Instant::now();
        if !self.firewalls.can_begin(now) {
            return;
        }
        let mesh = self.mesh.config();
        let overlay: Vec<IpNet> = mesh.into_iter().flat_map(|mesh| mesh.overlays()).collect();
        let outer = |peer: towline_core::mesh::PeerStatus| {
            let direct = peer.path.filter(|path| !path.is_relayed()).map(|path| path.remote);
            let published = || {
                let mut candidates = peer.node.record().candidates.iter().map(|c| c.address());
                candidates.find(|address| !is_private(address.ip()))
            };
            direct.or_else(published)
        };
        let peers: Vec<SocketAddr> = self.mesh.peers().filter_map(outer).collect();
        self.host.look_for_overlaps(&overlay);
        let search = self.host.obstacle_search(peers);
        self.firewalls.begin(now, search);
    }

    /// Takes the result of a search, and answers the requests that waited for it.
    fn firewalls_searched(&mut self, found: firewall_search::Found) {
        self.host.take_obstacles(found);
        let waiting = self.firewalls.take_waiting();
        if waiting.is_empty() {
            return;
        }
        let status = Reporter(self).status();
        for reply in waiting {
            let _ = reply.send(status.clone());
        }
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
}

/// # Periodic work
impl Daemon {
    /// Sends a summary of the tunnels to the controller.
    fn report_tunnels(&mut self) {
        self.summaries.reported(Instant::now(), rand::rng().random());
        let Some(grant) = self.mesh.grant() else { return };
        let traffic = |peer: &PeerStatus| {
            let rates = self.observer.rates(&peer.node.wireguard_key());
            rates.map_or(0, |rates| rates.received.saturating_add(rates.sent))
        };
        let peers = self.mesh.peers().map(|peer| {
            let traffic = traffic(&peer);
            (peer, traffic)
        });
        let summary = summary::summarize(grant.node_id, peers);
        self.controller.report(summary);
    }

    /// Compares problems and traffic with those of a moment ago.
    fn observe(&mut self, sleep: &SleepClock) {
        let problems = Reporter(self).problems();
        let traffic = self.tunnels.data_plane().traffic();
        self.observer.look(Instant::now(), &problems, traffic);
        // After a sleep that the map's age does not contain yet, the clock only seems to have been set.
        if !sleep.has_slept(sleep::asleep()) {
            self.correct_map_age();
        }
        self.check_map_age();
        // Round-trip times change without an event.
        self.api_servers_changed();
    }
}

/// Returns whether an agent accepts connections on `socket`.
pub fn is_running(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}
