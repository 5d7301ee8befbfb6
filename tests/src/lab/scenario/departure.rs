//! `cargo lab departure`: what `towline down`, `up`, `leave` and `confirm` do to a machine, in every
//! order, with a running agent and without, over reboots.
//!
//! A reboot is the agent and the guard started again on the same state directory, after everything
//! of ours is gone from the kernel's network.

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
use crate::lab::process::Said;
use crate::lab::report::{Figures, Promises};

/// Where the agent's link, routes and rules are; the rules' priorities begin at the table's number.
const LINK: &str = "towline0";
const TABLE: u32 = 21580;
/// How long a join that has to be confirmed waits in the lab, in seconds.
const CONFIRM: &str = "3";

/// What was done.
#[derive(Debug, Default, Serialize)]
pub struct Departure {
    /// The lab ran without root's rights over the machine.
    pub rootless: bool,
    /// Commands whose exit status and message were compared.
    pub commands: usize,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Runs it.
pub fn run(setting: &Setting) -> anyhow::Result<Departure> {
    let hybrid = Hybrid::build(setting)?;
    let rootless = setting.rank == Rank::Rootless;
    let mut acts = Acts { commands: 0, promises: Promises::new() };
    if let Err(error) = acts.play(setting, &hybrid) {
        acts.promises.fail(format!("{error:#}"));
    }
    Ok(Departure { rootless, commands: acts.commands, failed: acts.promises.into_failed() })
}

struct Acts {
    commands: usize,
    promises: Promises,
}

impl Acts {
    fn play(&mut self, setting: &Setting, hybrid: &Hybrid) -> anyhow::Result<()> {
        setting.talk.step("starting the controller and the control plane's node");
        let mut controller = Controller::start(&hybrid.lab, &hybrid.cp, &setting.binaries)?;
        let advertise = "[node]\nadvertise = [\"203.0.113.10:51830\"]\n";
        let mut cp = Node::new(&hybrid.lab, &hybrid.cp, "cp", &setting.binaries, advertise)?;
        cp.join(&controller.operator().token("cloud")?)?;
        cp.launch()?;
        cp.await_status(START_LIMIT)?;

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

    /// A command ends with this status and says all of this on stderr.
    fn says(&mut self, act: &str, said: &Said, status: i32, parts: &[&str]) {
        self.commands += 1;
        let missing = parts.iter().find(|part| !said.stderr.contains(**part));
        self.promises.hold(said.status.code() == Some(status) && missing.is_none(), || {
            format!(
                "{act}: status {status} and {parts:?}: {} {:?}",
                said.status,
                said.stderr.trim()
            )
        });
    }

    fn is_open(&mut self, act: &str, place: &Namespace) -> anyhow::Result<()> {
        let ours = ours(place)?;
        self.promises.hold(ours.is_empty(), || format!("{act}: the host is open: {ours:?}"));
        Ok(())
    }

    fn cut_off_at_the_join(
        &mut self,
        setting: &Setting,
        controller: &Controller,
        worker: &mut Node,
    ) -> anyhow::Result<()> {
        setting.talk.step("a join that would cut off its operator");
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
            let said = join(&[], variable, value)?;
            let parts = ["198.19.0.0/16", "198.19.7.7", "plain_ports", "--force"];
            self.says("join from inside the mesh's range", &said, 1, &parts);
        }
        let inside = "198.19.7.7 50000 192.168.1.2 22";
        let said = join(&["--force"], "SSH_CONNECTION", inside)?;
        self.says("the same with --force and the same token", &said, 0, &["joined as"]);
        worker.launch()?;
        worker.await_status(START_LIMIT)?;
        Ok(())
    }

    fn down_and_up(
        &mut self,
        setting: &Setting,
        cp: &Node,
        worker: &mut Node,
    ) -> anyhow::Result<()> {
        setting.talk.step("down with a running agent");
        let place = worker.host().clone();
        let place = place.namespace();
        let reason = await_tunnel(cp, worker, START_LIMIT)?;
        self.promises.hold(reason.is_none(), || format!("the tunnel is up: {reason:?}"));
        let said = worker.command(&["confirm"])?;
        self.says("confirm with nothing to confirm", &said, 0, &["nothing to confirm"]);
        let said = worker.command(&["down"])?;
        self.says("down", &said, 0, &["agent stopped", "towline up"]);
        self.ends(worker, 0)?;
        self.is_open("down", place)?;
        let marker = worker.state().join("down");
        self.promises.hold(marker.is_file(), || "down leaves its marker".to_owned());
        let said = worker.command(&["status"])?;
        self.says("status while down without an agent", &said, 1, &["down since", "towline up"]);
        let said = worker.command(&["down"])?;
        self.says("down twice", &said, 0, &["down already"]);

        setting.talk.step("a reboot of a machine that is down");
        let said = worker.command(&["guard"])?;
        self.says("guard while down", &said, 0, &["down", "towline up"]);
        self.is_open("guard while down", place)?;
        worker.launch()?;
        worker.await_status(START_LIMIT)?;
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
            || format!("status says how to go on: {text}"),
        );
        let said = worker.command(&["wait", "--timeout", "1"])?;
        self.says("wait while down", &said, 1, &["down", "towline up"]);
        let said = worker.command(&["ping", "cp", "-c", "1"])?;
        self.promises.hold(!said.status.success(), || "no ping while down".to_owned());
        let said = worker.command(&["down"])?;
        self.says("down while down", &said, 0, &["down already"]);
        worker.agent()?.check()?;

