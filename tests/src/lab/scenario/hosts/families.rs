//! Hosts with one address family, or with IPv6 disabled.

use anyhow::ensure;
use towline_netlink::Family;

use super::Case;
use crate::lab::mesh::Controller;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{Scene, connected, has_no_problem};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("families/ipv6-disabled-on-all-links", |setting| {
            disabled(
                setting,
                &["net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.default.disable_ipv6"],
            )
        }),
        Case::new("families/ipv6-disabled-on-new-links", |setting| {
            disabled(setting, &["net.ipv6.conf.default.disable_ipv6"])
        })
        .long(),
        Case::new("families/ipv6-only", |setting| only(setting, Family::V6)),
        Case::new("families/ipv4-only", |setting| only(setting, Family::V4)),
    ]
}

/// A worker whose kernel refuses IPv6 addresses.
fn disabled(setting: &Setting, settings: &[&str]) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    for name in settings {
        scene.worker.namespace().sysctl(name, "1")?;
    }
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    has_no_problem(&pair.worker)?;
    let status = pair.worker.status()?;
    let is_told = status.notes.iter().any(|note| note.contains("IPv4 only"));
    ensure!(is_told, "no note says that the tunnel carries IPv4 only: {:?}", status.notes);
    Ok(())
}

/// A worker with addresses of one family; the controller listens at both.
fn only(setting: &Setting, family: Family) -> anyhow::Result<()> {
    let mut scene = Scene::build(setting)?;
    let host = scene.lab.host("single").behind(&scene.router).only(family).build()?;
    let controller = Controller::start_on_all(&scene.lab, &scene.cp, &setting.binaries)?;
    let cp = scene.node(setting, &controller, &scene.cp, "cp", ("", &[]))?;
    let single = scene.node(setting, &controller, &host, "single", ("", &[]))?;
    connected(&cp, &single)?;
    has_no_problem(&single)
}
