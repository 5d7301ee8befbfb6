//! Start, run and stop of the whole controller.
//!
//! The order of the start matters. The state directory is locked first, so that no other controller
//! changes it. The address is bound next, so that a start that fails because the port is in use
//! changes nothing. The start is counted in the store before it is counted in the file `starts`: a
//! kill between the two leaves a store that is ahead, which does not look like a restored backup.

pub(crate) mod opening;

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::body::Body;
use tonic::transport::Server;
use tower::util::MapResponseLayer;
use towline_proto::code::Coded as _;
use towline_proto::health::health_server::HealthServer;
use towline_proto::limits;
use towline_proto::pb::admin_server::AdminServer;
use towline_proto::pb::discovery_server::DiscoveryServer;
use towline_proto::reflection::server_reflection_server::ServerReflectionServer;
use towline_proto::source_limiter::SourceLimiter;
use towline_service::local_socket;
use towline_service::port_owner::{self, PortOwner, Transport};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::authority::{self, ADMIN_LIFE, Authority, AuthorityError};
use crate::clock;
use crate::config::{Config, UiConfig};
use crate::counters::Counters;
use crate::entropy::{NoEntropy, random};
use crate::events::{Events, MeshEvent};
use crate::ledger::Ledger;
use crate::listen::{self, Handshakes, Places, PresentedPeer};
use crate::local;
use crate::map::Map;
use crate::metrics;
use crate::reflector::Reflector;
use crate::replicas::Exchange;
use crate::service::{
    AdminService, Authorizer, Budgets, DiscoveryService, FAILED_JOINS, HealthService, Outbound,
    ReflectionService, SentAway, Shared, Signals, drain_begins,
};
use crate::state_dir::{Lock, StateDir, StateError};
use crate::store::etcd::{EtcdError, Replicas};
use crate::store::{CommitError, OpenError, Place};
use crate::summaries::Summaries;
use crate::tls::{self, ServerCertificate, TlsError};
use crate::ui;
use crate::view::View;
use crate::writer::{self, LoadError, Writer};
use opening::{
    Opening, SEQUENCE_NOT_WRITTEN, admit_local_admin, is_fresh, is_revoked, open_ledger,
    warn_unless_stored,
};
use towline_registry::sessions::Sessions;
use towline_registry::{LOCAL_ADMIN, Now, OverlayInUse};

/// Time to wait for connections to close when the controller stops, and again for the store.
const GRACE: Duration = Duration::from_millis(700);
/// Time over which watches end when the controller stops: for each watch, and at most. Nodes that all reconnect at
/// the same moment would be a storm for the controllers that are left.
const DRAIN: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(5));
/// Interval at which certificates are checked for renewal.
const CERTIFICATE_CHECK: Duration = Duration::from_secs(300);
/// Interval of the registry's periodic work, see [`Registry::tick`](towline_registry::Registry::tick).
const TICK: Duration = Duration::from_secs(5);
/// Interval at which the sequence number of the store is written into the state directory.
const SEQUENCE_NOTE: Duration = Duration::from_secs(60);
/// Interval of HTTP/2 pings on idle connections, and the timeout of a ping.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(10));
/// Largest number of concurrent HTTP/2 streams on one connection.
const STREAMS: u32 = 8;
/// Length of the queue of signals to nodes of other controllers.
const OUTBOUND: usize = 256;
/// Receive windows of HTTP/2 in bytes: of a stream, and of a connection. A client can make the
/// controller buffer this much, and no more.
const WINDOWS: (u32, u32) = (64 * 1024, 256 * 1024);

