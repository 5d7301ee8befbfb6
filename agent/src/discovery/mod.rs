//! Discovery client: a task that keeps a session with a controller.
//!
//! A session consists of a watch (the map arrives, heartbeats go both ways) and of publishing this
//! node's record. When it ends for any reason, the next session is tried after a jittered backoff,
//! with the next controller of the list. The list is the configured one; if none is configured, it has
//! the controllers of the mesh's configuration and then those of the join token. Host names in it are
//! resolved at each attempt. The watch resumes from the last received revision. Established tunnels are
//! not affected: only a signed tombstone removes a peer.
//!
//! The task verifies what it receives, caches it on the disk, and sends it to the daemon as
//! [`Event`]s. It reads what to publish from a watch channel of [`Announcement`]s.

mod open;
mod session;
mod stored_map;

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::Rng as _;
use rustls_pki_types::CertificateDer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tonic::transport::Channel;
use towline_core::mesh::MapChange;
use towline_proto::backoff::{Backoff, Jitter};
use towline_proto::code::Coded as _;
use towline_proto::frame::ProbeVersion;
use towline_proto::id::NodeId;
use towline_proto::node::{Candidate, Grant, Record};
use towline_proto::pb::watch_response::Kind;
use towline_proto::summary::MeshSummary;
use towline_proto::token::ControllerAddress;
use towline_proto::{limits, pb, refusal, signed};
use towline_service::certificate;

use crate::join::{self, status_message};
use crate::map_cache::{IdentityAlert, MapCache};
use crate::not_connected::NotConnected;
pub use crate::removals::Removals;
use crate::state::{Counters, Keys, Membership, StateDir, StateError};
use session::{Ended, Session};
use stored_map::Journal;

/// Delay between sessions. The jitter keeps many agents from reconnecting at the same time.
const BACKOFF: Backoff =
    Backoff::new(Duration::from_millis(250), Duration::from_secs(15), Jitter::Half);
/// Maximum time for the controller's answer when this node leaves.
const LEAVE_ANSWER: Duration = Duration::from_secs(30);
/// Shortest time between two records. Each one is sent to every node of the mesh, so a machine whose addresses change
/// all the time must not make all others work as often.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(2);
/// Delay after which a refused record is published again.
const PUBLISH_RETRY: Duration = Duration::from_secs(30);
/// Delay after which the certificate is renewed again if the controller could not do so.
const RENEWAL_RETRY: Duration = Duration::from_secs(60);
/// Number of missed heartbeats that end a session.
const MISSED: u32 = 3;
/// Number of different reasons that are logged once each. A controller that is away for days is news once,
/// not at each attempt.
const LOGGED_REASONS: usize = 16;
/// Minimum interval between writes of the cached map.
const CACHE_INTERVAL: Duration = Duration::from_secs(1);

/// Content of this node's record, before it is numbered and signed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Announcement {
    /// Addresses at which the node might be reached.
    pub candidates: Vec<Candidate>,
    /// Networks that are reached through the node.
    pub prefixes: Vec<ipnet::IpNet>,
    /// Those of `prefixes` that are networks of machines, such as a LAN, rather than of pods.
    pub lans: Vec<ipnet::IpNet>,
    /// True if the node relays for others.
    pub relay: bool,
    /// TCP port of the node's Kubernetes API server, if it has one.
    pub api_port: Option<NonZeroU16>,
}

