//! `cargo lab nodes`: checks the connections of a Kubernetes cluster, whose control plane is in the
//! cloud and whose workers are at two sites behind NAT. Each node has a pod behind a bridge, as a
//! CNI plugin sets it up. Both kinds of addressing are covered. Each connection (an arrow) is a TCP
//! transfer, and captures show whether its packets crossed the tunnel or the uplink.
//!
//! ```text
//!   player, www ── internet ──┬── cp (API server) ── pod 10.244.1.2
//!                             ├── router-a ─┬─ worker-a (kubelet, kube-proxy) ── pod 10.244.2.2
//!                             │             └─ desk
//!                             └── router-b ── worker-b (kubelet) ── pod 10.244.3.2
//! ```

mod cluster;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use clap::ValueEnum as _;
use serde::Serialize;

use super::Setting;
use crate::lab::capture::Capture;
use crate::lab::interrupt;
use crate::lab::namespace::Namespace;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises};
use crate::lab::tamper::LINK;
use crate::lab::topology::Host;
use crate::lab::traffic::{Pattern, tcp_between};
use cluster::{
    API_SERVER, CLUSTER_IP, Cluster, HOST_PORT, KUBELET, LOCAL_NODE_PORT, Member, NODE_PORT,
    PUBLISHED, SERVICE,
};

pub use cluster::Addressing;

/// Command line options of the scenario.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Run only this kind of addressing.
    #[arg(long, value_enum)]
    pub addressing: Option<Addressing>,
    /// Run only with this `rp_filter` on the uplinks.
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=2))]
    pub rp_filter: Option<u8>,
}

impl Options {
    /// Returns the kinds of addressing in which the connections are checked.
    fn addressings(&self) -> Vec<Addressing> {
        self.addressing.map_or_else(|| Addressing::value_variants().to_vec(), |one| vec![one])
    }

