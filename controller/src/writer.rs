//! The writer: the one thread that owns registry and store.
//!
//! Requests wait in a bounded queue. The writer takes what is there, applies one after the other
//! to the registry in memory, stores what they changed in one transaction, shows it to the
//! watchers, and only then answers: acknowledged means stored, and nothing is shown that is not.
//! The disk is waited for once for all requests that came meanwhile.
//!
//! When a transaction fails, none of its requests happened: the registry is loaded anew from the
//! store, and the callers are told why.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::authority::Authority;
use crate::clock::Now;
use crate::map::Map;
use crate::registry::sessions::Sessions;
use crate::registry::{Event, LoadError, Registry};
use crate::store::{OpenError, Store};

/// Requests that may wait.
const QUEUE: usize = 1024;
/// Requests that are stored in one transaction.
const BATCH: usize = 256;

/// Where requests are handed in. [`Writer::stop`], or dropping the last one, ends the writer.
#[derive(Clone)]
pub struct Writer {
    queue: mpsc::Sender<Message>,
}

/// The request did not happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the controller cannot store anything now: {0}")]
pub struct Unavailable(Arc<str>);

enum Message {
    Job(Job),
    /// Take no more, finish what waits, end.
    Stop,
}

/// Given the registry, applies itself and returns what will answer its caller; given a reason why
/// it cannot be, answers its caller at once.
type Job =
    Box<dyn FnOnce(Result<(&mut Registry, &Sessions, Now), Unavailable>) -> Option<Answer> + Send>;
type Answer = Box<dyn FnOnce(Result<(), Unavailable>) + Send>;

/// The registry as the store has it.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The store cannot be opened or read.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What it holds is no registry.
    #[error("{path} is damaged: {error}; restore it from a backup")]
    Load {
        /// The store's file.
        path: String,
        /// What is wrong.
        error: LoadError,
    },
}

/// Reads the registry out of an open store.
pub fn read(store: &Store, authority: Arc<Authority>, now: Now) -> Result<Registry, ReadError> {
    let path = || store.path().display().to_string();
    Registry::load(authority, store.load()?, now)
        .map_err(|error| ReadError::Load { path: path(), error })
}

/// Starts the writer's thread. The receiver resolves when it has ended.
pub fn start(
    store: Store,
    registry: Registry,
    authority: Arc<Authority>,
    map: Arc<Map>,
    sessions: Arc<Mutex<Sessions>>,
) -> std::io::Result<(Writer, oneshot::Receiver<()>)> {
    let (queue, requests) = mpsc::channel(QUEUE);
    let (ended, has_ended) = oneshot::channel();
    map.apply(registry.epoch(), registry.revision(), registry.snapshot());
    let thread = Thread { store, registry, authority, map, sessions, broken: false };
    std::thread::Builder::new().name("store".into()).spawn(move || {
        thread.run(requests);
        let _ = ended.send(());
    })?;
    Ok((Writer { queue }, has_ended))
}

impl Writer {
    /// Applies `request`, and returns its result once what it changed is on the disk.
    pub async fn run<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut Registry, &Sessions, Now) -> T + Send + 'static,
    ) -> Result<T, Unavailable> {
        let stopping = || Unavailable("it is stopping".into());
        let (answer, answered) = oneshot::channel();
        // The caller may have gone when it is answered; what it asked for is done all the same.
        let job: Job = Box::new(move |state| match state {
            Ok((registry, sessions, now)) => {
                let result = request(registry, sessions, now);
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

    /// Ends the writer once it has answered what was handed in before; whoever still holds a
    /// handle is refused from then on.
    pub async fn stop(&self) {
        // It has ended already, if nobody receives this.
        let _ = self.queue.send(Message::Stop).await;
    }
}

struct Thread {
    store: Store,
    registry: Registry,
    authority: Arc<Authority>,
    map: Arc<Map>,
    sessions: Arc<Mutex<Sessions>>,
    /// Registry and store may differ, after a failed transaction.
    broken: bool,
}

impl Thread {
    fn run(mut self, mut requests: mpsc::Receiver<Message>) {
        while let Some(first) = requests.blocking_recv() {
            let mut batch = Vec::new();
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Job(job) => batch.push(job),
                    Message::Stop => requests.close(),
                }
                next = if batch.len() < BATCH { requests.try_recv().ok() } else { None };
            }
            self.serve(batch);
        }
    }

    fn serve(&mut self, batch: Vec<Job>) {
        if let Err(unavailable) = self.mend() {
            for job in batch {
                job(Err(unavailable.clone()));
            }
            return;
        }
        let now = Now::read();
        let answers: Vec<Answer> = {
            let sessions = self.sessions.lock();
            batch
                .into_iter()
                .filter_map(|job| job(Ok((&mut self.registry, &sessions, now))))
                .collect()
        };
        let stored = self.store();
        for answer in answers {
            answer(stored.clone());
        }
    }

    /// Stores and shows what the registry changed.
    fn store(&mut self) -> Result<(), Unavailable> {
        let changes = self.registry.take_changes();
        if !changes.writes.is_empty() {
            let expected = self.store.sequence();
            if let Err(error) = self.store.commit(expected, &changes.writes) {
                tracing::error!(%error, "store");
                self.broken = true;
                return Err(Unavailable(error.to_string().into()));
            }
            self.map.apply(self.registry.epoch(), self.registry.revision(), changes.map);
        }
        changes.events.iter().for_each(log);
        Ok(())
    }

    /// After a failed transaction: opens the store again, and loads the registry from it.
    fn mend(&mut self) -> Result<(), Unavailable> {
        if !self.broken {
            return Ok(());
        }
        let reread = self.store.reopen().map_err(ReadError::from);
        let registry = reread.and_then(|()| read(&self.store, self.authority.clone(), Now::read()));
        match registry {
            Ok(registry) => {
                self.map.apply(registry.epoch(), registry.revision(), registry.snapshot());
                self.registry = registry;
                self.broken = false;
                tracing::info!("store works again");
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "store");
                Err(Unavailable(error.to_string().into()))
            }
        }
    }
}

