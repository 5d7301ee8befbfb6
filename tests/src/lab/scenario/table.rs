//! The table of scenarios: `cargo lab list`, the subcommands and their arguments are made of it.

use std::os::unix::process::CommandExt;
use std::process::{self, ExitCode};
use std::sync::Arc;

use anyhow::Context;
use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::selection::{Entry, Selection, list};
use super::{
    Setting, attack, bench, bootstrap, cluster, coexist, crash, demo, departure, explain, failover,
    flood, ha, hosts, idle, interop, kubernetes, leak, many, mixed, mtu, nat, nodes, outage, page,
    plan, scale, vm,
};
use crate::lab::binaries::{Binaries, Profile};
use crate::lab::interrupt;
use crate::lab::output::ProgressOutput;
use crate::lab::package;
use crate::lab::privilege::acquire;
use crate::lab::report::{Figures, WrongUsage, finish, print};

/// Flags that every command takes, before or after its name.
#[derive(Debug, Clone, Copy)]
pub struct Flags {
    /// If set, prints one JSON object instead of text.
    pub json: bool,
    /// If set, uses a user namespace even as root.
    pub rootless: bool,
}

/// A scenario, as a row of [`SCENARIOS`].
#[derive(Debug)]
pub struct Scenario {
    /// Name of the subcommand.
    pub name: &'static str,
    /// Former names of the subcommand, which still work.
    pub aliases: &'static [&'static str],
    /// Description in one line, for `lab list` and `lab --help`. It says what the scenario needs
    /// beyond namespaces: the real root, other programs, a release build.
    pub help: &'static str,
    /// Adds the scenario's own arguments to its subcommand.
    pub arguments: fn(Command) -> Command,
    /// Runs the scenario, prints its figures, and returns the exit status.
    pub run: fn(&ArgMatches, Flags) -> anyhow::Result<ExitCode>,
}