/// Event that the task sends to the daemon.
#[derive(Debug)]
pub enum Event {
    /// A session was opened.
    Connected {
        /// Address of the controller.
        address: ControllerAddress,
        /// Addresses of the controller's STUN reflectors.
        reflectors: Vec<SocketAddr>,
    },
    /// The name of a controller was resolved, before it is dialled.
    Resolved {
        /// Name and port of the controller.
        address: ControllerAddress,
        /// Addresses that the name has now.
        remotes: Vec<SocketAddr>,
    },
    /// The session ended, or could not be opened.
    Disconnected {
        /// Reason for the operator.
        reason: NotConnected,
    },
    /// These parts of the map changed.
    Map(Vec<MapChange>),
    /// The controller changed the identity of nodes, or tried to.
    Identity(Vec<IdentityAlert>),
    /// The controller sent a message, so it is alive.
    Heard {
        /// Current revision of the map.
        revision: u64,
        /// True once this session delivered everything that the controller had when it began. Until then the
        /// map may lack removals.
        is_synced: bool,
    },
    /// Another node sent a sealed signal to this node.
    Signal(Vec<u8>),
    /// The list of controllers changed.
    Controllers(Vec<ControllerAddress>),
    /// The grant of this node changed.
    Grant(Box<Grant>),
    /// Peers knew a later start of this node than its state: this is the boot epoch from now on.
    BootEpoch(u64),
    /// The controller accepted this node's record, with these remarks (prefixes that other nodes
    /// hold), or refused it for this reason.
    Published(Result<Vec<String>, String>),
    /// The client certificate that is in use changed.
    Certificate {
        /// End of the certificate, in seconds since 1970.
        expires_at: i64,
    },
}

/// Command of the daemon to the task.
#[derive(Debug)]
pub enum Command {
    /// Leave the mesh permanently.
    Leave(oneshot::Sender<Result<(), String>>),
    /// Send a sealed signal to another node, if that node is connected too. It is dropped if there
    /// is no session.
    Signal(NodeId, Vec<u8>),
    /// Send a summary of the tunnels to the controller, for its operators. It is dropped if there is no
    /// session.
    Summary(Box<MeshSummary>),
    /// Return the removals since a time, for a peer that asks.
    Removals {
        /// Time in seconds since 1970.
        since: i64,
        /// Receiver of the removals.
        reply: oneshot::Sender<Removals>,
    },
    /// Verify a tombstone that a peer sent, and remove its node.
    Removed(pb::Signed),
}

/// State of the discovery task.
#[derive(Debug)]
pub struct Discovery {
    state: Arc<StateDir>,
    keys: Keys,
    membership: Membership,
    /// Controllers of the configuration, which override all others. Empty: there are none.
    configured: watch::Receiver<Vec<ControllerAddress>>,
    /// Effective list of controllers.
    controllers: Vec<ControllerAddress>,
    /// Number of attempts since the list changed, and the place of the first one. Each attempt takes the next one of
    /// the list.
    attempt: usize,
    mark: u32,
    certificate: Vec<CertificateDer<'static>>,
    counters: Counters,
    map: MapCache,
    instance: [u8; 16],
    /// Record that was signed last. Each new session publishes it again, unchanged.
    current: Option<(Announcement, pb::Signed)>,
    /// Journal of the stored map.
    journal: Journal,
    /// True once the map showed that the state was restored from an older copy.
    is_restored: bool,
    events: mpsc::Sender<Event>,
}

/// Parameters of a new task.
#[derive(Debug)]
pub struct Setup {
    /// State directory of the node.
    pub state: Arc<StateDir>,
    /// The node's keys.
    pub keys: Keys,
    /// Membership of the node.
    pub membership: Membership,
    /// Controllers of the configuration, which override those of the membership. Empty: there are
    /// none.
    pub configured: watch::Receiver<Vec<ControllerAddress>>,
    /// Routing mark for the task's sockets.
    pub mark: u32,
    /// Map from the cache file.
    pub map: MapCache,
    /// Counters with this start's boot epoch.
    pub counters: Counters,
}

impl Discovery {
    /// Creates a task, to be run with [`Self::run`]. It sends its events to `events`.
    pub fn new(setup: Setup, events: mpsc::Sender<Event>) -> Result<Self, StateError> {
        let certificate = setup.state.certificate()?.unwrap_or_default();
        let controllers = join::controllers(&setup.configured.borrow(), &setup.membership);
        let is_configured = !setup.configured.borrow().is_empty();
        let attempt = first_attempt(setup.membership.grant.node_id, is_configured);
        Ok(Self {
            state: setup.state,
            keys: setup.keys,
            membership: setup.membership,
            configured: setup.configured,
            controllers,
            attempt,
            mark: setup.mark,
            certificate,
            counters: setup.counters,
            map: setup.map,
            instance: rand::rng().random(),
            current: None,
            journal: Journal::default(),
            is_restored: false,
            events,
        })
    }

