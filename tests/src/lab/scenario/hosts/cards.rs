//! Hosts whose network card damages what it is asked to split.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use towline_netlink::Family;

use super::Case;
use super::scene::{connected, node_behind};
use crate::lab::interrupt::wait_up_to;
use crate::lab::mesh::{Controller, Node};
use crate::lab::ping::echoes;
use crate::lab::scenario::Setting;
use crate::lab::topology::Lab;
use crate::lab::traffic::{Pattern, tcp_both_ways};
use crate::lab::wire::Weather;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("cards/damaged-trains", |setting| trains(setting, true)),
        Case::new("cards/whole-trains", |setting| trains(setting, false)).long(),
    ]
}

/// Two nodes that send datagrams together. If their cards damage those, both notice, send singly, and
/// TCP works.
fn trains(setting: &Setting, are_damaged: bool) -> anyhow::Result<()> {
    /// Limit for a node to notice. It probes for some seconds while the path is in use.
    const NOTICE: Duration = Duration::from_secs(40);
    /// Size of the transfer in each direction, and its time limit: 8 Mbit/s.
    const BYTES: u64 = 20_000_000;
    const LIMIT: Duration = Duration::from_secs(20);
    let mut lab = Lab::new(setting.rank)?;
    // A delay has both links pass through the lab in either form.
    let delay = Duration::from_micros(100);
    lab.weather(Weather { damages_trains: are_damaged, delay, ..Weather::default() });
    let host = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.only(Family::V4).build()?;
    let edge = lab.host("edge").public("203.0.113.20", "2001:db8::20")?.only(Family::V4).build()?;
    let controller = Controller::start(&lab, &host, &setting.binaries)?;
    let cp = node_behind(setting, &lab, &controller, &host, "cp")?;
    let node = node_behind(setting, &lab, &controller, &edge, "edge")?;
    connected(&cp, &node)?;
    for node in [&cp, &node] {
        ensure!(sends_together(node)?, "{} cannot send datagrams together", node.name());
    }
    let target = cp.overlay_v4()?;
    let noticed = wait_up_to(NOTICE, || {
        // Only a path in use is probed.
        let sent = echoes(edge.namespace(), target, 1, Duration::from_secs(1), Pattern::random()?)?;
        ensure!(sent.received == 1, "a single packet did not arrive");
        let single = [sends_singly(&cp, &node)?, sends_singly(&node, &cp)?];
        Ok((single == [true; 2]).then_some(()))
    })?;
    match noticed {
        None if are_damaged => anyhow::bail!("the damage is not noticed in {NOTICE:?}"),
        Some(()) if !are_damaged => anyhow::bail!("damage is noticed where there is none"),
        _ => {}
    }
    for node in [&cp, &node] {
        ensure!(sends_together(node)?, "{} sends singly to all nodes", node.name());
    }
    let pattern = Pattern::random()?;
    let ways = tcp_both_ways(edge.namespace(), host.namespace(), target, BYTES, pattern, |_| {})?;
    for way in ways {
        ensure!(way.took < LIMIT, "{BYTES} bytes took {:?}", way.took);
    }
    Ok(())
}

/// Returns whether a node can send several datagrams with one system call.
fn sends_together(node: &Node) -> anyhow::Result<bool> {
    let status: Value = serde_json::from_str(&node.command_ok(&["status", "-o", "json"])?)?;
    let features = status.get("features").and_then(Value::as_array).context("no features")?;
    let is_segment =
        |feature: &&Value| feature.get("name").is_some_and(|name| name == "udp_segment");
    let feature = features.iter().find(is_segment).context("no feature `udp_segment`")?;
    feature.get("active").and_then(Value::as_bool).context("the feature has no state")
}

/// Returns whether a node sends each datagram to another by itself.
fn sends_singly(from: &Node, to: &Node) -> anyhow::Result<bool> {
    let peers: Value = serde_json::from_str(&from.command_ok(&["peers", "-o", "json"])?)?;
    let peers = peers.as_array().context("no list of peers")?;
    let peer = peers.iter().find(|peer| peer.get("name").is_some_and(|name| name == to.name()));
    let single = peer.context("the peer is not known")?.get("single_datagrams");
    single.and_then(Value::as_bool).context("the peer has no field `single_datagrams`")
}