/// All scenarios, in the order of `lab list`.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "demo",
        aliases: &[],
        help: "Join two workers behind NAT to a control plane, and send encrypted traffic",
        arguments: demo::Options::augment_args,
        run: |matches, flags| on_hosts(Profile::Dev, demo::run, matches, flags),
    },
    Scenario {
        name: "nat",
        aliases: &[],
        help: "Connect nodes behind every class of NAT, and check the path that is chosen",
        arguments: nat::Options::augment_args,
        run: |matches, flags| on_hosts(Profile::Dev, nat::run, matches, flags),
    },
    Scenario {
        name: "many",
        aliases: &[],
        help: "Measure what an agent costs in a mesh of 1,000 nodes (release build)",
        arguments: none,
        run: |_, flags| on_plain_hosts(Profile::Release, many::run, flags),
    },
    Scenario {
        name: "mtu",
        aliases: &[],
        help: "Test paths with a small MTU, with and without ICMP messages about it",
        arguments: none,
        run: |_, flags| on_plain_hosts(Profile::Dev, mtu::run, flags),
    },
    Scenario {
        name: "failover",
        aliases: &[],
        help: "Break paths, and measure how long the traffic is interrupted",
        arguments: none,
        run: |_, flags| on_plain_hosts(Profile::Dev, failover::run, flags),
    },
    Scenario {
        name: "outage",
        aliases: &[],
        help: "Take all controllers away while nodes reboot and roam; bring back one that lost its store",
        arguments: none,
        run: |_, flags| on_plain_hosts(Profile::Dev, outage::run, flags),
    },
    Scenario {
        name: "mixed",
        aliases: &[],
        help: "Let agents and controllers of an earlier version work with these (needs the git history)",
        arguments: none,
        run: |_, flags| {
            // A refusal must not come after minutes of building.
            mixed::require_history()?;
            on_plain_hosts(Profile::Dev, mixed::run, flags)
        },
    },
    Scenario {
        name: "ha",
        aliases: &[],
        help: "Kill, pause and cut off each of three controllers and three etcd members (needs etcd)",
        arguments: ha::Options::augment_args,
        run: run_ha,
    },
    Scenario {
        name: "idle",
        aliases: &[],
        help: "Measure what agents and controller cost while the mesh is idle (release build)",
        arguments: none,
        run: |_, flags| on_plain_hosts(Profile::Release, idle::run, flags),
    },
    Scenario {
        name: "bench",
        aliases: &[],
        help: "Compare speed, latency and cost with other userspace WireGuards (release build)",
        arguments: bench::Options::augment_args,
        run: |matches, flags| on_hosts(Profile::Bench, bench::run, matches, flags),
    },
    Scenario {
        name: "crash",
        aliases: &[],
        help: "Kill -9 at 100 random moments: no acknowledged write is lost (release build)",
        arguments: crash::Options::augment_args,
        run: |matches, flags| on_hosts(Profile::Release, crash::run, matches, flags),
    },
    Scenario {
        name: "interop",
        aliases: &[],
        help: "Test wireguard-go, boringtun and gotatun as static peers (root: sockets in /var/run)",
        arguments: interop::Options::augment_args,
        run: |matches, flags| on_hosts(Profile::Dev, interop::run, matches, flags),
    },
    Scenario {
        name: "leak",
        aliases: &[],
        help: "Kill agents, flush guards, spoof: nothing leaves in clear, nothing spoofed comes in",
        arguments: leak::Options::augment_args,
        run: |matches, flags| on_hosts(Profile::Dev, leak::run, matches, flags),
    },
    Scenario {
        name: "attack",
        aliases: &[],
        help: "Attack a node as strangers, neighbours, local users, pods, members and controllers",
        arguments: Selection::augment_args,
        run: |matches, flags| on_cases(&attack::entries(), attack::run, matches, flags),
    },
    Scenario {
        name: "flood",
        aliases: &[],
        help: "Flood a controller and a node: others work on, and can join (release build)",
        arguments: flood::Options::augment_args,
        run: run_flood,
    },
    Scenario {
        name: "hosts",
        aliases: &[],
        help: "Join hosts with many links, odd addresses, firewalls and NATs",
        arguments: Selection::augment_args,
        run: |matches, flags| on_cases(&hosts::entries(), hosts::run, matches, flags),
    },
    Scenario {
        name: "explain",
        aliases: &[],
        help: "Break meshes in 44 ways, and check that a command names each true cause",
        arguments: explain::Options::augment_args,
        run: run_explain,
    },
    Scenario {
        name: "nodes",
        aliases: &[],
        help: "Send over every connection of a hybrid cluster, in both kinds of addressing",
        arguments: nodes::Options::augment_args,
        run: |matches, flags| on_hosts(Profile::Dev, nodes::run, matches, flags),
    },
    Scenario {
        name: "coexist",
        aliases: &["cohabit"],
        help: "Flush and delete Towline's state as other programs do: it is restored",
        arguments: coexist::Options::augment_args,
        run: |matches, flags| on_hosts(Profile::Dev, coexist::run, matches, flags),
    },
    Scenario {
        name: "scale",
        aliases: &[],
        help: "Measure one controller with thousands of agents (release build)",
        arguments: scale::Options::augment_args,
        run: run_scale,
    },
    Scenario {
        name: "plan",
        aliases: &[],
        help: "Measure what a host's network costs with 5,000 prefixes (release build)",
        arguments: plan::Options::augment_args,
        run: run_plan,
    },
    Scenario {
        name: "page",
        aliases: &[],
        help: "Load the controller's web page of 1,000 nodes (release build; needs Chromium)",
        arguments: page::Options::augment_args,
        run: |matches, flags| {
            interrupt::install()?;
            finish(&page::run(&page::Options::from_arg_matches(matches)?)?, flags.json)
        },
    },
    Scenario {
        name: "bootstrap",
        aliases: &[],
        help: "Turn a clean machine into a node with one command; reboot it offline",
        arguments: none,
        run: |_, flags| on_plain_hosts(Profile::Dev, bootstrap::run, flags),
    },
    Scenario {
        name: "departure",
        aliases: &[],
        help: "Run down, up, leave and confirm, in every order, and check every exit status",
        arguments: none,
        run: |_, flags| on_plain_hosts(Profile::Dev, departure::run, flags),
    },
    Scenario {
        name: "kubernetes",
        aliases: &[],
        help: "Run a real API server: agents follow their own Nodes (needs etcd and Go)",
        arguments: none,
        run: |_, flags| on_plain_hosts(Profile::Dev, kubernetes::run, flags),
    },
    Scenario {
        name: "cluster",
        aliases: &[],
        help: "Run a whole Kubernetes cluster (root; needs etcd, containerd, runc, CNI plugins and Go)",
        arguments: cluster::Options::augment_args,
        run: |matches, flags| on_hosts(Profile::Dev, cluster::run, matches, flags),
    },
    Scenario {
        name: "vm",
        aliases: &[],
        help: "Boot machines: kernels, systemd, power cuts (needs QEMU and mmdebstrap)",
        arguments: vm::Options::augment_args,
        run: |matches, flags| {
            let options = vm::Options::from_arg_matches(matches)?;
            if options.list {
                return show(&vm::list());
            }
            finish(&vm::run(&options)?, flags.json)
        },
    },
    Scenario {
        name: "package",
        aliases: &[],
        help: "Build a Debian package and an OCI image, and check them (release build)",
        arguments: package::Options::augment_args,
        run: |matches, flags| {
            finish(&package::run(&package::Options::from_arg_matches(matches)?)?, flags.json)
        },
    },
];

/// Adds no arguments.
fn none(command: Command) -> Command {
    command
}

