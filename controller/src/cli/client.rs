//! Connection to a running controller: by the local socket in its state directory, or over the network with the
//! administrator's credential from there.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use towline_proto::id::IdentityKey;
use towline_proto::limits;
use towline_proto::pb::admin_client::AdminClient;
use towline_proto::token::ControllerAddress;
use towline_service::{grpc, tls};

use crate::local;
use crate::peer;
use crate::state_dir::StateDir;

/// Timeout of the connection, of each request until its answer begins, and of each message of a longer
/// answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to the controller.
pub(super) struct Client {
    /// Client of the service `towline.v1.Admin`.
    pub(super) admin: AdminClient<Channel>,
    /// Public key of the CA, which verifies its statements.
    pub(super) ca: IdentityKey,
}

/// Connects to the controller at `address`, or to the one that runs on the state directory if no
/// address is given.
pub(super) async fn connect(
    state_dir: &Path,
    address: Option<&ControllerAddress>,
) -> anyhow::Result<Client> {
    let dir = StateDir::new(state_dir);
    let shown = state_dir.display();
    let Some(ca) = dir.read("ca.crt")? else {
        bail!(
            "no controller was set up in {shown}: start one with `towline-controller serve`, or give its --state-dir"
        );
    };
    let not_running = || {
        format!(
            "the controller of {shown} is not running: start it with `towline-controller serve`"
        )
    };
    let ca = CertificateDer::from_pem_slice(ca.as_bytes())
        .context("ca.crt is damaged: restore it from a backup")?;
    let (_, ca_key) =
        peer::mesh_authority(&ca).context("ca.crt is damaged: restore it from a backup")?;
    // A controller of an earlier version has no socket, and one whose socket could not be bound neither.
    if address.is_none()
        && let Ok(stream) = UnixStream::connect(dir.file(local::SOCKET)).await
    {
        return client(stream, ca_key).await;
    }
    let address = match (address, dir.read("address")?) {
        (Some(address), _) => address.to_string(),
        (None, Some(address)) => address.trim_end().to_owned(),
        (None, None) => bail!(not_running()),
    };
    let connector = connector(&dir, &ca)?;

    let connecting = async {
        let stream = TcpStream::connect(&address).await?;
        stream.set_nodelay(true)?;
        connector.connect(tls::server_name(), stream).await
    };
    let stream = match timeout(TIMEOUT, connecting).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            bail!(not_running())
        }
        Ok(Err(error)) => {
            return Err(error)
                .with_context(|| format!("cannot connect to the controller at {address}"));
        }
        Err(_) => bail!("cannot connect to the controller at {address}: no answer in time"),
    };
    client(stream, ca_key).await
}

/// Opens HTTP/2 on a connection.
async fn client(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ca: IdentityKey,
) -> anyhow::Result<Client> {
    let endpoint = Endpoint::from_static("http://controller").timeout(TIMEOUT);
    let channel =
        grpc::channel(endpoint, stream).await.context("cannot open an HTTP/2 connection")?;
    let admin = AdminClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES);
    Ok(Client { admin, ca })
}

fn connector(dir: &StateDir, ca: &CertificateDer<'static>) -> anyhow::Result<TlsConnector> {
    let missing = |name: &str| {
        format!("{} is missing: restart the controller to create it", dir.file(name).display())
    };
    let certificate = dir.read("admin.crt")?.with_context(|| missing("admin.crt"))?;
    let key = dir.read_key("admin.key")?.with_context(|| missing("admin.key"))?;
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())
        .context("admin.crt is damaged: restart the controller to create it again")?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
        .context("admin.key is damaged: remove it and restart the controller to create it again")?;
    let mut config = tls::client_of(ca)
        .context("ca.crt is damaged: restore it from a backup")?
        .with_client_auth_cert(vec![certificate], key)
        .context("admin.crt and admin.key do not belong together: restart the controller")?;
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Returns the error of a refused request, in one line for the operator.
pub(super) fn status_error(status: tonic::Status) -> anyhow::Error {
    match grpc::message(&status).as_str() {
        "" => anyhow::anyhow!("the controller refused: {}", status.code()),
        words => anyhow::anyhow!(words.to_owned()),
    }
}
