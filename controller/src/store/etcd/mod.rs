//! The store in etcd (API v3), which outlives the machine of a controller.
//!
//! One controller writes the store at a time: the owner. It holds a lease. By default it is the only one that
//! uses the store. When it dies, another controller with the same CA can take over once the lease has ended.
//! Where the store is shared, a controller is the owner for the time of one commit, and reads what the others
//! changed before it decides anything. The key only says whose turn it is: what keeps a late write of the previous
//! owner out is that every transaction compares the head and the owner. See `layout` for the keys.
//!
//! | module | owns |
//! |---|---|
//! | `settings` | the URL and the files, as the configuration says them |
//! | `wire` | etcd's messages |
//! | `errors` | errors, and what the status of a call means |
//! | `layout` | keys, head, and how a commit becomes transactions; no I/O |
//! | `client` | connection, login, and the next member when one fails |
//! | `replicas` | what controllers that share the store tell each other |
//! | `session` | lease, reads and commits |
//! | `thread` | the runtime for all of it, since calls of the store block |

mod client;
mod errors;
mod layout;
mod replicas;
mod session;
mod settings;
mod thread;
mod wire;

use std::sync::Arc;

use tokio::sync::oneshot;

pub use errors::EtcdError;
use layout::Head;
pub(crate) use layout::{recode_head, recode_part, recode_presence};
pub use replicas::{Presence, Replicas, SIGNALS};
use session::{Outcome, Placed, Session};
pub use settings::{
    CertificateFiles, EtcdSettings, EtcdUrl, LoginFile, SCHEME, TlsFiles, UrlError,
};
use thread::EtcdThread;

use super::{CommitError, Identity, OpenError, Record, Store, Write};

/// A store in etcd whose owner is this controller. On drop it becomes free.
pub struct EtcdStore {
    thread: EtcdThread,
    session: Arc<Session>,
    /// Newest known head; `None` if the store has no mesh yet.
    placed: Option<Placed>,
    /// True if the turn to write is taken for each commit and given back with it.
    takes_turns: bool,
    /// Receives the error that ends the use of the store.
    lost: Option<oneshot::Receiver<OpenError>>,
}

impl EtcdStore {
    /// Connects to etcd and becomes the owner of the store, which need not have a mesh.
    ///
    /// # Errors
    ///
    /// [`EtcdError::InUse`] if another controller is the owner, among others.
    pub fn connect(settings: EtcdSettings) -> Result<Self, EtcdError> {
        let session = Arc::new(Session::new(settings)?);
        let thread = EtcdThread::start()?;
        let ours = session.clone();
        let placed = thread.wait(async move {
            let owned = ours.own().await;
            let settled = match owned {
                Ok(()) => ours.settle().await,
                Err(error) => Err(error),
            };
            if settled.is_err() {
                ours.release().await;
            }
            settled
        })?;
        let lost = session.lost();
        let ours = session.clone();
        thread.spawn(async move { ours.keep().await });
        Ok(Self { thread, session, placed, takes_turns: false, lost: Some(lost) })
    }

    /// Reads all records of a store at one revision, without becoming its owner.
    pub fn read(settings: EtcdSettings) -> Result<Vec<Record>, EtcdError> {
        let session = Session::new(settings)?;
        let thread = EtcdThread::start()?;
        let store = session.store().to_owned();
        let read = thread.wait(async move { session.read().await })?;
        read.map(|(_, records)| records).ok_or(EtcdError::Empty(store))
    }

    /// Returns whether the store has a mesh.
    pub fn has_mesh(&self) -> bool {
        self.placed.is_some()
    }

    /// Returns the error that the store has no mesh.
    pub fn missing(&self) -> EtcdError {
        EtcdError::Empty(self.session.store().to_owned())
    }

    /// Sets up the store of a new mesh with `records`.
    ///
    /// # Errors
    ///
    /// [`EtcdError::NotEmpty`] if it has a mesh.
    pub fn create(&mut self, identity: &Identity, records: &[Write]) -> Result<(), EtcdError> {
        let store = || self.session.store().to_owned();
        if self.placed.is_some() {
            return Err(EtcdError::NotEmpty(store()));
        }
        let Identity { mesh, ca } = identity.clone();
        let before = Placed { head: Head::new(mesh, ca), revision: 0 };
        let (session, writes) = (self.session.clone(), records.to_vec());
        let outcome = self.thread.wait(async move {
            session.check_empty().await?;
            session.commit(before, writes, false).await
        })?;
        match outcome {
            Outcome::Done(placed) => {
                self.placed = Some(placed);
                Ok(())
            }
            Outcome::Conflict(_) => Err(EtcdError::NotEmpty(store())),
        }
    }

    /// Checks that the store has a mesh, and that it is the one of this controller's CA.
    pub fn check(&self, identity: &Identity) -> Result<(), EtcdError> {
        let Some(Placed { head, .. }) = &self.placed else { return Err(self.missing()) };
        let store = self.session.store().to_owned();
        let Identity { mesh, ca } = identity.clone();
        if head.mesh != mesh {
            return Err(EtcdError::OtherMesh { store, found: head.mesh.clone(), ours: mesh });
        }
        if head.ca != ca {
            return Err(EtcdError::OtherAuthority { store, found: head.ca.clone(), ours: ca });
        }
        Ok(())
    }

