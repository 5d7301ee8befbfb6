//! The writer: the only thread that owns the ledger and the store.
//!
//! Requests wait in a bounded queue. The writer takes all queued requests, applies them in order to
//! the ledger in memory, signs what is new, stores the changes in one transaction, publishes them in
//! the map and the view, and only then answers. So a change is stored before it is acknowledged or
//! published, and the queued requests share one fsync. What only reads does not wait here.
//!
//! Where other controllers use the same store, the writer takes the turn to write for each batch, and
//! first applies what the others wrote. In between it follows them ([`Writer::refresh`]).
//!
//! If a commit fails, all its callers get the error and nothing is published. The ledger is then
//! loaded again from the store, which decides whether the changes took effect.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use towline_proto::code::Coded as _;

use crate::authority::Authority;
use crate::clock;
use crate::counters::Counters;
use crate::entropy;
use crate::events::{Events, MeshEvent};
use crate::ledger::{self, Ledger, LedgerChanges};
use crate::map::Map;
use crate::store::etcd::EtcdError;
use crate::store::{OpenError, Record, Store};
use crate::stored::key_text;
use crate::view::View;
use towline_registry::sessions::Sessions;
use towline_registry::{Event, Key, Now};

/// Largest number of requests in the queue.
const QUEUE: usize = 1024;
/// Largest number of requests in one transaction.
const BATCH: usize = 256;
/// Shortest pause after the store was read and its content cannot be used, until it is read again. The longest one is
/// twice as long. Only an operator can change that, and each attempt reads the whole store.
const UNUSABLE_PAUSE: Duration = Duration::from_secs(30);

/// Handle to the writer's queue. The writer ends after [`Writer::stop`], or when the last handle is
/// dropped.
#[derive(Clone)]
pub struct Writer {
    queue: mpsc::Sender<Message>,
    /// True if other controllers use the store, too.
    is_shared: bool,
}

/// Error of a request whose changes could not be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the controller cannot store changes: {0}")]
pub struct Unavailable(Arc<str>);

impl Unavailable {
    fn of(error: &dyn std::error::Error) -> Self {
        Self(error.to_string().into())
    }
}

/// Message in the writer's queue.
enum Message {
    /// A request of a caller.
    Job(Job),
    /// A backup of the store, after the requests before it.
    Backup(oneshot::Sender<Result<Vec<Record>, Unavailable>>),
    /// Apply what other controllers wrote. The answer is whether that succeeded.
    Refresh(oneshot::Sender<bool>),
    /// Accept no more requests, finish the queued ones and end.
    Stop,
}

/// A request. Called with the ledger, it applies itself and returns the function that answers the
/// caller. Called with an error, it answers the caller at once.
type Job =
    Box<dyn FnOnce(Result<(&mut Ledger, &Sessions, Now), Unavailable>) -> Option<Answer> + Send>;
/// Function that answers the caller of a request, with the result of the transaction.
type Answer = Box<dyn FnOnce(Result<(), Unavailable>) + Send>;

/// Error of loading the ledger from the store.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The store cannot be opened or read.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The records in the store are invalid.
    #[error("{path} is damaged: {error}: restore it from a backup")]
    Load {
        /// Name of the store.
        path: String,
        /// Description of the damage.
        error: ledger::ReadError,
    },
}

impl LoadError {
    /// Returns whether the store was read and its content cannot be used, so that soon the same would be read again.
    fn is_content(&self) -> bool {
        match self {
            Self::Load { .. } => true,
            Self::Open(error) => matches!(
                error,
                OpenError::Etcd(
                    EtcdError::Format { .. }
                        | EtcdError::Damaged { .. }
                        | EtcdError::OtherMesh { .. }
                        | EtcdError::OtherAuthority { .. }
                        | EtcdError::Empty(_)
                )
            ),
        }
    }
}

