//! Node-local endpoint of the Kubernetes API: a TCP port on the loopback that leads to the nearest API server
//! that answers, among the control-plane nodes of the mesh.
//!
//! ```text
//!   kubelet, kube-proxy ──► 127.0.0.1:7445 ──► tunnel ──► cp-2:6443  nearest that answers
//!                                │                        cp-1:6443
//!                                └── TLS handshakes ────► cp-3:6443  while clients are connected
//! ```
//!
//! It passes bytes on and ends no TLS: clients verify the API server's certificate, and the API server verifies
//! theirs. So it gives nobody a right that a connection to the API server itself would not give. The servers
//! come from the map of the mesh, which is stored and signed: nothing has to be reachable to start.
//!
//! | file | owns |
//! |---|---|
//! | `balancer.rs` | the order of the servers and their health, without I/O |
//! | `check.rs` | one check of a server |
//! | `places.rs` | how many clients of which user are served |
//! | `serve.rs` | the listening socket and the connections |
//! | `mod.rs` | what the daemon sets and reads |

mod balancer;
mod check;
mod places;
mod serve;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::task::JoinHandle;
use towline_proto::code::Coded as _;
use towline_proto::codes;
use towline_proto::id::NodeName;
use towline_proto::pb;
use towline_service::port_owner::PortOwner;

use crate::timing::micros;
pub(crate) use balancer::{ApiServer, Failure, Health};
use serve::Shared;

/// Address of the endpoint that `towline join --install` configures. The port is that of Talos' KubePrism,
/// which does the same.
pub(crate) const DEFAULT_ADDRESS: &str = "127.0.0.1:7445";

/// Port of an API server unless another one is given.
pub(crate) const DEFAULT_API_PORT: &str = "6443";

/// Returns the codes of reasons and states that this module reports outside of problems.
pub(crate) fn codes() -> Vec<&'static str> {
    [Failure::codes(), Health::codes()].concat()
}

/// Problem of the endpoint that the operator should repair.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EndpointProblem {
    /// Another program listens on the port.
    #[error(
        "cannot serve the API endpoint {address}: in use by {owner}: stop that program, or set another \
         [kubernetes] api_endpoint, here and in the kubeconfigs that name it"
    )]
    Taken {
        /// Address of the endpoint.
        address: SocketAddr,
        /// Process or user that has the port.
        owner: PortOwner,
    },
    /// The address cannot be bound.
    #[error(
        "cannot serve the API endpoint {address}: {reason}: set another [kubernetes] api_endpoint"
    )]
    NotOpened {
        /// Address of the endpoint.
        address: SocketAddr,
        /// Error of binding it.
        reason: String,
    },
    /// Clients are connected, or try to, but no server answers.
    #[error(
        "the API endpoint {address} reaches no API server: {node}: {failure}: check the API server there, \
         and `towline peers`"
    )]
    Unreached {
        /// Address of the endpoint.
        address: SocketAddr,
        /// Control-plane node that is tried first.
        node: NodeName,
        /// Reason why its API server does not answer.
        failure: Failure,
    },
}

codes! {
    EndpointProblem {
        Taken => "api-endpoint-taken",
        NotOpened => "api-endpoint-not-opened",
        Unreached => "api-servers-unreached",
    }
}

/// The running endpoint. It ends when this value is dropped.
#[derive(Debug)]
pub(crate) struct ApiEndpoint {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl ApiEndpoint {
    /// Starts to listen on `address`. If the port is taken, listening begins once it is free.
    ///
    /// # Errors
    ///
    /// If the TLS library has no cipher for the checks.
    pub(crate) fn start(address: SocketAddr) -> Result<Self, rustls::Error> {
        let shared = Arc::new(Shared::new(address, check::settings()?));
        let task = tokio::spawn(serve::run(shared.clone()));
        Ok(Self { shared, task })
    }

    /// Replaces the servers. Connections to one that is gone are closed.
    pub(crate) fn set_servers(&self, servers: Vec<ApiServer>) {
        self.shared.set_servers(Instant::now(), servers);
    }

    /// Returns what is wrong with the endpoint.
    pub(crate) fn problem(&self) -> Option<EndpointProblem> {
        self.shared.problem(Instant::now())
    }

    /// Returns the address of the endpoint if the mesh has no API server for it.
    pub(crate) fn without_servers(&self) -> Option<SocketAddr> {
        let is_empty = self.shared.state.lock().balancer.order().is_empty();
        is_empty.then_some(self.shared.address)
    }

    /// Returns the state of the endpoint, for status output.
    pub(crate) fn status(&self) -> pb::ApiEndpointStatus {
        let connections = self.shared.clients();
        let state = self.shared.state.lock();
        let servers: Vec<_> = state
            .balancer
            .ranked()
            .into_iter()
            .map(|ranked| {
                let failure = ranked.health.failure();
                pb::ApiServerStatus {
                    name: ranked.server.node.to_string(),
                    address: ranked.server.address.to_string(),
                    state: ranked.health.code().into(),
                    reason: failure.map(|failure| failure.to_string()).unwrap_or_default(),
                    reason_code: failure.map(|failure| failure.code().into()).unwrap_or_default(),
                    rtt_us: ranked.rtt.map(micros),
                    connections: state.connections_to(ranked.server.address),
                }
            })
            .collect();
        pb::ApiEndpointStatus {
            address: self.shared.address.to_string(),
            listening: state.bound.is_some(),
            server: servers.first().map(|server| server.name.clone()).unwrap_or_default(),
            servers,
            connections,
            refused: state.refused,
        }
    }
}

impl Drop for ApiEndpoint {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.close_all();
    }
}
