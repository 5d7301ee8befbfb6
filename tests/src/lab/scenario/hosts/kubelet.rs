//! Machines whose kubelet waits for the mesh, while other machines are off.

use anyhow::ensure;

use super::Case;
use crate::lab::mesh::{Controller, Node};
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::Scene;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("kubelet/starts-while-every-worker-is-off", |setting| alone(setting, true)),
        Case::new("kubelet/starts-alone-after-a-power-cut", |setting| alone(setting, false)),
        Case::new("kubelet/starts-on-the-first-node", first),
    ]
}

/// A control plane that starts again while the only worker is off, and the controller too unless it
/// `serves`.
fn alone(setting: &Setting, serves: bool) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let mut pair = scene.join(setting)?;
    pair.is_connected()?;
    ready(&pair.cp, "the mesh is up")?;
    drop(pair.worker.take_agent());
    if !serves {
        drop(pair.controller.take_daemon());
    }
    pair.cp.restart()?;
    ready(&pair.cp, "no peer is up; worker is")?;
    // A node that is named must be up.
    let output = pair.cp.command(&["wait", "--timeout", "2", "--peer", "worker"])?;
    ensure!(!output.status.success(), "`wait --peer` succeeds without the peer: {output:?}");
    Ok(())
}

/// The first node of a mesh, whose map is the controller's first message.
fn first(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let mut controller = Controller::start(&scene.lab, &scene.cp, &setting.binaries)?;
    let mut cp = scene.node(setting, &controller, &scene.cp, "cp", ("", &[]))?;
    ready(&cp, "the mesh is up")?;
    // The controller may run in the cluster whose kubelet waits here.
    drop(controller.take_daemon());
    cp.restart()?;
    ready(&cp, "the mesh is up")
}

/// Checks that `towline wait` succeeds, and says this.
fn ready(node: &Node, says: &str) -> anyhow::Result<()> {
    let output = node.command(&["wait", "--timeout", "4"])?;
    let is_ready = output.status.success() && output.stderr.contains(says);
    ensure!(is_ready, "`towline wait` of {} does not say `{says}`: {output:?}", node.name());
    Ok(())
}
