//! Processes in hosts: daemons that are ended reliably, and commands with a time limit.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

use super::interrupt::wait_for;
use super::namespace::Namespace;

/// Time limit of [`Daemon::stop`]. An agent that does not end by itself within 8 s exits with code
/// 1, which callers check. This limit is longer, so that a slow machine is not reported as a hang.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// A program to run, with its arguments and additional environment variables.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    input: Option<String>,
}

/// The result of a command.
#[derive(Debug, Clone)]
pub struct CommandOutput {
    /// Exit status of the command.
    pub status: ExitStatus,
    /// Standard output of the command.
    pub stdout: String,
    /// Standard error of the command.
    pub stderr: String,
}

/// A running daemon. Dropping it kills the process.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Creates a program without arguments.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), arguments: Vec::new(), environment: Vec::new(), input: None }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Sets the standard input; by default it is empty.
    #[must_use]
    pub fn input(mut self, text: impl Into<String>) -> Self {
        self.input = Some(text.into());
        self
    }

    /// Runs the program inside `namespace` and waits for it, for at most `limit`; then it is
    /// killed. A status other than 0 is not an error.
    pub fn run(&self, namespace: &Namespace, limit: Duration) -> anyhow::Result<CommandOutput> {
        let mut command = self.command();
        command.stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = namespace.spawn(command).with_context(|| format!("cannot start {self}"))?;
        let mut guard = KillOnDrop(child.id());
        if let (Some(mut pipe), Some(text)) = (child.stdin.take(), &self.input) {
            // A command that does not read its input reports the reason by its status.
            let _ = pipe.write_all(text.as_bytes());
        }
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            let stdout = scope.spawn(|| read_all(stdout));
            let stderr = scope.spawn(|| read_all(stderr));
            let ended = wait_for(&format!("end of {self}"), limit, || Ok(child.try_wait()?));
            if ended.is_err() {
                // The readers below end when the process ends.
                let _ = child.kill();
                let _ = child.wait();
            }
            guard.0 = 0;
            let join = |reader: std::thread::ScopedJoinHandle<'_, String>| {
                reader.join().unwrap_or_else(|_| String::new())
            };
            let (stdout, stderr) = (join(stdout), join(stderr));
            Ok(CommandOutput { status: ended?, stdout, stderr })
        })
    }

    /// Runs the program as [`Program::run`] does. A status other than 0 is an error that quotes
    /// stderr.
    pub fn run_ok(&self, namespace: &Namespace, limit: Duration) -> anyhow::Result<String> {
        let output = self.run(namespace, limit)?;
        if !output.status.success() {
            bail!("{self} ended with {}: {}", ending(output.status), output.stderr.trim());
        }
        Ok(output.stdout)
    }

    /// Starts the program inside `namespace` as a daemon whose output is appended to `log`.
    pub fn start(&self, namespace: &Namespace, name: &str, log: &Path) -> anyhow::Result<Daemon> {
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = namespace.spawn(command).with_context(|| format!("cannot start {self}"))?;
        Ok(Daemon { name: name.to_owned(), child, log: log.to_owned() })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        // The SSH session of the lab's user must not be visible to the simulated machines.
        command.env_remove("SSH_CONNECTION").env_remove("SSH_CLIENT");
        command.args(&self.arguments).envs(self.environment.iter().map(|(n, v)| (n, v)));
        command
    }
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}", self.path.file_name().unwrap_or_default().display())?;
        for argument in &self.arguments {
            write!(f, " {}", argument.display())?;
        }
        f.write_str("`")
    }
}

impl Daemon {
    /// Returns the daemon's name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the process id.
    pub fn pid(&self) -> Pid {
        // A process id fits: the kernel's type is signed.
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Returns an error that quotes the end of the log if the daemon is no longer running.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                bail!("{} ended with {}: {}", self.name, ending(status), self.last_words())
            }
        }
    }

    /// Kills the process with SIGKILL and waits for its end.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for the end of the process for at most `limit`, without sending a signal.
    pub fn wait(mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        wait_for(&what, limit, || Ok(self.child.try_wait()?))
    }

    /// Sends SIGTERM and waits for the end. A process that does not end is killed; the error then
    /// shows what its threads waited for.
    pub fn stop(mut self) -> anyhow::Result<ExitStatus> {
        kill(self.pid(), Signal::SIGTERM)?;
        let what = format!("end of {} on SIGTERM", self.name);
        wait_for(&what, STOP_LIMIT, || Ok(self.child.try_wait()?))
            .with_context(|| format!("its threads: {}\n    {}", self.threads(), self.last_words()))
    }

    /// Returns what each thread waits for, to show why the process does not end.
    fn threads(&self) -> String {
        let path = format!("/proc/{}/task", self.child.id());
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let threads = std::fs::read_dir(path).into_iter().flatten().flatten().map(|thread| {
            let about = |name: &str| read(thread.path().join(name)).trim().to_owned();
            // The kernel's stack, if readable: the innermost call first.
            let stack = about("stack").replace('\n', " ");
            format!("{} ({}) {stack}", about("comm"), about("wchan"))
        });
        threads.collect::<Vec<_>>().join("; ")
    }

    /// Returns the last lines of the log.
    pub fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.trim_end().lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n    ")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails only if the process has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns an exit status as text: "status 1" or "signal 9".
pub fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// Returns the resident memory of a process in megabytes (10^6 bytes).
pub fn resident_mb(pid: Pid) -> anyhow::Result<f64> {
    memory_mb(pid, "VmRSS:")
}

/// Returns the peak resident memory of a process so far in megabytes (10^6 bytes).
pub fn peak_resident_mb(pid: Pid) -> anyhow::Result<f64> {
    memory_mb(pid, "VmHWM:")
}

fn memory_mb(pid: Pid, field: &str) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("no {path}"))?;
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"))
        .and_then(|number| number.trim().parse::<f64>().ok());
    match kilobytes {
        Some(kilobytes) => Ok(kilobytes * 1024.0 / 1e6),
        None => bail!("{path} has no resident size"),
    }
}

/// Returns the processor time of a process so far: user and system time of all its threads.
pub fn processor_time(pid: Pid) -> anyhow::Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The second field is a name in parentheses that may contain anything; later fields are counted
    // from its end.
    let (_, fields) = text.rsplit_once(')').ok_or_else(|| anyhow!("cannot parse {path}"))?;
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap_or(0))
        .sum();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// Kills a process while its owner unwinds; a process id of 0 means that the process has ended.
struct KillOnDrop(u32);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if self.0 != 0 {
            let _ = kill(Pid::from_raw(self.0.cast_signed()), Signal::SIGKILL);
        }
    }
}

fn read_all(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // Output before a failure is still worth showing.
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
