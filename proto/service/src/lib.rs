//! What the agent and the controller share as services of a machine, independent of the mesh.
//!
//! | module | owns |
//! |---|---|
//! | [`account`] | system users, looked up by name |
//! | [`certificate`] | what is read from an X.509 certificate |
//! | [`color`] | colors of the output, on terminals alone |
//! | [`config_file`] | configuration files in TOML, and their errors |
//! | [`directory`] | a private state directory: its owner, its permissions, how its files are written |
//! | [`event_output`] | events as both programs print them |
//! | [`events`] | the newest events of a program, with ids to resume after |
//! | [`mod@file`] | files that are replaced atomically |
//! | [`grpc`] | gRPC over a connection that exists already |
//! | [`http`] | small read-only HTTP server |
//! | [`local_socket`] | who may use a program's local socket |
//! | [`log`] | log output, to the journal or elsewhere, as text or JSON |
//! | [`manual`] | shell completions and man pages |
//! | [`mod@metrics`] | metrics for Prometheus: table, text and server |
//! | [`notify`] | notifications to the service manager |
//! | [`output`] | tables, JSON and YAML on stdout |
//! | [`pem`] | certificates and keys as PEM text |
//! | [`port_owner`] | lookup of the process that uses a port |
//! | [`process`] | protection of a process's memory |
//! | [`tcp`] | liveness of TCP connections |
//! | [`tls`] | TLS settings of both sides |

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))] // in a test a panic is the report

pub mod account;
pub mod certificate;
pub mod color;
pub mod config_file;
pub mod directory;
pub mod event_output;
pub mod events;
pub mod file;
pub mod grpc;
pub mod http;
#[doc(hidden)]
pub mod internals;
pub mod local_socket;
pub mod log;
pub mod manual;
pub mod metrics;
pub mod notify;
pub mod output;
pub mod pem;
pub mod port_owner;
pub mod process;
pub mod tcp;
pub mod tls;
