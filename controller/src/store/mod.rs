//! The store: the persistent state of the registry.

mod file;

pub use file::{CommitError, OpenError, Record, Store, Write};
