//! Implements `towline status` and `towline version`.

use std::time::Duration;

use anyhow::bail;
use towline_proto::code::Coded as _;
use towline_proto::node::Candidate;
use towline_proto::pb;
use towline_proto::status::Version;
use towline_service::color::{Color, Palette};
use towline_service::output::{self, Format};

use super::{doctor, local};
use crate::config::Config;
use crate::daemon;
use crate::doctor::{Agent, Check, CheckState, examine};
use crate::down::{DownMarker, MachineState};

/// Returns the output of `towline status`.
pub(super) fn text_of(config: &Config, format: Format) -> anyhow::Result<String> {
    let marker = DownMarker::of(config).read().filter(|_| !daemon::is_running(&config.socket));
    if let Some(down) = marker {
        bail!("no agent is running: {down}");
    }
    if matches!(format, Format::Json | Format::Yaml) {
        let status = local::status(&config.socket)?;
        return Ok(output::text(format, &status, |_| String::new())?);
    }
    let answers = local::ask(&config.socket)?;
    let facts = doctor::facts(config, Agent::Answered(Box::new(answers.clone())));
    let health = health(&examine(&facts), Palette::of_stdout());
    Ok(text(&answers.status, health, facts.host.now, format == Format::Wide))
}

/// Returns `healthy`, or the first of the worst checks, and how many others need a look.
fn health(checks: &[Check], palette: Palette) -> String {
    let wrong = |check: &&Check| check.state > CheckState::Ok;
    // Of several, the last one would be returned: the first check is the one that explains the most.
    let worst = checks.iter().filter(wrong).rev().max_by_key(|check| check.state);
    let Some(worst) = worst else { return palette.paint(Some(Color::Green), "healthy") };
    let state = palette.word(&worst.state.to_string());
    let remedy = worst.remedy.as_ref().map(|remedy| format!(": {remedy}")).unwrap_or_default();
    let others = match checks.iter().filter(wrong).count() - 1 {
        0 => String::new(),
        others => format!(" (and {others} more: run `towline doctor`)"),
    };
    format!("{state}: {}: {}{remedy}{others}", worst.name, worst.finding)
}

