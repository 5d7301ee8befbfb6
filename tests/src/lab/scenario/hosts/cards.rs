//! Hosts whose network card damages what it is asked to split.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use towline_netlink::Family;

use super::Case;
use crate::lab::interrupt::wait_up_to;
use crate::lab::mesh::{Controller, Node};
use crate::lab::ping::echoes;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{connected, node_behind};
use crate::lab::topology::Lab;
use crate::lab::traffic::{Pattern, tcp_both_ways};
use crate::lab::wire::{Together, Weather};

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
    let together = if are_damaged { Together::Damaged } else { Together::Whole };
    lab.weather(Weather { together, ..Weather::default() });
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
    let features = node.status()?.features;
    let feature = features.into_iter().find(|feature| feature.name == "udp_segment");
    Ok(feature.context("no feature `udp_segment`")?.active)
}

/// Returns whether a node sends each datagram to another by itself.
fn sends_singly(from: &Node, to: &Node) -> anyhow::Result<bool> {
    Ok(from.peer(to.name())?.context("the peer is not known")?.single_datagrams)
}
