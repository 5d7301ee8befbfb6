//! Faults of clocks, and of certificates, which depend on them.

use super::ask::{View, ask};
use super::{Case, Outcome};
use crate::lab::clock::OtherClock;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::Scene;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "clocks/ahead",
            "The clock of a machine is 30 hours ahead",
            "controller-certificate-not-valid",
            |setting, case| wrong(setting, case, 30 * HOUR),
        ),
        Case::new(
            "clocks/behind",
            "The clock of a machine is two days behind",
            "clock-wrong",
            |setting, case| wrong(setting, case, -48 * HOUR),
        ),
        Case::new(
            "clocks/expired-certificate",
            "A machine was off for longer than its certificate is valid, and the controller is away",
            "certificate-expired",
            expired,
        ),
    ]
}

/// Seconds of an hour.
const HOUR: i64 = 3_600;

/// A node that joined at the right time, and whose clock was changed afterwards.
fn wrong(setting: &Setting, case: &Case, offset: i64) -> anyhow::Result<Outcome> {
    let scene = Scene::build(setting)?;
    let clock = match OtherClock::compile(&scene.lab) {
        Ok(clock) => clock,
        Err(why) => return Ok(Outcome::NotShown(why)),
    };
    let mut pair = scene.join(setting)?;
    pair.settles()?;
    clock.show(&mut pair.worker, offset);
    pair.worker.restart()?;
    ask(case, &[View::new(&pair.worker, "cp")])
}

/// Time passes on both nodes, while nobody renews certificates.
fn expired(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    /// Time that passes. Certificates are valid for a day.
    const PASSED: i64 = 30 * HOUR;
    let scene = Scene::build(setting)?;
    let clock = match OtherClock::compile(&scene.lab) {
        Ok(clock) => clock,
        Err(why) => return Ok(Outcome::NotShown(why)),
    };
    let mut pair = scene.join(setting)?;
    pair.settles()?;
    drop(pair.controller.take_daemon());
    for node in [&mut pair.cp, &mut pair.worker] {
        clock.show(node, PASSED);
        node.restart()?;
    }
    ask(case, &[View::new(&pair.worker, "cp")])
}