/// `now` is the time of the clock, in seconds since 1970.
fn text(status: &pb::StatusResponse, health: String, now: i64, wide: bool) -> String {
    let mut lines = Vec::new();
    let mut line = |name, value| lines.push((name, value));
    line("health", health);
    if !status.name.is_empty() {
        line("node", format!("{} ({})", status.name, status.node_id));
    }
    let down = status.state == MachineState::Down.code();
    if down {
        let since = status.down_since.and_then(output::time).map(|since| format!(" since {since}"));
        line("state", format!("down{}: run `towline up`", since.unwrap_or_default()));
    }
    if status.mesh_id.is_empty() {
        line("mesh", "none: static peers only".into());
    } else {
        line("mesh", status.mesh_id.clone());
        line("site", output::or_dash(Some(&status.site)));
    }
    line("overlay", output::list(&status.overlay_addresses));
    line("public key", status.public_key.clone());
    line("link", format!("{}, mtu {}, udp port {}", status.link, status.mtu, status.listen_port));
    // Older agents do not report it, and one that is down has none.
    if !status.wireguard_engine.is_empty() {
        let (engine, aead) = (&status.wireguard_engine, &status.wireguard_aead);
        let helpers = match status.wireguard_seal_helpers {
            0 => String::new(),
            1 => ", 1 sealing thread".to_owned(),
            count => format!(", {count} sealing threads"),
        };
        line("wireguard", format!("engine {engine}, cipher {aead}{helpers}"));
    }
    if let Some(controller) = status.controller.as_ref().filter(|_| !down) {
        let last_heard = controller.last_heard_ms.map(Duration::from_millis).map(output::span);
        line(
            "controller",
            match (controller.connected, last_heard) {
                (true, _) => format!("{}, revision {}", controller.address, controller.revision),
                (false, Some(last_heard)) => {
                    format!("not connected, last heard {last_heard} ago: {}", controller.reason)
                }
                (false, None) => format!("not connected: {}", controller.reason),
            },
        );
    }
    if let Some(kubernetes) = &status.kubernetes {
        let node = output::or_dash(Some(&kubernetes.node));
        let pods = output::list(&kubernetes.pod_networks);
        line(
            "kubernetes",
            match kubernetes.connected {
                true => format!("node {node}, pods {pods}"),
                false => {
                    format!("node {node}, pods {pods}; not connected: {}", kubernetes.reason)
                }
            },
        );
        if !kubernetes.cni.is_empty() {
            line("cni", kubernetes.cni.clone());
        }
    }
    if let Some(endpoint) = &status.api_endpoint {
        line("api endpoint", api_endpoint(endpoint));
        for server in endpoint.servers.iter().filter(|server| wide || !server.reason.is_empty()) {
            line("api server", api_server(server));
        }
    }
    let relayed = match status.peers_relayed {
        0 => String::new(),
        relayed => format!(", {relayed} through a relay (run `towline peers` to see why)"),
    };
    line("peers", format!("{} up of {}{relayed}", status.peers_up, status.peers_total));
    if status.controller.is_some() {
        line("certificate", certificate(status.certificate_expires_at, now));
    }
    line(
        "agent",
        format!(
            "version {}, up {}",
            status.version,
            output::span(Duration::from_millis(status.uptime_ms))
        ),
    );
    for feature in status.features.iter().filter(|feature| wide || !feature.active) {
        let state = if feature.active { "on".into() } else { format!("off: {}", feature.reason) };
        line("data plane", format!("{} {state}", feature.name));
    }
    if wide {
        for candidate in status.candidates.iter().filter_map(|one| Candidate::try_from(one).ok()) {
            line("candidate", format!("{} ({})", candidate.address(), candidate.kind()));
        }
        let mut drops: Vec<&pb::Counter> =
            status.drops.iter().filter(|drop| drop.count > 0).collect();
        drops.sort_by_key(|drop| &drop.name);
        for drop in drops {
            line("drops", format!("{} {}", drop.name, drop.count));
        }
    }
    for note in &status.notes {
        line("note", note.clone());
    }
    for problem in &status.problems {
        line("problem", problem.clone());
    }
    output::sheet(14, &lines)
}

/// Returns until when the certificate is renewed, or since when it is too late. Both times are in seconds since
/// 1970.
fn certificate(expires_at: i64, now: i64) -> String {
    match output::time(expires_at) {
        Some(at) if now >= expires_at => format!("expired at {at}"),
        Some(at) => format!("renewed before {at}"),
        None => "none yet".into(),
    }
}

/// Returns where the endpoint of the Kubernetes API leads.
fn api_endpoint(endpoint: &pb::ApiEndpointStatus) -> String {
    let address = &endpoint.address;
    if !endpoint.listening {
        return format!("{address}, not served");
    }
    let clients = endpoint.connections;
    match endpoint.servers.len() {
        0 => format!("{address}, no API server is known"),
        known => {
            let server = &endpoint.server;
            format!("{address} leads to {server} (1 of {known} API servers), {clients} clients")
        }
    }
}

/// Returns the state of an API server, with the reason if it is failing.
fn api_server(server: &pb::ApiServerStatus) -> String {
    let pb::ApiServerStatus { name, address, state, .. } = server;
    let rtt = server.rtt_us.map(output::rtt);
    match (server.reason.as_str(), rtt) {
        ("", Some(rtt)) => format!("{name} ({address}) {state}, rtt {rtt}"),
        ("", None) => format!("{name} ({address}) {state}"),
        (reason, _) => format!("{name} ({address}) {state}: {reason}"),
    }
}

