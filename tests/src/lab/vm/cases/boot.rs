//! What a machine sends while it boots, on hosts of every kind.

use crate::lab::report::Promises;
use crate::lab::vm::machine::CHANGE_LIMIT;
use crate::lab::vm::pair::{Pair, Testbed, overlay_addresses};

use super::{NO_NFTABLES, has_no_nftables, holds, nothing_in_clear, watch};

const AGENT_ANSWERS: &str = "towline status";
const GUARD_HOLDS: &str = "systemctl is-active towline-guard.service";

/// Boots only the worker: no controller, no peer, no answer from the network.
pub(super) fn order(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    alone(pair, "", promises)
}

/// Does the same as [`order`] on a kernel without nftables, where only the routing guard holds.
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
        has_no_nftables(pair, promises)?;
    }
    holds(&mut pair.worker, GUARD_HOLDS, "the guard is active")?;
    holds(&mut pair.worker, AGENT_ANSWERS, "the agent answers")?;
    watch(pair, "while only the worker boots", promises)?;
    pair.network.reset();
    pair.worker.run_ok("systemctl kill --signal=KILL towline.service")?;
    watch(pair, "after the agent was killed", promises)
}

/// Runs only the guard, without nftables. networkd removes foreign routes and rules when it starts.
pub(super) fn agent_never_starts(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.worker.boot(&format!("{NO_NFTABLES} systemd.mask=towline.service"))?;
    holds(&mut pair.worker, GUARD_HOLDS, "the guard is active")?;
    holds(&mut pair.worker, "networkctl status eth0 | grep -q routable", "eth0 is up")?;
    watch(pair, "with only the guard", promises)?;
    pair.network.reset();
    pair.worker.run_ok("systemctl restart systemd-networkd")?;
    watch(pair, "after networkd was restarted", promises)?;
    pair.network.reset();
    pair.worker.run_ok("networkctl reconfigure eth0")?;
    watch(pair, "after networkd reconfigured the link", promises)
}

/// Boots a kernel without IPv6.
pub(super) fn ipv6_absent(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    ipv4_alone(bed, pair, "ipv6.disable=1", promises)
}

/// Boots a host whose operator disabled IPv6.
pub(super) fn ipv6_disabled(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    ipv4_alone(
        bed,
        pair,
        "sysctl.net.ipv6.conf.all.disable_ipv6=1 sysctl.net.ipv6.conf.default.disable_ipv6=1",
        promises,
    )
}

fn ipv4_alone(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    arguments: &str,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume_control_plane(bed)?;
    pair.worker.boot(arguments)?;
    holds(&mut pair.worker, "towline wait --timeout 40", "the mesh comes up")?;
    let cp = overlay_addresses(&mut pair.cp)?;
    let ping = format!("ping -n -c 3 -i 0.3 -W 5 {}", cp.v4);
    holds(&mut pair.worker, &ping, "IPv4 traffic reaches the control plane")?;
    let status = pair.worker.run_ok("towline status -o json")?;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    let problems = &status["problems"];
    promises.hold(problems.as_array().is_none_or(Vec::is_empty), || {
        format!("a host with only IPv4 reports no problem: {problems}")
    });
    watch(pair, "on a host without IPv6", promises)
}

/// Boots with a read-only root, as after a disk error. The agent need not run; the guard must hold
/// without it.
pub(super) fn read_only_root(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.worker.boot("ro")?;
    let written = pair.worker.run("touch /var/lib/towline/probe")?;
    promises.hold(!written.is_success(), || "the root is read-only".to_owned());
    holds(&mut pair.worker, GUARD_HOLDS, "the guard is active")?;
    holds(&mut pair.worker, "networkctl status eth0 | grep -q routable", "eth0 is up")?;
    watch(pair, "with a read-only root", promises)?;
    // A working mesh would be better: the agent only needs to read the cached map.
    let agent = pair.worker.run_until_ok(AGENT_ANSWERS, CHANGE_LIMIT)?;
    promises.hold(agent.is_success(), || format!("the agent runs on a read-only root: {agent}"));
    nothing_in_clear(pair, "with a read-only root, later", promises);
    Ok(())
}
