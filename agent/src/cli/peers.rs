//! Implements `towline peers`: every peer, its state, its path, and why it is not up.

use std::time::Duration;

use towline_proto::mtu::Mtu;
use towline_proto::node::Candidate;
use towline_proto::pb;
use towline_service::color::Palette;
use towline_service::output::{self, Format};

use super::local::{status_error, with_agent};
use crate::config::Config;

/// Returns the output of `towline peers`.
pub(super) fn text_of(config: &Config, format: Format) -> anyhow::Result<String> {
    let peers = with_agent(&config.socket, async |mut agent| {
        let answer =
            agent.peers(pb::PeersRequest {}).await.map_err(|status| status_error(&status))?;
        Ok(answer.into_inner().peers)
    })?;
    Ok(output::text(format, &peers, |wide| text(&peers, wide, Palette::of_stdout()))?)
}

fn text(peers: &[pb::PeerStatus], wide: bool, palette: Palette) -> String {
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
        "LOSS",
        "MTU",
        "HANDSHAKE",
        "RX",
        "TX",
        "RX/S",
        "TX/S",
        "PREFIXES",
    ];
    if wide {
        header.extend(["SINCE", "PUBLIC KEY", "CANDIDATES", "CONFLICTS"]);
    }
    let rows = peers.iter().map(|peer| {
        let handshake = peer.handshake_age_ms.map(Duration::from_millis);
        let mut row = vec![
            peer.name.clone(),
            output::or_dash(Some(&peer.site)),
            // A narrow terminal shows one address; the wide format shows all.
            if wide {
                output::list(&peer.overlay_addresses)
            } else {
                output::or_dash(peer.overlay_addresses.last())
            },
            peer.state.clone(),
            path_cell(peer),
            rtt_cell(peer),
            loss_cell(peer),
            output::or_dash(peer.mtu.map(|mtu| mtu.to_string())),
            output::or_dash(handshake.map(output::span)),
            output::bytes(peer.rx_bytes),
            output::bytes(peer.tx_bytes),
            output::or_dash(peer.rx_bytes_per_s.map(output::rate)),
            output::or_dash(peer.tx_bytes_per_s.map(output::rate)),
            output::list(&peer.prefixes),
        ];
        if wide {
            row.push(output::span(Duration::from_millis(peer.since_ms)));
            row.push(peer.public_key.clone());
            let candidates = peer.candidates.iter().filter_map(|one| Candidate::try_from(one).ok());
            let candidates = candidates.map(|one| format!("{} ({})", one.address(), one.kind()));
            row.push(output::list(&candidates.collect::<Vec<_>>()));
            row.push(output::or_dash(Some(peer.conflicts.join("; "))));
        }
        row
    });
    let table = palette.columns(&output::table(&header, rows), &["STATE", "PATH"]);
    let remarks: Vec<String> = peers.iter().flat_map(remarks).collect();
    if remarks.is_empty() {
        return table;
    }
    table + "\n" + &remarks.concat()
}

/// Returns the kind of a peer's path, and where it leads.
pub(super) fn path_cell(peer: &pb::PeerStatus) -> String {
    let to = if peer.relay.is_empty() { &peer.path } else { &peer.relay };
    output::or_dash((!peer.path.is_empty()).then(|| format!("{} {to}", peer.path_kind)))
}

/// Returns the round-trip time of a peer's path.
pub(super) fn rtt_cell(peer: &pb::PeerStatus) -> String {
    output::or_dash(peer.rtt_us.map(output::rtt))
}

/// Returns the share of pings on a peer's path that were lost.
pub(super) fn loss_cell(peer: &pb::PeerStatus) -> String {
    output::or_dash(peer.loss_percent.map(|percent| format!("{percent:.0} %")))
}

/// Returns explanations that the table has no column for, one line each.
fn remarks(peer: &pb::PeerStatus) -> impl Iterator<Item = String> {
    let why = (!peer.reason.is_empty()).then(|| {
        let since = output::span(Duration::from_millis(peer.since_ms));
        format!("{} has been {} for {since}: {}\n", peer.name, peer.state, peer.reason)
    });
    // The tunnel's link keeps to the minimum even if a path takes less.
    let small = peer.mtu.filter(|mtu| *mtu < Mtu::MIN.into()).map(|mtu| {
        format!(
            "the path to {} has an MTU of {mtu} bytes: larger packets are sent in two fragments\n",
            peer.name
        )
    });
    let single = peer.single_datagrams.then(|| {
        format!(
            "datagrams to {} are sent singly: those that are sent together (UDP_SEGMENT) do not arrive\n",
            peer.name
        )
    });
    why.into_iter().chain(small).chain(single)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, state: &str, reason: &str) -> pb::PeerStatus {
        pb::PeerStatus {
            name: name.into(),
            state: state.into(),
            reason: reason.into(),
            overlay_addresses: vec!["fd00::1".into(), "198.19.0.1".into()],
            since_ms: 61_000,
            ..Default::default()
        }
    }

    #[test]
    fn a_peer_that_is_down_says_why_below_the_table() {
        let peers = [peer("cp", "up", ""), peer("worker-b", "down", "no answer")];
        let text = text(&peers, false, Palette::PLAIN);
        assert!(text.lines().next().unwrap().starts_with("PEER"), "{text}");
        assert!(text.ends_with("\nworker-b has been down for 1m 1s: no answer\n"), "{text}");
        assert!(!text.contains("cp has been"), "{text}");
        assert!(text.lines().all(|line| line == line.trim_end()), "{text}");
    }

    #[test]
    fn the_screens_in_the_documents_have_these_columns() {
        let text = text(&[peer("cp", "up", "")], false, Palette::PLAIN);
        let header = |text: &str| -> Vec<String> {
            let line =
                text.lines().find(|line| line.starts_with("PEER ")).expect("a table of peers");
            line.split_whitespace().map(ToOwned::to_owned).collect()
        };
        for document in [include_str!("../../../README.md"), include_str!("../../../docs/guide.md")]
        {
            assert_eq!(header(document), header(&text));
        }
    }

    #[test]
    fn a_path_that_is_relayed_or_small_is_explained_below_the_table() {
        let relayed =
            pb::PeerStatus { mtu: Some(1408), ..peer("worker-b", "up", "through a relay: why") };
        let small = pb::PeerStatus { mtu: Some(1236), ..peer("worker-c", "up", "") };
        let single = pb::PeerStatus { single_datagrams: true, ..peer("worker-d", "up", "") };
        let text = text(&[peer("cp", "up", ""), relayed, small, single], false, Palette::PLAIN);
        let below = text.split_once("\n\n").unwrap().1;
        assert_eq!(
            below,
            "worker-b has been up for 1m 1s: through a relay: why\nthe path to worker-c has an MTU of \
             1236 bytes: larger packets are sent in two fragments\ndatagrams to worker-d are sent \
             singly: those that are sent together (UDP_SEGMENT) do not arrive\n"
        );
    }
}
