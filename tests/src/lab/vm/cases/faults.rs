//! Power cuts, full disks, wrong clocks, and a controller that is down.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;

use crate::lab::report::Promises;
use crate::lab::vm::machine::{CHANGE_LIMIT, Machine};
use crate::lab::vm::pair::{Pair, Testbed};

use super::{
    MESH_UP, NO_NFTABLES, comes_back, has_no_nftables, holds, nothing_in_clear,
    nothing_to_mesh_in_clear, resume_mesh, resume_working,
};

/// Fills the disks of both machines, then boots both.
pub(super) fn full_disk(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    for machine in [&mut pair.cp, &mut pair.worker] {
        // First the space that can be allocated at once, then the last blocks.
        machine.run_ok(
            "fallocate -l $(($(df --output=avail -B1 / | tail -1) - 65536)) /filler; \
             cat /dev/zero >/filler2 2>/dev/null; sync; ! sh -c 'echo x >/var/lib/probe-full'",
        )?;
    }
    pair.shut_down()?;
    pair.network.reset();
    pair.boot()?;
    let full = pair.worker.run("echo x >/var/lib/probe")?;
    promises.hold(!full.is_success(), || "the disk is full".to_owned());
    holds(&mut pair.worker, MESH_UP, "the worker's mesh comes up on a full disk")?;
    let controller = "systemctl is-active towline-controller";
    holds(&mut pair.cp, controller, "the controller runs on a full disk")?;
    pair.ping()?;
    pair.worker.run_ok("systemctl restart towline.service")?;
    holds(&mut pair.worker, MESH_UP, "the agent restarts on a full disk")?;
    nothing_in_clear(pair, "on a full disk", promises);
    Ok(())
}

/// Reboots the worker in order while the control plane runs.
pub(super) fn reboot(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_working(bed, pair)?;
    pair.worker.shut_down()?;
    pair.worker.boot("")?;
    comes_back(pair, "during a reboot", promises)
}

/// Cuts the worker's power while the mesh works, and again during the boot.
pub(super) fn power_cut_worker(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_working(bed, pair)?;
    pair.worker.cut_power()?;
    pair.worker.boot("")?;
    // In the middle of the boot.
    pair.worker.cut_power()?;
    pair.worker.boot("")?;
    comes_back(pair, "during power cuts", promises)
}

/// Cuts the power of the controller's machine right after the controller acknowledged a write.
pub(super) fn power_cut_control_plane(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    pair.ping()?;
    let tokens = "towline-controller token list -o json";
    let token = pair.cp.run_ok("towline-controller token create -o json")?;
    pair.cp.cut_power()?;
    let token: serde_json::Value = serde_json::from_str(&token)?;
    let id = token["id"].as_str().context("the token has no id")?.to_owned();
    pair.cp.boot("")?;
    let listed = pair.cp.run_until_ok(tokens, CHANGE_LIMIT)?;
    promises.hold(listed.is_success() && listed.stdout.contains(&id), || {
        format!("an acknowledged token survives the power cut: {listed}")
    });
    holds(&mut pair.cp, MESH_UP, "the control plane's mesh comes back")?;
    pair.ping()?;
    nothing_in_clear(pair, "while the control plane was off", promises);
    Ok(())
}

/// Number of tokens that are created, and of power cuts.
const CUTS: usize = 3;

