//! The Towline controller: the mesh's certificate authority, its registry, and the map that every
//! node follows.
//!
//! # Parts
//!
//! ```text
//!  listen ─ tls ─► service (auth, discovery, watch, admin) ──requests──► writer ─► registry
//!                     │ ▲                                                   │
//!                     │ └──── reads, waits for revisions ─── map ◄──shows── ┤
//!                     └──── heartbeats ──► sessions                         └──commits──► store
//! ```
//!
//! - [`registry`] decides, in memory, without clock, randomness, I/O or wire API.
//! - [`writer`] is the one thread that owns registry and [`store`]: acknowledged means stored, and
//!   nothing is shown that is not.
//! - [`map`] is what is shown: each watcher is a cursor in it, and nothing is queued for anybody.
//! - [`authority`] is the CA; its key is a file of its own and never in the store.
//! - [`service`] turns messages into operations, behind one table of who may call what.
//! - [`server`] puts it together; [`cli`] is the command line, which only ever talks to a running
//!   controller.
//!
//! # Contract
//!
//! - A kill at any moment loses nothing that was acknowledged.
//! - It holds no WireGuard private key and no packet, and its store cannot be used to forge a
//!   node: grants, tombstones and the mesh's configuration are signed by the CA, records by nodes.
//! - All that comes from outside is bounded by `towline_proto::limits`.

pub mod authority;
pub mod cli;
pub mod clock;
pub mod config;
pub mod entropy;
pub mod listen;
pub mod map;
pub mod notify;
pub mod peer;
mod reflector;
pub mod registry;
pub mod server;
pub mod service;
pub mod state_dir;
pub mod store;
pub mod tls;
pub mod writer;

pub use config::Config;
pub use server::{Controller, ServeError, serve};
