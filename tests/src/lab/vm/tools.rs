//! The host's programs that booted machines need.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use crate::lab::report::Forbidden;

/// Programs, and the Debian package that has each.
const NEEDED: [(&str, &str); 8] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("depmod", "kmod"),
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
];

/// Signs the packages of all Debian suites.
pub(super) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Checks that this machine can build images and boot machines.
///
/// # Errors
/// [`Forbidden`] that names what is missing and the command that installs it.
pub fn check() -> anyhow::Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(Forbidden {
            what: format!(
                "booted machines are x86_64 only, this one is {}",
                std::env::consts::ARCH
            ),
            remedy: "run this on an x86_64 machine".to_owned(),
        }
        .into());
    }
    let mut missing: Vec<&str> = NEEDED
        .into_iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(_, package)| package)
        .collect();
    if !Path::new(KEYRING).exists() {
        missing.push("debian-archive-keyring");
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Forbidden {
        what: format!("booted machines need programs that are not here: {}", missing.join(", ")),
        remedy: format!(
            "install them, such as with `apt-get install --no-install-recommends {}`",
            missing.join(" ")
        ),
    }
    .into())
}

/// Where a program is: in `PATH`, or where Debian keeps those of root.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Prepares a command of one of the needed programs.
pub(super) fn tool(program: &str) -> Command {
    let mut command = Command::new(find(program).unwrap_or_else(|| program.into()));
    command.stdin(Stdio::null());
    command
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// It cannot be started, or ends with another status than 0; then the end of its stderr is quoted.
pub(super) fn output_of(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let name = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("cannot start `{name}`"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.trim_end().lines().collect();
    bail!("`{name}` failed: {}", lines[lines.len().saturating_sub(6)..].join("; "))
}