/// State that readers share. Only the writer changes the map and the view.
#[derive(Clone)]
pub struct Published {
    /// Map that watchers see.
    pub map: Arc<Map>,
    /// Nodes and tokens that operators see.
    pub view: Arc<View>,
    /// Sessions of the connected nodes.
    pub sessions: Arc<Mutex<Sessions>>,
    /// Counters of the commits.
    pub counters: Arc<Counters>,
    /// What happened lately, for operators.
    pub events: Arc<Events>,
}

/// Loads the ledger from an open store. With `migrate`, records of earlier versions are taken, which are not
/// authenticated.
pub fn read(
    store: &mut dyn Store,
    authority: Arc<Authority>,
    migrate: bool,
    now: Now,
) -> Result<Ledger, LoadError> {
    let records = store.load()?;
    parse(store, authority, &records, migrate, now)
}

fn parse(
    store: &dyn Store,
    authority: Arc<Authority>,
    records: &[Record],
    migrate: bool,
    now: Now,
) -> Result<Ledger, LoadError> {
    Ledger::load(authority, records, migrate, now)
        .map_err(|error| LoadError::Load { path: store.name(), error })
}

/// Opens a store again after a failed commit, and loads the ledger from it. A store that is shared has begun a turn
/// then, unless this fails.
pub fn reload(
    store: &mut dyn Store,
    authority: Arc<Authority>,
    migrate: bool,
    now: Now,
) -> Result<Ledger, LoadError> {
    store.reopen()?;
    let loaded = read(store, authority, migrate, now);
    if loaded.is_err() {
        store.end_turn();
    }
    loaded
}

/// Logs that the first commit of a migration succeeded, which authenticated all records.
pub(crate) fn log_migrated() {
    tracing::warn!("store migrated: start without --migrate-store from now on");
}

/// Replaces all records of a store by those that an earlier version wrote, which are not authenticated.
#[cfg(test)]
pub(crate) fn remove_authentication(store: &mut dyn Store, authority: &Authority) {
    let secret = authority.store_secret();
    let unauthenticated = |(key, value): Record| {
        let body = secret.open(&key, &value).unwrap().body.to_vec();
        (key, Some(body))
    };
    let writes: Vec<_> = store.load().unwrap().into_iter().map(unauthenticated).collect();
    store.commit(store.sequence(), &writes).unwrap();
}

/// Starts the writer's thread. `migrate` is true if the controller was started to migrate the store. The receiver
/// resolves when the thread has ended.
pub fn start(
    mut store: Box<dyn Store>,
    ledger: Ledger,
    authority: Arc<Authority>,
    migrate: bool,
    published: Published,
) -> std::io::Result<(Writer, oneshot::Receiver<()>)> {
    let (queue, requests) = mpsc::channel(QUEUE);
    let (ended, has_ended) = oneshot::channel();
    let is_shared = store.share();
    {
        let mut sessions = published.sessions.lock();
        sessions.restore(ledger.last_seen());
        if is_shared {
            sessions.share();
        }
    }
    published.replace(&ledger);
    published.counters.set_current_at(clock::now().mono);
    let migrate = migrate && ledger.needs_rewrite();
    let thread = Thread::new(store, ledger, authority, migrate, published);
    std::thread::Builder::new().name("store".into()).spawn(move || {
        thread.run(requests);
        let _ = ended.send(());
    })?;
    Ok((Writer { queue, is_shared }, has_ended))
}

impl Published {
    /// Shows everything that is in the ledger.
    fn replace(&self, ledger: &Ledger) {
        let counters = ledger.counters();
        self.map.apply(counters.epoch, counters.revision, ledger.map());
        self.view.replace(ledger.view());
    }
}

