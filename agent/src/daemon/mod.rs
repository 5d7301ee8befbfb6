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
mod standby;
mod start_report;
mod termination;
#[cfg(test)]
mod tests;
mod watchdog;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ipnet::IpNet;
use rand::Rng as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use towline_core::mesh::{self, MapChange, Mesh, Output, PeerState};
use towline_core::path;
use towline_core::peer_table::{Observation, PeerTable};
use towline_core::prefixes::is_host;
use towline_core::static_peers::StaticPeer;
use towline_proto::id::{NodeId, WireguardKey};

use crate::config::Config;
use crate::confirm::{self, Confirmation, Moment};
use crate::control::{ControlServer, PingAnswer, Request};
use crate::discovery::{self, Announcement, Discovery};
use crate::down::DownMarker;
use crate::join;
use crate::kubernetes;
use crate::map_cache::MapCache;
use crate::notify::Notifier;
use crate::prefixes::{PrefixSender, PrefixUpdate, Prefixes, Selection};
use crate::probe::ProbeKeys;
use crate::reserved_port;
use crate::state::{CachedPrefixes, Counters, Keys, Membership, StateDir};
use crate::static_peers;
use crate::tun_owner;
use host::Host;
use standby::Standby;
use start_report::StartReport;
use termination::{GRACE, Termination};
use towline_dataplane::{self as dataplane, DataPlane, HostTunnels, Relay};
use towline_host::HostEvent;
use watchdog::{Verdict, Watchdog};

pub use leave::{leave, open_host};
pub(crate) use report::down_line;

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

/// State that a start reads from the state directory.
struct Stored {
    static_peers: Vec<StaticPeer>,
    /// Membership of this node. `None`: there is no mesh, only static peers.
    membership: Option<Membership>,
    keys: Keys,
    counters: Counters,
    map: Option<MapCache>,
}

