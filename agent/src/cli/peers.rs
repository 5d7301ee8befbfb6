//! Implements `towline peers`: every peer, its state, its path, and why it is not up.

use std::time::Duration;

use serde::Serialize;
use towline_proto::mtu::Mtu;
use towline_proto::node::Candidate;
use towline_proto::pb;
use towline_service::output::{self, Format};

use super::local::{status_error, with_agent};
use super::status::{Detail, details};
use crate::config::Config;

#[derive(Serialize)]
struct Peer {
    name: String,
    node_id: String,
    site: Option<String>,
    overlay_addresses: Vec<String>,
    state: String,
    reason: Option<String>,
    reason_code: Option<String>,
    since_ms: u64,
    path_kind: Option<String>,
    path: Option<String>,
    relay: Option<String>,
    mtu: Option<u32>,
    rtt_us: Option<u64>,
    handshake_age_ms: Option<u64>,
    rx_bytes: u64,
    tx_bytes: u64,
    prefixes: Vec<String>,
    conflicts: Vec<String>,
    conflict_details: Vec<Detail>,
    public_key: String,
    candidates: Vec<Candidate>,
}

fn present(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl From<pb::PeerStatus> for Peer {
    fn from(peer: pb::PeerStatus) -> Self {
        Self {
            name: peer.name,
            node_id: peer.node_id,
            site: present(peer.site),
            overlay_addresses: peer.overlay_addresses,
            state: peer.state,
            reason: present(peer.reason),
            reason_code: present(peer.reason_code),
            since_ms: peer.since_ms,
            path_kind: present(peer.path_kind),
            path: present(peer.path),
            relay: present(peer.relay),
            mtu: peer.mtu,
            rtt_us: peer.rtt_us,
            handshake_age_ms: peer.handshake_age_ms,
            rx_bytes: peer.rx_bytes,
            tx_bytes: peer.tx_bytes,
            prefixes: peer.prefixes,
            conflicts: peer.conflicts,
            conflict_details: details(peer.conflict_details),
            public_key: peer.public_key,
            candidates: peer
                .candidates
                .iter()
                .filter_map(|candidate| Candidate::try_from(candidate).ok())
                .collect(),
        }
    }
}

pub(super) fn run(config: &Config, format: Format) -> anyhow::Result<()> {
    let peers: Vec<Peer> = with_agent(&config.socket, async |mut agent| {
        let answer =
            agent.peers(pb::PeersRequest {}).await.map_err(|status| status_error(&status))?;
        Ok(answer.into_inner().peers.into_iter().map(Peer::from).collect())
    })?;
    Ok(output::write(format, &peers, |wide| text(&peers, wide))?)
}

fn text(peers: &[Peer], wide: bool) -> String {
    if peers.is_empty() {
        return "no peers: this node knows no other node yet\n".into();
    }
    let mut header = vec![
        "PEER",
        "SITE",
        "OVERLAY",
        "STATE",
        "PATH",
        "RTT",
        "HANDSHAKE",
        "RX",
        "TX",
        "PREFIXES",
    ];
    if wide {
        header.extend(["MTU", "SINCE", "PUBLIC KEY", "CANDIDATES", "CONFLICTS"]);
    }
    let rows = peers.iter().map(|peer| {
        let path = match (&peer.path_kind, &peer.path) {
            (Some(kind), Some(path)) => {
                Some(format!("{kind} {}", peer.relay.as_ref().unwrap_or(path)))
            }
            _ => None,
        };
        let handshake = peer.handshake_age_ms.map(Duration::from_millis);
        let mut row = vec![
            peer.name.clone(),
            output::or_dash(peer.site.as_ref()),
            // A narrow terminal shows one address; the wide format shows all.
            if wide {
                output::list(&peer.overlay_addresses)
            } else {
                output::or_dash(peer.overlay_addresses.last())
            },
            peer.state.clone(),
            output::or_dash(path),
            output::or_dash(peer.rtt_us.map(output::rtt)),
            output::or_dash(handshake.map(output::span)),
            output::bytes(peer.rx_bytes),
            output::bytes(peer.tx_bytes),
            output::list(&peer.prefixes),
        ];
        if wide {
            row.push(output::or_dash(peer.mtu.map(|mtu| mtu.to_string())));
            row.push(output::span(Duration::from_millis(peer.since_ms)));
            row.push(peer.public_key.clone());
            let candidates = peer
                .candidates
                .iter()
                .map(|candidate| format!("{} ({})", candidate.address(), candidate.kind()));
            row.push(output::list(&candidates.collect::<Vec<_>>()));
            row.push(output::or_dash(Some(peer.conflicts.join("; "))));
        }
        row
    });
    let table = output::table(&header, rows);
    let remarks: Vec<String> = peers.iter().flat_map(remarks).collect();
    if remarks.is_empty() {
        return table;
    }
    table + "\n" + &remarks.concat()
}

/// Returns explanations that the table has no column for, one line each.
fn remarks(peer: &Peer) -> impl Iterator<Item = String> {
    let why = peer.reason.as_ref().map(|reason| {
        let since = output::span(Duration::from_millis(peer.since_ms));
        format!("{} is {} for {since}: {reason}\n", peer.name, peer.state)
    });
    // The tunnel's link keeps to the minimum even if a path takes less.
    let small = peer.mtu.filter(|mtu| *mtu < Mtu::MIN.into()).map(|mtu| {
        format!(
            "the path to {} has an MTU of {mtu} bytes: larger packets are sent in two fragments\n",
            peer.name
        )
    });
    why.into_iter().chain(small)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, state: &str, reason: &str) -> Peer {
        Peer::from(pb::PeerStatus {
            name: name.into(),
            state: state.into(),
            reason: reason.into(),
            overlay_addresses: vec!["fd00::1".into(), "198.19.0.1".into()],
            since_ms: 61_000,
            ..Default::default()
        })
    }

    #[test]
    fn a_peer_that_is_down_says_why_below_the_table() {
        let text = text(&[peer("cp", "up", ""), peer("worker-b", "down", "no answer")], false);
        assert!(text.lines().next().unwrap().starts_with("PEER"), "{text}");
        assert!(text.ends_with("\nworker-b is down for 1m 1s: no answer\n"), "{text}");
        assert!(!text.contains("cp is"), "{text}");
        assert!(text.lines().all(|line| line == line.trim_end()), "{text}");
    }

    #[test]
    fn a_path_that_is_relayed_or_small_is_explained_below_the_table() {
        let relayed = Peer { mtu: Some(1408), ..peer("worker-b", "up", "through a relay: why") };
        let small = Peer { mtu: Some(1236), ..peer("worker-c", "up", "") };
        let text = text(&[peer("cp", "up", ""), relayed, small], false);
        let below = text.split_once("\n\n").unwrap().1;
        assert_eq!(
            below,
            "worker-b is up for 1m 1s: through a relay: why\nthe path to worker-c has an MTU of \
             1236 bytes: larger packets are sent in two fragments\n"
        );
    }
}
