//! Installs both guards before the network is up and before any agent runs (`towline guard`), from
//! what the last run stored on the disk.
//!
//! The plan is the one that an agent would apply first: the core gets the membership, the cached
//! map and the prefixes that this node announced, and no peer is up. No controller is asked.

mod watch;

use std::collections::BTreeSet;
use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::time::Instant;

use anyhow::Context as _;
use ipnet::IpNet;
use towline_core::mesh::{Mesh, Output};
use towline_core::plan::{Plan, RouteVia, TransitPlan};

use crate::config::Config;
use crate::confirm::{self, Confirmation, Moment};
use crate::daemon;
use crate::down::DownMarker;
use crate::join;
use crate::map_cache::MapCache;
use crate::state::{CachedPrefixes, Membership, StateDir, StateError};
use crate::static_peers::{self, PeerConfig};
use crate::tun_owner;
use towline_host::{CandidatePolicy, Changes, HostNetwork, Problem};

pub use watch::watch;

/// Result of installing the guards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guarded {
    /// There is nothing to guard: the machine has not joined a mesh and has no static peer.
    NotJoined,
    /// An agent runs and keeps the guards itself.
    AgentRuns,
    /// `towline down` opened the machine, until `towline up`.
    Down,
    /// The join was not confirmed in time; the agent undoes it.
    Unconfirmed,
    /// The guards are installed.
    Installed {
        /// Number of guarded networks.
        networks: usize,
        /// Number of changes that were applied. It is at most 1 (adopting the nftables table) if
        /// the guards were installed before.
        changes: usize,
        /// True if no guard was refused. On a kernel without nftables the routes are the only
        /// guard.
        is_whole: bool,
        /// Deviations from the plan and particularities of this host, one line each.
        problems: Vec<String>,
    },
}

/// Installs the guards. Repeating it changes nothing but the owner of the nftables table.
pub fn run(config: &Config) -> anyhow::Result<Guarded> {
    let state = match enter(config)? {
        Ok(state) => state,
        Err(reason) => return Ok(reason),
    };
    let mut network = HostNetwork::open().context("cannot open a netlink socket")?;
    let plan = Prepared::read(config, &state, &mut network, Extent::Whole)?.plan;
    let applied = network.apply(&plan).context("not all guards are installed")?;
    Ok(outcome(config, &plan, &applied))
}

/// Opens the state directory for reading while no agent runs. Otherwise returns which program keeps
/// the guards, or why there are none. Only reads: the disk may be full or read-only.
fn enter(config: &Config) -> anyhow::Result<Result<StateDir, Guarded>> {
    let membership = config.state_dir.join("membership.json");
    // A directory that cannot be read may hold a membership: that is a fault, not "nothing to
    // guard".
    let has_joined = membership
        .try_exists()
        .with_context(|| format!("cannot look for {}", membership.display()))?;
    if !has_joined && config.peers.is_empty() {
        return Ok(Err(Guarded::NotJoined));
    }
    let state = match StateDir::open_shared(&config.state_dir) {
        Ok(state) => state,
        Err(StateError::Locked { .. }) => return Ok(Err(Guarded::AgentRuns)),
        Err(error) => return Err(error.into()),
    };
    // This is read after the lock is taken: see `down.rs` for the order.
    if DownMarker::of(config).read().is_some() {
        return Ok(Err(Guarded::Down));
    }
    if confirm::status(&config.state_dir, &Moment::now()) == Confirmation::Missed {
        return Ok(Err(Guarded::Unconfirmed));
    }
    // An old agent may not lock the directory.
    if daemon::is_running(&config.socket) {
        return Ok(Err(Guarded::AgentRuns));
    }
    Ok(Ok(state))
}

/// Returns the result of an apply, without the problems that are expected without an agent.
fn outcome(config: &Config, plan: &Plan, applied: &Changes) -> Guarded {
    // The link is missing until the agent creates it.
    let unexpected = |problem: &&Problem| !matches!(problem, Problem::LinkMissing(_));
    let problems: Vec<_> = applied.problems.iter().filter(unexpected).collect();
    Guarded::Installed {
        networks: plan.routes.keys().filter(|(_, via)| *via == RouteVia::Unreachable).count(),
        changes: applied.messages,
        is_whole: !problems.iter().any(|problem| problem.is_blocking()),
        problems: problems.iter().map(ToString::to_string).chain(own_link(config)).collect(),
    }
}