impl Writer {
    /// Applies `request` and returns its result once its changes are on the disk.
    pub async fn run<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut Ledger, &Sessions, Now) -> T + Send + 'static,
    ) -> Result<T, Unavailable> {
        let stopping = || Unavailable("it is stopping: try again".into());
        let (answer, answered) = oneshot::channel();
        // The request is executed even if the caller is gone before it is answered.
        let job: Job = Box::new(move |state| match state {
            Ok((ledger, sessions, now)) => {
                let result = request(ledger, sessions, now);
                Some(Box::new(move |stored: Result<(), Unavailable>| {
                    let _ = answer.send(stored.map(|()| result));
                }))
            }
            Err(unavailable) => {
                let _ = answer.send(Err(unavailable));
                None
            }
        });
        self.queue.send(Message::Job(job)).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }

    /// Returns all records of the store, as they are after the requests that were queued before, and
    /// marked as a backup.
    pub async fn backup(&self) -> Result<Vec<Record>, Unavailable> {
        let stopping = || Unavailable("it is stopping: try again".into());
        let (answer, answered) = oneshot::channel();
        self.queue.send(Message::Backup(answer)).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }

    /// Applies what other controllers wrote, and shows it. Returns whether the store could be read.
    pub async fn refresh(&self) -> bool {
        let (answer, answered) = oneshot::channel();
        // If nothing receives it, the writer has ended.
        self.queue.send(Message::Refresh(answer)).await.is_ok() && answered.await.unwrap_or(false)
    }

    /// Returns whether other controllers use the store, too.
    pub fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Returns the number of requests that wait, and the largest number that can wait.
    pub fn queue(&self) -> (usize, usize) {
        let most = self.queue.max_capacity();
        (most - self.queue.capacity(), most)
    }

    /// Returns a handle to a writer that has ended.
    #[cfg(test)]
    pub(crate) fn ended() -> Self {
        Self { queue: mpsc::channel(QUEUE).0, is_shared: false }
    }

    /// Ends the writer once it has answered all queued requests. Later requests are refused.
    pub async fn stop(&self) {
        // If nothing receives this, the writer has already ended.
        let _ = self.queue.send(Message::Stop).await;
    }
}

/// State of the writer's thread.
struct Thread {
    store: Box<dyn Store>,
    ledger: Ledger,
    authority: Arc<Authority>,
    published: Published,
    /// True if the store may have records that are not authenticated, until the first commit succeeds, which writes
    /// all records.
    migrate: bool,
    /// True after a failed transaction: ledger and store may differ.
    broken: bool,
    /// True after it could not be read what other controllers wrote, until that succeeds.
    is_behind: bool,
    /// Set after the store was read and its content cannot be used, until it can.
    unusable: Option<Unusable>,
}

/// A store whose content cannot be used.
struct Unusable {
    error: Unavailable,
    /// Monotonic time at which the store may be read again.
    retry_at: Instant,
}

impl Thread {
    fn new(
        store: Box<dyn Store>,
        ledger: Ledger,
        authority: Arc<Authority>,
        migrate: bool,
        published: Published,
    ) -> Self {
        Self {
            store,
            ledger,
            authority,
            published,
            migrate,
            broken: false,
            is_behind: false,
            unusable: None,
        }
    }

