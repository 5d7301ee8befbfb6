//! `cargo lab many`: measures the cost of one agent in a mesh of 1,000 nodes, most of which send no
//! traffic.
//!
//! The agent and the ten nodes that exchange traffic with it are real. The other nodes have joined
//! and published a record, but do not run.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
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
use crate::lab::privilege::Rank;
use crate::lab::process::{processor_time, resident_mb};
use crate::lab::report::{Figures, Promises, round};
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
    /// Number of handshake initiations that the agent has sent since its start.
    pub handshakes: u64,
    /// Number of keepalives per second that the agent sent during the measurement.
    pub keepalives_per_s: f64,
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
/// Upper bound of [`Many::agent_cpu_pct`].
const CPU_PCT: f64 = 1.0;
/// Upper bound of [`Many::agent_rss_mb`].
const RSS_MB: f64 = 60.0;
/// Number of joins that run at the same time.
const AT_ONCE: usize = 8;
/// Interval between two datagrams to each active peer.
const PACE: Duration = Duration::from_millis(500);

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Many> {
    let mut figures = Many { rootless: setting.rank == Rank::Rootless, ..Many::default() };
    let mut promises = Promises::new();
    if let Err(error) = figures.measure(setting, &mut promises) {
        promises.fail(format!("{error:#}"));
    }
    figures.failed = promises.into_failed();
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
        let mut nodes = Vec::new();
        for (number, host) in hosts.iter().enumerate() {
            let name = host.name().to_owned();
            let mut node = Node::new(&lab, &Arc::clone(host), &name, &setting.binaries, "")?;
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
        setting.output.step("waiting until the agent is idle");
        send_traffic(one, &targets, SETTLE)?;
        setting.output.step(&format!("measuring for {} s", WINDOW.as_secs()));
        let keepalives = counted(one, KEEPALIVES)?;
        let pid = nodes[0].agent()?.pid();
        let one = &nodes[0];
        let (begun, before) = (Instant::now(), processor_time(pid)?);
        send_traffic(one, &targets, WINDOW)?;
        let (window, after) = (begun.elapsed().as_secs_f64(), processor_time(pid)?);
        let peers = one.peers()?;
        self.active = peers.iter().filter(|peer| peer.is_up()).count();
        self.window_s = round(window);
        self.agent_cpu_pct = round((after - before).as_secs_f64() / window * 100.0);
        self.agent_rss_mb = round(resident_mb(pid)?);
        self.handshakes = counted(one, HANDSHAKES)?;
        let keepalives = counted(one, KEEPALIVES)? - keepalives;
        self.keepalives_per_s = round(keepalives as f64 / window);
        promises.hold(self.active == ACTIVE, || format!("{ACTIVE} peers up: {}", self.active));
        promises.hold(self.agent_cpu_pct < CPU_PCT, || {
            format!("agent_cpu_pct below {CPU_PCT}: {}", self.agent_cpu_pct)
        });
        promises.hold(self.agent_rss_mb < RSS_MB, || {
            format!("agent_rss_mb below {RSS_MB}: {}", self.agent_rss_mb)
        });
        Ok(())
    }
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

/// Sends datagrams to all targets for this time.
fn send_traffic(node: &Node, targets: &[IpAddr], time: Duration) -> anyhow::Result<()> {
    node.host().namespace().run(|| {
        let socket = UdpSocket::bind((IpAddr::from([0, 0, 0, 0]), 0))?;
        let end = Instant::now() + time;
        while Instant::now() < end {
            for target in targets {
                // UDP port of the discard service (RFC 863). An error shows later in the number of
                // active peers.
                let _ = socket.send_to(b"towline", SocketAddr::new(*target, 9));
            }
            sleep(PACE.min(end.saturating_duration_since(Instant::now())))?;
        }
        Ok(())
    })
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
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{} peers, {} of them active, for {} s:",
            self.peers, self.active, self.window_s
        );
        let _ = write!(
            text,
            "  {} % of a core, {} MB resident, {} initiations, {} keepalives a second",
            self.agent_cpu_pct, self.agent_rss_mb, self.handshakes, self.keepalives_per_s
        );
        text
    }
}
