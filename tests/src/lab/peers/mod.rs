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

    /// Takes the program from the cache, or builds it, which may take minutes and needs the
    /// network. The error is one line that says why the program is not available.
    pub fn install(self) -> Result<Installed, String> {
        install::install(self)
    }
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