    fn run(mut self, mut requests: mpsc::Receiver<Message>) {
        while let Some(first) = requests.blocking_recv() {
            let (mut batch, mut backups, mut refreshes) = (Vec::new(), Vec::new(), Vec::new());
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Job(job) => batch.push(job),
                    Message::Backup(answer) => backups.push(answer),
                    Message::Refresh(answer) => refreshes.push(answer),
                    Message::Stop => requests.close(),
                }
                next = if batch.len() < BATCH { requests.try_recv().ok() } else { None };
            }
            if !batch.is_empty() {
                self.serve(batch);
            }
            if !refreshes.is_empty() {
                let is_fresh = self.refresh();
                for answer in refreshes {
                    // The caller may be gone.
                    let _ = answer.send(is_fresh);
                }
            }
            for answer in backups {
                // The caller may be gone.
                let _ = answer.send(self.backup());
            }
        }
    }

    /// Reads the store, which has every change that was answered, and no other.
    fn backup(&mut self) -> Result<Vec<Record>, Unavailable> {
        self.begin_turn()?;
        let loaded = self.store.load();
        self.store.end_turn();
        let mut records = loaded.map_err(|error| Unavailable::of(&error))?;
        self.ledger.mark_backup(&mut records);
        Ok(records)
    }

    fn serve(&mut self, batch: Vec<Job>) {
        if let Err(unavailable) = self.begin_turn() {
            for job in batch {
                job(Err(unavailable.clone()));
            }
            return;
        }
        let now = clock::now();
        let answers: Vec<Answer> = {
            let sessions = self.published.sessions.lock();
            batch
                .into_iter()
                .filter_map(|job| job(Ok((&mut self.ledger, &sessions, now))))
                .collect()
        };
        // Signing and encoding take long. Heartbeats must not wait for them.
        let sessions = &self.published.sessions;
        let changes = self.ledger.take_changes(|| sessions.lock().all_last_seen(now));
        let stored = self.store(changes);
        for answer in answers {
            answer(stored.clone());
        }
    }

    /// Prepares the ledger for requests: nothing is broken, and what other controllers wrote is in it. Until the commit,
    /// they write nothing. If this fails, there is no turn.
    fn begin_turn(&mut self) -> Result<(), Unavailable> {
        self.repair()?;
        if self.is_behind {
            // The others would wait for a controller that cannot use its turn.
            self.follow()?;
        }
        self.store.begin_turn().map_err(|error| {
            tracing::warn!(%error, "cannot take the turn to write");
            Unavailable::of(&error)
        })?;
        let prepared = self.follow().and_then(|()| self.repair());
        if prepared.is_err() {
            self.store.end_turn();
        }
        prepared
    }

    /// Applies what other controllers wrote, outside of a turn. Returns whether that succeeded.
    fn refresh(&mut self) -> bool {
        let is_read = self.broken || self.follow().is_ok();
        if self.broken {
            let is_repaired = self.repair().is_ok();
            if is_repaired {
                self.store.end_turn();
            }
            return is_repaired;
        }
        is_read
    }

    /// Takes over what other controllers wrote. If that is not all that changed, the ledger is broken after it.
    fn follow(&mut self) -> Result<(), Unavailable> {
        let now = clock::now();
        let read = self.store.changes().map_err(|error| {
            tracing::warn!(%error, "cannot read what other controllers wrote");
            Unavailable::of(&error)
        });
        self.is_behind = read.is_err();
        let written = read?;
        if written.is_empty() {
            self.published.counters.set_current_at(now.mono);
            return Ok(());
        }
        let changes = match self.ledger.refresh(&written, now) {
            Ok(changes) => changes,
            Err(error) => {
                tracing::debug!(%error, "reading the whole store");
                self.broken = true;
                return Ok(());
            }
        };
        self.published.counters.set_sequence(self.store.sequence());
        let seen = key_text(Key::LastSeen);
        if written.iter().any(|(key, _)| *key == seen) {
            self.published.sessions.lock().learn(self.ledger.last_seen());
        }
        let counters = self.ledger.counters();
        self.published.map.apply(counters.epoch, counters.revision, changes.map);
        // The controller that found a problem has said so.
        drop(self.published.view.apply(changes.view));
        self.published.counters.set_current_at(now.mono);
        Ok(())
    }

    /// Stores changes, and publishes them in the map and the view.
    fn store(&mut self, changes: LedgerChanges) -> Result<(), Unavailable> {
        if changes.writes.is_empty() {
            self.store.end_turn();
        } else {
            let expected = self.store.sequence();
            let begun = clock::now();
            let committed = self.store.commit(expected, &changes.writes);
            self.published.counters.commit(clock::now().since(begun.mono), committed.is_ok());
            match committed {
                Ok(sequence) => {
                    self.published.counters.set_sequence(sequence);
                    if std::mem::take(&mut self.migrate) {
                        log_migrated();
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "cannot store changes");
                    self.broken = true;
                    return Err(Unavailable(error.to_string().into()));
                }
            }
            let counters = self.ledger.counters();
            self.published.map.apply(counters.epoch, counters.revision, changes.map);
        }
        let mut happened = Vec::new();
        if !changes.view.is_empty() {
            let problems = self.published.view.apply(changes.view).into_iter();
            happened
                .extend(problems.map(|(node, problem)| MeshEvent::NodeProblem { node, problem }));
        }
        changes.events.iter().for_each(log);
        happened.extend(changes.events.into_iter().filter_map(MeshEvent::of));
        for event in &happened {
            if let MeshEvent::NodeProblem { node, problem } = event {
                let code = problem.code();
                tracing::warn!(event = event.code(), %node, code, %problem, "problem of a node");
            }
            self.published.events.add(event);
        }
        Ok(())
    }

    /// Opens the store again and loads the ledger from it, if a transaction failed. A store that is shared has begun a
    /// turn then, unless this fails.
    fn repair(&mut self) -> Result<(), Unavailable> {
        if !self.broken {
            return Ok(());
        }
        let now = clock::now();
        if let Some(unusable) = &self.unusable
            && now.mono < unusable.retry_at
        {
            return Err(unusable.error.clone());
        }
        match self.load(now) {
            Ok(ledger) => {
                self.published.replace(&ledger);
                self.published.counters.set_current_at(now.mono);
                self.published.sessions.lock().learn(ledger.last_seen());
                self.ledger = ledger;
                self.broken = false;
                self.is_behind = false;
                self.unusable = None;
                tracing::info!("store recovered");
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "cannot recover the store");
                let unavailable = Unavailable::of(&error);
                if error.is_content() {
                    let pause = UNUSABLE_PAUSE.mul_f64(1.0 + entropy::fraction());
                    let error = unavailable.clone();
                    self.unusable = Some(Unusable { error, retry_at: now.mono + pause });
                }
                Err(unavailable)
            }
        }
    }

    /// Loads the ledger from the store, which is opened again. If the content could not be used before, it is read
    /// outside of a turn first: other controllers do not wait for that.
    fn load(&mut self, now: Now) -> Result<Ledger, LoadError> {
        let (store, authority) = (&mut *self.store, self.authority.clone());
        if self.unusable.is_some()
            && let Some(records) = store.peek()?
        {
            drop(parse(store, authority.clone(), &records, self.migrate, now)?);
        }
        reload(store, authority, self.migrate, now)
    }
}