        setting.talk.step("up, by the agent");
        let inside = "198.19.7.7 50000 192.168.1.2 22";
        let up = |flags: &[&str]| {
            worker
                .program(&["up"])
                .args(flags.iter().copied())
                .env("SSH_CONNECTION", inside)
                .run(place, COMMAND_LIMIT)
        };
        let said = up(&[])?;
        self.says("up that cuts off its operator", &said, 1, &["198.19.7.7", "--force"]);
        let said = up(&["--force"])?;
        self.says("up with --force", &said, 0, &["up"]);
        let complete = ours(place)?;
        self.promises.hold(complete.len() == 4, || format!("up has applied all: {complete:?}"));
        self.promises.hold(!marker.exists(), || "up removes the marker".to_owned());
        let said = worker.command(&["up"])?;
        self.says("up when up", &said, 0, &["up already"]);
        let status = json(worker, "status")?;
        self.promises.hold(status["state"] == "running", || format!("running: {status}"));
        let reason = await_tunnel(cp, worker, START_LIMIT)?;
        self.promises.hold(reason.is_none(), || format!("the tunnel is up again: {reason:?}"));

        setting.talk.step("up without an agent");
        worker.command_ok(&["down"])?;
        self.ends(worker, 0)?;
        let said = worker.command(&["up"])?;
        self.says("up without an agent", &said, 0, &["towline agent"]);
        self.promises.hold(!marker.exists(), || "up removes the marker".to_owned());
        worker.launch()?;
        worker.await_status(START_LIMIT)?;
        let status = json(worker, "status")?;
        self.promises.hold(status["state"] == "running", || format!("running: {status}"));

        setting.talk.step("down without an agent that died");
        worker.agent()?.kill()?;
        let said = worker.command(&["down"])?;
        self.says("down without an agent", &said, 0, &["towline up"]);
        self.is_open("down without an agent", place)?;
        self.promises.hold(marker.exists(), || "down without an agent lasts".to_owned());
        worker.command_ok(&["up"])?;
        Ok(())
    }

    /// Commands that meet an agent which starts or ends.
    fn races(&mut self, setting: &Setting, worker: &mut Node) -> anyhow::Result<()> {
        let place = worker.host().clone();
        let place = place.namespace();
        for round in 0..4 {
            setting.talk.step("down while the agent starts");
            worker.launch()?;
            let said = worker.command(&["down"])?;
            self.says("down during the start", &said, 0, &["towline up"]);
            // Either it ended, or it came too late to bring anything up.
            let standing = wait_up_to(START_LIMIT, || {
                Ok((worker.agent()?.check().is_err()
                    || json(worker, "status").is_ok_and(|status| status["state"] == "down"))
                .then_some(()))
            })?;
            self.promises.hold(standing.is_some(), || "the agent ends, or is down".to_owned());
            self.is_open("down during the start", place)?;
            drop(worker.take_agent());
            worker.command_ok(&["up"])?;

            setting.talk.step("SIGTERM beside down");
            worker.launch()?;
            worker.await_status(START_LIMIT)?;
            let pid = worker.agent()?.pid();
            let said = std::thread::scope(|scope| {
                let down = scope.spawn(|| worker.command(&["down"]));
                if round % 2 == 0 {
                    kill(pid, Signal::SIGTERM)?;
                }
                crate::lab::namespace::join(down)
            })?;
            self.says("down beside SIGTERM", &said, 0, &["towline up"]);
            self.ends(worker, 0)?;
            self.is_open("down beside SIGTERM", place)?;
            worker.command_ok(&["up"])?;
        }
        Ok(())
    }