/// Error that keeps the controller from starting, or that ended it.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The CA cannot be loaded or created.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The store cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store cannot be read.
    #[error(transparent)]
    Read(#[from] LoadError),
    /// The store cannot be written.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The configuration changes an overlay range that nodes use.
    #[error(transparent)]
    Overlay(#[from] OverlayInUse),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The operating system provides no random bytes.
    #[error(transparent)]
    Entropy(#[from] NoEntropy),
    /// The address cannot be bound.
    #[error(
        "cannot listen on {address}: {source}{}: stop the program that uses it, or choose \
         another --listen",
        .owner.as_ref().map(|owner| format!(" by {owner}")).unwrap_or_default()
    )]
    Listen {
        /// Address of the listener.
        address: SocketAddr,
        /// Error of the operating system.
        source: std::io::Error,
        /// Owner of the port, if it is in use and the owner is visible.
        owner: Option<PortOwner>,
    },
    /// The thread of the store cannot be started.
    #[error("cannot start the store's thread: {0}")]
    Thread(std::io::Error),
    /// The threads of the TLS handshakes cannot be started.
    #[error("cannot start the threads of TLS handshakes: {0}")]
    Handshakes(std::io::Error),
    /// The gRPC server ended by itself.
    #[error("the gRPC server ended: {0}")]
    Server(#[from] tonic::transport::Error),
    /// The thread that owns the store ended by itself.
    #[error("the store's thread ended unexpectedly: see the log")]
    WriterEnded,
}

/// A controller that has started and bound its address, but does not serve yet.
pub struct Controller {
    dir: StateDir,
    _lock: Lock,
    listener: TcpListener,
    address: SocketAddr,
    authority: Arc<Authority>,
    certificate: Arc<ServerCertificate>,
    acceptor: TlsAcceptor,
    handshakes: Handshakes,
    reflector: Option<Reflector>,
    shared: Shared,
    peers: Peers,
    stop: watch::Sender<Option<Duration>>,
    writer_ended: oneshot::Receiver<()>,
    /// Error that ends the use of the store, if something can end it.
    lost: Option<oneshot::Receiver<OpenError>>,
    /// Address of the metrics, if they are served.
    metrics: Option<SocketAddr>,
    /// Address of the web page and the host names that it answers to, if it is served.
    ui: Option<UiConfig>,
    /// Socket of the local administrators; `None` if it could not be bound.
    local: Option<UnixListener>,
    is_remote_admin: bool,
    counters: Arc<Counters>,
    started: Now,
}

/// What the exchange with the other controllers needs.
struct Peers {
    /// Way to the other controllers; `None` if this is the only one.
    replicas: Option<Replicas>,
    /// Signals to their nodes.
    outbound: mpsc::Receiver<Outbound>,
    cut_off: watch::Sender<Option<Duration>>,
}

/// Starts a controller and runs it until `shutdown` resolves.
pub async fn serve(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
    Controller::start(config)?.run(shutdown).await
}

impl ServeError {
    /// Returns whether another controller uses the store. It may end, and this one take its place.
    pub fn is_in_use(&self) -> bool {
        let (Self::Open(error) | Self::Read(LoadError::Open(error))) = self else { return false };
        matches!(error, OpenError::Etcd(EtcdError::InUse { .. }))
    }

    /// Returns the error of binding `address`, with the owner of the port if it is visible.
    fn listen(address: SocketAddr, source: std::io::Error) -> Self {
        let is_taken = source.kind() == std::io::ErrorKind::AddrInUse;
        let owner = is_taken.then(|| port_owner::find(Transport::Tcp, address.port())).flatten();
        Self::Listen { address, source, owner }
    }
}

impl Controller {
    /// Locks the state directory (the first start fills it) and binds the address. Must be called
    /// within a tokio runtime.
    pub fn start(config: Config) -> Result<Self, ServeError> {
        let dir = StateDir::new(&config.state_dir).with_credentials(config.credentials.clone());
        let lock = dir.lock()?;
        let listen_error = |source| ServeError::listen(config.listen, source);
        let listener = listen::bind(config.listen).map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;

        let now = clock::now();
        let place = Place::open(&config.store, dir.store())?;
        let fresh = is_fresh(&dir, &place)?;
        let migrate = config.migrate_store && !fresh;
        if migrate {
            authority::prepare_migration(&dir)?;
        }
        let authority = Arc::new(Authority::load_or_create(&dir, fresh, now.unix)?);
        let opening = Opening {
            dir: &dir,
            authority: &authority,
            settings: &config.mesh,
            advertise: &config.advertise,
            migrate,
            now,
        };
        let (store, ledger) = open_ledger(opening, place, fresh)?;
        let (mut store, ledger) = admit_local_admin(opening, fresh, store, ledger)?;
        let lost = store.lost();
        let replicas = store.replicas();
        let (sender, outbound) = mpsc::channel(OUTBOUND);
        let signals = Signals::new(replicas.as_ref().map(|_| sender));
        let (isolate, cut_off) = watch::channel(None);
        let peers = Peers { replicas, outbound, cut_off: isolate };
        let certificate = Arc::new(ServerCertificate::new(&authority, now.unix)?);
        let tls = tls::server_config(&authority, certificate.clone())?;

        let map = Arc::new(Map::new());
        let sessions = Arc::new(Mutex::new(Sessions::new(config.heartbeat)));
        let view = Arc::new(View::default());
        let counters = Arc::new(Counters::default());
        // If this start could not be counted, ids of an earlier run may come again.
        let starts = dir.starts()?.map_or(0, |starts| starts.count);
        let events = Arc::new(Events::new(starts));
        let published = writer::Published {
            map: map.clone(),
            view: view.clone(),
            sessions: sessions.clone(),
            counters: counters.clone(),
            events: events.clone(),
        };
        let (writer, writer_ended) =
            writer::start(store, ledger, authority.clone(), migrate, published)
                .map_err(ServeError::Thread)?;
        let proof_key = StaticSecret::from(random::<32>()?);
        let (stop, stopping) = watch::channel(None);
        // Without the STUN server, nodes learn their public addresses only from other nodes.
        let reflector = Reflector::bind(address, config.stun.as_ref()).inspect_err(
            |error| tracing::warn!(%error, port = address.port(), "no STUN server: cannot bind UDP"),
        );
        let reflector = reflector.ok();
        let shared = Shared {
            authority: authority.clone(),
            writer,
            map,
            view,
            sessions,
            failed_joins: Mutex::new(SourceLimiter::new(FAILED_JOINS)),
            proof_public: PublicKey::from(&proof_key),
            proof_key,
            advertise: config.advertise,
            budgets: Budgets::default(),
            signals,
            summaries: Arc::default(),
            events,
            admission: Arc::default(),
            sent_away: SentAway::default(),
            counters: counters.clone(),
            admin_revoked: Arc::default(),
            head: Mutex::new(None),
            reflector: reflector.as_ref().map(|_| address.port()),
            stopping,
            cut_off,
        };
        // Without it, operators need the credential and `remote_admin`.
        let socket = local::listen(&dir).inspect_err(|error| {
            let path = dir.file(local::SOCKET);
            tracing::warn!(%error, path = %path.display(), "no local socket for administrators");
        });
        let stored = dir.write("address", 0o644, &format!("{}\n", local(address)));
        match stored {
            Err(error) if fresh => return Err(error.into()),
            stored => {
                warn_unless_stored(stored, "commands on this machine need --controller HOST:PORT");
            }
        }
        Ok(Self {
            dir,
            _lock: lock,
            listener,
            address,
            authority,
            certificate,
            acceptor: TlsAcceptor::from(Arc::new(tls)),
            handshakes: Handshakes::start().map_err(ServeError::Handshakes)?,
            reflector,
            shared,
            peers,
            stop,
            writer_ended,
            lost,
            metrics: config.metrics,
            ui: config.ui,
            local: socket.ok(),
            is_remote_admin: config.remote_admin,
            counters,
            started: now,
        })
    }

    /// Returns the address on which the controller listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the path of the state directory.
    pub fn state_dir(&self) -> &Path {
        self.dir.path()
    }

    /// Serves until `shutdown` resolves, then stops within about 1.5 seconds, and up to 5 seconds more with many
    /// watches, which end one after the other. Nothing that was acknowledged is lost.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self { dir, listener, address, authority, acceptor, shared, stop, counters, .. } = self;
        let places = Places::new();
        let source = metrics::Source {
            started: self.started,
            map: shared.map.clone(),
            view: shared.view.clone(),
            sessions: shared.sessions.clone(),
            places: places.clone(),
            counters: counters.clone(),
            admission: shared.admission.clone(),
            writer: shared.writer.clone(),
        };
        let (stopping, cut_off) = (shared.stopping.clone(), shared.cut_off.clone());
        let measuring = tokio::spawn(measure(self.metrics, source, stopping, cut_off));
        let page = ui::Page {
            reported: shared.reported(),
            events: shared.events.clone(),
            mesh_id: shared.authority.mesh_id(),
        };
        let showing = tokio::spawn(ui::serve(self.ui, page));
        let (mut writer_ended, last) = (self.writer_ended, counters.clone());
        tracing::info!(%address, event = MeshEvent::ControllerStarted.code(), "listening");
        let (accepted, connections) = mpsc::channel(64);
        // While watches end, no connection is accepted, but the server must not take that for its end.
        let _connections_open = accepted.clone();
        let authorizer = Authorizer::new(
            shared.map.clone(),
            shared.view.clone(),
            shared.authority.mesh_id(),
            self.is_remote_admin,
        );
        let by_certificate = authorizer.clone();
        let accepting = tokio::spawn(listen::accept(
            listener,
            acceptor,
            accepted,
            places,
            move |presented: &PresentedPeer| by_certificate.standing(presented, clock::now().unix),
            self.handshakes.handle(),
        ));
        let renewing = tokio::spawn(renew(
            dir.clone(),
            authority,
            self.certificate,
            shared.writer.clone(),
            shared.admin_revoked.clone(),
        ));
        let writer = shared.writer.clone();
        let ticking = tokio::spawn(tick(
            writer.clone(),
            shared.map.clone(),
            shared.sessions.clone(),
            shared.summaries.clone(),
        ));
        let noting = tokio::spawn(note_sequence(dir.clone(), counters.clone()));
        let reflector = self.reflector;
        let reflecting = tokio::spawn(async move {
            if let Some(reflector) = reflector {
                reflector.run().await;
            }
        });

        let mut stopping = shared.stopping.clone();
        let map = shared.map.clone();
        let health = HealthServer::new(HealthService::new(shared.stopping.clone()));
        let shared = Arc::new(shared);
        let Peers { replicas, outbound, cut_off } = self.peers;
        let exchange = replicas.map(|replicas| Exchange::new(replicas, shared.clone(), cut_off));
        let exchanging = tokio::spawn(async move {
            if let Some(exchange) = exchange {
                Box::pin(exchange.run(outbound)).await;
            }
        });
        let discovery = DiscoveryServer::new(DiscoveryService::new(shared.clone()))
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES);
        let admin = AdminServer::new(AdminService::new(shared))
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES);
        let reflection = ServerReflectionServer::new(ReflectionService::new())
            .max_decoding_message_size(limits::MESSAGE_BYTES);
        let administering = tokio::spawn(serve_local(
            self.local,
            admin.clone(),
            reflection.clone(),
            authorizer.clone(),
            counters.clone(),
            stopping.clone(),
        ));
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE.0))
            .http2_keepalive_timeout(Some(KEEPALIVE.1))
            .max_concurrent_streams(STREAMS)
            .initial_stream_window_size(WINDOWS.0)
            .initial_connection_window_size(WINDOWS.1)
            .layer(MapResponseLayer::new(move |response: http::Response<Body>| {
                counters.response(&response);
                response
            }))
            .layer(authorizer)
            .add_service(discovery)
            .add_service(admin)
            .add_service(health)
            .add_service(reflection)
            .serve_with_incoming_shutdown(ReceiverStream::new(connections), async move {
                sleep(drain_begins(&mut stopping).await).await;
            });
        let mut server = Box::pin(server);
        let result = tokio::select! {
            () = shutdown => Ok(()),
            ended = &mut server => ended.map_err(ServeError::from),
            _ = &mut writer_ended => Err(ServeError::WriterEnded),
            error = end_of_use(self.lost) => Err(ServeError::Open(error)),
        };
        let over = if result.is_ok() { drain_time(map.watchers()) } else { Duration::ZERO };
        tracing::info!(watches_end_within_ms = over.as_millis(), "stopping");
        let _ = stop.send(Some(over));
        for task in [accepting, renewing, ticking, noting, reflecting, showing] {
            task.abort();
        }
        if result.is_ok() {
            // Watches end by themselves. Connections that do not close in time are dropped.
            let _ = timeout(over + GRACE, async {
                let _ = (&mut server).await;
                let _ = administering.await;
            })
            .await;
        }
        drop(server);
        // Until here, the other controllers knew the nodes whose watches were about to end.
        exchanging.abort();
        // Until here, probes were told that the controller stops.
        measuring.abort();
        // Connections that are still open do not keep the store's thread alive: it finishes the
        // requests in its queue and closes the store.
        let _ = timeout(GRACE, async {
            // All watches have ended: the next start knows when each node was last seen. If the
            // store is full, it knows the times of a minute before.
            let _ = writer.run(|ledger, _, _| ledger.registry().store_last_seen()).await;
            writer.stop().await;
            writer_ended.await
        })
        .await;
        let sequence = last.sequence();
        if sequence > 0 {
            warn_unless_stored(dir.set_sequence(sequence), SEQUENCE_NOT_WRITTEN);
        }
        dir.remove(local::SOCKET)?;
        dir.remove("address")?;
        result
    }
}

