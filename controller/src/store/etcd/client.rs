//! Calls to etcd: one connection at a time, to the next member when one fails.
//!
//! Every call may be repeated: reads, writes of the same value, and transactions that recognize
//! themselves (see [`layout`](super::layout)). So a call is sent to the next member when a member does
//! not answer, until [`CALL`] has passed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::uri::PathAndQuery;
use prost::Message;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tonic::client::Grpc;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;
use towline_proto::token::ControllerAddress;
use towline_service::{grpc, output, tls};
use zeroize::Zeroizing;

use super::errors::{Caller, EtcdError, Verdict, verdict};
use super::settings::{EtcdSettings, LoginFile, TlsFiles, host};
use super::wire;

/// Time for a call, over all members. Requests of nodes and operators wait meanwhile.
const CALL: Duration = Duration::from_secs(6);
/// Time for an answer of one member, and for a connection to it.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Pause after all members failed, before they are tried again.
const PAUSE: Duration = Duration::from_millis(100);
/// Largest response, in bytes: a page of records is smaller.
const RESPONSE_BYTES: usize = 32 * 1024 * 1024;

/// Client of an etcd cluster.
pub(super) struct Client {
    settings: EtcdSettings,
    prefix: String,
    connector: Option<TlsConnector>,
    login: Option<Login>,
    current: Mutex<Current>,
}

/// Name and password of a user.
struct Login {
    user: String,
    password: Zeroizing<String>,
}

/// Member that is used, and the connection to it.
#[derive(Default)]
struct Current {
    member: usize,
    connection: Option<Connection>,
}

/// Connection to a member.
#[derive(Clone)]
struct Connection {
    channel: Channel,
    /// Token that the login returned; `None` without a user.
    token: Option<MetadataValue<Ascii>>,
}

/// Failure of one attempt.
enum Failure {
    /// The next attempt may succeed.
    Again(EtcdError),
    /// No attempt will succeed.
    Final(EtcdError),
}

impl Client {
    /// Creates a client, and reads the files that its settings name. It connects with the first call.
    pub(super) fn new(settings: EtcdSettings) -> Result<Self, EtcdError> {
        let connector = settings.tls.as_ref().map(connector).transpose()?;
        let login = settings.login.as_ref().map(Login::read).transpose()?;
        let prefix = settings.url.key_prefix();
        Ok(Self { settings, prefix, connector, login, current: Mutex::default() })
    }

    /// Calls the RPC at `path`. All calls can be repeated.
    pub(super) async fn call<Q, A>(&self, path: &'static str, request: Q) -> Result<A, EtcdError>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let mut last = None;
        let trying = async {
            let mut attempts = 0;
            loop {
                match self.attempt(path, request.clone()).await {
                    Ok(answer) => return Ok(answer),
                    Err(Failure::Final(error)) => return Err(error),
                    Err(Failure::Again(error)) => last = Some(error),
                }
                attempts += 1;
                if attempts % self.members().len() == 0 {
                    sleep(PAUSE).await;
                }
            }
        };
        let ended = timeout(CALL, trying).await;
        match ended {
            Ok(result) => result,
            Err(_) => Err(last.unwrap_or_else(|| self.slow(0, CALL))),
        }
    }

