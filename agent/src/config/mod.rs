//! Configuration of the agent: a TOML file that is parsed completely before anything is opened.
//!
//! Every field has a default, so an empty or absent file is a working configuration. An unknown key
//! is an error that names the key. Flags and environment variables take precedence over the file;
//! see `cli`.

mod metrics;
mod seal_ahead;
#[cfg(test)]
mod tests;
mod wireguard;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use towline_core::local_limits::{HostAddresses, InClear, LocalLimits};
use towline_core::local_networks::LocalNetworks;
use towline_core::mesh::RelayLimits;
use towline_core::own_networks::is_special;
use towline_core::plan::{RulePlan, UnderlayPlan};
use towline_core::prefixes::is_host;
use towline_proto::limits;
use towline_proto::mtu::Mtu;
use towline_proto::node::{Candidate, CandidateKind};
use towline_proto::token::ControllerAddress;

use crate::prefixes::Filter;
use crate::static_peers::{self, PeerConfig};
use crate::telemetry::{self, TelemetryConfig};
pub use seal_ahead::SealAhead;
use towline_dataplane::Offloads;
use towline_host::Names;
use towline_service::config_file::{self, FileError};
use towline_service::log::LogConfig;

pub use metrics::{InvalidMetricsAddress, MetricsAddress, MetricsConfig};
pub use wireguard::{WireguardAead, WireguardConfig, WireguardEngine};

/// Default path of the configuration file.
pub const DEFAULT_PATH: &str = "/etc/towline/agent.toml";

/// Configuration of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// State directory, mode 0700: keys, membership, and the cached map. Created if it does not
    /// exist.
    pub state_dir: PathBuf,
    /// Path of the Unix socket for the command line, mode 0600.
    pub socket: PathBuf,
    /// Addresses and networks of this node.
    pub node: NodeConfig,
    /// Settings of the UDP side of the tunnels.
    pub wireguard: WireguardConfig,
    /// Settings of the TUN link.
    pub link: LinkConfig,
    /// Numbers and names for routing and nftables.
    pub routing: RoutingConfig,
    /// Kernel offloads that may be used.
    pub offloads: Offloads,
    /// Addresses of the controllers.
    pub controller: ControllerConfig,
    /// Limits that neither a controller nor another node can override.
    pub trust: TrustConfig,
    /// Settings for Kubernetes.
    pub kubernetes: KubernetesConfig,
    /// WireGuard peers outside of a mesh, each in a `[[peer]]` section.
    #[serde(rename = "peer", skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerConfig>,
    /// Settings for relaying.
    pub relay: RelayConfig,
    /// Settings of the log.
    pub log: LogConfig,
    /// Settings of the metrics for Prometheus.
    pub metrics: MetricsConfig,
    /// Settings of the spans for OpenTelemetry.
    pub telemetry: TelemetryConfig,
}

/// Addresses and networks of this node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// Addresses, with port, at which other nodes can reach this node's UDP port: a public address
    /// that is on no interface, or a forwarded port.
    pub advertise: Vec<SocketAddr>,
    /// Additional addresses of the TUN link, for static peers.
    pub addresses: Vec<IpAddr>,
    /// Kind of address by which other nodes reach this one.
    pub addressing: Addressing,
    /// Addresses of the machine, at most one of each family, for `addressing = "node-ip"`. Empty:
    /// the addresses of the link that leads to the internet.
    pub node_ips: Vec<IpAddr>,
    /// Networks that are reached through this node. Its grant must allow them.
    pub prefixes: Vec<IpNet>,
    /// Networks to which packets from the tunnel may be forwarded even though they are not
    /// announced.
    pub forward_to: Vec<IpNet>,
    /// Networks of this machine, such as its LAN, that stay as they are, even if other nodes
    /// announce them. Those to which it was connected when it joined need not be listed.
    pub local_networks: Vec<IpNet>,
    /// True if packets of this machine that enter the tunnel with a source that is not this node's
    /// are translated to its address in the mesh. Needs conntrack.
    pub masquerade_local: bool,
    /// Only networks inside these are announced, for all sources. Empty: no restriction.
    pub include_prefixes: Vec<IpNet>,
    /// Networks that are never announced. They are cut out of larger networks.
    pub exclude_prefixes: Vec<IpNet>,
}

