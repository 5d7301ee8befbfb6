//! The test cases: each switches machines on, causes a fault or a change, and records the promises
//! that did not hold.
//!
//! A case is a function and an entry of [`CASES`]. It gets two machines that are off, and acts in
//! them only through commands. What a case says of boots is shown by boots; a case that needs a
//! working mesh first gets it from a snapshot ([`Pair::resume`]).

mod boot;
mod faults;
mod kernel;
mod lifecycle;
mod networks;

use std::time::Duration;

use anyhow::ensure;

use super::kernel::{DEFAULT, RELEASES, Release};
use super::machine::{CHANGE_LIMIT, Machine};
use super::pair::{MESH_UP, Pair, Testbed};
use super::witness::Sent;
use crate::lab::interrupt::sleep;
use crate::lab::report::Promises;

/// A test case.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Name of the case, for `--case`.
    pub name: &'static str,
    /// One line that describes the case, for `--list`.
    pub about: &'static str,
    /// Kernels on which `--full` runs the case.
    pub kernels: Kernels,
    /// True if the case runs without flags.
    pub is_quick: bool,
    /// Contents of the machines' disks. The machines are off.
    pub disks: Disks,
    /// Runs the case. Broken promises are recorded; an error means that the case could not
    /// continue.
    pub run: fn(&Testbed<'_>, &mut Pair, &mut Promises) -> anyhow::Result<()>,
}

/// Contents of the machines' disks before a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disks {
    /// Debian without Towline.
    Blank,
    /// A control plane, and a worker that joined its mesh.
    Joined,
}

/// Kernels on which a case runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// Only the default kernel. The text says what the case depends on instead.
    Default(&'static str),
    /// Every kernel in [`RELEASES`].
    All,
}

impl Kernels {
    /// Returns the kernels, oldest first.
    pub fn releases(self) -> Vec<Release> {
        match self {
            Self::Default(_) => vec![DEFAULT],
            Self::All => RELEASES.to_vec(),
        }
    }

    /// Returns what a case depends on that runs on only one kernel.
    pub fn reason(self) -> Option<&'static str> {
        match self {
            Self::Default(reason) => Some(reason),
            Self::All => None,
        }
    }
}

const UNITS: &str = "depends on systemd and the units";
const PACKAGE: &str = "depends on the package's scripts";
const STATE: &str = "depends on what the programs store and do";
const HOST: &str = "depends on the programs that configure the host's network";