fn log(event: &Event) {
    let code = MeshEvent::of(event.clone()).map(|event| event.code());
    match event {
        Event::Joined { name, node, token } => {
            tracing::info!(event = code, %name, %node, %token, "node joined");
        }
        Event::Readmitted { name, node } => {
            tracing::warn!(event = code, %name, %node, "node readmitted: the store did not have it");
        }
        Event::MeshReturned { generation } => {
            tracing::warn!(event = code, generation, "mesh configuration received from a node");
        }
        Event::Removed { name, node, why } => {
            tracing::info!(event = code, %name, %node, why, "node removed");
        }
        Event::RelayDecided { name, node, may_relay } => {
            tracing::info!(event = code, %name, %node, may_relay, "relay role decided");
        }
        Event::PrefixMoved { prefix, from, to } => {
            tracing::warn!(event = code, %prefix, %from, %to, "prefix moved");
        }
        Event::TokenCreated { token } => tracing::info!(event = code, %token, "token created"),
        Event::TokenRevoked { token } => tracing::info!(event = code, %token, "token revoked"),
        Event::LaterHistory { epoch, voided } => tracing::warn!(
            event = code,
            epoch,
            voided_tokens = voided,
            "a node has a later history: this machine was restored from a copy: all watches restart, open tokens \
             and administrators' keys are void"
        ),
        Event::AdminAdded { name, key } => {
            tracing::info!(event = code, name, %key, "administrator added");
        }
        Event::AdminRevoked { name, key } => {
            tracing::info!(event = code, name, %key, "administrator revoked");
        }
    }
}

