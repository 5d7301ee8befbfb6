//! Parsers of files that others write, for fuzzing. Not part of the public API.

pub use crate::account::parse as account;
pub use crate::port_owner::parse as port_owner;