impl fmt::Display for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotJoined => {
                f.write_str("nothing is guarded: this machine has not joined a mesh")
            }
            Self::AgentRuns => f.write_str("an agent runs: it keeps the guards"),
            Self::Down => f.write_str("nothing is guarded: this machine is down: run `towline up`"),
            Self::Unconfirmed => f.write_str(
                "nothing is guarded: the join was not confirmed in time, and the agent undoes it",
            ),
            Self::Installed { is_whole, networks, problems, .. } => {
                if *is_whole {
                    write!(f, "{networks} networks are guarded")?;
                } else {
                    f.write_str("a guard is not installed")?;
                }
                problems.iter().try_for_each(|problem| write!(f, "; {problem}"))
            }
        }
    }
}

/// Returns the networks that an agent would reach only through the tunnel, from what is stored on
/// the disk.
pub fn networks(config: &Config) -> anyhow::Result<Vec<IpNet>> {
    let mut network = HostNetwork::open().context("cannot open a netlink socket")?;
    let state = StateDir::peek(&config.state_dir);
    let prepared = Prepared::read(config, &state, &mut network, Extent::Whole)?;
    Ok(prepared.plan.tunnelled().into_iter().collect())
}

/// Restricts a TUN link of an earlier run to the agent's user, which is the owner of the state
/// directory. Returns a problem if that fails.
fn own_link(config: &Config) -> Option<String> {
    let owner = std::fs::metadata(&config.state_dir).map(|state| state.uid());
    let secured =
        owner.map_err(Into::into).and_then(|owner| tun_owner::secure(&config.link.name, owner));
    let link = &config.link.name;
    let error = secured.err()?;
    Some(format!("cannot give the link {link} to the agent's user: {error:#}"))
}

/// How much a plan is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// Everything that is stored, and the networks around this machine.
    Whole,
    /// The membership and the configuration, and of the rest what can be read: at least the mesh's own ranges
    /// and those of the static peers.
    Ranges,
}

impl Extent {
    /// Returns a part of what the plan is made from. The ranges are guarded without it, too.
    fn part<T: Default, E>(self, read: Result<T, E>) -> Result<T, E> {
        match self {
            Self::Whole => read,
            Self::Ranges => Ok(read.unwrap_or_default()),
        }
    }
}

/// Networks around this machine, which the plan depends on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Surroundings {
    /// Networks to which the machine is connected.
    connected: BTreeSet<IpNet>,
    /// Networks of this host's links, for other nodes whose router it is.
    transit: TransitPlan,
}

impl Surroundings {
    /// Reads them from the kernel.
    fn read(network: &mut HostNetwork, policy: &CandidatePolicy) -> anyhow::Result<Self> {
        let connected = network
            .link_networks(&policy.own_link)
            .context("cannot read the machine's addresses")?;
        // Nodes behind this host need it as a router, but a failure must not prevent the guards.
        let transit =
            network.connectivity(policy, 0).map(|found| found.transit).unwrap_or_default();
        Ok(Self { connected, transit })
    }
}

/// The plan that an agent would apply first, and what it was made from.
struct Prepared {
    plan: Plan,
    surroundings: Surroundings,
    /// Networks that are no networks of links: the overlay's and this node's pods.
    policy: CandidatePolicy,
}

impl Prepared {
    /// Makes the plan from what is stored and from the networks around this machine.
    fn read(
        config: &Config,
        state: &StateDir,
        network: &mut HostNetwork,
        extent: Extent,
    ) -> anyhow::Result<Self> {
        let membership = state.membership()?;
        let cached = extent.part(state.prefixes())?;
        // The daemon leaves out the same networks.
        let mut excluded = cached.pods.clone();
        excluded.extend(membership.iter().flat_map(|membership| membership.mesh.overlays()));
        let policy = CandidatePolicy { own_link: config.link.name.clone(), excluded };
        let surroundings = Surroundings::read(network, &policy);
        // Where the machine's own networks are not known, a network of the map could close one of them.
        let map = match membership.as_ref().filter(|_| surroundings.is_ok()) {
            Some(membership) => extent.part(state.map(membership).map(Some))?,
            None => None,
        };
        let surroundings = extent.part(surroundings)?;
        let plan = plan(config, state, membership.as_ref(), cached, &surroundings, map.as_ref())?;
        Ok(Self { plan, surroundings, policy })
    }
}

