//! Wire schema of Towline: the generated messages and services ([`pb`]), signatures over messages
//! ([`signed`]), the proof of the WireGuard key at a join ([`join_proof`]), the details of a refused call
//! ([`refusal`]), the health checking and reflection protocols ([`health`], [`reflection`]), the conversion
//! of messages into the plain types of `towline-types` ([`convert`]), and status messages as JSON
//! ([`status`]).

#![forbid(unsafe_code)]

pub use towline_types::{
    backoff, code, codes, cursor, frame, id, limits, mtu, node, ownership, pod_range, rate,
    source_limiter, stun, summary, token,
};

mod changes;
pub mod convert;
pub mod join_proof;
pub mod refusal;
pub mod signed;
pub mod status;

/// Messages and services, generated from `proto/towline/v1/*.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, rust_2018_idioms)]
pub mod pb {
    tonic::include_proto!("towline.v1");

    /// Encoded `FileDescriptorSet` of the schema.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// Messages and service of the gRPC health checking protocol, generated from `proto/grpc/health/v1/health.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, rust_2018_idioms)]
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// Messages and service of the gRPC server reflection protocol, generated from
/// `proto/grpc/reflection/v1/reflection.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, rust_2018_idioms)]
pub mod reflection {
    tonic::include_proto!("grpc.reflection.v1");
}

/// Version of this crate, which agent and controller report as their own.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// DNS name in the controller's certificate. Agents expect this name at every address that they
/// connect to: the pinned CA authenticates the controller, not the DNS.
pub const CONTROLLER_TLS_NAME: &str = "controller.towline.internal";
