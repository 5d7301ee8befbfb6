//! The use of a store by one controller: its lease as the owner, reads, and commits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::oneshot;
use tokio::time::{Instant, interval, sleep, timeout};

use super::client::Client;
use super::errors::EtcdError;
use super::layout::{self, Fate, Head, Keys, Plan, Staged};
use super::settings::EtcdSettings;
use super::wire::{self, Compare, RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse};
use crate::entropy;
use crate::store::{OpenError, Record, Write};

/// Time to live of the owner's lease. After it, another controller can take over from one that died.
const LEASE: Duration = Duration::from_secs(15);
/// Interval at which the lease is renewed: a renewal may take a call's whole time, and be repeated.
const RENEWAL: Duration = Duration::from_secs(4);
/// Time to give the lease back when the controller stops, or the turn to write after an error.
const RELEASE: Duration = Duration::from_millis(500);
/// First word of the key `owner` of a controller that has the turn to write, and gives it back soon.
const TURN: &str = "turn of ";
/// Time for which a controller may have the turn before another one takes it away. What it writes after that is
/// refused.
const TURN_PATIENCE: Duration = Duration::from_secs(5);
/// Longest time to wait for the turn. Requests of nodes and operators wait meanwhile.
const TURN_WAIT: Duration = Duration::from_secs(12);
/// Mean pause before a controller asks for the turn again.
const TURN_PAUSE: Duration = Duration::from_millis(10);
/// Number of keys in one response. With the largest records this is about 9 MiB.
const PAGE: i64 = 128;
/// Number of attempts to read all records at one revision, while etcd is compacted.
const READS: usize = 3;

/// A controller that uses a store.
pub(super) struct Session {
    client: Client,
    keys: Keys,
    /// URL of the store, for messages.
    store: String,
    /// Value of the key `owner`: name of this controller, unique to this process.
    owner: Bytes,
    /// Random number of this process, which names its keys.
    number: u64,
    /// True if several controllers use the store at a time.
    is_shared: bool,
    /// Lease of the key `owner`, and of the presence of nodes; 0 if there is none.
    lease: AtomicI64,
    /// Id of the next write. The first one is random.
    next_id: AtomicU64,
    /// Takes the error that ends the use of the store.
    lost: Mutex<Option<oneshot::Sender<OpenError>>>,
}

/// The head of the store, and the revision of its last write.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Placed {
    /// Head of the store.
    pub(super) head: Head,
    /// Revision of etcd that wrote it; 0 if it is not written yet.
    pub(super) revision: i64,
}

/// Result of a commit.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It is in the store, with this head.
    Done(Placed),
    /// Another commit was first. The store has this sequence number.
    Conflict(u64),
}

impl Session {
    /// Creates the session of this process, without any access to etcd.
    pub(super) fn new(settings: EtcdSettings) -> Result<Self, EtcdError> {
        let (store, keys) = (settings.url.to_string(), Keys::new(settings.url.key_prefix()));
        let is_shared = settings.is_shared;
        let host = nix::unistd::gethostname().unwrap_or_default();
        let (host, process) = (host.to_string_lossy(), std::process::id());
        let [number, first_id] = [entropy::random()?, entropy::random()?].map(u64::from_le_bytes);
        let turn = if is_shared { TURN } else { "" };
        let owner = format!("{turn}{host} (pid {process}, start {number:016x})");
        Ok(Self {
            client: Client::new(settings)?,
            keys,
            store,
            owner: owner.into(),
            number,
            is_shared,
            lease: AtomicI64::new(0),
            next_id: AtomicU64::new(first_id),
            lost: Mutex::default(),
        })
    }

    /// Returns a receiver of the error that ends the use of the store.
    pub(super) fn lost(&self) -> oneshot::Receiver<OpenError> {
        let (sender, receiver) = oneshot::channel();
        *self.lost.lock() = Some(sender);
        receiver
    }

    /// Ends the use of the store.
    pub(super) fn lose(&self, error: EtcdError) {
        if let Some(lost) = self.lost.lock().take() {
            // If nothing receives this, the store is being closed.
            let _ = lost.send(error.into());
        }
    }