    /// Returns the values of `rp_filter` with which the connections are checked.
    fn rp_filters(&self) -> Vec<u8> {
        self.rp_filter.map_or_else(|| vec![0, 1, 2], |one| vec![one])
    }
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Nodes {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// All connections, in the order in which they were tried.
    pub arrows: Vec<ArrowFigure>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result of one connection.
#[derive(Debug, Clone, Serialize)]
pub struct ArrowFigure {
    /// Client and server of the connection, for example "node to pod".
    pub name: &'static str,
    /// Address family: "IPv4" or "IPv6".
    pub family: &'static str,
    /// Value of `rp_filter` on the uplinks of the nodes.
    pub rp_filter: u8,
    /// Addressing of the nodes: "overlay" or "node-ip".
    pub addressing: Addressing,
    /// Way of the packets: "tunnel" or "uplink" if all packets of both directions took it;
    /// otherwise "mixed", "none" or "unknown".
    pub via: &'static str,
    /// True if all bytes of both directions arrived by the expected way.
    pub ok: bool,
}

/// Size of a transfer in each direction, in bytes.
const BYTES: u64 = 256 * 1024;
/// Time after which no more connections are tried, so that the scenario ends within 8 minutes.
const BUDGET: Duration = Duration::from_secs(420);
/// Limit for a capture to count the last frames of a transfer.
const CAPTURE_LAG: Duration = Duration::from_secs(5);
/// Number of attempts for one connection while a capture misses frames.
const ATTEMPTS: u32 = 5;
/// Value of [`ArrowFigure::via`] for packets that cross the tunnel.
const TUNNEL: &str = "tunnel";
/// Value of [`ArrowFigure::via`] for packets that cross an uplink in clear.
const UPLINK: &str = "uplink";

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Nodes> {
    let mut nodes = Nodes { rootless: setting.rank == Rank::Rootless, ..Nodes::default() };
    let mut promises = Promises::new();
    let begun = Instant::now();
    for addressing in &options.addressings() {
        if let Err(error) = nodes.play(setting, options, *addressing, begun, &mut promises) {
            promises.fail(format!("{addressing}: {error:#}"));
        }
    }
    nodes.failed = promises.into_failed();
    Ok(nodes)
}

/// One connection to try, with the expected way of its packets.
struct Arrow<'a> {
    name: &'static str,
    from: &'a Host,
    /// Address and port that the client connects to.
    target: SocketAddr,
    to: &'a Host,
    /// Port on which the server listens.
    port: u16,
    /// Expected way of the packets: [`TUNNEL`] or [`UPLINK`].
    via: &'static str,
    /// Places where packets of the connection must be seen.
    seen: Vec<Place<'a>>,
    /// Places where packets may also be seen, because the client's part of the way is not mesh
    /// traffic.
    besides: Vec<Place<'a>>,
}

/// Name of a host, and name of one of its links on which packets arrive.
type Place<'a> = (&'a str, &'a str);

impl Nodes {
    /// Builds a cluster with this addressing, and tries all connections for each `rp_filter`.
    fn play(
        &mut self,
        setting: &Setting,
        options: &Options,
        addressing: Addressing,
        begun: Instant,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let cluster = Cluster::build(setting, addressing)?;
        let pattern = Pattern::random()?;
        let captures = Captures::start(&cluster, pattern)?;
        for rp_filter in &options.rp_filters() {
            cluster.set_reverse_path_filter(*rp_filter)?;
            for v4 in [true, false] {
                for arrow in arrows(&cluster, v4) {
                    let family = if v4 { "IPv4" } else { "IPv6" };
                    let what =
                        format!("{}, {family}, rp_filter {rp_filter}, {addressing}", arrow.name);
                    setting.output.progress(&what);
                    if begun.elapsed() > BUDGET {
                        promises
                            .fail(format!("{what}: the time limit of the scenario was reached"));
                        continue;
                    }
                    let (via, outcome) = captures.follow_surely(&arrow, pattern)?;
                    let ok = outcome.is_ok() && via == arrow.via;
                    if let Err(error) = outcome {
                        interrupt::check()?;
                        promises.fail(format!("{what}: {error:#}"));
                    }
                    promises.hold(via == arrow.via, || {
                        format!("{what}: packets take the {}: {via}", arrow.via)
                    });
                    self.arrows.push(ArrowFigure {
                        name: arrow.name,
                        family,
                        rp_filter: *rp_filter,
                        addressing,
                        via,
                        ok,
                    });
                }
            }
        }
        captures.stop()
    }
}

/// Captures on nodes, routers and the internet, and the links that show which way the packets of a
/// transfer took: in clear over an uplink, or through the tunnel.
struct Captures<'a> {
    captures: Vec<(&'a Namespace, Capture)>,
    places: Vec<Place<'a>>,
}

impl<'a> Captures<'a> {
    /// Starts the captures of a cluster.
    fn start(cluster: &'a Cluster, pattern: Pattern) -> anyhow::Result<Self> {
        let namespaces = cluster.watched().map(|(namespace, _)| namespace);
        let captures =
            namespaces.map(|namespace| Ok((namespace, Capture::start(namespace, pattern)?)));
        let places = cluster
            .watched()
            .flat_map(|(namespace, links)| links.iter().map(move |link| (namespace.name(), *link)));
        Ok(Self { captures: captures.collect::<anyhow::Result<_>>()?, places: places.collect() })
    }

