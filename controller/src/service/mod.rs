//! The wire API: it converts gRPC messages into registry operations and their results into gRPC
//! messages. It decides which client may call which RPC, and applies limits and
//! proofs; the registry decides the rest.

mod admin;
mod admission;
mod auth;
mod budgets;
mod discovery;
mod health;
mod reflection;
mod refusal;
mod signals;
mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tonic::Status;
use towline_proto::convert::Invalid;
use towline_proto::id::{NodeId, NodeName};
use towline_proto::node::Head;
use towline_proto::rate::Rate;
use towline_proto::refusal::with_retry_after;
use towline_proto::source_limiter::SourceLimiter;
use towline_proto::token::ControllerAddress;
use towline_proto::{pb, signed};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::authority::Authority;
use crate::clock;
use crate::counters::Counters;
use crate::events::Events;
use crate::ledger::Ledger;
use crate::map::Map;
use crate::store::Record;
use crate::summaries::Summaries;
use crate::tunnels::Reported;
use crate::view::View;
use crate::writer::Writer;
use towline_registry::sessions::Sessions;
use towline_registry::{NoSuchNode, Now};

use auth::CallingNode;
use budgets::Work;
use refusal::{Refusal, absent};

pub use admin::AdminService;
pub use admission::{Admission, SentAway, drain_begins};
pub use auth::{Access, Authorizer, Caller, Object, RPCS, Role, Rpc};
pub use budgets::Budgets;
pub use discovery::DiscoveryService;
pub(crate) use discovery::WireJoin;
pub use health::HealthService;
pub use reflection::ReflectionService;
pub use refusal::tombstone_of;
pub use signals::{Outbound, Signals};

/// Rate limit of failed joins per source: a burst of 10, then one in 6 seconds.
pub(crate) const FAILED_JOINS: Rate = Rate::one_per(Duration::from_secs(6), 10);

/// State that all services share.
pub struct Shared {
    /// Certificate authority of the mesh.
    pub authority: Arc<Authority>,
    /// Writer, which executes all changes.
    pub writer: Writer,
    /// Map that watchers see.
    pub map: Arc<Map>,
    /// Nodes and tokens that operators see.
    pub view: Arc<View>,
    /// Sessions of the connected nodes.
    pub sessions: Arc<Mutex<Sessions>>,
    /// Rate limit of failed joins per source. Only failures count, and they never delay a machine that has the
    /// secret of a token that admits another node.
    pub failed_joins: Mutex<SourceLimiter>,
    /// X25519 private key for the proofs of WireGuard keys at joins. It is generated when the
    /// process starts.
    pub proof_key: StaticSecret,
    /// Public key of [`Self::proof_key`].
    pub proof_public: PublicKey,
    /// Addresses of this controller that are written into tokens, after those of the mesh's
    /// configuration.
    pub advertise: Vec<ControllerAddress>,
    /// Budgets of the nodes.
    pub budgets: Budgets,
    /// Forwarding of signals between nodes.
    pub signals: Signals,
    /// Newest summaries of the nodes' tunnels.
    pub summaries: Arc<Summaries>,
    /// What happened lately, for operators.
    pub events: Arc<Events>,
    /// Signal that the key of an administrator was revoked: the controller may have to replace its own.
    pub admin_revoked: Arc<Notify>,
    /// Head of the map that was signed last.
    pub head: Mutex<Option<(Head, pb::Signed)>>,
    /// UDP port of the STUN server; `None` if it could not be bound.
    pub reflector: Option<u16>,
    /// Places of nodes that load the whole map.
    pub admission: Arc<Admission>,
    /// Nodes that were sent to other controllers.
    pub sent_away: SentAway,
    /// Counters for the metrics.
    pub counters: Arc<Counters>,
    /// Time over which watches end, set when the controller stops.
    pub stopping: tokio::sync::watch::Receiver<Option<Duration>>,
    /// Time over which each watch ends, set while this controller is cut off from the others.
    pub cut_off: tokio::sync::watch::Receiver<Option<Duration>>,
}