/// Returns the time over which this number of watches ends.
fn drain_time(watches: usize) -> Duration {
    DRAIN.1.min(DRAIN.0 * u32::try_from(watches).unwrap_or(u32::MAX))
}

/// Returns the error that ends the use of the store, once there is one.
async fn end_of_use(lost: Option<oneshot::Receiver<OpenError>>) -> OpenError {
    if let Some(lost) = lost
        && let Ok(error) = lost.await
    {
        return error;
    }
    std::future::pending().await
}

/// Returns the address at which this machine's own command line reaches the listener.
fn local(address: SocketAddr) -> SocketAddr {
    // A listener on `[::]` accepts IPv4 too, and a loopback interface without IPv6 is more common
    // than one without IPv4.
    let any = address.ip().is_unspecified();
    let ip = if any { Ipv4Addr::LOCALHOST.into() } else { address.ip() };
    SocketAddr::new(ip, address.port())
}

/// Serves the administrators' RPCs on the local socket, if there is one.
async fn serve_local(
    socket: Option<UnixListener>,
    admin: AdminServer<AdminService>,
    reflection: ServerReflectionServer<ReflectionService>,
    authorizer: Authorizer,
    counters: Arc<Counters>,
    mut stopping: watch::Receiver<Option<Duration>>,
) {
    let Some(socket) = socket else { return };
    let connections = UnixListenerStream::new(socket).filter(|connection| match connection {
        Ok(stream) => local_socket::is_allowed(stream),
        Err(_) => true,
    });
    let served = Server::builder()
        .max_concurrent_streams(STREAMS)
        .layer(MapResponseLayer::new(move |response: http::Response<Body>| {
            counters.response(&response);
            response
        }))
        .layer(authorizer)
        .add_service(admin)
        .add_service(reflection)
        .serve_with_incoming_shutdown(connections, async move {
            drain_begins(&mut stopping).await;
        })
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "local socket failed: restart the controller");
    }
}