    /// Returns the number of frames with the pattern at each place.
    fn seen(&self) -> BTreeMap<Place<'a>, u64> {
        let count = |place: &Place<'a>| {
            let capture = self.captures.iter().find(|(namespace, _)| namespace.name() == place.0);
            capture.map_or(0, |(_, capture)| capture.marked_on(place.1))
        };
        self.places.iter().map(|place| (*place, count(place))).collect()
    }

    /// Runs one transfer. Returns the way of its packets, and whether all bytes arrived and were
    /// seen at the expected places.
    fn follow(
        &self,
        arrow: &Arrow<'_>,
        pattern: Pattern,
    ) -> anyhow::Result<(&'static str, anyhow::Result<()>)> {
        let before = self.seen();
        let any: IpAddr = if arrow.target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let listen = SocketAddr::new(any, arrow.port);
        let (from, to) = (arrow.from.namespace(), arrow.to.namespace());
        let mut outcome = tcp_between(from, to, listen, arrow.target, BYTES, pattern).map(drop);
        // The last frames are counted once two reads return the same counters, with frames at every
        // expected place: a busy machine counts at some places later than at others.
        let mut last = BTreeMap::new();
        let after = interrupt::wait_up_to(CAPTURE_LAG, || {
            let now = self.seen();
            let arrived = arrow.seen.iter().all(|place| now.get(place) > before.get(place));
            let still = now == last && now != before && arrived;
            last.clone_from(&now);
            Ok(still.then_some(now))
        })?;
        let after = after.unwrap_or(last);
        let passed = |place: &Place<'_>| after.get(place) > before.get(place);
        if let Some((host, link)) = arrow.seen.iter().find(|place| !passed(place)) {
            outcome = outcome.and(Err(anyhow::anyhow!("no packet arrived on {link} of {host}")));
        }
        let took = |tunnel: bool| {
            let mut ways = self.places.iter().filter(|place| !arrow.besides.contains(place));
            ways.any(|place| (place.1 == LINK) == tunnel && passed(place))
        };
        let via = match (took(true), took(false)) {
            (true, false) => TUNNEL,
            (false, true) => UPLINK,
            (true, true) => "mixed",
            (false, false) => "none",
        };
        Ok((via, outcome))
    }

    /// Runs [`Self::follow`] again if a capture missed frames, which happens on a busy machine: a
    /// missed frame could have taken either way.
    fn follow_surely(
        &self,
        arrow: &Arrow<'_>,
        pattern: Pattern,
    ) -> anyhow::Result<(&'static str, anyhow::Result<()>)> {
        let missed = || self.captures.iter().map(|(_, capture)| capture.seen().missed).sum::<u64>();
        for _ in 0..ATTEMPTS {
            let before = missed();
            let (via, outcome) = self.follow(arrow, pattern)?;
            if missed() == before {
                return Ok((via, outcome));
            }
        }
        Ok(("unknown", Err(anyhow::anyhow!("the captures missed frames in {ATTEMPTS} attempts"))))
    }

    fn stop(self) -> anyhow::Result<()> {
        self.captures.into_iter().try_for_each(|(_, capture)| capture.stop().map(drop))
    }
}

