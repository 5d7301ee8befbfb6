//! Builds the daemons and finds their binaries.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};

use super::output::line;
use crate::checkout;

/// The build profile of the daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// The dev profile, as in `cargo test`: quick to build.
    Dev,
    /// The release profile, for measurements.
    Release,
    /// The release profile for measurements, also for the lab itself, since a part of it is
    /// measured.
    Bench,
}

/// Paths of the daemons of one checkout.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// Path of `towline`.
    pub towline: PathBuf,
    /// Path of `towline-controller`.
    pub controller: PathBuf,
    /// Path of `lab` in the same profile; set only with [`Profile::Bench`].
    pub lab: Option<PathBuf>,
}

impl Binaries {
    /// Builds the daemons with `$CARGO` (default: `cargo`) and takes their paths from cargo's
    /// messages, since the target directory may be anywhere. On a terminal cargo shows its own
    /// progress.
    pub fn build(profile: Profile) -> anyhow::Result<Self> {
        line(match profile {
            Profile::Dev => "building the daemons",
            Profile::Release | Profile::Bench => "building the daemons (release)",
        });
        Self::build_in(checkout::root(), profile, None)
    }

    /// Builds the daemons of another checkout in release mode, into that checkout's `target`: in a
    /// shared target directory the binaries of both would have the same path.
    pub fn build_of(checkout: &Path) -> anyhow::Result<Self> {
        let checkout = std::fs::canonicalize(checkout)
            .with_context(|| format!("cannot find a checkout at {}", checkout.display()))?;
        if checkout == std::fs::canonicalize(checkout::root())? {
            bail!("{} is this checkout itself: name another one", checkout.display());
        }
        line(&format!("building the daemons of {} (release)", checkout.display()));
        Self::build_in(&checkout, Profile::Release, Some(&checkout.join("target")))
            .with_context(|| format!("in {}", checkout.display()))
    }

    fn build_in(checkout: &Path, profile: Profile, target: Option<&Path>) -> anyhow::Result<Self> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let terminal = std::io::stderr().is_terminal();
        let release = profile != Profile::Dev;
        let mut command = Command::new(&cargo);
        command
            .args(["build", "--message-format=json-render-diagnostics"])
            // The lab's own package is selected, though not built, so that dependencies get the
            // same features as for the lab and are not built twice.
            .args(["-p", "towline-agent", "-p", "towline-controller", "-p", "towline-tests"])
            .args(["--bin", "towline", "--bin", "towline-controller"])
            .current_dir(checkout)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        if release {
            command.arg("--release");
        }
        match target {
            Some(target) => command.arg("--target-dir").arg(target),
            // The helper belongs to the package; another checkout may be too old to have it.
            None => command.args(["-p", "towline-helper", "--bin", "towline-helper"]),
        };
        if profile == Profile::Bench {
            command.args(["--bin", "lab"]);
        }
        if !terminal {
            command.arg("--quiet");
        }
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(of_an_outer_cargo) {
                command.env_remove(name);
            }
        }
        let name = cargo.display();
        let mut child = command.spawn().with_context(|| format!("cannot start `{name} build`"))?;
        let messages = child.stdout.take().ok_or_else(|| anyhow!("cargo has no output"))?;
        let mut found = BTreeMap::new();
        let mut reported = Instant::now();
        let mut units = 0;
        for message in BufReader::new(messages).lines() {
            units += 1;
            if let Some((name, path)) = executable(&message?) {
                found.insert(name, path);
            }
            if !terminal && reported.elapsed() > Duration::from_secs(20) {
                reported = Instant::now();
                line(&format!("still building: {units} units done"));
            }
        }
        if !child.wait()?.success() {
            bail!("cannot build the daemons: see the compiler's errors above");
        }
        let mut take = |name: &str| {
            found.remove(name).ok_or_else(|| anyhow!("cargo built no binary named {name}"))
        };
        let (towline, controller) = (take("towline")?, take("towline-controller")?);
        let lab = if profile == Profile::Bench { Some(take("lab")?) } else { None };
        Ok(Self { towline, controller, lab })
    }

    /// Returns the directory of the binaries, for a shell's `PATH`.
    pub fn directory(&self) -> &Path {
        self.towline.parent().unwrap_or(Path::new("/"))
    }
}

/// Returns whether an environment variable describes the package that an outer `cargo run` or
/// `cargo test` runs. Build scripts read some of these variables and would run again if they
/// changed.
fn of_an_outer_cargo(variable: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_PACKAGE"]
        .iter()
        .any(|prefix| variable.starts_with(prefix))
}

/// Returns name and path of the executable that one of cargo's messages reports, if any.
fn executable(message: &str) -> Option<(String, PathBuf)> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let path = message["executable"].as_str()?;
    Some((message["target"]["name"].as_str()?.to_owned(), path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_in_cargos_messages() {
        let message = r#"{"reason":"compiler-artifact","target":{"name":"towline","kind":["bin"]},
            "executable":"/somewhere/debug/towline"}"#;
        let found = executable(message).unwrap();
        assert_eq!(found, ("towline".to_owned(), PathBuf::from("/somewhere/debug/towline")));
        for other in [
            r#"{"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}"#,
            r#"{"reason":"build-finished","success":true}"#,
            "not json",
        ] {
            assert_eq!(executable(other), None);
        }
    }
}
