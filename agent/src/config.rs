//! The agent's configuration: a TOML file, all of it parsed before anything is opened.
//!
//! Every field has a default, so an empty or absent file is a working configuration. A key that
//! is not known is refused by name. What a flag or an environment variable says wins over the
//! file; see `cli`.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use towline_core::own_networks::is_special;
use towline_core::plan::{RulePlan, UnderlayPlan};
use towline_proto::limits;
use towline_proto::node::{Candidate, CandidateKind};
use towline_proto::token::ControllerAddress;

use crate::node_ip::NodeIps;
use crate::prefixes::Filter;
use crate::static_peers::{self, PeerConfig};
use towline_dataplane::Offloads;

/// Where the file is when nobody says.
pub const DEFAULT_PATH: &str = "/etc/towline/agent.toml";

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Keys, membership, and the cached map; 0700, made when it is not there.
    pub state_dir: PathBuf,
    /// The Unix socket that the command line speaks to; 0600.
    pub socket: PathBuf,
    /// What this node says of itself.
    pub node: NodeConfig,
    /// The UDP side of the tunnels.
    pub wireguard: WireguardConfig,
    /// The TUN link.
    pub link: LinkConfig,
    /// Our numbers in the host's routing.
    pub routing: RoutingConfig,
    /// Which of the kernel's offloads may be used.
    pub offloads: Offloads,
    /// How to reach the controllers.
    pub controller: ControllerConfig,
    /// What is taken from Kubernetes.
    pub kubernetes: KubernetesConfig,
    /// WireGuard peers that are in no mesh, each as `[[peer]]`.
    #[serde(rename = "peer", skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerConfig>,
    /// Whether this node forwards for others.
    pub relay: RelayConfig,
}

/// What this node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// Addresses, with port, at which other nodes can reach this one's UDP port: a public address
    /// that no interface carries, or a forwarded port.
    pub advertise: Vec<SocketAddr>,
    /// Addresses of our link besides those that the mesh gives: what static peers know us by.
    pub addresses: Vec<IpAddr>,
    /// By which address other nodes know this one.
    pub addressing: Addressing,
    /// The machine's own addresses, at most one of each family, where `addressing` is `node-ip`;
    /// empty: those of the link that leads to the internet.
    pub node_ips: Vec<IpAddr>,
    /// Networks that are reached through this node; its grant must allow them.
    pub prefixes: Vec<IpNet>,
    /// Networks that packets out of the tunnel may be forwarded to, though they are not announced.
    pub forward_to: Vec<IpNet>,
    /// Announce only networks inside these, whoever names them; empty: all.
    pub include_prefixes: Vec<IpNet>,
    /// Announce none of these, nor any part of them.
    pub exclude_prefixes: Vec<IpNet>,
}

/// By which address other nodes know a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Addressing {
    /// Its overlay address, which overlaps nothing.
    #[default]
    Overlay,
    /// The machine's own address, announced as a prefix and routed transparently.
    NodeIp,
}

/// The UDP side of the tunnels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WireguardConfig {
    /// UDP port, 1 to 65535.
    pub port: u16,
    /// Threads that move packets, 1 to 16. One does for a few Gb/s; with several, peers share them.
    pub workers: usize,
}

/// The TUN link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LinkConfig {
    /// Interface name, at most 15 bytes.
    pub name: String,
    /// Bytes, 1,280 to 65,455. The default leaves room for the tunnel's 80 bytes in 1,500.
    pub mtu: u32,
}

/// Our numbers in the host's routing. Two programs that share one number fight over it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoutingConfig {
    /// Routing table that holds our routes; the one after it is ours as well.
    pub table: u32,
    /// The first of the five priorities of our policy rules, 1 to 32,761.
    pub priority: u32,
    /// The mark on our own sockets, inside `mask`.
    pub mark: u32,
    /// Bits of the mark that are ours; at least one more than the mark's.
    pub mask: u32,
    /// TCP ports of this host that others reach outside the tunnel too, and are answered the way
    /// they were reached: a Kubernetes API server's, a Towline controller's.
    pub plain_ports: Vec<u16>,
    /// Name of our nftables table, family inet.
    pub nftables_table: String,
}

/// How to reach the controllers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControllerConfig {
    /// `host:port` of each controller, instead of the addresses that came with the join token.
    #[serde(with = "addresses")]
    pub addresses: Vec<ControllerAddress>,
}

/// Whether this node forwards between nodes of the mesh that have no direct path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RelayConfig {
    /// Only for a node that others reach: with a public address, or a forwarded port.
    pub enabled: bool,
    /// Nodes that may be registered at once.
    pub nodes: usize,
    /// Channels that one node may have at once.
    pub channels_per_node: usize,
    /// How much one node may send, in megabits per second.
    pub megabits_per_node: u64,
}

impl Default for RelayConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            nodes: limits::NODES,
            channels_per_node: 1_024,
            megabits_per_node: 10_000,
        }
    }
}