/// Returns all connections of one address family.
fn arrows<'a>(cluster: &'a Cluster, v4: bool) -> Vec<Arrow<'a>> {
    let of = |addresses: &[IpAddr]| {
        let found = addresses.iter().copied().find(|ip| ip.is_ipv4() == v4);
        found.unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED))
    };
    let [cp, a, b] = &cluster.members;
    let (www, player, desk) = (&*cluster.www, &*cluster.player, &*cluster.desk);
    // Mesh address of a node, and address of its uplink.
    let node = |member: &Member| of(&member.addresses);
    let uplink = |host: &Host| of(host.addresses());
    let pod = |member: &Member| of(member.pod.addresses());
    let out_of_tunnel = |member: &'a Member| (member.host.name(), LINK);

    let tunnel =
        |name, from: &'a Host, near, target: (IpAddr, u16), to: &'a Host, far, port| Arrow {
            name,
            from,
            target: target.into(),
            to,
            port,
            via: TUNNEL,
            seen: vec![out_of_tunnel(near), out_of_tunnel(far)],
            besides: Vec::new(),
        };
    let local =
        |name, from: &'a Host, target: (IpAddr, u16), to: &'a Host, port, seen: [_; 2]| Arrow {
            name,
            from,
            target: target.into(),
            to,
            port,
            via: UPLINK,
            seen: seen.into(),
            besides: Vec::new(),
        };
    // Places that see both directions of the traffic on the uplinks of worker-a and of cp.
    let by_a: [Place<'a>; 2] = [("worker-a", "eth0"), ("router-a", "worker-a")];
    let by_cp: [Place<'a>; 2] = [("cp", "eth0"), ("internet", "cp")];
    let service = of(&CLUSTER_IP);
    vec![
        tunnel(
            "control plane to kubelet, site a",
            &cp.host,
            cp,
            (node(a), KUBELET),
            &a.host,
            a,
            KUBELET,
        ),
        tunnel(
            "control plane to kubelet, site b",
            &cp.host,
            cp,
            (node(b), KUBELET),
            &b.host,
            b,
            KUBELET,
        ),
        tunnel(
            "worker to API server",
            &a.host,
            a,
            (node(cp), API_SERVER),
            &cp.host,
            cp,
            API_SERVER,
        ),
        tunnel("pod to pod across sites", &a.pod, a, (pod(b), SERVICE), &b.pod, b, SERVICE),
        tunnel("pod to pod in the cloud", &b.pod, b, (pod(cp), SERVICE), &cp.pod, cp, SERVICE),
        tunnel("pod to remote node IP", &a.pod, a, (node(b), KUBELET), &b.host, b, KUBELET),
        tunnel("node to pod", &a.host, a, (pod(b), SERVICE), &b.pod, b, SERVICE),
        tunnel(
            "pod to ClusterIP with remote backend",
            &a.pod,
            a,
            (service, 80),
            &b.pod,
            b,
            SERVICE,
        ),
        tunnel(
            "node to ClusterIP with remote backend",
            &a.host,
            a,
            (service, 80),
            &b.pod,
            b,
            SERVICE,
        ),
        Arrow {
            // The packets between the client on the LAN of worker-a and that node are not mesh
            // traffic.
            besides: by_a.into(),
            ..tunnel(
                "NodePort with remote backend",
                desk,
                a,
                (uplink(&a.host), NODE_PORT),
                &b.pod,
                b,
                SERVICE,
            )
        },
        Arrow {
            // The packets enter at worker-a, which forwards them to the pod.
            seen: vec![out_of_tunnel(cp), out_of_tunnel(a), out_of_tunnel(b)],
            ..tunnel(
                "NodePort of another node, policy Cluster",
                &cp.host,
                cp,
                (node(a), NODE_PORT),
                &b.pod,
                b,
                SERVICE,
            )
        },
        tunnel(
            "NodePort of another node, policy Local",
            &cp.host,
            cp,
            (node(a), LOCAL_NODE_PORT),
            &a.pod,
            a,
            SERVICE,
        ),
        tunnel("hostPort of another node", &cp.pod, cp, (node(a), HOST_PORT), &a.pod, a, HOST_PORT),
        tunnel(
            "hairpin: pod to itself by another node's NodePort",
            &b.pod,
            b,
            (node(a), NODE_PORT),
            &b.pod,
            a,
            SERVICE,
        ),
        tunnel(
            "published container port of another node",
            &cp.host,
            cp,
            (node(a), PUBLISHED),
            &cluster.container,
            a,
            SERVICE,
        ),
        Arrow {
            // The packets between the machine on the LAN and the node are not mesh traffic.
            besides: by_a.into(),
            ..tunnel(
                "LAN masqueraded behind the node",
                desk,
                a,
                (node(cp), KUBELET),
                &cp.host,
                cp,
                KUBELET,
            )
        },
        local("pod to internet", &a.pod, (uplink(www), 80), www, 80, by_a),
        local(
            "player to hostPort pod",
            player,
            (of(&cluster.player_sees), HOST_PORT),
            &a.pod,
            HOST_PORT,
            by_a,
        ),
        local(
            "operator to API server from outside",
            www,
            (uplink(&cp.host), API_SERVER),
            &cp.host,
            API_SERVER,
            by_cp,
        ),
    ]
}

impl Figures for Nodes {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for arrow in &self.arrows {
            let _ = writeln!(
                text,
                "  {}  {:40} {}, {}, rp_filter {}: via {}",
                if arrow.ok { "ok    " } else { "FAILED" },
                arrow.name,
                arrow.addressing,
                arrow.family,
                arrow.rp_filter,
                arrow.via
            );
        }
        let good = self.arrows.iter().filter(|arrow| arrow.ok).count();
        let _ = write!(text, "{good} of {} arrows", self.arrows.len());
        text
    }
}