impl Stored {
    /// Reads the state and counts the start.
    fn read(config: &Config, state: &StateDir) -> anyhow::Result<Self> {
        let static_peers = static_peers::load(&config.peers)?;
        let membership = match state.membership()? {
            None if !static_peers.is_empty() => None,
            _ => Some(state.require_membership()?),
        };
        // A machine with static peers and no mesh needs a key too.
        let keys = if membership.is_some() { state.keys()? } else { state.keys_or_generate()? };
        let counters = state.start(unix_millis())?;
        let map = membership.as_ref().map(|membership| state.map(membership)).transpose()?;
        Ok(Self { static_peers, membership, keys, counters, map })
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
    /// Peer table that was last applied to the data plane.
    table: Arc<PeerTable>,
    probe_keys: ProbeKeys,
    relay: Relay,
    relay_swept: Instant,
    purpose: Purpose,
    host: Host,
    /// True once this node was removed from the mesh. Only static peers are used then.
    removed: bool,

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
    /// Opens the UDP port and the TUN device, and starts the parts.
    fn start(
        config: Config,
        config_path: Option<PathBuf>,
        purpose: Purpose,
        state: Arc<StateDir>,
        stored: Stored,
    ) -> anyhow::Result<Self> {
        let Stored { static_peers, membership, keys, counters, map } = stored;
        let host = Host::open(&config)?;
        // An agent without the permission relies on its unit, which reserved the port before the
        // start.
        if let Err(error) = reserved_port::reserve(config.wireguard.port) {
            tracing::debug!(%error, "UDP port not reserved");
        }
        let relay = config.relay();
        let host_tunnels = HostTunnels::default();
        let (data_plane, data_plane_events) =
            start_data_plane(&config, &keys, relay.clone(), &host_tunnels, purpose)?;
        let faults = data_plane.faults();

        let now = Instant::now();
        let core_config = core_config(&config, membership.as_ref(), counters.boot_epoch);
        let mut mesh = Mesh::new(core_config, rand::rng().random(), now);
        let controllers = membership.as_ref().map_or_else(Vec::new, |membership| {
            join::controllers(&config.controller.addresses, membership)
        });
        let owner = nix::unistd::geteuid().as_raw();
        mesh.set_underlay(
            now,
            towline_core::plan::UnderlayPlan { owner, ..config.underlay(&controllers) },
        );
        mesh.set_addresses(now, config.node.addresses.clone());
        mesh.set_forward_to(now, config.node.forward_to.clone());
        mesh.set_static_peers(now, static_peers);
        let cached = state.prefixes()?;
        mesh.set_withdrawn(now, cached.withdrawn.iter().copied());
        let remembered = announced_prefixes::remember(state.clone(), cached);
        tokio::spawn(save_again(state.clone()));
        let removed = map.as_ref().is_some_and(MapCache::own_removed);
        for change in map.iter().flat_map(MapCache::changes) {
            mesh.handle_map_change(now, change);
        }

        let (prefix_sender, prefix_updates) = mpsc::channel(4);
        let (announcements, announced) = watch::channel(None);
        let (events, discovery_events) = mpsc::channel(64);
        let commands = match (&membership, map) {
            (Some(membership), Some(map)) => {
                let (commands, command_queue) = mpsc::channel(64);
                let discovery = Discovery::new(
                    discovery::Setup {
                        state: state.clone(),
                        keys: keys.clone(),
                        controllers,
                        membership: membership.clone(),
                        mark: config.routing.mark,
                        map,
                        counters,
                    },
                    events,
                )?;
                tokio::spawn(discovery.run(announced, command_queue));
                Some(commands)
            }
            _ => None,
        };
        let kubernetes = kubernetes::start(kubernetes::Setup {
            config: config.kubernetes.clone(),
            link: config.link.name.clone(),
            mtu: config.link.mtu,
            state: state.clone(),
            credentials_period: kubernetes::CREDENTIALS_PERIOD,
        });

        let certificate_expires_at = report::certificate_expires_at(&state);
        tracing::info!(
            node = membership.as_ref().map(|m| tracing::field::display(&m.grant.name)),
            mesh = membership.as_ref().map(|m| tracing::field::display(&m.grant.mesh_id)),
            static_peers = config.peers.len(),
            port = config.wireguard.port,
            link = %config.link.name,
            version = towline_proto::VERSION,
            "agent started"
        );
        Ok(Self {
            config,
            config_path,
            state,
            keys,
            membership,
            started: now,
            mesh,
            data_plane,
            host_tunnels,
            table: Arc::default(),
            probe_keys: ProbeKeys::default(),
            relay,
            relay_swept: now,
            purpose,
            host,
            removed,
            prefixes: Prefixes::default(),
            node_ips: Vec::new(),
            announced: Selection::default(),
            remembered,
            kubernetes: kubernetes::View::default(),
            _prefix_sender: prefix_sender,
            announcements,
            commands,
            controller: ControllerView {
                reason: "not connected yet".into(),
                ..ControllerView::default()
            },
            published: Ok(Vec::new()),
            certificate_expires_at,
            pings: BTreeMap::new(),
            next_ping: 0,
            inputs: Inputs {
                faults,
                data_plane: data_plane_events,
                discovery: discovery_events,
                prefixes: prefix_updates,
                kubernetes,
            },
        })
    }

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
                Output::PeerTable(table) => self.peer_table(table),
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
    fn peer_table(&mut self, table: Arc<PeerTable>) {
        // A node that was removed from the mesh has no tunnels to its nodes.
        let table = if self.removed { Arc::new(self.static_only(&table)) } else { table };
        self.probe_keys.follow(&self.keys.wireguard, table.peers.keys());
        self.data_plane.apply(&table);
        self.relay.retain(|node| table.peers.contains_key(node));
        self.table = table;
    }

    /// Returns the table without the nodes of the mesh.
    fn static_only(&self, table: &PeerTable) -> PeerTable {
        let keys: BTreeSet<_> = self.config.peers.iter().map(|peer| peer.public_key).collect();
        let mut table = table.clone();
        table.peers.retain(|key, _| keys.contains(key));
        table
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
        self.data_plane.apply(&self.table);
        self.host.restore();
        let now = Instant::now();
        for peer in self.table.peers.keys() {
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
                for change in changes {
                    if let (MapChange::Mesh(mesh), Some(membership)) =
                        (&change, &mut self.membership)
                    {
                        membership.mesh = mesh.clone();
                    }
                    self.mesh.handle_map_change(now, change);
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
            discovery::Event::Removed => {
                if !std::mem::replace(&mut self.removed, true) {
                    tracing::error!("this node was removed from the mesh: run `towline leave`");
                    self.peer_table(self.table.clone());
                }
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

    async fn control_request(&mut self, request: Request, notifier: &Notifier) -> Option<Exit> {
        match request {
            Request::Status(reply) => {
                self.host.read_gateways();
                self.host.look_for_redirects();
                let _ = reply.send(self.status());
            }
            Request::Peers(reply) => {
                let _ = reply.send(self.peers());
            }
            Request::Ping { node, timeout, reply } => self.ping(&node, timeout, reply),
            Request::Down(reply) => {
                let result = self.down();
                let exit = if result.is_ok() { Exit::Down } else { Exit::Standby };
                let _ = reply.send(result);
                return Some(exit);
            }
            Request::Leave { force, reply } => {
                let result = with_heartbeat(notifier, self.leave(force)).await;
                let ended = result.is_ok();
                let _ = reply.send(result);
                if ended {
                    return Some(Exit::Left);
                }
            }
            Request::Up(reply) => {
                let _ = reply.send(Ok(true));
            }
            Request::Confirm(reply) => {
                let _ = reply.send(self.state.confirm().map_err(|error| error.to_string()));
            }
        }
        None
    }

    fn ping(&mut self, node: &str, timeout: Duration, reply: oneshot::Sender<PingAnswer>) {
        let named = |status: &mesh::PeerStatus| {
            status.node.name().as_str() == node
                || status.node.grant().overlay.iter().any(|ip| ip.to_string() == node)
        };
        let Some(peer) = self.mesh.peers().find(named) else {
            if self.mesh.static_peers().any(|peer| peer.name == node) {
                let why = "static peers do not answer probes: run `towline peers`";
                let _ = reply.send(PingAnswer::Silence(why.into()));
                return;
            }
            let _ = reply.send(PingAnswer::UnknownNode);
            return;
        };
        if peer.path.is_none() {
            let _ = reply.send(PingAnswer::Silence(if peer.reason.is_empty() {
                "no path yet".into()
            } else {
                peer.reason
            }));
            return;
        }
        let id = self.next_ping;
        self.next_ping += 1;
        self.pings.insert(id, reply);
        self.mesh.ping(Instant::now(), peer.node.id(), id, timeout);
    }

    fn ping_result(&mut self, id: u64, answer: Option<(path::Path, Duration)>) {
        let Some(reply) = self.pings.remove(&id) else { return };
        let _ = reply.send(match answer {
            Some((path, rtt)) => {
                PingAnswer::Answer { path_kind: path_kind(&path), path: path.remote, rtt }
            }
            None => PingAnswer::Silence("no answer in time".into()),
        });
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

/// Waits until `time`, or forever if there is none.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Opens the TUN and UDP devices for `purpose`, and starts the data plane with them.
fn start_data_plane(
    config: &Config,
    keys: &Keys,
    relay: Relay,
    host_tunnels: &HostTunnels,
    purpose: Purpose,
) -> anyhow::Result<(DataPlane, mpsc::Receiver<dataplane::Event>)> {
    let (port, mark, offloads) = (config.wireguard.port, config.routing.mark, config.offloads);
    let (events, receiver) = mpsc::channel(1024);
    let settings =
        dataplane::Config { private_key: keys.wireguard.secret().clone(), relay, link: None };
    let data_plane = match purpose {
        Purpose::Node => {
            let queues = tun_owner::open(&config.link.name, offloads, config.wireguard.workers)?;
            let sockets = dataplane::open_udp_group(port, mark, offloads, queues.len())
                .map_err(reserved_port::not_opened)?;
            let queues = queues.into_iter().map(|tun| tun.with_host_tunnels(host_tunnels.clone()));
            let link = nix::net::if_::if_nametoindex(config.link.name.as_str()).ok();
            let settings = dataplane::Config { link, ..settings };
            DataPlane::start(settings, queues.zip(sockets), events)
        }
        Purpose::Relay => {
            let udp = dataplane::open_udp_with(port, mark, offloads)
                .map_err(reserved_port::not_opened)?;
            DataPlane::start(settings, [(dataplane::NoTun::new()?, udp)], events)
        }
    };
    Ok((data_plane.context("cannot start the data plane")?, receiver))
}

/// Returns the kind of a path for command-line output.
fn path_kind(path: &path::Path) -> &'static str {
    if path.is_relayed() { "relay" } else { "direct" }
}

/// Returns the configuration of the core, which does not change while the agent runs.
pub(crate) fn core_config(
    config: &Config,
    membership: Option<&Membership>,
    boot_epoch: u64,
) -> mesh::Config {
    mesh::Config {
        membership: membership.map(|membership| mesh::Membership {
            grant: membership.grant.clone(),
            mesh: membership.mesh.clone(),
        }),
        link: config.link.name.clone(),
        mtu: config.link.mtu,
        table: config.routing.table,
        rules: config.rules(),
        firewall_table: config.routing.nftables_table.clone(),
        relay: config.relay.enabled,
        boot_epoch,
    }
}

/// Returns the wall-clock time in milliseconds since 1970.
fn unix_millis() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or_default()
}

/// Returns whether an agent accepts connections on `socket`.
pub fn is_running(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}