/// What is taken from Kubernetes, with the kubelet's own credentials.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubernetesConfig {
    /// The kubelet's kubeconfig. Empty: where kubeadm or k3s put it.
    pub kubeconfig: PathBuf,
    /// Whether the node's pod networks are announced.
    pub announce_pods: AnnouncePods,
    /// Where the CNI is configured. Empty: the usual places.
    pub cni_dir: PathBuf,
}

/// Whether the node's pod networks are announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AnnouncePods {
    /// Where the CNI routes them natively.
    #[default]
    Auto,
    /// Whatever the CNI does.
    Always,
    /// Not at all.
    Never,
}

impl KubernetesConfig {
    /// The kubeconfig, when one is named.
    pub fn kubeconfig(&self) -> Option<&Path> {
        Some(self.kubeconfig.as_path()).filter(|path| !path.as_os_str().is_empty())
    }

    /// The CNI's directory, when one is named.
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
            peers: Vec::new(),
            relay: RelayConfig::default(),
            kubernetes: KubernetesConfig::default(),
        }
    }
}

impl Default for WireguardConfig {
    fn default() -> Self {
        Self { port: 51830, workers: 1 }
    }
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self { name: "towline0".into(), mtu: 1420 }
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

/// Why a configuration is not one.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, a key that is not known, or a value of the wrong form.
    #[error("{path}: {message}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where, and what is wrong.
        message: String,
    },
    /// A value out of its bounds.
    #[error("{path}: {key}: {message}")]
    Value {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// What is wrong, and what would be right.
        message: String,
    },
}

impl Config {
    /// Reads `path`. An absent file is the default configuration only when `path` is the default
    /// one and nobody named it.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (file, named) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        match std::fs::read_to_string(file) {
            Ok(text) => Self::parse(&text, file),
            Err(error) if !named && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read { path: file.into(), source }),
        }
    }

    /// Parses the text of a file; `path` is for the message only.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.into(),
            message: one_line(&error, text),
        })?;
        config.check().map_err(|(key, message)| ConfigError::Value {
            path: path.into(),
            key,
            message,
        })?;
        Ok(config)
    }

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
        if !(1280..=65455).contains(&self.link.mtu) {
            return Err(("link.mtu", format!("{} is outside 1280 to 65455", self.link.mtu)));
        }
        if self.wireguard.port == 0 {
            return Err(("wireguard.port", "0 is no port: peers must know it".into()));
        }
        if !(1..=16).contains(&self.wireguard.workers) {
            let workers = self.wireguard.workers;
            return Err(("wireguard.workers", format!("{workers} is outside 1 to 16")));
        }
        let routing = &self.routing;
        // The two after it are ours as well.
        if matches!(routing.table, 0 | 251..=255 | 0xffff_fffe..) {
            return Err((
                "routing.table",
                format!("{} is the kernel's own: use another", routing.table),
            ));
        }
        if !(1..=32759).contains(&routing.priority) {
            return Err((
                "routing.priority",
                format!("{} is outside 1 to 32759 (before the main table)", routing.priority),
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
                format!("{:#x} leaves no bit besides the mark's: add one", routing.mask),
            ));
        }
        if routing.plain_ports.len() > limits::PLAIN_PORTS || routing.plain_ports.contains(&0) {
            let most = limits::PLAIN_PORTS;
            return Err(("routing.plain_ports", format!("at most {most} ports of 1 to 65535")));
        }
        if routing.nftables_table.is_empty() || routing.nftables_table.len() > 31 {
            return Err(("routing.nftables_table", "use 1 to 31 characters".into()));
        }
        static_peers::check(&self.peers).map_err(|message| ("peer", message))?;
        if self.node.addresses.len() > limits::PREFIXES
            || self.node.addresses.iter().any(|ip| ip.is_unspecified() || ip.is_multicast())
        {
            let most = limits::PREFIXES;
            return Err(("node.addresses", format!("at most {most} addresses of one machine")));
        }
        if self.node.advertise.len() > limits::CANDIDATES / 2 {
            return Err(("node.advertise", format!("at most {}", limits::CANDIDATES / 2)));
        }
        if let Some(bad) = self
            .node
            .advertise
            .iter()
            .find(|a| Candidate::new(CandidateKind::Configured, **a).is_none())
        {
            return Err(("node.advertise", format!("nothing can be sent to {bad}")));
        }
        let node_ips = &self.node.node_ips;
        if NodeIps::first(node_ips.iter().copied()).iter().count() < node_ips.len() {
            return Err(("node.node_ips", "at most one address of each family".into()));
        }
        if let Some(bad) = node_ips.iter().find(|ip| ip.is_unspecified() || ip.is_loopback()) {
            return Err(("node.node_ips", format!("{bad} is no address for others")));
        }
        for (key, networks) in [
            ("node.prefixes", &self.node.prefixes),
            ("node.forward_to", &self.node.forward_to),
            ("node.include_prefixes", &self.node.include_prefixes),
            ("node.exclude_prefixes", &self.node.exclude_prefixes),
        ] {
            if networks.len() > limits::PREFIXES {
                return Err((key, format!("at most {}", limits::PREFIXES)));
            }
            if let Some(bad) = networks.iter().find(|net| net.trunc() != **net) {
                return Err((key, format!("{bad} has host bits set: use {}", bad.trunc())));
            }
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

    /// Which networks are announced.
    pub fn prefix_filter(&self) -> Filter<'_> {
        Filter { include: &self.node.include_prefixes, exclude: &self.node.exclude_prefixes }
    }

    /// The configured candidates.
    pub fn candidates(&self) -> Vec<Candidate> {
        self.node
            .advertise
            .iter()
            .filter_map(|address| Candidate::new(CandidateKind::Configured, *address))
            .collect()
    }

    /// What of ours travels outside the tunnel, if these are the controllers. One that is named
    /// instead of numbered is left out: its address is not known here.
    pub fn underlay(&self, controllers: &[ControllerAddress]) -> UnderlayPlan {
        UnderlayPlan {
            owner: self.owner(),
            port: Some(self.wireguard.port),
            controllers: controllers.iter().filter_map(|c| c.as_str().parse().ok()).collect(),
            plain_ports: self.routing.plain_ports.iter().copied().collect(),
        }
    }

    /// The user that the agent runs as: who owns its state, also when somebody else (root, by
    /// hand) sets up the guards for it.
    fn owner(&self) -> u32 {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(&self.state_dir)
            .map_or_else(|_| nix::unistd::geteuid().as_raw(), |metadata| metadata.uid())
    }

    /// What we forward for others.
    pub fn relay(&self) -> towline_dataplane::Relay {
        use towline_dataplane::relay::{Limits, Relay};
        let RelayConfig { enabled, nodes, channels_per_node, megabits_per_node } = self.relay;
        if !enabled {
            return Relay::default();
        }
        let bytes_per_second = megabits_per_node.saturating_mul(1_000_000 / 8);
        Relay::new(Limits { nodes, channels: channels_per_node, bytes_per_second })
    }

    /// Our policy rules.
    pub fn rules(&self) -> RulePlan {
        RulePlan {
            priority: self.routing.priority,
            mark: self.routing.mark,
            mask: self.routing.mask,
        }
    }
}

