//! `cargo lab many`: measures the cost of one agent in a mesh of 1,000 nodes, most of which send no
//! traffic.
//!
//! The agent and the ten nodes that exchange traffic with it are real. The other nodes have joined
//! and published a record, but do not run. The agent's metrics are read every 15 s, as Prometheus would.
//!
//! Nothing is sent to the nodes that do not run, so the agent must send nothing to them. Without traffic it may
//! renew its sessions with the active nodes, once each, and no others.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde::Serialize;
use tokio_stream::wrappers::ReceiverStream;
use towline_agent::state::StateDir;
use towline_agent::{dial, join, tls};
use towline_fixtures::node::record;
use towline_netlink::Family;
use towline_nftables::{Chain, ChainKind, Expression, Hook, Nft, Rule, Table, TableFamily};
use towline_proto::node::{Candidate, CandidateKind, Record};
use towline_proto::pb;
use towline_proto::token::JoinToken;

use super::Setting;
use crate::lab::interrupt::{self, sleep, wait_for};
use crate::lab::mesh::{Controller, Node, START_LIMIT};
use crate::lab::peers::uapi;
use crate::lab::privilege::Rank;
use crate::lab::process::{Program, processor_time, resident_mb};
use crate::lab::report::{Figures, Promises, Skipped, round};
use crate::lab::topology::Lab;

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Many {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Number of the agent's peers.
    pub peers: usize,
    /// Number of peers with an active tunnel.
    pub active: usize,
    /// Length of the measurement in seconds.
    pub window_s: f64,
    /// Processor time of the agent, in percent of a core.
    pub agent_cpu_pct: f64,
    /// Resident memory of the agent, in megabytes.
    pub agent_rss_mb: f64,
    /// Number of handshake initiations that the agent sent from its start to the end of the measurement with
    /// traffic.
    pub handshakes: u64,
    /// Number of keepalives per second that the agent sent during the measurement.
    pub keepalives_per_s: f64,
    /// Processor time of the agent without traffic, in percent of a core. As with traffic, its metrics are read.
    pub idle_pct: f64,
    /// Number of handshake initiations that the agent sent during the measurement without traffic.
    pub idle_handshakes: u64,
    /// Upper bound of `idle_pct` and `agent_cpu_pct`.
    pub idle_pct_max: f64,
    /// Resident memory of the agent at the end, in megabytes.
    pub rss_mb: f64,
    /// Upper bound of `rss_mb` and `agent_rss_mb`.
    pub rss_mb_max: f64,
    /// Number of times that the metrics were read during the measurements.
    pub scrapes: usize,
    /// Longest time for reading the metrics, in milliseconds.
    pub scrape_ms: f64,
    /// Largest size of the metrics in bytes.
    pub scrape_bytes: usize,
    /// Number of peers that `wg show` prints. Absent if it cannot be run here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wg_peers: Option<usize>,
    /// What this machine cannot show.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Number of the agent's peers.
const PEERS: usize = 1_000;
/// Number of peers that exchange traffic with the agent.
const ACTIVE: usize = 10;
/// Time with traffic before the measurement, so that work of the start is not counted.
const SETTLE: Duration = Duration::from_secs(15);
/// Length of the measurement.
const WINDOW: Duration = Duration::from_secs(30);
/// Upper bound of [`Many::agent_cpu_pct`] and [`Many::idle_pct`].
const CPU_PCT: f64 = 1.0;
/// Upper bound of [`Many::agent_rss_mb`] and [`Many::rss_mb`].
const RSS_MB: f64 = 60.0;
/// Interval between two scrapes, a usual one of Prometheus.
const SCRAPE: Duration = Duration::from_secs(15);
/// Address of the agent's metrics.
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9586);
/// Limit for a read of the metrics, after which Prometheus gives up.
const SCRAPE_LIMIT: Duration = Duration::from_secs(10);
/// Limit for `wg show`.
const WG_LIMIT: Duration = Duration::from_secs(10);
/// Number of joins that run at the same time.
const AT_ONCE: usize = 8;
/// Interval between two datagrams to each active peer.
const PACE: Duration = Duration::from_millis(500);

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Many> {
    let mut figures = Many {
        rootless: setting.rank == Rank::Rootless,
        idle_pct_max: CPU_PCT,
        rss_mb_max: RSS_MB,
        ..Many::default()
    };
    figures.failed = Promises::broken_by(|promises| figures.measure(setting, promises));
    Ok(figures)
}