impl Shared {
    /// Applies a change and returns its result once it is on the disk and shown.
    async fn apply<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Ledger, &Sessions, Now) -> T + Send + 'static,
    ) -> Result<T, Status> {
        self.writer.run(change).await.map_err(Refusal::status)
    }

    /// Returns what the nodes report, for operators.
    pub fn reported(&self) -> Reported {
        Reported {
            view: self.view.clone(),
            sessions: self.sessions.clone(),
            summaries: self.summaries.clone(),
        }
    }

    /// Returns the signed head of the map.
    fn head(&self) -> pb::Signed {
        let (epoch, revision) = self.map.position();
        let head = Head { mesh_id: self.authority.mesh_id(), epoch, revision };
        let mut last = self.head.lock();
        if let Some((signed_head, signed)) = &*last
            && *signed_head == head
        {
            return signed.clone();
        }
        let signed = self.authority.sign_head(&head);
        *last = Some((head, signed.clone()));
        signed
    }

    /// Refuses the watch of a node that another controller should serve, since this one is cut off.
    fn send_away(&self, node: NodeId) -> Result<(), Status> {
        if self.sent_away.is_admitted(node, self.is_cut_off()) { Ok(()) } else { Err(cut_off()) }
    }

    /// Refuses what a node must not get if another controller removed it, which this one does not know while it is cut
    /// off.
    fn require_news(&self) -> Result<(), Status> {
        if self.is_cut_off() { Err(cut_off()) } else { Ok(()) }
    }

    fn is_cut_off(&self) -> bool {
        self.cut_off.borrow().is_some()
    }

    /// Spends one unit of a node's budget.
    fn spend(&self, node: &CallingNode, work: Work) -> Result<(), Status> {
        self.spend_of(node.id, &node.name, work)
    }

    /// Spends one unit of the budget of a node whose name need not be known.
    fn spend_of(
        &self,
        node: NodeId,
        name: &dyn std::fmt::Display,
        work: Work,
    ) -> Result<(), Status> {
        self.budgets.spend(node, work, clock::now().mono).map_err(|wait| {
            let seconds = wait.as_secs() + 1;
            tracing::debug!(node = %name, ?work, seconds, "budget used up");
            self.counters.limit(work.limit());
            let text = format!("node `{name}` asks too often: wait {seconds} s");
            with_retry_after(Status::resource_exhausted(text), wait)
        })
    }

    /// Returns all records of the store, marked as a backup.
    async fn backup(&self) -> Result<Vec<Record>, Status> {
        self.writer.backup().await.map_err(Refusal::status)
    }

    /// Removes a node and returns its signed tombstone.
    async fn remove(&self, node: NodeId, why: &'static str) -> Result<pb::Signed, Status> {
        let change = move |ledger: &mut Ledger, sessions: &Sessions, now| {
            ledger.registry().remove(node, why, sessions, now)
        };
        self.apply(change).await?.map_err(|error| absent(&error, &self.map))?;
        self.tombstone(node)
    }

    /// Removes the node that has this name now, and returns its signed tombstone.
    async fn remove_by_name(
        &self,
        name: NodeName,
        why: &'static str,
    ) -> Result<pb::Signed, Status> {
        let change = move |ledger: &mut Ledger, sessions: &Sessions, now| {
            let registry = ledger.registry();
            let node = registry.by_name(&name)?;
            // This cannot fail: the node was just found.
            let _ = registry.remove(node, why, sessions, now);
            Ok::<_, NoSuchNode>(node)
        };
        let removed = self.apply(change).await?.map_err(|error| error.status())?;
        self.tombstone(removed)
    }

    fn tombstone(&self, removed: NodeId) -> Result<pb::Signed, Status> {
        let tombstone = self.map.tombstone(removed);
        tombstone.ok_or_else(|| Status::internal("the removed node has no tombstone"))
    }

    /// Returns the addresses of the controllers for a token: those of the mesh's configuration, then
    /// those of this controller.
    fn controllers(&self) -> Vec<ControllerAddress> {
        let mesh = self.map.mesh();
        match signed::mesh(Some(&mesh), self.authority.public_key()) {
            Ok(mesh) => mesh.controllers_and(&self.advertise),
            Err(_) => self.advertise.clone(),
        }
    }

    /// Returns the addresses of this controller's STUN server: the advertised addresses that are IP
    /// addresses, not names.
    fn reflectors(&self) -> Vec<String> {
        if self.reflector.is_none() {
            return Vec::new();
        }
        let literal = |address: &ControllerAddress| address.as_str().parse::<SocketAddr>().ok();
        self.advertise.iter().filter_map(literal).map(|address| address.to_string()).collect()
    }
}

/// Returns the status for a node that another controller should serve.
fn cut_off() -> Status {
    Status::unavailable("the controller is cut off from its store: use another one")
}

fn missing(what: &'static str) -> Status {
    Invalid::Missing(what).status()
}
