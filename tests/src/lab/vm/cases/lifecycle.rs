//! Install, join, down, up and leave.

use crate::lab::interrupt::wait_up_to;
use crate::lab::report::Promises;
use crate::lab::vm::machine::CHANGE_LIMIT;
use crate::lab::vm::pair::{Pair, Testbed, overlay_addresses};

use super::{MESH_UP, comes_back, holds, nothing_in_clear, resume_mesh, watch};

/// Turns two machines without Towline into a mesh.
pub(super) fn smoke(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    bed.output.step("booting two machines, installing the package and joining");
    pair.join(bed)?;
    pair.network.reset();
    bed.output.step("sending traffic between them");
    pair.ping()?;
    nothing_in_clear(pair, "after the join", promises);
    let sent = pair.sent();
    promises.hold(sent.sealed > 0, || "the worker sends WireGuard messages".to_owned());
    pair.worker.run_ok("systemctl kill --signal=KILL towline.service")?;
    holds(&mut pair.worker, MESH_UP, "the agent comes back after kill -9")?;
    pair.ping()?;
    nothing_in_clear(pair, "after kill -9", promises);
    Ok(())
}

/// Runs `towline down`, a reboot and `towline up`.
pub(super) fn down_up(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_mesh(bed, pair)?;
    let down = pair.worker.run("towline down")?;
    promises.hold(down.is_success(), || format!("`towline down` exits with 0: {down}"));
    is_open(pair, "after down", promises)?;
    pair.worker.shut_down()?;
    pair.worker.boot("")?;
    pair.worker.await_boot_end()?;
    is_open(pair, "after down and a reboot", promises)?;
    let up = pair.worker.run("towline up")?;
    promises.hold(up.is_success(), || format!("`towline up` exits with 0: {up}"));
    holds(&mut pair.worker, MESH_UP, "the mesh comes back after `towline up`")?;
    pair.ping()?;
    pair.network.reset();
    watch(pair, "after up", promises)
}

/// Checks that the machine is open: no state that Towline created is in the kernel, and packets to
/// the mesh leave in clear, which also proves that the lab would see them.
fn is_open(pair: &mut Pair, when: &str, promises: &mut Promises) -> anyhow::Result<()> {
    let left = pair.worker.run(
        "ip -o link show towline0; ip rule | grep 2158; ip -6 rule | grep 2158; \
         nft list tables | grep towline",
    )?;
    promises.hold(left.stdout.trim().is_empty(), || {
        format!("no state of Towline is left in the kernel {when}: {}", left.stdout.trim())
    });
    pair.network.reset();
    let seen = wait_up_to(CHANGE_LIMIT, || Ok((pair.sent().clear > 0).then_some(())))?;
    promises.hold(seen.is_some(), || format!("the machine is open {when}"));
    Ok(())
}

/// Runs `towline leave`, then a reboot.
pub(super) fn leave(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_mesh(bed, pair)?;
    let left = pair.worker.run("towline leave")?;
    promises.hold(left.is_success(), || format!("`towline leave` exits with 0: {left}"));
    let nodes = pair.cp.run_ok("towline-controller node list -o json")?;
    promises.hold(!nodes.contains("\"worker\""), || format!("the node was removed: {nodes}"));
    for unit in ["towline.service", "towline-guard.service"] {
        let enabled = pair.worker.run(&format!("systemctl is-enabled {unit}"))?;
        promises.hold(enabled.stdout.trim() == "disabled", || {
            format!("{unit} is disabled after leave: {enabled}")
        });
    }
    is_open(pair, "after leave", promises)?;
    pair.worker.shut_down()?;
    pair.worker.boot("")?;
    let state = pair.worker.await_boot_end()?;
    let failed = pair.worker.run("systemctl list-units --failed --no-legend 'towline*'")?;
    promises.hold(failed.stdout.trim().is_empty(), || {
        format!("no unit of Towline fails after leave ({state}): {}", failed.stdout.trim())
    });
    let lines = pair.worker.run("journalctl -b -u 'towline*' --no-pager -o cat | wc -l")?;
    let count: u32 = lines.stdout.trim().parse().unwrap_or(u32::MAX);
    promises.hold(count < 10, || {
        format!("the units of a machine that left log little: {count} journal lines")
    });
    Ok(())
}

