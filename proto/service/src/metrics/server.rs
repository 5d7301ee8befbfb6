//! Server of the metrics: it answers `GET /metrics`.

use std::net::SocketAddr;

use hyper::StatusCode;

use crate::http::{self, Get, Listen, Reply};

/// Path of the metrics.
const PATH: &str = "/metrics";
/// Largest number of connections at the same time.
const CONNECTIONS: usize = 8;

/// Listens on `address`, as soon as that is possible, and serves the text that `collect` returns. `None` means
/// that the program cannot answer now. Never returns.
pub async fn serve<F>(address: SocketAddr, collect: impl Fn() -> F + Clone + Send + Sync + 'static)
where
    F: Future<Output = Option<String>> + Send + 'static,
{
    let listen = Listen { what: "metrics", address, connections: CONNECTIONS };
    http::serve(listen, move |get| reply(get, collect.clone())).await;
}

async fn reply<F>(get: Get, collect: impl Fn() -> F) -> Reply
where
    F: Future<Output = Option<String>>,
{
    if get.path != PATH {
        return Reply::error(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    let text = collect().await;
    match text {
        Some(text) => Reply::ok(super::CONTENT_TYPE, text),
        None => Reply::error(StatusCode::SERVICE_UNAVAILABLE, "the program cannot answer now\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::testing::exchange;

    #[tokio::test]
    async fn metrics_are_served_and_nothing_else() {
        async fn ask(path: &str, text: Option<&'static str>) -> String {
            let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
            let collect = move || async move { text.map(ToOwned::to_owned) };
            exchange(&request, move |get| reply(get, collect)).await
        }
        let response = ask("/metrics", Some("towline_a 1\n")).await;
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
        assert!(response.to_lowercase().contains("content-type: text/plain; version=0.0.4"));
        assert!(response.ends_with("\r\n\r\ntowline_a 1\n"), "{response}");
        assert!(ask("/", Some("")).await.starts_with("HTTP/1.1 404 "));
        assert!(ask("/metrics", None).await.starts_with("HTTP/1.1 503 "));
    }
}