/// Kind of address by which other nodes reach a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Addressing {
    /// The overlay address, which overlaps with no other network.
    #[default]
    Overlay,
    /// The machine's own address, announced as a prefix and routed into the tunnel.
    NodeIp,
}

/// Settings of the TUN link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LinkConfig {
    /// Name of the interface, at most 15 bytes.
    pub name: String,
    /// MTU in bytes, 1,280 to 65,455. The default leaves room for the tunnel's 80 bytes in a packet
    /// of 1,500.
    pub mtu: Mtu,
    /// Queueing discipline of the link.
    pub queueing: LinkQueueing,
}

/// Queueing discipline of the TUN link. One that another program set, with `tc` for example, stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkQueueing {
    /// The kernel's `fq`, which paces senders with BBR at less cost than their own timers. The kernel's
    /// default where it has no `fq`, or with several workers.
    #[default]
    Fq,
    /// The kernel's default (`net.core.default_qdisc`).
    Default,
}

/// Numbers and names for routing and nftables. No other program may use the same ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoutingConfig {
    /// Routing table for Towline's routes. The next two tables are used too.
    pub table: u32,
    /// First of the nine consecutive priorities of Towline's policy rules, 1 to 32,757.
    pub priority: u32,
    /// Mark of the agent's own sockets, inside `mask`.
    pub mark: u32,
    /// Bits of the mark that Towline uses: those of `mark` and at least one more.
    pub mask: u32,
    /// TCP ports of this host that are reached outside the tunnel too, such as those of a
    /// Kubernetes API server or a Towline controller. Replies take the path of the request.
    pub plain_ports: Vec<u16>,
    /// Name of Towline's nftables table, of family inet.
    pub nftables_table: String,
}

/// Addresses of the controllers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControllerConfig {
    /// `host:port` of each controller. Replaces the addresses from the join token.
    #[serde(with = "addresses")]
    pub addresses: Vec<ControllerAddress>,
}

/// Limits that neither a controller nor another node can override.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrustConfig {
    /// Settings of the mesh that may let its traffic leave this node in clear. `trusted_sites`: to node
    /// IPs of a trusted site. `bypass_when_down`: to announced prefixes while the tunnel to their node is
    /// down, which anyone who can block UDP on the way can cause.
    pub allow_in_clear: Vec<ClearSetting>,
    /// Networks that are never guarded here, of which no other node may announce a part, and which this
    /// node does not announce. Without effect in the mesh's overlay.
    pub refused_networks: Vec<IpNet>,
    /// Networks that other nodes may announce although they contain a controller, or a gateway or DNS
    /// server that this machine had when it joined.
    pub accepted_networks: Vec<IpNet>,
    /// True if this machine must not be used as a node while its kernel cannot drop packets that come from
    /// outside the tunnel with a source of the mesh: the agent does not become ready, so the kubelet does not
    /// start, and `towline wait` fails. Otherwise `towline status` names the problem.
    pub require_inverse_guard: bool,
    /// Longest time in hours for which the map of the mesh is used without a controller that confirms it.
    /// After that the tunnels to all nodes are closed until one does. This bounds how long a removed node is
    /// trusted here if somebody cuts this node off from controllers and honest peers. Absent: the map is used
    /// without end, so that an outage of the controllers harms nobody. The age is counted by the clock of this
    /// machine, also while it is off. If that clock is behind the last confirmation, as in 1970 before the time
    /// is set, the map counts as just confirmed until the clock is set, and `towline doctor` names the clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_map_age_hours: Option<NonZeroU16>,
}

