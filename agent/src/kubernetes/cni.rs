//! Decides which pod networks of this node are announced, from what the CNI plugin does with pod
//! traffic.
//!
//! If the CNI routes natively, a pod's packets have the pod's own addresses, and the mesh must know
//! the pod networks. If it tunnels (VXLAN, Geneve, IP-in-IP, its own WireGuard), they are inside
//! packets between node addresses. Announcing the pod networks then would pull traffic out of the
//! CNI's tunnel, and with it the identities that its policies depend on.
//!
//! [`Reading`] is a snapshot of the kernel and of the CNI's configuration. The decision is a pure
//! function of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use towline_helper::protocol::CNI_DIRECTORIES;

use super::CniUnknown;
use crate::config::AnnouncePods;
use towline_netlink::{Family, MainTables, NetlinkError, RouteKind, Rtnetlink};
use towline_proto::mtu::Mtu;

/// Protocol numbers (`RTPROT_*`) of the routes of container networks, for a host with a large table: those of
/// the kernel, of programs without a number of their own, of static routes, BIRD, kube-router and Calico.
const PROTOCOLS: [u8; 6] =
    [libc::RTPROT_KERNEL, libc::RTPROT_BOOT, libc::RTPROT_STATIC, 12, 17, 80];
/// File that flannel writes once its backend has created the link.
const FLANNEL_READY: &str = "/run/flannel/subnet.env";
/// Maximum size of a CNI configuration, in bytes. Longer files are ignored.
const CONFIGURATION_BYTES: u64 = 1 << 20;

/// Properties of a link that the decision needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSeen {
    /// Name of the link.
    pub name: String,
    /// Kind of the link: "vxlan", "geneve", "ipip", "wireguard", ...
    pub kind: Option<String>,
    /// MTU of the link, in bytes.
    pub mtu: u32,
}

/// Route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteSeen {
    /// Destination network of the route.
    pub destination: IpNet,
    /// Name of the link that the route leads to.
    pub link: Option<String>,
    /// True for a blackhole route, which drops packets without a more specific route.
    pub blackhole: bool,
    /// True if the route has an MTU of its own.
    pub has_mtu: bool,
}

impl RouteSeen {
    /// Returns whether the route leads to the link of this name.
    fn is_of(&self, link: &str) -> bool {
        self.link.as_deref() == Some(link)
    }
}

/// Snapshot of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reading {
    /// `type` of the first plugin in the configuration that the container runtime uses.
    pub plugin: Option<String>,
    /// True once flannel has created its link, if it needs one.
    pub flannel_ready: bool,
    /// Links of the machine, without the mesh's.
    pub links: Vec<LinkSeen>,
    /// Routes of the main table.
    pub routes: Vec<RouteSeen>,
    /// Addresses of the machine.
    pub addresses: BTreeSet<IpAddr>,
}

/// Decision about the pod networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Announce these networks and no others.
    Announce {
        /// Pod networks to announce, sorted.
        pods: Vec<IpNet>,
        /// How the pods are routed, for the operator.
        cni: String,
    },
    /// Announce nothing, because the CNI tunnels by itself.
    Tunnelled {
        /// Plugin and link of the tunnel, for the operator.
        cni: String,
        /// Largest MTU of the pods with which a tunnelled packet fits into the mesh's link.
        mtu: u32,
        /// Current MTU of the tunnel's link.
        mtu_now: u32,
    },
    /// No decision is possible yet. What was announced before stays.
    Wait {
        /// Reason for the operator.
        reason: CniUnknown,
    },
}