impl Many {
    /// Joins all nodes, sends traffic, and measures the agent.
    fn measure(&mut self, setting: &Setting, promises: &mut Promises) -> anyhow::Result<()> {
        let mut lab = Lab::new(setting.rank)?;
        let host = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
        let mut hosts = Vec::new();
        for number in 0..=ACTIVE {
            let (v4, v6) = (format!("203.0.113.{}", 10 + number), format!("2001:db8::{number:x}a"));
            let name = format!("node{number}");
            hosts.push(lab.host(&name).only(Family::V4).public(&v4, &v6)?.build()?);
        }
        let controller = Controller::start(&lab, &host, &setting.binaries)?;
        let absent = PEERS - ACTIVE;
        setting.output.step(&format!("joining {absent} nodes that do not run"));
        let uses = absent.to_string();
        let token = controller.operator().token_with(&["--site", "far", "--uses", &uses])?;
        let token: JoinToken = token.token.parse().map_err(|_| anyhow!("invalid join token"))?;
        let directory = lab.directory().join("absent");
        host.namespace().run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(join_all(&directory, &token, absent))
        })?;
        setting.output.step("starting the agent and the ten nodes that exchange traffic with it");
        let socket = UapiSocket::unique();
        let measured =
            format!("[link]\nname = {:?}\n[metrics]\nlisten = \"{METRICS}\"\n", socket.link);
        let mut nodes = Vec::new();
        for (number, host) in hosts.iter().enumerate() {
            let name = host.name().to_owned();
            let more = if number == 0 { measured.as_str() } else { "" };
            let mut node = Node::new(&lab, &Arc::clone(host), &name, &setting.binaries, more)?;
            node.join(&controller.operator().token(&format!("site-{number}"))?)?;
            if number == 0 {
                count(&node)?;
            }
            node.restart()?;
            nodes.push(node);
        }
        let one = &nodes[0];
        wait_for("map of all nodes", START_LIMIT, || {
            self.peers = one.peers()?.len();
            Ok((self.peers == PEERS).then_some(()))
        })?;
        let targets: Vec<IpAddr> =
            nodes[1..].iter().map(Node::overlay_v4).collect::<anyhow::Result<_>>()?;
        wait_for("metrics of the agent", START_LIMIT, || {
            Ok(one.host().namespace().run(scrape).ok())
        })?;
        self.wg_peers = self.list_peers(setting, one, &socket.link)?;
        setting.output.step("waiting until the work of the start is done");
        self.send_traffic(one, &targets, SETTLE)?;
        // These were not part of a measurement.
        self.scrapes = 0;
        setting.output.step(&format!("measuring with traffic for {} s", WINDOW.as_secs()));
        let keepalives = counted(one, KEEPALIVES)?;
        let pid = nodes[0].agent()?.pid();
        let one = &nodes[0];
        let (begun, before) = (Instant::now(), processor_time(pid)?);
        self.send_traffic(one, &targets, WINDOW)?;
        let (window, after) = (begun.elapsed().as_secs_f64(), processor_time(pid)?);
        let peers = one.peers()?;
        self.active = peers.iter().filter(|peer| peer.is_up()).count();
        self.window_s = round(window);
        self.agent_cpu_pct = round((after - before).as_secs_f64() / window * 100.0);
        self.agent_rss_mb = round(resident_mb(pid)?);
        self.handshakes = counted(one, HANDSHAKES)?;
        let keepalives = counted(one, KEEPALIVES)? - keepalives;
        self.keepalives_per_s = round(keepalives as f64 / window);
        setting.output.step(&format!("measuring without traffic for {} s", WINDOW.as_secs()));
        self.send_traffic(one, &[], SETTLE)?;
        let handshakes = counted(one, HANDSHAKES)?;
        let (begun, before) = (Instant::now(), processor_time(pid)?);
        self.send_traffic(one, &[], WINDOW)?;
        let (window, after) = (begun.elapsed().as_secs_f64(), processor_time(pid)?);
        self.idle_pct = round((after - before).as_secs_f64() / window * 100.0);
        self.rss_mb = round(resident_mb(pid)?);
        self.idle_handshakes = counted(one, HANDSHAKES)? - handshakes;
        promises.hold(self.active == ACTIVE, || format!("{ACTIVE} peers up: {}", self.active));
        for (what, percent) in [("agent_cpu_pct", self.agent_cpu_pct), ("idle_pct", self.idle_pct)]
        {
            promises.hold(percent < CPU_PCT, || format!("{what} below {CPU_PCT}: {percent}"));
        }
        promises.hold(self.idle_handshakes <= ACTIVE as u64, || {
            format!("at most {ACTIVE} initiations without traffic: {}", self.idle_handshakes)
        });
        for (what, size) in [("agent_rss_mb", self.agent_rss_mb), ("rss_mb", self.rss_mb)] {
            promises.hold(size < RSS_MB, || format!("{what} below {RSS_MB}: {size}"));
        }
        if let Some(shown) = self.wg_peers {
            promises.hold(shown == PEERS, || format!("wg show prints {PEERS} peers: {shown}"));
        }
        Ok(())
    }

    /// Returns the number of peers that `wg show` prints. `None` if it cannot be run here.
    fn list_peers(
        &mut self,
        setting: &Setting,
        node: &Node,
        link: &str,
    ) -> anyhow::Result<Option<usize>> {
        let version = Command::new("wg").arg("--version").stdout(Stdio::null()).status();
        let why = match version {
            _ if setting.rank == Rank::Rootless => {
                "only root may create sockets in /run/wireguard: run as root".to_owned()
            }
            Err(error) => format!("cannot run wg: {error}: install wireguard-tools"),
            Ok(_) => {
                let program = Program::new("wg").args(["show", link, "peers"]);
                let shown = program.run_ok(node.host().namespace(), WG_LIMIT)?;
                return Ok(Some(shown.lines().count()));
            }
        };
        self.skipped.push(Skipped { name: "wg_peers".to_owned(), why });
        Ok(None)
    }

    /// Sends datagrams to all targets for this time, and reads the metrics at its beginning and every [`SCRAPE`].
    fn send_traffic(
        &mut self,
        node: &Node,
        targets: &[IpAddr],
        time: Duration,
    ) -> anyhow::Result<()> {
        let (mut scrapes, mut bytes, mut longest) = (0, 0_usize, Duration::ZERO);
        node.host().namespace().run(|| {
            let socket = UdpSocket::bind((IpAddr::from([0, 0, 0, 0]), 0))?;
            let begun = Instant::now();
            let end = begun + time;
            let mut due = begun;
            while Instant::now() < end {
                if Instant::now() >= due {
                    due += SCRAPE;
                    let asked = Instant::now();
                    bytes = bytes.max(scrape()?);
                    longest = longest.max(asked.elapsed());
                    scrapes += 1;
                }
                for target in targets {
                    // UDP port of the discard service (RFC 863). An error shows later in the number of
                    // active peers.
                    let _ = socket.send_to(b"towline", SocketAddr::new(*target, 9));
                }
                sleep(PACE.min(end.saturating_duration_since(Instant::now())))?;
            }
            Ok(())
        })?;
        self.scrapes += scrapes;
        self.scrape_bytes = self.scrape_bytes.max(bytes);
        self.scrape_ms = self.scrape_ms.max(round(longest.as_secs_f64() * 1e3));
        Ok(())
    }
}

