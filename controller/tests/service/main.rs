//! Tests of the controller's gRPC services, with nodes and operators as clients.

#![allow(clippy::unwrap_used, reason = "a panic is the report")]

mod history;
mod joins;
mod limits;
mod operators;
mod sessions;
mod versions;
