//! gRPC over a connection that exists already.
//!
//! The caller connects by itself, so that an error of connecting is an error of its own, and not
//! hidden in one of the channel. A channel has exactly one connection: when it fails, the caller
//! connects again.

use std::io;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Longest message of a status that is shown, in characters.
const MESSAGE_CHARS: usize = 500;
/// Name of the metadata of a status that holds a stable code.
const CODE: &str = "towline-code";

/// Opens a channel on a stream. `endpoint` has the settings of the channel; its address is not
/// dialled.
///
/// # Errors
///
/// If the HTTP/2 connection cannot be opened.
pub async fn channel(
    endpoint: Endpoint,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<Channel, tonic::transport::Error> {
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let taken = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { taken }
    });
    endpoint.connect_with_connector(connector).await
}

/// Returns the message of a status for the operator, in one line; empty if it has none. A message that
/// is cut ends with an ellipsis.
pub fn message(status: &Status) -> String {
    let mut rest = status.message().chars();
    let printable: String = rest.by_ref().take(MESSAGE_CHARS).collect();
    let words = printable.split(|c: char| c.is_control() || c.is_whitespace());
    let line = words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
    if rest.next().is_some() { line + "…" } else { line }
}

/// Adds a stable code to a status, for clients that tell reasons with one gRPC code apart.
pub fn with_code(mut status: Status, code: &'static str) -> Status {
    status.metadata_mut().insert(CODE, MetadataValue::from_static(code));
    status
}

/// Returns the stable code of a status, if it has one.
pub fn code(status: &Status) -> Option<&str> {
    status.metadata().get(CODE)?.to_str().ok()
}

/// Returns whether a status is about the connection, and not the server's answer.
pub fn is_of_the_transport(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_has_the_code_that_was_added() {
        let status = Status::already_exists("taken");
        assert_eq!(code(&status), None);
        assert_eq!(code(&with_code(status, "identity-cloned")), Some("identity-cloned"));
    }

    #[test]
    fn a_message_is_one_short_line() {
        let status = Status::internal("two\n lines\u{7} \x1b[31m");
        assert_eq!(message(&status), "two lines [31m");
        assert_eq!(message(&Status::internal("")), "");
        let whole = "x".repeat(MESSAGE_CHARS);
        assert_eq!(message(&Status::internal(&whole)), whole);
        assert_eq!(message(&Status::internal("x".repeat(10_000))), whole + "…");
    }
}
