//! Builds the daemons and finds their binaries.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};

use super::output::line;
use super::peers::cache_directory;
use super::report::Forbidden;
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

    /// Builds the daemons of a commit of this checkout's history in release mode, once, into the cache of the lab.
    /// An existing build is used unchanged. Neither this checkout nor its repository is changed.
    ///
    /// # Errors
    ///
    /// [`Forbidden`] where the history does not have the commit, as in a shallow clone.
    pub fn build_commit(commit: &str) -> anyhow::Result<Self> {
        let directory =
            cache_directory().map_err(anyhow::Error::msg)?.join(format!("commit-{commit}"));
        let programs = directory.join("bin");
        let built = Self {
            towline: programs.join("towline"),
            controller: programs.join("towline-controller"),
            lab: None,
        };
        if built.towline.exists() && built.controller.exists() {
            return Ok(built);
        }
        require_commit(commit)?;
        let source = directory.join("source");
        // An earlier attempt may have ended in the middle.
        match std::fs::remove_dir_all(&source) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", source.display()));
            }
            _ => {}
        }
        for directory in [&source, &programs] {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("cannot create {}", directory.display()))?;
        }
        let archive = directory.join("source.tar");
        succeed(git().args(["archive", "--format=tar", "--output"]).arg(&archive).arg(commit))?;
        succeed(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&source))?;
        let fresh = Self::build_of(&source)?;
        for (from, to) in [(&fresh.towline, &built.towline), (&fresh.controller, &built.controller)]
        {
            // A program that exists is complete.
            let part = to.with_extension("part");
            std::fs::copy(from, &part)
                .and_then(|_| std::fs::rename(&part, to))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
        // Only the programs are kept.
        let _ = std::fs::remove_dir_all(&source);
        let _ = std::fs::remove_file(&archive);
        Ok(built)
    }

    /// Builds an example of a package in release mode, and returns its path.
    pub fn build_example(package: &str, name: &str) -> anyhow::Result<PathBuf> {
        line(&format!("building the example {name} of {package} (release)"));
        let mut command = build_command(checkout::root());
        // The lab's own package for the same reason as in `build_in`.
        command.args(["-p", package, "-p", "towline-tests", "--example", name, "--release"]);
        take(&mut built(command)?, name)
    }

    fn build_in(checkout: &Path, profile: Profile, target: Option<&Path>) -> anyhow::Result<Self> {
        let mut command = build_command(checkout);
        command
            // The lab's own package is selected, though not built, so that dependencies get the
            // same features as for the lab and are not built twice.
            .args(["-p", "towline-agent", "-p", "towline-controller", "-p", "towline-tests"])
            .args(["--bin", "towline", "--bin", "towline-controller"]);
        if profile != Profile::Dev {
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
        let mut found = built(command)?;
        let (towline, controller) =
            (take(&mut found, "towline")?, take(&mut found, "towline-controller")?);
        let lab = if profile == Profile::Bench { Some(take(&mut found, "lab")?) } else { None };
        Ok(Self { towline, controller, lab })
    }

    /// Returns the directory of the binaries, for a shell's `PATH`.
    pub fn directory(&self) -> &Path {
        self.towline.parent().unwrap_or(Path::new("/"))
    }
}

/// Returns the command `cargo build` in a checkout, whose messages can be read from its output.
fn build_command(checkout: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["build", "--message-format=json-render-diagnostics"])
        .current_dir(checkout)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    command
}

/// Runs a command of [`build_command`], and returns the path of each executable by its name.
fn built(mut command: Command) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let terminal = std::io::stderr().is_terminal();
    if !terminal {
        command.arg("--quiet");
    }
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(of_an_outer_cargo) {
            command.env_remove(name);
        }
    }
    let name = command.get_program().display().to_string();
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
        bail!("cannot build the programs: see the compiler's errors above");
    }
    Ok(found)
}

/// Takes the path of an executable out of what was built.
fn take(found: &mut BTreeMap<String, PathBuf>, name: &str) -> anyhow::Result<PathBuf> {
    found.remove(name).ok_or_else(|| anyhow!("cargo built no binary named {name}"))
}

/// Fails with [`Forbidden`] if the history of this checkout does not have a commit.
pub fn require_commit(commit: &str) -> anyhow::Result<()> {
    let object = format!("{commit}^{{commit}}");
    let status = git()
        .args(["cat-file", "-e", &object])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let why = match status {
        Ok(status) if status.success() => return Ok(()),
        Ok(_) => format!("the history of this checkout has no commit {commit}"),
        Err(error) => format!("cannot start `git`: {error}"),
    };
    let remedy = "use a clone with its history: `git fetch --unshallow`".to_owned();
    Err(Forbidden { what: why, remedy }.into())
}

/// Returns the commit of this checkout, with `-dirty` if its files differ. `None` without git or its
/// repository.
pub fn head() -> Option<String> {
    let output = git().args(["describe", "--always", "--dirty", "--abbrev=12"]).output().ok()?;
    let commit = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !commit.is_empty()).then_some(commit)
}

/// Returns a command of git in this checkout.
fn git() -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(checkout::root());
    command
}

/// Runs a command and fails if it does not succeed.
fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let name = command.get_program().display().to_string();
    let status =
        command.stdin(Stdio::null()).status().with_context(|| format!("cannot start `{name}`"))?;
    if !status.success() {
        bail!("`{name}` failed: see its errors above");
    }
    Ok(())
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
    fn a_commit_that_the_history_lacks_forbids_the_scenario() {
        let error = require_commit(&"0".repeat(40)).unwrap_err();
        assert!(error.downcast_ref::<Forbidden>().is_some(), "{error:#}");
    }

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
