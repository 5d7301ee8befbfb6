//! The root helper of the agent: opens a closed list of files and devices that only root may open.
//!
//! The agent runs as the user `towline`. It asks the helper for the few things that this user may
//! not open. The helper responds with open descriptors (`SCM_RIGHTS`) and exits:
//!
//! ```text
//!  agent (user towline) ──request: 4 bytes──► /run/towline/helper.sock ──► towline-helper (root)
//!        ▲                                                                        │ opens or loads
//!        └────────────────response: 12 bytes, open descriptors ◄─────────────────┘
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`protocol`] | requests and responses as bytes; which files belong to which request |
//! | [`server`] | one connection: identifying the client, opening the files, responding |
//! | [`client`] | the agent's side |
//! | [`programs`] | the eBPF programs and their loading |
//!
//! The helper must not take a path, a name or a number from its client: a request is one value of
//! [`protocol::Request`]. It reads one message of bounded size, waits a bounded time, and keeps no
//! state.

#![cfg_attr(test, allow(clippy::unwrap_used))] // in a test a panic is the report

pub mod client;
pub mod programs;
pub mod protocol;
pub mod server;