/// Renews the controller's and the administrator's certificates periodically, and the latter also when an
/// administrator's key was revoked.
async fn renew(
    dir: StateDir,
    authority: Arc<Authority>,
    certificate: Arc<ServerCertificate>,
    writer: Writer,
    admin_revoked: Arc<Notify>,
) {
    let mut admin_since = clock::now().unix;
    let mut checks = interval(CERTIFICATE_CHECK);
    loop {
        let is_admin_due = tokio::select! {
            _ = checks.tick() => false,
            () = admin_revoked.notified() => true,
        };
        let now = clock::now().unix;
        match certificate.renew(&authority, now) {
            Ok(true) => tracing::info!("certificate renewed"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "cannot renew the certificate"),
        }
        if is_admin_due || tls::is_due(admin_since, ADMIN_LIFE, now) {
            // The files are small, and are written once in days.
            let (dir, authority) = (dir.clone(), authority.clone());
            let renewed = writer.run(move |ledger, _, now| {
                let key = authority::renew_admin(&dir, &authority, now.unix, |key| {
                    is_revoked(ledger, key)
                })?;
                ledger.registry().add_admin(key, LOCAL_ADMIN, now);
                Ok::<_, AuthorityError>(())
            });
            match renewed.await {
                Ok(Ok(())) => admin_since = now,
                Ok(Err(error)) => {
                    tracing::error!(%error, "cannot renew the administrator's certificate");
                }
                Err(error) => tracing::error!(%error, "cannot list the administrator's key"),
            }
        }
    }
}

