//! The Towline controller: certificate authority of the mesh, registry of its nodes, and the map
//! that every node watches.
//!
//! # Parts
//!
//! ```text
//!  listen ─ tls ─► service (auth, discovery, watch, admin) ──requests──► writer ─► ledger ─► registry
//!                     │ ▲                                                     │
//!                     │ └── reads, waits for revisions ── map, view ◄─publishes─┤
//!                     └──── heartbeats ──► sessions                           └──commits──► store
//! ```
//!
//! - [`registry`](towline_registry) makes all decisions, in memory and on plain values, without clock, randomness,
//!   I/O, signatures or wire API.
//! - [`ledger`] has the registry's signed statements: it signs what the registry returns unsigned,
//!   and encodes records for the store.
//! - [`writer`] is the only thread that owns the ledger and the [`store`], which is a file or an etcd
//!   cluster. A change is stored before it is acknowledged and before a watcher sees it.
//! - [`map`] is the state that watchers see. Each watcher is a cursor in it; nothing is queued.
//! - [`view`] is the state that operators see, and [`metrics`] what Prometheus reads of all parts.
//! - [`summaries`] has what the nodes report about their tunnels, [`tunnels`] turns it into tables and pictures,
//!   and [`events`] has what happened lately. All of it is in memory, and nothing is decided by it. [`ui`] is the
//!   web page that shows it.
//! - `publish` (feature `kubernetes`) is a client that shows the same in the Kubernetes API.
//! - [`authority`] is the CA. Its key is in a separate file and never in the store, and so is the
//!   [secret](store_secret) that authenticates the store's records.
//! - [`service`] implements the RPCs, behind one table that says which role may call which RPC. Operators
//!   come by the [`local`] socket, or over the network if they chose so.
//! - `replicas` is the exchange with other controllers that use the same store.
//! - [`server`] starts and stops all parts; its `opening` opens store and ledger. [`cli`] is the command line, whose commands call a
//!   running controller.
//!
//! # Contract
//!
//! - If the process is killed at any moment, nothing that was acknowledged is lost.
//! - The controller has no WireGuard private key and sees no packet. Its store cannot be used to
//!   forge a node: grants, tombstones and the mesh configuration are signed by the CA, records by
//!   the nodes.
//! - All outside input is bounded by [`towline_proto::limits`].

pub mod authority;
pub mod cli;
pub mod clock;
pub mod config;
pub mod counters;
pub mod entropy;
pub mod events;
#[doc(hidden)]
pub mod internals;
pub mod ledger;
pub mod listen;
pub mod local;
pub mod map;
pub mod metrics;
pub mod peer;
#[cfg(feature = "kubernetes")]
pub mod publish;
mod reflector;
mod replicas;
pub mod server;
pub mod service;
mod slots;
pub mod state_dir;
pub mod store;
pub mod store_secret;
mod stored;
pub mod summaries;
pub mod tls;
pub mod tunnels;
pub mod ui;
pub mod view;
pub mod writer;

pub use config::Config;
pub use server::{Controller, ServeError, serve};
