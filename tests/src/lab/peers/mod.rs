//! Other WireGuard implementations in the lab: built once into a cache outside the checkout,
//! started in a host, and configured over their UAPI socket, without `wg` or `ip`.
//!
//! ```no_run
//! # use towline_tests::lab::{namespace::Namespace, peers::{Peer, WireGuard, link_name, uapi}};
//! # fn one(host: &Namespace, log: &std::path::Path) -> anyhow::Result<()> {
//! let program = WireGuard::Go.install().map_err(anyhow::Error::msg)?;
//! let link = link_name();
//! let mut peer = Peer::start(&program, host, &link, log)?;
//! peer.configure(&uapi::Device { private_key: [1; 32], port: 51820, peers: Vec::new() })?;
//! # Ok(()) }
//! ```

mod install;
pub mod uapi;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Context;

use super::interrupt::wait_for;
use super::namespace::Namespace;
use super::process::{Daemon, Program};

/// A WireGuard implementation other than Towline's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WireGuard {
    /// The program wireguard-go.
    Go,
    /// The program gotatun-cli.
    Gotatun,
    /// The program boringtun-cli.
    Boringtun,
}

/// An implementation that is installed in the cache.
#[derive(Debug, Clone)]
pub struct Installed {
    /// The installed implementation.
    pub which: WireGuard,
    /// Path of the program.
    pub path: PathBuf,
    /// Version of the program, and its origin.
    pub version: String,
    /// Date of the version, as in `2026-05-22`. `None` where it is not known.
    pub date: Option<String>,
}

/// A running implementation. Dropping it kills the process and removes its socket.
#[derive(Debug)]
pub struct Peer {
    daemon: Daemon,
    link: String,
}

/// Time limit for an implementation to answer after its start; one that takes longer is broken.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Creates and returns the cache directory, which is outside the checkout.
pub(in crate::lab) fn cache_directory() -> Result<PathBuf, String> {
    install::cache()
}

impl WireGuard {
    /// All implementations, the fastest first.
    pub const ALL: [Self; 3] = [Self::Go, Self::Gotatun, Self::Boringtun];

    /// Returns the name that the implementation uses for itself.
    pub fn name(self) -> &'static str {
        match self {
            Self::Go => "wireguard-go",
            Self::Gotatun => "gotatun",
            Self::Boringtun => "boringtun",
        }
    }

    /// Returns a program that somebody else built, to be started like this implementation. `version`
    /// is what the program says about itself.
    pub fn given(self, path: &Path, version: String) -> Installed {
        Installed {
            which: self,
            path: path.to_owned(),
            date: date_in(&version).or_else(|| self.date_of(&version)),
            version,
        }
    }

    /// Takes the program from the cache, or builds it, which may take minutes and needs the
    /// network. The error is one line that says why the program is not available.
    pub fn install(self) -> Result<Installed, String> {
        install::install(self)
    }

    /// Returns the date of a version that this lab knows.
    fn date_of(self, version: &str) -> Option<String> {
        let number = version.split_whitespace().next_back()?;
        install::RELEASES
            .into_iter()
            .find(|release| release.which == self && release.version == number)
            .map(|release| release.date.to_owned())
    }
}

/// Returns the date in a version such as `v0.0.0-20260522210424-ecfc5a8d5446` or `0.0.20260522`, as
/// `2026-05-22`. `None` if there is none.
fn date_in(version: &str) -> Option<String> {
    version.split(|c: char| !c.is_ascii_digit()).find_map(|digits| {
        let date = digits.get(..8).filter(|_| [8, 14].contains(&digits.len()))?;
        let (year, rest) = date.split_at(4);
        let (month, day) = rest.split_at(2);
        let is_date = year.starts_with("20") && ("01"..="12").contains(&month);
        (is_date && ("01"..="31").contains(&day)).then(|| format!("{year}-{month}-{day}"))
    })
}

/// Takes Tailscale's fork of wireguard-go from the cache, or builds it if its module is at hand. It is
/// started like wireguard-go. The error is one line that says why it is not available.
pub fn tailscale() -> Result<Installed, String> {
    install::tailscale()
}

/// Returns a link name that no other lab on this machine uses, since the sockets of all links share
/// one directory.
pub fn link_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("wg{:x}-{number}", nix::unistd::getpid().as_raw())
}

impl Peer {
    /// Starts the program inside `host` with a link of this name, and waits until it answers.
    pub fn start(
        program: &Installed,
        host: &Namespace,
        link: &str,
        log: &Path,
    ) -> anyhow::Result<Self> {
        let command = Program::new(&program.path);
        let command = match program.which {
            WireGuard::Go => command.args(["-f", link]),
            // By default it drops root privileges, and then cannot create its sockets.
            WireGuard::Gotatun | WireGuard::Boringtun => {
                command.args(["--foreground", "--disable-drop-privileges", link])
            }
        };
        let daemon = command.start(host, program.which.name(), log)?;
        let mut peer = Self { daemon, link: link.to_owned() };
        let what = format!("answer from {}", program.which.name());
        wait_for(&what, START_LIMIT, || {
            peer.daemon.check()?;
            Ok(uapi::get(&peer.link).ok())
        })?;
        Ok(peer)
    }

    /// Replaces the device's configuration and its peers.
    pub fn configure(&mut self, device: &uapi::Device) -> anyhow::Result<()> {
        uapi::set(&self.link, device)
            .with_context(|| format!("{} refused its configuration", self.daemon.name()))
    }

    /// Returns the link's name.
    pub fn link(&self) -> &str {
        &self.link
    }

    /// Returns the process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails only if the process has already ended. A killed process leaves its socket behind.
        let _ = self.daemon.kill();
        let _ = std::fs::remove_file(uapi::socket(&self.link));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_may_contain_its_date() {
        let date = date_in;
        assert_eq!(date("v0.0.0-20260522210424-ecfc5a8d5446").as_deref(), Some("2026-05-22"));
        assert_eq!(date("wireguard-go v0.0.20250515").as_deref(), Some("2025-05-15"));
        assert_eq!(date("boringtun-cli 0.7.1"), None);
        assert_eq!(date("0.20269922.1"), None, "no month");
        assert_eq!(date("1234567890"), None, "another number");
    }

    #[test]
    fn the_date_of_a_given_program_is_that_of_its_release() {
        let given = |version: &str| WireGuard::Boringtun.given(Path::new("b"), version.to_owned());
        assert!(given("boringtun-cli 0.7.1").date.is_some());
        assert_eq!(given("boringtun-cli 0.0.1").date, None);
    }
}
