//! Towline's wire schema, and the plain types that the agent and the controller share.
//!
//! Two layers:
//!
//! - **Plain types** ([`id`], [`node`], [`token`]) and small codecs ([`frame`], [`stun`]), always there.
//!   A value of such a type keeps its invariants by construction; code that has one need not
//!   check it again. The crate `towline-core` sees only these.
//! - With the feature `grpc`: the messages and services (`pb`), the signatures (`signed`), and
//!   the one place where messages become plain types (`convert`).
//!
//! Every bound on what comes from outside is in [`limits`].

pub mod frame;
pub mod id;
pub mod limits;
pub mod node;
pub mod source_limiter;
pub mod stun;
pub mod token;

#[cfg(feature = "grpc")]
pub mod convert;
#[cfg(feature = "grpc")]
pub mod join_proof;
#[cfg(feature = "grpc")]
pub mod signed;

/// The messages and services, generated from `proto/towline/v1/*.proto`.
#[cfg(feature = "grpc")]
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
