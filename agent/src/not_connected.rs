//! Reasons why the agent is not connected to a controller.

use std::net::IpAddr;

use towline_proto::codes;
use towline_service::grpc;

use crate::dial::DialError;
use crate::join::{JoinError, status_message};

/// Reason why there is no session with a controller, or why one ended.
#[derive(Debug, thiserror::Error)]
pub enum NotConnected {
    /// No session was tried yet.
    #[error("not connected yet")]
    NotYet,
    /// No controller can be reached, or it is not this mesh's.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The controller refused a request; its message names the remedy.
    #[error("{}", status_message(.0))]
    Refused(tonic::Status),
    /// The controller has a session with another machine that has this node's identity.
    #[error("{}", status_message(.0))]
    Cloned(tonic::Status),
    /// The controller accepted the connection, but no answer came.
    #[error("the controller did not answer in time")]
    NoAnswer,
    /// Nothing came from the controller for three heartbeats.
    #[error("the controller missed its heartbeats")]
    MissedHeartbeats,
    /// The controller ended the session, for example because it stops.
    #[error("the controller ended the session")]
    Ended,
    /// The connection broke.
    #[error("the connection failed")]
    Broken,
    /// This machine lost the address that the connection was bound to.
    #[error("this machine no longer has the address {0}")]
    AddressGone(IpAddr),
    /// The configuration was reloaded, and names other controllers.
    #[error("other controllers are configured")]
    OtherControllers,
    /// The controller sent something that a controller of this mesh does not send.
    #[error("invalid response from the controller: {0}")]
    InvalidResponse(&'static str),
    /// A statement of the controller is not signed by the CA, or is about something else.
    #[error("{0}")]
    InvalidStatement(String),
    /// The client certificate could not be renewed.
    #[error(transparent)]
    Renewal(JoinError),
    /// TLS cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// This node left the mesh.
    #[error("this node was removed from the mesh")]
    Removed,
}

codes! {
    NotConnected {
        NotYet => "controller-pending",
        Dial(DialError),
        Refused => "controller-refused",
        Cloned => "identity-cloned",
        NoAnswer => "controller-silent",
        MissedHeartbeats => "controller-heartbeats-missed",
        Ended => "controller-session-ended",
        Broken => "controller-connection-broken",
        AddressGone => "local-address-gone",
        OtherControllers => "other-controllers-configured",
        InvalidResponse => "controller-response-invalid",
        InvalidStatement => "controller-statement-invalid",
        Renewal => "certificate-not-renewed",
        Tls => "tls-unusable",
        Removed => "node-removed",
    }
}

impl From<tonic::Status> for NotConnected {
    fn from(status: tonic::Status) -> Self {
        match grpc::code(&status) {
            Some("identity-cloned") => Self::Cloned(status),
            _ => Self::Refused(status),
        }
    }
}

impl From<JoinError> for NotConnected {
    fn from(error: JoinError) -> Self {
        match error {
            JoinError::Dial(error) => Self::Dial(error),
            JoinError::Refused(status) => status.into(),
            other => Self::Renewal(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use towline_proto::code::Coded as _;

    use super::*;

    #[test]
    fn a_cloned_machine_has_a_code_of_its_own() {
        let status = || tonic::Status::already_exists("another session");
        assert_eq!(NotConnected::from(status()).code(), "controller-refused");
        let cloned = NotConnected::from(grpc::with_code(status(), "identity-cloned"));
        assert_eq!(cloned.code(), "identity-cloned");
        assert!(cloned.to_string().contains("another session"), "{cloned}");
    }
}
