//! Checks of what a node does for others, and of what others try on it.

use towline_proto::pb;

use super::findings::Findings;
use super::{CheckState, Subject};

/// Counters of probes that were refused.
const PROBES: [&str; 7] = [
    "probe_unknown",
    "probe_not_authentic",
    "probe_stale",
    "probe_unvalidated",
    "probe_limited",
    "probes_refused",
    "pings_refused",
];
/// Counters of what this node's relay refused.
const RELAYED: [&str; 4] =
    ["relay_stranger", "relay_unproven", "relay_limited", "relay_requests_refused"];

/// Adds the findings of an agent that answered.
pub(super) fn examine(status: &pb::StatusResponse, findings: &mut Findings) {
    findings.summary(Subject::Trust, "no node has other keys or another name than before");
    // Each has a few: a peer that restarts, and probes that were under way.
    let probes = counted(status, &PROBES);
    findings.summary(Subject::Probes, format!("refused since the start: {}", or_none(&probes)));
    relay(status, findings);
    api_endpoint(status, findings);
}

fn relay(status: &pb::StatusResponse, findings: &mut Findings) {
    let Some(relay) = &status.relay else {
        return findings.skip(Subject::Relay, "this node is not a relay");
    };
    let refused = counted(status, &RELAYED);
    let text = format!(
        "{} nodes with {} channels; refused since the start: {}",
        relay.nodes,
        relay.channels,
        or_none(&refused)
    );
    findings.summary(Subject::Relay, text);
}

fn api_endpoint(status: &pb::StatusResponse, findings: &mut Findings) {
    let Some(endpoint) = &status.api_endpoint else {
        let why = "the configuration has none ([kubernetes] api_endpoint)";
        return findings.skip(Subject::ApiEndpoint, why);
    };
    let failing = endpoint.servers.iter().filter(|server| server.state == "failing");
    for server in failing.filter(|server| !server.reason_code.is_empty()) {
        // Clients get another one. Without any, the agent reports a problem.
        let text = format!("API server of {} fails: {}", server.name, server.reason);
        let code = server.reason_code.as_str();
        findings.add(Subject::ApiEndpoint, CheckState::Warning, code, text);
    }
    if endpoint.listening && !endpoint.server.is_empty() {
        let text = format!("{} leads to {}", endpoint.address, endpoint.server);
        findings.summary(Subject::ApiEndpoint, text);
    } else {
        findings.skip(Subject::ApiEndpoint, format!("{} leads nowhere yet", endpoint.address));
    }
}

/// Returns those of the counters that are not zero, each with its name.
fn counted(status: &pb::StatusResponse, names: &[&str]) -> Vec<String> {
    let counted = status.drops.iter().filter(|drop| drop.count > 0);
    let named = counted.filter(|drop| names.contains(&drop.name.as_str()));
    named.map(|drop| format!("{} {}", drop.count, drop.name)).collect()
}

fn or_none(counts: &[String]) -> String {
    if counts.is_empty() { "none".to_owned() } else { counts.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::super::Check;
    use super::*;

    fn check(status: &pb::StatusResponse, subject: Subject) -> Check {
        let mut findings = Findings::default();
        examine(status, &mut findings);
        findings.finish().into_iter().find(|check| check.subject == subject).unwrap()
    }

    #[test]
    fn refused_probes_are_counted_and_no_fault() {
        let drop = |name: &str, count| pb::Counter { name: name.into(), count };
        let drops = vec![drop("probe_stale", 3), drop("probe_limited", 0), drop("no_route", 9)];
        let found = check(&pb::StatusResponse { drops, ..Default::default() }, Subject::Probes);
        let finding = "refused since the start: 3 probe_stale";
        assert_eq!((found.state, found.finding.as_str()), (CheckState::Ok, finding));
    }

    #[test]
    fn one_api_server_that_fails_is_a_warning_with_its_code() {
        let server = pb::ApiServerStatus {
            name: "cp-2".into(),
            state: "failing".into(),
            reason: "it refused the connection".into(),
            reason_code: "api-check-refused".into(),
            ..Default::default()
        };
        let endpoint = pb::ApiEndpointStatus {
            address: "127.0.0.1:7445".into(),
            listening: true,
            server: "cp-1".into(),
            servers: vec![server],
            ..Default::default()
        };
        let mut status = pb::StatusResponse { api_endpoint: Some(endpoint), ..Default::default() };
        let found = check(&status, Subject::ApiEndpoint);
        assert_eq!(
            (found.state, found.causes),
            (CheckState::Warning, vec!["api-check-refused".into()])
        );
        status.api_endpoint = None;
        assert_eq!(check(&status, Subject::ApiEndpoint).state, CheckState::Skipped);
    }

    #[test]
    fn a_relay_tells_what_it_refused() {
        let relay = pb::RelayStatus { nodes: 2, channels: 1, bytes: 0 };
        let drops = vec![pb::Counter { name: "relay_limited".into(), count: 5 }];
        let status = pb::StatusResponse { relay: Some(relay), drops, ..Default::default() };
        let finding = check(&status, Subject::Relay).finding;
        assert_eq!(finding, "2 nodes with 1 channels; refused since the start: 5 relay_limited");
    }
}
