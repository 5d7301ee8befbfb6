//! This machine's Kubernetes Node object, read with the kubelet's own credentials.
//!
//! The node authorizer lets a node get, list and watch its own Node object only (since Kubernetes
//! 1.32 for lists too). Towline requests nothing else, so it needs no additional permission and no
//! additional credentials. The node's addresses and pod networks from the object are one of the
//! sources of announced prefixes ([`crate::prefixes`]).
//!
//! The agent starts without Kubernetes. While there are no credentials, no API server or no Node,
//! the last valid facts stay in effect, across restarts too.

#[cfg(feature = "kubernetes")]
mod client_error;
pub mod cni;
#[cfg(feature = "kubernetes")]
mod credentials;
#[cfg(feature = "kubernetes")]
mod files;
#[cfg(feature = "kubernetes")]
mod own_node;
mod reason;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use towline_proto::id::MeshId;
use towline_proto::mtu::Mtu;

use crate::config::KubernetesConfig;
use crate::state::{StateDir, StateError};

pub use reason::{ApiError, CniUnknown, NodeProblem, Unavailable};

/// Parameters of the task.
#[derive(Debug)]
pub struct Setup {
    /// Settings: path of the credentials, and what may be announced.
    pub config: KubernetesConfig,
    /// Id of the mesh that this machine joined; `None` if it has static peers alone.
    pub mesh: Option<MeshId>,
    /// Name of the mesh's link, which is not a CNI link.
    pub link: String,
    /// MTU of the mesh's link.
    pub mtu: Mtu,
    /// State directory that stores the last valid facts.
    pub state: Arc<StateDir>,
    /// Interval between checks for new or changed credentials.
    pub credentials_period: Duration,
}

/// Default interval between checks of the credentials.
pub const CREDENTIALS_PERIOD: Duration = Duration::from_secs(1);

/// State of the task, for the status and the announced prefixes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct View {
    /// Path of the kubeconfig in use.
    pub kubeconfig: Option<PathBuf>,
    /// True if the API server answers and returned the Node.
    pub connected: bool,
    /// Why `connected` is false. `None` otherwise.
    pub reason: Option<Unavailable>,
    /// Facts in effect, from the API server or from an earlier run.
    pub facts: Facts,
    /// How pod traffic is routed. Empty if that is not known.
    pub cni: String,
    /// Why it is not known how pod traffic is routed. `None` if it is.
    pub cni_unknown: Option<CniUnknown>,
    /// Problems for the operator.
    pub problems: Vec<NodeProblem>,
}

impl View {
    /// Returns how pod traffic is routed, or why that is not known, for the operator.
    pub fn cni_text(&self) -> String {
        self.cni_unknown.as_ref().map_or_else(|| self.cni.clone(), ToString::to_string)
    }
}

/// Facts about this machine's Node. They are stored on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Facts {
    /// Name of the Node.
    pub node: String,
    /// Internal addresses of the Node.
    pub node_ips: Vec<IpAddr>,
    /// Pod networks to announce.
    pub pods: Vec<IpNet>,
    /// Pod networks of the Node object. Their families are the cluster's, also where a CNI tunnels.
    #[serde(default)]
    pub pod_cidrs: Vec<IpNet>,
}

/// Returns the facts that an earlier run stored in the state directory.
pub fn stored(state: &StateDir) -> Result<Option<Facts>, StateError> {
    let bytes = state.kubernetes()?;
    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

/// Starts the task. The receiver starts with the facts of an earlier run.
#[cfg(feature = "kubernetes")]
pub fn start(setup: Setup) -> watch::Receiver<View> {
    let (views, receiver) = watch::channel(first_view(&setup.state));
    tokio::spawn(own_node::run(setup, views));
    receiver
}

/// Returns a closed receiver, because there is no task without the feature.
#[cfg(not(feature = "kubernetes"))]
pub fn start(setup: Setup) -> watch::Receiver<View> {
    watch::channel(first_view(&setup.state)).1
}

/// Returns the view before the first contact: the stored facts, not connected.
fn first_view(state: &StateDir) -> View {
    let facts = stored(state).unwrap_or_else(|error| {
        tracing::warn!(%error, "stored kubernetes facts not read");
        None
    });
    View {
        facts: facts.unwrap_or_default(),
        reason: Some(Unavailable::NoCredentials(String::new())),
        ..View::default()
    }
}
