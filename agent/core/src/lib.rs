//! Every decision of the Towline agent, without I/O.
//!
//! [`Mesh`](mesh::Mesh) owns every peer. It is told what happened (a change of the map, an observation of the
//! data plane, a probe that came in, a deadline that passed), each time with the time `now`; it
//! answers with [`Output`](mesh::Output)s, which the caller drains until there are none; and it
//! names the one moment at which it wants to be called again.
//!
//! # Contract
//!
//! - No clock, no socket, no lock, no task, no thread. Randomness is a seed given at construction.
//! - The same calls with the same times and the same seed give the same outputs.
//! - `now` never goes back. A caller whose clock jumped passes the latest time it ever passed.
//! - After each call: drain [`Mesh::poll_output`](mesh::Mesh::poll_output) until `None`, then look
//!   at [`Mesh::poll_timeout`](mesh::Mesh::poll_timeout), and at that time (or later) call
//!   [`Mesh::handle_timeout`](mesh::Mesh::handle_timeout).
//! - The peer table and the plan come whole and are comparable: the one before is replaced.

#![forbid(unsafe_code)]

mod budget;
mod changes;
mod claims;
pub mod config;
pub mod counters;
mod derived;
mod effects;
mod home_relays;
mod local_node;
pub mod mesh;
pub mod output;
pub mod own_networks;
pub mod path;
mod peer;
pub mod peer_table;
mod peers;
mod pings;
pub mod plan;
pub mod prefixes;
mod probing;
mod roster;
mod routing;
mod rtt;
pub mod static_peers;
pub mod status;
pub mod stun_client;
mod timers;
