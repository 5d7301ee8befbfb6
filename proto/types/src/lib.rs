//! Plain types and small codecs that the agent and the controller share.
//!
//! A value of such a type keeps its invariants by construction: code that has one need not check
//! it again. Nothing here does I/O or reads a clock, and nothing knows the wire schema (that is
//! `towline-proto`, which converts its messages into these types).
//!
//! | module | owns |
//! |---|---|
//! | [`id`] | names, labels, keys and the other identifiers |
//! | [`node`] | grants, records, tombstones, the mesh configuration |
//! | [`token`] | the join token and its text form |
//! | [`frame`] | what shares the UDP port: kinds of datagrams, probes, relayed datagrams |
//! | [`stun`] | STUN binding requests and responses (RFC 8489) |
//! | [`rate`] | the token bucket |
//! | [`source_limiter`] | a token bucket for each source address |
//! | [`backoff`] | how long to wait before something is tried again |
//! | [`limits`] | every bound on what comes from outside |

#![forbid(unsafe_code)]

pub mod backoff;
pub mod frame;
pub mod id;
pub mod limits;
pub mod node;
pub mod rate;
pub mod source_limiter;
pub mod stun;
pub mod token;