    /// Returns the URL of the store.
    pub(super) fn store(&self) -> &str {
        &self.store
    }

    /// Returns the number of this process.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Returns the names of the keys.
    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Returns whether several controllers use the store at a time.
    pub(super) fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Becomes the owner of the store, or takes the turn to write where several controllers use it.
    pub(super) async fn own(&self) -> Result<(), EtcdError> {
        if self.is_shared { self.take_turn().await } else { self.acquire().await }
    }

    /// Takes the turn to write. Waits while another controller has it, and takes it away from one that has it for
    /// longer than [`TURN_PATIENCE`].
    ///
    /// # Errors
    ///
    /// [`EtcdError::InUse`] if a controller that does not share the store is its owner.
    async fn take_turn(&self) -> Result<(), EtcdError> {
        let key = self.keys.owner();
        let begun = Instant::now();
        // Revision of the owner that is waited for, and since when.
        let mut awaited: Option<(i64, Instant)> = None;
        // Revision of the owner that is replaced; 0 if there must be none.
        let mut replaced = 0;
        let mut is_lease_new = false;
        loop {
            let lease = self.lease().await?;
            let request = TxnRequest {
                compare: vec![Compare::last_write(key.clone(), replaced)],
                success: vec![RequestOp::put(key.clone(), self.owner.clone(), lease)],
                failure: vec![RequestOp::read(key.clone())],
            };
            let answer = match self.transact(request).await {
                // The lease ended, for example while this process was stopped.
                Err(EtcdError::Refused(_)) if !is_lease_new => {
                    self.lease.store(0, Ordering::Relaxed);
                    is_lease_new = true;
                    continue;
                }
                answer => answer?,
            };
            if answer.succeeded {
                return Ok(());
            }
            replaced = 0;
            let holder = match answer.read(0) {
                Some(holder) if holder.value == self.owner => return Ok(()),
                Some(holder) if !holder.value.starts_with(TURN.as_bytes()) => {
                    return Err(self.in_use(&holder.value));
                }
                Some(holder) => holder,
                None => continue,
            };
            let now = Instant::now();
            let since = match awaited {
                Some((revision, since)) if revision == holder.mod_revision => since,
                Some(_) | None => now,
            };
            awaited = Some((holder.mod_revision, since));
            if now.duration_since(begun) > TURN_WAIT {
                return Err(self.in_use(&holder.value));
            }
            if now.duration_since(since) > TURN_PATIENCE {
                replaced = holder.mod_revision;
            } else {
                sleep(TURN_PAUSE.mul_f64(0.5 + entropy::fraction())).await;
            }
        }
    }

    /// Gives the turn to write back, if this controller has it.
    pub(super) async fn end_turn(&self) -> Result<(), EtcdError> {
        let request = TxnRequest {
            compare: vec![self.owner_is()],
            success: vec![RequestOp::delete(self.keys.owner(), Bytes::new())],
            failure: Vec::new(),
        };
        self.transact(request).await.map(drop)
    }

    /// Gives the turn to write back after an error, if this controller has it: it may have taken the turn without an
    /// answer. If etcd does not answer in time now either, another controller takes the turn away.
    pub(super) async fn abandon_turn(&self) {
        let _ = timeout(RELEASE, self.end_turn()).await;
    }

    /// Returns the lease of this controller, which is requested if there is none.
    pub(super) async fn lease(&self) -> Result<i64, EtcdError> {
        let held = self.lease.load(Ordering::Relaxed);
        if held != 0 {
            return Ok(held);
        }
        let id = self.grant().await?;
        self.lease.store(id, Ordering::Relaxed);
        Ok(id)
    }

    /// Requests another lease of the time to live [`LEASE`].
    pub(super) async fn grant(&self) -> Result<i64, EtcdError> {
        let ttl = i64::try_from(LEASE.as_secs()).unwrap_or(i64::MAX);
        let request = wire::LeaseGrantRequest { ttl };
        let lease: wire::LeaseGrantResponse = self.client.call(wire::LEASE_GRANT, request).await?;
        Ok(lease.id)
    }

