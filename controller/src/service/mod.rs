//! The wire API: gRPC messages in, registry operations, gRPC messages out. No decision is made
//! here but that of who may ask.

mod admin;
mod auth;
mod discovery;
mod signals;
mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch as signal;
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
pub use auth::{Caller, Gate, ROLES, Role};
pub use discovery::DiscoveryService;
pub use signals::Signals;

/// Failed joins of one source: so many in a row, and one more in each period.
pub(crate) const FAILED_JOINS: Rate = Rate::one_per(Duration::from_secs(6), 10);

/// What the services share.
pub struct Shared {
    /// The CA.
    pub authority: Arc<Authority>,
    /// For whatever changes.
    pub writer: Writer,
    /// For what is shown.
    pub map: Arc<Map>,
    /// Who is connected.
    pub sessions: Arc<Mutex<Sessions>>,
    /// Failed joins of each source. Only failures count, so that machines that join properly from
    /// behind one NAT do not slow each other down.
    pub failed_joins: Mutex<SourceLimiter>,
    /// The key that joins prove their WireGuard key to; made at the process's start.
    pub proof_key: StaticSecret,
    /// Its public half.
    pub proof_public: PublicKey,
    /// The addresses that go into tokens.
    pub advertise: Vec<ControllerAddress>,
    /// What nodes say to each other.
    pub signals: Signals,
    /// UDP port on which we reflect; `None`: it could not be had.
    pub reflector: Option<u16>,
    /// Becomes true when the controller stops.
    pub stopping: signal::Receiver<bool>,
}

impl Shared {
    /// Where we reflect, as far as that is told by an address.
    fn reflectors(&self) -> Vec<String> {
        if self.reflector.is_none() {
            return Vec::new();
        }
        let literal = |address: &ControllerAddress| address.as_str().parse::<SocketAddr>().ok();
        self.advertise.iter().filter_map(literal).map(|address| address.to_string()).collect()
    }
}

/// A refusal as the client sees it.
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

/// The tombstone that a [`Refusal::NodeRemoved`] carries in a status's details, as a client reads
/// it.
pub fn tombstone_of(status: &Status) -> Option<pb::Signed> {
    let details = status.details();
    if details.is_empty() {
        return None;
    }
    prost::Message::decode(details).ok()
}
