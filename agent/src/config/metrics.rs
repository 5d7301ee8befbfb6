//! Section `[metrics]`: where Prometheus reads the metrics.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Settings of the metrics for Prometheus.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// Address at which `GET /metrics` is answered, without TLS and login. Absent or empty: it is not served.
    #[serde(deserialize_with = "metrics_address", skip_serializing_if = "Option::is_none")]
    pub listen: Option<MetricsAddress>,
}

/// Address of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MetricsAddress {
    /// One address with a port.
    Fixed(SocketAddr),
    /// All addresses of this node's link, with this port. One configuration fits every node.
    Overlay(u16),
}

/// Parses the address of the metrics. A template that has none for it writes an empty text.
fn metrics_address<'de, D>(deserializer: D) -> Result<Option<MetricsAddress>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    MetricsAddress::try_from(text).map(Some).map_err(serde::de::Error::custom)
}

/// Error of parsing the address of the metrics.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a valid address: use `127.0.0.1:9586`, `[::1]:9586` or `overlay:9586`")]
pub struct InvalidMetricsAddress {
    text: String,
}

impl TryFrom<String> for MetricsAddress {
    type Error = InvalidMetricsAddress;

    fn try_from(text: String) -> Result<Self, InvalidMetricsAddress> {
        let parsed = match text.strip_prefix("overlay:") {
            Some(port) => port.parse().ok().map(Self::Overlay),
            None => text.parse().ok().map(Self::Fixed),
        };
        let is_valid = |address: &Self| match address {
            Self::Fixed(address) => address.port() != 0,
            Self::Overlay(port) => *port != 0,
        };
        parsed.filter(is_valid).ok_or(InvalidMetricsAddress { text })
    }
}

impl From<MetricsAddress> for String {
    fn from(address: MetricsAddress) -> Self {
        match address {
            MetricsAddress::Fixed(address) => address.to_string(),
            MetricsAddress::Overlay(port) => format!("overlay:{port}"),
        }
    }
}
