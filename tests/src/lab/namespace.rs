//! A network namespace, held open by a thread inside it.
//!
//! The thread does two things: it keeps the namespace alive, and it starts processes, which
//! therefore start inside and end (`PR_SET_PDEATHSIG`) when the thread ends. Everything else inside
//! runs on short-lived threads ([`Namespace::run`], [`Namespace::thread`]).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

use anyhow::{Context, anyhow};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// Beginning of the name of each thread that holds a namespace.
const HOLDER: &str = "ns-";

/// A network namespace with its loopback up.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
    thread_id: Pid,
    /// Requests to the thread; `None` only while dropping.
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

/// Request to the thread of a namespace.
enum Request {
    /// Starts a process.
    Spawn { command: Command, answer: mpsc::Sender<io::Result<Child>> },
    /// Calls a function.
    Call(Box<dyn FnOnce() + Send>),
}

impl Namespace {
    /// Creates a namespace; `name` is for threads and messages only.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let (requests, inbox) = mpsc::channel();
        let (ready, when_ready) = mpsc::channel();
        let thread = Builder::new().name(format!("{HOLDER}{name}")).spawn(move || {
            let entered = unshare(CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
                .and_then(|()| File::open("/proc/thread-self/ns/net"));
            let failed = entered.is_err();
            if ready.send(entered.map(|file| (file, nix::unistd::gettid()))).is_ok() && !failed {
                hold(&inbox);
            }
        })?;
        let (file, thread_id) = when_ready
            .recv()
            .map_err(|_| anyhow!("the thread of namespace {name} ended"))?
            .with_context(|| format!("cannot create a network namespace for {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            file,
            thread_id,
            requests: Some(requests),
            thread: Some(thread),
        })
    }

    /// Returns the name of the namespace.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the thread inside the namespace: `/proc/PID/task/TID/ns/net` is the namespace's path
    /// for other processes.
    pub fn thread_id(&self) -> Pid {
        self.thread_id
    }

    /// Returns the namespace as a file, for netlink and `setns`.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Runs `job` inside, on its own thread, and waits for it.
    pub fn run<T: Send>(
        &self,
        job: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        std::thread::scope(|scope| join(self.thread(scope, "run", job)?))
    }

    /// Starts `job` inside, on a thread of `scope`. Take its result with [`join`].
    pub fn thread<'scope, 'env, T: Send + 'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, 'env>,
        name: &str,
        job: impl FnOnce() -> anyhow::Result<T> + Send + 'scope,
    ) -> anyhow::Result<ScopedJoinHandle<'scope, anyhow::Result<T>>> {
        let handle = Builder::new().name(format!("{name}-{}", self.name)).spawn_scoped(
            scope,
            move || {
                self.enter()?;
                job()
            },
        )?;
        Ok(handle)
    }

    /// Starts a process inside. It is killed when this namespace is dropped or the lab dies, leads
    /// its own process group (Ctrl-C at a terminal reaches only the lab), and starts with no signal
    /// blocked.
    pub fn spawn(&self, mut command: Command) -> io::Result<Child> {
        tie_to_parent(&mut command);
        let gone = || io::Error::other(format!("the thread of namespace {} ended", self.name));
        let (answer, when_answered) = mpsc::channel();
        let requests = self.requests.as_ref().ok_or_else(gone)?;
        requests.send(Request::Spawn { command, answer }).map_err(|_| gone())?;
        when_answered.recv().map_err(|_| gone())?
    }

    /// Calls `function` on the thread that starts the processes, and waits for it. What it changes of that
    /// thread, such as its mount namespace, applies to all processes that are started later.
    pub fn call<T: Send + 'static>(
        &self,
        function: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let gone = || anyhow!("the thread of namespace {} ended", self.name);
        let (answer, when_answered) = mpsc::channel();
        let call = move || {
            // Nobody waits for the answer if the lab is interrupted.
            let _ = answer.send(function());
        };
        let requests = self.requests.as_ref().ok_or_else(gone)?;
        requests.send(Request::Call(Box::new(call))).map_err(|_| gone())?;
        when_answered.recv().map_err(|_| gone())?
    }

    /// Writes a setting below `/proc/sys` of this namespace, such as `net.ipv4.ip_forward`. Dots
    /// are separators; interface names with a dot are not supported.
    pub fn sysctl(&self, name: &str, value: &str) -> anyhow::Result<()> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        self.run(|| {
            std::fs::write(&path, value).with_context(|| format!("cannot write {value} to {path}"))
        })
    }

    /// Moves the calling thread into the namespace permanently.
    fn enter(&self) -> anyhow::Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter the namespace of {}", self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.requests.take());
        if let Some(thread) = self.thread.take() {
            // The thread only waits for requests; if it panicked, nothing is lost.
            let _ = thread.join();
        }
    }
}

