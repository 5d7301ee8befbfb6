//! The command line of `cargo lab`.
//!
//! Exit status: 0 every promise held, 1 one did not, 2 wrong usage, 3 this machine forbids it.

use std::os::unix::process::CommandExt;
use std::process::{self, ExitCode};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::binaries::{Binaries, Profile};
use super::interrupt;
use super::keep::Kept;
use super::package;
use super::privilege::acquire;
use super::report::{Forbidden, finish, print};
use super::scenario::{
    Setting, attack, bench, bootstrap, cohabit, crash, demo, departure, failover, idle, interop,
    kubernetes, leak, many, mtu, nat, nodes, plan, vm,
};
use super::talk::{Talk, line};
use super::traffic::random_bytes;

/// Hosts as network namespaces, the real binaries inside them, and nothing left behind.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", version, disable_help_subcommand = true)]
struct Command {
    #[command(subcommand)]
    what: What,
    /// Work in a user namespace even as root.
    #[arg(long, global = true)]
    rootless: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Names the scenarios, a line each.
    List,
    /// Two workers behind NAT join a control plane; traffic flows, sealed.
    Demo(DemoArguments),
    /// A path between any two nodes, whatever NAT they stand behind.
    Nat(NatArguments),
    /// What breaks on a path, and for how long two nodes do not hear of each other.
    Failover {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// What an agent costs in a mesh of 1,000 nodes (release build).
    Many {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Paths that take less than they seem to, with and without a word of it.
    Mtu {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// What agents and controller cost while nothing happens (release build).
    Idle {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// `kill -9` at random moments under a writing load (release build).
    Crash {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// How many.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        kills: u32,
        /// Of victims and moments; random when not given.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// One command on a clean machine; again; offline; with a spent token; after a reboot.
    Bootstrap {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Towline beside other userspace WireGuards and the bare limit (release build).
    Bench {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        options: bench::Options,
    },
    /// One end of the bare limit, for `bench`.
    #[command(hide = true)]
    Limit(bench::limit::Limit),
    /// Towline and every other WireGuard as plain peers: handshakes, roaming, cookies, NAT.
    Interop {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Only these implementations and cases.
        only: Vec<String>,
    },
    /// Agents die, guards are flushed, strangers forge: nothing leaves in clear, nothing comes in.
    Leak {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// For how long, in seconds.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3_600))]
        seconds: u64,
        /// Of acts and moments; random when not given.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Strangers, neighbours, local users, pods and members attack a node: each attempt fails.
    Attack {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        options: attack::Options,
    },
    /// Every arrow of a hybrid cluster, in both addressings: it arrives, and by the promised way.
    Nodes {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// In this addressing only.
        #[arg(long, value_enum)]
        addressing: Option<nodes::Addressing>,
        /// With this `rp_filter` on the uplinks only.
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..=2))]
        rp_filter: Option<u8>,
    },
    /// Firewalls, network managers and operators flush and delete: it is back, and theirs untouched.
    Cohabit {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Only what needs no program.
        #[arg(long)]
        netlink: bool,
    },
    /// What a host's network costs in a mesh of 1,000 peers with 5,000 prefixes (release build).
    Plan {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Measure with this very program, instead of a release build of it.
        #[arg(long, hide = true)]
        here: bool,
    },
    /// Down, up, leave and a join that has to be confirmed: every order, every exit status.
    Departure {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// A real API server, two workers behind NAT: each agent follows its own Node.
    Kubernetes {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Booted machines under QEMU: real kernels, systemd, power cuts, hosts of every kind.
    Vm {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        options: vm::Options,
    },
    /// Builds the static programs, the Debian package and the OCI image, and reads them back.
    Package {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Where to put them.
        #[arg(long, default_value = "target/package/out")]
        out: std::path::PathBuf,
    },
    /// Opens a shell, or runs a command, in a node of a lab that is kept up.
    Shell {
        /// cp, worker-a, worker-b, router-a, router-b or internet.
        node: String,
        /// What to run instead of a shell.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct DemoArguments {
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// Stay up afterwards, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Send this much each way, over each tunnel and address family.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    megabytes: u64,
}

#[derive(Debug, Args)]
struct NatArguments {
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// Every class with each, on each family.
    #[arg(long)]
    full: bool,
    /// Round-trip time of the links, in milliseconds.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=2_000))]
    rtt: u32,
    /// Percent of packets that the links lose.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
}

/// Runs what the command line says.
pub fn main() -> ExitCode {
    let Command { what, rootless } = Command::parse();
    run(what, rootless).unwrap_or_else(|error| {
        line(&format!("{error:#}"));
        ExitCode::from(if error.downcast_ref::<Forbidden>().is_some() { 3 } else { 1 })
    })
}

fn run(what: What, rootless: bool) -> anyhow::Result<ExitCode> {
    match what {
        What::List => {
            print(LIST)?;
            Ok(ExitCode::SUCCESS)
        }
        What::Demo(DemoArguments { json, keep, megabytes }) => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = demo::run(&setting, demo::Options { megabytes, keep })?;
            drop(setting);
            finish(&figures, json)
        }
        What::Nat(NatArguments { json, full, rtt, loss }) => {
            let setting = prepare(rootless, Profile::Dev)?;
            let options = nat::Options { full, rtt_ms: rtt, loss_pct: loss.clamp(0.0, 100.0) };
            let figures = nat::run(&setting, options)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Failover { json } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = failover::run(&setting)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Many { json } => {
            let setting = prepare(rootless, Profile::Release)?;
            let figures = many::run(&setting)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Mtu { json } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = mtu::run(&setting)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Idle { json } => {
            let setting = prepare(rootless, Profile::Release)?;
            let figures = idle::run(&setting)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Crash { json, kills, seed } => {
            let setting = prepare(rootless, Profile::Release)?;
            let seed = given_or_random(seed)?;
            let figures = crash::run(&setting, crash::Options { kills, seed })?;
            drop(setting);
            finish(&figures, json)
        }
        What::Bench { json, options } => {
            let setting = prepare(rootless, Profile::Bench)?;
            let figures = bench::run(&setting, &options)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Limit(limit) => limit.run().map(|()| ExitCode::SUCCESS),
        What::Interop { json, only } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = interop::run(&setting, &only)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Leak { json, seconds, seed } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let options = leak::Options {
                duration: Duration::from_secs(seconds),
                seed: given_or_random(seed)?,
            };
            let figures = leak::run(&setting, options)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Attack { options: attack::Options { list: true, .. }, .. } => {
            print(&attack::list())?;
            Ok(ExitCode::SUCCESS)
        }
        What::Attack { json, options } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = attack::run(&setting, &options)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Nodes { json, addressing, rp_filter } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let both = nodes::Addressing::value_variants().to_vec();
            let options = nodes::Options {
                addressings: addressing.map_or(both, |one| vec![one]),
                rp_filters: rp_filter.map_or_else(|| vec![0, 1, 2], |one| vec![one]),
            };
            let figures = nodes::run(&setting, &options)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Cohabit { json, netlink } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = cohabit::run(&setting, netlink)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Plan { json, here: false } => {
            let lab = Binaries::build(Profile::Bench)?.lab.context("cargo built no lab")?;
            let flags = [("--json", json), ("--rootless", rootless)];
            let flags = flags.into_iter().filter_map(|(flag, set)| set.then_some(flag));
            let error = process::Command::new(lab).args(["plan", "--here"]).args(flags).exec();
            Err(error).context("cannot start the release build of the lab")
        }
        What::Plan { json, here: true } => {
            interrupt::install()?;
            let figures = plan::run(acquire(rootless)?)?;
            finish(&figures, json)
        }
        What::Bootstrap { json } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = bootstrap::run(&setting)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Departure { json } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = departure::run(&setting)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Kubernetes { json } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = kubernetes::run(&setting)?;
            drop(setting);
            finish(&figures, json)
        }
        What::Vm { options, .. } if options.list => {
            print(&vm::list())?;
            Ok(ExitCode::SUCCESS)
        }
        What::Vm { json, options } => finish(&vm::run(&options)?, json),
        What::Package { json, out } => finish(&package::run(&out)?, json),
        What::Shell { node, command } => match Kept::find()?.enter(&node, &command)? {},
    }
}

/// One line each; only those that say so need the real root.
const LIST: &str = "\
demo    two workers behind NAT join a control plane; traffic flows, sealed
nat     a path between any two nodes, whatever NAT they stand behind
many    what an agent costs in a mesh of 1,000 nodes
mtu     paths that take less than they seem to, with and without a word of it
failover  what breaks on a path, and for how long two nodes do not hear of each other
idle    what agents and controller cost while nothing happens
bench   Towline beside other userspace WireGuards: speed, latency, processor time, memory
crash   kill -9 at 100 random moments under a writing load: nothing acknowledged is lost
interop wireguard-go, boringtun and gotatun as plain peers (root: their sockets lie in /var/run)
leak    agents die, guards are flushed, strangers forge: nothing leaves in clear, nothing comes in
attack  strangers, neighbours, local users, pods and members against a node: each attempt fails
nodes   every arrow of a hybrid cluster, in both addressings: it arrives, and by the promised way
cohabit firewalls, network managers and operators flush and delete: it is back, theirs untouched
plan    what a host's network costs with 1,000 peers and 5,000 prefixes: all of it, and one change
bootstrap one command turns a clean machine into a node; it survives offline boots and reboots
departure down, up, leave and a join that has to be confirmed: every order, every exit status
kubernetes a real API server: agents follow their own Nodes (needs etcd and Go)
vm      booted machines under QEMU: kernels, systemd, power cuts (needs QEMU and mmdebstrap)
package the static programs as a Debian package and an OCI image, read back (release build)
";

fn given_or_random(seed: Option<u64>) -> anyhow::Result<u64> {
    match seed {
        Some(seed) => Ok(seed),
        None => Ok(u32::from_be_bytes(random_bytes()?).into()),
    }
}

/// The right to make namespaces first: a refusal should not come after minutes of building.
fn prepare(rootless: bool, profile: Profile) -> anyhow::Result<Setting> {
    interrupt::install()?;
    let rank = acquire(rootless)?;
    let binaries = Binaries::build(profile)?;
    Ok(Setting { rank, binaries, talk: Talk::new() })
}