/// Returns the plan for a machine with this membership and these networks around it.
fn plan(
    config: &Config,
    state: &StateDir,
    membership: Option<&Membership>,
    cached: CachedPrefixes,
    surroundings: &Surroundings,
    map: Option<&MapCache>,
) -> anyhow::Result<Plan> {
    // The time is read once; no deadline of this plan is due.
    let now = Instant::now();
    // The seed is constant, because no probe is sent.
    let mut mesh = Mesh::new(daemon::core_config(config, membership, 0), [0; 32], now);
    // No tunnel is built here, so the guards do not depend on secrets that cannot be read.
    let without_secret =
        |peer: &PeerConfig| PeerConfig { preshared_key_file: None, ..peer.clone() };
    let peers: Vec<PeerConfig> = config.peers.iter().map(without_secret).collect();
    mesh.set_static_peers(now, static_peers::load(&peers)?);
    daemon::configure(&mut mesh, now, config, state.connected_networks());
    mesh.set_connected_networks(now, surroundings.connected.clone());
    mesh.set_transit(now, surroundings.transit.clone());
    cached.restore_withdrawn(&mut mesh, now);
    mesh.set_prefixes(now, cached.announced);
    mesh.set_pod_networks(now, cached.pods);
    mesh.set_node_ips(now, cached.node_ips);
    if let Some(membership) = membership {
        let controllers = join::controllers(&config.controller.addresses, membership);
        mesh.set_underlay(now, config.underlay(&controllers));
        let host = state.host_addresses().unwrap_or_default();
        let joined = state.connected_networks();
        mesh.set_local_limits(now, config.local_limits(joined, host, &controllers));
        for change in map.map(MapCache::changes).unwrap_or_default() {
            mesh.handle_map_change(now, change);
        }
    } else {
        mesh.set_underlay(now, config.underlay(&[]));
    }
    let mut plan = None;
    while let Some(output) = mesh.poll_output() {
        if let Output::Plan(wanted) = output {
            plan = Some(wanted);
        }
    }
    plan.map(|plan| (*plan).clone()).context("the core returned no plan")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{Ipv4Addr, UdpSocket};
    use std::path::Path;

    use towline_fixtures::ca::Ca;
    use towline_fixtures::node::{grant, mesh_config, net, node};
    use towline_proto::node::{Grant, MeshConfig};
    use towline_proto::pb;
    use towline_proto::signed::Domain;

    use super::*;
    use crate::config::Addressing;
    use crate::node_ip;
    use towline_netlink::{AddressOptions, Route, Rtnetlink};
    use towline_netns::{add_link, add_unowned_tun, namespace_test};
    use towline_nftables::{Nft, Table, TableFamily};

    /// State of node 1 after a run: node 2 announces 172.20.0.0/16, and another node formerly
    /// announced 172.21.0.0/16.
    pub(super) fn state_of_a_node(dir: &Path) {
        let ca = Ca::new(7);
        let state = StateDir::open(dir).unwrap();
        let keys = state.keys_or_generate().unwrap();
        let mesh = MeshConfig { protected: vec![net("10.0.0.0/8")], ..mesh_config() };
        let mesh = ca.sign(Domain::Mesh, &pb::MeshConfig::from(&mesh));
        let grant = Grant {
            identity_key: keys.identity.public(),
            wireguard_keys: vec![keys.wireguard.public()],
            ..grant(1)
        };
        let membership =
            Membership::new(ca.certificate(), Vec::new(), ca.grant(&grant), mesh).unwrap();
        state.store_membership(&membership).unwrap();

        let entry = ca.entry(node(2).prefixes(&["172.20.0.0/16"]));
        let mut map = MapCache::new(membership.ca_key, membership.grant.node_id);
        let upsert = pb::change::Kind::Upsert(entry);
        assert_eq!(map.apply(pb::Changes::of([upsert], 1)).refused, [""; 0]);
        state.store_map(&map.encode()).unwrap();
        state
            .store_prefixes(&CachedPrefixes {
                announced: vec!["10.244.1.0/24".parse().unwrap()],
                pods: Vec::new(),
                node_ips: Vec::new(),
                withdrawn: vec!["172.21.0.0/16".parse().unwrap()],
                withdrawn_lans: Vec::new(),
                withdrawn_by_node: BTreeMap::new(),
            })
            .unwrap();
    }

    pub(super) fn host() {
        let uplink = add_link("eth0");
        let mut rtnetlink = Rtnetlink::open().unwrap();
        let options = AddressOptions { no_dad: true, no_prefix_route: false };
        rtnetlink.add_address(uplink, "192.0.2.1/24".parse().unwrap(), options).unwrap();
        let gateway = "192.0.2.254".parse().unwrap();
        let default = Route::new("0.0.0.0/0".parse().unwrap()).via(gateway).dev(uplink);
        rtnetlink.add_route(&default).unwrap();
    }

    pub(super) fn leaves(to: &str) -> bool {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.send_to(b"clear", (to, 9)).is_ok()
    }

    namespace_test! {
        fn the_guards_stand_before_the_agent_from_what_is_on_the_disk() {
            let dir = tempfile::tempdir().unwrap();
            let config = Config { state_dir: dir.path().join("state"), ..Config::default() };
            assert_eq!(run(&config).unwrap(), Guarded::NotJoined);
            assert!(!config.state_dir.exists(), "nothing is created");

            state_of_a_node(&config.state_dir);
            // The loopback link may still be down this early in the boot.
            let Guarded::Installed { networks, changes, problems, .. } = run(&config).unwrap() else {
                panic!("the guards are installed");
            };
            assert_eq!(problems, [""; 0]);
            assert!(networks > 4 && changes > networks);
            assert!(matches!(run(&config).unwrap(), Guarded::Installed { changes: ..=1, .. }));

            host();
            for to in ["198.19.0.2", "172.20.0.1", "172.21.0.1", "10.1.2.3"] {
                assert!(!leaves(to), "{to}");
            }
            for to in ["10.244.1.7", "172.22.0.1", "203.0.113.1"] {
                assert!(leaves(to), "{to}");
            }

            // A damaged map does not remove the mesh's own ranges from the guards.
            std::fs::write(config.state_dir.join("map.bin"), b"no map").unwrap();
            std::fs::write(config.state_dir.join("prefixes.json"), b"{").unwrap();
            run(&config).unwrap();
            assert!(!leaves("198.19.0.2") && !leaves("10.1.2.3"));

            // From now on only the agent's user may attach to a link that an earlier version
            // created.
            if add_unowned_tun(&config.link.name) {
                let owner = || {
                    let mut links = Rtnetlink::open().unwrap();
                    links.link(&config.link.name).unwrap().unwrap().tun.unwrap().owner
                };
                assert_eq!(owner(), None);
                run(&config).unwrap();
                assert_eq!(owner(), Some(nix::unistd::geteuid().as_raw()));
            }

            let _agent = StateDir::open(&config.state_dir).unwrap();
            assert_eq!(run(&config).unwrap(), Guarded::AgentRuns);
        }
    }

    namespace_test! {
        fn a_table_of_another_program_keeps_the_guard_from_success_but_not_the_routes_from_guarding() {
            let dir = tempfile::tempdir().unwrap();
            let config = Config { state_dir: dir.path().into(), ..Config::default() };
            state_of_a_node(&config.state_dir);
            host();
            let table = Table::new(TableFamily::Inet, &config.routing.nftables_table);
            Nft::open().unwrap().load(&table).unwrap();
            assert!(leaves("198.19.0.2") && leaves("172.20.0.1"));
            let error = format!("{:#}", run(&config).unwrap_err());
            assert!(error.contains("cannot use the nftables table inet towline"), "{error}");
            for to in ["198.19.0.2", "172.20.0.1", "172.21.0.1", "10.1.2.3"] {
                assert!(!leaves(to), "{to}");
            }
            assert!(leaves("203.0.113.1"));
        }
    }

    namespace_test! {
        fn a_machine_that_is_down_is_not_guarded_until_it_is_up() {
            let dir = tempfile::tempdir().unwrap();
            let config = Config { state_dir: dir.path().into(), ..Config::default() };
            state_of_a_node(&config.state_dir);
            host();
            let marker = config.state_dir.join("down");
            // The marker is the existence of the file; its content does not matter.
            for content in ["{\"since\":1}", ""] {
                std::fs::write(&marker, content).unwrap();
                assert_eq!(run(&config).unwrap(), Guarded::Down);
                assert!(leaves("198.19.0.2"));
            }
            std::fs::remove_file(&marker).unwrap();
            assert!(matches!(run(&config).unwrap(), Guarded::Installed { .. }));
            assert!(!leaves("198.19.0.2"));
        }
    }

    namespace_test! {
        fn the_node_ip_is_known_without_an_agent() {
            let dir = tempfile::tempdir().unwrap();
            let mut config = Config { state_dir: dir.path().into(), ..Config::default() };
            assert!(node_ip::in_force(&config).unwrap_err().to_string().contains("towline join"));
            state_of_a_node(dir.path());
            let shown = |config: &Config| -> Vec<String> {
                node_ip::in_force(config).unwrap().iter().map(|ip| ip.to_string()).collect()
            };
            assert_eq!(shown(&config), ["198.19.0.1", "fd00:7::1"]);

            config.node.addressing = Addressing::NodeIp;
            let none = node_ip::in_force(&config).unwrap_err().to_string();
            assert!(none.contains("node.node_ips"), "{none}");
            // The other link has a lower address, but does not lead to the internet.
            let lan = add_link("lan0");
            let mut rtnetlink = Rtnetlink::open().unwrap();
            let options = AddressOptions::default();
            rtnetlink.add_address(lan, "10.0.0.1/24".parse().unwrap(), options).unwrap();
            host();
            assert_eq!(shown(&config), ["192.0.2.1"]);
            config.node.node_ips = vec!["203.0.113.5".parse().unwrap()];
            assert_eq!(shown(&config), ["203.0.113.5"]);
        }
    }
}
