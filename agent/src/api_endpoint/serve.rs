//! The listening socket of the endpoint, its connections, and the task that starts the checks.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustls::ClientConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use towline_netlink::SocketOwners;
use towline_service::port_owner::{self, Transport};
use towline_service::tcp;

use super::EndpointProblem;
use super::balancer::{ApiServer, Balancer, Failure, Verdict};
use super::check;
use super::places::{Places, User};
use crate::timing::at;

/// Longest time to connect to one server before the next one is tried.
const CONNECT: Duration = Duration::from_secs(2);
/// Pause after an address that could not be bound.
const RETRY: Duration = Duration::from_secs(5);
/// Time after the last client in which it is still a problem that no server answers: a kubelet tries again
/// at least every minute.
const RECENT: Duration = Duration::from_secs(60);
/// Pause after a connection that could not be accepted: the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the daemon and the tasks of the endpoint share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Address of the configuration.
    pub(super) address: SocketAddr,
    pub(super) state: Mutex<State>,
    /// Places of clients; one that is connected, or tries to, has taken one.
    places: Mutex<Places>,
    /// Connection to the kernel that tells the users of clients; `None` if it could not be opened.
    owners: Mutex<Option<SocketOwners>>,
    /// Wakes the task that starts the checks, because the time of the next one may have changed.
    wake: Notify,
    settings: Arc<ClientConfig>,
}

/// State that changes while the endpoint runs.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) balancer: Balancer,
    /// For each server, the gate of its connections: they end when it changes or is removed.
    gates: BTreeMap<SocketAddr, watch::Sender<()>>,
    /// Address that is listened on. `None` until the port is bound.
    pub(super) bound: Option<SocketAddr>,
    /// Reason why the port is not bound.
    not_bound: Option<EndpointProblem>,
    /// Time at which the last client ended.
    last_client: Option<Instant>,
    /// Number of clients that were closed because there were too many, or no server took the connection.
    pub(super) refused: u64,
}

impl State {
    /// Returns the number of connections to a server.
    pub(super) fn connections_to(&self, address: SocketAddr) -> u32 {
        let count = self.gates.get(&address).map_or(0, watch::Sender::receiver_count);
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Closes the connections to a server.
    fn close(&self, address: SocketAddr) {
        if let Some(gate) = self.gates.get(&address) {
            gate.send_replace(());
        }
    }
}

impl Shared {
    pub(super) fn new(address: SocketAddr, settings: Arc<ClientConfig>) -> Self {
        let owners = SocketOwners::open().inspect_err(
            |error| tracing::debug!(%error, "users of the API endpoint are not known"),
        );
        Self {
            address,
            state: Mutex::default(),
            places: Mutex::default(),
            owners: Mutex::new(owners.ok()),
            wake: Notify::new(),
            settings,
        }
    }

    pub(super) fn set_servers(&self, now: Instant, servers: Vec<ApiServer>) {
        {
            let mut state = self.state.lock();
            if !state.balancer.set_servers(now, servers) {
                return;
            }
            let addresses = state.balancer.order();
            state.gates.retain(|address, _| addresses.contains(address));
            for address in addresses {
                state.gates.entry(address).or_insert_with(|| watch::channel(()).0);
            }
        }
        self.wake.notify_one();
    }

    /// Handles the result of a check.
    pub(super) fn handle_check(&self, address: SocketAddr, result: Result<Duration, Failure>) {
        {
            let mut state = self.state.lock();
            match state.balancer.handle_check(Instant::now(), address, result) {
                Verdict::Same => {}
                Verdict::Recovered => tracing::info!(%address, "API server answers again"),
                Verdict::Died => {
                    let reason = result.err().map(tracing::field::display);
                    tracing::warn!(%address, reason, "API server does not answer");
                    state.close(address);
                }
                Verdict::Dead => state.close(address),
            }
        }
        self.wake.notify_one();
    }

    /// Returns the number of clients that are connected, or try to.
    pub(super) fn clients(&self) -> u32 {
        u32::try_from(self.places.lock().count()).unwrap_or(u32::MAX)
    }

    /// Returns the user of a client on this host, whose own address is `from`.
    fn user_of(&self, client: &TcpStream, from: SocketAddr) -> User {
        let address = client.local_addr().ok()?;
        let found = self.owners.lock().as_mut()?.of_tcp(from, address);
        found.inspect_err(|error| tracing::debug!(%error, "user of a client not known")).ok()?
    }

    /// Returns what is wrong. Whether servers answer is known only while there are clients, or just after.
    pub(super) fn problem(&self, now: Instant) -> Option<EndpointProblem> {
        let (address, clients) = (self.address, self.clients());
        let state = self.state.lock();
        let since = |at| now.saturating_duration_since(at);
        let is_used = clients > 0 || state.last_client.is_some_and(|at| since(at) < RECENT);
        state.not_bound.clone().or_else(|| {
            let (node, failure) = state.balancer.unreached().filter(|_| is_used)?;
            Some(EndpointProblem::Unreached { address, node, failure })
        })
    }

    /// Closes all connections.
    pub(super) fn close_all(&self) {
        self.state.lock().gates.clear();
    }