/// Socket of `wg show` of the measured agent. Dropping it removes what a killed agent leaves.
struct UapiSocket {
    /// Name of the link. It is unique, because all links of the machine have their sockets in one directory.
    link: String,
}

impl UapiSocket {
    fn unique() -> Self {
        Self { link: format!("tl{}", std::process::id()) }
    }
}

impl Drop for UapiSocket {
    fn drop(&mut self) {
        // There is none if the agent could not create it.
        let _ = std::fs::remove_file(uapi::socket(&self.link));
    }
}

/// Reads the agent's metrics as Prometheus does, and returns their size in bytes.
fn scrape() -> anyhow::Result<usize> {
    let mut stream = TcpStream::connect(METRICS)?;
    stream.set_read_timeout(Some(SCRAPE_LIMIT))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the metrics have no body")?;
    let is_complete = head.contains(" 200 ") && body.contains("towline_peers_without_series ");
    anyhow::ensure!(is_complete, "the agent does not answer with its metrics: {head}");
    Ok(body.len())
}

/// Joins `count` nodes and publishes a record for each. They do not run.
async fn join_all(directory: &Path, token: &JoinToken, count: usize) -> anyhow::Result<()> {
    use tokio_stream::StreamExt as _;
    let mut waiting = tokio_stream::iter(0..count).map(|number| {
        let state = directory.join(number.to_string());
        let token = token.clone();
        async move { publish(&state, &token, number).await }
    });
    let mut running = tokio::task::JoinSet::new();
    loop {
        interrupt::check()?;
        if running.len() < AT_ONCE
            && let Some(next) = waiting.next().await
        {
            running.spawn(next);
            continue;
        }
        match running.join_next().await {
            Some(done) => done.context("a join panicked")??,
            None => return Ok(()),
        }
    }
}