    fn leaving(
        &mut self,
        setting: &Setting,
        controller: &mut Controller,
        worker: &mut Node,
    ) -> anyhow::Result<()> {
        setting.talk.step("leave with a running agent");
        let place = worker.host().clone();
        let place = place.namespace();
        worker.launch()?;
        wait_for("connection to the controller", START_LIMIT, || {
            Ok(worker.status().is_ok_and(|status| status.controller.connected).then_some(()))
        })?;
        let said = worker.command(&["leave"])?;
        self.says("leave", &said, 0, &["left the mesh"]);
        self.ends(worker, 0)?;
        self.is_open("leave", place)?;
        self.is_gone(controller, "worker-a")?;
        let said = worker.command(&["leave"])?;
        self.says("leave twice", &said, 1, &["has not joined"]);
        let said = worker.command(&["up"])?;
        self.says("up after leave", &said, 1, &["has not joined"]);
        let said = worker.command(&["down"])?;
        self.says("down after leave", &said, 0, &[]);
        let again = worker.program(&["agent"]).run(place, COMMAND_LIMIT)?;
        self.says("the agent after leave", &again, 1, &["has not joined"]);
        let again = worker
            .program(&["agent"])
            .env("NOTIFY_SOCKET", "@no-such")
            .run(place, COMMAND_LIMIT)?;
        self.says("the service after leave", &again, 6, &["has not joined"]);

        setting.talk.step("leave while down, by an agent that stands by");
        worker.join(&controller.operator().token("dc-a")?)?;
        worker.command_ok(&["down"])?;
        worker.launch()?;
        worker.await_status(START_LIMIT)?;
        let said = worker.command(&["leave"])?;
        self.says("leave while down", &said, 0, &["left the mesh"]);
        self.ends(worker, 0)?;
        self.is_gone(controller, "worker-a")?;
        self.promises.hold(!worker.state().join("down").exists(), || {
            "leave removes the marker of down".to_owned()
        });

        setting.talk.step("leave while down, without an agent");
        worker.join(&controller.operator().token("dc-a")?)?;
        worker.command_ok(&["down"])?;
        let said = worker.command(&["leave"])?;
        self.says("leave while down without an agent", &said, 0, &["left the mesh"]);
        self.is_gone(controller, "worker-a")?;

        setting.talk.step("leave while the controller is away");
        worker.join(&controller.operator().token("dc-a")?)?;
        worker.launch()?;
        worker.await_status(START_LIMIT)?;
        drop(controller.take_daemon());
        wait_for("loss of the controller", START_LIMIT, || {
            Ok(worker.status().is_ok_and(|status| !status.controller.connected).then_some(()))
        })?;
        worker.launch()?;
        worker.await_status(START_LIMIT)?;
        let status = json(worker, "status")?;
        self.promises.hold(status["certificate_expires_at"].is_string(), || {
            format!("the certificate on the disk is shown without a controller: {status}")
        });
        let said = worker.command(&["leave"])?;
        self.says("leave without a controller", &said, 1, &["still a member", "--force"]);
        worker.agent()?.check()?;
        let said = worker.command(&["leave", "--force"])?;
        self.says("leave --force without a controller", &said, 0, &["left the mesh"]);
        self.ends(worker, 0)?;
        self.is_open("leave --force", place)?;
        controller.launch()?;
        controller.await_answer(START_LIMIT)
    }

