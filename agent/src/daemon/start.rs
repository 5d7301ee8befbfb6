//! The start of the daemon: reads the state directory, opens the UDP port and the TUN, and starts the
//! parts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rand::Rng as _;
use tokio::sync::{mpsc, watch};
use towline_core::local_limits::{HostAddresses, LocalLimits};
use towline_core::mesh::{self, Mesh};
use towline_core::plan::UnderlayPlan;
use towline_core::static_peers::StaticPeer;
use towline_proto::code::Coded as _;
use towline_proto::node::MeshConfig;
use towline_proto::token::ControllerAddress;

use super::announcer::Announcer;
use super::controller_link::ControllerLink;
use super::firewall_search::FirewallSearch;
use super::host_controller::HostController;
use super::kubernetes_node::KubernetesNode;
use super::map_age::MapAge;
use super::observer::Observer;
use super::prober::Prober;
use super::summary::SummarySchedule;
use super::tunnels::Tunnels;
use super::{Daemon, Purpose, report};
use crate::config::Config;
use crate::discovery::{self, Announcement, Discovery};
use crate::events::Event;
use crate::map_cache::MapCache;
use crate::state::{CachedPrefixes, Counters, Keys, Membership, StateDir};
#[cfg(feature = "otel")]
use crate::telemetry;
use crate::{host_addresses, join, kubernetes, reserved_port, static_peers};

/// State that a start reads from the state directory.
pub(super) struct Stored {
    static_peers: Vec<StaticPeer>,
    /// Membership of this node. `None`: there is no mesh, only static peers.
    membership: Option<Membership>,
    keys: Keys,
    counters: Counters,
    map: Option<MapCache>,
    at_join: AtJoin,
}

/// Surroundings of this machine when it joined, as of the agent's start. They are not read again: a file that could
/// not be written has no content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AtJoin {
    /// Networks to which the machine was connected.
    pub(super) networks: Vec<IpNet>,
    /// Addresses that the machine needed.
    addresses: HostAddresses,
}

impl AtJoin {
    /// Reads the stored surroundings. If an earlier version joined, the addresses are the `present` ones from now on.
    /// Without a mesh there are none.
    fn read(
        state: &StateDir,
        mesh: Option<&MeshConfig>,
        present: impl FnOnce(&MeshConfig) -> HostAddresses,
    ) -> Self {
        let networks = state.connected_networks();
        let Some(mesh) = mesh else {
            return Self { networks, addresses: HostAddresses::default() };
        };
        let addresses = state.host_addresses().unwrap_or_else(|| {
            let found = present(mesh);
            if let Err(error) = state.store_host_addresses(found.clone()) {
                tracing::warn!(%error, "addresses of this machine not stored");
            }
            found
        });
        Self { networks, addresses }
    }

    /// Returns the limits of this machine, for this list of controllers.
    pub(super) fn limits(&self, config: &Config, controllers: &[ControllerAddress]) -> LocalLimits {
        config.local_limits(self.networks.clone(), self.addresses.clone(), controllers)
    }
}

impl Stored {
    /// Reads the state and counts the start.
    pub(super) fn read(config: &Config, state: &StateDir) -> anyhow::Result<Self> {
        let static_peers = static_peers::load(&config.peers)?;
        let mut membership = match state.membership()? {
            None if !static_peers.is_empty() => None,
            _ => Some(state.require_membership()?),
        };
        // A machine with static peers and no mesh needs a key too.
        let keys = if membership.is_some() { state.keys()? } else { state.keys_or_generate()? };
        let counters = state.start(unix_millis())?;
        let map = membership.as_ref().map(|membership| state.map(membership)).transpose()?;
        if let (Some(membership), Some(map)) = (&mut membership, &map) {
            membership.update(map);
        }
        let mesh = membership.as_ref().map(|membership| &membership.mesh);
        let at_join = AtJoin::read(state, mesh, host_addresses::read);
        Ok(Self { static_peers, membership, keys, counters, map, at_join })
    }

    /// Returns the mesh that the state describes.
    fn mesh(&self, config: &Config, cached: &CachedPrefixes, now: Instant) -> Mesh {
        let core_config = core_config(config, self.membership.as_ref(), self.counters.boot_epoch);
        let mut mesh = Mesh::new(core_config, rand::rng().random(), now);
        mesh.set_underlay(now, underlay(config, &self.controllers(config)));
        configure(&mut mesh, now, config, self.at_join.networks.clone());
        mesh.set_local_limits(now, self.at_join.limits(config, &self.controllers(config)));
        mesh.set_static_peers(now, self.static_peers.clone());
        cached.restore_withdrawn(&mut mesh, now);
        for change in self.map.iter().flat_map(MapCache::changes) {
            mesh.handle_map_change(now, change);
        }
        mesh
    }

    /// Starts the discovery client, if this node is in a mesh.
    fn discovery(
        self,
        config: &Config,
        state: &Arc<StateDir>,
        announced: watch::Receiver<Option<Announcement>>,
    ) -> anyhow::Result<ControllerLink> {
        let (events, discovery_events) = mpsc::channel(64);
        let revision = self.map.as_ref().map_or(0, |map| map.position().1);
        let (configured, seen) = watch::channel(config.controller.addresses.clone());
        let controllers = self.controllers(config);
        let commands = match (self.membership, self.map) {
            (Some(membership), Some(map)) => {
                let (commands, queue) = mpsc::channel(64);
                let setup = discovery::Setup {
                    state: state.clone(),
                    keys: self.keys,
                    configured: seen,
                    membership,
                    mark: config.routing.mark,
                    map,
                    counters: self.counters,
                };
                tokio::spawn(Discovery::new(setup, events)?.run(announced, queue));
                Some(commands)
            }
            _ => None,
        };
        let expires_at = report::certificate_expires_at(state);
        Ok(ControllerLink::new(
            commands,
            configured,
            controllers,
            discovery_events,
            revision,
            expires_at,
        ))
    }

