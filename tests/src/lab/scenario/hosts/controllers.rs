//! Meshes whose controller moves to another address after nodes have joined.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::Case;
use crate::lab::interrupt::wait_up_to;
use crate::lab::mesh::Node;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{Pair, Scene, add_address};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("controllers/moved-after-it-was-announced", announced),
        Case::new("controllers/moved-and-configured-by-reload", configured),
    ]
}

/// Address at which the controller is at first.
const OLD: &str = "203.0.113.10:7443";
/// Address to which the controller moves.
const NEW: &str = "203.0.113.20:7443";
/// Limit for an agent to find the controller at its new address.
const FOUND_LIMIT: Duration = Duration::from_secs(40);

/// Builds a mesh, on whose control plane the controller gets another address.
fn mesh(setting: &Setting) -> anyhow::Result<(Scene, Pair)> {
    let scene = Scene::build(setting)?;
    add_address(&scene.cp, "eth0", "203.0.113.20/24")?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    finds(&pair.worker, OLD)?;
    Ok((scene, pair))
}

/// An operator announces the new address before the move.
fn announced(setting: &Setting) -> anyhow::Result<()> {
    let (_scene, mut pair) = mesh(setting)?;
    let list = format!("{OLD},{NEW}");
    pair.controller.operator().command_ok(&["mesh", "set", "--controllers", &list])?;
    for node in [&pair.cp, &pair.worker] {
        stores(node, NEW)?;
    }
    pair.controller.move_to(address(NEW)?)?;
    for node in [&pair.cp, &pair.worker] {
        finds(node, NEW)?;
    }
    // The next start of an agent knows it too.
    pair.worker.restart()?;
    finds(&pair.worker, NEW)
}

/// An operator names the new address in the configuration of a node, and reloads its agent.
fn configured(setting: &Setting) -> anyhow::Result<()> {
    let (_scene, mut pair) = mesh(setting)?;
    pair.controller.move_to(address(NEW)?)?;
    let path = pair.worker.config();
    let text = std::fs::read_to_string(&path)?;
    std::fs::write(&path, format!("{text}\n[controller]\naddresses = [\"{NEW}\"]\n"))?;
    pair.worker.reload()?;
    finds(&pair.worker, NEW)
}

fn address(text: &str) -> anyhow::Result<IpAddr> {
    Ok(text.parse::<std::net::SocketAddr>()?.ip())
}

/// Waits until an agent has taken over a list of controllers that contains this one.
fn stores(node: &Node, controller: &str) -> anyhow::Result<()> {
    let found = wait_up_to(FOUND_LIMIT, || {
        let log = std::fs::read_to_string(node.log())?;
        let is_new = |line: &&str| line.contains("list of controllers changed");
        Ok(log.lines().filter(is_new).any(|line| line.contains(controller)).then_some(()))
    })?;
    found.with_context(|| format!("{} does not take over {controller}", node.name()))
}

/// Waits until an agent is connected to the controller at this address.
fn finds(node: &Node, controller: &str) -> anyhow::Result<()> {
    let mut last = None;
    let found = wait_up_to(FOUND_LIMIT, || {
        let now = node.status()?.controller;
        let is_there = now.connected && now.address.as_deref() == Some(controller);
        last = Some(now);
        Ok(is_there.then_some(()))
    })?;
    ensure!(found.is_some(), "{} does not find {controller}: {last:?}", node.name());
    Ok(())
}
