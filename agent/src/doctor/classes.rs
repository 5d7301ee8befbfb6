//! Subject and severity of each problem and note of the agent.

use super::{CheckState, Subject};

/// Subject of a code, and how bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Class {
    /// Subject of the check that names it.
    pub(super) subject: Subject,
    severity: Severity,
}

/// How bad it is what a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Severity {
    /// It cuts something off.
    Fault,
    /// Most of the mesh works.
    Impairment,
    /// A note that matters only if a peer has no direct path.
    MattersWithoutPath,
    /// A note.
    Note,
}

impl Class {
    /// Returns the class of a code. One that is not known, such as of a newer agent, is a fault of the agent.
    pub(super) fn of(code: &str) -> Self {
        let fault = Self { subject: Subject::Agent, severity: Severity::Fault };
        Self::of_known(code).unwrap_or(fault)
    }

    /// Returns the class of a code. There is one match, so that a new problem has one place.
    fn of_known(code: &str) -> Option<Self> {
        use Severity::{Fault, Impairment, MattersWithoutPath, Note};
        let (subject, severity) = match code {
            "node-removed"
            | "map-expired"
            | "join-being-undone"
            | "join-not-undone"
            | "host-not-opened"
            | "membership-unusable" => (Subject::Agent, Fault),
            "join-unconfirmed" => (Subject::Agent, Impairment),
            "wireguard-socket-taken" | "wireguard-socket-not-opened" => (Subject::Agent, Note),
            "link-missing"
            | "guard-refused"
            | "link-refused"
            | "route-refused"
            | "nftables-guard-missing"
            | "nftables-failed"
            | "netlink-failed"
            | "no-plan"
            | "host-open" => (Subject::Guards, Fault),
            "nftables-guard-reduced" | "redirects-not-guarded" => (Subject::Guards, Impairment),
            "routing-table-in-use"
            | "rule-priority-in-use"
            | "nftables-table-in-use"
            | "link-name-in-use"
            | "marked-packets-dropped" => (Subject::OtherPrograms, Fault),
            "mark-in-use" | "state-removed" => (Subject::OtherPrograms, Impairment),
            "redirects-by-cilium" | "redirects-by-calico" | "redirects-by-program" => {
                (Subject::OtherPrograms, Note)
            }
            "firewalld-zone-missing"
            | "firewall-drops-input"
            | "firewall-drops-output"
            | "firewall-drops-forwarded"
            | "firewall-drops-tunnels" => (Subject::Firewalls, Fault),
            "docker-hook-failed" => (Subject::Firewalls, Impairment),
            "firewall-closes-port" => (Subject::Firewalls, MattersWithoutPath),
            "local-network-covered" | "key-conflict" => (Subject::Overlaps, Fault),
            "gateway-covered" | "name-conflict" | "prefix-conflict" | "prefix-overlap"
            | "prefix-in-overlay" | "prefix-not-unicast" | "covers-controller"
            | "covers-gateway" | "covers-dns-server" | "covers-uplink" | "refused-here" => {
                (Subject::Overlaps, Impairment)
            }
            "record-refused" => (Subject::Announcements, Fault),
            "prefix-withheld" | "prefix-not-granted" | "pod-blocks-used" | "too-many-prefixes" => {
                (Subject::Announcements, Impairment)
            }
            "own-source-foreign" | "source-not-announced" => (Subject::Sources, Impairment),
            "rp-filter-strict" => (Subject::ReversePath, Fault),
            "ipv6-rules-missing" => (Subject::Ipv6, Impairment),
            "ipv6-absent" | "ipv6-disabled" => (Subject::Ipv6, Note),
            "conntrack-full" => (Subject::Conntrack, Fault),
            "reflector-silent" => (Subject::Reflectors, Impairment),
            "second-port-used" => (Subject::Reflectors, MattersWithoutPath),
            "state-not-stored" | "kubernetes-facts-not-stored" => (Subject::Disk, Impairment),
            "node-ip-unreached"
            | "kubeconfig-of-other-node"
            | "pod-network-of-other-mesh"
            | "pod-network-invalid" => (Subject::Cni, Fault),
            "cni-mtu-too-large" => (Subject::Mtu, Fault),
            "identity-changed" => (Subject::Trust, Fault),
            "name-moved" => (Subject::Trust, Impairment),
            "in-clear-not-allowed" => (Subject::Trust, Note),
            "relay-denied" => (Subject::Relay, Impairment),
            "relay-not-granted" => (Subject::Relay, Note),
            "api-endpoint-taken" | "api-endpoint-not-opened" | "api-servers-unreached" => {
                (Subject::ApiEndpoint, Fault)
            }
            "api-port-without-role" => (Subject::ApiEndpoint, Impairment),
            "api-servers-unknown" => (Subject::ApiEndpoint, Note),
            _ => return None,
        };
        Some(Self { subject, severity })
    }

    /// Returns the state of a check that has the code as a problem. The agent decides what is a problem: it may
    /// report there what is a note elsewhere.
    pub(super) fn of_problem(self) -> CheckState {
        if self.severity == Severity::Impairment { CheckState::Warning } else { CheckState::Failed }
    }

    /// Returns the state of a check that has the code as a note. `is_path_missed` is true if a peer has no
    /// direct path.
    pub(super) fn of_note(self, is_path_missed: bool) -> CheckState {
        let matters = self.severity == Severity::MattersWithoutPath && is_path_missed;
        if matters { CheckState::Warning } else { CheckState::Ok }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_and_note_of_the_agent_has_a_class() {
        for code in crate::daemon::codes() {
            assert!(Class::of_known(code).is_some(), "{code}");
        }
    }

    #[test]
    fn a_code_of_a_newer_agent_is_a_fault() {
        let class = Class::of("of-a-newer-agent");
        assert_eq!((class.subject, class.of_problem()), (Subject::Agent, CheckState::Failed));
        assert_eq!(class.of_note(true), CheckState::Ok);
    }
}