pub(super) fn version(format: Format) -> anyhow::Result<()> {
    let version = Version::of_this_program();
    Ok(output::write(format, &version, |_| format!("towline {}", version.version))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Subject;

    fn check(subject: Subject, state: CheckState) -> Check {
        Check {
            subject,
            name: subject.name(),
            state,
            finding: "what".into(),
            remedy: (state > CheckState::Ok).then(|| "run `this`".into()),
            causes: Vec::new(),
        }
    }

    #[test]
    fn the_first_line_says_whether_the_node_is_healthy() {
        let ok = check(Subject::Clock, CheckState::Ok);
        let health_of = |checks: &[Check]| health(checks, Palette::PLAIN);
        assert_eq!(health_of(&[ok.clone(), check(Subject::Cni, CheckState::Skipped)]), "healthy");
        let text = text(&pb::StatusResponse::default(), health_of(&[ok]), 0, false);
        assert!(text.starts_with("health        healthy\n"), "{text}");
    }

    #[test]
    fn a_certificate_that_expired_is_not_said_to_be_renewed() {
        let status = pb::StatusResponse {
            controller: Some(pb::ControllerStatus::default()),
            certificate_expires_at: 1_800_000_000,
            ..pb::StatusResponse::default()
        };
        let text = |now| text(&status, String::new(), now, false);
        let before = text(1_799_999_999);
        assert!(before.contains("certificate   renewed before 2027-01-15T08:00:00Z\n"), "{before}");
        let after = text(1_800_000_000);
        assert!(after.contains("certificate   expired at 2027-01-15T08:00:00Z\n"), "{after}");
    }

    #[test]
    fn the_first_of_the_worst_checks_is_named_with_its_remedy() {
        let checks = [
            check(Subject::Clock, CheckState::Warning),
            check(Subject::Peers, CheckState::Failed),
            check(Subject::Disk, CheckState::Failed),
        ];
        let line = health(&checks, Palette::PLAIN);
        let others = "(and 2 more: run `towline doctor`)";
        assert_eq!(line, format!("failed: peers: what: run `this` {others}"));
        let line = health(&checks[..1], Palette::PLAIN);
        assert_eq!(line, "warning: clock: what: run `this`");
        let colored = health(&checks[..1], Palette::COLORED);
        assert_eq!(colored, "\x1b[33mwarning\x1b[0m: clock: what: run `this`");
    }

    #[test]
    fn the_api_endpoint_says_where_it_leads_and_which_api_server_fails() {
        let server = |name: &str, state: &str, reason: &str| pb::ApiServerStatus {
            name: name.into(),
            address: "198.19.0.1:6443".into(),
            state: state.into(),
            reason: reason.into(),
            rtt_us: Some(1_500),
            ..pb::ApiServerStatus::default()
        };
        let endpoint = pb::ApiEndpointStatus {
            address: "127.0.0.1:7445".into(),
            listening: true,
            server: "cp-1".into(),
            servers: vec![
                server("cp-1", "healthy", ""),
                server("cp-2", "failing", "it does not answer"),
            ],
            connections: 2,
            ..pb::ApiEndpointStatus::default()
        };
        let status = |endpoint: pb::ApiEndpointStatus| pb::StatusResponse {
            api_endpoint: Some(endpoint),
            ..pb::StatusResponse::default()
        };
        let short = text(&status(endpoint.clone()), String::new(), 0, false);
        assert!(
            short.contains("127.0.0.1:7445 leads to cp-1 (1 of 2 API servers), 2 clients"),
            "{short}"
        );
        assert!(short.contains("cp-2 (198.19.0.1:6443) failing: it does not answer"), "{short}");
        assert!(!short.contains("cp-1 (198.19.0.1:6443)"), "{short}");
        let wide = text(&status(endpoint.clone()), String::new(), 0, true);
        assert!(wide.contains("cp-1 (198.19.0.1:6443) healthy, rtt 1.50 ms"), "{wide}");
        let closed = pb::ApiEndpointStatus { listening: false, ..endpoint };
        assert!(
            text(&status(closed), String::new(), 0, false).contains("127.0.0.1:7445, not served")
        );
    }
}