    /// Becomes the owner of the store, unless this controller is the owner already.
    ///
    /// # Errors
    ///
    /// [`EtcdError::InUse`] if another controller is the owner.
    pub(super) async fn acquire(&self) -> Result<(), EtcdError> {
        let key = self.keys.owner();
        // A controller that waits for its turn asks often, and needs no lease for that.
        let answer = self.range(RangeRequest::of(key.clone())).await?;
        match answer.kvs.first() {
            Some(holder) if holder.value == self.owner => {
                self.lease.store(holder.lease, Ordering::Relaxed);
                return Ok(());
            }
            Some(holder) => return Err(self.in_use(&holder.value)),
            None => {}
        }
        let lease = self.grant().await?;
        let request = TxnRequest {
            compare: vec![Compare::last_write(key.clone(), 0)],
            success: vec![RequestOp::put(key.clone(), self.owner.clone(), lease)],
            failure: vec![RequestOp::read(key)],
        };
        let result = match self.transact(request).await {
            Ok(answer) if answer.succeeded => Ok(lease),
            Ok(answer) => match answer.read(0) {
                Some(holder) if holder.value == self.owner => Ok(holder.lease),
                Some(holder) => Err(self.in_use(&holder.value)),
                None => Err(EtcdError::LeaseEnded),
            },
            Err(error) => Err(error),
        };
        if let Ok(held) = result {
            self.lease.store(held, Ordering::Relaxed);
        }
        if !matches!(result, Ok(held) if held == lease) {
            // The new lease is of no use. Without an answer, it ends by itself.
            let _ = timeout(RELEASE, self.revoke(lease)).await;
        }
        result.map(drop)
    }

    /// Renews the lease until it is given back, or until another controller is the owner. The use of the
    /// store ends then.
    pub(super) async fn keep(&self) {
        let mut renewals = interval(RENEWAL);
        loop {
            renewals.tick().await;
            let id = self.lease.load(Ordering::Relaxed);
            if id == 0 && self.is_shared {
                if let Err(error) = self.lease().await {
                    tracing::warn!(%error, "cannot get a lease of the store");
                }
                continue;
            }
            if id == 0 {
                return;
            }
            let request = wire::LeaseKeepAliveRequest { id };
            let answer: Result<wire::LeaseKeepAliveResponse, _> =
                self.client.call(wire::LEASE_KEEP_ALIVE, request).await;
            let error = match answer {
                Ok(answer) if answer.ttl > 0 => continue,
                Ok(_) if self.is_shared => {
                    self.lease.store(0, Ordering::Relaxed);
                    self.lease().await.err()
                }
                Ok(_) => self.acquire().await.err(),
                Err(error) => Some(error),
            };
            match error {
                None => tracing::info!("lease of the store taken again"),
                Some(error @ EtcdError::InUse { .. }) => return self.lose(error),
                Some(error) => tracing::warn!(%error, "cannot renew the lease of the store"),
            }
        }
    }

    /// Gives the lease back, so that another controller can take over at once.
    pub(super) async fn release(&self) {
        let id = self.lease.swap(0, Ordering::Relaxed);
        if id != 0 {
            // Without an answer in time, the lease ends by itself.
            let _ = timeout(RELEASE, self.revoke(id)).await;
        }
    }

    /// Reads the head, after it finished a change that another controller left staged. Only the owner may
    /// call this. `None` if the store has no mesh.
    pub(super) async fn settle(&self) -> Result<Option<Placed>, EtcdError> {
        let Some(placed) = self.head().await? else { return Ok(None) };
        match placed.head.staged {
            Some(staged) => self.copy_staged(placed, staged, false).await.map(Some),
            None => {
                // Parts that nobody has committed.
                let (first, end) = self.keys.all_staged();
                let remove = TxnRequest {
                    compare: vec![self.head_is(&placed), self.owner_is()],
                    success: vec![RequestOp::delete(first, end)],
                    failure: Vec::new(),
                };
                match self.transact(remove).await {
                    Ok(answer) if !answer.succeeded => Err(self.changed()),
                    // A full store can be read.
                    Ok(_) | Err(EtcdError::Full(_)) => Ok(Some(placed)),
                    Err(error) => Err(error),
                }
            }
        }
    }

