//! `cargo lab bootstrap`: one command turns a clean machine into a node. After a reboot the node
//! rejoins the mesh while the controller and the API server are down.
//!
//! A machine is a directory tree and a network namespace. The lab acts as its init: it starts the
//! agent once the unit in the tree is enabled.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use towline_netlink::Rtnetlink;

use super::Setting;
use super::hybrid::{Hybrid, NODES};
use crate::cluster::{ClusterCa, kubeconfig};
use crate::lab::interrupt::{sleep, wait_for};
use crate::lab::mesh::{Controller, Node, START_LIMIT, Token};
use crate::lab::namespace::join;
use crate::lab::ping::first_reply;
use crate::lab::privilege::Rank;
use crate::lab::process::{CommandOutput, Daemon, Program};
use crate::lab::report::{Figures, Promises, round};
use crate::lab::topology::Host;

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Bootstrap {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Duration of the command on a clean machine, in seconds: it joins and waits until the mesh is
    /// up.
    pub seconds_to_mesh: Option<f64>,
    /// Duration of the same command when it runs again, in seconds.
    pub again_seconds: Option<f64>,
    /// Time that the second machine had no network, in seconds.
    pub offline_s: f64,
    /// Time from when the network is available until the mesh is up, in seconds.
    pub seconds_to_mesh_after_offline: Option<f64>,
    /// Time in milliseconds from the start of the agent after a reboot to the first echo reply,
    /// while the controller and the API server are down.
    pub rejoined_ms: Option<f64>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Time that the second machine has no network.
const OFFLINE: Duration = Duration::from_secs(30);
/// Limit for a command.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// Limit for a join to bring up the mesh, in seconds.
const SECONDS_TO_MESH: f64 = 10.0;
/// Limit for the first echo reply after a reboot, in milliseconds.
const REJOINED_MS: f64 = 3000.0;

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Bootstrap> {
    let hybrid = Hybrid::build(setting)?;
    let mut figures =
        Bootstrap { rootless: setting.rank == Rank::Rootless, ..Bootstrap::default() };
    figures.failed = Promises::broken_by(|promises| figures.play(setting, &hybrid, promises));
    Ok(figures)
}

/// Machine with nothing installed at first.
pub(super) struct Machine {
    pub(super) name: &'static str,
    pub(super) host: Arc<Host>,
    program: PathBuf,
    pub(super) root: PathBuf,
    log: PathBuf,
    pub(super) agent: Option<Daemon>,
}

/// Returns a command of the program that is installed at `program` in a machine's tree, with the paths of
/// the tree.
pub(super) fn installed(root: &Path, program: &str, arguments: &[&str]) -> Program {
    Program::new(root.join(program))
        .arg("--config")
        .arg(root.join("etc/towline/agent.toml"))
        .arg("--state-dir")
        .arg(root.join("var/lib/towline"))
        .arg("--socket")
        .arg(root.join("run/towline/agent.sock"))
        .args(arguments.iter().copied())
}

/// Returns whether the unit of the agent is enabled in a machine's tree.
pub(super) fn is_enabled(root: &Path) -> bool {
    root.join("etc/systemd/system/multi-user.target.wants/towline.service").is_symlink()
}

/// Output and duration of a run of the command.
pub(super) struct Ran {
    pub(super) output: CommandOutput,
    took: Duration,
}

impl Bootstrap {
    /// Runs the commands on two machines, and a reboot of the first.
    fn play(
        &mut self,
        setting: &Setting,
        hybrid: &Hybrid,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        setting.output.step("starting the controller and the control plane's node");
        let mut controller = Controller::start(&hybrid.lab, &hybrid.cp, &setting.binaries)?;
        let (name, site, configuration) = NODES[0];
        let mut cp = Node::new(&hybrid.lab, &hybrid.cp, name, &setting.binaries, configuration)?;
        cp.join(&controller.operator().token(site)?)?;
        let status = cp.restart()?;
        let cloud = status.overlay_v4().context("cp has no IPv4 mesh address")?;

        let machine = |index, name| Machine::new(setting, hybrid, index, name);
        let mut first = machine(0, "worker-a");
        setting.output.step("running the command on a clean machine");
        let token = controller.operator().token("dc-a")?;
        let ran = first.install(&token, &[])?;
        let seconds = ran.took.as_secs_f64();
        self.seconds_to_mesh = Some(round(seconds));
        let address = ran.output.stdout.trim().parse::<IpAddr>();
        promises.hold(ran.output.status.success() && address.is_ok(), || {
            format!("the command succeeds and prints the node's address: {}", ran.diagnostics())
        });
        promises.hold(seconds < SECONDS_TO_MESH, || {
            format!("the mesh is up within 10 s: {seconds:.1} s")
        });

        setting.output.step("running the command again with the used token");
        let again = first.install(&token, &[])?;
        self.again_seconds = Some(round(again.took.as_secs_f64()));
        promises.hold(
            again.output.status.success() && again.output.stdout == ran.output.stdout,
            || {
                format!(
                    "the second run changes nothing and prints the same address: {}",
                    again.diagnostics()
                )
            },
        );
        promises.hold(!again.output.stderr.contains("wrote "), || {
            format!("the second run writes no file: {}", again.diagnostics())
        });

        let mut second = machine(1, "worker-b");
        setting.output.step("running the command with the used token on another machine");
        let spent = second.install(&token, &[])?;
        let reason = second.failure();
        promises.hold(!spent.output.status.success() && reason.is_some(), || {
            format!(
                "with a used token the command fails and stores the reason: {}",
                spent.diagnostics()
            )
        });
        promises
            .hold(!second.retries(), || "with a used token no timer retries the join".to_owned());

        self.without_network(setting, hybrid, &controller, &mut second, promises)?;
        self.reboot(setting, hybrid, &mut controller, first, cloud, promises)
    }

    /// Checks a machine that boots before its network is available: once with a timeout that is too
    /// short, once with the default timeout.
    fn without_network(
        &mut self,
        setting: &Setting,
        hybrid: &Hybrid,
        controller: &Controller,
        machine: &mut Machine,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        setting.output.step("without network, with a short timeout");
        let token = controller.operator().token("dc-b")?;
        plug(hybrid, machine.name, false)?;
        let gave_up = machine.install(&token, &["--timeout", "3"])?;
        promises.hold(
            !gave_up.output.status.success() && machine.failure().is_some() && machine.retries(),
            || {
                format!(
                    "a failed join stores its reason and enables the retry timer: {}",
                    gave_up.diagnostics()
                )
            },
        );

        setting.output.step(&format!("without network for the first {} s", OFFLINE.as_secs()));
        self.offline_s = OFFLINE.as_secs_f64();
        let ran = std::thread::scope(|scope| {
            let came = scope.spawn(|| {
                sleep(OFFLINE)?;
                plug(hybrid, "worker-b", true)?;
                anyhow::Ok(Instant::now())
            });
            let ran = machine.install(&token, &[]);
            let came = join(came)?;
            anyhow::Ok((ran?, came.elapsed()))
        });
        let (ran, since) = ran?;
        self.seconds_to_mesh_after_offline = Some(round(since.as_secs_f64()));
        promises.hold(ran.output.status.success() && since.as_secs_f64() < SECONDS_TO_MESH, || {
            format!(
                "the mesh is up within 10 s after the network is available: {since:.1?}, {}",
                ran.diagnostics()
            )
        });
        promises.hold(!machine.retries() && machine.failure().is_none(), || {
            "a successful join removes the stored reason and the retry timer".to_owned()
        });
        machine.agent = None;
        Ok(())
    }

    /// Checks that a node rejoins after a reboot: its programs, link and routes are gone, and the
    /// controller and the API server are down.
    fn reboot(
        &mut self,
        setting: &Setting,
        hybrid: &Hybrid,
        controller: &mut Controller,
        mut machine: Machine,
        cloud: IpAddr,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        setting.output.step("rebooting while the controller and the API server are down");
        machine.enrol(hybrid.lab.directory())?;
        machine.agent = None;
        // A reboot removes the link, routes, rules and nftables tables.
        machine.towline(&["down"]).run_ok(machine.host.namespace(), COMMAND_LIMIT)?;
        // The machine was not down before its reboot.
        std::fs::remove_file(machine.root.join("var/lib/towline/down"))
            .context("cannot remove the marker file of `towline down`")?;
        std::fs::remove_dir_all(machine.root.join("run")).context("cannot empty /run")?;
        drop(controller.take_daemon());
        let begun = Instant::now();
        machine.boot()?;
        let deadline = begun + START_LIMIT;
        let reply = first_reply(machine.host.namespace(), cloud, "towline0", deadline)?;
        let rejoined = reply.map(|at| at.saturating_duration_since(begun).as_secs_f64() * 1e3);
        self.rejoined_ms = rejoined.map(round);
        promises.hold(rejoined.is_some_and(|rejoined| rejoined < REJOINED_MS), || {
            format!("the node rejoins within 3 s after a reboot: {rejoined:?} ms")
        });
        Ok(())
    }
}

impl Machine {
    /// Returns the worker with this index, with nothing installed.
    pub(super) fn new(
        setting: &Setting,
        hybrid: &Hybrid,
        index: usize,
        name: &'static str,
    ) -> Self {
        Self {
            name,
            host: Arc::clone(&hybrid.workers[index]),
            program: setting.binaries.towline.clone(),
            root: hybrid.lab.directory().join(format!("{name}-root")),
            log: hybrid.lab.directory().join(format!("{name}.log")),
            agent: None,
        }
    }

    /// Runs the install command, and acts as init while it runs.
    pub(super) fn install(&mut self, token: &Token, flags: &[&str]) -> anyhow::Result<Ran> {
        std::fs::create_dir_all(self.root.join("root"))?;
        let file = self.root.join("root/token");
        std::fs::write(&file, &token.token).context("cannot write the token")?;
        let command = Program::new(&self.program)
            .args(["join", "--install", "--name", self.name, "--root"])
            .arg(&self.root)
            .arg("--token-file")
            .arg(&file)
            .args(flags.iter().copied());
        let host = Arc::clone(&self.host);
        std::thread::scope(|scope| {
            let begun = Instant::now();
            let command = scope.spawn(move || {
                let output = command.run(host.namespace(), COMMAND_LIMIT)?;
                anyhow::Ok(Ran { output, took: begun.elapsed() })
            });
            let wait = wait_for("end of the command", COMMAND_LIMIT, || {
                Ok((self.is_enabled() || command.is_finished()).then_some(()))
            });
            if wait.is_ok() && self.is_enabled() && self.agent.is_none() {
                self.boot()?;
            }
            let ran = join(command)?;
            wait.map(|()| ran)
        })
    }

    /// Starts the agent, as init does.
    pub(super) fn boot(&mut self) -> anyhow::Result<()> {
        let agent = self.towline(&["agent"]);
        self.agent = Some(agent.start(self.host.namespace(), self.name, &self.log)?);
        Ok(())
    }

    /// Returns a command of the installed program, with the paths of the machine's tree.
    pub(super) fn towline(&self, arguments: &[&str]) -> Program {
        installed(&self.root, "usr/bin/towline", arguments)
    }

    /// Returns the stored reason of the last failed join.
    fn failure(&self) -> Option<String> {
        std::fs::read_to_string(self.root.join("var/lib/towline/join-failure")).ok()
    }

    /// Returns whether the timer that retries a join is enabled.
    fn retries(&self) -> bool {
        self.root.join("etc/systemd/system/timers.target.wants/towline-join.timer").is_symlink()
    }

    /// Returns whether the unit of the agent is enabled.
    pub(super) fn is_enabled(&self) -> bool {
        is_enabled(&self.root)
    }

    /// Configures kubelet credentials for an API server that does not answer.
    fn enrol(&self, directory: &Path) -> anyhow::Result<()> {
        let ca = ClusterCa::new("lab")?;
        let [ca_file, credentials, config] =
            ["api-ca.crt", "kubelet.pem", "kubelet.conf"].map(|name| directory.join(name));
        std::fs::write(&ca_file, ca.pem())?;
        std::fs::write(&credentials, ca.issue_node(self.name)?.both())?;
        std::fs::write(&config, kubeconfig("https://203.0.113.99:6443", &ca_file, &credentials))?;
        let path = self.root.join("etc/towline/agent.toml");
        let text = std::fs::read_to_string(&path)?;
        std::fs::write(&path, format!("{text}\n[kubernetes]\nkubeconfig = {config:?}\n"))?;
        Ok(())
    }
}

impl Ran {
    /// Returns the exit status and the output, for messages.
    pub(super) fn diagnostics(&self) -> String {
        format!(
            "{} {:?} {:?}",
            self.output.status,
            self.output.stdout.trim(),
            self.output.stderr.trim()
        )
    }
}

/// Disconnects the cable between a worker and its router, or connects it again.
fn plug(hybrid: &Hybrid, port: &str, up: bool) -> anyhow::Result<()> {
    let router = hybrid.routers[1].host().namespace();
    router.run(|| {
        let mut netlink = Rtnetlink::open()?;
        let port = netlink.link_index(port)?;
        Ok(netlink.set_up(port, up)?)
    })
}

impl Figures for Bootstrap {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let figure = |value: Option<f64>| value.map_or("-".to_owned(), |value| value.to_string());
        let mut text = String::new();
        let _ = writeln!(text, "clean machine to mesh     {} s", figure(self.seconds_to_mesh));
        let _ = writeln!(text, "the same command again    {} s", figure(self.again_seconds));
        let _ = writeln!(
            text,
            "after {} s offline        {} s",
            self.offline_s,
            figure(self.seconds_to_mesh_after_offline)
        );
        let _ = write!(text, "rejoined after a reboot   {} ms", figure(self.rejoined_ms));
        text
    }
}