/// TOML's error as one line: place, then message.
fn one_line(error: &toml::de::Error, text: &str) -> String {
    let message = error.message().replace('\n', " ");
    match error.span() {
        Some(span) => {
            let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
            format!("line {line}: {message}")
        }
        None => message,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("agent.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = parse("[wireguard]\nport = 1\nprot = 2\n").unwrap_err();
        assert!(error.contains("line 3") && error.contains("prot"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn values_out_of_bounds_say_what_would_be_right() {
        for (text, says) in [
            ("[link]\nmtu = 1000", "1280"),
            ("[link]\nname = \"a-name-that-is-too-long\"", "15"),
            ("[wireguard]\nport = 0", "port"),
            ("[routing]\ntable = 254", "kernel"),
            ("[routing]\nmark = 0x100", "mask"),
            ("[routing]\nmark = 0x30", "besides"),
            ("[routing]\nplain_ports = [0]", "65535"),
            ("[node]\nprefixes = [\"10.0.0.1/8\"]", "10.0.0.0/8"),
            ("[node]\nforward_to = [\"10.0.0.1/8\"]", "10.0.0.0/8"),
            ("[node]\nforward_to = [\"169.254.169.254/32\"]", "never comes out of a tunnel"),
            ("[node]\nforward_to = [\"fe80::/64\"]", "never comes out of a tunnel"),
            ("[node]\nforward_to = [\"224.0.0.0/4\"]", "never comes out of a tunnel"),
            ("[node]\nexclude_prefixes = [\"10.0.0.1/8\"]", "10.0.0.0/8"),
            ("[node]\nnode_ips = [\"10.0.0.1\", \"10.0.0.2\"]", "one address"),
            ("[node]\naddressing = \"both\"", "node-ip"),
            ("[node]\nadvertise = [\"0.0.0.0:1\"]", "sent"),
            ("[offloads]\nudp_gso = false", "udp_segment"),
            ("[controller]\naddresses = [\"nope\"]", "host:port"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn one_offload_is_switched_off_without_the_others() {
        let offloads = parse("[offloads]\ntun_udp = false").unwrap().offloads;
        assert_eq!(offloads, Offloads { tun_udp: false, ..Offloads::default() });
    }

    #[test]
    fn the_example_that_is_shipped_is_the_default() {
        assert_eq!(parse(include_str!("../../deploy/agent.toml")).unwrap(), Config::default());
    }

    #[test]
    fn the_default_configuration_reads_back() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(parse(&text).unwrap(), Config::default());
    }
}