    /// Runs until the daemon drops its ends of the channels, or the node leaves.
    pub async fn run(
        mut self,
        mut announcements: watch::Receiver<Option<Announcement>>,
        mut commands: mpsc::Receiver<Command>,
    ) {
        // Number of consecutive sessions that could not be opened.
        let mut failures = 0;
        let mut logged = Vec::new();
        loop {
            if self.update_controllers().await.is_err() {
                return;
            }
            let index = self.attempt % self.controllers.len().max(1);
            let Some(address) = self.controllers.get(index).cloned() else { return };
            self.attempt += 1;
            let ended =
                self.session(&address, &mut announcements, &mut commands, &mut failures).await;
            let reason = match ended {
                Ended::Stop => return,
                Ended::Because(reason) => reason,
            };
            if let NotConnected::Refused(status) = &reason
                && self.take_tombstone(status).await.is_err()
            {
                return;
            }
            let (text, code) = (reason.to_string(), reason.code());
            if failures == 0 || logged.len() == LOGGED_REASONS {
                logged.clear();
            }
            if logged.contains(&text) {
                tracing::debug!(controller = %address, reason = text, code, "discovery session ended");
            } else {
                tracing::info!(controller = %address, reason = text, code, "discovery session ended");
                logged.push(text.clone());
            }
            let asked = asked_pause(&reason, rand::rng().random());
            if self.events.send(Event::Disconnected { reason }).await.is_err() {
                return;
            }
            let pause = BACKOFF.pause(failures, rand::rng().random()).max(asked);
            failures = failures.saturating_add(1);
            if !self.wait(pause, &text, &mut commands).await {
                return;
            }
        }
    }

    /// Updates the effective list of controllers, and reports it if it changed.
    async fn update_controllers(&mut self) -> Result<(), Ended> {
        let controllers = join::controllers(&self.configured.borrow_and_update(), &self.membership);
        if controllers == self.controllers {
            return Ok(());
        }
        self.controllers.clone_from(&controllers);
        let is_configured = !self.configured.borrow().is_empty();
        self.attempt = first_attempt(self.membership.grant.node_id, is_configured);
        tracing::info!(?controllers, "list of controllers changed");
        self.events.send(Event::Controllers(controllers)).await.map_err(|_| Ended::Stop)
    }