#[cfg(test)]
mod shared_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::StateDir;
    use crate::store::FileStore;
    use std::collections::BTreeMap;
    use towline_fixtures::node::mesh_config;
    use towline_proto::id::TokenId;
    use towline_proto::node::MeshConfig;
    use towline_registry::token::{SecretHash, TokenTerms};

    pub(super) fn create_token(id: u8) -> impl FnOnce(&mut Ledger, &Sessions, Now) -> bool + Send {
        move |ledger, _, now| {
            let terms = TokenTerms::once();
            let hash = SecretHash([id; 32]);
            let id = TokenId([id; 8]);
            ledger.registry().create_token(id, hash, terms, i64::MAX, now).is_ok()
        }
    }

    pub(super) fn new_ledger(authority: &Arc<Authority>) -> Ledger {
        let config = MeshConfig { mesh_id: authority.mesh_id(), ..mesh_config() };
        Ledger::create(authority.clone(), config)
    }

    pub(super) fn published() -> Published {
        Published {
            map: Arc::new(Map::new()),
            view: Arc::default(),
            sessions: Arc::new(Mutex::new(Sessions::new(Duration::from_secs(1)))),
            counters: Arc::default(),
            events: Arc::new(Events::new(1)),
        }
    }

    #[tokio::test]
    async fn a_migration_survives_a_failed_transaction() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        let authority = Arc::new(Authority::load_or_create(&dir, true, 0).unwrap());
        let writes = new_ledger(&authority).take_changes(BTreeMap::new).writes;
        let mut store = FileStore::create(&dir.store(), &writes).unwrap();
        remove_authentication(&mut store, &authority);
        let ledger = read(&mut store, authority.clone(), true, clock::now()).unwrap();
        store.fail_next_commits(1);
        let (writer, ended) =
            start(Box::new(store), ledger, authority.clone(), true, published()).unwrap();
        assert!(writer.run(create_token(1)).await.is_err());
        assert!(writer.run(create_token(2)).await.unwrap());
        writer.stop().await;
        ended.await.unwrap();
        let mut store = FileStore::open(&dir.store()).unwrap();
        let ledger = read(&mut store, authority, false, clock::now()).unwrap();
        assert!(!ledger.needs_rewrite(), "all records are authenticated");
    }

    #[tokio::test]
    async fn a_failed_transaction_is_told_undone_and_got_over() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        let authority = Arc::new(Authority::load_or_create(&dir, true, 0).unwrap());
        let mut ledger = new_ledger(&authority);
        let writes = ledger.take_changes(BTreeMap::new).writes;
        let store = FileStore::create(&dir.store(), &writes).unwrap();
        store.fail_next_commits(1);
        let published = published();
        let (view, counters) = (published.view.clone(), published.counters.clone());
        let (writer, ended) = start(Box::new(store), ledger, authority, false, published).unwrap();

        let error = writer.run(create_token(1)).await.unwrap_err();
        assert!(error.to_string().contains("free space"), "{error}");
        assert!(view.tokens(None, 9).is_empty(), "what was not stored is not shown");
        assert!(writer.run(create_token(2)).await.unwrap());
        let tokens = view.tokens(None, 9);
        let commits = counters.commits();
        assert_eq!((commits.done, commits.failed), (1, 1));
        assert_eq!(tokens.iter().map(|token| &token.id).collect::<Vec<_>>(), ["0202020202020202"]);
        writer.stop().await;
        ended.await.unwrap();
        assert!(writer.run(create_token(3)).await.is_err(), "a handle that is left is of no use");
        let mut store = FileStore::open(&dir.store()).unwrap();
        assert_eq!(
            store.load().unwrap().iter().filter(|(k, _)| k.starts_with("token/")).count(),
            1
        );
    }
}
