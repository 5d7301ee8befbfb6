//! Parsers of files and variables that others write, for fuzzing. Not part of the public API.

use std::net::SocketAddr;

#[cfg(feature = "kubernetes")]
pub use crate::kubernetes::cni::plugin_type as cni_plugin;
pub use crate::lockout::parse as ssh_variable;
pub use crate::reserved_port::Ports as ReservedPorts;
pub use crate::uapi::{Progress as UapiProgress, RequestParser as UapiRequest};

/// Returns the local and the remote address in a line of `/proc/net/tcp`.
pub fn connection(line: &str) -> Option<[SocketAddr; 2]> {
    let connection = crate::lockout::connection(line)?;
    Some([connection.local, connection.remote])
}

/// Parses a question or an answer about removed nodes. Returns true if it is one.
pub fn removal_message(bytes: &[u8]) -> bool {
    crate::removals::parse(bytes).is_some()
}
