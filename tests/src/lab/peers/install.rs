//! Builds other WireGuard implementations into a cache outside the checkout:
//! `$XDG_CACHE_HOME/towline-lab`, or `~/.cache/towline-lab`. An existing build is used unchanged.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Installed, WireGuard, date_in};
use crate::lab::output::line;

/// A release of an implementation that comes from the Rust registry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Release {
    pub(super) which: WireGuard,
    /// Name of the package.
    package: &'static str,
    /// Name of the program in it.
    program: &'static str,
    /// Version; exact, so that runs stay comparable.
    pub(super) version: &'static str,
    /// Date on which it was published.
    pub(super) date: &'static str,
}

const GOTATUN: Release = Release {
    which: WireGuard::Gotatun,
    package: "gotatun-cli",
    program: "gotatun",
    version: "0.10.2",
    date: "2026-10-20",
};
const BORINGTUN: Release = Release {
    which: WireGuard::Boringtun,
    package: "boringtun-cli",
    program: "boringtun-cli",
    version: "0.7.1",
    date: "2026-05-01",
};
/// Releases whose date is known.
pub(super) const RELEASES: [Release; 2] = [GOTATUN, BORINGTUN];
/// A `go.mod` that pins wireguard-go and its dependencies.
const GO_MODULE: &str = include_str!("../../../peers/wireguard-go/go.mod");
const GO_PACKAGE: &str = "golang.zx2c4.com/wireguard";

pub(super) fn install(which: WireGuard) -> Result<Installed, String> {
    match which {
        WireGuard::Go => wireguard_go(),
        WireGuard::Gotatun => crates_io(GOTATUN),
        WireGuard::Boringtun => crates_io(BORINGTUN),
    }
}

fn wireguard_go() -> Result<Installed, String> {
    let which = WireGuard::Go;
    let pinned = GO_MODULE
        .lines()
        .find_map(|line| line.trim_start_matches("require ").strip_prefix(GO_PACKAGE))
        .map_or("", str::trim);
    let path = cache()?.join(format!("bin/wireguard-go-{pinned}"));
    let installed = Installed { which, path, version: pinned.to_owned(), date: date_in(pinned) };
    if installed.path.exists() {
        return Ok(installed);
    }
    line("building wireguard-go");
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/wireguard-go");
    let built = run(Command::new("go")
        .args(["build", "-trimpath", "-o"])
        .arg(&installed.path)
        .arg(GO_PACKAGE)
        .current_dir(module));
    match built {
        Ok(()) => Ok(installed),
        Err(why) => {
            // The distribution's package is older; the figures name its origin.
            let path = PathBuf::from("/usr/bin/wireguard-go");
            if path.exists() {
                let version = format!("the distribution's, since {why}");
                return Ok(Installed { which, path, version, date: None });
            }
            Err(format!("{why}: install Go, or the package wireguard-go"))
        }
    }
}

/// Builds Tailscale's fork of wireguard-go from Go's module cache. Downloads nothing.
pub(super) fn tailscale() -> Result<Installed, String> {
    let modules = Command::new("go")
        .args(["env", "GOMODCACHE"])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot start `go`: {error}: install Go"))?;
    let modules = PathBuf::from(String::from_utf8_lossy(&modules.stdout).trim());
    let module = newest(&modules.join("github.com/tailscale"), "wireguard-go@").ok_or(
        "its module is not in Go's module cache: run `go install github.com/tailscale/wireguard-go@latest`, or name \
         a program with --peer-binary tailscale=PATH",
    )?;
    let version = module.to_string_lossy().rsplit('@').next().unwrap_or_default().to_owned();
    let path = cache()?.join(format!("bin/tailscale-wireguard-go-{version}"));
    let date = date_in(&version);
    let installed = Installed { which: WireGuard::Go, path, version, date };
    if installed.path.exists() {
        return Ok(installed);
    }
    line("building Tailscale's fork of wireguard-go");
    run(Command::new("go")
        .args(["build", "-trimpath", "-mod=readonly", "-o"])
        .arg(&installed.path)
        .arg(".")
        .current_dir(module)
        .env("GOPROXY", "off"))?;
    Ok(installed)
}

/// Returns the last entry of a directory, by its name, that starts with `prefix`. Names of versions without
/// a tag start with their date, so it is the newest.
fn newest(directory: &Path, prefix: &str) -> Option<PathBuf> {
    let names =
        std::fs::read_dir(directory).ok()?.filter_map(|entry| Some(entry.ok()?.file_name()));
    let names = names.filter(|name| name.to_str().is_some_and(|name| name.starts_with(prefix)));
    names.max().map(|name| directory.join(name))
}

fn crates_io(release: Release) -> Result<Installed, String> {
    let Release { which, package, program, version, date } = release;
    let root = cache()?.join(format!("{package}-{version}"));
    let path = root.join("bin").join(program);
    let (version, date) = (version.to_owned(), Some(date.to_owned()));
    let installed = Installed { which, path, version, date };
    if installed.path.exists() {
        return Ok(installed);
    }
    line(&format!("building {package} {}, once: a few minutes", installed.version));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run(Command::new(cargo)
        .args(["install", "--locked", "--quiet", "--root"])
        .arg(&root)
        .arg(format!("{package}@{}", installed.version))
        // Cargo settings of the checkout must not apply here.
        .current_dir("/")
        .env("CARGO_TARGET_DIR", root.join("target")))?;
    // Only the program is kept.
    let _ = std::fs::remove_dir_all(root.join("target"));
    Ok(installed)
}

pub(super) fn cache() -> Result<PathBuf, String> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let base = variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))
        .ok_or("no cache directory: set XDG_CACHE_HOME or HOME")?;
    let cache = base.join("towline-lab");
    std::fs::create_dir_all(cache.join("bin"))
        .map_err(|error| format!("cannot create {}: {error}", cache.display()))?;
    Ok(cache)
}

/// Runs a command. The error is the last line of its output.
fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().display().to_string();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot start `{name}`: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.trim_end().lines().last().unwrap_or("it printed no error");
    Err(format!("`{name}` failed: {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_of_a_module_is_found() {
        let modules = tempfile::tempdir().unwrap();
        for name in [
            "wireguard-go@v0.0.0-20250716170648-1d0488a3d7da",
            "wireguard-go@v0.0.0-20260801100000-0123456789ab",
            "wireguard-go",
            "wf@v0.0.0-20270101000000-0123456789ab",
        ] {
            std::fs::create_dir(modules.path().join(name)).unwrap();
        }
        let found = newest(modules.path(), "wireguard-go@").unwrap();
        assert!(found.ends_with("wireguard-go@v0.0.0-20260801100000-0123456789ab"));
        assert_eq!(newest(modules.path(), "netstack@"), None);
        assert_eq!(newest(&modules.path().join("absent"), "wireguard-go@"), None);
    }
}
