//! A light agent. It connects, joins and signs with the agent's code, but has a session of its own, which
//! keeps no map.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use memchr::memmem;
use parking_lot::Mutex;
use prost::Message as _;
use rustls::ClientConfig;
use rustls_pki_types::CertificateDer;
use tokio::net::TcpSocket;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;
use towline_agent::keys::{Identity, Wireguard};
use towline_agent::state::Keys;
use towline_agent::{dial, join, tls};
use towline_proto::backoff::{Backoff, Jitter};
use towline_proto::pb;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::pb::watch_request::Kind as Ask;
use towline_proto::pb::watch_response::Kind as Answer;
use towline_proto::token::{ControllerAddress, JoinToken};

/// Beginning of the version in a record, before the number of the mark.
const MARK: &str = "scale-";
/// Digits of a mark's number.
const DIGITS: usize = 8;
/// Number of marks that a run can use.
const MARKS: usize = 4_096;
/// Pauses between attempts to connect, as an agent makes them.
const BACKOFF: Backoff =
    Backoff::new(Duration::from_millis(250), Duration::from_secs(15), Jitter::Half);
/// Longest time of an attempt to connect.
const OPEN: Duration = Duration::from_secs(30);

/// What the light agents report.
pub(super) struct Report {
    joined: AtomicUsize,
    synced: AtomicUsize,
    /// Number of changes that all agents received.
    pub(super) changes: AtomicU64,
    marks: Vec<Mark>,
    next_mark: AtomicUsize,
    snapshot: Mutex<Option<Duration>>,
    error: Mutex<Option<String>>,
    disconnect: Mutex<String>,
    stopped: AtomicBool,
}

/// A numbered change.
#[derive(Default)]
struct Mark {
    begun: Mutex<Option<Instant>>,
    /// Times until each agent had it, in milliseconds, by the agent's number.
    latencies: Mutex<BTreeMap<usize, f64>>,
}

impl Report {
    pub(super) fn new() -> Self {
        Self {
            joined: AtomicUsize::new(0),
            synced: AtomicUsize::new(0),
            changes: AtomicU64::new(0),
            marks: (0..MARKS).map(|_| Mark::default()).collect(),
            next_mark: AtomicUsize::new(0),
            snapshot: Mutex::new(None),
            error: Mutex::new(None),
            disconnect: Mutex::new(String::new()),
            stopped: AtomicBool::new(false),
        }
    }

    /// Returns the number of agents that have joined.
    pub(super) fn joined(&self) -> usize {
        self.joined.load(Ordering::Relaxed)
    }

    /// Returns the number of agents that are connected and have the whole map.
    pub(super) fn synced(&self) -> usize {
        self.synced.load(Ordering::Relaxed)
    }

    /// Begins a new mark and returns its number.
    pub(super) fn begin_mark(&self) -> usize {
        let mark = self.next_mark.fetch_add(1, Ordering::Relaxed);
        *self.marks[mark].begun.lock() = Some(Instant::now());
        mark
    }

    /// Returns the number of agents that have received a mark.
    pub(super) fn received(&self, mark: usize) -> usize {
        self.marks[mark].latencies.lock().len()
    }

    /// Returns how long a mark took to each agent, in milliseconds.
    pub(super) fn latencies(&self, mark: usize) -> Vec<f64> {
        self.marks[mark].latencies.lock().values().copied().collect()
    }

    pub(super) fn snapshot(&self) -> Option<Duration> {
        *self.snapshot.lock()
    }

    pub(super) fn set_snapshot(&self, time: Duration) {
        *self.snapshot.lock() = Some(time);
    }

    /// Fails if an agent met an error that it cannot recover from.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        match &*self.error.lock() {
            Some(error) => anyhow::bail!("{error}"),
            None => Ok(()),
        }
    }

    /// Tells the agents that errors do not matter any more.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Returns the reason of the last disconnect.
    pub(super) fn last_disconnect(&self) -> String {
        self.disconnect.lock().clone()
    }

    fn disconnected(&self, error: &anyhow::Error) {
        *self.disconnect.lock() = format!("{error:#}");
    }

    /// Records an error, which [`Report::check`] returns. Only the first one is kept.
    pub(super) fn fail(&self, error: &anyhow::Error) {
        if !self.stopped.load(Ordering::Relaxed) {
            self.error.lock().get_or_insert_with(|| format!("{error:#}"));
        }
    }

    fn receive(&self, agent: usize, changes: &[impl AsRef<[u8]>]) {
        self.changes.fetch_add(changes.len() as u64, Ordering::Relaxed);
        for change in changes {
            let Some(mark) = mark_in(change.as_ref()) else { continue };
            let Some(mark) = self.marks.get(mark) else { continue };
            let Some(begun) = *mark.begun.lock() else { continue };
            let took = begun.elapsed().as_secs_f64() * 1000.0;
            // After a reconnect an agent may receive a mark again.
            mark.latencies.lock().entry(agent).or_insert(took);
        }
    }
}

