//! Task that watches this machine's own Node object.

use std::net::IpAddr;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::runtime::watcher::{self, Event, watcher};
use rand::Rng as _;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::client_error::{api_error, one_line};
use super::cni::{self, Configured, Decision, Reading};
use super::credentials::{self, Credentials};
use super::files::{self, Fingerprint};
use super::{ApiError, CniUnknown, Facts, NodeProblem, Setup, Unavailable, View};
use towline_host::register;
use towline_netlink::{Group, MainTables, Monitor, Protocol};
use towline_proto::backoff::{Backoff, Jitter};
use towline_proto::code::Coded;
use towline_proto::id::MeshId;

/// Label of a Node with the id of the mesh to which the cluster's pod network belongs. Two meshes that both
/// announced it would split the cluster: each node would reach the pods of its own mesh alone. Only the operator
/// knows that the cluster's nodes are in two meshes, because each agent may read its own Node alone.
const MESH_LABEL: &str = "towline.internal/mesh";
/// Duration of a watch in seconds, after which the server ends it and the task starts another.
const WATCH_SECONDS: u32 = 60;
/// Longest delay between attempts.
const LAST_RETRY: Duration = Duration::from_secs(30);
/// Delay between attempts.
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), LAST_RETRY, Jitter::Half);
/// Minimum duration of a connection that resets the backoff, so that a flapping API server is not
/// overloaded.
const STABLE: Duration = Duration::from_secs(10);
/// Time to wait after a change of links or routes, because several changes usually follow each
/// other.
const SETTLE: Duration = Duration::from_millis(200);
/// Minimum interval between requests to the helper for configurations whose marks did not change.
const CLOSED_PERIOD: Duration = Duration::from_secs(60);

/// Runs until all receivers of the view are dropped.
pub(super) async fn run(setup: Setup, views: watch::Sender<View>) {
    let view = views.borrow().clone();
    let listeners = views.clone();
    let mut task = Task {
        setup,
        views,
        view,
        node: None,
        plugin: None,
        tables: MainTables::default(),
        closed: Vec::new(),
        asked: None,
        stored: None,
    };
    tokio::select! {
        () = task.follow_credentials() => {}
        () = listeners.closed() => {}
    }
}

/// State of the task that watches the Node.
struct Task {
    setup: Setup,
    views: watch::Sender<View>,
    view: View,
    /// The Node as last received in this run.
    node: Option<Seen>,
    /// Configured CNI plugin, as of the last check.
    plugin: Option<String>,
    /// Reader of the main routing tables.
    tables: MainTables,
    /// Marks of the configurations that the helper was last asked for. Empty if none needs the
    /// helper.
    closed: Vec<cni::Mark>,
    /// When the helper was last asked for configurations.
    asked: Option<Instant>,
    /// Facts that are stored on the disk.
    stored: Option<Facts>,
}

/// Content of a Node object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    name: String,
    node_ips: Vec<IpAddr>,
    pod_cidrs: Vec<IpNet>,
    /// Value of the label [`MESH_LABEL`], if the Node has it.
    mesh: Option<String>,
    /// Field that could not be parsed.
    problem: Option<NodeProblem>,
}

impl Task {
    /// Finds and loads the credentials, and watches the Node with them. Never returns.
    async fn follow_credentials(&mut self) {
        let configured = self.setup.config.kubeconfig().map(ToOwned::to_owned);
        loop {
            let Some(path) = credentials::find(configured.as_deref()) else {
                let place =
                    configured.as_ref().map(|path| format!(": {} does not exist", path.display()));
                let place = place.unwrap_or_default();
                self.failed(Unavailable::NoCredentials(place));
                tokio::time::sleep(self.setup.credentials_period).await;
                continue;
            };
            let files = Fingerprint::of(vec![path.clone()]).await;
            match Credentials::load(&path).await {
                Ok(credentials) => {
                    tracing::info!(
                        kubeconfig = %credentials.path.display(),
                        node = credentials.node,
                        server = credentials.server,
                        "kubernetes credentials read"
                    );
                    self.view.kubeconfig = Some(credentials.path.clone());
                    self.follow_node(&credentials).await;
                }
                Err(error) => {
                    self.view.kubeconfig = Some(path);
                    self.failed(unusable(&error));
                    // A replaced file is read immediately. Other errors are retried periodically.
                    let again = Instant::now() + LAST_RETRY;
                    while !files.changed().await && Instant::now() < again {
                        tokio::time::sleep(self.setup.credentials_period).await;
                    }
                }
            }
        }
    }

