//! Programs of the host that the VM lab needs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use crate::lab::report::Forbidden;

/// Programs, each with the Debian package that contains it.
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

/// Keyring that verifies the packages of all Debian suites.
pub(super) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Checks that this machine can build images and boot machines.
///
/// # Errors
/// [`Forbidden`], which names the missing programs and the command that installs them.
pub fn check() -> anyhow::Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(Forbidden {
            what: format!(
                "the VM lab needs an x86_64 host, this one is {}",
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
        what: format!("the VM lab needs programs that are not installed: {}", missing.join(", ")),
        remedy: format!(
            "install them, such as with `apt-get install --no-install-recommends {}`",
            missing.join(" ")
        ),
    }
    .into())
}

/// Finds a program in `PATH`, or in the directories where Debian has root's programs.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Prepares a command that runs one of the needed programs.
pub(super) fn tool(program: &str) -> Command {
    let mut command = Command::new(find(program).unwrap_or_else(|| program.into()));
    command.stdin(Stdio::null());
    command
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// If the command cannot be started, or exits with another status than 0; then the end of its
/// stderr is quoted.
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