    /// Returns the time of the next check. Nothing is checked while there is no client.
    fn check_due(&self) -> Option<Instant> {
        if self.clients() == 0 { None } else { self.state.lock().balancer.due() }
    }

    /// Returns a receiver that changes, or loses its sender, when connections to the server are closed.
    fn gate(&self, address: SocketAddr) -> Option<watch::Receiver<()>> {
        self.state.lock().gates.get(&address).map(watch::Sender::subscribe)
    }

    /// Handles a client's connection to a server that failed.
    fn handle_failure(&self, address: SocketAddr, reason: Failure) {
        tracing::debug!(%address, %reason, "API server not reached");
        self.state.lock().balancer.handle_failure(Instant::now(), address, reason);
        self.wake.notify_one();
    }
}

/// Listens, accepts clients and starts the checks. Never returns.
pub(super) async fn run(shared: Arc<Shared>) {
    let listener = bind(&shared).await;
    loop {
        let due = shared.check_due();
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, from)) => admit(&shared, client, from),
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a client of the API endpoint");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            () = at(due) => start_checks(&shared),
            () = shared.wake.notified() => {}
        }
    }
}

/// Binds the address, as soon as that is possible.
async fn bind(shared: &Shared) -> TcpListener {
    let address = shared.address;
    loop {
        let error = match listen(address).await {
            Ok((listener, bound)) => {
                tracing::info!(address = %bound, "API endpoint served");
                let mut state = shared.state.lock();
                (state.bound, state.not_bound) = (Some(bound), None);
                drop(state);
                return listener;
            }
            Err(error) => error,
        };
        let problem = not_bound(address, &error).await;
        {
            let mut state = shared.state.lock();
            if state.not_bound.as_ref() != Some(&problem) {
                tracing::warn!(%problem, "API endpoint not served");
                state.not_bound = Some(problem);
            }
        }
        sleep(RETRY).await;
    }
}

async fn listen(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    Ok((listener, bound))
}

/// Returns why the address cannot be bound, with the owner of the port if there is one.
async fn not_bound(address: SocketAddr, error: &io::Error) -> EndpointProblem {
    let reason = error.to_string();
    if error.kind() != io::ErrorKind::AddrInUse {
        return EndpointProblem::NotOpened { address, reason };
    }
    // The search reads all of /proc.
    let search = move || port_owner::find(Transport::Tcp, address.port());
    match tokio::task::spawn_blocking(search).await.ok().flatten() {
        Some(owner) => EndpointProblem::Taken { address, owner },
        None => EndpointProblem::NotOpened { address, reason },
    }
}

/// Serves a client, if there is a place for it.
fn admit(shared: &Arc<Shared>, client: TcpStream, from: SocketAddr) {
    let user = shared.user_of(&client, from);
    if !shared.places.lock().take(user) {
        shared.state.lock().refused += 1;
        return;
    }
    let place = PlaceGuard { shared: shared.clone(), user };
    tokio::spawn(async move {
        let shared = &place.shared;
        serve(client, shared).await;
        shared.state.lock().last_client = Some(Instant::now());
    });
}

/// Place of a client. It is given back when this value is dropped.
struct PlaceGuard {
    shared: Arc<Shared>,
    user: User,
}

impl Drop for PlaceGuard {
    fn drop(&mut self) {
        self.shared.places.lock().release(self.user);
    }
}

/// Connects a client with a server, and passes bytes on until one of them ends, or the server is dead.
async fn serve(mut client: TcpStream, shared: &Shared) {
    let Some((mut server, mut gate)) = connect(shared).await else {
        shared.state.lock().refused += 1;
        return;
    };
    for stream in [&client, &server] {
        let set = stream.set_nodelay(true).and_then(|()| tcp::keep_alive(stream));
        if let Err(error) = set {
            tracing::debug!(%error, "options of a connection not set");
        }
    }
    tokio::select! {
        copied = tokio::io::copy_bidirectional(&mut client, &mut server) => {
            if let Err(error) = copied {
                tracing::debug!(%error, "connection of the API endpoint ended");
            }
        }
        _ = gate.changed() => {}
    }
}

/// Connects to the first server that takes the connection.
async fn connect(shared: &Shared) -> Option<(TcpStream, watch::Receiver<()>)> {
    let order = shared.state.lock().balancer.order();
    for address in order {
        let failure = match timeout(CONNECT, TcpStream::connect(address)).await {
            // A server without a gate was removed in the meantime.
            Ok(Ok(stream)) => match shared.gate(address) {
                Some(gate) => return Some((stream, gate)),
                None => continue,
            },
            Ok(Err(error)) => Failure::of(&error),
            Err(_elapsed) => Failure::Silent,
        };
        shared.handle_failure(address, failure);
    }
    None
}

/// Starts the checks that are due.
fn start_checks(shared: &Arc<Shared>) {
    if shared.clients() == 0 {
        return;
    }
    let due = shared.state.lock().balancer.begin_checks(Instant::now());
    for address in due {
        let shared = shared.clone();
        tokio::spawn(async move {
            let result = check::check(address, shared.settings.clone()).await;
            shared.handle_check(address, result);
        });
    }
}
