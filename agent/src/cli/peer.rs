//! Implements `towline peer NAME`: everything that is known of one peer.

use std::time::Duration;

use clap::Args;
use towline_proto::node::Candidate;
use towline_proto::pb;
use towline_service::output::{self, Format};

use super::local::{status_error, with_agent};
use crate::config::Config;

#[derive(Debug, Args)]
pub(super) struct PeerArgs {
    /// Name of a node or static peer, or one of its overlay addresses
    node: String,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(super) fn run(config: &Config, args: PeerArgs) -> anyhow::Result<()> {
    let PeerArgs { node, output } = args;
    let answer = with_agent(&config.socket, async |mut agent| {
        let answer = agent.peer(pb::PeerRequest { node }).await;
        Ok(answer.map_err(|status| status_error(&status))?.into_inner())
    })?;
    Ok(output::write(output, &answer, |_| text(&answer))?)
}

fn text(answer: &pb::PeerResponse) -> String {
    let pb::PeerResponse { peer, paths, history } = answer;
    let mut text = peer.as_ref().map(sheet).unwrap_or_default();
    if !paths.is_empty() {
        let rows = paths.iter().map(|path| {
            let ago = |ms: Option<u64>| output::or_dash(ms.map(ago));
            vec![
                format!("{} {}", path.path_kind, to(path)),
                output::or_dash(Some(&path.local_address)),
                output::or_dash(path.rtt_us.map(output::rtt)),
                ago(path.heard_ms),
                ago(path.answered_ms),
                if path.in_use { "in use" } else { "" }.to_owned(),
            ]
        });
        text += "\n";
        text += &output::table(&["PATH", "FROM", "RTT", "HEARD", "ANSWERED", ""], rows);
    }
    if !history.is_empty() {
        let rows = history
            .iter()
            .map(|change| vec![output::or_dash(output::time(change.at / 1000)), words(change)]);
        text += "\n";
        text += &output::table(&["TIME", "CHANGE"], rows);
    }
    text
}

fn sheet(peer: &pb::PeerStatus) -> String {
    let span = |ms| output::span(Duration::from_millis(ms));
    let mut lines = Vec::new();
    let mut line = |name, value| lines.push((name, value));
    match peer.node_id.as_str() {
        "" => line("peer", format!("{} (static)", peer.name)),
        id => {
            line("peer", format!("{} ({id})", peer.name));
            line("site", output::or_dash(Some(&peer.site)));
            line("overlay", output::list(&peer.overlay_addresses));
        }
    }
    line("state", format!("{} for {}", peer.state, span(peer.since_ms)));
    if !peer.reason.is_empty() {
        line("reason", peer.reason.clone());
    }
    if !peer.path.is_empty() {
        let relay = if peer.relay.is_empty() { String::new() } else { format!(" {}", peer.relay) };
        line("path", format!("{}{relay} {}", peer.path_kind, peer.path));
    }
    let loss = peer.loss_percent.map(|percent| format!(", {percent:.0} % of the last probes lost"));
    if let Some(rtt) = peer.rtt_us {
        line("rtt", format!("{}{}", output::rtt(rtt), loss.unwrap_or_default()));
    }
    if let Some(mtu) = peer.mtu {
        line("mtu", mtu.to_string());
    }
    line("handshake", output::or_dash(peer.handshake_age_ms.map(ago)));
    line("received", traffic(peer.rx_bytes, peer.rx_bytes_per_s));
    line("sent", traffic(peer.tx_bytes, peer.tx_bytes_per_s));
    line("prefixes", output::list(&peer.prefixes));
    if !peer.standby_prefixes.is_empty() {
        line(
            "standby",
            format!("{}: another node is used for it now", output::list(&peer.standby_prefixes)),
        );
    }
    line("public key", peer.public_key.clone());
    for candidate in peer.candidates.iter().filter_map(|one| Candidate::try_from(one).ok()) {
        line("candidate", format!("{} ({})", candidate.address(), candidate.kind()));
    }
    for conflict in &peer.conflicts {
        line("conflict", conflict.clone());
    }
    output::sheet(12, &lines)
}

fn ago(ms: u64) -> String {
    format!("{} ago", output::span(Duration::from_millis(ms)))
}

fn traffic(bytes: u64, rate: Option<u64>) -> String {
    let rate = rate.map(|rate| format!(", {} now", output::rate(rate)));
    output::bytes(bytes) + &rate.unwrap_or_default()
}

/// Returns where a path leads to: the relay's name and address, or the peer's address.
fn to(path: &pb::PathStatus) -> String {
    match path.relay.as_str() {
        "" => path.path.clone(),
        relay => format!("{relay} {}", path.path),
    }
}

fn words(change: &pb::PeerChange) -> String {
    if !change.to_state.is_empty() {
        return format!("{} -> {}", change.from_state, change.to_state);
    }
    let (from, to) = (output::or_dash(Some(&change.from_path)), &change.to_path);
    format!("{from} -> {}: {}", output::or_dash(Some(to)), change.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_shows_its_paths_and_what_happened_to_it() {
        let change = pb::PeerChange { at: 1_700_000_000_000, ..Default::default() };
        let answer = pb::PeerResponse {
            peer: Some(pb::PeerStatus {
                name: "w1".into(),
                node_id: "id".into(),
                state: "up".into(),
                since_ms: 61_000,
                path_kind: "direct".into(),
                path: "203.0.113.7:51820".into(),
                rtt_us: Some(420),
                loss_percent: Some(1.6),
                rx_bytes: 1536,
                rx_bytes_per_s: Some(0),
                standby_prefixes: vec!["192.168.50.0/24".into()],
                ..Default::default()
            }),
            paths: vec![pb::PathStatus {
                path_kind: "relay".into(),
                path: "198.51.100.1:51820".into(),
                relay: "r1".into(),
                heard_ms: Some(2_000),
                ..Default::default()
            }],
            history: vec![
                pb::PeerChange {
                    from_state: "connecting".into(),
                    to_state: "up".into(),
                    ..change.clone()
                },
                pb::PeerChange { to_path: "direct a".into(), reason: "why".into(), ..change },
            ],
        };
        let text = text(&answer);
        for line in [
            "peer        w1 (id)",
            "state       up for 1m 1s",
            "path        direct 203.0.113.7:51820",
            "rtt         0.42 ms, 2 % of the last probes lost",
            "received    1.5 KiB, 0 B/s now",
            "standby     192.168.50.0/24: another node is used for it now",
            "relay r1 198.51.100.1:51820  -     -    2s ago  -",
            "2023-11-14T22:13:20Z  connecting -> up",
            "2023-11-14T22:13:20Z  - -> direct a: why",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