/// All cases, in the order in which they run.
pub const CASES: &[Case] = &[
    Case {
        name: "smoke",
        about: "package, join --install of a control plane and a worker, traffic, nothing in clear",
        kernels: Kernels::All,
        is_quick: true,
        disks: Disks::Blank,
        run: lifecycle::smoke,
    },
    Case {
        name: "boot-order",
        about: "no controller and no peer: nothing in clear from the first second of a boot",
        kernels: Kernels::All,
        is_quick: true,
        disks: Disks::Joined,
        run: boot::order,
    },
    Case {
        name: "boot-order-without-nftables",
        about: "no controller and no peer, on a kernel without nftables: nothing in clear",
        kernels: Kernels::All,
        is_quick: true,
        disks: Disks::Joined,
        run: boot::order_without_nftables,
    },
    Case {
        name: "agent-never-starts",
        about: "only the guard, on a kernel without nftables, while networkd starts and restarts",
        kernels: Kernels::Default(HOST),
        is_quick: true,
        disks: Disks::Joined,
        run: boot::agent_never_starts,
    },
    Case {
        name: "ipv6-absent",
        about: "ipv6.disable=1: the IPv4 mesh works, nothing in clear",
        kernels: Kernels::Default(STATE),
        is_quick: true,
        disks: Disks::Joined,
        run: boot::ipv6_absent,
    },
    Case {
        name: "ipv6-disabled",
        about: "disable_ipv6=1: the IPv4 mesh works and no problem is reported, nothing in clear",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: boot::ipv6_disabled,
    },
    Case {
        name: "read-only-root",
        about: "root and /var read-only, as after a disk error: the guard holds",
        kernels: Kernels::Default(STATE),
        is_quick: true,
        disks: Disks::Joined,
        run: boot::read_only_root,
    },
    Case {
        name: "full-disk",
        about: "a full disk: agent and controller start, traffic flows",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::full_disk,
    },
    Case {
        name: "down-up",
        about: "down exits with 0, and lasts over a reboot until up",
        kernels: Kernels::Default(UNITS),
        is_quick: true,
        disks: Disks::Joined,
        run: lifecycle::down_up,
    },
    Case {
        name: "leave",
        about: "leave exits with 0, disables the units, and the next boot is quiet",
        kernels: Kernels::Default(UNITS),
        is_quick: false,
        disks: Disks::Joined,
        run: lifecycle::leave,
    },
    Case {
        name: "reboot",
        about: "an orderly reboot of the worker: the mesh comes back by itself",
        kernels: Kernels::All,
        is_quick: false,
        disks: Disks::Joined,
        run: faults::reboot,
    },
    Case {
        name: "power-cut-worker",
        about: "the worker loses power while it works: the mesh comes back",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::power_cut_worker,
    },
    Case {
        name: "power-cut-control-plane",
        about: "controller and control plane lose power right after a token was created: it survives",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::power_cut_control_plane,
    },
    Case {
        name: "power-cut-etcd",
        about: "etcd and the controller lose power right after tokens were created: they survive",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::power_cut_etcd,
    },
    Case {
        name: "controller-away",
        about: "boot with the controller stopped: both nodes reach each other with the cached map",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::controller_away,
    },
    Case {
        name: "watchdog",
        about: "an agent that hangs is restarted, and nothing leaves in clear in the meantime",
        kernels: Kernels::Default(UNITS),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::watchdog,
    },
    Case {
        name: "hardening",
        about: "systemd-analyze verify and security of the installed units",
        kernels: Kernels::Default(UNITS),
        is_quick: false,
        disks: Disks::Joined,
        run: lifecycle::hardening,
    },
    Case {
        name: "clock-off",
        about: "the worker boots with its clock an hour behind, then an hour ahead",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::clock_off,
    },
    Case {
        name: "control-plane-later",
        about: "the worker boots without the control plane, and needs no restart when that comes up",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::control_plane_later,
    },
    Case {
        name: "shutdown",
        about: "an orderly shutdown: nothing in clear until the end, and no unit has to be killed",
        kernels: Kernels::Default(UNITS),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::shutdown,
    },
    Case {
        name: "read-only-usr",
        about: "a read-only /usr, and a second join --install on it",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::read_only_usr,
    },
    Case {
        name: "networkd-restarts",
        about: "networkd restarts while the mesh works: nothing in clear",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::networkd_restarts,
    },
    Case {
        name: "networkd-restarts-without-nftables",
        about: "networkd restarts while the mesh works, without nftables: nothing in clear",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::networkd_restarts_without_nftables,
    },
    Case {
        name: "kubelet-arguments",
        about: "the kubelet's drop-in keeps the operator's own arguments",
        kernels: Kernels::Default(UNITS),
        is_quick: false,
        disks: Disks::Joined,
        run: lifecycle::kubelet,
    },
    Case {
        name: "reinstall",
        about: "the package is replaced while the mesh works",
        kernels: Kernels::Default(PACKAGE),
        is_quick: false,
        disks: Disks::Joined,
        run: lifecycle::reinstall,
    },
    Case {
        name: "dhcp-lease-changes",
        about: "an address by DHCP, and another lease while the mesh works",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::dhcp_lease_changes,
    },
    Case {
        name: "network-manager",
        about: "NetworkManager configures the network, and restarts",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::network_manager,
    },
    Case {
        name: "netplan",
        about: "netplan configures the network, and applies it again",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::netplan,
    },
    Case {
        name: "bond",
        about: "the uplink is a bond, which goes down and comes up",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::bond,
    },
    Case {
        name: "vlan",
        about: "the uplink is a VLAN",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::vlan,
    },
    Case {
        name: "dummy-and-ipvlan",
        about: "a dummy and an ipvlan link come and go",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::dummy_and_ipvlan,
    },
    Case {
        name: "vrf",
        about: "a VRF with a default route: nothing of the mesh leaves by it in clear",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::vrf,
    },
    Case {
        name: "ufw",
        about: "ufw denies what comes in, is reloaded, and starts at the next boot",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::ufw,
    },
    Case {
        name: "firewalld",
        about: "firewalld starts while the mesh works, and is reloaded",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::firewalld,
    },
    Case {
        name: "docker-rules",
        about: "Docker's rules deny forwarding: the mesh works, nothing in clear",
        kernels: Kernels::Default(HOST),
        is_quick: false,
        disks: Disks::Joined,
        run: networks::docker_rules,
    },
    Case {
        name: "downgrade",
        about: "an older package replaces the newer one, and the newer one that again",
        kernels: Kernels::Default(PACKAGE),
        is_quick: false,
        disks: Disks::Joined,
        run: lifecycle::downgrade,
    },
    Case {
        name: "suspend",
        about: "the worker is suspended for a minute: the mesh comes back",
        kernels: Kernels::Default(STATE),
        is_quick: false,
        disks: Disks::Joined,
        run: faults::suspend,
    },
    Case {
        name: "features",
        about: "the active offloads are those of docs/kernels.md",
        kernels: Kernels::All,
        is_quick: false,
        disks: Disks::Joined,
        run: kernel::features,
    },
    Case {
        name: "tunnels",
        about: "VXLAN and Geneve between mesh addresses",
        kernels: Kernels::All,
        is_quick: false,
        disks: Disks::Joined,
        run: kernel::tunnels,
    },
    Case {
        name: "wireguard-peer",
        about: "the kernel's WireGuard as a static peer of both engines: preshared key, roaming",
        kernels: Kernels::All,
        is_quick: false,
        disks: Disks::Joined,
        run: kernel::wireguard_peer,
    },
];