    async fn attempt<Q, A>(&self, path: &'static str, request: Q) -> Result<A, Failure>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let (member, connection) = self.connection().await?;
        match timeout(ATTEMPT, unary(connection, path, request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => match verdict(&status, &self.caller(member)) {
                Verdict::Elsewhere(error) => {
                    self.leave(member).await;
                    Err(Failure::Again(error))
                }
                Verdict::LogIn(error) => {
                    self.current.lock().await.connection = None;
                    Err(Failure::Again(error))
                }
                Verdict::Refused(error) => Err(Failure::Final(error)),
            },
            Err(_) => {
                self.leave(member).await;
                Err(Failure::Again(self.slow(member, ATTEMPT)))
            }
        }
    }

    /// Returns the current member and the connection to it, which is opened if there is none. After an
    /// error the next member is the current one.
    async fn connection(&self) -> Result<(usize, Connection), Failure> {
        let mut current = self.current.lock().await;
        let member = current.member;
        if let Some(connection) = &current.connection {
            return Ok((member, connection.clone()));
        }
        let connected = timeout(ATTEMPT, self.connect(member)).await;
        let failure = match connected {
            Ok(Ok(connection)) => {
                current.connection = Some(connection.clone());
                return Ok((member, connection));
            }
            Ok(Err(failure)) => failure,
            Err(_) => Failure::Again(self.slow(member, ATTEMPT)),
        };
        current.member = (member + 1) % self.members().len();
        Err(failure)
    }

    /// Makes the next member the current one, unless another call did so already.
    async fn leave(&self, member: usize) {
        let mut current = self.current.lock().await;
        if current.member == member {
            *current = Current { member: (member + 1) % self.members().len(), connection: None };
        }
    }

    async fn connect(&self, member: usize) -> Result<Connection, Failure> {
        let endpoint = || self.endpoint(member);
        let unreachable =
            |why: String| Failure::Again(EtcdError::Unreachable { endpoint: endpoint(), why });
        let certificate =
            |why: String| Failure::Again(EtcdError::Certificate { endpoint: endpoint(), why });
        let settings = Endpoint::from_static("http://etcd");
        let stream =
            TcpStream::connect(endpoint()).await.map_err(|e| unreachable(e.to_string()))?;
        stream.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
        let channel = match &self.connector {
            None => grpc::channel(settings, stream).await,
            Some(connector) => {
                let name = match self.members().get(member) {
                    Some(address) => ServerName::try_from(host(address).to_owned()),
                    None => return Err(unreachable("no such member".to_owned())),
                };
                let name = name.map_err(|error| certificate(error.to_string()))?;
                let stream = connector.connect(name, stream).await;
                let stream = stream.map_err(|error| match error.kind() {
                    std::io::ErrorKind::InvalidData => certificate(error.to_string()),
                    _ => unreachable(error.to_string()),
                })?;
                grpc::channel(settings, stream).await
            }
        };
        let channel = channel.map_err(|error| unreachable(output::error_line(&error)))?;
        let connection = Connection { channel, token: None };
        match &self.login {
            None => Ok(connection),
            Some(login) => self.log_in(connection, login, member).await,
        }
    }

    async fn log_in(
        &self,
        connection: Connection,
        login: &Login,
        member: usize,
    ) -> Result<Connection, Failure> {
        let request = wire::AuthenticateRequest {
            name: login.user.clone(),
            password: String::clone(&login.password),
        };
        let answer: Result<wire::AuthenticateResponse, Status> =
            unary(connection.clone(), wire::AUTHENTICATE, request).await;
        let answer = answer.map_err(|status| match verdict(&status, &self.caller(member)) {
            Verdict::Elsewhere(error) => Failure::Again(error),
            Verdict::LogIn(error) | Verdict::Refused(error) => Failure::Final(error),
        })?;
        let invalid = |_| Failure::Final(EtcdError::Login("its token is malformed".to_owned()));
        let mut token: MetadataValue<Ascii> = answer.token.parse().map_err(invalid)?;
        token.set_sensitive(true);
        Ok(Connection { token: Some(token), ..connection })
    }

    fn members(&self) -> &[ControllerAddress] {
        self.settings.url.endpoints()
    }

    fn endpoint(&self, member: usize) -> String {
        self.members().get(member).map(ToString::to_string).unwrap_or_default()
    }

    fn caller(&self, member: usize) -> Caller<'_> {
        Caller {
            endpoint: self.members().get(member).map_or("", ControllerAddress::as_str),
            user: self.login.as_ref().map(|login| login.user.as_str()),
            prefix: &self.prefix,
        }
    }

    fn slow(&self, member: usize, waited: Duration) -> EtcdError {
        EtcdError::Slow { endpoint: self.endpoint(member), seconds: waited.as_secs() }
    }
}

impl Login {
    fn read(LoginFile { user, password }: &LoginFile) -> Result<Self, EtcdError> {
        let text = Zeroizing::new(read(password)?);
        let text = Zeroizing::new(text.trim_end().to_owned());
        if text.is_empty() {
            return Err(EtcdError::File { path: password.clone(), why: "it is empty".to_owned() });
        }
        Ok(Self { user: user.clone(), password: text })
    }
}

/// Sends one request on a connection. LeaseKeepAlive takes a stream of requests; one request and the
/// end of the stream are the same on the wire.
async fn unary<Q, A>(connection: Connection, path: &'static str, message: Q) -> Result<A, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let Connection { channel, token } = connection;
    let mut request = Request::new(message);
    if let Some(token) = token {
        request.metadata_mut().insert("token", token);
    }
    let mut client = Grpc::new(channel).max_decoding_message_size(RESPONSE_BYTES);
    let ready = client.ready().await;
    ready.map_err(|error| Status::unavailable(output::error_line(&error)))?;
    let codec = ProstCodec::<Q, A>::default();
    Ok(client.unary(request, PathAndQuery::from_static(path), codec).await?.into_inner())
}

fn connector(files: &TlsFiles) -> Result<TlsConnector, EtcdError> {
    let TlsFiles { ca, client } = files;
    let damaged = |path: &Path, why: String| EtcdError::File { path: path.to_owned(), why };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(ca)? {
        roots.add(certificate).map_err(|error| damaged(ca, error.to_string()))?;
    }
    let config = tls::client().map_err(|error| damaged(ca, error.to_string()))?;
    let config = config.with_root_certificates(roots);
    let mut config = match client {
        None => config.with_no_client_auth(),
        Some(files) => {
            let pem = Zeroizing::new(read(&files.key)?);
            let key = PrivateKeyDer::from_pem_slice(pem.as_bytes())
                .map_err(|_| damaged(&files.key, "it has no private key in PEM".to_owned()))?;
            config
                .with_client_auth_cert(certificates(&files.certificate)?, key)
                .map_err(|error| damaged(&files.certificate, error.to_string()))?
        }
    };
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Reads the certificates of a PEM file, at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, EtcdError> {
    let text = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) | Err(_) => {
            let why = "it has no certificate in PEM, or a damaged one".to_owned();
            Err(EtcdError::File { path: path.to_owned(), why })
        }
    }
}

fn read(path: &Path) -> Result<String, EtcdError> {
    std::fs::read_to_string(path)
        .map_err(|error| EtcdError::File { path: path.to_owned(), why: error.to_string() })
}
