//! Attack by a member that was removed, on a node that cannot reach the controller: the member, or somebody on
//! the path, blocks the controller there, so that the node does not learn of the removal from it.

use std::time::Duration;

use anyhow::Context;
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily};

use super::records::{NAME, join_as_member, joined};
use super::stage::{Condition, Stage};
use super::{Attacker, Case, Outcome};
use crate::lab::interrupt::wait_up_to;

/// Name of the nftables table on the victim that drops what it sends to the controller.
const WALL: &str = "no-controller";
/// Limit for the victim to get the record of the member, on a slow machine.
const NOTICED: Duration = Duration::from_secs(60);
/// Limit for the victim to notice that its controller does not answer.
const CUT_OFF: Duration = Duration::from_secs(90);
/// Limit for the victim to learn of the removal: it asks the first peer after 30 s without a controller, and another
/// one every 10 s. An answer has a few removals, and those of earlier cases come first.
const LEARNED: Duration = Duration::from_secs(180);

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("removals/controller-blocked", Attacker::Member, Outcome::Refused, blocked)
            .long(),
    ]
}

/// Removes a member while the victim cannot reach the controller. It is refused once the victim, which still has no
/// controller, dropped it.
fn blocked(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    stage.be(Condition::Running)?;
    joined(stage, &[], |stage, token| {
        join_as_member(stage, &token)?;
        let known = wait_up_to(NOTICED, || stage.mesh()?.a.peer(NAME))?;
        known.context("the victim does not know the member")?;
        block(stage)?;
        let outcome = remove_unnoticed(stage);
        let unblocked =
            stage.hosts.a.namespace().run(|| Ok(Nft::open()?.delete(TableFamily::Inet, WALL)?));
        let outcome = outcome?;
        unblocked?;
        let mesh = stage.mesh()?;
        let back = wait_up_to(CUT_OFF, || Ok(mesh.a.status()?.controller.connected.then_some(())))?;
        back.context("the victim does not reach its controller again")?;
        Ok(outcome)
    })
}

/// Removes the member once the victim has no controller.
fn remove_unnoticed(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let mesh = stage.mesh()?;
    let cut_off =
        wait_up_to(CUT_OFF, || Ok((!mesh.a.status()?.controller.connected).then_some(())))?;
    cut_off.context("the victim still has a controller")?;
    mesh.controller().operator().command_ok(&["node", "remove", NAME])?;
    let dropped = wait_up_to(LEARNED, || Ok(mesh.a.peer(NAME)?.is_none().then_some(())))?;
    let is_connected = mesh.a.status()?.controller.connected;
    anyhow::ensure!(!is_connected, "the victim reached its controller");
    Ok(if dropped.is_some() { Outcome::Refused } else { Outcome::Granted })
}

/// Drops all TCP segments of the victim to the host of the controller. The tunnels use UDP.
fn block(stage: &Stage<'_>) -> anyhow::Result<()> {
    let tcp = || Rule::new().protocol(libc::IPPROTO_TCP as u8);
    let rules = stage.hosts.cp.addresses().iter().map(|to| tcp().destination((*to).into()).drop());
    let leave = Chain::base(ChainKind::Filter, Hook::Output, 0).rules(rules);
    stage.hosts.a.namespace().run(|| {
        Nft::open()?.load(&Table::new(TableFamily::Inet, WALL).chain("leave", leave))?;
        Ok(())
    })
}
