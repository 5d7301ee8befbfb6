//! `cargo lab departure`: runs `towline down`, `up`, `leave` and `confirm` in many orders, with and
//! without a running agent and across reboots, and checks their exit status, their messages and the
//! state of the machine.
//!
//! A reboot is simulated: the link, routes, rules and nftables table that Towline created are
//! removed, then the guard and the agent start again with the same state directory.

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use serde::Serialize;
use towline_netlink::{Family, Rtnetlink};
use towline_nftables::{Nft, TableFamily};

use super::Setting;
use super::bootstrap::Machine;
use super::hybrid::Hybrid;
use crate::lab::interrupt::{wait_for, wait_up_to};
use crate::lab::mesh::{COMMAND_LIMIT, Controller, Node, START_LIMIT, await_tunnel};
use crate::lab::namespace::Namespace;
use crate::lab::privilege::Rank;
use crate::lab::process::CommandOutput;
use crate::lab::report::{Figures, Promises};

/// Name of the agent's TUN link.
const LINK: &str = "towline0";
/// Number of the agent's routing table. The priorities of its policy rules begin at the same
/// number.
const TABLE: u32 = 21580;
/// Time in seconds until an unconfirmed join is undone.
const CONFIRM: &str = "3";

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Departure {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Number of commands whose exit status and messages were checked.
    pub commands: usize,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Departure> {
    let hybrid = Hybrid::build(setting)?;
    let rootless = setting.rank == Rank::Rootless;
    let mut acts = Acts { commands: 0, promises: Promises::new() };
    if let Err(error) = acts.play(setting, &hybrid) {
        acts.promises.fail(format!("{error:#}"));
    }
    Ok(Departure { rootless, commands: acts.commands, failed: acts.promises.into_failed() })
}

/// Number of checked commands and promises of a run.
struct Acts {
    commands: usize,
    promises: Promises,
}

impl Acts {
    /// Runs all steps on two workers.
    fn play(&mut self, setting: &Setting, hybrid: &Hybrid) -> anyhow::Result<()> {
        setting.output.step("starting the controller and the control plane's node");
        let mut controller = Controller::start(&hybrid.lab, &hybrid.cp, &setting.binaries)?;
        let advertise = "[node]\nadvertise = [\"203.0.113.10:51830\"]\n";
        let mut cp = Node::new(&hybrid.lab, &hybrid.cp, "cp", &setting.binaries, advertise)?;
        cp.join(&controller.operator().token("cloud")?)?;
        cp.restart()?;

        let host = &hybrid.workers[0];
        let mut worker = Node::new(&hybrid.lab, host, "worker-a", &setting.binaries, "")?;
        self.cut_off_at_the_join(setting, &controller, &mut worker)?;
        self.down_and_up(setting, &cp, &mut worker)?;
        self.races(setting, &mut worker)?;
        self.leaving(setting, &mut controller, &mut worker)?;
        let mut machine = Machine::new(setting, hybrid, 1, "worker-b");
        self.confirming(setting, &controller, &mut machine)?;
        self.unconfirmed(setting, &controller, &mut machine)
    }

    /// Checks that a command ended with this status and that its stderr contains all of these
    /// parts.
    fn check_output(&mut self, act: &str, output: &CommandOutput, status: i32, parts: &[&str]) {
        self.commands += 1;
        let missing = parts.iter().find(|part| !output.stderr.contains(**part));
        self.promises.hold(output.status.code() == Some(status) && missing.is_none(), || {
            format!(
                "{act}: status {status} and {parts:?}: {} {:?}",
                output.status,
                output.stderr.trim()
            )
        });
    }

    /// Checks that nothing of Towline is left in the network of the host.
    fn is_open(&mut self, act: &str, place: &Namespace) -> anyhow::Result<()> {
        let ours = ours(place)?;
        self.promises
            .hold(ours.is_empty(), || format!("{act}: nothing of towline is left: {ours:?}"));
        Ok(())
    }

    /// Checks that a join fails if it would cut off the SSH session it runs in, unless it is
    /// forced.
    fn cut_off_at_the_join(
        &mut self,
        setting: &Setting,
        controller: &Controller,
        worker: &mut Node,
    ) -> anyhow::Result<()> {
        setting.output.step("joining from an SSH session that it would cut off");
        let token = controller.operator().token("dc-a")?;
        let join = |flags: &[&str], variable: &str, value: &str| {
            worker
                .program(&["join", "--token-file", "-", "--name", "worker-a"])
                .args(flags.iter().copied())
                .input(&*token.token)
                .env(variable, value)
                .run(worker.host().namespace(), COMMAND_LIMIT)
        };
        for (variable, value) in [
            ("SSH_CONNECTION", "198.19.7.7 50000 192.168.1.2 22"),
            ("SSH_CLIENT", "198.19.7.7 50000 22"),
            ("SSH_CONNECTION", "::ffff:198.19.7.7 50000 ::ffff:192.168.1.2 22"),
        ] {
            let output = join(&[], variable, value)?;
            let parts = ["198.19.0.0/16", "198.19.7.7", "plain_ports", "--force"];
            self.check_output("join from an address of the mesh", &output, 1, &parts);
        }
        let inside = "198.19.7.7 50000 192.168.1.2 22";
        let output = join(&["--force"], "SSH_CONNECTION", inside)?;
        self.check_output("the same with --force and the same token", &output, 0, &["joined as"]);
        worker.restart()?;
        Ok(())
    }

    /// Checks `down` and `up` with and without a running agent, and a reboot of a machine that is
    /// down.
    fn down_and_up(
        &mut self,
        setting: &Setting,
        cp: &Node,
        worker: &mut Node,
    ) -> anyhow::Result<()> {
        setting.output.step("towline down with a running agent");
        let place = worker.host().clone();
        let place = place.namespace();
        let reason = await_tunnel(cp, worker, START_LIMIT)?;
        self.promises.hold(reason.is_none(), || format!("the tunnel comes up: {reason:?}"));
        let output = worker.command(&["confirm"])?;
        self.check_output("confirm with nothing to confirm", &output, 0, &["nothing to confirm"]);
        let output = worker.command(&["down"])?;
        self.check_output("down", &output, 0, &["agent stopped", "towline up"]);
        self.ends(worker, 0)?;
        self.is_open("down", place)?;
        let marker = worker.state().join("down");
        self.promises.hold(marker.is_file(), || "down creates its marker file".to_owned());
        let output = worker.command(&["status"])?;
        self.check_output(
            "status while down without an agent",
            &output,
            1,
            &["down since", "towline up"],
        );
        let output = worker.command(&["down"])?;
        self.check_output("down twice", &output, 0, &["down already"]);

        setting.output.step("rebooting a machine that is down");
        let output = worker.command(&["guard"])?;
        self.check_output("guard while down", &output, 0, &["down", "towline up"]);
        self.is_open("guard while down", place)?;
        worker.restart()?;
        self.is_open("the agent's start while down", place)?;
        let status = json(worker, "status")?;
        self.promises.hold(
            status["state"] == "down"
                && status["down_since"].is_string()
                && status["name"] == "worker-a",
            || format!("status shows that the machine is down: {status}"),
        );
        let text = worker.command_ok(&["status"])?;
        self.promises.hold(
            text.lines().any(|l| l.contains("down since") && l.contains("towline up")),
            || format!("status shows the command that starts the mesh again: {text}"),
        );
        let output = worker.command(&["wait", "--timeout", "1"])?;
        self.check_output("wait while down", &output, 1, &["down", "towline up"]);
        let output = worker.command(&["ping", "cp", "-c", "1"])?;
        self.promises.hold(!output.status.success(), || "towline ping fails while down".to_owned());
        let output = worker.command(&["down"])?;
        self.check_output("down while down", &output, 0, &["down already"]);
        worker.agent()?.check()?;

        setting.output.step("towline up with a running agent");
        let inside = "198.19.7.7 50000 192.168.1.2 22";
        let up = |flags: &[&str]| {
            worker
                .program(&["up"])
                .args(flags.iter().copied())
                .env("SSH_CONNECTION", inside)
                .run(place, COMMAND_LIMIT)
        };
        let output = up(&[])?;
        self.check_output(
            "up that would cut off its SSH session",
            &output,
            1,
            &["198.19.7.7", "--force"],
        );
        let output = up(&["--force"])?;
        self.check_output("up with --force", &output, 0, &["up"]);
        let complete = ours(place)?;
        self.promises.hold(complete.len() == 4, || {
            format!("up creates the link, routes, rules and nftables table: {complete:?}")
        });
        self.promises.hold(!marker.exists(), || "up removes the marker file of down".to_owned());
        let output = worker.command(&["up"])?;
        self.check_output("up when up", &output, 0, &["up already"]);
        let status = json(worker, "status")?;
        self.promises.hold(status["state"] == "running", || format!("running: {status}"));
        let reason = await_tunnel(cp, worker, START_LIMIT)?;
        self.promises.hold(reason.is_none(), || format!("the tunnel comes up again: {reason:?}"));

        setting.output.step("towline up without an agent");
        worker.command_ok(&["down"])?;
        self.ends(worker, 0)?;
        let output = worker.command(&["up"])?;
        self.check_output("up without an agent", &output, 0, &["towline agent"]);
        self.promises.hold(!marker.exists(), || {
            "up without an agent removes the marker file of down".to_owned()
        });
        worker.restart()?;
        let status = json(worker, "status")?;
        self.promises.hold(status["state"] == "running", || format!("running: {status}"));

        setting.output.step("towline down after the agent was killed");
        worker.agent()?.kill()?;
        let output = worker.command(&["down"])?;
        self.check_output("down without an agent", &output, 0, &["towline up"]);
        self.is_open("down without an agent", place)?;
        self.promises
            .hold(marker.exists(), || "down without an agent creates its marker file".to_owned());
        worker.command_ok(&["up"])?;
        Ok(())
    }

    /// Runs commands while an agent starts or exits.
    fn races(&mut self, setting: &Setting, worker: &mut Node) -> anyhow::Result<()> {
        let place = worker.host().clone();
        let place = place.namespace();
        for round in 0..4 {
            setting.output.step("towline down while the agent starts");
            worker.launch()?;
            let output = worker.command(&["down"])?;
            self.check_output("down during the start", &output, 0, &["towline up"]);
            // Either the agent exited, or `down` came after its start: then it runs without a mesh.
            let standing = wait_up_to(START_LIMIT, || {
                Ok((worker.agent()?.check().is_err()
                    || json(worker, "status").is_ok_and(|status| status["state"] == "down"))
                .then_some(()))
            })?;
            self.promises.hold(standing.is_some(), || "the agent exits or is down".to_owned());
            self.is_open("down during the start", place)?;
            drop(worker.take_agent());
            worker.command_ok(&["up"])?;

            setting.output.step("towline down and SIGTERM at the same time");
            worker.restart()?;
            let pid = worker.agent()?.pid();
            let output = std::thread::scope(|scope| {
                let down = scope.spawn(|| worker.command(&["down"]));
                if round % 2 == 0 {
                    kill(pid, Signal::SIGTERM)?;
                }
                crate::lab::namespace::join(down)
            })?;
            self.check_output("down at the same time as SIGTERM", &output, 0, &["towline up"]);
            self.ends(worker, 0)?;
            self.is_open("down at the same time as SIGTERM", place)?;
            worker.command_ok(&["up"])?;
        }
        Ok(())
    }

    /// Checks `leave` with a running agent, while down, without an agent, and without a controller.
    fn leaving(
        &mut self,
        setting: &Setting,
        controller: &mut Controller,
        worker: &mut Node,
    ) -> anyhow::Result<()> {
        setting.output.step("towline leave with a running agent");
        let place = worker.host().clone();
        let place = place.namespace();
        worker.launch()?;
        wait_for("connection to the controller", START_LIMIT, || {
            Ok(worker.status().is_ok_and(|status| status.controller.connected).then_some(()))
        })?;
        let output = worker.command(&["leave"])?;
        self.check_output("leave", &output, 0, &["left the mesh"]);
        self.ends(worker, 0)?;
        self.is_open("leave", place)?;
        self.is_gone(controller, "worker-a")?;
        let output = worker.command(&["leave"])?;
        self.check_output("leave twice", &output, 1, &["has not joined"]);
        let output = worker.command(&["up"])?;
        self.check_output("up after leave", &output, 1, &["has not joined"]);
        let output = worker.command(&["down"])?;
        self.check_output("down after leave", &output, 0, &[]);
        let again = worker.program(&["agent"]).run(place, COMMAND_LIMIT)?;
        self.check_output("the agent after leave", &again, 1, &["has not joined"]);
        let again = worker
            .program(&["agent"])
            .env("NOTIFY_SOCKET", "@no-such")
            .run(place, COMMAND_LIMIT)?;
        self.check_output("the service after leave", &again, 6, &["has not joined"]);

        setting.output.step("towline leave while down, with a running agent");
        worker.join(&controller.operator().token("dc-a")?)?;
        worker.command_ok(&["down"])?;
        worker.restart()?;
        let output = worker.command(&["leave"])?;
        self.check_output("leave while down", &output, 0, &["left the mesh"]);
        self.ends(worker, 0)?;
        self.is_gone(controller, "worker-a")?;
        self.promises.hold(!worker.state().join("down").exists(), || {
            "leave removes the marker file of down".to_owned()
        });

        setting.output.step("towline leave while down, without an agent");
        worker.join(&controller.operator().token("dc-a")?)?;
        worker.command_ok(&["down"])?;
        let output = worker.command(&["leave"])?;
        self.check_output("leave while down without an agent", &output, 0, &["left the mesh"]);
        self.is_gone(controller, "worker-a")?;

        setting.output.step("towline leave while the controller is down");
        worker.join(&controller.operator().token("dc-a")?)?;
        worker.restart()?;
        drop(controller.take_daemon());
        wait_for("loss of the controller", START_LIMIT, || {
            Ok(worker.status().is_ok_and(|status| !status.controller.connected).then_some(()))
        })?;
        worker.restart()?;
        let status = json(worker, "status")?;
        self.promises.hold(status["certificate_expires_at"].is_string(), || {
            format!(
                "status shows the certificate from the disk while the controller is down: {status}"
            )
        });
        let output = worker.command(&["leave"])?;
        self.check_output("leave without a controller", &output, 1, &["still a member", "--force"]);
        worker.agent()?.check()?;
        let output = worker.command(&["leave", "--force"])?;
        self.check_output("leave --force without a controller", &output, 0, &["left the mesh"]);
        self.ends(worker, 0)?;
        self.is_open("leave --force", place)?;
        controller.launch()?;
        controller.await_answer(START_LIMIT)
    }

    /// Checks a join that is confirmed in time, and the installation and removal of the units.
    fn confirming(
        &mut self,
        setting: &Setting,
        controller: &Controller,
        machine: &mut Machine,
    ) -> anyhow::Result<()> {
        setting.output.step("joining with a confirmation in time");
        let place = machine.host.clone();
        let place = place.namespace();
        let token = controller.operator().token("dc-b")?;
        let ran = machine.install(&token, &["--confirm", "600"])?;
        self.check_output("join --confirm", &ran.output, 0, &["towline confirm"]);
        let command = |machine: &Machine, arguments: &[&str]| {
            machine.towline(arguments).run(place, COMMAND_LIMIT)
        };
        let output = command(machine, &["status"])?;
        let parts = ["not confirmed", "undone in", "towline confirm"];
        let missing = parts.iter().find(|part| !output.stdout.contains(**part));
        self.promises.hold(missing.is_none(), || {
            format!("status shows that the join is not confirmed: {}", output.stdout)
        });
        let again = machine.install(&token, &["--confirm", "600"])?;
        self.check_output("join --install --confirm again", &again.output, 0, &["not applied"]);
        let output = command(machine, &["confirm"])?;
        self.check_output("confirm", &output, 0, &["confirmed"]);
        let output = command(machine, &["confirm"])?;
        self.check_output("confirm twice", &output, 0, &["nothing to confirm"]);
        let output = command(machine, &["status", "-o", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&output.stdout)?;
        self.promises.hold(status["confirm_within_ms"].is_null(), || {
            format!("after the confirmation, status shows no deadline: {status}")
        });

        setting.output.step("installing again on a machine that is down");
        let output = command(machine, &["down"])?;
        self.check_output("down of an installed machine", &output, 0, &["towline up"]);
        machine.agent = None;
        let again = machine.install(&token, &[])?;
        self.check_output("install while down", &again.output, 1, &["towline up"]);
        machine.agent = None;
        let output = command(machine, &["up"])?;
        self.check_output("up of an installed machine", &output, 0, &[]);
        machine.boot()?;

        setting.output.step("towline leave on an installed machine");
        self.promises.hold(machine.is_enabled(), || "install enables the units".to_owned());
        let root = machine.root.display().to_string();
        wait_for("the agent's answer", START_LIMIT, || {
            let output = command(machine, &["status", "-o", "json"])?;
            let status: serde_json::Value =
                serde_json::from_str(&output.stdout).unwrap_or_default();
            Ok((status["controller"]["connected"] == true).then_some(()))
        })?;
        let output = command(machine, &["leave", "--root", &root])?;
        self.check_output(
            "leave of an installed machine",
            &output,
            0,
            &["disabled towline.service"],
        );
        self.promises.hold(!machine.is_enabled(), || "leave disables the units".to_owned());
        self.is_open("leave of an installed machine", place)?;
        machine.agent = None;
        self.is_gone(controller, "worker-b")
    }

    /// Checks that a join without a confirmation is undone after its deadline, and after a reboot.
    fn unconfirmed(
        &mut self,
        setting: &Setting,
        controller: &Controller,
        machine: &mut Machine,
    ) -> anyhow::Result<()> {
        let place = machine.host.clone();
        let place = place.namespace();
        let root = machine.root.display().to_string();
        let state = machine.root.join("var/lib/towline");
        for reboots in [false, true] {
            setting.output.step("joining without a confirmation");
            let token = controller.operator().token("dc-b")?;
            let seconds = if reboots { "600" } else { CONFIRM };
            let ran = machine.install(&token, &["--confirm", seconds])?;
            // The deadline may pass while the command waits for the mesh.
            self.promises.hold(ran.output.status.success() || !reboots, || {
                format!("join --confirm: {}", ran.diagnostics())
            });
            if reboots {
                setting.output.step("rebooting before the confirmation");
                machine.agent.as_mut().context("no agent runs on this machine")?.kill()?;
                machine.agent = None;
                let file = state.join("confirm-by");
                let text = std::fs::read_to_string(&file)?;
                let mut join: serde_json::Value = serde_json::from_str(&text)?;
                join["boot_id"] = "another boot".into();
                std::fs::write(&file, join.to_string())?;
                let output = machine.towline(&["guard"]).run(place, COMMAND_LIMIT)?;
                self.check_output("guard after the reboot", &output, 0, &["not confirmed"]);
                let output = machine.towline(&["confirm"]).run(place, COMMAND_LIMIT)?;
                self.check_output("confirm too late", &output, 1, &["not confirmed in time"]);
                machine.boot()?;
            }
            let ended =
                machine.agent.take().context("no agent runs on this machine")?.wait(START_LIMIT)?;
            self.promises.hold(ended.success(), || {
                format!("the agent undoes the join and exits without error: {ended}")
            });
            self.is_open("undoing the join", place)?;
            self.is_gone(controller, "worker-b")?;
            self.promises.hold(!state.join("membership.json").exists(), || {
                "undoing the join removes the membership".to_owned()
            });
            let output = machine.towline(&["confirm"]).run(place, COMMAND_LIMIT)?;
            self.check_output(
                "confirm after the join was undone",
                &output,
                1,
                &["not confirmed in time"],
            );
            let output =
                machine.towline(&["after-stop", "--root", &root]).run(place, COMMAND_LIMIT)?;
            self.check_output("after-stop of the unit", &output, 0, &["disabled towline.service"]);
            self.promises
                .hold(!machine.is_enabled(), || "undoing the join disables the units".to_owned());
            let output = machine.towline(&["guard"]).run(place, COMMAND_LIMIT)?;
            self.check_output("guard after the join was undone", &output, 0, &["has not joined"]);
        }
        setting.output.step("joining after a join was undone");
        let token = controller.operator().token("dc-b")?;
        let ran = machine.install(&token, &[])?;
        self.check_output("join after a join was undone", &ran.output, 0, &["joined as"]);
        Ok(())
    }

    /// Waits until the agent exits by itself, and checks its exit status.
    fn ends(&mut self, worker: &mut Node, status: i32) -> anyhow::Result<()> {
        let agent = worker.take_agent().context("no agent runs on this machine")?;
        let ended = agent.wait(START_LIMIT)?;
        self.promises.hold(ended.code() == Some(status), || {
            format!("the agent exits with status {status}: {ended}")
        });
        Ok(())
    }

    /// Checks that the controller no longer lists a node.
    fn is_gone(&mut self, controller: &Controller, name: &str) -> anyhow::Result<()> {
        let nodes = controller.operator().nodes()?;
        self.promises.hold(nodes.iter().all(|node| node.name != name), || {
            format!("the controller does not list {name}: {nodes:?}")
        });
        Ok(())
    }
}

/// Returns what Towline created in the network of a host and is still there, one word each.
fn ours(place: &Namespace) -> anyhow::Result<Vec<&'static str>> {
    place.run(|| {
        let mut netlink = Rtnetlink::open()?;
        let mut found = Vec::new();
        if netlink.link_index(LINK).is_ok() {
            found.push("link");
        }
        if !netlink.routes(Family::V4, Some(TABLE))?.is_empty() {
            found.push("routes");
        }
        let rules = netlink.rules(Family::V4)?;
        if rules.iter().any(|rule| (TABLE..TABLE + 8).contains(&rule.priority)) {
            found.push("rules");
        }
        if Nft::open()?.read(TableFamily::Inet, "towline")?.is_some() {
            found.push("firewall");
        }
        Ok(found)
    })
}

fn json(node: &Node, command: &str) -> anyhow::Result<serde_json::Value> {
    let output = node.command_ok(&[command, "-o", "json"])?;
    serde_json::from_str(&output).context("no JSON")
}

impl Figures for Departure {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        format!("commands checked  {}", self.commands)
    }
}
