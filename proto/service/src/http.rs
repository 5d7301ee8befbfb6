//! Small HTTP server for the metrics and for the controller's web page: it answers `GET` and `HEAD`, and nothing else.
//!
//! There is no TLS and no login: who reaches the address reads what is served. So it is off by default, and the
//! documents propose the loopback or the overlay. A connection has one request without a body, of bounded size and
//! duration, and the number of connections is bounded.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// Longest duration of a connection. Prometheus gives up after 10 s by default.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest size of a request's head in bytes, the smallest that hyper allows.
const REQUEST_BYTES: usize = 8 * 1024;
/// Pause after an address that could not be bound. An address of the overlay exists once the link is up.
const RETRY: Duration = Duration::from_secs(5);
/// Pause after a connection that could not be accepted: the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listener of a server.
#[derive(Debug, Clone, Copy)]
pub struct Listen {
    /// What is served, for the log.
    pub what: &'static str,
    /// Address of the listener.
    pub address: SocketAddr,
    /// Largest number of connections at the same time; further ones are closed at once.
    pub connections: usize,
}

/// A request with the method `GET` or `HEAD`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Get {
    /// Path, beginning with `/`, not decoded.
    pub path: String,
    /// Query without the question mark; empty if there is none.
    pub query: String,
    /// Value of the header `Host`. `None` if there is not exactly one.
    pub host: Option<String>,
}

/// Response to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: StatusCode,
    /// Content type of the body; empty if there is no body.
    pub content_type: &'static str,
    /// Further headers by name.
    pub headers: &'static [(&'static str, &'static str)],
    /// Body of the response.
    pub body: Bytes,
}

impl Reply {
    /// Creates a reply that found what was asked for.
    pub fn ok(content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status: StatusCode::OK, content_type, headers: &[], body: body.into() }
    }

    /// Creates a reply with an error, and a line of text for people.
    pub fn error(status: StatusCode, text: &'static str) -> Self {
        let body = Bytes::from_static(text.as_bytes());
        Self { status, content_type: "text/plain; charset=utf-8", headers: &[], body }
    }

    fn response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(self.body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        if !self.content_type.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        }
        for (name, value) in self.headers {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        response
    }
}

/// Listens, as soon as that is possible, and answers each request with what `handle` returns. Never returns.
pub async fn serve<F>(listen: Listen, handle: impl Fn(Get) -> F + Clone + Send + Sync + 'static)
where
    F: Future<Output = Reply> + Send + 'static,
{
    let listener = bind(listen).await;
    let places = Arc::new(Semaphore::new(listen.connections));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, what = listen.what, "cannot accept an HTTP connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let handle = handle.clone();
        tokio::spawn(async move {
            // A client that is gone, too slow or no HTTP client ends its own connection.
            let _ = timeout(TIMEOUT, answer(stream, handle)).await;
            drop(place);
        });
    }
}

async fn bind(Listen { what, address, .. }: Listen) -> TcpListener {
    let mut is_told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                tracing::info!(what, %address, "serving HTTP");
                return listener;
            }
            Err(error) if !is_told => {
                is_told = true;
                tracing::warn!(what, %address, %error, "not serving HTTP yet: cannot bind the address");
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

/// Answers the request of a connection.
async fn answer<F>(stream: TcpStream, handle: impl Fn(Get) -> F) -> Result<(), hyper::Error>
where
    F: Future<Output = Reply>,
{
    let service = service_fn(|request: Request<Incoming>| {
        let is_read = [Method::GET, Method::HEAD].contains(request.method());
        let reply = is_read.then(|| handle(get(&request)));
        async move {
            let reply = match reply {
                Some(reply) => reply.await,
                None => Reply {
                    headers: &[("allow", "GET, HEAD")],
                    ..Reply::error(StatusCode::METHOD_NOT_ALLOWED, "only GET is allowed\n")
                },
            };
            Ok::<_, Infallible>(reply.response())
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

fn get<B>(request: &Request<B>) -> Get {
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().ok().map(ToOwned::to_owned),
        _ => None,
    };
    Get {
        path: request.uri().path().to_owned(),
        query: request.uri().query().unwrap_or_default().to_owned(),
        host,
    }
}

/// Exchange with a server, for tests of handlers.
#[cfg(test)]
pub(crate) mod testing {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Returns the bytes that a server sends after this request.
    pub(crate) async fn exchange<F>(
        request: &str,
        handle: impl Fn(Get) -> F + Send + Sync + 'static,
    ) -> String
    where
        F: Future<Output = Reply> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let _ = answer(stream, handle).await;
        });
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        // A request that is refused early may be answered with a reset.
        let _ = stream.read_to_end(&mut response).await;
        serving.await.unwrap();
        String::from_utf8(response).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Ready, ready};

    use super::testing::exchange;
    use super::*;

    fn echo(get: Get) -> Ready<Reply> {
        let host = get.host.unwrap_or_else(|| "none".to_owned());
        ready(Reply {
            headers: &[("x-frame-options", "DENY")],
            ..Reply::ok("text/plain", format!("{} {} {host}", get.path, get.query))
        })
    }

    #[tokio::test]
    async fn a_request_is_answered_with_its_path_its_query_and_its_host() {
        let response = exchange("GET /a?b=c HTTP/1.1\r\nHost: d:1\r\n\r\n", echo).await;
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
        assert!(response.contains("x-frame-options: DENY\r\n"), "{response}");
        assert!(response.ends_with("\r\n\r\n/a b=c d:1"), "{response}");
        let two = exchange("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", echo).await;
        assert!(two.ends_with("/  none") || two.starts_with("HTTP/1.1 400 "), "{two}");
    }

    #[tokio::test]
    async fn nothing_can_be_written() {
        for method in ["POST", "PUT", "DELETE"] {
            let request = format!("{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
            let response = exchange(&request, echo).await;
            assert!(response.starts_with("HTTP/1.1 405 "), "{response}");
            assert!(response.contains("allow: GET, HEAD\r\n"), "{response}");
        }
    }

    #[tokio::test]
    async fn a_long_head_is_refused() {
        let long = "x".repeat(2 * REQUEST_BYTES);
        let request = format!("GET /secret HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n");
        let response = exchange(&request, echo).await;
        assert!(!response.contains("/secret"), "{response}");
    }
}
