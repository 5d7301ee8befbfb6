//! Towline's wire schema: the messages and services (`pb`), the signatures over them ([`signed`]),
//! the join proof, and the one place where messages become the plain types of `towline-types`
//! ([`convert`]).

#![forbid(unsafe_code)]

pub use towline_types::{backoff, frame, id, limits, node, rate, source_limiter, stun, token};

pub mod convert;
pub mod join_proof;
pub mod signed;

/// The messages and services, generated from `proto/towline/v1/*.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, rust_2018_idioms)]
pub mod pb {
    tonic::include_proto!("towline.v1");

    /// The schema as a `FileDescriptorSet`, encoded.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// The crate's version, which agent and controller report as theirs.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The name in the controller's certificate. Agents ask for this name whatever address they
/// dial, because the pinned CA, not the DNS, says who the controller is.
pub const CONTROLLER_TLS_NAME: &str = "controller.towline.internal";
