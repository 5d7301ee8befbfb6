//! A machine: a QEMU process, its disk and its console output.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::accelerator::Accelerator;
use super::disk::{Layers, link};
use super::kernel::Kernel;
use super::monitor::{Monitor, RunState};
use super::network::Port;
use super::runner::{Output, Runner};
use super::tools::tool;
use crate::lab::interrupt::{sleep, wait_for};
use crate::lab::namespace::tie_to_parent;
use crate::lab::process::{ending, processor_time};

/// Time limit of a boot. An emulated machine boots in 15 s, but takes many minutes on a host that
/// runs ten others.
pub const BOOT_LIMIT: Duration = Duration::from_secs(900);
/// Limit of QEMU's processor time until the machine accepts commands. Usually it is 5 to 15 s, and on a slow
/// host ten times as much; a machine that used this much hangs.
const BOOT_PROCESSOR_TIME: Duration = Duration::from_secs(400);
/// Time limit of a command that does little.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(180);
/// Time limit of a change of state that needs a few packets or a restart.
pub const CHANGE_LIMIT: Duration = Duration::from_secs(300);
/// Time limit of each step of a restore, which takes two seconds. A machine that does not answer
/// within it is booted instead.
const RESTORE_LIMIT: Duration = Duration::from_secs(60);
/// Environment variable of QEMU with the path of the saved state. QEMU passes it to the shell that
/// copies the state, which thus has no path to quote.
const STATE_VARIABLE: &str = "LAB_STATE";
/// Delays between two attempts of a command that is repeated until it succeeds: short at first, for
/// what is nearly there. An attempt costs an emulated machine a fifth of a second of its processor,
/// which the boot that is waited for needs itself.
const ATTEMPT_DELAYS: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(300),
    Duration::from_millis(600),
    Duration::from_secs(1),
];

const MEMORY_MB: u32 = 384;
/// Kernel command line of every boot. A panic ends QEMU. `no_timer_check` is set because an
/// emulated timer on a busy host may fail the kernel's test of it. The second line leaves out what
/// costs an emulated machine seconds and no case is about: mitigations for the faults of real
/// processors, records of each start of a unit, tests of ciphers, unused serial ports.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 no_timer_check net.ifnames=0 loglevel=4 \
    mitigations=off nokaslr audit=0 apparmor=0 cryptomgr.notests 8250.nr_uarts=1 nowatchdog \
    systemd.show_status=error";

/// A machine, running or off.
#[derive(Debug)]
pub struct Machine {
    name: String,
    /// Directory of the sockets, the disk and the console output.
    directory: PathBuf,
    /// Highest layer of the disk, which the machine writes.
    disk: PathBuf,
    port: Port,
    kernel: Kernel,
    accelerator: Accelerator,
    /// File that the machine sees as its third disk.
    medium: PathBuf,
    running: Option<Running>,
    starts: Starts,
}

#[derive(Debug)]
struct Running {
    qemu: Child,
    /// Command runner; `None` until QEMU has created its socket.
    runner: Option<Runner>,
    /// QEMU's monitor; `None` until it is used.
    monitor: Option<Monitor>,
}

/// Number of times that a machine was switched on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Starts {
    /// Starts with a boot.
    pub boots: u32,
    /// Starts in a saved state.
    pub restores: u32,
}

/// A machine's state while it ran, in files.
#[derive(Debug, Clone)]
pub struct SavedState {
    /// Contents of the disk at that moment.
    pub layers: Layers,
    /// Path of the memory and of the devices' state, as QEMU writes them.
    pub memory: PathBuf,
}

/// The parts of a new machine.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// Host name, also the name of the machine's directory.
    pub name: &'a str,
    /// Directory in which the machine's directory is created.
    pub directory: &'a Path,
    /// Contents of the disk.
    pub layers: &'a Layers,
    /// File that becomes the third disk, read-only.
    pub medium: &'a Path,
    /// Kernel that the machine boots.
    pub kernel: &'a Kernel,
    /// Accelerator that QEMU uses.
    pub accelerator: Accelerator,
}

impl Machine {
    /// Creates a machine that is off, at a port of a network.
    pub fn new(parts: Parts<'_>, port: Port) -> anyhow::Result<Self> {
        let directory = parts.directory.join(parts.name);
        std::fs::create_dir(&directory)?;
        let disk = parts.layers.stack(&directory)?;
        Ok(Self {
            name: parts.name.to_owned(),
            directory,
            disk,
            port,
            kernel: parts.kernel.clone(),
            accelerator: parts.accelerator,
            medium: parts.medium.to_owned(),
            running: None,
            starts: Starts::default(),
        })
    }

