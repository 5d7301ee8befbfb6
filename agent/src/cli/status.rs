//! Implements `towline status` and `towline version`.

use std::time::Duration;

use anyhow::bail;
use serde::Serialize;
use towline_proto::node::Candidate;
use towline_proto::pb;
use towline_service::output::{self, Format};

use super::local::{status_error, with_agent};
use crate::config::Config;
use crate::daemon;
use crate::down::DownMarker;

#[derive(Serialize)]
struct Status {
    /// State of the machine: "running" or "down".
    state: String,
    /// When `towline down` was run. `null` if the machine is not down, or if the time is unknown.
    down_since: Option<String>,
    /// Time after which the join is undone unless it is confirmed. `null` if it is permanent.
    confirm_within_ms: Option<u64>,
    name: Option<String>,
    node_id: Option<String>,
    mesh_id: Option<String>,
    site: Option<String>,
    overlay_addresses: Vec<String>,
    public_key: String,
    version: String,
    uptime_ms: u64,
    listen_port: u32,
    link: String,
    mtu: u32,
    candidates: Vec<Candidate>,
    controller: Option<Controller>,
    kubernetes: Option<Kubernetes>,
    peers_up: u32,
    peers_total: u32,
    peers_relayed: u32,
    certificate_expires_at: Option<String>,
    problems: Vec<String>,
    problem_details: Vec<Detail>,
    notes: Vec<String>,
    note_details: Vec<Detail>,
    applied: Option<bool>,
    applied_reason: String,
    applied_reason_code: String,
    drops: std::collections::BTreeMap<String, u64>,
    features: Vec<Feature>,
}

#[derive(Serialize)]
struct Controller {
    connected: bool,
    address: String,
    revision: u64,
    last_heard_ms: Option<u64>,
    reason: String,
}

#[derive(Serialize)]
struct Kubernetes {
    connected: bool,
    reason: String,
    node: String,
    node_ips: Vec<String>,
    pod_networks: Vec<String>,
    cni: String,
}

/// A problem, conflict or note with its code.
#[derive(Serialize)]
pub(super) struct Detail {
    code: String,
    message: String,
}

pub(super) fn details(details: Vec<pb::Detail>) -> Vec<Detail> {
    let detail = |detail: pb::Detail| Detail { code: detail.code, message: detail.message };
    details.into_iter().map(detail).collect()
}

#[derive(Serialize)]
struct Feature {
    name: String,
    active: bool,
    reason: String,
}

impl From<pb::StatusResponse> for Status {
    fn from(status: pb::StatusResponse) -> Self {
        let present = |text: String| (!text.is_empty()).then_some(text);
        let expires = jiff::Timestamp::from_second(status.certificate_expires_at).ok();
        let down_since = status.down_since.filter(|since| *since != 0);
        let down_since = down_since.and_then(|since| jiff::Timestamp::from_second(since).ok());
        Self {
            state: status.state,
            down_since: down_since.map(|since| since.to_string()),
            confirm_within_ms: status.confirm_within_ms,
            name: present(status.name),
            node_id: present(status.node_id),
            mesh_id: present(status.mesh_id),
            site: present(status.site),
            overlay_addresses: status.overlay_addresses,
            public_key: status.public_key,
            version: status.version,
            uptime_ms: status.uptime_ms,
            listen_port: status.listen_port,
            link: status.link,
            mtu: status.mtu,
            candidates: status
                .candidates
                .iter()
                .filter_map(|candidate| Candidate::try_from(candidate).ok())
                .collect(),
            controller: status.controller.map(|controller| Controller {
                connected: controller.connected,
                address: controller.address,
                revision: controller.revision,
                last_heard_ms: controller.last_heard_ms,
                reason: controller.reason,
            }),
            kubernetes: status.kubernetes.map(|kubernetes| Kubernetes {
                connected: kubernetes.connected,
                reason: kubernetes.reason,
                node: kubernetes.node,
                node_ips: kubernetes.node_ips,
                pod_networks: kubernetes.pod_networks,
                cni: kubernetes.cni,
            }),
            peers_up: status.peers_up,
            peers_total: status.peers_total,
            peers_relayed: status.peers_relayed,
            certificate_expires_at: expires
                .filter(|_| status.certificate_expires_at != 0)
                .map(|at| at.to_string()),
            problems: status.problems,
            problem_details: details(status.problem_details),
            notes: status.notes,
            note_details: details(status.note_details),
            applied: status.applied,
            applied_reason: status.applied_reason,
            applied_reason_code: status.applied_reason_code,
            drops: status.drops.into_iter().map(|drop| (drop.name, drop.count)).collect(),
            features: status
                .features
                .into_iter()
                .map(|f| Feature { name: f.name, active: f.active, reason: f.reason })
                .collect(),
        }
    }
}

pub(super) fn run(config: &Config, format: Format) -> anyhow::Result<()> {
    let marker = DownMarker::of(config).read().filter(|_| !daemon::is_running(&config.socket));
    if let Some(down) = marker {
        bail!("no agent is running: {}", daemon::down_line(down));
    }
    let status: Status = with_agent(&config.socket, async |mut agent| {
        let answer =
            agent.status(pb::StatusRequest {}).await.map_err(|status| status_error(&status))?;
        Ok(answer.into_inner().into())
    })?;
    Ok(output::write(format, &status, |wide| text(&status, wide))?)
}

fn text(status: &Status, wide: bool) -> String {
    let mut lines = Vec::new();
    let mut line = |name, value| lines.push((name, value));
    if let (Some(name), Some(id)) = (&status.name, &status.node_id) {
        line("node", format!("{name} ({id})"));
    }
    let down = status.state == "down";
    if down {
        let since = status.down_since.as_ref().map(|since| format!(" since {since}"));
        line("state", format!("down{}: run `towline up`", since.unwrap_or_default()));
    }
    line("mesh", status.mesh_id.clone().unwrap_or_else(|| "none: static peers only".into()));
    if status.mesh_id.is_some() {
        line("site", output::or_dash(status.site.as_ref()));
    }
    line("overlay", output::list(&status.overlay_addresses));
    line("public key", status.public_key.clone());
    line("link", format!("{}, mtu {}, udp port {}", status.link, status.mtu, status.listen_port));
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
    let relayed = match status.peers_relayed {
        0 => String::new(),
        relayed => format!(", {relayed} through a relay (run `towline peers` to see why)"),
    };
    line("peers", format!("{} up of {}{relayed}", status.peers_up, status.peers_total));
    if status.controller.is_some() {
        line(
            "certificate",
            match &status.certificate_expires_at {
                Some(at) => format!("renewed before {at}"),
                None => "none yet".into(),
            },
        );
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
        for candidate in &status.candidates {
            line("candidate", format!("{} ({})", candidate.address(), candidate.kind()));
        }
        for (name, count) in status.drops.iter().filter(|(_, count)| **count > 0) {
            line("drops", format!("{name} {count}"));
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

#[derive(Serialize)]
struct Version {
    version: &'static str,
}

pub(super) fn version(format: Format) -> anyhow::Result<()> {
    let version = Version { version: towline_proto::VERSION };
    Ok(output::write(format, &version, |_| format!("towline {}", version.version))?)
}