/// Setting of the mesh that lets its traffic travel in clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClearSetting {
    /// Trusted sites.
    TrustedSites,
    /// Prefixes that are reached in clear while their tunnel is down.
    BypassWhenDown,
}

impl fmt::Display for ClearSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The word of the configuration.
        self.serialize(f)
    }
}

impl Default for TrustConfig {
    fn default() -> Self {
        Self {
            allow_in_clear: vec![ClearSetting::TrustedSites],
            refused_networks: Vec::new(),
            accepted_networks: Vec::new(),
            require_inverse_guard: false,
            max_map_age_hours: None,
        }
    }
}

/// Settings for relaying between nodes of the mesh that have no direct path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RelayConfig {
    /// True to relay. Only for a node that others can reach: with a public address or a forwarded
    /// port.
    pub enabled: bool,
    /// Maximum number of nodes that are registered at the same time.
    pub nodes: usize,
    /// Maximum number of channels that one node has at the same time.
    pub channels_per_node: usize,
    /// Maximum rate at which one node may send through this relay, on all of its channels together, in
    /// megabits per second. What it sends beyond that is dropped (`relay_limited`).
    pub megabits_per_node: u64,
}

impl Default for RelayConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            nodes: limits::NODES,
            channels_per_node: 1_024,
            megabits_per_node: 1_000,
        }
    }
}

/// Settings for Kubernetes, which is accessed with the kubelet's own credentials.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubernetesConfig {
    /// Path of the kubelet's kubeconfig. Empty: the paths of kubeadm and k3s.
    pub kubeconfig: PathBuf,
    /// Whether the node's pod networks are announced.
    pub announce_pods: AnnouncePods,
    /// Directory of the CNI configuration. Empty: the usual directories.
    pub cni_dir: PathBuf,
    /// Address families of the kubelet's `--node-ip`.
    pub node_ip_families: NodeIpFamilies,
    /// Address on the loopback at which clients on this machine reach the nearest API server of the mesh's
    /// control-plane nodes. Absent: there is no such endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_endpoint: Option<SocketAddr>,
    /// TCP port of this machine's API server, which other nodes use if the join token was created with
    /// `--control-plane`. Absent: this machine has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_port: Option<NonZeroU16>,
}

/// Address families of the kubelet's `--node-ip`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeIpFamilies {
    /// Families of this node's pod networks. Until those are known: IPv4, and IPv6 if the join token allows
    /// an IPv6 prefix.
    #[default]
    Auto,
    /// IPv4 alone.
    Ipv4,
    /// IPv6 alone.
    Ipv6,
    /// Both, IPv4 first: a dual-stack cluster.
    Dual,
}

/// Whether the node's pod networks are announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AnnouncePods {
    /// Announce them if the CNI routes them natively.
    #[default]
    Auto,
    /// Announce them for every CNI.
    Always,
    /// Do not announce them.
    Never,
}

impl KubernetesConfig {
    /// Returns the path of the kubeconfig, if one is configured.
    pub fn kubeconfig(&self) -> Option<&Path> {
        Some(self.kubeconfig.as_path()).filter(|path| !path.as_os_str().is_empty())
    }

    /// Returns the directory of the CNI configuration, if one is configured.
    pub fn cni_dir(&self) -> Option<&Path> {
        Some(self.cni_dir.as_path()).filter(|path| !path.as_os_str().is_empty())
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/towline".into(),
            socket: "/run/towline/agent.sock".into(),
            node: NodeConfig::default(),
            wireguard: WireguardConfig::default(),
            link: LinkConfig::default(),
            routing: RoutingConfig::default(),
            offloads: Offloads::default(),
            controller: ControllerConfig::default(),
            trust: TrustConfig::default(),
            peers: Vec::new(),
            relay: RelayConfig::default(),
            metrics: MetricsConfig::default(),
            telemetry: TelemetryConfig::default(),
            kubernetes: KubernetesConfig::default(),
            log: LogConfig::default(),
        }
    }
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self { name: "towline0".into(), mtu: Mtu::DEFAULT, queueing: LinkQueueing::Fq }
    }
}

