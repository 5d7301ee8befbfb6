//! Checks of what the agent reports: its problems and notes, the controller, the peers.

use towline_proto::code::Coded as _;
use towline_proto::mtu::Mtu;
use towline_proto::pb;
use towline_service::output;

use super::classes::Class;
use super::findings::Findings;
use super::{Agent, Answers, Cause, CheckState, Facts, Subject, role_checks};
use crate::down::MachineState;

/// Subjects that only the agent knows about.
const OF_AGENT: [Subject; 14] = [
    Subject::Guards,
    Subject::Controller,
    Subject::Reflectors,
    Subject::Peers,
    Subject::Overlaps,
    Subject::Announcements,
    Subject::Sources,
    Subject::Trust,
    Subject::Probes,
    Subject::Relay,
    Subject::ApiEndpoint,
    Subject::Firewalls,
    Subject::OtherPrograms,
    Subject::Offloads,
];

/// Share of the last probes in percent from which a path counts as lossy: TCP is slow then. One lost probe of
/// the first ten is no more than that.
const LOSSY_PERCENT: f64 = 10.0;

/// Adds the findings of the agent's answers.
pub(super) fn examine(facts: &Facts, findings: &mut Findings) {
    match &facts.agent {
        Agent::Silent { code, reason } => {
            findings.add(Subject::Agent, CheckState::Failed, code, reason.as_str());
            for subject in OF_AGENT.into_iter().chain([Subject::Cni]) {
                findings.skip(subject, "no agent answers");
            }
        }
        Agent::Answered(answers) => {
            problems(answers, findings);
            agent(&answers.status, findings);
            controller(&answers.status, findings);
            peers(answers, findings);
            path_mtu(answers, findings);
            offloads(&answers.status, findings);
            kubernetes(&answers.status, findings);
            role_checks::examine(&answers.status, findings);
        }
    }
}

fn problems(answers: &Answers, findings: &mut Findings) {
    let status = &answers.status;
    for problem in &status.problem_details {
        let code = problem.code.as_str();
        // What is a warning elsewhere may keep this machine from being used.
        let is_blocking = status.applied == Some(false) && status.applied_reason_code == code;
        let class = Class::of(code);
        let state = if is_blocking { CheckState::Failed } else { class.of_problem() };
        findings.add(class.subject, state, code, problem.message.as_str());
    }
    let is_missed = answers.peers.iter().any(|peer| peer.state == "down" || is_relayed(peer));
    for note in &status.note_details {
        let (code, class) = (note.code.as_str(), Class::of(&note.code));
        findings.add(class.subject, class.of_note(is_missed), code, note.message.as_str());
    }
    if status.applied == Some(false) {
        let code = status.applied_reason_code.as_str();
        let text = format!("the mesh must not be used yet: {}", status.applied_reason);
        // The reason is often one of the problems.
        let subject = Class::of(code).subject;
        if !findings.has(subject, code) {
            findings.add(subject, CheckState::Failed, code, text);
        }
        // Where another program is the reason, something of Towline's is missing all the same.
        if findings.worst(Subject::Guards) != Some(CheckState::Failed) {
            let text = format!("not all of it is installed: {}", status.applied_reason);
            findings.add(Subject::Guards, CheckState::Failed, code, text);
        }
    }
}

fn agent(status: &pb::StatusResponse, findings: &mut Findings) {
    if status.state == MachineState::Down.code() {
        let text =
            "`towline down` is in effect: this machine's traffic for the mesh is not guarded";
        findings.add(Subject::Agent, CheckState::Failed, "machine-down", text);
    }
    let up = output::span(std::time::Duration::from_millis(status.uptime_ms));
    findings.summary(Subject::Agent, format!("version {}, up {up}", status.version));
    match status.applied {
        Some(true) => findings.summary(Subject::Guards, "installed"),
        Some(false) => {}
        None => findings.skip(Subject::Guards, "the agent does not report them"),
    }
}

fn controller(status: &pb::StatusResponse, findings: &mut Findings) {
    let Some(controller) = &status.controller else {
        let why = "this node is in no mesh: it has static peers only";
        findings.skip(Subject::Controller, why);
        return findings.skip(Subject::Reflectors, why);
    };
    if controller.connected {
        findings.summary(Subject::Controller, format!("connected to {}", controller.address));
        return findings.summary(Subject::Reflectors, "no STUN server of a controller is silent");
    }
    findings.skip(Subject::Reflectors, "no controller is connected");
    let code = controller.reason_code.as_str();
    let asks_peers = if status.peers_up > 0 { "; peers are asked for removed nodes" } else { "" };
    let text = format!("not connected: {}{asks_peers}", controller.reason);
    match code {
        "" => findings.skip(Subject::Controller, "not connected, and the agent does not say why"),
        "controller-pending" => findings.add(Subject::Controller, CheckState::Ok, code, text),
        "node-removed" | "machine-down" => {
            findings.add(Subject::Agent, CheckState::Failed, code, controller.reason.as_str());
            findings.skip(Subject::Controller, text);
        }
        "controller-certificate-not-valid" => {
            findings.add(Subject::Clock, CheckState::Failed, code, controller.reason.as_str());
            findings.add(Subject::Controller, CheckState::Failed, code, text);
        }
        "certificate-not-renewed" | "tls-unusable" => {
            findings.add(
                Subject::Certificates,
                CheckState::Failed,
                code,
                controller.reason.as_str(),
            );
            findings.add(Subject::Controller, CheckState::Failed, code, text);
        }
        _ => findings.add(Subject::Controller, CheckState::Failed, code, text),
    }
}