/// Joins one node and publishes its record.
async fn publish(directory: &Path, token: &JoinToken, number: usize) -> anyhow::Result<()> {
    let state = StateDir::open(directory)?;
    join::join(&state, token, &format!("absent-{number}").parse()?, 0).await?;
    let (membership, keys) = (state.require_membership()?, state.keys()?);
    let chain = state.certificate()?.context("the join returned no certificate")?;
    let config = tls::member(&membership.ca, Some((&chain, &keys.identity)))?;
    let address = token.controllers.first().context("the token has no controller")?;
    let connection = dial::dial(address, Arc::new(config), 0).await?;
    let mut client = join::client(connection.channel);
    let start = pb::WatchStart { instance_id: vec![1; 16], ..pb::WatchStart::default() };
    let (requests, stream) = tokio::sync::mpsc::channel(1);
    requests.send(pb::WatchRequest { kind: Some(pb::watch_request::Kind::Start(start)) }).await?;
    let mut watch = client.watch(ReceiverStream::new(stream)).await?.into_inner();
    let Some(pb::watch_response::Kind::Ready(ready)) =
        watch.message().await?.and_then(|first| first.kind)
    else {
        anyhow::bail!("the controller did not accept the watch");
    };
    // No host has this address.
    let address = SocketAddr::from(([203, 0, 113, 250], 10_000 + number as u16));
    let candidates = Candidate::new(CandidateKind::Configured, address).into_iter().collect();
    let record = Record { candidates, ..record(&membership.grant) };
    let record = Some(keys.identity.sign_record(&pb::Record::from(&record)));
    client.publish(pb::PublishRequest { record, session_id: ready.session_id }).await?;
    Ok(())
}

/// Name of the nftables table with the counters.
const TABLE: &str = "count";
/// Name of the chain with the counters.
const CHAIN: &str = "output";
/// Name of the counter of handshake initiations.
const HANDSHAKES: &str = "handshakes";
/// Name of the counter of keepalives.
const KEEPALIVES: &str = "keepalives";

/// Loads nftables rules that count packets from the WireGuard port by their length: the length of
/// an IPv4 and a UDP header plus that of a message of fixed size.
fn count(node: &Node) -> anyhow::Result<()> {
    /// `NFT_META_LEN`. The expressions below use register 1 and `NFT_CMP_EQ`.
    const META_LENGTH: u32 = 0;
    let long = |message: u32, name: &str| {
        let length = Expression::Meta { key: META_LENGTH, register: 1 };
        let value = (20 + 8 + message).to_ne_bytes().to_vec();
        let equal = Expression::Compare { register: 1, operator: 0, value };
        let udp = Rule::new().protocol(libc::IPPROTO_UDP as u8).source_port(51830);
        udp.step(length).step(equal).counter().comment(name)
    };
    let chain = Chain::base(ChainKind::Filter, Hook::Output, 0)
        .rules([long(148, HANDSHAKES), long(32, KEEPALIVES)]);
    node.host().namespace().run(|| {
        Nft::open()?.load(&Table::new(TableFamily::Inet, TABLE).chain(CHAIN, chain))?;
        Ok(())
    })
}

/// Returns the value of a counter that [`count`] has set up.
fn counted(node: &Node, name: &str) -> anyhow::Result<u64> {
    node.host().namespace().run(|| {
        let table = Nft::open()?
            .read(TableFamily::Inet, TABLE)?
            .context("the table of counters does not exist")?;
        Ok(table.counter(CHAIN, name).context("there is no such counter")?.packets)
    })
}

impl Figures for Many {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut lines = vec![
            format!(
                "{} peers, {} of them active, for {} s:",
                self.peers, self.active, self.window_s
            ),
            format!(
                "  {} % of a core, {} MB resident, {} initiations since the start, {} keepalives a second",
                self.agent_cpu_pct, self.agent_rss_mb, self.handshakes, self.keepalives_per_s
            ),
            format!(
                "without traffic: {} % of a core, {} MB resident (bounds: {} %, {} MB), {} initiations",
                self.idle_pct,
                self.rss_mb,
                self.idle_pct_max,
                self.rss_mb_max,
                self.idle_handshakes
            ),
            format!(
                "metrics read {} times: at most {} ms and {} bytes",
                self.scrapes, self.scrape_ms, self.scrape_bytes
            ),
        ];
        lines.extend(self.wg_peers.map(|shown| format!("wg show prints {shown} peers")));
        lines.extend(self.skipped.iter().map(Skipped::to_string));
        lines.join("\n")
    }
}