impl Reading {
    /// Takes a snapshot. `own_link` is the mesh's link, `plugin` is the result of [`plugin_of`], and `tables`
    /// bounds the number of routes.
    pub fn take(
        own_link: &str,
        plugin: Option<String>,
        tables: &mut MainTables,
    ) -> Result<Self, NetlinkError> {
        let mut netlink = Rtnetlink::open()?;
        let links = netlink.links()?;
        let names: BTreeMap<u32, &str> =
            links.iter().map(|link| (link.index, link.name.as_str())).collect();
        let mut routes = Vec::new();
        for family in Family::ALL {
            let found = tables.read(&mut netlink, family, &PROTOCOLS)?;
            routes.extend(found.into_iter().map(|route| RouteSeen {
                destination: route.destination,
                link: route.link.and_then(|index| names.get(&index).map(|name| (*name).to_owned())),
                blackhole: route.kind == RouteKind::Blackhole,
                has_mtu: route.mtu.is_some(),
            }));
        }
        let addresses = netlink.addresses(None)?;
        Ok(Self {
            plugin,
            flannel_ready: Path::new(FLANNEL_READY).exists(),
            links: links
                .into_iter()
                .filter(|link| link.name != own_link)
                .map(|link| LinkSeen { name: link.name, kind: link.kind, mtu: link.mtu })
                .collect(),
            routes,
            addresses: addresses.into_iter().map(|address| address.prefix.addr()).collect(),
        })
    }

    /// Decides what to announce, for a node whose pod networks in Kubernetes are `node_cidrs`.
    /// `mtu` is that of the mesh's link.
    pub fn decide(&self, mode: AnnouncePods, node_cidrs: &[IpNet], mtu: Mtu) -> Decision {
        match mode {
            AnnouncePods::Never => {
                return Decision::Announce {
                    pods: Vec::new(),
                    cni: "announce_pods = never".into(),
                };
            }
            AnnouncePods::Always => {
                let pods = self.allocations(node_cidrs);
                return Decision::Announce { pods, cni: "announce_pods = always".into() };
            }
            AnnouncePods::Auto => {}
        }
        if let Some((link, overhead)) = self.tunnel(node_cidrs) {
            let kind = link.kind.as_deref().unwrap_or("tunnel");
            return Decision::Tunnelled {
                cni: format!("{} ({kind} {})", self.plugin_name(), link.name),
                mtu: u32::from(mtu).saturating_sub(overhead),
                mtu_now: link.mtu,
            };
        }
        let Some(plugin) = self.plugin.as_deref() else {
            return Decision::Wait { reason: CniUnknown::NotConfigured };
        };
        match plugin {
            "flannel" if !self.flannel_ready && !self.has_pods(node_cidrs) => {
                return Decision::Wait { reason: CniUnknown::NotStarted };
            }
            _ if NATIVE.contains(&plugin) => {}
            _ => {
                let plugin = plugin.to_owned();
                return Decision::Wait { reason: CniUnknown::Plugin { plugin } };
            }
        }
        let pods = self.allocations(node_cidrs);
        if pods.is_empty() {
            let plugin = plugin.to_owned();
            return Decision::Wait { reason: CniUnknown::NoPodNetwork { plugin } };
        }
        Decision::Announce { pods, cni: format!("{plugin} (native routing)") }
    }

    fn plugin_name(&self) -> &str {
        self.plugin.as_deref().unwrap_or("CNI")
    }

    /// Returns the link through which the CNI tunnels, and its overhead in bytes. Links of the same kind
    /// that another program created, or that an earlier plugin left behind, do not count: the link has
    /// the name that the configured plugin gives it, or routes to pods use it.
    fn tunnel(&self, node_cidrs: &[IpNet]) -> Option<(&LinkSeen, u32)> {
        self.links.iter().find_map(|link| {
            let (kind, name) = (link.kind.as_deref()?, link.name.as_str());
            let is_of_plugin = match (kind, name) {
                // In native mode, Cilium answers the clients of services through such a link (DSR).
                ("geneve", CILIUM_GENEVE) => self.is_of_plugin(link) && self.cilium_tunnels(),
                // Without a route, tunl0 is only the default device of the kernel module.
                ("ipip", _) => self.is_of_plugin(link) && self.carries_routes(name),
                _ => self.is_of_plugin(link),
            };
            let counts = || is_of_plugin || self.carries_pods(name, node_cidrs);
            let overhead = match kind {
                // Overhead: outer IPv4 20, UDP 8, VXLAN or Geneve 8, Ethernet 14.
                "vxlan" | "geneve" if counts() => 50,
                // flannel's backend `udp`. Overhead: IPv4 20, UDP 8.
                "tun" if is_of_plugin && self.plugin_name() == "flannel" => 28,
                "ipip" if counts() => 20,
                // Other programs use WireGuard too, so only the names of CNI links count.
                "wireguard"
                    if CNI_WIREGUARD.iter().any(|cni| name.starts_with(cni)) && counts() =>
                {
                    80
                }
                _ => return None,
            };
            Some((link, overhead))
        })
    }