/// Starts a stand-in for the kubelet that takes arguments as kubeadm passes them, with some of the
/// operator's own.
pub(super) fn kubelet(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    pair.worker.write(
        "/etc/systemd/system/kubelet.service",
        "[Service]\nEnvironmentFile=-/etc/default/kubelet\n\
         ExecStart=/bin/sh -c 'echo \"$KUBELET_EXTRA_ARGS\" >/run/kubelet-arguments; exec sleep infinity'\n",
    )?;
    pair.worker.write("/etc/default/kubelet", "KUBELET_EXTRA_ARGS=--max-pods=42 --v=3\n")?;
    pair.worker.run_ok("systemctl daemon-reload")?;
    let address = overlay_addresses(&mut pair.worker)?.v4;
    for start in ["first", "second"] {
        pair.worker.run_ok_for("systemctl restart kubelet", CHANGE_LIMIT)?;
        holds(&mut pair.worker, "test -s /run/kubelet-arguments", "the kubelet runs")?;
        let arguments = pair.worker.run_ok("cat /run/kubelet-arguments")?;
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let node_ip = format!("--node-ip={address}");
        for wanted in ["--max-pods=42", "--v=3", &node_ip] {
            let count = words.iter().filter(|word| **word == wanted).count();
            promises.hold(count == 1, || {
                format!("the kubelet gets {wanted} once at its {start} start: {}", arguments.trim())
            });
        }
        pair.worker.run_ok("rm /run/kubelet-arguments")?;
    }
    Ok(())
}

/// Installs the package again while the mesh works, as an upgrade does.
pub(super) fn reinstall(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_mesh(bed, pair)?;
    pair.worker.run_ok_for(&bed.software.install_command(), CHANGE_LIMIT)?;
    pair.worker.run_ok_for("systemctl restart towline.service", CHANGE_LIMIT)?;
    comes_back(pair, "while the package was replaced", promises)
}

/// Replaces the package by one with a lower version while the mesh works, and that by the first.
/// The programs are the same: what is tested are the package's scripts and the units.
pub(super) fn downgrade(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_mesh(bed, pair)?;
    let older = format!(
        "set -e; cd /var/tmp; {}; dpkg-deb --raw-extract towline.deb older; \
         sed -i 's/^Version: .*/Version: 0.0.1/' older/DEBIAN/control; \
         dpkg-deb -Znone --build older older.deb; dpkg --install older.deb; \
         rm -rf older older.deb towline.deb",
        bed.software.fetch_command("towline.deb")
    );
    let version = "dpkg-query --show --showformat '${Version}' towline";
    pair.worker.run_ok_for(&older, CHANGE_LIMIT)?;
    let shown = pair.worker.run_ok(version)?;
    promises.hold(shown == "0.0.1", || format!("the older package is installed: {shown}"));
    comes_back(pair, "after a downgrade", promises)?;
    pair.worker.run_ok_for(&bed.software.install_command(), CHANGE_LIMIT)?;
    comes_back(pair, "after an upgrade", promises)?;
    pair.worker.shut_down()?;
    pair.worker.boot("")?;
    comes_back(pair, "after a boot with the upgraded package", promises)
}

/// Checks the units with `systemd-analyze`.
pub(super) fn hardening(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    overlay_addresses(&mut pair.cp)?;
    let verified = pair.cp.run(
        "cd /usr/lib/systemd/system && systemd-analyze verify --man=no towline*.service \
         towline*.timer $(ls towline*.socket 2>/dev/null)",
    )?;
    let complaints: Vec<&str> =
        verified.stderr.lines().filter(|line| line.contains("towline")).collect();
    promises.hold(verified.is_success() && complaints.is_empty(), || {
        format!("systemd-analyze verify reports nothing: {}", complaints.join("; "))
    });
    for (unit, limit) in [("towline.service", 2.0), ("towline-controller.service", 1.5)] {
        let shown =
            pair.cp.run(&format!("systemd-analyze security --no-pager {unit} | tail -1"))?;
        let exposure = exposure(&shown.stdout);
        promises.hold(exposure.is_some_and(|exposure| exposure <= limit), || {
            format!("the exposure of {unit} is at most {limit}: {}", shown.stdout.trim())
        });
    }
    Ok(())
}

/// Parses "→ Overall exposure level for towline.service: 1.9 OK :-)".
fn exposure(line: &str) -> Option<f64> {
    line.rsplit_once(": ")?.1.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exposure_is_read() {
        let line = "→ Overall exposure level for towline.service: 1.9 OK :-)\n";
        assert_eq!(exposure(line), Some(1.9));
        assert_eq!(exposure("Failed to get unit"), None);
    }
}