    /// Watches the Node until the credentials change.
    async fn follow_node(&mut self, credentials: &Credentials) {
        let mut host = HostChanges::open();
        self.look_for_plugin().await;
        let mut period = tokio::time::interval(self.setup.credentials_period);
        period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Number of consecutive connections that failed or did not last.
        let mut failures = 0u32;
        loop {
            let begun = Instant::now();
            let error = {
                let api: Api<Node> = Api::all(credentials.client.clone());
                let fields = format!("metadata.name={}", credentials.node);
                let config = watcher::Config::default().fields(&fields).timeout(WATCH_SECONDS);
                let mut events = pin!(watcher(api, config));
                // True if the list that is being received contains the Node.
                let mut listed = false;
                loop {
                    tokio::select! {
                        event = events.next() => match event {
                            Some(Ok(Event::Init)) => listed = false,
                            Some(Ok(Event::InitApply(node) | Event::Apply(node))) => {
                                listed = true;
                                self.look_for_plugin().await;
                                self.seen(&node, &credentials.node);
                            }
                            Some(Ok(Event::InitDone)) if listed => {}
                            Some(Ok(Event::InitDone | Event::Delete(_))) => {
                                self.failed(Unavailable::NotRegistered(credentials.node.clone()));
                            }
                            Some(Err(error)) => break refused(&error, credentials),
                            None => break Unavailable::WatchEnded,
                        },
                        _ = period.tick() => {
                            if credentials.changed().await {
                                return;
                            }
                            self.decide_for_another_cni().await;
                        }
                        () = host.changed() => self.decide_after_a_change().await,
                    }
                }
            };
            self.failed(error);
            if begun.elapsed() >= STABLE {
                failures = 0;
            }
            let wait = RETRY.pause(failures, rand::rng().random());
            failures = failures.saturating_add(1);
            let wake = tokio::time::sleep(wait);
            let mut wake = pin!(wake);
            loop {
                tokio::select! {
                    () = &mut wake => break,
                    _ = period.tick() => if credentials.changed().await { return },
                    () = host.changed() => self.decide_after_a_change().await,
                }
            }
        }
    }

    /// Takes over a received Node.
    fn seen(&mut self, node: &Node, expected: &str) {
        let seen = Seen::read(node);
        // The request selects one Node. A response with another one is invalid.
        if seen.name != expected {
            return self.failed(Unavailable::OtherNode(one_line(&seen.name)));
        }
        if !self.view.connected {
            tracing::info!(node = expected, "kubernetes node found");
        }
        self.view.connected = true;
        self.view.reason = None;
        self.node = Some(seen);
        self.decide();
    }

    /// Decides again after links or routes of this machine changed.
    async fn decide_after_a_change(&mut self) {
        self.look_for_plugin().await;
        self.decide();
    }

    /// Decides again if the CNI plugin changed, which need not change links or routes.
    async fn decide_for_another_cni(&mut self) {
        if self.look_for_plugin().await {
            self.decide();
        }
    }

    /// Determines the configured CNI plugin. Returns whether it changed.
    async fn look_for_plugin(&mut self) -> bool {
        let plugin = match cni::plugin_of(self.setup.config.cni_dir()) {
            Configured::Plugin(plugin) => plugin,
            Configured::Closed(marks) => {
                let due = self.asked.is_none_or(|asked| asked.elapsed() >= CLOSED_PERIOD);
                if marks == self.closed && !due {
                    return false;
                }
                self.closed = marks;
                self.asked = Some(Instant::now());
                match files::container_network().await {
                    Ok(found) => found
                        .iter()
                        .find_map(|bytes| cni::plugin_type(std::str::from_utf8(bytes).ok()?)),
                    Err(error) => {
                        tracing::warn!(%error, "CNI configuration not read");
                        return false;
                    }
                }
            }
        };
        let other = plugin != self.plugin;
        self.plugin = plugin;
        other
    }

