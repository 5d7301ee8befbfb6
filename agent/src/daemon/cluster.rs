//! What the daemon makes of Kubernetes' word: prefixes to announce, and what an operator sees.

use std::net::IpAddr;

use ipnet::IpNet;
use towline_proto::node::Grant;
use towline_proto::pb;

use super::Daemon;
use crate::prefixes::{PrefixSource, PrefixUpdate};

impl Daemon {
    /// Kubernetes said something else of this machine's Node, or the grant is another. Node
    /// addresses of the overlay's own need no announcement; others are announced where the grant
    /// allows them.
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

    /// Absent on a machine where nothing of Kubernetes was ever seen.
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

    /// What the operator should mend, a line each.
    pub(super) fn kubernetes_problems(&self) -> Vec<String> {
        let mut problems = self.kubernetes.problems.clone();
        let Some(membership) = &self.membership else { return problems };
        let grant = &membership.grant;
        let unreached = self.kubernetes.facts.node_ips.iter().filter(|ip| !reached(grant, **ip));
        problems.extend(unreached.map(|ip| {
            format!(
                "Kubernetes knows this node by {ip}, which the mesh does not reach: start the \
                 kubelet with `--node-ip=$(towline node-ip)`"
            )
        }));
        problems
    }
}

fn reached(grant: &Grant, ip: IpAddr) -> bool {
    grant.overlay.iter().any(|own| own == ip) || grant.allows(&ip.into())
}
