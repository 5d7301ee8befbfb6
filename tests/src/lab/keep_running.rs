//! A lab that keeps running after its scenario, and shells inside it.
//!
//! The kept lab writes a note with its process and the threads that hold its namespaces; `lab
//! shell` enters them through `/proc`. The note is next to the lab's binary, so there is at most
//! one kept lab for each checkout. The note is removed with the lab.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::interrupt;
use super::namespace::Namespace;
use super::report::WrongUsage;

/// Error of a shell without a kept lab.
const NO_LAB: &str =
    "no lab is running: start one with `cargo lab demo --keep` or `cargo lab explain --keep`";

/// What a shell needs to know about a kept lab.
#[derive(Debug, Serialize, Deserialize)]
pub struct Kept {
    process: i32,
    /// Start time of the process in ticks since boot, which distinguishes it from a later process
    /// with the same id.
    started: u64,
    binaries: PathBuf,
    places: BTreeMap<String, KeptNamespace>,
}

/// A namespace of a kept lab.
#[derive(Debug, Serialize, Deserialize)]
struct KeptNamespace {
    thread: i32,
    environment: BTreeMap<String, String>,
}

impl Kept {
    /// Creates a note for this process, without namespaces. `binaries` comes first in a shell's
    /// `PATH`.
    pub fn new(binaries: &Path) -> anyhow::Result<Self> {
        let process = nix::unistd::getpid().as_raw();
        Ok(Self {
            process,
            started: started(process).context("this process has no start time")?,
            binaries: binaries.to_owned(),
            places: BTreeMap::new(),
        })
    }

    /// Adds a namespace, with the environment variables for shells in it.
    pub fn add<N: Into<String>, V: Into<String>>(
        &mut self,
        namespace: &Namespace,
        environment: impl IntoIterator<Item = (N, V)>,
    ) {
        self.add_held(namespace.name(), namespace.thread_id(), environment);
    }

    /// Adds the namespace that a thread of this process holds, as [`Self::add`] does.
    pub fn add_held<N: Into<String>, V: Into<String>>(
        &mut self,
        name: &str,
        thread: Pid,
        environment: impl IntoIterator<Item = (N, V)>,
    ) {
        let place = KeptNamespace {
            thread: thread.as_raw(),
            environment: environment.into_iter().map(|(n, v)| (n.into(), v.into())).collect(),
        };
        self.places.insert(name.to_owned(), place);
    }

    /// Publishes the note and waits until Ctrl-C, so that shells can enter.
    pub fn stay(&self) -> anyhow::Result<()> {
        self.stay_while(|| ())
    }

    /// Stays as [`Self::stay`] does, and calls `between` about once per second.
    pub fn stay_while(&self, mut between: impl FnMut()) -> anyhow::Result<()> {
        let note = Note::path()?;
        if let Ok(other) = Self::read(&note)
            && other.alive()
        {
            bail!("another lab is kept running by process {}: end it first", other.process);
        }
        let text = serde_json::to_string_pretty(self)?;
        // Written atomically, since a shell may read it at any moment.
        let draft = note.with_extension("new");
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, &note))
            .with_context(|| format!("cannot write {}", note.display()))?;
        let _note = Note(note);
        while !interrupt::raised() {
            between();
            // Ctrl-C ends the loop.
            let _ = interrupt::sleep(Duration::from_secs(1));
        }
        Ok(())
    }

    /// Returns the lab that this checkout keeps running.
    pub fn find() -> anyhow::Result<Self> {
        match Self::read(&Note::path()?) {
            Ok(kept) if kept.alive() => Ok(kept),
            Ok(_) => bail!(NO_LAB),
            Err(error) if is_missing(&error) => bail!(NO_LAB),
            Err(error) => Err(error),
        }
    }

    /// Replaces this process by `command` (default: the user's shell) inside the namespace of this
    /// name. Returns only on failure. Call it before any thread is started.
    pub fn enter(&self, name: &str, command: &[String]) -> anyhow::Result<Infallible> {
        let Some(place) = self.places.get(name) else {
            let names: Vec<&str> = self.places.keys().map(String::as_str).collect();
            let why = format!("the lab has no node `{name}`: choose one of {}", names.join(", "));
            return Err(WrongUsage(why).into());
        };
        let user = format!("/proc/{}/ns/user", self.process);
        if inode(&user)? != inode("/proc/self/ns/user")? {
            join(&user, CloneFlags::CLONE_NEWUSER)?;
        }
        let net = format!("/proc/{}/task/{}/ns/net", self.process, place.thread);
        join(&net, CloneFlags::CLONE_NEWNET)?;
        self.enter_mounts(place)?;
        let shell = || std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".to_owned());
        let (program, arguments) = match command {
            [] => (shell(), &[][..]),
            [program, arguments @ ..] => (program.clone(), arguments),
        };
        let mut path = self.binaries.clone().into_os_string();
        if let Some(rest) = std::env::var_os("PATH") {
            path.push(":");
            path.push(rest);
        }
        let error = Command::new(&program)
            .args(arguments)
            .env("PATH", &path)
            .env("TOWLINE_LAB_NODE", name)
            .envs(&place.environment)
            .exec();
        Err(error).with_context(|| format!("cannot start {program}"))
    }

    /// Enters the mounts of a namespace, if it has its own ones: a small disk is mounted only there.
    fn enter_mounts(&self, place: &KeptNamespace) -> anyhow::Result<()> {
        let mounts = format!("/proc/{}/task/{}/ns/mnt", self.process, place.thread);
        if inode(&mounts)? == inode(&format!("/proc/{}/ns/mnt", self.process))? {
            return Ok(());
        }
        let directory = std::env::current_dir();
        join(&mounts, CloneFlags::CLONE_NEWNS)?;
        if let Ok(directory) = directory {
            // The kernel moved this process to the root directory. A shell can start there too.
            let _ = std::env::set_current_dir(directory);
        }
        Ok(())
    }

    fn read(note: &Path) -> anyhow::Result<Self> {
        let text =
            fs::read_to_string(note).with_context(|| format!("cannot read {}", note.display()))?;
        serde_json::from_str(&text).with_context(|| {
            format!("cannot parse {}: end the kept lab and start another", note.display())
        })
    }

    fn alive(&self) -> bool {
        started(self.process).is_some_and(|started| started == self.started)
    }
}

/// The file that describes a kept lab. Dropping it removes the file.
struct Note(PathBuf);

impl Note {
    fn path() -> anyhow::Result<PathBuf> {
        let own = std::env::current_exe().context("cannot find the path of this program")?;
        Ok(own.with_file_name("towline-lab-kept.json"))
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Returns when a process started, in ticks since boot, or `None` if there is no such process.
fn started(process: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field is a name in parentheses that may contain anything; later fields are counted
    // from its end.
    text.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn inode(path: &str) -> anyhow::Result<u64> {
    Ok(fs::metadata(path).with_context(|| format!("cannot read {path}"))?.ino())
}

fn join(path: &str, kind: CloneFlags) -> anyhow::Result<()> {
    let namespace = File::open(path).with_context(|| format!("cannot open {path}"))?;
    setns(namespace, kind).with_context(|| format!("cannot enter {path}"))
}

fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::NotFound)
}
