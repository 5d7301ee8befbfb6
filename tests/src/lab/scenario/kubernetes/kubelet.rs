//! Stand-in for a kubelet: a TLS server on port 10250 whose logs contain the node's name.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::cluster::ClusterCa;

/// Serves requests until `stop` is set. Must run in the worker's network namespace.
pub(super) fn serve(
    ca: &ClusterCa,
    name: &str,
    address: IpAddr,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let own = ca.issue(&format!("system:node:{name}"), "system:nodes", &[&address.to_string()])?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(own.certificate.as_bytes())?],
            PrivateKeyDer::from_pem_slice(own.key.as_bytes())?,
        )?;
    let config = Arc::new(config);
    let listener = TcpListener::bind(SocketAddr::new(address, 10250))?;
    listener.set_nonblocking(true)?;
    while !stop.load(Ordering::Relaxed) {
        let Ok((mut stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut session = rustls::ServerConnection::new(Arc::clone(&config))?;
        let mut tls = rustls::Stream::new(&mut session, &mut stream);
        // An error of one connection does not affect the next one.
        let _ = answer(&mut tls, name);
        session.send_close_notify();
        let _ = session.complete_io(&mut stream);
    }
    Ok(())
}

/// Reads a request and answers it with the logs.
fn answer(stream: &mut (impl std::io::Read + std::io::Write), name: &str) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && head.len() < 16 << 10 {
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    let body = format!("hello from {name}\n");
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    stream.flush()
}