    /// Decides what is announced, from the Node and the state of the machine.
    fn decide(&mut self) {
        let Some(node) = &self.node else { return };
        let reading = match Reading::take(&self.setup.link, self.plugin.clone(), &mut self.tables) {
            Ok(reading) => reading,
            Err(error) => {
                tracing::warn!(%error, "links and routes not read");
                return;
            }
        };
        let mut problems: Vec<NodeProblem> = node.problem.iter().cloned().collect();
        let ours = node.node_ips.is_empty()
            || node.node_ips.iter().any(|ip| reading.addresses.contains(ip));
        if !ours {
            let ips: Vec<String> = node.node_ips.iter().map(ToString::to_string).collect();
            let (node, addresses) = (node.name.clone(), ips.join(", "));
            problems.push(NodeProblem::OtherMachine { node, addresses });
            let (cni, unknown) = (self.view.cni.clone(), self.view.cni_unknown.clone());
            return self.publish(self.view.facts.clone(), (cni, unknown), problems);
        }
        let other =
            node.mesh.as_ref().zip(self.setup.mesh).filter(|(mesh, own)| !names(mesh, *own));
        if let Some((mesh, own)) = other {
            let (label, other) = (MESH_LABEL, one_line(mesh));
            problems.push(NodeProblem::OtherMesh { label, other, own });
            let facts = Facts {
                node: node.name.clone(),
                node_ips: node.node_ips.clone(),
                pods: Vec::new(),
                pod_cidrs: node.pod_cidrs.clone(),
            };
            let (cni, unknown) = (self.view.cni.clone(), self.view.cni_unknown.clone());
            return self.publish(facts, (cni, unknown), problems);
        }
        let mut facts = Facts {
            node: node.name.clone(),
            node_ips: node.node_ips.clone(),
            pods: self.view.facts.pods.clone(),
            pod_cidrs: node.pod_cidrs.clone(),
        };
        let mtu = self.setup.mtu;
        let cni = match reading.decide(self.setup.config.announce_pods, &node.pod_cidrs, mtu) {
            Decision::Announce { pods, cni } => {
                facts.pods = pods;
                (format!("{cni}, pod mtu {mtu}"), None)
            }
            Decision::Tunnelled { cni, mtu, mtu_now } => {
                facts.pods.clear();
                if mtu_now > mtu {
                    problems.push(NodeProblem::CniMtu { now: mtu_now, mtu });
                }
                (format!("{cni} tunnels by itself, mtu to set {mtu}"), None)
            }
            Decision::Wait { reason } => (String::new(), Some(reason)),
        };
        self.publish(facts, cni, problems);
    }

    /// Sets and logs the reason of a failure. The facts stay in effect.
    fn failed(&mut self, reason: Unavailable) {
        if self.view.reason.as_ref() != Some(&reason) {
            let code = reason.code();
            if reason.is_expected() {
                tracing::info!(%reason, code, "kubernetes node not available");
            } else {
                tracing::warn!(%reason, code, "kubernetes node not available");
            }
        }
        self.view.connected = false;
        self.view.reason = Some(reason);
        self.send();
    }

    /// Replaces the facts, the CNI description and the problems of the view, and stores the facts.
    fn publish(
        &mut self,
        facts: Facts,
        (cni, unknown): (String, Option<CniUnknown>),
        mut problems: Vec<NodeProblem>,
    ) {
        let (pods, view) = (&facts.pods, &self.view);
        if (pods, &cni, &unknown) != (&view.facts.pods, &view.cni, &view.cni_unknown) {
            let code = unknown.as_ref().map(Coded::code);
            let reason = unknown.as_ref().map(tracing::field::display);
            tracing::info!(?pods, cni, reason, code, "pod networks");
        }
        (self.view.facts, self.view.cni, self.view.cni_unknown) = (facts, cni, unknown);
        problems.extend(self.store());
        for problem in problems.iter().filter(|problem| !self.view.problems.contains(problem)) {
            tracing::warn!(%problem, code = problem.code(), "kubernetes");
        }
        self.view.problems = problems;
        self.send();
    }

    /// Stores the facts for the next start. Returns a problem if that fails; the facts stay in
    /// effect, and the next update tries again.
    fn store(&mut self) -> Option<NodeProblem> {
        if self.stored.as_ref() == Some(&self.view.facts) {
            return None;
        }
        let bytes = serde_json::to_vec(&self.view.facts).ok()?;
        match self.setup.state.store_kubernetes(&bytes) {
            Ok(()) => {
                self.stored = Some(self.view.facts.clone());
                None
            }
            Err(error) => Some(NodeProblem::NotStored { reason: one_line(&error.to_string()) }),
        }
    }

    /// Sends the view to the receivers if it changed.
    fn send(&self) {
        self.views.send_if_modified(|view| {
            let changed = *view != self.view;
            view.clone_from(&self.view);
            changed
        });
    }
}