/// Moves the mesh into etcd. Cuts the power of its machine each time right after the controller acknowledged a write.
pub(super) fn power_cut_etcd(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    let tokens = "towline-controller token list -o json";
    pair.cp.run_until_ok(tokens, CHANGE_LIMIT)?;
    pair.cp.run_ok_for("systemctl enable --now etcd", CHANGE_LIMIT)?;
    pair.cp.run_ok_for("systemctl stop towline-controller", CHANGE_LIMIT)?;
    pair.cp.run_ok("towline-controller store export /root/mesh.redb")?;
    pair.cp.run_ok(
        "echo 'store = \"etcd://127.0.0.1:2379\"' >>/etc/towline/controller.toml && \
         towline-controller store import /root/mesh.redb && sync",
    )?;
    pair.cp.run_ok_for("systemctl start towline-controller", CHANGE_LIMIT)?;
    let mut ids = Vec::new();
    for _ in 0..CUTS {
        let created =
            pair.cp.run_until_ok("towline-controller token create -o json", CHANGE_LIMIT)?;
        pair.cp.cut_power()?;
        let token: serde_json::Value = serde_json::from_str(&created.stdout)
            .with_context(|| format!("no token: {created}"))?;
        ids.push(token["id"].as_str().context("the token has no id")?.to_owned());
        pair.cp.boot("")?;
        let listed = pair.cp.run_until_ok(tokens, CHANGE_LIMIT)?;
        let is_listed = |id: &String| listed.stdout.contains(id.as_str());
        promises.hold(listed.is_success() && ids.iter().all(is_listed), || {
            format!("what was acknowledged survives a power cut of etcd: {ids:?}: {listed}")
        });
    }
    holds(&mut pair.cp, MESH_UP, "the control plane's mesh comes back")
}

/// Boots the worker while the control plane is off, then the control plane.
pub(super) fn control_plane_later(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.worker.boot("")?;
    holds(&mut pair.worker, "towline status", "the agent answers")?;
    let agent = main_pid(&mut pair.worker)?;
    pair.cp.boot("")?;
    holds(&mut pair.worker, MESH_UP, "the mesh comes up once the control plane is on")?;
    pair.ping()?;
    promises
        .hold(main_pid(&mut pair.worker)? == agent, || "the agent was not restarted".to_owned());
    nothing_in_clear(pair, "while the control plane was off", promises);
    Ok(())
}

/// Shuts the worker down while it sends to the mesh.
pub(super) fn shutdown(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_mesh(bed, pair)?;
    // Stored on the disk, to be read after the shutdown.
    pair.worker.run_ok("mkdir -p /var/log/journal && journalctl --flush")?;
    let begun = pair.worker.run_ok("date +%s")?;
    pair.network.reset();
    pair.worker.shut_down()?;
    nothing_in_clear(pair, "until the machine is off", promises);
    pair.worker.boot("")?;
    let late = pair.worker.run(&format!(
        "journalctl -b -1 --since=@{} --no-pager -o cat | grep -i towline | \
         grep -iE 'timed out|killing|failed'",
        begun.trim()
    ))?;
    promises.hold(late.stdout.trim().is_empty(), || {
        format!("the units stop by themselves: {}", late.stdout.trim())
    });
    Ok(())
}

/// Boots a host whose `/usr` is read-only.
pub(super) fn read_only_usr(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    pair.worker.write("/etc/fstab", "/usr /usr none rbind,ro 0 0\n")?;
    pair.worker.shut_down()?;
    pair.network.reset();
    pair.worker.boot("")?;
    pair.worker.await_boot_end()?;
    let written = pair.worker.run("touch /usr/probe")?;
    promises.hold(!written.is_success(), || "/usr is read-only".to_owned());
    holds(&mut pair.worker, MESH_UP, "the mesh comes up with a read-only /usr")?;
    let again =
        pair.worker.run_for("towline join --install --timeout 60 </dev/null", CHANGE_LIMIT)?;
    promises.hold(again.is_success(), || {
        format!("a second `join --install` works with a read-only /usr: {again}")
    });
    nothing_in_clear(pair, "with a read-only /usr", promises);
    Ok(())
}

/// Restarts networkd, which removes foreign routes and rules when it starts.
pub(super) fn networkd_restarts(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_mesh(bed, pair)?;
    while_networkd_restarts(pair)?;
    nothing_in_clear(pair, "while networkd restarted", promises);
    Ok(())
}

/// Restarts networkd on a kernel without nftables. The agent's datagrams may then have a mesh
/// address as source in the moment in which the uplink has no address: the kernel chooses the
/// source, and no routing rule sees what it chose.
pub(super) fn networkd_restarts_without_nftables(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume_control_plane(bed)?;
    pair.worker.boot(NO_NFTABLES)?;
    holds(&mut pair.worker, MESH_UP, "the mesh comes up")?;
    while_networkd_restarts(pair)?;
    has_no_nftables(pair, promises)?;
    nothing_to_mesh_in_clear(pair, "while networkd restarted", promises);
    Ok(())
}