    /// Returns the machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the machine's port of the network.
    pub fn port(&self) -> &Port {
        &self.port
    }

    /// Returns the path of the disk's highest layer: what the machine wrote. It is stable only while
    /// the machine is off.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// Returns how often the machine was switched on.
    pub fn starts(&self) -> Starts {
        self.starts
    }

    /// Returns what a saved state depends on, besides the kernel and the accelerator.
    pub fn recipe() -> String {
        format!("{MEMORY_MB} {KERNEL_ARGUMENTS}")
    }

    /// Replaces the disk of a machine, which is switched off without a shutdown if it is on.
    pub fn replace_disk(&mut self, layers: &Layers) -> anyhow::Result<()> {
        self.cut_power()?;
        self.disk = layers.stack(&self.directory)?;
        Ok(())
    }

    /// Switches the machine on. `arguments` are appended to the kernel's command line.
    pub fn start(&mut self, arguments: &str) -> anyhow::Result<()> {
        self.start_with(arguments, &[])
    }

    /// Switches the machine on as [`Self::start`] does, with more arguments for QEMU, such as `-rtc
    /// base=...`.
    pub fn start_with(&mut self, arguments: &str, qemu: &[&str]) -> anyhow::Result<()> {
        self.launch(arguments, qemu)?;
        self.starts.boots += 1;
        Ok(())
    }

