//! Operating-system services that both programs need, independent of the mesh.
//!
//! | module | owns |
//! |---|---|
//! | [`account`] | system users, looked up by name |
//! | [`directory`] | a private state directory: its owner, its permissions, how its files are written |
//! | [`pem`] | certificates and keys as PEM text |
//! | [`port_owner`] | lookup of the process that uses a port |
//! | [`process`] | protection of a process's memory |

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))] // in a test a panic is the report

pub mod account;
pub mod directory;
pub mod pem;
pub mod port_owner;
pub mod process;