/// Returns the number of the mark in an encoded change.
fn mark_in(change: &[u8]) -> Option<usize> {
    let at = memmem::find(change, MARK.as_bytes())? + MARK.len();
    std::str::from_utf8(change.get(at..at + DIGITS)?).ok()?.parse().ok()
}

/// A node that has joined.
pub(super) struct Member {
    /// Number of the agent.
    pub(super) number: usize,
    keys: Keys,
    grant: pb::Grant,
    config: Arc<ClientConfig>,
}

impl Member {
    /// Joins the mesh, and counts the join.
    pub(super) async fn join(
        number: usize,
        token: &JoinToken,
        report: &Report,
    ) -> anyhow::Result<Self> {
        let keys = Keys { identity: Identity::generate()?, wireguard: Wireguard::generate()? };
        let connection = dial(number, Arc::new(tls::joining(token.ca)?)).await?;
        let ca = tls::pinned_ca(&connection.chain, token.ca).context("another CA answered")?;
        let mut client = join::client(connection.channel);
        let hello = client.hello(pb::HelloRequest {}).await?.into_inner();
        let request = join::request(token, &format!("agent-{number}").parse()?, &keys, &hello)?;
        let answer = client.join(request).await?.into_inner();
        let chain: Vec<CertificateDer<'static>> =
            answer.certificate_chain.into_iter().map(CertificateDer::from).collect();
        let config = tls::member(&ca, Some((&chain, &keys.identity)))?;
        let grant = pb::Grant::decode(answer.grant.context("no grant")?.body)?;
        report.joined.fetch_add(1, Ordering::Relaxed);
        Ok(Self { number, keys, grant, config: Arc::new(config) })
    }

    /// Receives the whole map once and returns the time that it took.
    pub(super) async fn snapshot(&self) -> anyhow::Result<Duration> {
        let connection = dial(self.number, self.config.clone()).await?;
        let mut client = join::client(connection.channel);
        let begun = Instant::now();
        let mut watch = Watch::open(&mut client, self.number, (0, 0)).await?;
        loop {
            match watch.next().await? {
                Some(Answer::Changes(changes)) if changes.synced => return Ok(begun.elapsed()),
                _ => {}
            }
        }
    }

    fn record(&self, generation: u64, version: String) -> pb::Signed {
        let record = pb::Record {
            node_id: self.grant.node_id.clone(),
            generation,
            boot_epoch: 1,
            wireguard_keys: self.grant.wireguard_keys.clone(),
            candidates: vec![pb::Candidate {
                kind: pb::CandidateKind::Local.into(),
                address: source(self.number).octets().to_vec(),
                port: 51_830,
            }],
            prefixes: Vec::new(),
            lans: Vec::new(),
            probe_version: 0,
            api_port: 0,
            version,
            relay: false,
        };
        self.keys.identity.sign_record(&record)
    }
}

/// An open watch.
struct Watch {
    requests: mpsc::Sender<pb::WatchRequest>,
    responses: Streaming<pb::WatchResponse>,
    session: Vec<u8>,
    epoch: u64,
    heartbeat: Duration,
}

impl Watch {
    async fn open(
        client: &mut DiscoveryClient<Channel>,
        number: usize,
        (epoch, revision): (u64, u64),
    ) -> anyhow::Result<Self> {
        let (requests, stream) = mpsc::channel(4);
        let instance_id = (number as u64).to_be_bytes().to_vec();
        let start = pb::WatchStart { epoch, revision, instance_id, ..pb::WatchStart::default() };
        requests.send(pb::WatchRequest { kind: Some(Ask::Start(start)) }).await?;
        let mut responses = client.watch(ReceiverStream::new(stream)).await?.into_inner();
        let first = responses.message().await?.and_then(|first| first.kind);
        let Some(Answer::Ready(ready)) = first else { anyhow::bail!("the watch did not start") };
        let heartbeat = Duration::from_millis(ready.heartbeat_ms.into());
        let (session, epoch) = (ready.session_id, ready.epoch);
        Ok(Self { requests, responses, session, epoch, heartbeat })
    }

