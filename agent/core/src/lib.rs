//! Every decision of the Towline agent, without I/O.
//!
//! [`Mesh`](mesh::Mesh) owns every peer of one node. Its caller tells it what happened, each time
//! with the time `now`; it answers with [`Output`](mesh::Output)s and with the one moment at which
//! it wants to be called again.
//!
//! # From the map to a tunnel
//!
//! 1. **A node becomes known.** A change of the network map brings its signed grant and record. The
//!    roster decides which prefixes it holds; the [peer table](peer_table::PeerTable) and the
//!    [plan](plan::Plan) follow.
//! 2. **A path is found.** Pings and handshake initiations go to every candidate, from every
//!    uplink, and through relays. One of the two nodes is the initiator, so that handshakes do not
//!    cross. The first handshake that completes makes its path carry the traffic.
//! 3. **The best path is chosen.** Pings measure each path that answers. Traffic moves to a better
//!    one by a fresh handshake there, and padded pings find the path MTU.
//! 4. **A dead path is left.** Pongs that are missing put a path in doubt; another path that answers
//!    takes over, or everything is tried again.
//!
//! ```
//! use std::time::Instant;
//! use towline_core::mesh::{Config, Mesh, Output};
//! use towline_core::peer_table::Observation;
//! use towline_core::plan::RulePlan;
//! use towline_core::static_peers::StaticPeer;
//! use towline_types::id::WireguardKey;
//! use towline_types::mtu::Mtu;
//!
//! let now = Instant::now();
//! let rules = RulePlan { priority: 100, mark: 0x10, mask: 0x30 };
//! let (link, firewall_table) = ("towline0".into(), "towline".into());
//! let membership = None; // no mesh: static peers are all there is
//! let config = Config { membership, link, mtu: Mtu::DEFAULT, table: 100, rules, firewall_table, relay: None, boot_epoch: 1 };
//! let mut mesh = Mesh::new(config, [7; 32], now);
//!
//! // Inputs: the peers of the configuration, and a packet for one of them.
//! let public_key = WireguardKey([2; 32]);
//! let endpoint = "203.0.113.7:51820".parse().ok();
//! let prefixes = vec!["10.9.0.0/24".parse().unwrap()];
//! let peer = StaticPeer { name: "office".into(), public_key, preshared_key: None, endpoint, prefixes, keepalive: None };
//! mesh.set_static_peers(now, vec![peer]);
//! mesh.handle_observation(now, public_key, Observation::Wanted);
//!
//! // Outputs: the table for the data plane, the plan for the host, then a handshake.
//! assert!(matches!(mesh.poll_output(), Some(Output::PeerTable(table)) if table.peers.len() == 1));
//! assert!(matches!(mesh.poll_output(), Some(Output::Plan(_))));
//! assert!(std::iter::from_fn(|| mesh.poll_output()).any(|output| matches!(output, Output::Handshake { .. })));
//! ```
//!
//! # Contract
//!
//! - No clock, no socket, no lock, no task, no thread. Randomness is a seed given at construction.
//! - The same calls with the same times and the same seed give the same outputs.
//! - `now` never goes back. A caller whose clock jumped passes the latest time it ever passed.
//! - After each call: drain [`Mesh::poll_output`](mesh::Mesh::poll_output) until `None`, then look
//!   at [`Mesh::poll_timeout`](mesh::Mesh::poll_timeout), and at that time (or later) call
//!   [`Mesh::handle_timeout`](mesh::Mesh::handle_timeout).
//! - The peer table, the forwarding table and the plan come whole and are comparable: each replaces
//!   the last one. The path of one peer also comes by itself, and changes the last peer table.
//! - Decisions are traced at debug level, in a span for each peer. A trace carries no time of the
//!   core's own, and costs nothing while nobody listens.

#![forbid(unsafe_code)]
// A new variant must be handled wherever a state or a message decides.
#![deny(clippy::wildcard_enum_match_arm)]

mod budget;
mod changes;
mod claims;
pub mod config;
pub mod conflict;
pub mod counters;
mod derived;
mod effects;
pub mod forwarding;
mod home_relays;
pub mod local_limits;
pub mod local_networks;
mod local_node;
pub mod mesh;
pub mod output;
pub mod own_networks;
pub mod path;
mod peer;
pub mod peer_history;
pub mod peer_table;
mod peers;
mod pings;
pub mod plan;
pub mod prefixes;
pub mod probe_session;
mod probing;
pub mod reason;
mod relay_server;
mod roster;
mod routing;
mod rtt;
mod second_port;
mod silence;
pub mod static_peers;
pub mod status;
pub mod stun_client;
mod timers;
mod withdrawn;
