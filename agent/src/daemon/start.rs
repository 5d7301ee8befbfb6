//! The start of the daemon: reads the state directory, opens the UDP port and the TUN, and starts the
//! parts.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use rand::Rng as _;
use tokio::sync::{mpsc, watch};
use towline_core::mesh::{self, Mesh};
use towline_core::static_peers::StaticPeer;
use towline_dataplane::{self as dataplane, DataPlane, HostTunnels, Relay};

use super::host::Host;
use super::{ControllerView, Daemon, Inputs, Purpose, announced_prefixes, report, save_again};
use crate::config::Config;
use crate::discovery::{self, Discovery};
use crate::map_cache::MapCache;
use crate::prefixes::{Prefixes, Selection};
use crate::probe::ProbeKeys;
use crate::state::{Counters, Keys, Membership, StateDir};
use crate::{join, kubernetes, reserved_port, static_peers, tun_owner};

/// State that a start reads from the state directory.
pub(super) struct Stored {
    static_peers: Vec<StaticPeer>,
    /// Membership of this node. `None`: there is no mesh, only static peers.
    membership: Option<Membership>,
    keys: Keys,
    counters: Counters,
    map: Option<MapCache>,
}

impl Stored {
    /// Reads the state and counts the start.
    pub(super) fn read(config: &Config, state: &StateDir) -> anyhow::Result<Self> {
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

impl Daemon {
    /// Opens the UDP port and the TUN device, and starts the parts.
    pub(super) fn start(
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
            probe_keys: ProbeKeys::default(),
            relay,
            relay_swept: now,
            purpose,
            host,
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
}

/// Opens the TUN and UDP devices for `purpose`, and starts the data plane with them.
pub(super) fn start_data_plane(
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