    /// Waits for the backoff and refuses commands that need a session. Ends early if other
    /// controllers are configured. Returns false if the task must stop.
    async fn wait(
        &mut self,
        backoff: Duration,
        reason: &str,
        commands: &mut mpsc::Receiver<Command>,
    ) -> bool {
        let pause = sleep(backoff);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => return true,
                // The list is read before the next attempt.
                changed = self.configured.changed() => return changed.is_ok(),
                command = commands.recv() => match command {
                    Some(Command::Leave(reply)) => {
                        let _ = reply.send(Err(reason.to_owned()));
                    }
                    Some(Command::Signal(..) | Command::Summary(_)) => {}
                    Some(Command::Removals { since, reply }) => {
                        let _ = reply.send(self.map.removals(since));
                    }
                    Some(Command::Removed(tombstone)) => {
                        if self.learn_removal(tombstone).await.is_err() {
                            return false;
                        }
                    }
                    None => return false,
                },
            }
        }
    }

    /// Opens a session and runs it until it ends. Resets `failures` once it is open.
    async fn session(
        &mut self,
        address: &ControllerAddress,
        announcements: &mut watch::Receiver<Option<Announcement>>,
        commands: &mut mpsc::Receiver<Command>,
        failures: &mut u32,
    ) -> Ended {
        let mut session = match self.open(address).await {
            Ok(session) => session,
            Err(ended) => return ended,
        };
        *failures = 0;
        tracing::debug!(controller = %address, revision = self.map.position().1, "discovery session opened");
        if self
            .events
            .send(Event::Connected {
                address: address.clone(),
                reflectors: std::mem::take(&mut session.reflectors),
            })
            .await
            .is_err()
        {
            return Ended::Stop;
        }
        let result = self.follow(&mut session, announcements, commands).await;
        // The map is stored even if the session failed.
        self.save_map(&mut session).await;
        match result {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    /// Takes over the epoch, the mesh configuration and the grant of the first message.
    async fn take_ready(&mut self, ready: &pb::WatchReady) -> Result<(), Ended> {
        self.map.enter_epoch(ready.epoch);
        self.take_head(ready.head.clone());
        if let Some(mesh) = &ready.mesh {
            let mesh = pb::change::Kind::Mesh(mesh.clone());
            self.take_changes(pb::Changes::of([mesh], 0)).await?;
        }
        if let Some(grant) = &ready.grant {
            self.take_grant(grant.clone()).await?;
        }
        Ok(())
    }

    /// Takes over a head of the map. Returns whether it is newer than the present one.
    fn take_head(&mut self, head: Option<pb::Signed>) -> bool {
        let Some(head) = head else { return false };
        self.map.take_head(head).unwrap_or_else(|error| {
            tracing::warn!(%error, "invalid head of the map ignored");
            false
        })
    }

    /// Takes over a new grant, for example after the controller pinned a block of a pod range.
    async fn take_grant(&mut self, signed_grant: pb::Signed) -> Result<(), Ended> {
        if signed_grant == self.membership.signed_grant {
            return Ok(());
        }
        let grant: Grant = signed::grant(Some(&signed_grant), &self.membership.ca_key)
            .map_err(|error| NotConnected::InvalidStatement(error.to_string()))?;
        if grant.node_id != self.membership.grant.node_id {
            return Err(NotConnected::InvalidResponse("it sent another node's grant").into());
        }
        // No controller may give this node's id other keys.
        if grant.identity_key != self.keys.identity.public()
            || !grant.wireguard_keys.contains(&self.keys.wireguard.public())
        {
            return Err(NotConnected::InvalidResponse("it sent a grant for other keys").into());
        }
        self.membership.grant = grant.clone();
        self.membership.signed_grant = signed_grant;
        kept(self.state.store_membership(&self.membership));
        self.events.send(Event::Grant(Box::new(grant))).await.map_err(|_| Ended::Stop)
    }

    /// Runs an open session: exchanges messages until an error or a command ends it.
    async fn follow(
        &mut self,
        session: &mut Session,
        announcements: &mut watch::Receiver<Option<Announcement>>,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Result<std::convert::Infallible, Ended> {
        let mut beat = interval(session.heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let timeout = session.heartbeat * MISSED;
        let mut deadline = Instant::now() + timeout;
        let renewal = sleep(until_renewal(&self.certificate, SystemTime::now()));
        tokio::pin!(renewal);
        announcements.mark_changed();
        loop {
            let retry = session.retry_publish.unwrap_or_else(|| Instant::now() + PUBLISH_RETRY);
            let save = session.map_saved + CACHE_INTERVAL;
            tokio::select! {
                message = session.incoming.message() => {
                    deadline = Instant::now() + timeout;
                    self.take_message(session, message?).await?;
                }
                () = sleep_until(deadline) => {
                    return Err(NotConnected::MissedHeartbeats.into());
                }
                _ = beat.tick() => {
                    session.has_address()?;
                    session.beat(self.map.position().1)?;
                }
                changed = announcements.changed() => {
                    changed.map_err(|_| Ended::Stop)?;
                    // A change of this machine's addresses is one of the announcement.
                    session.has_address()?;
                    let announcement = announcements.borrow_and_update().clone();
                    match session.publishable_at() {
                        // The announcement of that time is published.
                        Some(at) => session.retry_publish = Some(at),
                        None => self.publish(session, announcement).await?,
                    }
                }
                () = sleep_until(retry), if session.retry_publish.is_some() => {
                    session.retry_publish = None;
                    let announcement = announcements.borrow().clone();
                    self.publish(session, announcement).await?;
                }
                () = sleep_until(save), if session.map_dirty => self.save_map(session).await,
                () = &mut renewal => {
                    self.try_renew(session.channel.clone()).await?;
                    self.certificate_event().await?;
                    let next = until_renewal(&self.certificate, SystemTime::now());
                    let next = next.max(RENEWAL_RETRY);
                    renewal.as_mut().reset(Instant::now() + next);
                }
                changed = self.configured.changed() => {
                    changed.map_err(|_| Ended::Stop)?;
                    self.update_controllers().await?;
                    if !self.controllers.contains(&session.address) {
                        return Err(NotConnected::OtherControllers.into());
                    }
                }
                command = commands.recv() => {
                    match command {
                        Some(Command::Leave(reply)) => self.leave(session, reply).await?,
                        Some(Command::Signal(to, body)) => session.signal(to, body)?,
                        Some(Command::Summary(summary)) => session.summary(&summary)?,
                        Some(Command::Removals { since, reply }) => {
                            let _ = reply.send(self.map.removals(since));
                        }
                        Some(Command::Removed(tombstone)) => self.learn_removal(tombstone).await?,
                        None => return Err(Ended::Stop),
                    }
                }
            }
        }
    }

    /// Handles a message of the watch.
    async fn take_message(
        &mut self,
        session: &mut Session,
        message: Option<pb::WatchResponse>,
    ) -> Result<(), Ended> {
        let Some(message) = message else {
            return Err(NotConnected::Ended.into());
        };
        match message.kind {
            Some(Kind::Changes(changes)) => {
                let synced = changes.synced;
                let had_signed = self.current.is_some();
                self.take_changes(changes).await?;
                if had_signed && self.current.is_none() {
                    session.published = false;
                    session.retry_publish = Some(Instant::now());
                }
                session.map_dirty = true;
                session.is_synced |= synced;
                if synced {
                    self.save_map(session).await;
                }
            }
            Some(Kind::Signal(signal)) => {
                if signal.body.len() <= limits::SIGNAL_BYTES {
                    let event = Event::Signal(signal.body);
                    self.events.send(event).await.map_err(|_| Ended::Stop)?;
                }
                return Ok(());
            }
            Some(Kind::Heartbeat(heartbeat)) => {
                session.map_dirty |= self.take_head(heartbeat.head);
            }
            // A second `Ready` and unknown messages are ignored.
            Some(Kind::Ready(_)) | None => {}
        }
        let revision = self.map.position().1;
        let event = Event::Heard { revision, is_synced: session.is_synced };
        self.events.send(event).await.map_err(|_| Ended::Stop)
    }

    /// Applies changes to the map and sends the valid ones to the daemon.
    async fn take_changes(&mut self, changes: pb::Changes) -> Result<(), Ended> {
        let applied = self.map.apply(changes);
        for reason in applied.refused {
            tracing::warn!(%reason, "invalid statement in the map ignored");
        }
        self.catch_up().await?;
        if self.membership.update(&self.map) {
            // The next start needs it before it has the map, for the list of controllers.
            kept(self.state.store_membership(&self.membership));
            self.update_controllers().await?;
        }
        if !applied.alerts.is_empty() {
            let event = Event::Identity(applied.alerts);
            self.events.send(event).await.map_err(|_| Ended::Stop)?;
        }
        if let Some(grant) = applied.own_grant {
            match self.take_grant(grant).await {
                Err(Ended::Because(reason)) => {
                    tracing::warn!(%reason, "grant of this node in the map ignored");
                }
                taken => taken?,
            }
        }
        if applied.changes.is_empty() {
            return Ok(());
        }
        self.events.send(Event::Map(applied.changes)).await.map_err(|_| Ended::Stop)
    }

    /// Takes over the counters of the map's record of this node, if another start of the agent published
    /// it. If that was a later one, the state was restored from an older copy: the record that was signed
    /// since is void, and peers only know this start by a higher boot epoch.
    async fn catch_up(&mut self) -> Result<(), Ended> {
        let Some(record) = self.map.own_record() else { return Ok(()) };
        let Counters { boot_epoch, generation } = self.counters;
        let is_own = self.current.is_some() && record.boot_epoch == boot_epoch;
        if record.generation < generation || record.generation == generation && is_own {
            return Ok(());
        }
        self.counters.generation = record.generation;
        let is_behind = record.boot_epoch >= boot_epoch;
        // Once only: two machines with the same state would never cease.
        if self.is_restored || !is_behind && self.current.is_none() {
            return Ok(());
        }
        tracing::warn!(
            "the map has a later record of this node: the state was restored from an older copy"
        );
        self.is_restored = true;
        self.current = None;
        if !is_behind {
            return Ok(());
        }
        self.counters.boot_epoch = record.boot_epoch.saturating_add(1);
        let event = Event::BootEpoch(self.counters.boot_epoch);
        self.events.send(event).await.map_err(|_| Ended::Stop)
    }

    /// Publishes the record, unless this session already published the same one.
    async fn publish(
        &mut self,
        session: &mut Session,
        announcement: Option<Announcement>,
    ) -> Result<(), Ended> {
        let Some(announcement) = announcement else { return Ok(()) };
        let unchanged = self.current.as_ref().is_some_and(|(have, _)| *have == announcement);
        if unchanged && session.published {
            return Ok(());
        }
        let signed = match &self.current {
            Some((_, signed)) if unchanged => signed.clone(),
            _ => self.sign(announcement)?,
        };
        let request = pb::PublishRequest { record: Some(signed), session_id: session.id.clone() };
        let result = match session.client.publish(request).await {
            Ok(answer) => {
                session.published = true;
                session.published_at = Some(Instant::now());
                Ok(answer.into_inner().refused.into_iter().map(|refused| refused.reason).collect())
            }
            Err(status) if is_about_the_record(&status) => {
                session.retry_publish = Some(Instant::now() + PUBLISH_RETRY);
                let reason = status_message(&status);
                tracing::warn!(%reason, "record refused");
                Err(reason)
            }
            Err(status) => return Err(status.into()),
        };
        self.events.send(Event::Published(result)).await.map_err(|_| Ended::Stop)
    }

    /// Numbers and signs an announcement. The number is stored before it is used, if the disk
    /// allows it. If it is lost, the map contains the last one.
    fn sign(&mut self, announcement: Announcement) -> Result<pb::Signed, Ended> {
        self.counters.generation = self.counters.generation.saturating_add(1);
        kept(self.state.store_counters(self.counters));
        let record = Record {
            node_id: self.membership.grant.node_id,
            generation: self.counters.generation,
            boot_epoch: self.counters.boot_epoch,
            wireguard_keys: vec![self.keys.wireguard.public()],
            candidates: announcement.candidates.iter().copied().take(limits::CANDIDATES).collect(),
            prefixes: announcement.prefixes.iter().copied().take(limits::PREFIXES).collect(),
            version: towline_proto::VERSION.to_owned(),
            relay: announcement.relay,
            lans: announcement.lans.iter().copied().take(limits::PREFIXES).collect(),
            probe_version: ProbeVersion::OWN,
            api_port: announcement.api_port,
        };
        let signed = self.keys.identity.sign_record(&pb::Record::from(&record));
        self.current = Some((announcement, signed.clone()));
        Ok(signed)
    }

    /// Renews the client certificate, and takes over the grant in the response.
    async fn renew(&mut self, channel: Channel) -> Result<(), Ended> {
        let (chain, grant) = join::renew(channel, &self.keys.identity).await?;
        kept(self.state.store_certificate(&chain));
        self.certificate = chain;
        tracing::info!("certificate renewed");
        if let Some(grant) = grant {
            self.take_grant(grant).await?;
        }
        Ok(())
    }

    async fn certificate_event(&self) -> Result<(), Ended> {
        let expires_at = self
            .certificate
            .first()
            .and_then(|leaf| certificate::validity(leaf))
            .map_or(0, |(_, end)| end);
        self.events.send(Event::Certificate { expires_at }).await.map_err(|_| Ended::Stop)
    }

    async fn leave(
        &self,
        session: &mut Session,
        reply: oneshot::Sender<Result<(), String>>,
    ) -> Result<(), Ended> {
        // Nobody waits any more: the operator was told that this node stays.
        if reply.is_closed() {
            return Ok(());
        }
        let answer = timeout(LEAVE_ANSWER, session.client.leave(pb::LeaveRequest {})).await;
        let Ok(answer) = answer else {
            let _ = reply.send(Err(NotConnected::NoAnswer.to_string()));
            // If it removed this node all the same, the next session gets the tombstone.
            return Err(NotConnected::NoAnswer.into());
        };
        match answer {
            Ok(_) => match reply.send(Ok(())) {
                Ok(()) => Err(Ended::Stop),
                Err(_) => Err(NotConnected::Removed.into()),
            },
            Err(status) => {
                let _ = reply.send(Err(status_message(&status)));
                Ok(())
            }
        }
    }
}

/// Returns the pause that a controller asked for when it refused a call, plus up to half of it: nodes that were
/// refused together must not come back together. Zero if it asked for none. `random` is uniform in 0 to 1.
fn asked_pause(reason: &NotConnected, random: f64) -> Duration {
    let NotConnected::Refused(status) = reason else { return Duration::ZERO };
    let asked = refusal::retry_after(status).unwrap_or_default();
    asked.mul_f64(1.0 + random.clamp(0.0, 1.0) / 2.0)
}

/// Logs a failed write. The value is used anyway: the state directory keeps it in memory, and the
/// status reports it.
fn kept(stored: Result<(), StateError>) {
    if let Err(error) = stored {
        tracing::warn!(%error, "not stored for the next start");
    }
}

/// Returns the place of the controller that a node tries first, modulo the length of the list. The mesh's own list is
/// one of equal controllers, over which the nodes are spread by their random ids. A list in the configuration of the
/// node is tried in its order.
fn first_attempt(node: NodeId, is_configured: bool) -> usize {
    let [.., high, low] = node.0;
    if is_configured { 0 } else { usize::from(u16::from_be_bytes([high, low])) }
}

/// Returns whether the controller refused the record itself, so that another session would not
/// help.
fn is_about_the_record(status: &tonic::Status) -> bool {
    matches!(
        status.code(),
        tonic::Code::InvalidArgument
            | tonic::Code::AlreadyExists
            | tonic::Code::PermissionDenied
            | tonic::Code::ResourceExhausted
    )
}

/// Returns the time until two thirds of the certificate's life have passed. Zero if there is no
/// certificate.
fn until_renewal(chain: &[CertificateDer<'_>], now: SystemTime) -> Duration {
    let Some((from, until)) = chain.first().and_then(|leaf| certificate::validity(leaf)) else {
        return Duration::ZERO;
    };
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let due = from + (until - from) / 3 * 2;
    Duration::from_secs(u64::try_from(due).unwrap_or(0).saturating_sub(now))
}

fn renewal_due(chain: &[CertificateDer<'_>], now: SystemTime) -> bool {
    until_renewal(chain, now).is_zero()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_that_a_controller_asks_for_is_kept_and_spread() {
        let refused = tonic::Status::unavailable("full");
        let silent = NotConnected::Refused(refused.clone());
        assert_eq!(asked_pause(&silent, 0.5), Duration::ZERO);
        let asked = refusal::with_retry_after(refused, Duration::from_secs(8));
        let asked = NotConnected::Refused(asked);
        let pauses = [0.0, 0.5, 1.0].map(|random| asked_pause(&asked, random).as_secs());
        assert_eq!(pauses, [8, 10, 12]);
        assert_eq!(asked_pause(&NotConnected::NoAnswer, 1.0), Duration::ZERO);
    }

    #[test]
    fn nodes_are_spread_over_the_controllers_of_the_mesh_but_not_over_configured_ones() {
        let node = |low| {
            let mut id = [7; 16];
            id[15] = low;
            NodeId(id)
        };
        let places: std::collections::BTreeSet<usize> =
            (0..3).map(|low| first_attempt(node(low), false) % 3).collect();
        assert_eq!(places.len(), 3);
        assert_eq!(first_attempt(node(2), true), 0);
    }

    #[test]
    fn no_certificate_is_renewed_at_once() {
        assert!(renewal_due(&[], SystemTime::now()));
    }
}
