//! What Kubernetes says of this machine: its own Node, read with the kubelet's own credentials.
//!
//! A node may get, list and watch its own Node object and no other (the node authorizer, since
//! Kubernetes 1.32 for lists too), which is all that is asked for: no further right, no further
//! credential. From it come the node's addresses and pod networks, which join the other sources
//! of announced prefixes ([`crate::prefixes`]).
//!
//! Nothing here is needed to start: while there are no credentials, no API server, or no Node, the
//! last good word stays in force, also over a restart.

pub mod cni;
#[cfg(feature = "kubernetes")]
mod credentials;
#[cfg(feature = "kubernetes")]
mod files;
#[cfg(feature = "kubernetes")]
mod own_node;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::KubernetesConfig;
use crate::state::StateDir;

/// What the task needs.
#[derive(Debug)]
pub struct Setup {
    /// Where credentials are, and what may be announced.
    pub config: KubernetesConfig,
    /// The mesh's link, which is not the CNI's.
    pub link: String,
    /// Bytes; of the mesh's link.
    pub mtu: u32,
    /// Keeps the last good word.
    pub state: Arc<StateDir>,
    /// How often it is looked whether credentials came or changed.
    pub credentials_period: Duration,
}

/// How often credentials are looked at, unless somebody says otherwise.
pub const CREDENTIALS_PERIOD: Duration = Duration::from_secs(1);

/// How it stands with Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct View {
    /// The kubeconfig in use.
    pub kubeconfig: Option<PathBuf>,
    /// The API server answers and shows the Node.
    pub connected: bool,
    /// Why not.
    pub reason: String,
    /// What is in force, be it of now or of an earlier run.
    pub facts: Facts,
    /// What routes the pods, or why that is not known.
    pub cni: String,
    /// What the operator should mend, a line each.
    pub problems: Vec<String>,
}

/// What is known of this machine's Node. Kept on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Facts {
    /// Its name.
    pub node: String,
    /// Its internal addresses.
    pub node_ips: Vec<IpAddr>,
    /// The pod networks to announce.
    pub pods: Vec<IpNet>,
}

/// Starts the task. The receiver holds the last good word of an earlier run at once.
#[cfg(feature = "kubernetes")]
pub fn start(setup: Setup) -> watch::Receiver<View> {
    let (views, receiver) = watch::channel(first_view(&setup.state));
    tokio::spawn(own_node::run(setup, views));
    receiver
}

/// Without the feature there is no task: the receiver is closed.
#[cfg(not(feature = "kubernetes"))]
pub fn start(setup: Setup) -> watch::Receiver<View> {
    watch::channel(first_view(&setup.state)).1
}

fn first_view(state: &StateDir) -> View {
    let facts = match state.kubernetes() {
        Ok(bytes) => bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
        Err(error) => {
            tracing::warn!(%error, "last word of kubernetes not read");
            None
        }
    };
    View {
        facts: facts.unwrap_or_default(),
        reason: "no kubelet credentials yet".into(),
        ..View::default()
    }
}
