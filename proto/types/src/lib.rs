//! Plain types and small codecs that the agent and the controller share.
//!
//! These types keep their invariants by construction: code that has a value need not check it
//! again. The crate does no I/O, reads no clock and does not depend on the wire schema
//! (`towline-proto` converts its messages into these types).
//!
//! | module | owns |
//! |---|---|
//! | [`id`] | names, labels, keys and the other identifiers |
//! | [`node`] | grants, records, tombstones, the mesh configuration |
//! | [`ownership`] | the rule that decides who may hold a prefix |
//! | [`pod_range`] | networks of which a node may announce a few blocks |
//! | [`token`] | the join token and its text form |
//! | [`frame`] | datagrams on the shared UDP port: their kinds, probes, relayed datagrams |
//! | [`stun`] | STUN binding requests and responses (RFC 8489) |
//! | [`summary`] | the state of a node's tunnels, as it reports it to operators |
//! | [`mtu`] | the MTU of the mesh's link |
//! | [`code`] | stable codes of what operators read |
//! | [`cursor`] | bytes that a parser reads step by step |
//! | [`rate`] | the token bucket |
//! | [`source_limiter`] | a token bucket for each source address |
//! | [`backoff`] | pauses between attempts, with jitter |
//! | [`limits`] | every bound on outside input |

#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing)]

pub mod backoff;
pub mod code;
pub mod cursor;
pub mod frame;
pub mod id;
pub mod limits;
pub mod mtu;
pub mod node;
pub mod ownership;
pub mod pod_range;
mod probe_version;
pub mod rate;
pub mod source_limiter;
pub mod stun;
pub mod summary;
pub mod token;