fn log(event: &Event) {
    match event {
        Event::Joined { name, node, token } => tracing::info!(%name, %node, %token, "node joined"),
        Event::Removed { name, node, why } => tracing::info!(%name, %node, why, "node removed"),
        Event::PrefixMoved { prefix, from, to } => {
            tracing::warn!(%prefix, %from, %to, "prefix moved");
        }
        Event::TokenCreated { token } => tracing::info!(%token, "token created"),
        Event::TokenRevoked { token } => tracing::info!(%token, "token revoked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::token::{SecretHash, TokenTerms};
    use crate::state_dir::StateDir;
    use std::collections::BTreeMap;
    use std::time::Duration;
    use towline_proto::id::TokenId;
    use towline_proto::node::MeshConfig;
    use towline_proto::token::TokenSecret;

    fn create_token(id: u8) -> impl FnOnce(&mut Registry, &Sessions, Now) -> bool + Send {
        move |registry, _, now| {
            let terms = TokenTerms {
                uses: 1,
                name: None,
                site: None,
                labels: BTreeMap::new(),
                allowed_prefixes: Vec::new(),
                replace: None,
                ephemeral: false,
            };
            let hash = SecretHash::of(&TokenSecret([id; 32]));
            registry.create_token(TokenId([id; 8]), hash, terms, i64::MAX, now).is_ok()
        }
    }

    #[tokio::test]
    async fn a_failed_transaction_is_told_undone_and_got_over() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        let authority = Arc::new(Authority::load_or_create(&dir, true, 0).unwrap());
        let mut registry = Registry::create(
            authority.clone(),
            MeshConfig {
                mesh_id: authority.mesh_id(),
                overlay_v6: "fd00::/64".parse().unwrap(),
                overlay_v4: "198.19.0.0/16".parse().unwrap(),
                protected: Vec::new(),
                trusted_sites: Vec::new(),
                bypass_when_down: Vec::new(),
                lease: Duration::from_secs(600),
                generation: 1,
            },
        );
        let store = Store::create(&dir.store(), &registry.take_changes().writes).unwrap();
        store.fail_next_commit();
        let sessions = Arc::new(Mutex::new(Sessions::new(Duration::from_secs(1))));
        let (writer, ended) =
            start(store, registry, authority, Arc::new(Map::new()), sessions).unwrap();

        let error = writer.run(create_token(1)).await.unwrap_err();
        assert!(error.to_string().contains("free space"), "{error}");
        assert!(writer.run(create_token(2)).await.unwrap());
        let tokens = |registry: &mut Registry, _: &Sessions, _| -> Vec<TokenId> {
            registry.tokens(None).map(|(token, _)| token.id).collect()
        };
        assert_eq!(writer.run(tokens).await.unwrap(), [TokenId([2; 8])]);
        writer.stop().await;
        ended.await.unwrap();
        assert!(writer.run(tokens).await.is_err(), "a handle that is left is of no use");
        let store = Store::open(&dir.store()).unwrap();
        assert_eq!(
            store.load().unwrap().iter().filter(|(k, _)| k.starts_with("token/")).count(),
            1
        );
    }
}