    /// Reads the head, after it finished a change that another controller left staged. Only the owner may call
    /// this.
    pub(super) async fn finish(&self) -> Result<(), EtcdError> {
        match self.head().await? {
            Some(placed) => match placed.head.staged {
                Some(staged) => self.copy_staged(placed, staged, false).await.map(drop),
                None => Ok(()),
            },
            None => Err(EtcdError::Empty(self.store.clone())),
        }
    }

    /// Reads what changed after `since`: the newest head, and the changed records. The records that were deleted are
    /// only among them while a staged change deletes them. `None` if the store has no mesh.
    pub(super) async fn changes(
        &self,
        since: Placed,
    ) -> Result<Option<(Placed, Vec<Write>)>, EtcdError> {
        for _ in 0..READS {
            match self.try_changes(&since).await {
                Err(EtcdError::Compacted) => {}
                result => return result,
            }
        }
        Err(EtcdError::Compacted)
    }

    async fn try_changes(&self, since: &Placed) -> Result<Option<(Placed, Vec<Write>)>, EtcdError> {
        let answer = self.range(RangeRequest::of(self.keys.head())).await?;
        let Some(placed) = self.placed(&answer)? else { return Ok(None) };
        if placed == *since {
            return Ok(Some((placed, Vec::new())));
        }
        let revision = answer.header.unwrap_or_default().revision;
        let written = self.records(&placed, revision, since.revision.saturating_add(1)).await?;
        Ok(Some((placed, written.into_iter().collect())))
    }

    /// Reads the head; `None` if the store has no mesh.
    pub(super) async fn head(&self) -> Result<Option<Placed>, EtcdError> {
        let answer = self.range(RangeRequest::of(self.keys.head())).await?;
        self.placed(&answer)
    }

    /// Reads the head and all records, sorted by key, at one revision. A staged change that is committed is
    /// part of them. `None` if the store has no mesh.
    pub(super) async fn read(&self) -> Result<Option<(Placed, Vec<Record>)>, EtcdError> {
        for _ in 0..READS {
            match self.try_read().await {
                Err(EtcdError::Compacted) => {}
                result => return result,
            }
        }
        Err(EtcdError::Compacted)
    }

    async fn try_read(&self) -> Result<Option<(Placed, Vec<Record>)>, EtcdError> {
        let answer = self.range(RangeRequest::of(self.keys.head())).await?;
        let Some(placed) = self.placed(&answer)? else { return Ok(None) };
        let revision = answer.header.unwrap_or_default().revision;
        let records = self.records(&placed, revision, 0).await?;
        let present = |(key, value): (String, Option<Vec<u8>>)| value.map(|value| (key, value));
        Ok(Some((placed, records.into_iter().filter_map(present).collect())))
    }

    /// Reads the records at a revision whose last write was at `changed_since` or later, and adds a staged change of
    /// the head. A deleted record has no value.
    async fn records(
        &self,
        placed: &Placed,
        revision: i64,
        changed_since: i64,
    ) -> Result<BTreeMap<String, Option<Vec<u8>>>, EtcdError> {
        let mut records = BTreeMap::new();
        let (mut key, range_end) = self.keys.records();
        loop {
            let page = RangeRequest {
                range_end: range_end.clone(),
                limit: PAGE,
                revision,
                min_mod_revision: changed_since,
                ..RangeRequest::of(key)
            };
            let page = self.range(page).await?;
            for kv in &page.kvs {
                let record = self.keys.record(&kv.key, &kv.value);
                let (name, value) = record.ok_or_else(|| {
                    let key = String::from_utf8_lossy(&kv.key);
                    self.damaged(&key.escape_default().to_string(), "is no record")
                })?;
                records.insert(name, Some(value));
            }
            let Some(last) = page.kvs.last().filter(|_| page.more) else { break };
            let mut next = last.key.to_vec();
            next.push(0);
            key = next.into();
        }
        if let Some(staged) = placed.head.staged {
            for part in 0..staged.parts {
                records.extend(self.part(staged, part, revision).await?);
            }
        }
        Ok(records)
    }