/// Returns true if a relay carries the traffic of a peer.
fn is_relayed(peer: &pb::PeerStatus) -> bool {
    peer.state == "up" && peer.path_kind == "relay"
}

/// Returns the share of lost probes of a peer that is up, in percent, if that is too much.
pub(super) fn lossy(peer: &pb::PeerStatus) -> Option<f64> {
    peer.loss_percent.filter(|percent| peer.state == "up" && *percent > LOSSY_PERCENT)
}

fn peers(answers: &Answers, findings: &mut Findings) {
    let peers = &answers.peers;
    if peers.is_empty() {
        return findings.skip(Subject::Peers, "this node knows no other node yet");
    }
    let (mut up, mut down, mut idle) = (0, 0, 0);
    for peer in peers {
        up += usize::from(peer.state == "up");
        let code = peer.reason_code.as_str();
        let text = format!("{} is {}: {}", peer.name, peer.state, peer.reason);
        let state = match (peer.state.as_str(), code) {
            // A fault of this node, or of the pair.
            ("down", "udp-blocked" | "no-handshake") | (_, "key-conflict") => CheckState::Failed,
            ("down", _) => CheckState::Warning,
            // Direct paths are still tried.
            ("up", "relayed-trying-direct") => CheckState::Ok,
            ("up", _) if is_relayed(peer) => CheckState::Warning,
            _ => CheckState::Ok,
        };
        down += usize::from(peer.state == "down");
        idle += usize::from(peer.state == "idle");
        // A peer that is up has no reason, unless it is relayed.
        if !code.is_empty() && (state > CheckState::Ok || peer.state == "connecting") {
            findings.add(Subject::Peers, state, code, text);
        }
        if let Some(percent) = lossy(peer) {
            let text = format!("{} loses {percent:.0} % of the probes on its path", peer.name);
            findings.cause(Subject::Peers, CheckState::Warning, Cause::PathLossHigh, text);
        }
        if code == "no-handshake" {
            let text = format!("{} answers probes, but no handshake", peer.name);
            findings.add(Subject::Clock, CheckState::Warning, code, text);
        }
    }
    // An idle peer may well be reachable.
    if up == 0 && idle == 0 && down > 0 {
        let text = format!("no peer is up, and {down} of {} are down", peers.len());
        findings.cause(Subject::Peers, CheckState::Failed, Cause::NoPeerUp, text);
    }
    findings.summary(Subject::Peers, format!("{up} up of {}", peers.len()));
}

fn path_mtu(answers: &Answers, findings: &mut Findings) {
    let link = answers.status.mtu;
    for peer in answers.peers.iter().filter(|peer| peer.state == "up") {
        let Some(mtu) = peer.mtu.filter(|mtu| *mtu < link) else { continue };
        let is_small = mtu < u32::from(Mtu::MIN);
        let state = if is_small { CheckState::Warning } else { CheckState::Ok };
        let text =
            format!("the path to {} carries packets of {mtu} instead of {link} bytes", peer.name);
        findings.cause(Subject::Mtu, state, Cause::PathMtuSmall, text);
    }
}

fn offloads(status: &pb::StatusResponse, findings: &mut Findings) {
    for feature in status.features.iter().filter(|feature| !feature.active) {
        let code = feature.reason_code.as_str();
        let state = match code {
            "offload-damages-packets" | "offload-self-test-failed" => CheckState::Warning,
            // The mesh works without, and this machine has no other kernel or configuration.
            _ => CheckState::Ok,
        };
        let text = format!("{} is off: {}", feature.name, feature.reason);
        if !code.is_empty() {
            findings.add(Subject::Offloads, state, code, text);
        }
    }
    let active = status.features.iter().filter(|feature| feature.active).count();
    let summary = format!("{active} of {} are on", status.features.len());
    findings.summary(Subject::Offloads, summary);
}

fn kubernetes(status: &pb::StatusResponse, findings: &mut Findings) {
    let Some(kubernetes) = &status.kubernetes else {
        return findings.skip(Subject::Cni, "no Kubernetes was found on this machine");
    };
    let code = kubernetes.reason_code.as_str();
    if !kubernetes.connected && !code.is_empty() {
        // While a machine joins a cluster, its kubelet has no credentials and no Node yet.
        let state = match code {
            "kubelet-credentials-missing" | "node-not-registered" | "api-server-watch-ended" => {
                CheckState::Ok
            }
            _ => CheckState::Warning,
        };
        let text = format!("not connected to the API server: {}", kubernetes.reason);
        findings.add(Subject::Cni, state, code, text);
        if code == "api-server-certificate-not-valid" {
            findings.add(Subject::Clock, CheckState::Warning, code, kubernetes.reason.as_str());
        }
    }
    if !kubernetes.cni_reason_code.is_empty() {
        let text = format!("it is not known how pods are routed: {}", kubernetes.cni);
        findings.add(Subject::Cni, CheckState::Ok, &kubernetes.cni_reason_code, text);
    }
    let node = output::or_dash(Some(&kubernetes.node));
    findings
        .summary(Subject::Cni, format!("node {node}, {}", output::or_dash(Some(&kubernetes.cni))));
}
