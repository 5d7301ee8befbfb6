//! The daemon's use of this machine's Kubernetes Node: prefixes to announce, and status output.

use std::net::IpAddr;

use ipnet::IpNet;
use towline_proto::node::Grant;
use towline_proto::pb;

use super::Daemon;
use crate::prefixes::{PrefixSource, PrefixUpdate};

impl Daemon {
    /// Updates the announced prefixes after the Node object or the grant changed. Node IPs inside
    /// the overlay are not announced. Others are announced if the grant allows them.
    pub(super) fn kubernetes_changed(&mut self) {
        self.kubernetes = self.inputs.kubernetes.borrow_and_update().clone();
        let Some(grant) = self.membership.as_ref().map(|membership| &membership.grant) else {
            return;
        };
        let facts = &self.kubernetes.facts;
        let node_ips = facts.node_ips.iter().map(|ip| IpNet::from(*ip));
        let prefixes = node_ips.filter(|ip| grant.allows(ip)).chain(facts.pods.iter().copied());
        let prefixes = prefixes.collect();
        self.prefix_update(PrefixUpdate { source: PrefixSource::Kubernetes, prefixes });
    }

    /// Returns the Kubernetes part of the status. `None` if no kubeconfig and no Node were ever
    /// found.
    pub(super) fn kubernetes_status(&self) -> Option<pb::KubernetesStatus> {
        let view = &self.kubernetes;
        if view.kubeconfig.is_none() && view.facts.node.is_empty() {
            return None;
        }
        Some(pb::KubernetesStatus {
            connected: view.connected,
            reason: view.reason.clone(),
            node: view.facts.node.clone(),
            node_ips: view.facts.node_ips.iter().map(ToString::to_string).collect(),
            pod_networks: view.facts.pods.iter().map(ToString::to_string).collect(),
            cni: view.cni.clone(),
        })
    }

    /// Returns the Kubernetes problems for the operator, one line each.
    pub(super) fn kubernetes_problems(&self) -> Vec<String> {
        let mut problems = self.kubernetes.problems.clone();
        let Some(membership) = &self.membership else { return problems };
        let grant = &membership.grant;
        let unreached = self.kubernetes.facts.node_ips.iter().filter(|ip| !reached(grant, **ip));
        problems.extend(unreached.map(|ip| {
            format!(
                "Kubernetes uses {ip} for this node, which the mesh does not reach: start the \
                 kubelet with `--node-ip=$(towline node-ip)`"
            )
        }));
        problems
    }
}

/// Returns whether other nodes reach this address of the node through the mesh.
fn reached(grant: &Grant, ip: IpAddr) -> bool {
    grant.overlay.iter().any(|own| own == ip) || grant.allows(&ip.into())
}