/// Runs a scenario that builds its own hosts, and prints its figures after they were removed.
fn on_hosts<O: FromArgMatches, F: Figures>(
    profile: Profile,
    run: fn(&Setting, &O) -> anyhow::Result<F>,
    matches: &ArgMatches,
    flags: Flags,
) -> anyhow::Result<ExitCode> {
    let options = O::from_arg_matches(matches)?;
    let setting = prepare(flags, profile)?;
    let figures = run(&setting, &options)?;
    drop(setting);
    finish(&figures, flags.json)
}

/// Runs the selected cases of a scenario, or prints the list of all. A name that selects no case is
/// refused before anything is built.
fn on_cases<F: Figures>(
    entries: &[Entry],
    run: fn(&Setting, &Selection) -> anyhow::Result<F>,
    matches: &ArgMatches,
    flags: Flags,
) -> anyhow::Result<ExitCode> {
    let selection = Selection::from_arg_matches(matches)?;
    if selection.list {
        return show(&list(entries));
    }
    selection.check(entries)?;
    on_hosts(Profile::Dev, run, matches, flags)
}

/// Runs `explain`, keeps a broken mesh running, or prints the list of its cases.
fn run_explain(matches: &ArgMatches, flags: Flags) -> anyhow::Result<ExitCode> {
    let options = explain::Options::from_arg_matches(matches)?;
    if options.selection.list {
        return show(&list(&explain::entries()));
    }
    options.check()?;
    if options.keep {
        if flags.json {
            let why = "--keep is for people at a terminal: leave --json out";
            return Err(WrongUsage(why.to_owned()).into());
        }
        let setting = prepare(flags, Profile::Dev)?;
        let shown = explain::keep(&setting, &options);
        drop(setting);
        return show(&shown?);
    }
    on_hosts(Profile::Dev, explain::run, matches, flags)
}

/// Runs `ha`, or prints the list of its cases.
fn run_ha(matches: &ArgMatches, flags: Flags) -> anyhow::Result<ExitCode> {
    let options = ha::Options::from_arg_matches(matches)?;
    let entries = ha::entries();
    if options.selection.list {
        return show(&list(&entries));
    }
    options.selection.check(&entries)?;
    on_hosts(Profile::Dev, ha::run, matches, flags)
}

/// Runs a scenario without arguments of its own, like [`on_hosts`].
fn on_plain_hosts<F: Figures>(
    profile: Profile,
    run: fn(&Setting) -> anyhow::Result<F>,
    flags: Flags,
) -> anyhow::Result<ExitCode> {
    let setting = prepare(flags, profile)?;
    let figures = run(&setting)?;
    drop(setting);
    finish(&figures, flags.json)
}

/// Runs `plan`, which measures its own process: the release build of the lab replaces this process.
fn run_plan(matches: &ArgMatches, flags: Flags) -> anyhow::Result<ExitCode> {
    let plan::Options { here } = plan::Options::from_arg_matches(matches)?;
    if here {
        interrupt::install()?;
        return finish(&plan::run(acquire(flags.rootless)?)?, flags.json);
    }
    let lab = Binaries::build(Profile::Bench)?.lab.context("cargo built no lab")?;
    let flags = [("--json", flags.json), ("--rootless", flags.rootless)];
    let flags = flags.into_iter().filter_map(|(flag, set)| set.then_some(flag));
    let error = process::Command::new(lab).args(["plan", "--here"]).args(flags).exec();
    Err(error).context("cannot start the release build of the lab")
}

/// Runs `scale` with release builds, or with dev builds if its options ask for it.
fn run_scale(matches: &ArgMatches, flags: Flags) -> anyhow::Result<ExitCode> {
    let options = scale::Options::from_arg_matches(matches)?;
    options.check()?;
    let profile = if options.dev { Profile::Dev } else { Profile::Release };
    on_hosts(profile, scale::run, matches, flags)
}

/// Runs `flood` with release builds, or with dev builds if its options ask for it.
fn run_flood(matches: &ArgMatches, flags: Flags) -> anyhow::Result<ExitCode> {
    let options = flood::Options::from_arg_matches(matches)?;
    let entries = flood::entries();
    if options.selection.list {
        return show(&list(&entries));
    }
    options.selection.check(&entries)?;
    let profile = if options.dev { Profile::Dev } else { Profile::Release };
    on_hosts(profile, flood::run, matches, flags)
}

/// Prints a list of cases, or another text that is no figures.
fn show(text: &str) -> anyhow::Result<ExitCode> {
    print(text)?;
    Ok(ExitCode::SUCCESS)
}

/// Acquires the right to create namespaces, then builds the daemons: a refusal must not come after
/// minutes of building.
fn prepare(flags: Flags, profile: Profile) -> anyhow::Result<Setting> {
    interrupt::install()?;
    let rank = acquire(flags.rootless)?;
    let binaries = Binaries::build(profile)?;
    Ok(Setting { rank, binaries, output: Arc::new(ProgressOutput::new()) })
}