    /// Fails if the store has records, although it has no head. Staged parts alone are no error: no head names them,
    /// and [`Self::settle`] removes them once there is one.
    pub(super) async fn check_empty(&self) -> Result<(), EtcdError> {
        let (key, range_end) = self.keys.records();
        let request = RangeRequest { range_end, limit: 1, ..RangeRequest::of(key) };
        let page = self.range(request).await?;
        if page.kvs.is_empty() {
            Ok(())
        } else {
            Err(self.damaged("head", "is missing, but there are records"))
        }
    }

    /// Writes a commit that was computed from the state `before`. All calls in it can be repeated: it
    /// recognizes its own writes. If `ends_turn`, it gives the turn to write back.
    pub(super) async fn commit(
        &self,
        before: Placed,
        writes: Vec<Write>,
        ends_turn: bool,
    ) -> Result<Outcome, EtcdError> {
        let id = self.id();
        let parts = match layout::plan(&self.keys, &writes)? {
            Plan::Direct(operations) => {
                let next = before.head.after(id, None);
                let operations = self.and_end_turn(operations, ends_turn);
                return self.replace(&before, next, id, operations, &[]).await;
            }
            Plan::Staged(parts) => parts,
        };
        let staged = Staged { id, parts: u32::try_from(parts.len()).unwrap_or(u32::MAX) };
        let mut names = Vec::new();
        for (value, part) in parts.into_iter().zip(0..) {
            let key = self.keys.part(id, part);
            names.push(key.clone());
            let request = wire::PutRequest { key, value, lease: 0 };
            let _: wire::PutResponse = self.client.call(wire::PUT, request).await?;
        }
        let next = before.head.after(id, Some(staged));
        match self.replace(&before, next, id, Vec::new(), &names).await? {
            Outcome::Done(placed) => {
                self.copy_staged(placed, staged, ends_turn).await.map(Outcome::Done)
            }
            Outcome::Conflict(found) => Ok(Outcome::Conflict(found)),
        }
    }

    /// Copies a staged change to the records, and removes its name and its parts.
    async fn copy_staged(
        &self,
        placed: Placed,
        staged: Staged,
        ends_turn: bool,
    ) -> Result<Placed, EtcdError> {
        for part in 0..staged.parts {
            let writes = self.part(staged, part, 0).await?;
            for success in layout::batches(&self.keys, &writes)? {
                let compare = vec![self.head_is(&placed), self.owner_is()];
                let request = TxnRequest { compare, success, failure: Vec::new() };
                if !self.transact(request).await?.succeeded {
                    return Err(self.changed());
                }
            }
        }
        let (first, end) = self.keys.staged(staged.id);
        let id = self.id();
        let next = placed.head.settled(id);
        let remove = self.and_end_turn(vec![RequestOp::delete(first, end)], ends_turn);
        match self.replace(&placed, next, id, remove, &[]).await? {
            Outcome::Done(placed) => Ok(placed),
            Outcome::Conflict(_) => Err(self.changed()),
        }
    }

    /// Adds the operation that gives the turn to write back.
    fn and_end_turn(&self, mut operations: Vec<RequestOp>, ends_turn: bool) -> Vec<RequestOp> {
        if ends_turn {
            operations.push(RequestOp::delete(self.keys.owner(), Bytes::new()));
        }
        operations
    }