/// Serves the metrics and the state of health, if there is an address for them.
async fn measure(
    address: Option<SocketAddr>,
    source: metrics::Source,
    stopping: watch::Receiver<Option<Duration>>,
    cut_off: watch::Receiver<Option<Duration>>,
) {
    let Some(address) = address else { return };
    let collect = move || {
        let text = source.collect(clock::now());
        async move { Some(text) }
    };
    let ready = move || match (*stopping.borrow(), *cut_off.borrow()) {
        (None, None) => Ok(()),
        (Some(_), _) => Err("the controller is stopping"),
        (None, Some(_)) => Err("the controller is cut off from its store"),
    };
    towline_service::metrics::serve_with_health(address, collect, Some(Arc::new(ready))).await;
}

/// Writes the sequence number of the store into the state directory, once a minute if it has changed.
async fn note_sequence(dir: StateDir, counters: Arc<Counters>) {
    let mut written = 0;
    let mut notes = interval(SEQUENCE_NOTE);
    loop {
        notes.tick().await;
        let (dir, sequence) = (dir.clone(), counters.sequence());
        if sequence == written {
            continue;
        }
        // Connections do not wait for the disk.
        let writing = tokio::task::spawn_blocking(move || dir.set_sequence(sequence));
        match writing.await {
            Ok(Ok(())) => written = sequence,
            Ok(Err(error)) => warn_unless_stored(Err(error), SEQUENCE_NOT_WRITTEN),
            // It is stopping.
            Err(_) => return,
        }
    }
}