    /// Runs `work`, which has the turn to write or takes it. If it fails, the turn is given back: other controllers must
    /// not wait for one that cannot use it.
    fn in_turn<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, EtcdError>> + Send + 'static,
    ) -> Result<T, EtcdError> {
        let (session, takes_turns) = (self.session.clone(), self.takes_turns);
        self.thread.wait(async move {
            let result = work.await;
            if result.is_err() && takes_turns {
                session.abandon_turn().await;
            }
            result
        })
    }

    /// Takes over the head that was found in the store, if it is not an older one than the known head, or one of
    /// another mesh.
    fn advance(&mut self, found: Placed) -> Result<(), OpenError> {
        if let Some(Placed { head, revision }) = &self.placed {
            let (had, now) = (head.sequence, found.head.sequence);
            if now < had || found.revision < *revision {
                // The start of a controller knows what to do then.
                self.session.lose(EtcdError::WentBack { had, found: now });
                return Err(EtcdError::WentBack { had, found: now }.into());
            }
            if head.mesh != found.head.mesh || head.ca != found.head.ca {
                return Err(EtcdError::OtherMesh {
                    store: self.session.store().to_owned(),
                    found: found.head.mesh,
                    ours: head.mesh.clone(),
                }
                .into());
            }
        }
        self.placed = Some(found);
        Ok(())
    }
}

impl Store for EtcdStore {
    fn name(&self) -> String {
        self.session.store().to_owned()
    }

    fn sequence(&self) -> u64 {
        self.placed.as_ref().map_or(0, |placed| placed.head.sequence)
    }

    fn load(&mut self) -> Result<Vec<Record>, OpenError> {
        let session = self.session.clone();
        let read = self.thread.wait(async move { session.read().await })?;
        let (placed, records) = read.ok_or_else(|| self.missing())?;
        if self.placed.as_ref() != Some(&placed) {
            return Err(EtcdError::Changed(self.name()).into());
        }
        Ok(records)
    }

    fn commit(&mut self, expected: u64, writes: &[Write]) -> Result<u64, CommitError> {
        let Some(before) = self.placed.clone() else { return Err(self.missing().into()) };
        if before.head.sequence != expected {
            self.end_turn();
            return Err(CommitError::Conflict { expected, found: before.head.sequence });
        }
        let (session, writes) = (self.session.clone(), writes.to_vec());
        let ends_turn = self.takes_turns;
        let commit = async move { session.commit(before, writes, ends_turn).await };
        match self.in_turn(commit)? {
            Outcome::Done(placed) => {
                let sequence = placed.head.sequence;
                self.placed = Some(placed);
                Ok(sequence)
            }
            Outcome::Conflict(found) => {
                self.end_turn();
                Err(CommitError::Conflict { expected, found })
            }
        }
    }

    fn reopen(&mut self) -> Result<(), OpenError> {
        let session = self.session.clone();
        let found = self.in_turn(async move {
            session.own().await?;
            session.settle().await
        })?;
        let reopened = match found {
            Some(found) => self.advance(found),
            None => Err(self.missing().into()),
        };
        if reopened.is_err() {
            self.end_turn();
        }
        reopened
    }

    fn share(&mut self) -> bool {
        if self.session.is_shared() && !self.takes_turns {
            self.takes_turns = true;
            self.end_turn();
        }
        self.takes_turns
    }

    fn replicas(&self) -> Option<Replicas> {
        let replicas = || Replicas::new(self.session.clone(), self.thread.handle());
        self.session.is_shared().then(replicas)
    }

    fn begin_turn(&mut self) -> Result<(), OpenError> {
        if self.takes_turns {
            let session = self.session.clone();
            self.in_turn(async move {
                session.own().await?;
                session.finish().await
            })?;
        }
        Ok(())
    }

    fn end_turn(&mut self) {
        if self.takes_turns {
            let session = self.session.clone();
            if let Err(error) = self.thread.wait(async move { session.end_turn().await }) {
                // Another controller takes it after some seconds, or the next commit of this one ends it.
                tracing::warn!(%error, "cannot give the turn to write back");
            }
        }
    }

    fn peek(&mut self) -> Result<Option<Vec<Record>>, OpenError> {
        if !self.takes_turns {
            return Ok(None);
        }
        let session = self.session.clone();
        let read = self.thread.wait(async move { session.read().await })?;
        let (_, records) = read.ok_or_else(|| self.missing())?;
        Ok(Some(records))
    }

    fn changes(&mut self) -> Result<Vec<Write>, OpenError> {
        let (true, Some(since)) = (self.takes_turns, self.placed.clone()) else {
            return Ok(Vec::new());
        };
        let session = self.session.clone();
        let read = self.thread.wait(async move { session.changes(since).await })?;
        let (found, written) = read.ok_or_else(|| self.missing())?;
        self.advance(found)?;
        Ok(written)
    }

    fn lost(&mut self) -> Option<oneshot::Receiver<OpenError>> {
        self.lost.take()
    }
}

impl Drop for EtcdStore {
    fn drop(&mut self) {
        let session = self.session.clone();
        let release = async move {
            session.release().await;
            Ok(())
        };
        // If the thread has ended, the lease ends by itself.
        let _ = self.thread.wait(release);
    }
}

#[cfg(test)]
mod tests;