    /// Returns the addresses of the controllers.
    fn controllers(&self, config: &Config) -> Vec<ControllerAddress> {
        let membership = self.membership.as_ref();
        membership.map_or_else(Vec::new, |membership| {
            join::controllers(&config.controller.addresses, membership)
        })
    }
}

impl Daemon {
    /// Opens the UDP port and the TUN device, and starts the parts.
    pub(super) fn start(
        config: Config,
        config_path: Option<PathBuf>,
        purpose: Purpose,
        state: Arc<StateDir>,
        stored: Stored,
    ) -> anyhow::Result<Self> {
        let now = Instant::now();
        let host = HostController::open(&config, purpose)?;
        // An agent without the permission relies on its unit, which reserved the port before the
        // start.
        if let Err(error) = reserved_port::reserve(config.wireguard.port) {
            tracing::debug!(%error, "UDP port not reserved");
        }
        let prober = Prober::new(stored.keys.wireguard.clone(), stored.counters.boot_epoch);
        let probes = prober.handle_for_data_plane();
        let tunnels = Tunnels::start(&config, prober.own_key(), probes, purpose)?;
        let cached = state.prefixes()?;
        let observer = Observer::new(now, stored.counters.boot_epoch);

        let mesh = stored.mesh(&config, &cached, now);
        let is_relay = mesh.relay().is_some();
        let (announcer, announced) = Announcer::new(state.clone(), cached, &config, is_relay);
        tokio::spawn(save_again(state.clone()));
        tracing::info!(
            event = Event::AgentStarted.code(),
            node = mesh.grant().map(|grant| tracing::field::display(&grant.name)),
            mesh = mesh.grant().map(|grant| tracing::field::display(&grant.mesh_id)),
            static_peers = config.peers.len(),
            port = config.wireguard.port,
            link = %config.link.name,
            version = towline_proto::VERSION,
            "agent started"
        );
        #[cfg(feature = "otel")]
        let trace = {
            // No map was stored yet.
            let is_first = stored.map.as_ref().is_some_and(|map| map.position().1 == 0);
            let started = std::time::SystemTime::now();
            telemetry::start_trace(&config.telemetry, mesh.grant(), is_first, started)
        };
        let at_join = stored.at_join.clone();
        let map_age = MapAge::new(now, config.max_map_age(), state.confirmation());
        let controller = stored.discovery(&config, &state, announced)?;
        let kubernetes = KubernetesNode::new(kubernetes::start(kubernetes::Setup {
            config: config.kubernetes.clone(),
            mesh: mesh.grant().map(|grant| grant.mesh_id),
            link: config.link.name.clone(),
            mtu: config.link.mtu,
            state: state.clone(),
            credentials_period: kubernetes::CREDENTIALS_PERIOD,
        }));
        Ok(Self {
            config,
            config_path,
            purpose,
            state,
            at_join,
            started: now,
            mesh,
            tunnels,
            host,
            announcer,
            controller,
            map_age,
            kubernetes,
            firewalls: FirewallSearch::new(now),
            prober,
            observer,
            summaries: SummarySchedule::default(),
            leaving: None,
            wireguard_socket: None,
            api_endpoint: None,
            #[cfg(feature = "otel")]
            trace,
        })
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

/// Returns what must bypass the tunnel of an agent that runs as this process's user.
pub(super) fn underlay(config: &Config, controllers: &[ControllerAddress]) -> UnderlayPlan {
    let owner = nix::unistd::geteuid().as_raw();
    UnderlayPlan { owner, ..config.underlay(controllers) }
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
        relay: config.relay_limits(),
        boot_epoch,
    }
}

/// Passes on what `[node]` of the configuration says about this machine's traffic. `joined` has the
/// networks to which the machine was connected when it joined.
pub(crate) fn configure(mesh: &mut Mesh, now: Instant, config: &Config, joined: Vec<IpNet>) {
    mesh.set_addresses(now, config.node.addresses.clone());
    mesh.set_forward_to(now, config.node.forward_to.clone());
    mesh.set_masquerade(now, config.node.masquerade_local);
    mesh.set_local_networks(now, config.local_networks(joined));
}

/// Returns the wall-clock time in milliseconds since 1970.
fn unix_millis() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use towline_fixtures::node::mesh_config;

    use super::*;

    #[test]
    fn addresses_that_cannot_be_stored_still_limit_what_the_mesh_may_cover() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(directory.path()).unwrap();
        // A file that can neither be read nor replaced.
        std::fs::create_dir(directory.path().join("host.json")).unwrap();
        let gateways = ["192.0.2.1".parse().unwrap()].into();
        let present = HostAddresses { gateways, ..HostAddresses::default() };
        let at_join = AtJoin::read(&state, Some(&mesh_config()), |_| present.clone());
        assert_eq!(state.host_addresses(), None, "nothing is on the disk");
        assert_eq!(at_join.limits(&Config::default(), &[]).host, present);
    }

    #[test]
    fn addresses_of_the_join_are_kept_and_the_present_ones_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(directory.path()).unwrap();
        let first = |_: &MeshConfig| HostAddresses {
            uplinks: ["192.0.2.7".parse().unwrap()].into(),
            ..HostAddresses::default()
        };
        let at_join = AtJoin::read(&state, Some(&mesh_config()), first);
        let again = AtJoin::read(&state, Some(&mesh_config()), |_| unreachable!("stored"));
        assert_eq!(again, at_join);
    }
}