impl Default for RoutingConfig {
    fn default() -> Self {
        Self {
            table: 21580,
            priority: 21580,
            mark: 0x10,
            mask: 0x30,
            plain_ports: Vec::new(),
            nftables_table: "towline".into(),
        }
    }
}

/// Error of reading a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read or parsed.
    #[error(transparent)]
    File(#[from] FileError),
    /// A value is out of its bounds.
    #[error("{path}: {key}: {message}")]
    Value {
        /// Path of the file.
        path: PathBuf,
        /// Key of the value.
        key: &'static str,
        /// Description of the error, with a valid value.
        message: String,
    },
}

impl Config {
    /// Reads the file at `path`, or the default file. Only the default file may be absent.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        match config_file::read(path, Path::new(DEFAULT_PATH))? {
            Some((file, text)) => Self::parse(&text, file),
            None => Ok(Self::default()),
        }
    }

    /// Parses the text of a file. `path` is only used in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = config_file::parse(text, path)?;
        config.check().map_err(|(key, message)| ConfigError::Value {
            path: path.into(),
            key,
            message,
        })?;
        Ok(config)
    }

    /// Checks the bounds of all values. The error contains the key and the message.
    fn check(&self) -> Result<(), (&'static str, String)> {
        let name = &self.link.name;
        let name_ok = !name.is_empty()
            && name.len() <= 15
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && name != "."
            && name != "..";
        if !name_ok {
            return Err(("link.name", "use 1 to 15 letters, digits, `-`, `_` and `.`".into()));
        }
        if self.wireguard.port == 0 {
            return Err((
                "wireguard.port",
                "must not be 0, because peers need a fixed port".into(),
            ));
        }
        if !(1..=16).contains(&self.wireguard.workers) {
            let workers = self.wireguard.workers;
            return Err(("wireguard.workers", format!("{workers} is outside 1 to 16")));
        }
        if self.wireguard.spin_us > 1000 {
            let spin = self.wireguard.spin_us;
            return Err(("wireguard.spin_us", format!("{spin} is outside 0 to 1000")));
        }
        let workers = self.wireguard.workers;
        if workers > 1 && matches!(self.wireguard.seal_ahead, SealAhead::Helpers(_)) {
            return Err((
                "wireguard.seal_ahead",
                format!("a number needs `workers = 1`, not {workers}: use \"auto\" or \"off\""),
            ));
        }
        let routing = &self.routing;
        // The next two tables are used too, so they must not be the kernel's either.
        if matches!(routing.table, 0 | 251..=255 | 0xffff_fffe..) {
            return Err((
                "routing.table",
                format!("{} is reserved by the kernel: use another table", routing.table),
            ));
        }
        if !(1..=32757).contains(&routing.priority) {
            return Err((
                "routing.priority",
                format!("{} is outside 1 to 32757 (before the main table)", routing.priority),
            ));
        }
        if routing.mark == 0 || routing.mark & !routing.mask != 0 {
            return Err((
                "routing.mark",
                format!(
                    "{:#x} must not be 0 and must lie inside the mask {:#x}",
                    routing.mark, routing.mask
                ),
            ));
        }
        if routing.mask == routing.mark {
            return Err((
                "routing.mask",
                format!("{:#x} has the same bits as the mark: add at least one bit", routing.mask),
            ));
        }
        if routing.plain_ports.len() > limits::PLAIN_PORTS || routing.plain_ports.contains(&0) {
            let most = limits::PLAIN_PORTS;
            return Err(("routing.plain_ports", format!("use at most {most} ports of 1 to 65535")));
        }
        if routing.nftables_table.is_empty() || routing.nftables_table.len() > 31 {
            return Err(("routing.nftables_table", "use 1 to 31 characters".into()));
        }
        let endpoint = self.kubernetes.api_endpoint;
        if endpoint.is_some_and(|endpoint| !endpoint.ip().is_loopback() || endpoint.port() == 0) {
            return Err((
                "kubernetes.api_endpoint",
                "use an address of the loopback, such as 127.0.0.1:7445".into(),
            ));
        }
        if self.telemetry.otlp_endpoint.is_some() && !telemetry::IS_BUILT {
            return Err((
                "telemetry.otlp_endpoint",
                "this agent cannot send spans: build it with `--features otel`, or remove the key"
                    .into(),
            ));
        }
        static_peers::check(&self.peers).map_err(|message| ("peer", message))?;
        if self.node.addresses.len() > limits::PREFIXES
            || self.node.addresses.iter().any(|ip| ip.is_unspecified() || ip.is_multicast())
        {
            let most = limits::PREFIXES;
            return Err(("node.addresses", format!("use at most {most} unicast addresses")));
        }
        if self.node.advertise.len() > limits::CANDIDATES / 2 {
            return Err((
                "node.advertise",
                format!("use at most {} addresses", limits::CANDIDATES / 2),
            ));
        }
        if let Some(bad) = self
            .node
            .advertise
            .iter()
            .find(|a| Candidate::new(CandidateKind::Configured, **a).is_none())
        {
            return Err(("node.advertise", format!("{bad} is not a valid endpoint")));
        }
        let node_ips = &self.node.node_ips;
        let of_family = |is: fn(&IpAddr) -> bool| node_ips.iter().filter(|ip| is(ip)).count();
        if of_family(IpAddr::is_ipv4) > 1 || of_family(IpAddr::is_ipv6) > 1 {
            return Err(("node.node_ips", "use at most one address of each family".into()));
        }
        if let Some(bad) = node_ips.iter().find(|ip| ip.is_unspecified() || ip.is_loopback()) {
            return Err((
                "node.node_ips",
                format!("other nodes cannot reach {bad}: use another address"),
            ));
        }
        for (key, networks) in [
            ("node.prefixes", &self.node.prefixes),
            ("node.forward_to", &self.node.forward_to),
            ("node.local_networks", &self.node.local_networks),
            ("node.include_prefixes", &self.node.include_prefixes),
            ("node.exclude_prefixes", &self.node.exclude_prefixes),
            ("trust.refused_networks", &self.trust.refused_networks),
            ("trust.accepted_networks", &self.trust.accepted_networks),
        ] {
            if networks.len() > limits::PREFIXES {
                return Err((key, format!("use at most {} networks", limits::PREFIXES)));
            }
            if let Some(bad) = networks.iter().find(|net| net.trunc() != **net) {
                return Err((key, format!("{bad} has host bits set: use {}", bad.trunc())));
            }
        }
        if let Some(bad) =
            self.node.local_networks.iter().find(|net| net.prefix_len() == 0 || is_host(net))
        {
            return Err((
                "node.local_networks",
                format!("{bad} is not the network of a link: use the network of the link"),
            ));
        }
        if let Some(bad) = self.node.forward_to.iter().find(|net| is_special(net)) {
            return Err((
                "node.forward_to",
                format!(
                    "{bad} never comes out of a tunnel (loopback, link-local, multicast or \
                     broadcast): remove it"
                ),
            ));
        }
        Ok(())
    }

    /// Returns the filter for announced networks.
    pub fn prefix_filter(&self) -> Filter<'_> {
        Filter {
            include: &self.node.include_prefixes,
            exclude: &self.node.exclude_prefixes,
            refused: &self.trust.refused_networks,
        }
    }

    /// Returns the configured candidates.
    pub fn candidates(&self) -> Vec<Candidate> {
        self.node
            .advertise
            .iter()
            .filter_map(|address| Candidate::new(CandidateKind::Configured, *address))
            .collect()
    }

    /// Returns the networks that stay as they are, with those to which the machine was connected when it
    /// joined.
    pub fn local_networks(&self, joined: Vec<IpNet>) -> LocalNetworks {
        LocalNetworks { configured: self.node.local_networks.clone(), joined }
    }

    /// Returns the longest age at which the map is used. `None`: any.
    pub fn max_map_age(&self) -> Option<Duration> {
        self.trust
            .max_map_age_hours
            .map(|hours| Duration::from_secs(u64::from(hours.get()) * 3_600))
    }

    /// Returns the limits of this machine, for this list of controllers. `joined` has the networks to which
    /// the machine was connected when it joined, and `host` the addresses that it needed then. Controllers
    /// with a host name are left out: who answers for the name could open the mesh with it.
    pub fn local_limits(
        &self,
        joined: Vec<IpNet>,
        host: HostAddresses,
        controllers: &[ControllerAddress],
    ) -> LocalLimits {
        let TrustConfig { allow_in_clear, refused_networks, accepted_networks, .. } = &self.trust;
        let literal =
            |controller: &ControllerAddress| controller.as_str().parse::<SocketAddr>().ok();
        let controllers = controllers.iter().filter_map(literal);
        LocalLimits {
            host,
            controllers: controllers.map(|address| address.ip()).collect(),
            local_networks: joined.into_iter().chain(self.node.local_networks.clone()).collect(),
            refused: refused_networks.clone(),
            accepted: accepted_networks.clone(),
            in_clear: InClear {
                trusted_sites: allow_in_clear.contains(&ClearSetting::TrustedSites),
                bypass_when_down: allow_in_clear.contains(&ClearSetting::BypassWhenDown),
            },
        }
    }

    /// Returns what must bypass the tunnel, for this list of controllers. Controllers with a host
    /// name are left out, because their addresses are not known here.
    pub fn underlay(&self, controllers: &[ControllerAddress]) -> UnderlayPlan {
        UnderlayPlan {
            owner: self.owner(),
            port: Some(self.wireguard.port),
            second_port: None,
            controllers: controllers.iter().filter_map(|c| c.as_str().parse().ok()).collect(),
            plain_ports: self.routing.plain_ports.iter().copied().collect(),
        }
    }

    /// Returns the user that the agent runs as: the owner of the state directory. Another user
    /// (root) may install the guards for it.
    fn owner(&self) -> u32 {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(&self.state_dir)
            .map_or_else(|_| nix::unistd::geteuid().as_raw(), |metadata| metadata.uid())
    }

    /// Returns the limits of this node's relay; `None` if it does not relay.
    pub fn relay_limits(&self) -> Option<RelayLimits> {
        let RelayConfig { enabled, nodes, channels_per_node, megabits_per_node } = self.relay;
        let bits_per_second = megabits_per_node.saturating_mul(1_000_000);
        enabled.then_some(RelayLimits { nodes, channels_per_node, bits_per_second })
    }

    /// Returns the names and numbers that identify Towline's state on the host.
    pub fn names(&self) -> Names {
        Names {
            link: self.link.name.clone(),
            table: self.routing.table,
            priority: self.routing.priority,
            firewall: self.routing.nftables_table.clone(),
        }
    }

    /// Returns the numbers of the policy rules.
    pub fn rules(&self) -> RulePlan {
        RulePlan {
            priority: self.routing.priority,
            mark: self.routing.mark,
            mask: self.routing.mask,
        }
    }
}

mod addresses {
    use serde::{Deserialize, Deserializer, Serializer};
    use towline_proto::token::ControllerAddress;

    pub(super) fn serialize<S: Serializer>(
        list: &[ControllerAddress],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(ControllerAddress::as_str))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<ControllerAddress>, D::Error> {
        Vec::<String>::deserialize(deserializer)?
            .iter()
            .map(|text| text.parse().map_err(serde::de::Error::custom))
            .collect()
    }
}
