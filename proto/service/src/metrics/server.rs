//! Server of the metrics: it answers `GET /metrics`, the probes `GET /healthz` and `GET /readyz` of programs that have
//! them, and nothing else.

use std::net::SocketAddr;
use std::sync::Arc;

use hyper::StatusCode;

use crate::http::{self, Get, Listen, Reply};

/// Function that returns why the program is not ready for clients, if it is not.
pub type Readiness = Arc<dyn Fn() -> Result<(), &'static str> + Send + Sync>;

/// Path of the probe whether the program runs.
const HEALTH_PATH: &str = "/healthz";
/// Path of the probe whether the program is ready for clients.
const READY_PATH: &str = "/readyz";
/// Content type of the answers to probes.
const PLAIN: &str = "text/plain; charset=utf-8";
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
    serve_with_health(address, collect, None).await;
}

/// Serves the metrics as [`serve`] does, and the probes if there is a `readiness`.
pub async fn serve_with_health<F>(
    address: SocketAddr,
    collect: impl Fn() -> F + Clone + Send + Sync + 'static,
    readiness: Option<Readiness>,
) where
    F: Future<Output = Option<String>> + Send + 'static,
{
    let listen = Listen { what: "metrics", address, connections: CONNECTIONS };
    http::serve(listen, move |get| reply(get, collect.clone(), readiness.clone())).await;
}

async fn reply<F>(get: Get, collect: impl Fn() -> F, readiness: Option<Readiness>) -> Reply
where
    F: Future<Output = Option<String>>,
{
    if let Some(readiness) = readiness
        && let Some(reply) = probe(&get.path, &readiness)
    {
        return reply;
    }
    if get.path != PATH {
        return Reply::error(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    let text = collect().await;
    match text {
        Some(text) => Reply::ok(super::CONTENT_TYPE, text),
        None => Reply::error(StatusCode::SERVICE_UNAVAILABLE, "the program cannot answer now\n"),
    }
}

/// Returns the reply to a probe; `None` for other paths. What answers at all is healthy.
fn probe(path: &str, readiness: &Readiness) -> Option<Reply> {
    match path {
        HEALTH_PATH => Some(Reply::ok(PLAIN, "ok\n")),
        READY_PATH => Some(match readiness() {
            Ok(()) => Reply::ok(PLAIN, "ready\n"),
            Err(why) => Reply {
                status: StatusCode::SERVICE_UNAVAILABLE,
                ..Reply::ok(PLAIN, format!("{why}\n"))
            },
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::testing::exchange;

    async fn ask(path: &str, text: Option<&'static str>, readiness: Option<Readiness>) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        let collect = move || async move { text.map(ToOwned::to_owned) };
        exchange(&request, move |get| reply(get, collect, readiness.clone())).await
    }

    #[tokio::test]
    async fn metrics_are_served_and_nothing_else() {
        let response = ask("/metrics", Some("towline_a 1\n"), None).await;
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
        assert!(response.to_lowercase().contains("content-type: text/plain; version=0.0.4"));
        assert!(response.ends_with("\r\n\r\ntowline_a 1\n"), "{response}");
        assert!(ask("/", Some(""), None).await.starts_with("HTTP/1.1 404 "));
        assert!(ask("/metrics", None, None).await.starts_with("HTTP/1.1 503 "));
    }

    #[tokio::test]
    async fn probes_are_answered_where_the_program_has_them() {
        let probe = async |path: &str, state: Result<(), &'static str>| {
            ask(path, Some(""), Some(Arc::new(move || state))).await
        };
        assert!(probe("/healthz", Err("it stops")).await.starts_with("HTTP/1.1 200 "));
        assert!(probe("/readyz", Ok(())).await.starts_with("HTTP/1.1 200 "));
        let stops = probe("/readyz", Err("it stops")).await;
        assert!(stops.starts_with("HTTP/1.1 503 ") && stops.ends_with("it stops\n"), "{stops}");
        assert!(probe("/other", Ok(())).await.starts_with("HTTP/1.1 404 "));
        assert!(ask("/healthz", Some(""), None).await.starts_with("HTTP/1.1 404 "));
    }
}
