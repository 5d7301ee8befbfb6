//! Every bound on what comes from outside, in one place.
//!
//! Both sides use the same numbers: a sender stays within them, a receiver refuses what does
//! not. Raising one is compatible only when receivers are raised first.

use std::time::Duration;

/// Bytes in a DNS label, RFC 1035 section 2.3.4; a node's name is one.
pub const NAME_BYTES: usize = 63;
/// Bytes in a site's name or a label's key.
pub const LABEL_KEY_BYTES: usize = 63;
/// Bytes in a label's value.
pub const LABEL_VALUE_BYTES: usize = 253;
/// Labels of a node.
pub const LABELS: usize = 32;
/// Candidates in a record.
pub const CANDIDATES: usize = 32;
/// Prefixes in a record, in a grant, or protected in a mesh's configuration.
pub const PREFIXES: usize = 256;
/// Trusted sites of a mesh.
pub const TRUSTED_SITES: usize = 64;
/// TCP ports of a node that are reached outside the tunnel.
pub const PLAIN_PORTS: usize = 16;
/// WireGuard keys in a record or a grant.
pub const WIREGUARD_KEYS: usize = 8;
/// Overlay addresses of a node.
pub const OVERLAY_ADDRESSES: usize = 2;
/// Bytes in a version string.
pub const VERSION_BYTES: usize = 64;
/// Bytes in one signed body.
pub const SIGNED_BODY_BYTES: usize = 32 * 1024;
/// Bytes in a certificate signing request.
pub const CSR_BYTES: usize = 4 * 1024;
/// Bytes in one certificate of a chain.
pub const CERTIFICATE_BYTES: usize = 8 * 1024;
/// Certificates in a chain.
pub const CERTIFICATES: usize = 4;
/// Controller addresses in a token.
pub const CONTROLLERS: usize = 8;
/// Bytes in a controller address; its length is one byte in a token.
pub const CONTROLLER_ADDRESS_BYTES: usize = 255;
/// Nodes that one token may admit.
pub const TOKEN_USES: u32 = 10_000;
/// The longest life of a token.
pub const TOKEN_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
/// Bytes of a signal that the controller carries from one node to another: a sealed call with as
/// many candidates as there may be.
pub const SIGNAL_BYTES: usize = 1024;
/// Tombstones that a client may bring along when it starts to watch: at up to 220 bytes each they
/// fit in one message of [`MESSAGE_BYTES`].
pub const TOMBSTONES: usize = 4_000;
/// Nodes in a mesh.
pub const NODES: usize = 10_000;
/// Bytes in one gRPC message, both ways.
pub const MESSAGE_BYTES: usize = 1024 * 1024;
/// Changes in one message of the map; with [`SIGNED_BODY_BYTES`] the byte bound below applies
/// first.
pub const CHANGES: usize = 512;
/// Bytes after which a message of the map is closed and the next one begun.
pub const CHANGES_BYTES: usize = 256 * 1024;
/// Problems that are kept of one node, newest first.
pub const PROBLEMS: usize = 8;
/// The largest difference between the clocks of a node and its controller at a join.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);