    /// Returns whether Cilium tunnels to the pods of other nodes: its routes to them have an MTU, and those to
    /// this node's pods have none. All of them lead to its host link, because eBPF programs encapsulate.
    fn cilium_tunnels(&self) -> bool {
        self.routes.iter().any(|route| route.is_of(CILIUM_HOST) && route.has_mtu)
    }

    /// Returns whether the configured plugin gives a link of a tunnel this name.
    fn is_of_plugin(&self, link: &LinkSeen) -> bool {
        let plugin = self.plugin_name();
        let mut of_plugin = TUNNEL_NAMES.iter().filter(|(known, _)| plugin == *known);
        of_plugin.any(|(_, prefix)| link.name.starts_with(prefix))
    }

    /// Returns whether a route by this link leads to pods of other nodes: to a network beside the pod
    /// networks of this node. Without any, every network counts.
    fn carries_pods(&self, link: &str, node_cidrs: &[IpNet]) -> bool {
        /// Bits by which the networks of the nodes differ at most.
        const NODE_BITS: u8 = 12;
        let beside = |net: &IpNet, own: &IpNet| {
            let length = own.prefix_len().saturating_sub(NODE_BITS);
            let around = IpNet::new(own.network(), length).map(|net| net.trunc());
            around.is_ok_and(|around| around.contains(&net.network())) && !own.contains(net)
        };
        let mut routes = self.routes.iter().filter(|route| route.is_of(link));
        routes.any(|route| {
            let net = &route.destination;
            let is_network = net.prefix_len() > 0 && net.prefix_len() < net.max_prefix_len();
            let to_pods = node_cidrs.is_empty() || node_cidrs.iter().any(|own| beside(net, own));
            is_network && !link_local(net) && to_pods
        })
    }

    /// Returns whether the main table leads to pods of this node. flannel's plugin connects no pod
    /// before its backend has created the link, so that the backend is known then. In a container,
    /// [`FLANNEL_READY`] may not be visible.
    fn has_pods(&self, node_cidrs: &[IpNet]) -> bool {
        let to_pods = |route: &RouteSeen| {
            let net = &route.destination;
            route.link.is_some() && node_cidrs.iter().any(|own| own.contains(net))
        };
        self.routes.iter().any(to_pods)
    }

    fn carries_routes(&self, link: &str) -> bool {
        self.routes.iter().any(|route| route.is_of(link))
    }

    /// Returns the node's pod networks. For a CNI with its own allocation they are read from the
    /// routes; otherwise they are those of Kubernetes.
    fn allocations(&self, node_cidrs: &[IpNet]) -> Vec<IpNet> {
        let host_route = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
        let found: BTreeSet<IpNet> = match self.plugin.as_deref() {
            // Calico adds a blackhole route for each block of this node, less specific than the
            // pods' routes.
            Some("calico") => self
                .routes
                .iter()
                .filter(|route| route.blackhole && !host_route(&route.destination))
                .map(|route| route.destination)
                .collect(),
            Some("cilium-cni") => self
                .routes
                .iter()
                .filter(|route| route.is_of(CILIUM_HOST) && !route.has_mtu)
                .map(|route| route.destination)
                .filter(|net| !host_route(net) && !link_local(net))
                .collect(),
            _ => BTreeSet::new(),
        };
        let mut pods: Vec<IpNet> =
            if found.is_empty() { node_cidrs.to_vec() } else { found.into_iter().collect() };
        pods.sort();
        pods.dedup();
        pods
    }
}