impl Seen {
    fn read(node: &Node) -> Self {
        let spec = node.spec.as_ref();
        let texts = match spec.and_then(|spec| spec.pod_cidrs.as_ref()) {
            Some(list) => list.clone(),
            None => spec.and_then(|spec| spec.pod_cidr.clone()).into_iter().collect(),
        };
        let (mut pod_cidrs, mut problem) = (Vec::new(), None);
        for text in texts {
            match text.parse::<IpNet>() {
                Ok(net) if net.prefix_len() > 0 => pod_cidrs.push(net.trunc()),
                _ => problem = Some(NodeProblem::InvalidPodNetwork { network: text }),
            }
        }
        let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
        let node_ips = addresses
            .into_iter()
            .flatten()
            .filter(|address| address.type_ == "InternalIP")
            .filter_map(|address| address.address.parse().ok())
            .collect();
        let labels = node.metadata.labels.as_ref();
        let mesh = labels.and_then(|labels| labels.get(MESH_LABEL).cloned());
        let name = node.metadata.name.clone().unwrap_or_default();
        Self { name, node_ips, pod_cidrs, mesh, problem }
    }
}

/// Returns whether the value of the label names this mesh.
fn names(label: &str, mesh: MeshId) -> bool {
    label.parse::<MeshId>().is_ok_and(|named| named == mesh)
}

/// Watch of the kernel's links and routes.
struct HostChanges {
    monitor: Option<AsyncFd<Monitor>>,
    /// Time at which a change is reported. Set by the first change, cleared when it is reported.
    settles: Option<tokio::time::Instant>,
}

impl HostChanges {
    fn open() -> Self {
        let groups = [Group::Links, Group::RoutesV4, Group::RoutesV6, Group::AddressesV4];
        let monitor = Monitor::open(Protocol::Route, &groups).and_then(register);
        let monitor = match monitor {
            Ok(monitor) => Some(monitor),
            Err(error) => {
                tracing::warn!(%error, "links and routes not watched: CNI changes are detected late");
                None
            }
        };
        Self { monitor, settles: None }
    }

    /// Waits for a change and then for [`SETTLE`]. No change is lost when the future is dropped.
    async fn changed(&mut self) {
        let Some(monitor) = &mut self.monitor else { return std::future::pending().await };
        let settles = if let Some(settles) = self.settles {
            settles
        } else {
            match monitor.readable_mut().await {
                Ok(mut guard) => {
                    let _ = guard.get_inner_mut().drain(|_| {});
                    guard.clear_ready();
                }
                Err(_) => std::future::pending().await,
            }
            *self.settles.insert(tokio::time::Instant::now() + SETTLE)
        };
        // The deadline is absolute, because callers drop the future and call again all the time.
        tokio::time::sleep_until(settles).await;
        self.settles = None;
    }
}

/// Converts an error of the credentials to a reason.
fn unusable(error: &anyhow::Error) -> Unavailable {
    match error.downcast_ref::<ApiError>() {
        Some(error) => Unavailable::User(error.clone()),
        None => Unavailable::Credentials(one_line(&format!("{error:#}"))),
    }
}

/// Converts an error of the watch to a reason, with the API server's address.
fn refused(error: &watcher::Error, credentials: &Credentials) -> Unavailable {
    let error = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => api_error(error),
        other => ApiError::Watch(one_line(&other.to_string())),
    };
    Unavailable::Api { server: credentials.server.trim_end_matches('/').to_owned(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(value: serde_json::Value) -> Seen {
        Seen::read(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn both_families_are_read_and_the_old_single_field_too() {
        let seen = node(serde_json::json!({
            "metadata": {"name": "w"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"]},
            "status": {"addresses": [
                {"type": "InternalIP", "address": "198.19.0.2"},
                {"type": "Hostname", "address": "w"},
                {"type": "ExternalIP", "address": "203.0.113.1"},
            ]},
        }));
        assert_eq!(seen.pod_cidrs.len(), 2);
        assert_eq!(seen.node_ips, ["198.19.0.2".parse::<IpAddr>().unwrap()]);
        let old = node(serde_json::json!({"metadata": {}, "spec": {"podCIDR": "10.244.1.0/24"}}));
        assert_eq!(old.pod_cidrs.len(), 1);
    }

    #[test]
    fn a_pod_network_that_is_none_is_said_and_left_out() {
        let seen = node(serde_json::json!({
            "metadata": {}, "spec": {"podCIDRs": ["10.244.1.0/24", "0.0.0.0/0", "nonsense"]},
        }));
        assert_eq!(seen.pod_cidrs.len(), 1);
        assert!(seen.problem.unwrap().to_string().contains("nonsense"));
    }
}
