//! Selects how QEMU runs a machine: with KVM if KVM boots a kernel, otherwise by emulation.
//!
//! The presence of `/dev/kvm` proves nothing: on some hosts, themselves virtual, a guest's kernel
//! hangs in its first second. So a kernel is booted, once for each boot of the host.

use std::fs::{self, File};
use std::process::Stdio;
use std::time::Duration;

use super::cache::Cache;
use super::kernel::Kernel;
use super::tools::tool;
use crate::lab::interrupt::wait_up_to;
use crate::lab::namespace::tie_to_parent;
use crate::lab::output::line;

/// A way to execute a machine's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's processor, with KVM.
    Kvm,
    /// QEMU's emulation (TCG).
    Tcg,
}

/// Time limit of the probe. With KVM a kernel starts its first program within a second.
const PROBE_LIMIT: Duration = Duration::from_secs(15);

/// Board of every machine. It has no controllers that nothing is connected to, for which the kernel
/// would load drivers.
const BOARD: &str = "q35,sata=off,smbus=off";
/// Processor of an emulated machine: everything that QEMU emulates, without what makes a boot
/// slower. With `erms` the kernel copies and clears memory byte by byte; `la57` adds a level to each
/// page table; `smap` and `smep` end the translated code at each copy to or from a program; `svm`
/// loads KVM in the machine.
const EMULATED_PROCESSOR: &str = "max,-erms,-la57,-svm,-smap,-smep";

impl Accelerator {
    /// Returns KVM if it boots this kernel, otherwise TCG.
    pub fn probe(cache: &Cache, kernel: &Kernel) -> anyhow::Result<Self> {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Tcg);
        }
        let boot_id = fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let place = cache.entry("kvm", &[&boot_id, kernel.version.as_bytes()], None, |place| {
            line("testing whether KVM boots a kernel");
            fs::write(place.join("boots"), if boots(kernel)? { "yes" } else { "no" })?;
            Ok(())
        })?;
        let answer = fs::read_to_string(place.join("boots"))?;
        Ok(if answer == "yes" { Self::Kvm } else { Self::Tcg })
    }

    /// Returns the accelerator's name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    pub(super) fn qemu_arguments(self) -> [&'static str; 6] {
        match self {
            Self::Kvm => ["-M", BOARD, "-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-M", BOARD, "-accel", "tcg,thread=single", "-cpu", EMULATED_PROCESSOR],
        }
    }
}

fn boots(kernel: &Kernel) -> anyhow::Result<bool> {
    let console = tempfile::NamedTempFile::new()?;
    let mut command = tool("qemu-system-x86_64");
    command
        .args(Accelerator::Kvm.qemu_arguments())
        .args(["-m", "256", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&kernel.initramfs)
        .args(["-append", "console=ttyS0 panic=-1 lab.probe"])
        .stdin(Stdio::null())
        .stdout(console.reopen()?)
        .stderr(Stdio::null());
    tie_to_parent(&mut command);
    let mut qemu = command.spawn()?;
    let ended = wait_up_to(PROBE_LIMIT, || Ok(qemu.try_wait()?));
    let _ = qemu.kill();
    let _ = qemu.wait();
    ended?;
    Ok(fs::read_to_string(console.path()).unwrap_or_default().contains("lab-probe-done"))
}