/// Returns the names of all namespaces that this process holds, each with its thread. The kernel keeps 15
/// bytes of a thread's name, so that a namespace with more than 12 has a shortened name here.
pub fn held() -> anyhow::Result<Vec<(String, Pid)>> {
    let mut held = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").context("cannot list the threads")? {
        let task = task?;
        // A thread may end meanwhile.
        let Ok(thread) = std::fs::read_to_string(task.path().join("comm")) else { continue };
        let id = task.file_name().to_str().and_then(|id| id.parse::<i32>().ok());
        if let (Some(name), Some(id)) = (held_by(&thread), id) {
            held.push((name.to_owned(), Pid::from_raw(id)));
        }
    }
    held.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(held)
}

/// Returns the name of the namespace that a thread of this name holds.
fn held_by(thread: &str) -> Option<&str> {
    thread.trim_end().strip_prefix(HOLDER)
}

/// Waits for a thread and returns its result; a panic becomes an error.
pub fn join<T>(handle: ScopedJoinHandle<'_, anyhow::Result<T>>) -> anyhow::Result<T> {
    handle.join().unwrap_or_else(|_| Err(anyhow!("a thread of the lab panicked")))
}

fn hold(inbox: &mpsc::Receiver<Request>) {
    while let Ok(request) = inbox.recv() {
        let (mut command, answer) = match request {
            Request::Spawn { command, answer } => (command, answer),
            Request::Call(function) => {
                function();
                continue;
            }
        };
        let started = command.spawn();
        if let Err(mpsc::SendError(Ok(mut orphan))) = answer.send(started) {
            let _ = orphan.kill();
            let _ = orphan.wait();
        }
    }
}

/// Makes a process end with the thread that starts it, at the latest when the lab dies. The process
/// leads its own process group (Ctrl-C at a terminal reaches only the lab).
pub fn tie_to_parent(command: &mut Command) {
    command.process_group(0);
    // SAFETY: between fork and exec only async-signal-safe calls are made: prctl and getppid are
    // plain system calls.
    unsafe {
        let parent = nix::unistd::getpid();
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The lab may have died before the line above.
            if nix::unistd::getppid() != parent {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_threads_that_hold_a_namespace_have_its_name() {
        assert_eq!(held_by("ns-worker-1\n"), Some("worker-1"));
        for other in ["run-worker-1\n", "lab\n", ""] {
            assert_eq!(held_by(other), None, "{other}");
        }
        let (ready, when_ready) = mpsc::channel();
        let (end, when_ended) = mpsc::channel::<()>();
        let holder = move || {
            // A thread has its name before it runs this.
            ready.send(()).unwrap();
            let _ = when_ended.recv();
        };
        let thread = Builder::new().name(format!("{HOLDER}held-here")).spawn(holder).unwrap();
        when_ready.recv().unwrap();
        assert!(held().unwrap().iter().any(|(name, _)| name == "held-here"));
        drop(end);
        thread.join().unwrap();
    }
}