/// Runs the registry's periodic work.
async fn tick(
    writer: Writer,
    map: Arc<Map>,
    sessions: Arc<Mutex<Sessions>>,
    summaries: Arc<Summaries>,
) {
    let mut ticks = interval(TICK);
    loop {
        ticks.tick().await;
        // The writer logs it if the store cannot be written.
        let work = |ledger: &mut Ledger, sessions: &Sessions, now| {
            ledger.registry().tick(sessions, now);
        };
        let _ = writer.run(work).await;
        sessions.lock().retain(|node| map.absence(node).is_none());
        summaries.retain(|node| map.absence(node).is_none());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_watches_end_over_a_longer_time_but_within_a_bound() {
        let times =
            [0, 3, 1_000, 10_000, usize::MAX].map(|watches| drain_time(watches).as_millis());
        assert_eq!(times, [0, 3, 1_000, 5_000, 5_000]);
    }

    #[test]
    fn who_has_the_address_is_named() {
        let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = taken.local_addr().unwrap();
        let again = std::net::TcpListener::bind(address).unwrap_err();
        let message = ServeError::listen(address, again).to_string();
        let owner = format!("(pid {}): stop the program that uses it", std::process::id());
        assert!(message.contains(&owner), "{message}");
        let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let message = ServeError::listen(address, denied).to_string();
        assert!(!message.contains("pid"), "{message}");
    }
}
