//! Faults of one node: its membership, its agent, its controller, its state directory.

use std::fs;
use std::path::Path;

use anyhow::Context as _;

use super::ask::{View, ask};
use super::{Case, Outcome};
use crate::lab::mesh::{Controller, Node};
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{Pair, Scene, settled};
use crate::lab::small_disk::SmallDisk;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "nodes/removed",
            "A node was removed from the mesh",
            "node-removed",
            |setting, case| {
                broken(setting, case, |pair| {
                    pair.controller.operator().command_ok(&["node", "remove", "worker"]).map(drop)
                })
            },
        ),
        Case::new(
            "nodes/unknown-peer",
            "The peer was removed from the mesh",
            "peer-unknown",
            |setting, case| {
                let scene = Scene::build(setting)?;
                let pair = scene.join(setting)?;
                pair.settles()?;
                pair.controller.operator().command_ok(&["node", "remove", "worker"])?;
                ask(case, &[View::new(&pair.cp, "worker")])
            },
        ),
        Case::new(
            "nodes/cloned",
            "A machine has a copy of another machine's state directory",
            "identity-cloned",
            cloned,
        ),
        Case::new(
            "nodes/controller-away",
            "The controller is off",
            "controller-unreachable",
            |setting, case| {
                broken(setting, case, |pair| {
                    drop(pair.controller.take_daemon());
                    Ok(())
                })
            },
        ),
        Case::new(
            "nodes/agent-off",
            "The agent of this machine does not run",
            "agent-not-running",
            |setting, case| {
                broken(setting, case, |pair| {
                    drop(pair.worker.take_agent());
                    Ok(())
                })
            },
        ),
        Case::new(
            "nodes/down",
            "This machine was taken out of the mesh by `towline down`",
            "machine-down",
            |setting, case| {
                broken(setting, case, |pair| pair.worker.command_ok(&["down"]).map(drop))
            },
        ),
        Case::new(
            "nodes/full-disk",
            "The disk of the state directory is full",
            "disk-full",
            |setting, case| on_small_disk(setting, case, |_, disk| disk.fill()),
        ),
        Case::new(
            "nodes/read-only-disk",
            "The disk of the state directory is read-only",
            "disk-read-only",
            |setting, case| {
                on_small_disk(setting, case, |worker, disk| {
                    let agent = worker.take_agent().context("the agent runs")?;
                    agent.stop()?;
                    disk.make_read_only()?;
                    worker.restart().map(drop)
                })
            },
        ),
        Case::new("nodes/no-ipv6", "The machine has no IPv6", "ipv6-disabled", |setting, case| {
            let scene = Scene::build(setting)?;
            for links in ["all", "default"] {
                let name = format!("net.ipv6.conf.{links}.disable_ipv6");
                scene.worker.namespace().sysctl(&name, "1")?;
            }
            let pair = scene.join(setting)?;
            pair.settles()?;
            ask(case, &[View::new(&pair.worker, "cp")])
        })
        .note(),
        Case::new(
            "nodes/offload-off",
            "An offload is disabled in the configuration",
            "offload-switched-off",
            |setting, case| {
                let scene = Scene::build(setting)?;
                let configuration = "[offloads]\nudp_segment = false\n";
                let pair = scene.join_with(setting, ("", &[]), (configuration, &[]))?;
                pair.settles()?;
                ask(case, &[View::new(&pair.worker, "cp")])
            },
        )
        .note(),
    ]
}

/// Breaks something of a pair that is connected.
fn broken(
    setting: &Setting,
    case: &Case,
    change: impl FnOnce(&mut Pair) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    let mut pair = scene.join(setting)?;
    pair.settles()?;
    change(&mut pair)?;
    ask(case, &[View::new(&pair.worker, "cp")])
}

fn cloned(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let mut scene = Scene::build(setting)?;
    let host = scene.lab.host("clone").behind(&scene.router).build()?;
    let pair = scene.join(setting)?;
    pair.settles()?;
    let mut clone = Node::new(&scene.lab, &host, "clone", &setting.binaries, "")?;
    copy(&pair.worker.state(), &clone.state())?;
    clone.restart()?;
    ask(case, &[View::new(&clone, "cp")])
}

/// Copies a directory with all files in it, and with their permissions.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir(to)?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// A worker whose state directory is a file system of its own, of which something is broken.
fn on_small_disk(
    setting: &Setting,
    case: &Case,
    change: impl FnOnce(&mut Node, &SmallDisk<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    let controller = Controller::start(&scene.lab, &scene.cp, &setting.binaries)?;
    let cp = scene.node(setting, &controller, &scene.cp, "cp", ("", &[]))?;
    let mut worker = Node::new(&scene.lab, &scene.worker, "worker", &setting.binaries, "")?;
    fs::create_dir(worker.state())?;
    let disk = match SmallDisk::mount(scene.worker.namespace(), &worker.state()) {
        Ok(disk) => disk,
        Err(error) => return Ok(Outcome::NotShown(format!("{error:#}"))),
    };
    worker.join(&controller.operator().token_with(&[])?)?;
    worker.restart()?;
    settled(&cp, &worker)?;
    change(&mut worker, &disk)?;
    ask(case, &[View::new(&worker, "cp")])
}
