//! Spans for OpenTelemetry: how long a join took, and each step of a start of the agent.
//!
//! ```text
//!   join ──► start ─┬─ connect       until a controller answered
//!                   ├─ map           until the first message of its map
//!                   ├─ handshake     from the first attempt until a peer answered
//!                   └─ first packet  until inner traffic of that or another peer
//! ```
//!
//! The module owns these spans and how they are sent (OTLP over gRPC). It decides nothing: an agent whose
//! collector does not answer works like any other. Without the feature `otel` only the configuration is here.

#[cfg(feature = "otel")]
mod export;
#[cfg(feature = "otel")]
mod spans;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

#[cfg(feature = "otel")]
pub(crate) use export::{report_join, start_trace};
#[cfg(feature = "otel")]
pub(crate) use spans::{StartTrace, Step};

/// True if this program can send spans.
pub const IS_BUILT: bool = cfg!(feature = "otel");

/// Settings of the spans for OpenTelemetry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Address of an OpenTelemetry collector on this machine (OTLP over gRPC, without TLS), which receives the
    /// spans of a join and of each start. Absent: none are sent. Needs an agent that is built with the feature `otel`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<OtlpEndpoint>,
}

/// Address of a collector: `http://` and an address of the loopback with a port. Spans name peers and are sent
/// in clear, so they do not leave the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OtlpEndpoint(SocketAddr);

/// Error of parsing the address of a collector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an address on this machine: use one such as `http://127.0.0.1:4317`")]
pub struct InvalidEndpoint {
    text: String,
}

impl TryFrom<String> for OtlpEndpoint {
    type Error = InvalidEndpoint;

    fn try_from(text: String) -> Result<Self, InvalidEndpoint> {
        let authority = text.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
        let address = authority.and_then(|authority| authority.parse::<SocketAddr>().ok());
        let is_valid = |address: &SocketAddr| address.ip().is_loopback() && address.port() != 0;
        address.filter(is_valid).map(Self).ok_or(InvalidEndpoint { text })
    }
}

impl From<OtlpEndpoint> for String {
    fn from(OtlpEndpoint(address): OtlpEndpoint) -> Self {
        format!("http://{address}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_on_this_machine() {
        for (text, read) in [
            ("http://127.0.0.1:4317", Some("http://127.0.0.1:4317")),
            ("http://[::1]:4317/", Some("http://[::1]:4317")),
            ("http://192.0.2.1:4317", None),
            ("https://127.0.0.1:4317", None),
            ("http://localhost:4317", None),
            ("http://127.0.0.1:0", None),
            ("127.0.0.1:4317", None),
            ("", None),
        ] {
            let endpoint = OtlpEndpoint::try_from(text.to_owned()).ok().map(String::from);
            assert_eq!(endpoint.as_deref(), read, "{text}");
        }
    }
}