    fn confirming(
        &mut self,
        setting: &Setting,
        controller: &Controller,
        machine: &mut Machine,
    ) -> anyhow::Result<()> {
        setting.talk.step("a join that is confirmed");
        let place = machine.host.clone();
        let place = place.namespace();
        let token = controller.operator().token("dc-b")?;
        let ran = machine.install(&token, &["--confirm", "600"])?;
        self.says("join --confirm", &ran.said, 0, &["towline confirm"]);
        let command = |machine: &Machine, arguments: &[&str]| {
            machine.towline(arguments).run(place, COMMAND_LIMIT)
        };
        let said = command(machine, &["status"])?;
        let parts = ["not confirmed", "undone in", "towline confirm"];
        let missing = parts.iter().find(|part| !said.stdout.contains(**part));
        self.promises.hold(missing.is_none(), || format!("status tells: {}", said.stdout));
        let again = machine.install(&token, &["--confirm", "600"])?;
        self.says("join --install --confirm again", &again.said, 0, &["not applied"]);
        let said = command(machine, &["confirm"])?;
        self.says("confirm", &said, 0, &["confirmed"]);
        let said = command(machine, &["confirm"])?;
        self.says("confirm twice", &said, 0, &["nothing to confirm"]);
        let said = command(machine, &["status", "-o", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&said.stdout)?;
        self.promises.hold(status["confirm_within_ms"].is_null(), || {
            format!("nothing is left to confirm: {status}")
        });

        setting.talk.step("a second install on a machine that is down");
        let said = command(machine, &["down"])?;
        self.says("down of an installed machine", &said, 0, &["towline up"]);
        machine.agent = None;
        let again = machine.install(&token, &[])?;
        self.says("install while down", &again.said, 1, &["towline up"]);
        machine.agent = None;
        let said = command(machine, &["up"])?;
        self.says("up of an installed machine", &said, 0, &[]);
        machine.boot()?;

        setting.talk.step("leave disables the units");
        self.promises.hold(machine.is_enabled(), || "install enables the units".to_owned());
        let root = machine.root.display().to_string();
        wait_for("the agent's answer", START_LIMIT, || {
            let said = command(machine, &["status", "-o", "json"])?;
            let status: serde_json::Value = serde_json::from_str(&said.stdout).unwrap_or_default();
            Ok((status["controller"]["connected"] == true).then_some(()))
        })?;
        let said = command(machine, &["leave", "--root", &root])?;
        self.says("leave of an installed machine", &said, 0, &["disabled towline.service"]);
        self.promises.hold(!machine.is_enabled(), || "leave disables the units".to_owned());
        self.is_open("leave of an installed machine", place)?;
        machine.agent = None;
        self.is_gone(controller, "worker-b")
    }

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
            setting.talk.step("a join that nobody confirms");
            let token = controller.operator().token("dc-b")?;
            let seconds = if reboots { "600" } else { CONFIRM };
            let ran = machine.install(&token, &["--confirm", seconds])?;
            // The deadline may pass while the command waits for the mesh.
            self.promises.hold(ran.said.status.success() || !reboots, || {
                format!("join --confirm: {}", ran.talk())
            });
            if reboots {
                setting.talk.step("a reboot before the confirmation");
                machine.agent.as_mut().context("no agent")?.kill()?;
                machine.agent = None;
                let file = state.join("confirm-by");
                let text = std::fs::read_to_string(&file)?;
                let mut join: serde_json::Value = serde_json::from_str(&text)?;
                join["boot_id"] = "another boot".into();
                std::fs::write(&file, join.to_string())?;
                let said = machine.towline(&["guard"]).run(place, COMMAND_LIMIT)?;
                self.says("guard before the undoing", &said, 0, &["not confirmed"]);
                let said = machine.towline(&["confirm"]).run(place, COMMAND_LIMIT)?;
                self.says("confirm too late", &said, 1, &["not confirmed in time"]);
                machine.boot()?;
            }
            let ended = machine.agent.take().context("no agent")?.wait(START_LIMIT)?;
            self.promises.hold(ended.success(), || format!("the agent undoes the join: {ended}"));
            self.is_open("the undoing", place)?;
            self.is_gone(controller, "worker-b")?;
            self.promises.hold(!state.join("membership.json").exists(), || {
                "an undone join is forgotten".to_owned()
            });
            let said = machine.towline(&["confirm"]).run(place, COMMAND_LIMIT)?;
            self.says("confirm after the undoing", &said, 1, &["not confirmed in time"]);
            let said =
                machine.towline(&["after-stop", "--root", &root]).run(place, COMMAND_LIMIT)?;
            self.says("the unit's end", &said, 0, &["disabled towline.service"]);
            self.promises.hold(!machine.is_enabled(), || "undoing disables the units".to_owned());
            let said = machine.towline(&["guard"]).run(place, COMMAND_LIMIT)?;
            self.says("guard after the undoing", &said, 0, &["has not joined"]);
        }
        setting.talk.step("a join after one that was undone");
        let token = controller.operator().token("dc-b")?;
        let ran = machine.install(&token, &[])?;
        self.says("join after an undone one", &ran.said, 0, &["joined as"]);
        Ok(())
    }

    /// The agent ends by itself, with this status.
    fn ends(&mut self, worker: &mut Node, status: i32) -> anyhow::Result<()> {
        let agent = worker.take_agent().context("no agent")?;
        let ended = agent.wait(START_LIMIT)?;
        self.promises.hold(ended.code() == Some(status), || format!("the agent ends: {ended}"));
        Ok(())
    }

    fn is_gone(&mut self, controller: &Controller, name: &str) -> anyhow::Result<()> {
        let nodes = controller.operator().nodes()?;
        self.promises.hold(nodes.iter().all(|node| node.name != name), || {
            format!("the controller knows no {name}: {nodes:?}")
        });
        Ok(())
    }
}

/// What of ours is in the network of a host, a word each.
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
    let said = node.command_ok(&[command, "-o", "json"])?;
    serde_json::from_str(&said).context("no JSON")
}

impl Figures for Departure {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        format!("commands compared  {}", self.commands)
    }
}
