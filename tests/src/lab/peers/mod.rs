//! Other WireGuards, in the lab: built once into a cache outside the tree, started in a host,
//! configured over their UAPI socket. No `wg`, no `ip`.
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

/// An implementation that is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WireGuard {
    /// wireguard-go.
    Go,
    /// gotatun-cli.
    Gotatun,
    /// boringtun-cli.
    Boringtun,
}

/// One that can be started.
#[derive(Debug, Clone)]
pub struct Installed {
    /// Which.
    pub which: WireGuard,
    /// The program.
    pub path: PathBuf,
    /// Its version, and where it is from.
    pub version: String,
}

/// One that runs. Dropping it ends it and takes its socket away.
#[derive(Debug)]
pub struct Peer {
    daemon: Daemon,
    link: String,
}

/// One that does not answer after this is broken.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Returns the directory outside the tree for what is built once, and makes it.
pub(in crate::lab) fn cache_directory() -> Result<PathBuf, String> {
    install::cache()
}

impl WireGuard {
    /// All, the fastest first.
    pub const ALL: [Self; 3] = [Self::Go, Self::Gotatun, Self::Boringtun];

    /// As it calls itself.
    pub fn name(self) -> &'static str {
        match self {
            Self::Go => "wireguard-go",
            Self::Gotatun => "gotatun",
            Self::Boringtun => "boringtun",
        }
    }

    /// Takes it from the cache, else builds it, which may take minutes and needs the network. The
    /// error says in one line why it is not to be had.
    pub fn install(self) -> Result<Installed, String> {
        install::install(self)
    }
}

/// A link's name that no other lab on this machine uses: the sockets of all of them lie in one
/// directory.
pub fn link_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("wg{:x}-{number}", nix::unistd::getpid().as_raw())
}

impl Peer {
    /// Starts it inside `host` with a link of this name, and waits until it answers.
    pub fn start(
        program: &Installed,
        host: &Namespace,
        link: &str,
        log: &Path,
    ) -> anyhow::Result<Self> {
        let command = Program::new(&program.path);
        let command = match program.which {
            WireGuard::Go => command.args(["-f", link]),
            // As root it would give up the right to make sockets of its own.
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

    /// It is now this, and has these peers.
    pub fn configure(&mut self, device: &uapi::Device) -> anyhow::Result<()> {
        uapi::set(&self.link, device)
            .with_context(|| format!("{} refused its configuration", self.daemon.name()))
    }

    /// Its link's name.
    pub fn link(&self) -> &str {
        &self.link
    }

    /// The process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails only when it is gone already; the socket of one that was killed stays.
        let _ = self.daemon.kill();
        let _ = std::fs::remove_file(uapi::socket(&self.link));
    }
}
