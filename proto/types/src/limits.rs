//! Every bound on outside input, in one place.
//!
//! Senders and receivers use the same numbers: a sender stays within them, a receiver refuses
//! input beyond them. To raise a bound compatibly, update the receivers first.

use std::time::Duration;

/// Bytes in a node's name, which is a DNS label (RFC 1035 section 2.3.4).
pub const NAME_BYTES: usize = 63;
/// Bytes in a site's name or a label's key.
pub const LABEL_KEY_BYTES: usize = 63;
/// Bytes in a label's value.
pub const LABEL_VALUE_BYTES: usize = 253;
/// Labels of a node.
pub const LABELS: usize = 32;
/// Largest generation of a record. A node that publishes each second reaches it in nine million years, so a higher one
/// is an attempt to leave the node no number to publish with.
pub const GENERATION: u64 = 1 << 48;
/// Largest step from one generation of a record to the next. A node whose state was restored takes its number from the
/// map.
pub const GENERATION_STEP: u64 = 1 << 20;
/// Candidates in a record.
pub const CANDIDATES: usize = 32;
/// Prefixes in a record, in a grant, or protected in a mesh's configuration.
pub const PREFIXES: usize = 256;
/// Prefixes that are guarded for one node, outside the ranges that the mesh guards anyway.
pub const GUARDED_PREFIXES: usize = 64;
/// Pod ranges of a token or a grant.
pub const POD_RANGES: usize = 8;
/// Blocks that a node may announce of one pod range.
pub const POD_BLOCKS: u32 = 64;
/// Trusted sites of a mesh.
pub const TRUSTED_SITES: usize = 64;
/// TCP ports of a node that are reached outside of the tunnel.
pub const PLAIN_PORTS: usize = 16;
/// WireGuard keys in a record or a grant.
pub const WIREGUARD_KEYS: usize = 8;
/// Overlay addresses of a node.
pub const OVERLAY_ADDRESSES: usize = 2;
/// Bytes in a version string.
pub const VERSION_BYTES: usize = 64;
/// Bytes in one signed body.
pub const SIGNED_BODY_BYTES: usize = 32 * 1024;
/// Bytes in a record that a node publishes. Records that an earlier version stored may be longer.
pub const RECORD_BYTES: usize = 8 * 1024;
/// Bytes that the networks take in a record that a node publishes. With [`CANDIDATES`] of IPv6, all its other
/// fields take less than the rest. [`PREFIXES`] fit. LANs are named twice: [`PREFIXES`] of IPv4 fit, about 160 of
/// IPv6.
pub const RECORD_NETWORK_BYTES: usize = RECORD_BYTES - 1024;
/// Bytes in a certificate signing request.
pub const CSR_BYTES: usize = 4 * 1024;
/// Bytes in one certificate of a chain.
pub const CERTIFICATE_BYTES: usize = 8 * 1024;
/// Certificates in a chain.
pub const CERTIFICATES: usize = 4;
/// Controller addresses in a token, or in a mesh's configuration.
pub const CONTROLLERS: usize = 8;
/// Bytes in a controller address; its length is one byte in a token.
pub const CONTROLLER_ADDRESS_BYTES: usize = 255;
/// Nodes that one token may admit.
pub const TOKEN_USES: u32 = 10_000;
/// Longest lifetime of a token.
pub const TOKEN_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
/// Time that an ephemeral node may be offline before it is removed: the shortest, which is longer than a session
/// without heartbeats lasts, and the longest.
pub const EPHEMERAL_AFTER: (Duration, Duration) =
    (Duration::from_secs(60), Duration::from_secs(30 * 24 * 3600));
/// Bytes in a signal that the controller forwards from one node to another. A sealed
/// [`CallMe`](crate::frame::Probe::CallMe) with [`CANDIDATES`] candidates fits.
pub const SIGNAL_BYTES: usize = 1024;
/// Tombstones that a client may send when it starts a watch. At up to 254 bytes each, with the one
/// WireGuard key that a grant has, they fit in one message of [`MESSAGE_BYTES`].
pub const TOMBSTONES: usize = 4_000;
/// Nodes in a mesh.
pub const NODES: usize = 10_000;
/// Bytes in one gRPC message, in both directions.
pub const MESSAGE_BYTES: usize = 1024 * 1024;
/// Changes in one message of the map. If the entries are large, [`CHANGES_BYTES`] applies first.
pub const CHANGES: usize = 512;
/// Bytes after which a message of the map is full and the next one starts.
pub const CHANGES_BYTES: usize = 256 * 1024;
/// Problems that are kept for one node. The oldest ones are dropped.
pub const PROBLEMS: usize = 8;
/// Peers in a summary of a node's tunnels. With 10,000 nodes, a controller keeps 640,000 of them in about
/// 60 MB.
pub const SUMMARY_PEERS: usize = 64;
/// Bytes in the code of a reason.
pub const CODE_BYTES: usize = 48;
/// Largest difference between the clocks of a node and its controller at a join.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);