    /// Starts QEMU. Whatever changes its devices makes saved states useless, so that the recipe of
    /// the snapshots must change too.
    fn launch(&mut self, arguments: &str, qemu: &[&str]) -> anyhow::Result<()> {
        if self.running.is_some() {
            bail!("{} is already on", self.name);
        }
        let socket = self.socket();
        let _ = std::fs::remove_file(&socket);
        let monitor = self.monitor_path();
        let _ = std::fs::remove_file(&monitor);
        let console = File::options().create(true).append(true).open(self.console_path())?;
        let disk = |id: usize, path: &Path, format: &str| {
            format!("if=virtio,index={id},file={},format={format}", path.display())
        };
        let mut command = tool("qemu-system-x86_64");
        command
            .args(self.accelerator.qemu_arguments())
            .args(["-smp", "1", "-m", &MEMORY_MB.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-serial", "stdio", "-device", "virtio-rng-pci"])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(&self.kernel.initramfs)
            .args(["-append", &format!("{KERNEL_ARGUMENTS} {arguments}")])
            .args(["-drive", &disk(0, &self.disk, "qcow2")])
            .args(["-drive", &disk(1, &self.kernel.modules, "raw,readonly=on")])
            .args(["-drive", &disk(2, &self.medium, "raw,readonly=on")])
            .arg("-chardev")
            .arg(format!("socket,id=run,path={},server=on,wait=off", socket.display()))
            .args(["-device", "virtio-serial-pci"])
            .args(["-device", "virtserialport,chardev=run,name=run"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            // For the shell that writes or reads a saved state.
            .env(STATE_VARIABLE, self.memory_path())
            .args(self.port.qemu_arguments())
            .args(qemu)
            .stdout(console.try_clone()?)
            .stderr(console)
            .stdin(Stdio::null());
        tie_to_parent(&mut command);
        let qemu = command.spawn().context("cannot start QEMU")?;
        self.running = Some(Running { qemu, runner: None, monitor: None });
        Ok(())
    }

    /// Waits until the machine accepts commands, which is early in the boot.
    pub fn await_runner(&mut self) -> anyhow::Result<()> {
        let what = format!("command runner of {}", self.name);
        let booted = wait_for(&what, BOOT_LIMIT, || {
            let socket = self.socket();
            let running = self.running()?;
            if let Some(status) = running.qemu.try_wait()? {
                bail!("QEMU ended with {}", ending(status));
            }
            let pid = Pid::from_raw(running.qemu.id().cast_signed());
            if processor_time(pid)? > BOOT_PROCESSOR_TIME {
                bail!(
                    "the machine hangs: QEMU used {} s of processor time",
                    BOOT_PROCESSOR_TIME.as_secs()
                );
            }
            if running.runner.is_none() {
                // QEMU creates the socket shortly after its start.
                let Ok(stream) = UnixStream::connect(&socket) else { return Ok(None) };
                running.runner = Some(Runner::new(stream)?);
            }
            let ready = running.runner.as_mut().map(Runner::is_ready).transpose()?;
            Ok((ready == Some(true)).then_some(()))
        });
        booted.with_context(|| format!("{} failed to boot: {}", self.name, self.last_words()))
    }

    /// Stops the processor of a running machine, to save its state.
    pub fn freeze(&mut self) -> anyhow::Result<()> {
        self.monitor()?.stop()
    }

    /// Writes the state of a frozen machine to a file, whose path is returned, and ends QEMU. The
    /// machine's disk then belongs to that state.
    pub fn save(&mut self) -> anyhow::Result<PathBuf> {
        let memory = self.memory_path();
        // If this machine was restored, the file belongs to others too.
        let _ = std::fs::remove_file(&memory);
        let monitor = self.monitor()?;
        monitor.save(&format!("cat >\"${STATE_VARIABLE}\""))?;
        monitor.quit()?;
        let what = format!("end of QEMU after the state of {} was saved", self.name);
        wait_for(&what, COMMAND_LIMIT, || Ok(self.running()?.qemu.try_wait()?))?;
        self.running = None;
        Ok(memory)
    }

    /// Switches the machine on in a saved state. Its processor is stopped until [`Self::thaw`].
    pub fn start_saved(&mut self, saved: &SavedState) -> anyhow::Result<()> {
        self.replace_disk(&saved.layers)?;
        link(&saved.memory, &self.memory_path())?;
        self.launch("", &["-incoming", &format!("exec:cat \"${STATE_VARIABLE}\"")])
    }

    /// Waits until QEMU has read the saved state.
    pub fn await_loaded(&mut self) -> anyhow::Result<()> {
        let what = format!("saved state of {}", self.name);
        let loaded = wait_for(&what, RESTORE_LIMIT, || {
            if let Some(status) = self.running()?.qemu.try_wait()? {
                bail!("QEMU ended with {}", ending(status));
            }
            let socket = self.monitor_path();
            let running = self.running()?;
            if running.monitor.is_none() {
                // QEMU creates the socket shortly after its start.
                running.monitor = Monitor::connect(&socket)?;
            }
            let Some(monitor) = &mut running.monitor else { return Ok(None) };
            match monitor.run_state()? {
                RunState::Loading => Ok(None),
                RunState::Stopped => Ok(Some(())),
                RunState::Other => bail!("QEMU is in an unknown state"),
            }
        });
        loaded.with_context(|| format!("cannot restore {}: {}", self.name, self.last_words()))
    }

    /// Lets the processor of a frozen machine continue.
    pub fn thaw(&mut self) -> anyhow::Result<()> {
        self.monitor()?.proceed()
    }

    /// Waits until a thawed machine answers, and sets its clock, which stood still since its state
    /// was saved.
    pub fn await_thawed(&mut self) -> anyhow::Result<()> {
        let stream = UnixStream::connect(self.socket())?;
        self.running()?.runner = Some(Runner::new(stream)?);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        let answer = self.run_ok_for(&format!("date --set=@{now:.3}"), RESTORE_LIMIT);
        answer.with_context(|| format!("{} does not answer after its restore", self.name))?;
        self.starts.restores += 1;
        Ok(())
    }

    fn monitor(&mut self) -> anyhow::Result<&mut Monitor> {
        let socket = self.monitor_path();
        let running = self.running()?;
        if running.monitor.is_none() {
            running.monitor = Monitor::connect(&socket)?;
        }
        running.monitor.as_mut().context("QEMU has no monitor")
    }

    /// Switches the machine on and waits until it accepts commands.
    pub fn boot(&mut self, arguments: &str) -> anyhow::Result<()> {
        self.start(arguments)?;
        self.await_runner()
    }

    /// Waits until systemd has no job left, and returns its state: `running` or `degraded`.
    pub fn await_boot_end(&mut self) -> anyhow::Result<String> {
        // `--wait` would occupy the runner.
        let state = "state=$(systemctl is-system-running); echo $state; \
            test $state = running || test $state = degraded";
        let output = self.run_until_ok(state, BOOT_LIMIT)?;
        if !output.is_success() {
            bail!("{} did not end its boot: {output}", self.name);
        }
        Ok(output.stdout.trim().to_owned())
    }

    /// Runs a bash command in the machine, for at most [`COMMAND_LIMIT`].
    pub fn run(&mut self, command: &str) -> anyhow::Result<Output> {
        self.run_for(command, COMMAND_LIMIT)
    }

    /// Runs a bash command in the machine, which kills it after `limit`.
    pub fn run_for(&mut self, command: &str, limit: Duration) -> anyhow::Result<Output> {
        let name = self.name.clone();
        let runner = self.running()?.runner.as_mut();
        let runner = runner.with_context(|| format!("{name} does not accept commands yet"))?;
        runner.run(command, limit).with_context(|| format!("cannot run a command in {name}"))
    }

    /// Runs a command as [`Self::run`] does. Returns its standard output if it exits with 0.
    pub fn run_ok(&mut self, command: &str) -> anyhow::Result<String> {
        self.run_ok_for(command, COMMAND_LIMIT)
    }

    /// Runs a command as [`Self::run_for`] does. Returns its standard output if it exits with 0.
    pub fn run_ok_for(&mut self, command: &str, limit: Duration) -> anyhow::Result<String> {
        let output = self.run_for(command, limit)?;
        if !output.is_success() {
            bail!("`{command}` on {} exited with {output}", self.name);
        }
        Ok(output.stdout)
    }

    /// Repeats a command until it exits with 0 or `limit` passed, and returns its last output. The
    /// caller must check whether it succeeded.
    pub fn run_until_ok(&mut self, command: &str, limit: Duration) -> anyhow::Result<Output> {
        let deadline = Instant::now() + limit;
        let mut delays = ATTEMPT_DELAYS.into_iter();
        let [.., longest] = ATTEMPT_DELAYS;
        loop {
            let output = self.run(command)?;
            if output.is_success() || Instant::now() >= deadline {
                return Ok(output);
            }
            sleep(delays.next().unwrap_or(longest))?;
        }
    }

    /// Writes a file in the machine, and creates the directories above it.
    pub fn write(&mut self, path: &str, text: &str) -> anyhow::Result<()> {
        let encoded = data_encoding::BASE64.encode(text.as_bytes());
        self.run_ok(&format!("mkdir -p \"$(dirname {path})\" && base64 -d >{path} <<<{encoded}"))
            .map(drop)
    }

    /// Stops the machine's processor for a time, as a hypervisor does that suspends it. The
    /// machine's clocks go on.
    pub fn pause(&mut self, time: Duration) -> anyhow::Result<()> {
        let pid = Pid::from_raw(self.running()?.qemu.id().cast_signed());
        kill(pid, Signal::SIGSTOP)?;
        let slept = sleep(time);
        kill(pid, Signal::SIGCONT)?;
        Ok(slept?)
    }

    /// Cuts the power: data that the machine's kernel had not yet written is lost.
    pub fn cut_power(&mut self) -> anyhow::Result<()> {
        if let Some(mut running) = self.running.take() {
            running.qemu.kill()?;
            running.qemu.wait()?;
        }
        Ok(())
    }

    /// Shuts the machine down in order, waits for its end, and returns how long that took.
    pub fn shut_down(&mut self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        self.run("systemctl poweroff")?;
        let what = format!("shutdown of {}", self.name);
        let ended = wait_for(&what, BOOT_LIMIT, || Ok(self.running()?.qemu.try_wait()?));
        match ended {
            Ok(_) => self.running = None,
            Err(error) => {
                let last = self.last_words();
                self.cut_power()?;
                return Err(error.context(last));
            }
        }
        Ok(begun.elapsed())
    }

    /// Returns the last lines of the console.
    pub fn last_words(&self) -> String {
        let bytes = std::fs::read(self.console_path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.trim_end().lines().map(str::trim_end).collect();
        lines[lines.len().saturating_sub(8)..].join(" | ")
    }

    /// Returns the console output, the journal and the network state, to be read after a case
    /// failed.
    pub fn evidence(&mut self) -> String {
        let console = std::fs::read(self.console_path()).unwrap_or_default();
        let mut text = format!("==> console of {}\n", self.name);
        text.push_str(&String::from_utf8_lossy(&console));
        if self.running.as_ref().is_some_and(|running| running.runner.is_some()) {
            let commands = "towline status; towline peers; ip rule; ip -6 rule; ip route show table \
                all; ip -6 route show table all; nft list ruleset; systemctl --failed; networkctl; \
                journalctl -b --no-pager -n 200";
            match self.run(commands) {
                Ok(Output { stdout, stderr, .. }) => text.push_str(&format!("{stdout}{stderr}")),
                Err(error) => text.push_str(&format!("{error:#}\n")),
            }
        }
        text
    }

    fn running(&mut self) -> anyhow::Result<&mut Running> {
        let name = &self.name;
        self.running.as_mut().with_context(|| format!("{name} is off"))
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("run")
    }

    fn monitor_path(&self) -> PathBuf {
        self.directory.join("monitor")
    }

    /// Returns the path of the saved state that is written or read.
    fn memory_path(&self) -> PathBuf {
        self.directory.join("memory")
    }

    fn console_path(&self) -> PathBuf {
        self.directory.join("console")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Fails only if QEMU has already ended.
        let _ = self.cut_power();
    }
}
