//! What both programs need as services of a machine, and nothing of the mesh.
//!
//! | module | owns |
//! |---|---|
//! | [`account`] | system users, looked up by name |
//! | [`directory`] | a private state directory: its owner, its permissions, how its files are written |
//! | [`pem`] | certificates and keys as PEM text |
//! | [`port_owner`] | who has a port that cannot be bound |
//! | [`process`] | what a process gives up at its start |

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))] // in a test a panic is the report

pub mod account;
pub mod directory;
pub mod pem;
pub mod port_owner;
pub mod process;