    async fn next(&mut self) -> anyhow::Result<Option<Answer>> {
        let message = self.responses.message().await?.context("the watch ended")?;
        Ok(message.kind)
    }
}

/// A light agent.
pub(super) struct LightAgent {
    member: Arc<Member>,
    report: Arc<Report>,
    /// Permits to open a connection, so that not all open at the same time.
    opening: Arc<Semaphore>,
    epoch: u64,
    revision: u64,
    generation: u64,
}

impl LightAgent {
    pub(super) fn new(member: Arc<Member>, report: Arc<Report>, opening: Arc<Semaphore>) -> Self {
        Self { member, report, opening, epoch: 0, revision: 0, generation: 0 }
    }

    /// Keeps a watch open, and publishes a record for each mark that `changes` has.
    pub(super) async fn run(mut self, mut changes: mpsc::UnboundedReceiver<usize>) {
        let mut failures = 0;
        loop {
            match self.session(&mut changes, &mut failures).await {
                Ok(()) => return,
                Err(error) => self.report.disconnected(&error),
            }
            let pause = BACKOFF.pause(failures, rand::random());
            failures += 1;
            sleep(pause).await;
        }
    }

    async fn session(
        &mut self,
        changes: &mut mpsc::UnboundedReceiver<usize>,
        failures: &mut u32,
    ) -> anyhow::Result<()> {
        let permit = self.opening.clone().acquire_owned().await?;
        let (mut client, mut watch) = timeout(OPEN, self.open()).await.context("no answer")??;
        drop(permit);
        *failures = 0;
        if self.epoch != watch.epoch {
            (self.epoch, self.revision) = (watch.epoch, 0);
        }
        let mut synced = Synced { report: &self.report.clone(), is_counted: false };
        let mut beat = interval(watch.heartbeat);
        loop {
            tokio::select! {
                answer = watch.next() => {
                    let Some(Answer::Changes(message)) = answer? else { continue };
                    self.report.receive(self.member.number, &message.changes);
                    self.revision = message.revision;
                    if message.synced && !synced.is_counted {
                        if self.generation == 0 {
                            self.publish(&mut client, &watch, String::new()).await?;
                        }
                        synced.count();
                    }
                }
                mark = changes.recv() => {
                    let Some(mark) = mark else { return Ok(()) };
                    let version = format!("{MARK}{mark:0DIGITS$}");
                    self.publish(&mut client, &watch, version).await?;
                }
                _ = beat.tick() => {
                    let heartbeat = pb::Heartbeat { revision: self.revision, head: None };
                    let heartbeat = pb::WatchRequest { kind: Some(Ask::Heartbeat(heartbeat)) };
                    // A full queue means that the connection does not drain; the controller ends it.
                    let _ = watch.requests.try_send(heartbeat);
                }
            }
        }
    }

    async fn open(&self) -> anyhow::Result<(DiscoveryClient<Channel>, Watch)> {
        let connection = dial(self.member.number, self.member.config.clone()).await?;
        let mut client = join::client(connection.channel);
        let position = (self.epoch, self.revision);
        let watch = Watch::open(&mut client, self.member.number, position).await?;
        Ok((client, watch))
    }

    async fn publish(
        &mut self,
        client: &mut DiscoveryClient<Channel>,
        watch: &Watch,
        version: String,
    ) -> anyhow::Result<()> {
        self.generation += 1;
        let record = Some(self.member.record(self.generation, version));
        client.publish(pb::PublishRequest { record, session_id: watch.session.clone() }).await?;
        Ok(())
    }
}

/// Counts an agent as synced until it is dropped.
struct Synced<'a> {
    report: &'a Report,
    is_counted: bool,
}

impl Synced<'_> {
    fn count(&mut self) {
        self.is_counted = true;
        self.report.synced.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Synced<'_> {
    fn drop(&mut self) {
        if self.is_counted {
            self.report.synced.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Returns the address that an agent connects from. No two agents share one.
fn source(number: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x7f01_0000 + 1 + number as u32)
}

/// Connects to the controller from the agent's own address.
async fn dial(number: usize, config: Arc<ClientConfig>) -> anyhow::Result<dial::Connection> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((source(number), 0)))?;
    socket.set_nodelay(true)?;
    let remote = SocketAddr::from((Ipv4Addr::LOCALHOST, 7443));
    let stream = socket.connect(remote).await.context("cannot connect to the controller")?;
    let address: ControllerAddress = remote.to_string().parse()?;
    Ok(dial::over(stream, &address, config).await?)
}
