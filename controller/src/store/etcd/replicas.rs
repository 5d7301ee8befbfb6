//! What the controllers that share a store tell each other through it: which nodes are connected to each, and signals
//! to those nodes. None of it is a record of the mesh; each key ends with a lease.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::errors::EtcdError;
use super::session::Session;
use super::wire::{RangeRequest, RequestOp, TxnRequest};

/// Largest number of signals that are sent or received at once.
pub const SIGNALS: usize = 64;
/// Age of the lease of signals after which the next ones get another lease. Nobody renews it, so a signal that nobody
/// reads ends within the time to live of a lease.
const SIGNAL_LEASE: Duration = Duration::from_secs(5);

/// The controllers that share a store, as seen by this one.
#[derive(Clone)]
pub struct Replicas {
    session: Arc<Session>,
    /// Runtime of the connections to etcd.
    runtime: Handle,
    /// Lease of the newest signals, and when it was requested.
    signal_lease: Arc<Mutex<Option<(i64, Instant)>>>,
}

/// What a controller says about the presence of nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// Number of the controller.
    pub controller: u64,
    /// Number of the part.
    pub part: u8,
    /// Content of the part.
    pub value: Bytes,
}

impl Replicas {
    pub(super) fn new(session: Arc<Session>, runtime: Handle) -> Self {
        Self { session, runtime, signal_lease: Arc::default() }
    }

    /// Returns the number of this controller, which is random.
    pub fn number(&self) -> u64 {
        self.session.number()
    }

    /// Writes the parts of this controller's presence, those that are not in etcd as they should be, and returns the
    /// parts of all other controllers, as they were before.
    pub async fn exchange(&self, ours: BTreeMap<u8, Bytes>) -> Result<Vec<Presence>, EtcdError> {
        let session = self.session.clone();
        self.on_runtime(async move {
            let result = exchange(&session, ours).await;
            if let Err(EtcdError::Refused(_)) = &result {
                // The lease ended, for example while this process was stopped.
                session.forget_lease();
            }
            result
        })
        .await
    }

    /// Sends signals, at most [`SIGNALS`], each to the controller of this number.
    pub async fn send(&self, signals: Vec<(u64, Bytes)>) -> Result<(), EtcdError> {
        let (session, signal_lease) = (self.session.clone(), self.signal_lease.clone());
        self.on_runtime(async move {
            let now = Instant::now();
            let held = *signal_lease.lock();
            let lease = match held.filter(|(_, at)| now.duration_since(*at) < SIGNAL_LEASE) {
                Some((lease, _)) => lease,
                None => {
                    let lease = session.grant().await?;
                    *signal_lease.lock() = Some((lease, now));
                    lease
                }
            };
            let put = |(controller, value): (u64, Bytes)| {
                RequestOp::put(session.keys().signal(controller, session.id()), value, lease)
            };
            let success = signals.into_iter().take(SIGNALS).map(put).collect();
            let request = TxnRequest { compare: Vec::new(), success, failure: Vec::new() };
            session.transact(request).await.map(drop)
        })
        .await
    }

    /// Receives signals to nodes of this controller, at most [`SIGNALS`], and removes them.
    pub async fn receive(&self) -> Result<Vec<Bytes>, EtcdError> {
        let session = self.session.clone();
        self.on_runtime(async move {
            let (key, range_end) = session.keys().signals(session.number());
            let limit = i64::try_from(SIGNALS).unwrap_or(i64::MAX);
            let request = RangeRequest { range_end, limit, ..RangeRequest::of(key) };
            let found = session.range(request).await?.kvs;
            if !found.is_empty() {
                let remove = |key: &Bytes| RequestOp::delete(key.clone(), Bytes::new());
                let success = found.iter().map(|kv| remove(&kv.key)).collect();
                let request = TxnRequest { compare: Vec::new(), success, failure: Vec::new() };
                session.transact(request).await?;
            }
            Ok(found.into_iter().map(|kv| kv.value).collect())
        })
        .await
    }

    /// Runs `work` where the connections to etcd are.
    async fn on_runtime<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, EtcdError>> + Send + 'static,
    ) -> Result<T, EtcdError> {
        let done = self.runtime.spawn(work).await;
        done.unwrap_or_else(|error| Err(EtcdError::Ended(error.to_string())))
    }
}

async fn exchange(
    session: &Session,
    mut ours: BTreeMap<u8, Bytes>,
) -> Result<Vec<Presence>, EtcdError> {
    let lease = session.lease().await?;
    let (key, range_end) = session.keys().all_presence();
    let found = session.range(RangeRequest { range_end, ..RangeRequest::of(key) }).await?;
    let (mut others, mut operations) = (Vec::new(), Vec::new());
    for kv in found.kvs {
        let Some((controller, part)) = session.keys().presence_of(&kv.key) else {
            let key = String::from_utf8_lossy(&kv.key);
            return Err(
                session.damaged(&key.escape_default().to_string(), "is not one of presence")
            );
        };
        if controller != session.number() {
            others.push(Presence { controller, part, value: kv.value });
        } else if !ours.contains_key(&part) {
            operations.push(RequestOp::delete(kv.key, Bytes::new()));
        } else if ours.get(&part) == Some(&kv.value) && kv.lease == lease {
            ours.remove(&part);
        }
    }
    let put = |(part, value): (u8, Bytes)| {
        RequestOp::put(session.keys().presence(session.number(), part), value, lease)
    };
    operations.extend(ours.into_iter().map(put));
    if !operations.is_empty() {
        let request = TxnRequest { compare: Vec::new(), success: operations, failure: Vec::new() };
        session.transact(request).await?;
    }
    Ok(others)
}
