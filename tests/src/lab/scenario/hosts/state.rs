//! Machines that have another name or another file system than expected.

use std::path::Path;

use anyhow::{Context as _, ensure};

use super::Case;
use super::scene::Scene;
use crate::lab::interrupt::wait_for;
use crate::lab::mesh::{COMMAND_LIMIT, Controller, Node};
use crate::lab::process::{CommandOutput, Daemon, Program};
use crate::lab::scenario::Setting;
use crate::lab::scenario::bootstrap::{installed, is_enabled};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("state/named-by-its-dns-name", dns_name),
        Case::new("state/named-localhost", localhost),
        Case::new("state/read-only-usr", |setting| {
            read_only(setting, &["usr"], Some("opt/bin/towline"))
        }),
        Case::new("state/nowhere-to-install", |setting| {
            read_only(setting, &["usr", "opt", "var/lib/towline-programs"], None)
        }),
    ]
}

/// A controller, and a machine that has not joined.
struct Machine {
    scene: Scene,
    controller: Controller,
    node: Node,
}

impl Machine {
    fn new(setting: &Setting) -> anyhow::Result<Self> {
        let scene = Scene::build(setting)?;
        let controller = Controller::start(&scene.lab, &scene.cp, &setting.binaries)?;
        let node = Node::new(&scene.lab, &scene.worker, "machine", &setting.binaries, "")?;
        Ok(Self { scene, controller, node })
    }

    /// Runs `towline join` with a new token, and with this name in the environment.
    fn join(&self, name: &str, flags: &[&str]) -> anyhow::Result<CommandOutput> {
        let token = self.controller.operator().token_with(&[])?;
        let program = self.node.program(&["join", "--token-file", "-", "-o", "json"]);
        let program = program.args(flags.iter().copied()).env("TOWLINE_NAME", name);
        program.input(&*token.token).run(self.node.host().namespace(), COMMAND_LIMIT)
    }
}

/// A machine that is called by its DNS name, as Kubernetes does in some clouds.
fn dns_name(setting: &Setting) -> anyhow::Result<()> {
    let machine = Machine::new(setting)?;
    let long = format!("IP-10-0-1-5.{}example.com", "site.".repeat(20));
    let output = machine.join(&long, &[])?;
    let is_short = output.status.success() && output.stdout.contains("\"name\": \"ip-10-0-1-5\"");
    ensure!(is_short, "the first label is not taken: {output:?}");
    // The same command runs at each start of a pod.
    for name in [&*long, "renamed.example.com", "localhost", "my_node"] {
        let output = machine.join(name, &[])?;
        ensure!(output.status.success(), "a member is refused as `{name}`: {output:?}");
    }
    // An operator who asks for another name does not get the old one.
    let output = machine.join(&long, &["--name", "other"])?;
    ensure!(!output.status.success(), "a member is taken for `other`: {output:?}");
    // Another machine of this name is told what to do.
    let second = Node::new(&machine.scene.lab, &machine.scene.cp, "second", &setting.binaries, "")?;
    let machine = Machine { node: second, ..machine };
    let output = machine.join("ip-10-0-1-5.elsewhere.example.com", &[])?;
    let is_told = !output.status.success() && output.stderr.contains("--name");
    ensure!(is_told, "a name that is taken leads nowhere: {output:?}");
    Ok(())
}

/// A machine that did not get its own name yet.
fn localhost(setting: &Setting) -> anyhow::Result<()> {
    let machine = Machine::new(setting)?;
    for name in ["localhost", "localhost.localdomain"] {
        let output = machine.join(name, &[])?;
        let is_told = !output.status.success() && output.stderr.contains("--name");
        ensure!(is_told, "{name} is taken as the name of a node: {output:?}");
    }
    Ok(())
}

/// A machine on which these paths cannot be written to; nobody can create a file below a file. Its
/// program is expected at `program`, or nowhere.
fn read_only(setting: &Setting, blocked: &[&str], program: Option<&str>) -> anyhow::Result<()> {
    let machine = Machine::new(setting)?;
    let root = machine.scene.lab.directory().join("root");
    for path in blocked {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().context("a path in the tree")?)?;
        std::fs::write(path, "")?;
    }
    let token = machine.controller.operator().token_with(&[])?;
    let host = machine.node.host();
    let install = Program::new(&setting.binaries.towline)
        .args(["join", "--install", "--token-file", "-", "--name", "machine", "--root"])
        .arg(&root)
        .input(&*token.token);
    let run = || install.run(host.namespace(), COMMAND_LIMIT);
    let Some(program) = program else {
        let output = run()?;
        let is_told = output.stderr.contains("joined, but not installed")
            && output.stderr.contains("towline-programs");
        ensure!(!output.status.success() && is_told, "the way out is not told: {output:?}");
        ensure!(root.join("var/lib/towline/membership.json").is_file(), "the join is lost");
        return Ok(());
    };
    std::thread::scope(|scope| {
        let running = scope.spawn(run);
        wait_for("unit of the agent", COMMAND_LIMIT, || {
            Ok((is_enabled(&root) || running.is_finished()).then_some(()))
        })?;
        // Acts as init.
        let _agent = is_enabled(&root).then(|| start_unit(&machine, &root, program)).transpose()?;
        let output = running.join().map_err(|_| anyhow::anyhow!("the command panicked"))??;
        ensure!(output.status.success(), "the machine is not installed: {output:?}");
        Ok(())
    })
}

/// Starts what the agent's unit says, in the tree of a machine.
fn start_unit(machine: &Machine, root: &Path, program: &str) -> anyhow::Result<Daemon> {
    let unit = std::fs::read_to_string(root.join("etc/systemd/system/towline.service"))?;
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart="));
    let wanted = format!("/{program} agent");
    ensure!(start == Some(&*wanted), "the unit starts {start:?} instead of {wanted}");
    let agent = installed(root, program, &["agent"]);
    agent.start(machine.node.host().namespace(), "the installed agent", &machine.node.log())
}
