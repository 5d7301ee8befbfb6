//! Machines that have another name or another file system than expected.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};

use super::Case;
use crate::lab::interrupt::{wait_for, wait_up_to};
use crate::lab::mesh::{COMMAND_LIMIT, Controller, Node};
use crate::lab::process::{CommandOutput, Daemon, Program};
use crate::lab::scenario::Setting;
use crate::lab::scenario::bootstrap::{installed, is_enabled};
use crate::lab::scenario::scene::{Pair, Scene, UP_LIMIT, connected, has_no_problem};

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
        Case::new("state/rolled-back-snapshot", rolled_back),
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

/// Machines whose state was restored from an older copy, as a snapshot of a virtual machine does: one with
/// a public address, which does not change what it publishes, and one behind a NAT. The mesh knows later
/// counters of each, from a start whose clock was ahead.
fn rolled_back(setting: &Setting) -> anyhow::Result<()> {
    /// Time by which the clock was ahead, in milliseconds: a day.
    const AHEAD: u64 = 86_400_000;
    let scene = Scene::build_v4(setting)?;
    let mut pair = scene.join(setting)?;
    pair.is_connected()?;
    let copy = scene.lab.directory().join("snapshot");
    for number in 0..2 {
        fs::create_dir(&copy)?;
        let node = node_of(&mut pair, number);
        stop(node)?;
        copy_files(&node.state(), &copy)?;
        let counters = node.state().join("counters.json");
        let epoch = boot_epoch(&counters)? + AHEAD;
        let text = fs::read_to_string(&counters)?;
        let old = format!("\"boot_epoch\":{}", epoch - AHEAD);
        let new = format!("\"boot_epoch\":{epoch}");
        ensure!(text.contains(&old), "the counters have another form: {text}");
        fs::write(&counters, text.replace(&old, &new))?;
        node.restart()?;
        pair.is_connected()?;
        let name = node_of(&mut pair, number).name().to_owned();
        let generation = generation(&pair, &name)?;
        let node = node_of(&mut pair, number);
        stop(node)?;
        for entry in fs::read_dir(node.state())? {
            fs::remove_file(entry?.path())?;
        }
        copy_files(&copy, &node.state())?;
        node.restart()?;
        connected(&pair.cp, &pair.worker)
            .with_context(|| format!("{name} was restored from a copy"))?;
        let published = wait_up_to(UP_LIMIT, || {
            let is_newer = self::generation(&pair, &name)? > generation;
            Ok((is_newer && boot_epoch(&counters)? > epoch).then_some(()))
        })?;
        ensure!(published.is_some(), "{name} has no later start than {epoch}, record {generation}");
        has_no_problem(&pair.cp)?;
        has_no_problem(&pair.worker)?;
        fs::remove_dir_all(&copy)?;
    }
    Ok(())
}

fn node_of(pair: &mut Pair, number: usize) -> &mut Node {
    if number == 0 { &mut pair.cp } else { &mut pair.worker }
}

fn stop(node: &mut Node) -> anyhow::Result<()> {
    let agent = node.take_agent().context("the agent does not run")?;
    agent.stop().map(drop)
}

/// Copies the files of a directory, with their permissions.
fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))
            .with_context(|| format!("cannot copy {}", entry.path().display()))?;
    }
    Ok(())
}

/// Returns the number of the start that a state directory names last.
fn boot_epoch(counters: &Path) -> anyhow::Result<u64> {
    let counters: serde_json::Value = serde_json::from_slice(&fs::read(counters)?)?;
    counters.get("boot_epoch").and_then(serde_json::Value::as_u64).context("no boot epoch")
}

/// Returns the generation of the record of a node that the controller has.
fn generation(pair: &Pair, name: &str) -> anyhow::Result<u64> {
    let nodes = pair.controller.operator().nodes()?;
    let node = nodes.into_iter().find(|node| node.name == name).context("the node is not known")?;
    node.generation.context("the node has no record")
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
