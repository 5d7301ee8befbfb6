//! The wire API: it converts gRPC messages into registry operations and their results into gRPC
//! messages. It decides which client may call which RPC, and applies limits and
//! proofs; the registry decides the rest.

mod admin;
mod auth;
mod discovery;
mod signals;
mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tonic::{Code, Status};
use towline_proto::convert::Invalid;
use towline_proto::pb;
use towline_proto::rate::Rate;
use towline_proto::source_limiter::SourceLimiter;
use towline_proto::token::ControllerAddress;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::authority::{Authority, InvalidCsr};
use crate::entropy::NoEntropy;
use crate::map::Map;
use crate::registry::Refusal;
use crate::registry::sessions::Sessions;
use crate::writer::{Unavailable, Writer};

pub use admin::AdminService;
pub use auth::{Authorizer, Caller, ROLES, Role};
pub use discovery::DiscoveryService;
pub use signals::Signals;

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
    /// Sessions of the connected nodes.
    pub sessions: Arc<Mutex<Sessions>>,
    /// Rate limit of failed joins per source. Only failures count, so that machines behind one NAT
    /// that join successfully do not slow each other down.
    pub failed_joins: Mutex<SourceLimiter>,
    /// X25519 private key for the proofs of WireGuard keys at joins. It is generated when the
    /// process starts.
    pub proof_key: StaticSecret,
    /// Public key of [`Self::proof_key`].
    pub proof_public: PublicKey,
    /// Addresses of the controllers that are written into tokens.
    pub advertise: Vec<ControllerAddress>,
    /// Forwarding of signals between nodes.
    pub signals: Signals,
    /// UDP port of the STUN server; `None` if it could not be bound.
    pub reflector: Option<u16>,
    /// Value that becomes true when the controller stops.
    pub stopping: tokio::sync::watch::Receiver<bool>,
}

impl Shared {
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

/// Returns the gRPC status of a refusal.
fn refused(refusal: Refusal) -> Status {
    let code = match &refusal {
        Refusal::TokenUnknown { .. } | Refusal::TokenSecret { .. } => Code::Unauthenticated,
        Refusal::TokenRevoked { .. }
        | Refusal::TokenExpired { .. }
        | Refusal::TokenUsed { .. }
        | Refusal::NoSession
        | Refusal::GenerationBehind { .. }
        | Refusal::GenerationReused { .. } => Code::FailedPrecondition,
        Refusal::NameTaken { .. }
        | Refusal::WireguardKeyTaken { .. }
        | Refusal::IdentityTaken { .. }
        | Refusal::Cloned { .. } => Code::AlreadyExists,
        Refusal::IdentityRemoved { .. }
        | Refusal::NodeRemoved { .. }
        | Refusal::NodeUnknown { .. }
        | Refusal::NodeKey { .. }
        | Refusal::NotGranted(_)
        | Refusal::Name { .. } => Code::PermissionDenied,
        Refusal::MeshFull | Refusal::OverlayFull { .. } | Refusal::TooManyTokens => {
            Code::ResourceExhausted
        }
        Refusal::NoSuchNode { .. } => Code::NotFound,
        Refusal::Unusable(_) | Refusal::ReplaceOnce => Code::InvalidArgument,
    };
    let message = refusal.to_string();
    match refusal {
        Refusal::NodeRemoved { tombstone, .. } => {
            Status::with_details(code, message, prost::Message::encode_to_vec(&tombstone).into())
        }
        _ => Status::new(code, message),
    }
}

fn unavailable(unavailable: Unavailable) -> Status {
    Status::unavailable(unavailable.to_string())
}

fn invalid(invalid: Invalid) -> Status {
    Status::invalid_argument(invalid.to_string())
}

fn invalid_csr(invalid: InvalidCsr) -> Status {
    Status::invalid_argument(invalid.to_string())
}

fn no_entropy(error: NoEntropy) -> Status {
    Status::unavailable(error.to_string())
}

fn missing(what: &'static str) -> Status {
    invalid(Invalid::Missing(what))
}

/// Returns the tombstone in the details of a status, which [`Refusal::NodeRemoved`] puts there.
pub fn tombstone_of(status: &Status) -> Option<pb::Signed> {
    let details = status.details();
    if details.is_empty() {
        return None;
    }
    prost::Message::decode(details).ok()
}