fn while_networkd_restarts(pair: &mut Pair) -> anyhow::Result<()> {
    for command in ["systemctl restart systemd-networkd", "networkctl reconfigure eth0"] {
        pair.worker.run_ok(command)?;
        pair.ping().with_context(|| format!("after `{command}`"))?;
    }
    Ok(())
}

/// Boots both nodes without the controller.
pub(super) fn controller_away(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.cp.start("systemd.mask=towline-controller.service")?;
    pair.worker.start("")?;
    pair.cp.await_runner()?;
    pair.worker.await_runner()?;
    holds(&mut pair.worker, MESH_UP, "the mesh comes up with the cached map")?;
    pair.ping()?;
    let status = pair.worker.run_ok("towline status -o json")?;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    promises.hold(status["controller"]["connected"] == false, || {
        format!("the status reports that the controller is unreachable: {}", status["controller"])
    });
    nothing_in_clear(pair, "without the controller", promises);
    Ok(())
}

/// Stops the agent's process with SIGSTOP, as if it hung.
pub(super) fn watchdog(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_mesh(bed, pair)?;
    let before = main_pid(&mut pair.worker)?;
    pair.network.reset();
    pair.worker.run_ok("systemctl kill --kill-whom=main --signal=STOP towline.service")?;
    let restarted = pair.worker.run_until_ok(
        &format!("pid=$({MAIN_PID}); test $pid != 0 && test $pid != {before}"),
        CHANGE_LIMIT,
    )?;
    promises
        .hold(restarted.is_success(), || "the watchdog restarts an agent that hangs".to_owned());
    comes_back(pair, "while the agent hung", promises)
}

/// Command that prints the process id of the agent, or 0.
const MAIN_PID: &str = "systemctl show --property=MainPID --value towline.service";

fn main_pid(machine: &mut Machine) -> anyhow::Result<String> {
    let shown = machine.run_ok(MAIN_PID)?;
    Ok(shown.trim().to_owned())
}

/// Time for which the worker is suspended: longer than a peer waits before it gives up a path, and
/// longer than the controller waits for a sign of life.
const SUSPENDED: Duration = Duration::from_secs(60);

/// Suspends the worker from outside, as a hypervisor does. An emulated machine that suspends itself
/// (`/sys/power/state`) is not woken by its clock, so that is not tried.
pub(super) fn suspend(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_working(bed, pair)?;
    pair.worker.pause(SUSPENDED)?;
    comes_back(pair, "while the worker was suspended", promises)
}

/// Boots a worker with a wrong clock, while the control plane's clock is right.
pub(super) fn clock_off(
    _: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.cp.boot("")?;
    let hour = Duration::from_secs(3600);
    let now = SystemTime::now();
    for (when, time) in [("an hour behind", now - hour), ("an hour ahead", now + hour)] {
        pair.network.reset();
        let base = format!("base={}", utc(time)?);
        pair.worker.start_with("", &["-rtc", &base])?;
        pair.worker.await_runner()?;
        let what = format!("the mesh comes up with a clock {when}");
        holds(&mut pair.worker, MESH_UP, &what)?;
        pair.ping().with_context(|| format!("with a clock {when}"))?;
        nothing_in_clear(pair, &format!("with a clock {when}"), promises);
        pair.worker.cut_power()?;
    }
    Ok(())
}

/// Formats a time for QEMU: `2026-11-27T21:00:00`.
fn utc(time: SystemTime) -> anyhow::Result<String> {
    let time = x509_parser::time::ASN1Time::from_timestamp(
        time.duration_since(SystemTime::UNIX_EPOCH)?.as_secs().try_into()?,
    )?;
    let time = time.to_datetime();
    let (date, clock) = (time.date(), time.time());
    Ok(format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
        date.year(),
        u8::from(date.month()),
        date.day(),
        clock.hour(),
        clock.minute(),
        clock.second()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_qemu_reads_it() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        assert_eq!(utc(time).unwrap(), "2023-11-14T22:13:20");
    }
}
