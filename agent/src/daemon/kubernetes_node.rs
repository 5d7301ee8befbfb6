//! The daemon's use of this machine's Kubernetes Node: prefixes to announce, and status output.

use std::net::IpAddr;

use ipnet::IpNet;
use tokio::sync::watch;
use towline_proto::node::Grant;
use towline_proto::pb;

use super::problem::Problem;
use super::report;
use crate::kubernetes::View;
use crate::prefixes::{PrefixSource, PrefixUpdate};

/// This machine's Node, as the Kubernetes task sees it.
#[derive(Debug)]
pub(super) struct KubernetesNode(watch::Receiver<View>);

impl KubernetesNode {
    pub(super) fn new(views: watch::Receiver<View>) -> Self {
        Self(views)
    }

    /// Waits for a change of the Node. No change is lost when the future is dropped. `None` if the
    /// task ended.
    pub(super) async fn changed(&mut self) -> Option<()> {
        self.0.changed().await.ok()
    }

    /// Handles a change of the Node object or the grant: returns the networks to announce. Node IPs
    /// inside the overlay are not announced. Others are announced if the grant allows them.
    pub(super) fn handle_change(&mut self, grant: Option<&Grant>) -> PrefixUpdate {
        let view = self.0.borrow_and_update();
        let node_ips = view.facts.node_ips.iter().map(|ip| IpNet::from(*ip));
        let allowed = node_ips.filter(|ip| grant.is_some_and(|grant| grant.allows(ip)));
        let prefixes = allowed.chain(view.facts.pods.iter().copied()).collect();
        PrefixUpdate { source: PrefixSource::Kubernetes, prefixes }
    }

    /// Returns the Kubernetes part of the status. `None` if no kubeconfig and no Node were ever
    /// found.
    pub(super) fn status(&self) -> Option<pb::KubernetesStatus> {
        let view = self.0.borrow();
        if view.kubeconfig.is_none() && view.facts.node.is_empty() {
            return None;
        }
        Some(pb::KubernetesStatus {
            connected: view.connected,
            reason: report::text(view.reason.as_ref()),
            reason_code: report::code(view.reason.as_ref()),
            node: view.facts.node.clone(),
            node_ips: view.facts.node_ips.iter().map(ToString::to_string).collect(),
            pod_networks: view.facts.pods.iter().map(ToString::to_string).collect(),
            cni: view.cni_text(),
            cni_reason_code: report::code(view.cni_unknown.as_ref()),
        })
    }

    /// Returns the Kubernetes problems for the operator. `grant` is this node's, if it is in a mesh.
    pub(super) fn problems(&self, grant: Option<&Grant>) -> Vec<Problem> {
        let view = self.0.borrow();
        let mut problems: Vec<Problem> = view.problems.iter().cloned().map(Problem::from).collect();
        let Some(grant) = grant else { return problems };
        let unreached = view.facts.node_ips.iter().filter(|ip| !is_reached(grant, **ip));
        problems.extend(unreached.map(|ip| Problem::NodeIpUnreached { address: *ip }));
        problems
    }
}

/// Returns whether other nodes reach this address of the node through the mesh.
fn is_reached(grant: &Grant, ip: IpAddr) -> bool {
    grant.overlay.iter().any(|own| own == ip) || grant.allows(&ip.into())
}