/// Kernel argument that prevents nftables from being loaded.
const NO_NFTABLES: &str = "modprobe.blacklist=nf_tables";
/// Time for which a machine is watched for clear packets once it is in a state.
const WINDOW: Duration = Duration::from_secs(5);

/// Records whether the worker sent nothing of the mesh in clear since the last reset, and whether
/// the background traffic ran, which would show it.
fn nothing_in_clear(pair: &Pair, when: &str, promises: &mut Promises) {
    nothing_to_mesh_in_clear(pair, when, promises);
    let Sent { misaddressed, samples, .. } = pair.sent();
    promises.hold(misaddressed == 0, || {
        format!(
            "nothing from a mesh address {when}: {misaddressed} packets, {}",
            samples.join(", ")
        )
    });
}

/// Does the same as [`nothing_in_clear`], but lets packets to elsewhere have a mesh address as
/// source: without nftables nothing sees which source the kernel chose.
fn nothing_to_mesh_in_clear(pair: &Pair, when: &str, promises: &mut Promises) {
    let sent = pair.sent();
    promises.hold(sent.clear == 0, || {
        format!("nothing in clear {when}: {} packets, {}", sent.clear, sent.samples.join(", "))
    });
    promises.hold(sent.plain > 0, || format!("the background traffic is seen {when}"));
}

/// Checks that the worker's kernel has no nftables, after a boot with [`NO_NFTABLES`].
fn has_no_nftables(pair: &mut Pair, promises: &mut Promises) -> anyhow::Result<()> {
    let nftables = pair.worker.run("nft list tables")?;
    promises.hold(!nftables.is_success(), || "the kernel has no nftables".to_owned());
    Ok(())
}

/// Switches both machines on ([`Pair::resume`]) and waits until the worker's mesh is up.
fn resume_mesh(bed: &Testbed<'_>, pair: &mut Pair) -> anyhow::Result<()> {
    pair.resume(bed)?;
    holds(&mut pair.worker, MESH_UP, "the mesh comes up")
}

/// Switches both machines on ([`Pair::resume`]), checks that they reach each other, and counts
/// packets from then on.
fn resume_working(bed: &Testbed<'_>, pair: &mut Pair) -> anyhow::Result<()> {
    pair.resume(bed)?;
    pair.ping()?;
    pair.network.reset();
    Ok(())
}

/// Checks that the worker's mesh comes back after what `when` says, and that nothing left in clear.
fn comes_back(pair: &mut Pair, when: &str, promises: &mut Promises) -> anyhow::Result<()> {
    holds(&mut pair.worker, MESH_UP, "the mesh comes back")?;
    pair.ping()?;
    nothing_in_clear(pair, when, promises);
    Ok(())
}

/// Watches the worker for [`WINDOW`], in a state that lasts.
fn watch(pair: &Pair, when: &str, promises: &mut Promises) -> anyhow::Result<()> {
    sleep(WINDOW)?;
    nothing_in_clear(pair, when, promises);
    Ok(())
}

/// Waits until a command in a machine exits with 0.
///
/// # Errors
/// It does not in [`CHANGE_LIMIT`], which ends the case: what follows would wait in vain too.
fn holds(machine: &mut Machine, command: &str, what: &str) -> anyhow::Result<()> {
    let output = machine.run_until_ok(command, CHANGE_LIMIT)?;
    ensure!(output.is_success(), "{what}: `{command}` exits with {output}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_fit_a_command_line() {
        let names: BTreeSet<&str> = CASES.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), CASES.len());
        for name in names {
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || b"-6".contains(&byte)));
        }
    }
}
