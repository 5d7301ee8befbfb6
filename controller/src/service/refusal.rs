//! gRPC statuses of the errors of the other modules.

use tonic::{Code, Status};
use towline_proto::convert::Invalid;
use towline_proto::pb;
use towline_proto::refusal::of_unknown_node;

use crate::authority::InvalidCsr;
use crate::entropy::NoEntropy;
use crate::map::{AccessError, Map};
use crate::writer::Unavailable;
use towline_registry::{
    CreateAdminError, CreateTokenError, JoinError, NoSuchAdmin, NoSuchNode, NodeAbsent,
    OverlayInUse, PublishError, ReadmitError, TokenUnknown,
};

/// Error of an operation that has a gRPC code.
pub(super) trait Refusal: std::fmt::Display {
    /// Returns the code.
    fn code(&self) -> Code;

    /// Returns the status that a client gets.
    fn status(self) -> Status
    where
        Self: Sized,
    {
        Status::new(self.code(), self.to_string())
    }
}

impl Refusal for JoinError {
    fn code(&self) -> Code {
        match self {
            Self::TokenUnknown(_) | Self::TokenSecret { .. } => Code::Unauthenticated,
            Self::TokenRevoked { .. } | Self::TokenExpired { .. } | Self::TokenUsed { .. } => {
                Code::FailedPrecondition
            }
            Self::NameTaken { .. }
            | Self::WireguardKeyTaken { .. }
            | Self::IdentityTaken { .. } => Code::AlreadyExists,
            Self::IdentityRemoved { .. } | Self::WireguardKeyRemoved { .. } | Self::Name { .. } => {
                Code::PermissionDenied
            }
            Self::MeshFull | Self::OverlayFull { .. } => Code::ResourceExhausted,
        }
    }
}

impl Refusal for PublishError {
    fn code(&self) -> Code {
        match self {
            Self::Absent(_) | Self::NotGranted(_) => Code::PermissionDenied,
            Self::NoSession
            | Self::GenerationBehind { .. }
            | Self::GenerationAhead { .. }
            | Self::GenerationReused { .. } => Code::FailedPrecondition,
        }
    }
}

impl Refusal for ReadmitError {
    fn code(&self) -> Code {
        match self {
            Self::Absent(_) | Self::OtherMesh | Self::OutsideOverlay { .. } => {
                Code::PermissionDenied
            }
            Self::Taken { .. } => Code::AlreadyExists,
            Self::MeshFull => Code::ResourceExhausted,
        }
    }
}

impl Refusal for CreateTokenError {
    fn code(&self) -> Code {
        match self {
            Self::TooManyTokens => Code::ResourceExhausted,
            Self::Unusable(_) | Self::ReplaceOnce | Self::EphemeralAfter(_) => {
                Code::InvalidArgument
            }
        }
    }
}

impl Refusal for CreateAdminError {
    fn code(&self) -> Code {
        match self {
            Self::Revoked { .. } => Code::PermissionDenied,
            Self::OtherName { .. } => Code::AlreadyExists,
            Self::TooMany => Code::ResourceExhausted,
        }
    }
}

impl Refusal for TokenUnknown {
    fn code(&self) -> Code {
        Code::Unauthenticated
    }
}

impl Refusal for NoSuchNode {
    fn code(&self) -> Code {
        Code::NotFound
    }
}

impl Refusal for NoSuchAdmin {
    fn code(&self) -> Code {
        Code::NotFound
    }
}

impl Refusal for OverlayInUse {
    fn code(&self) -> Code {
        Code::FailedPrecondition
    }
}

impl Refusal for Unavailable {
    fn code(&self) -> Code {
        Code::Unavailable
    }
}

impl Refusal for NoEntropy {
    fn code(&self) -> Code {
        Code::Unavailable
    }
}

impl Refusal for Invalid {
    fn code(&self) -> Code {
        Code::InvalidArgument
    }
}

impl Refusal for InvalidCsr {
    fn code(&self) -> Code {
        Code::InvalidArgument
    }
}

/// Returns the status of an absent node. If the node was removed, the details have its tombstone. If it is not
/// known, the metadata says so, and the node may ask to be readmitted.
pub(super) fn absent(error: &NodeAbsent, map: &Map) -> Status {
    let tombstone = match error {
        NodeAbsent::Removed { node, .. } => map.tombstone(*node),
        NodeAbsent::Unknown { .. } => None,
    };
    let details = tombstone.map(|tombstone| prost::Message::encode_to_vec(&tombstone));
    let details = details.unwrap_or_default().into();
    let status = Status::with_details(Code::PermissionDenied, error.to_string(), details);
    match error {
        NodeAbsent::Removed { .. } => status,
        NodeAbsent::Unknown { .. } => of_unknown_node(status),
    }
}

/// Returns the status of a certificate's holder who is not a node of the mesh.
pub(super) fn no_access(error: &AccessError, map: &Map) -> Status {
    match error {
        AccessError::Absent(error) => absent(error, map),
        AccessError::Key { .. } => Status::permission_denied(error.to_string()),
    }
}

/// Returns the tombstone in the details of the status of a removed node.
pub fn tombstone_of(status: &Status) -> Option<pb::Signed> {
    let details = status.details();
    if details.is_empty() {
        return None;
    }
    prost::Message::decode(details).ok()
}
