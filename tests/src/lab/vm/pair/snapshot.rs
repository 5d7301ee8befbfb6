//! A pair that was booted, saved while its mesh works, and restored for each case that needs no boot
//! of its own: two seconds instead of a boot of half a minute.
//!
//! ```text
//!   joined disks ── boot with a kernel ── mesh works ── stop both ── save ──► cache
//!                                                                              │
//!   case ◄── set both clocks ◄── both answer ◄── continue both ◄── restore ◄───┘
//! ```
//!
//! Both machines are stopped at one moment and continue at one moment, so their sessions and
//! connections go on. Their clocks are set, as an operator's NTP client does after a pause. What
//! cannot be restored is booted: a snapshot saves time, and decides nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use parking_lot::Mutex;

use super::{JoinedDisks, MESH_UP, PAIR_LIFETIME, Pair, Testbed};
use crate::lab::interrupt::check;
use crate::lab::vm::disk::link;
use crate::lab::vm::machine::{CHANGE_LIMIT, Machine, SavedState, Starts};
use crate::lab::vm::tools::{output_of, tool};

/// Version of the steps that lead to a snapshot and of QEMU's devices, as a part of the cache's key.
/// Increase it when one of them changes.
const RECIPE: &str = "1";

/// A working pair while it ran.
#[derive(Debug)]
struct Snapshot {
    cp: SavedState,
    worker: SavedState,
}

/// Machines of a pair that are restored from their stored state; the case boots the others itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Both,
    ControlPlane,
}

/// The kernels whose snapshot could not be restored in this run.
#[derive(Debug, Default)]
pub struct Unusable {
    kernels: Mutex<BTreeSet<&'static str>>,
}

impl Testbed<'_> {
    /// Returns the saved state of a pair with this kernel.
    fn snapshot(&self, joined: &JoinedDisks) -> anyhow::Result<Snapshot> {
        let name = self.kernel.release.name;
        ensure!(!self.unusable.kernels.lock().contains(name), "an earlier case could not use it");
        let qemu = output_of(tool("qemu-system-x86_64").arg("--version"))?;
        // A state holds what the processor of this host counted.
        let host = fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let kernel = self.kernel.image.display().to_string();
        let arguments = self.accelerator.qemu_arguments().join(" ");
        let machine = Machine::recipe();
        let made_from: [&[u8]; 7] = [
            RECIPE.as_bytes(),
            joined.id.as_bytes(),
            kernel.as_bytes(),
            arguments.as_bytes(),
            machine.as_bytes(),
            &qemu,
            &host,
        ];
        let kind = format!("running-{name}");
        let place = self.cache.entry(&kind, &made_from, Some(PAIR_LIFETIME), |place| {
            self.output.step(&format!("booting a pair with kernel {name}, once for all its cases"));
            // Each is 400 MB, and one of an earlier package is not used again.
            self.cache.clear(&kind)?;
            let mut pair = self.pair(&joined.cp, &joined.worker)?;
            pair.boot()?;
            pair.settle().inspect_err(|_| pair.keep_evidence(self, "running"))?;
            pair.save(place)
        })?;
        Ok(Snapshot {
            cp: SavedState {
                layers: joined.cp.with(place.join("cp")),
                memory: place.join("cp.memory"),
            },
            worker: SavedState {
                layers: joined.worker.with(place.join("worker")),
                memory: place.join("worker.memory"),
            },
        })
    }
}

impl Pair {
    /// Switches both machines on, as they are some time after a boot: with a mesh that works. They
    /// are restored, or booted where that fails.
    pub fn resume(&mut self, bed: &Testbed<'_>) -> anyhow::Result<()> {
        if self.try_restore(bed, Which::Both)? { Ok(()) } else { self.boot() }
    }

    /// Switches on only the control plane, as [`Self::resume`] does. The worker is off, as after a
    /// power cut, to be booted by the case.
    pub fn resume_control_plane(&mut self, bed: &Testbed<'_>) -> anyhow::Result<()> {
        if self.try_restore(bed, Which::ControlPlane)? { Ok(()) } else { self.cp.boot("") }
    }

    /// Returns how often machines of this pair were booted and restored.
    pub fn starts(&self) -> Starts {
        let [cp, worker] = [self.cp.starts(), self.worker.starts()];
        Starts { boots: cp.boots + worker.boots, restores: cp.restores + worker.restores }
    }

    /// Returns why machines were booted that should have been restored.
    pub fn restore_error(&self) -> Option<&str> {
        self.restore_error.as_deref()
    }

    /// Restores machines. If that fails, returns false and leaves both off, with the disks of
    /// machines that were shut down.
    fn try_restore(&mut self, bed: &Testbed<'_>, which: Which) -> anyhow::Result<bool> {
        let joined = bed.joined_disks()?;
        let Err(error) = self.restore(bed, &joined, which) else { return Ok(true) };
        // An interrupt is no fault of the snapshot.
        check()?;
        let name = bed.kernel.release.name;
        let error = format!("cannot restore a running pair with kernel {name}: {error:#}");
        bed.output.note(&format!("{error}: booting it"));
        bed.unusable.kernels.lock().insert(name);
        self.restore_error = Some(error);
        self.cp.replace_disk(&joined.cp)?;
        self.worker.replace_disk(&joined.worker)?;
        Ok(false)
    }

    fn restore(
        &mut self,
        bed: &Testbed<'_>,
        joined: &JoinedDisks,
        which: Which,
    ) -> anyhow::Result<()> {
        let saved = bed.snapshot(joined)?;
        let mut machines = vec![(&mut self.cp, &saved.cp)];
        match which {
            Which::Both => machines.push((&mut self.worker, &saved.worker)),
            Which::ControlPlane => self.worker.replace_disk(&saved.worker.layers)?,
        }
        for (machine, state) in &mut machines {
            machine.start_saved(state)?;
        }
        for (machine, _) in &mut machines {
            machine.await_loaded()?;
        }
        for (machine, _) in &mut machines {
            machine.thaw()?;
        }
        for (machine, _) in &mut machines {
            machine.await_thawed()?;
        }
        Ok(())
    }

    /// Waits until the mesh works in both directions and both machines have ended their boot.
    fn settle(&mut self) -> anyhow::Result<()> {
        for machine in [&mut self.cp, &mut self.worker] {
            let output = machine.run_until_ok(MESH_UP, CHANGE_LIMIT)?;
            ensure!(
                output.is_success(),
                "the mesh of {} does not come up: {output}",
                machine.name()
            );
        }
        self.ping()?;
        for machine in [&mut self.cp, &mut self.worker] {
            machine.await_boot_end()?;
            machine.run_ok("sync")?;
        }
        Ok(())
    }

    /// Writes the state of both machines into a directory, and ends them.
    fn save(&mut self, place: &Path) -> anyhow::Result<()> {
        // One stops right after the other, so neither notices that its peer is silent.
        for machine in [&mut self.cp, &mut self.worker] {
            machine.freeze()?;
        }
        for machine in [&mut self.cp, &mut self.worker] {
            let name = machine.name().to_owned();
            let memory =
                machine.save().with_context(|| format!("cannot save the state of {name}"))?;
            link(&memory, &place.join(format!("{name}.memory")))?;
            link(machine.disk(), &place.join(&name))?;
        }
        Ok(())
    }
}
