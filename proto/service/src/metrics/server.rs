//! HTTP server of the metrics: it answers `GET /metrics`, the probes `GET /healthz` and `GET /readyz` of programs that
//! have them, and nothing else.
//!
//! There is no TLS and no login: who reaches the address reads the metrics. So it is off by default, and the
//! documents propose the loopback or the overlay. A connection has one request, of bounded size and duration,
//! and the number of connections is bounded.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// Function that returns why the program is not ready for clients, if it is not.
pub type Readiness = Arc<dyn Fn() -> Result<(), &'static str> + Send + Sync>;

/// Path of the probe whether the program runs.
const HEALTH_PATH: &str = "/healthz";
/// Path of the probe whether the program is ready for clients.
const READY_PATH: &str = "/readyz";
/// Path of the metrics.
const PATH: &str = "/metrics";
/// Longest duration of a connection. Prometheus gives up after 10 s by default.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest number of connections at the same time; further ones are closed at once.
const CONNECTIONS: usize = 8;
/// Largest size of a request's head in bytes, the smallest that hyper allows.
const REQUEST_BYTES: usize = 8 * 1024;
/// Pause after an address that could not be bound. An address of the overlay exists once the link is up.
const RETRY: Duration = Duration::from_secs(5);
/// Pause after a connection that could not be accepted: the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    let listener = bind(address).await;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection for metrics");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let (collect, readiness) = (collect.clone(), readiness.clone());
        tokio::spawn(async move {
            // A client that is gone, too slow or no HTTP client ends its own connection.
            let _ = timeout(TIMEOUT, answer(stream, collect, readiness)).await;
            drop(place);
        });
    }
}

async fn bind(address: SocketAddr) -> TcpListener {
    let mut is_told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                tracing::info!(%address, "metrics served");
                return listener;
            }
            Err(error) if !is_told => {
                is_told = true;
                tracing::warn!(%address, %error, "metrics not served yet: cannot bind the address");
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

/// Answers the request of a connection.
async fn answer<F>(
    stream: TcpStream,
    collect: impl Fn() -> F,
    readiness: Option<Readiness>,
) -> Result<(), hyper::Error>
where
    F: Future<Output = Option<String>>,
{
    let service = service_fn(|request: Request<Incoming>| {
        let (method, path) = (request.method(), request.uri().path());
        let probed = readiness.as_ref().and_then(|readiness| probe(method, path, readiness));
        let refused = probed.or_else(|| refusal(method, path));
        let text = refused.is_none().then(&collect);
        async move {
            let response = match (refused, text) {
                (Some(refused), _) => refused,
                (None, Some(text)) => response(text.await),
                (None, None) => response(None),
            };
            Ok::<_, Infallible>(response)
        }
    });
    http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(REQUEST_BYTES)
        // The connection as a whole has a limit.
        .header_read_timeout(None::<Duration>)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

/// Returns a response with a text.
fn with(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
}

/// Returns the response to a probe. What answers at all is healthy.
fn probe(method: &Method, path: &str, readiness: &Readiness) -> Option<Response<Full<Bytes>>> {
    if method != Method::GET && method != Method::HEAD {
        return None;
    }
    match path {
        HEALTH_PATH => Some(with(StatusCode::OK, "ok\n".to_owned())),
        READY_PATH => Some(match readiness() {
            Ok(()) => with(StatusCode::OK, "ready\n".to_owned()),
            Err(why) => with(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        }),
        _ => None,
    }
}

/// Returns the response to a request for anything but the metrics and the probes.
fn refusal(method: &Method, path: &str) -> Option<Response<Full<Bytes>>> {
    if path != PATH {
        return Some(with(StatusCode::NOT_FOUND, "metrics are at /metrics\n".to_owned()));
    }
    if method != Method::GET {
        let mut response = with(StatusCode::METHOD_NOT_ALLOWED, "only GET is allowed\n".to_owned());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return Some(response);
    }
    None
}

/// Returns the response with the metrics.
fn response(text: Option<String>) -> Response<Full<Bytes>> {
    let is_available = text.is_some();
    let mut response = Response::new(Full::new(Bytes::from(text.unwrap_or_default())));
    if is_available {
        let kind = HeaderValue::from_static(super::CONTENT_TYPE);
        response.headers_mut().insert(CONTENT_TYPE, kind);
    } else {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn exchange(request: &str, text: Option<&'static str>) -> String {
        exchange_with(request, text, None).await
    }

    async fn exchange_with(
        request: &str,
        text: Option<&'static str>,
        readiness: Option<Readiness>,
    ) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let collect = move || async move { text.map(ToOwned::to_owned) };
            let _ = answer(stream, collect, readiness).await;
        });
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        // A request that is refused early may be answered with a reset.
        let _ = stream.read_to_end(&mut response).await;
        serving.await.unwrap();
        String::from_utf8(response).unwrap()
    }

    #[tokio::test]
    async fn metrics_are_served_and_nothing_else() {
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        let response = exchange(&get("/metrics"), Some("towline_a 1\n")).await;
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
        assert!(response.to_lowercase().contains("content-type: text/plain; version=0.0.4"));
        assert!(response.ends_with("\r\n\r\ntowline_a 1\n"), "{response}");
        assert!(exchange(&get("/"), Some("")).await.starts_with("HTTP/1.1 404 "));
        assert!(exchange(&get("/metrics"), None).await.starts_with("HTTP/1.1 503 "));
        let post = "POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
        assert!(exchange(post, Some("")).await.starts_with("HTTP/1.1 405 "));
    }

    #[tokio::test]
    async fn probes_are_answered_where_the_program_has_them() {
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        let ask = async |path: &str, state: Result<(), &'static str>| {
            exchange_with(&get(path), Some(""), Some(Arc::new(move || state))).await
        };
        assert!(ask("/healthz", Err("it stops")).await.starts_with("HTTP/1.1 200 "));
        assert!(ask("/readyz", Ok(())).await.starts_with("HTTP/1.1 200 "));
        let stops = ask("/readyz", Err("it stops")).await;
        assert!(stops.starts_with("HTTP/1.1 503 ") && stops.ends_with("it stops\n"), "{stops}");
        assert!(ask("/other", Ok(())).await.starts_with("HTTP/1.1 404 "));
        assert!(exchange(&get("/healthz"), Some("")).await.starts_with("HTTP/1.1 404 "));
    }

    #[tokio::test]
    async fn a_long_head_is_refused() {
        let long = "x".repeat(2 * REQUEST_BYTES);
        let request = format!("GET /metrics HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n");
        let response = exchange(&request, Some("towline_a 1\n")).await;
        assert!(!response.contains("towline_a"), "{response}");
    }
}
