//! What a machine says while it boots, on hosts of every kind.

use crate::lab::report::Promises;
use crate::lab::vm::machine::CHANGE_LIMIT;
use crate::lab::vm::pair::{Pair, Testbed, overlay_addresses};

use super::{holds, nothing_in_clear, watch};

/// Keeps the kernel from loading nftables.
const NO_NFTABLES: &str = "modprobe.blacklist=nf_tables";
const AGENT_ANSWERS: &str = "towline status";
const GUARD_HOLDS: &str = "systemctl is-active towline-guard.service";

/// The worker boots alone: no controller, no peer, no answer from anywhere.
pub(super) fn order(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    alone(pair, "", promises)
}

/// As [`order`], with the routing guard alone.
pub(super) fn order_without_nftables(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    alone(pair, NO_NFTABLES, promises)
}

fn alone(pair: &mut Pair, arguments: &str, promises: &mut Promises) -> anyhow::Result<()> {
    pair.worker.boot(arguments)?;
    if !arguments.is_empty() {
        let nftables = pair.worker.run("nft list tables")?;
        promises.hold(!nftables.is_success(), || "the kernel has no nftables".to_owned());
    }
    holds(&mut pair.worker, GUARD_HOLDS, "the guard is active", promises)?;
    holds(&mut pair.worker, AGENT_ANSWERS, "the agent answers", promises)?;
    watch(pair, "while the worker boots alone", promises)?;
    pair.network.reset();
    pair.worker.run_ok("systemctl kill --signal=KILL towline.service")?;
    watch(pair, "after the agent was killed", promises)
}

/// Nothing but the guard, without nftables; networkd removes foreign routes and rules when it starts.
pub(super) fn agent_never_starts(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.worker.boot(&format!("{NO_NFTABLES} systemd.mask=towline.service"))?;
    holds(&mut pair.worker, GUARD_HOLDS, "the guard is active", promises)?;
    holds(&mut pair.worker, "networkctl status eth0 | grep -q routable", "eth0 is up", promises)?;
    watch(pair, "with the guard alone", promises)?;
    pair.network.reset();
    pair.worker.run_ok("systemctl restart systemd-networkd")?;
    watch(pair, "after networkd was restarted", promises)?;
    pair.network.reset();
    pair.worker.run_ok("networkctl reconfigure eth0")?;
    watch(pair, "after networkd configured the link again", promises)
}

/// A kernel without IPv6.
pub(super) fn ipv6_absent(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    ipv4_alone(pair, "ipv6.disable=1", promises)
}

/// A host whose operator switched IPv6 off.
pub(super) fn ipv6_disabled(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    ipv4_alone(
        pair,
        "sysctl.net.ipv6.conf.all.disable_ipv6=1 sysctl.net.ipv6.conf.default.disable_ipv6=1",
        promises,
    )
}

fn ipv4_alone(pair: &mut Pair, arguments: &str, promises: &mut Promises) -> anyhow::Result<()> {
    pair.cp.start("")?;
    pair.worker.start(arguments)?;
    pair.cp.await_runner()?;
    pair.worker.await_runner()?;
    holds(&mut pair.worker, "towline wait --timeout 40", "the mesh comes up", promises)?;
    let cp = overlay_addresses(&mut pair.cp)?;
    let ping = format!("ping -n -c 3 -i 0.3 -W 5 {}", cp.v4);
    holds(&mut pair.worker, &ping, "IPv4 traffic reaches the control plane", promises)?;
    let status = pair.worker.run_ok("towline status -o json")?;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    let problems = &status["problems"];
    promises.hold(problems.as_array().is_none_or(Vec::is_empty), || {
        format!("an IPv4 host has no standing problem: {problems}")
    });
    watch(pair, "on a host without IPv6", promises)
}

/// What a disk error at boot leaves. The agent may not run; the guard must hold without it.
pub(super) fn read_only_root(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.worker.boot("ro")?;
    let written = pair.worker.run("touch /var/lib/towline/probe")?;
    promises.hold(!written.is_success(), || "the root is read-only".to_owned());
    holds(&mut pair.worker, GUARD_HOLDS, "the guard is active", promises)?;
    holds(&mut pair.worker, "networkctl status eth0 | grep -q routable", "eth0 is up", promises)?;
    watch(pair, "with a read-only root", promises)?;
    // A mesh that works would be better still: the cached map needs only to be read.
    let agent = pair.worker.run_until_ok(AGENT_ANSWERS, CHANGE_LIMIT)?;
    promises.hold(agent.is_success(), || format!("the agent runs on a read-only root: {agent}"));
    nothing_in_clear(pair, "with a read-only root, later", promises);
    Ok(())
}
