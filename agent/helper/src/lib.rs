//! The root helper of the agent: opens a closed list of files and devices that only root may open, and
//! loads the agent's eBPF programs.
//!
//! The agent runs as the user `towline`. It asks the helper for the few things that this user may
//! not open. The helper responds with open descriptors (`SCM_RIGHTS`) and exits:
//!
//! ```text
//!  agent (user towline) ──request────────────► /run/towline/helper.sock ──► towline-helper (root)
//!        ▲                                                                        │ opens or loads
//!        └────────────────response: 12 bytes, open descriptors ◄─────────────────┘
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`protocol`] | requests and responses as bytes; which files belong to which request |
//! | [`server`] | one connection: identifying the client, opening the files, responding |
//! | [`client`] | the agent's side |
//! | [`programs`] | loading eBPF programs, and the one that chooses the queue of a TUN |
//! | [`egress`] | the eBPF program that guards an uplink, and its attachment |
//! | [`wireguard_socket`] | the socket of `wg show` in the directory that all WireGuard programs share |
//!
//! The helper must not take a path, a name or a program from its client: a request is one value of
//! [`protocol::Request`], whose few numbers are checked when it is parsed. It reads one message of bounded size, waits a bounded time, and keeps no
//! state.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::unwrap_used))] // in a test a panic is the report

pub mod client;
pub mod egress;
pub mod programs;
pub mod protocol;
pub mod server;
pub mod wireguard_socket;