    /// Replaces the head by `next`, whose newest write is `id`, together with `operations`, if the head is
    /// still `before`, this controller is the owner, and the keys in `required` exist.
    async fn replace(
        &self,
        before: &Placed,
        next: Head,
        id: u64,
        mut operations: Vec<RequestOp>,
        required: &[Bytes],
    ) -> Result<Outcome, EtcdError> {
        operations.push(RequestOp::put(self.keys.head(), next.encode_to_vec().into(), 0));
        let mut compare = vec![self.head_is(before), self.owner_is()];
        compare.extend(required.iter().cloned().map(Compare::exists));
        let failure = vec![RequestOp::read(self.keys.head()), RequestOp::read(self.keys.owner())];
        let answer = self.transact(TxnRequest { compare, success: operations, failure }).await?;
        if answer.succeeded {
            let revision = answer.header.unwrap_or_default().revision;
            return Ok(Outcome::Done(Placed { head: next, revision }));
        }
        let found = match answer.read(0) {
            Some(kv) => {
                let head = Head::read(&kv.value, &self.store)?;
                Some(Placed { head, revision: kv.mod_revision })
            }
            None => None,
        };
        let found = match found {
            Some(found) if found.revision != before.revision => found,
            None if before.revision != 0 => return Err(EtcdError::Empty(self.store.clone())),
            // The head is the same: this controller is not the owner, or staged parts were removed.
            Some(_) | None => {
                return Err(match answer.read(1) {
                    Some(owner) if owner.value == self.owner => self.changed(),
                    Some(owner) => self.in_use(&owner.value),
                    None => EtcdError::LeaseEnded,
                });
            }
        };
        match found.head.fate(id, &before.head) {
            Fate::Newest => Ok(Outcome::Done(found)),
            Fate::Unclear => Err(self.changed()),
            Fate::Refused => Ok(Outcome::Conflict(found.head.sequence)),
        }
    }

    /// Reads a part of a staged change; with a revision of 0 its newest state.
    async fn part(
        &self,
        staged: Staged,
        part: u32,
        revision: i64,
    ) -> Result<Vec<Write>, EtcdError> {
        let key = self.keys.part(staged.id, part);
        let name = format!("staged/{:016x}/{part:04}", staged.id);
        let answer = self.range(RangeRequest { revision, ..RangeRequest::of(key) }).await?;
        let found = answer.kvs.first().ok_or_else(|| self.damaged(&name, "is missing"))?;
        layout::decode_part(&found.value).ok_or_else(|| self.damaged(&name, "is malformed"))
    }

    fn placed(&self, answer: &RangeResponse) -> Result<Option<Placed>, EtcdError> {
        let Some(kv) = answer.kvs.first() else { return Ok(None) };
        let head = Head::read(&kv.value, &self.store)?;
        Ok(Some(Placed { head, revision: kv.mod_revision }))
    }

    /// Forgets the lease, which has ended.
    pub(super) fn forget_lease(&self) {
        self.lease.store(0, Ordering::Relaxed);
    }

    /// Reads keys.
    pub(super) async fn range(&self, request: RangeRequest) -> Result<RangeResponse, EtcdError> {
        self.client.call(wire::RANGE, request).await
    }

    /// Executes a transaction.
    pub(super) async fn transact(&self, request: TxnRequest) -> Result<TxnResponse, EtcdError> {
        self.client.call(wire::TXN, request).await
    }

    async fn revoke(&self, id: i64) -> Result<(), EtcdError> {
        let request = wire::LeaseRevokeRequest { id };
        let _: wire::LeaseRevokeResponse = self.client.call(wire::LEASE_REVOKE, request).await?;
        Ok(())
    }

    fn head_is(&self, placed: &Placed) -> Compare {
        Compare::last_write(self.keys.head(), placed.revision)
    }

    fn owner_is(&self) -> Compare {
        Compare::has_value(self.keys.owner(), self.owner.clone())
    }

    /// Returns an id that no other write has.
    pub(super) fn id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn in_use(&self, holder: &[u8]) -> EtcdError {
        let holder = String::from_utf8_lossy(holder);
        let holder: String = holder.chars().filter(|c| !c.is_control()).take(120).collect();
        EtcdError::InUse { store: self.store.clone(), holder }
    }

    fn changed(&self) -> EtcdError {
        EtcdError::Changed(self.store.clone())
    }

    /// Returns the error that a key has an invalid value.
    pub(super) fn damaged(&self, key: &str, why: &str) -> EtcdError {
        let (key, why) = (key.to_owned(), why.to_owned());
        EtcdError::Damaged { store: self.store.clone(), key, why }
    }
}