/// Plugins that route natively unless they have a tunnel link.
const NATIVE: &[&str] = &[
    "antrea",
    "bridge",
    "calico",
    "cilium-cni",
    "flannel",
    "host-device",
    "host-local",
    "ipvlan",
    "kube-router",
    "macvlan",
    "ptp",
];
/// Prefixes of the names of the WireGuard links that CNIs create.
const CNI_WIREGUARD: [&str; 3] = ["flannel-wg", "wireguard.cali", "cilium_wg"];

/// Link of Cilium that leads to the pods.
const CILIUM_HOST: &str = "cilium_host";
/// Geneve link of Cilium.
const CILIUM_GENEVE: &str = "cilium_geneve";

/// Prefixes of the names of the links of tunnels that each plugin creates.
const TUNNEL_NAMES: [(&str, &str); 13] = [
    ("antrea", "antrea-"),
    ("antrea", "genev_sys"),
    ("calico", "tunl"),
    ("calico", "vxlan-v6.calico"),
    ("calico", "vxlan.calico"),
    ("calico", "wireguard.cali"),
    ("cilium-cni", "cilium_"),
    ("flannel", "flannel"),
    ("kube-ovn", "genev_sys"),
    ("kube-ovn", "vxlan_sys"),
    ("kube-router", "tun-"),
    ("ovn-k8s-cni-overlay", "genev_sys"),
    ("weave-net", "vxlan-"),
];

fn link_local(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local())
}

/// Identity of a configuration file's content: path, inode, time of change in seconds and
/// nanoseconds.
pub type Mark = (PathBuf, [i64; 3]);

/// Configuration that the container runtime uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Configured {
    /// The configuration names this plugin. `None`: there is no configuration.
    Plugin(Option<String>),
    /// Only the helper can read the configuration. Contains the marks of the visible files.
    Closed(Vec<Mark>),
}

/// Returns the configured plugin. `directory` replaces the usual directories.
pub fn plugin_of(directory: Option<&Path>) -> Configured {
    let directories = match directory {
        Some(directory) => vec![directory],
        None => CNI_DIRECTORIES.map(Path::new).to_vec(),
    };
    let mut found = directories.into_iter().map(plugin);
    found.find(|found| *found != Configured::Plugin(None)).unwrap_or(Configured::Plugin(None))
}

/// Returns the main plugin of the first configuration, in the order of container runtimes.
fn plugin(directory: &Path) -> Configured {
    let denied = |error: &std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if denied(&error) => return Configured::Closed(Vec::new()),
        Err(_) => return Configured::Plugin(None),
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("conf" | "conflist" | "json"))
        })
        .collect();
    files.sort();
    for path in &files {
        let Ok(metadata) = std::fs::metadata(path) else { continue };
        if metadata.len() > CONFIGURATION_BYTES {
            continue;
        }
        match std::fs::read_to_string(path) {
            Ok(text) => {
                if let Some(plugin) = plugin_type(&text) {
                    return Configured::Plugin(Some(plugin));
                }
            }
            Err(error) if denied(&error) => {
                return Configured::Closed(files.iter().filter_map(|path| mark(path)).collect());
            }
            Err(_) => {}
        }
    }
    Configured::Plugin(None)
}

fn mark(path: &Path) -> Option<Mark> {
    let metadata = std::fs::metadata(path).ok()?;
    let number = metadata.ino().cast_signed();
    Some((path.to_owned(), [number, metadata.mtime(), metadata.mtime_nsec()]))
}

/// Returns the `type` of a configuration's main plugin. Multus only calls another plugin, which its
/// configuration contains (`delegates`). If it only names the file of the other one, that is one of the
/// next files: the result is `None`.
pub fn plugin_type(text: &str) -> Option<String> {
    let configuration: serde_json::Value = serde_json::from_str(text).ok()?;
    let main = main_plugin(&configuration);
    let name = main.get("type")?.as_str()?;
    if !MULTUS.contains(&name) {
        return Some(name.to_owned());
    }
    let delegate = main_plugin(main.get("delegates")?.get(0)?);
    delegate.get("type")?.as_str().filter(|name| !MULTUS.contains(name)).map(str::to_owned)
}

/// Types of Multus: the plugin itself, and the one that calls its daemon.
const MULTUS: [&str; 2] = ["multus", "multus-shim"];

/// Returns the first plugin of a list, or the configuration itself.
fn main_plugin(configuration: &serde_json::Value) -> &serde_json::Value {
    let first = configuration.get("plugins").and_then(|plugins| plugins.get(0));
    first.unwrap_or(configuration)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, kind: &str, mtu: u32) -> LinkSeen {
        LinkSeen { name: name.into(), kind: Some(kind.into()), mtu }
    }

    fn route(destination: &str, link: Option<&str>, blackhole: bool) -> RouteSeen {
        let destination = destination.parse().unwrap();
        RouteSeen { destination, link: link.map(Into::into), blackhole, has_mtu: false }
    }

    fn with(plugin: &str) -> Reading {
        Reading { plugin: Some(plugin.into()), flannel_ready: true, ..Reading::default() }
    }

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    fn announced(reading: &Reading, cidrs: &[&str]) -> Vec<IpNet> {
        match reading.decide(AnnouncePods::Auto, &nets(cidrs), Mtu::DEFAULT) {
            Decision::Announce { pods, .. } => pods,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_plain_bridge_routes_natively() {
        assert_eq!(announced(&with("bridge"), &["10.244.3.0/24"]), nets(&["10.244.3.0/24"]));
    }

    #[test]
    fn a_tunnelling_cni_keeps_its_pods_and_says_which_mtu_fits() {
        for (plugin, name, kind, mtu) in [
            ("flannel", "flannel.1", "vxlan", 1370),
            ("calico", "vxlan.calico", "vxlan", 1370),
            ("cilium-cni", "cilium_vxlan", "vxlan", 1370),
            ("flannel", "flannel-wg", "wireguard", 1340),
        ] {
            let reading = Reading { links: vec![link(name, kind, 1450)], ..with(plugin) };
            let decision =
                reading.decide(AnnouncePods::Auto, &nets(&["10.244.3.0/24"]), Mtu::DEFAULT);
            let Decision::Tunnelled { mtu: advice, mtu_now, cni } = decision else {
                panic!("{plugin}: {decision:?}");
            };
            assert_eq!((advice, mtu_now), (mtu, 1450), "{cni}");
        }
    }

    #[test]
    fn an_ipip_link_counts_only_when_it_carries_routes() {
        let mut reading = Reading { links: vec![link("tunl0", "ipip", 1480)], ..with("calico") };
        reading.routes.push(route("10.42.7.64/26", None, true));
        assert_eq!(announced(&reading, &[]), nets(&["10.42.7.64/26"]));
        reading.routes.push(route("10.42.9.0/26", Some("tunl0"), false));
        let decision = reading.decide(AnnouncePods::Auto, &[], Mtu::DEFAULT);
        assert!(matches!(decision, Decision::Tunnelled { mtu: 1400, .. }), "{decision:?}");
    }

    #[test]
    fn a_tunnel_that_is_not_the_plugins_counts_only_with_routes_to_pods() {
        let mut reading =
            Reading { links: vec![link("flannel.1", "vxlan", 1450)], ..with("bridge") };
        assert_eq!(announced(&reading, &["10.244.1.0/24"]), nets(&["10.244.1.0/24"]));
        // The underlay of a data centre.
        reading.links.push(link("vni100", "vxlan", 9000));
        reading.routes.push(route("192.168.50.0/24", Some("vni100"), false));
        reading.routes.push(route("fe80::/64", Some("vni100"), false));
        assert_eq!(announced(&reading, &["10.244.1.0/24"]), nets(&["10.244.1.0/24"]));
        reading.routes.push(route("10.244.2.0/24", Some("flannel.1"), false));
        let decision = reading.decide(AnnouncePods::Auto, &nets(&["10.244.1.0/24"]), Mtu::DEFAULT);
        assert!(matches!(decision, Decision::Tunnelled { mtu: 1370, .. }), "{decision:?}");
    }

    #[test]
    fn ciliums_geneve_link_is_a_tunnel_only_where_routes_to_other_nodes_pods_are_its_own() {
        let mut reading =
            Reading { links: vec![link("cilium_geneve", "geneve", 1450)], ..with("cilium-cni") };
        reading.routes.push(route("10.0.1.0/24", Some("cilium_host"), false));
        // Native routing, with the answers to the clients of services (DSR) in Geneve.
        reading.routes.push(route("10.0.2.0/24", Some("eth0"), false));
        assert_eq!(announced(&reading, &["10.244.1.0/24"]), nets(&["10.0.1.0/24"]));
        // A tunnel: the routes to the pods of other nodes have the MTU that fits into it.
        reading.routes.pop();
        let there = route("10.0.2.0/24", Some("cilium_host"), false);
        reading.routes.push(RouteSeen { has_mtu: true, ..there });
        let cidrs = nets(&["10.244.1.0/24"]);
        let decision = reading.decide(AnnouncePods::Auto, &cidrs, Mtu::DEFAULT);
        assert!(matches!(decision, Decision::Tunnelled { mtu: 1370, .. }), "{decision:?}");
        // The operator's word holds, for the pods of this node alone.
        let always = reading.decide(AnnouncePods::Always, &cidrs, Mtu::DEFAULT);
        assert!(
            matches!(always, Decision::Announce { ref pods, .. } if *pods == nets(&["10.0.1.0/24"])),
            "{always:?}"
        );
    }

    #[test]
    fn links_that_an_earlier_plugin_left_behind_do_not_count() {
        let cidrs = nets(&["10.244.1.0/24"]);
        for (name, kind) in [
            ("flannel.1", "vxlan"),
            ("flannel-wg", "wireguard"),
            ("flannel0", "tun"),
            ("cilium_geneve", "geneve"),
            ("cilium_wg0", "wireguard"),
            ("tunl0", "ipip"),
        ] {
            let mut reading = Reading { links: vec![link(name, kind, 1400)], ..with("bridge") };
            // A route that is not one to pods.
            reading.routes.push(route("192.168.50.0/24", Some(name), false));
            assert_eq!(announced(&reading, &["10.244.1.0/24"]), cidrs, "{name}");
            if kind == "tun" {
                continue;
            }
            // Another plugin may use it all the same, as Calico does with flannel's.
            reading.routes.push(route("10.244.0.0/16", Some(name), false));
            let decision = reading.decide(AnnouncePods::Auto, &cidrs, Mtu::DEFAULT);
            assert!(matches!(decision, Decision::Tunnelled { .. }), "{name}: {decision:?}");
        }
    }

    #[test]
    fn multus_is_followed_to_the_plugin_that_it_calls() {
        let of = |text: &str| plugin_type(text);
        let conflist = r#"{"type": "multus", "delegates": [{"plugins": [{"type": "flannel"}]}]}"#;
        assert_eq!(of(conflist).as_deref(), Some("flannel"));
        let single = r#"{"plugins": [{"type": "multus-shim", "delegates": [{"type": "calico"}]}]}"#;
        assert_eq!(of(single).as_deref(), Some("calico"));
        assert_eq!(of(r#"{"type": "multus", "clusterNetwork": "10-flannel.conflist"}"#), None);
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).unwrap();
        };
        write("00-multus.conf", r#"{"type": "multus-shim", "clusterNetwork": "10-bridge.conf"}"#);
        write("10-bridge.conf", r#"{"type": "bridge"}"#);
        assert_eq!(plugin(directory.path()), Configured::Plugin(Some("bridge".to_owned())));
    }

    #[test]
    fn another_programs_wireguard_is_no_cni() {
        let reading = Reading { links: vec![link("wg0", "wireguard", 1420)], ..with("ptp") };
        assert_eq!(announced(&reading, &["10.1.0.0/24"]), nets(&["10.1.0.0/24"]));
    }

    #[test]
    fn calico_and_cilium_allocate_by_themselves() {
        let mut calico = with("calico");
        calico.routes = vec![
            route("10.42.7.64/26", None, true),
            route("10.42.7.66/32", Some("cali12345"), false),
            route("10.42.9.0/26", Some("eth0"), false),
            route("fd00:42::40/122", None, true),
        ];
        assert_eq!(
            announced(&calico, &["10.244.0.0/24"]),
            nets(&["10.42.7.64/26", "fd00:42::40/122"])
        );
        let mut cilium = with("cilium-cni");
        cilium.routes = vec![
            route("10.0.1.0/24", Some("cilium_host"), false),
            route("10.0.1.5/32", Some("cilium_host"), false),
            route("fe80::/64", Some("cilium_host"), false),
        ];
        assert_eq!(announced(&cilium, &["10.244.0.0/24"]), nets(&["10.0.1.0/24"]));
    }

    #[test]
    fn flannel_has_started_once_it_connected_a_pod() {
        let cidrs = nets(&["10.244.3.0/24"]);
        let hidden = Reading {
            flannel_ready: false,
            routes: vec![route("10.244.3.0/24", Some("cni0"), false)],
            ..with("flannel")
        };
        let decision = hidden.decide(AnnouncePods::Auto, &cidrs, Mtu::DEFAULT);
        assert!(
            matches!(decision, Decision::Announce { ref pods, .. } if *pods == cidrs),
            "{decision:?}"
        );
        let others =
            Reading { routes: vec![route("10.244.4.0/24", Some("eth0"), false)], ..hidden };
        let decision = others.decide(AnnouncePods::Auto, &cidrs, Mtu::DEFAULT);
        assert!(matches!(decision, Decision::Wait { .. }), "{decision:?}");
    }

    #[test]
    fn flannels_udp_backend_tunnels() {
        let reading = Reading { links: vec![link("flannel0", "tun", 1472)], ..with("flannel") };
        let decision = reading.decide(AnnouncePods::Auto, &nets(&["10.244.3.0/24"]), Mtu::DEFAULT);
        assert!(matches!(decision, Decision::Tunnelled { mtu: 1392, .. }), "{decision:?}");
        // Another program's.
        let bridge = Reading { links: vec![link("flannel0", "tun", 1472)], ..with("bridge") };
        let decision = bridge.decide(AnnouncePods::Auto, &nets(&["10.244.3.0/24"]), Mtu::DEFAULT);
        assert!(matches!(decision, Decision::Announce { .. }), "{decision:?}");
    }

    #[test]
    fn what_cannot_be_told_yet_waits() {
        let cidrs = nets(&["10.244.3.0/24"]);
        for reading in [
            Reading::default(),
            Reading { flannel_ready: false, ..with("flannel") },
            with("somebody-elses"),
        ] {
            let decision = reading.decide(AnnouncePods::Auto, &cidrs, Mtu::DEFAULT);
            assert!(matches!(decision, Decision::Wait { .. }), "{decision:?}");
        }
        let none = with("bridge").decide(AnnouncePods::Auto, &[], Mtu::DEFAULT);
        assert!(matches!(none, Decision::Wait { .. }), "{none:?}");
    }

    #[test]
    fn the_operator_has_the_last_word() {
        let cidrs = nets(&["10.244.3.0/24"]);
        let tunnels = Reading { links: vec![link("flannel.1", "vxlan", 1450)], ..with("flannel") };
        let always = tunnels.decide(AnnouncePods::Always, &cidrs, Mtu::DEFAULT);
        assert!(matches!(always, Decision::Announce { pods, .. } if pods == cidrs));
        let never = with("bridge").decide(AnnouncePods::Never, &cidrs, Mtu::DEFAULT);
        assert!(matches!(never, Decision::Announce { pods, .. } if pods.is_empty()));
    }

    #[test]
    fn the_first_configuration_that_parses_names_the_plugin() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).unwrap();
        };
        let found = |name: &str| Configured::Plugin(Some(name.to_owned()));
        assert_eq!(plugin(directory.path()), Configured::Plugin(None));
        write("20-flannel.conflist", r#"{"plugins": [{"type": "flannel"}, {"type": "portmap"}]}"#);
        write("00-note.txt", r#"{"type": "ignored"}"#);
        write("05-broken.conf", "{");
        assert_eq!(plugin(directory.path()), found("flannel"));
        write("10-bridge.conf", r#"{"type": "bridge"}"#);
        assert_eq!(plugin(directory.path()), found("bridge"));
    }
}
