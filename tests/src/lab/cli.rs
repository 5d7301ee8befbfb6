//! The command line of `cargo lab`.
//!
//! Exit status: 0 if every promise held, 1 if one did not, 2 for wrong usage, 3 if this machine
//! forbids the lab.

use std::os::unix::process::CommandExt;
use std::process::{self, ExitCode};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::binaries::{Binaries, Profile};
use super::interrupt;
use super::keep_running::Kept;
use super::output::{ProgressOutput, line};
use super::package;
use super::privilege::acquire;
use super::report::{Forbidden, finish, print};
use super::scenario::{
    Setting, attack, bench, bootstrap, coexist, crash, demo, departure, failover, idle, interop,
    kubernetes, leak, many, mtu, nat, nodes, plan, vm,
};
use super::traffic::random_bytes;

/// Runs the real binaries on hosts that are network namespaces, and removes everything afterwards.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", version, disable_help_subcommand = true)]
struct Command {
    #[command(subcommand)]
    what: What,
    /// Use a user namespace even as root.
    #[arg(long, global = true)]
    rootless: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Lists the scenarios, one per line.
    List,
    /// Joins two workers behind NAT to a control plane, and sends encrypted traffic between them.
    Demo(DemoArguments),
    /// Connects nodes behind every class of NAT, and checks the path that is chosen.
    Nat(NatArguments),
    /// Breaks paths in various ways, and measures how long the traffic is interrupted.
    Failover {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Measures what an agent costs in a mesh of 1,000 nodes (release build).
    Many {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Tests paths with a small MTU, with and without ICMP "too big" messages.
    Mtu {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Measures what agents and the controller cost while the mesh is idle (release build).
    Idle {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Kills processes with `kill -9` at random moments while records change (release build).
    Crash {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Number of kills.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        kills: u32,
        /// Seed for the choice of victims and moments [default: random].
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Joins a clean machine with one command, and repeats it offline, with a used token and after
    /// a reboot.
    Bootstrap {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Compares Towline with other userspace WireGuard implementations and with a minimal tunnel
    /// (release build).
    Bench {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        options: bench::Options,
    },
    /// Runs one end of the minimal tunnel that `bench` compares with.
    #[command(hide = true)]
    Limit(bench::limit::Limit),
    /// Tests other WireGuard implementations as static peers: handshakes, roaming, cookies, NAT.
    Interop {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Run only these implementations and cases.
        only: Vec<String>,
    },
    /// Kills agents, flushes guards and sends spoofed packets: nothing may leave in clear, and
    /// nothing spoofed may come in.
    Leak {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Duration in seconds.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3_600))]
        seconds: u64,
        /// Seed for the choice of actions and moments [default: random].
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Attacks a node as strangers, neighbours, local users, pods and members: each attempt must
    /// fail.
    Attack {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        options: attack::Options,
    },
    /// Sends over every connection of a hybrid cluster, in both kinds of addressing: each must
    /// arrive by the promised path.
    Nodes {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Run only this kind of addressing.
        #[arg(long, value_enum)]
        addressing: Option<nodes::Addressing>,
        /// Run only with this `rp_filter` on the uplinks.
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..=2))]
        rp_filter: Option<u8>,
    },
    /// Flushes and deletes Towline's state as firewalls, network managers and operators do: it must
    /// be restored, and the state of others must stay untouched.
    #[command(alias = "cohabit")]
    Coexist {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Run only the cases that need no program of the host.
        #[arg(long)]
        netlink: bool,
    },
    /// Measures what a host's network configuration costs with 1,000 peers and 5,000 prefixes
    /// (release build).
    Plan {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Measure with this program itself instead of a release build.
        #[arg(long, hide = true)]
        here: bool,
    },
    /// Runs down, up, leave and a join that has to be confirmed, in every order, and checks each
    /// exit status.
    Departure {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Runs a real API server and two workers behind NAT: each agent must follow its own Node.
    Kubernetes {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Boots machines under QEMU: real kernels, systemd, power cuts, hosts of every kind.
    Vm {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        options: vm::Options,
    },
    /// Builds the static programs, the Debian package and the OCI image, and checks their contents.
    Package {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Output directory.
        #[arg(long, default_value = "target/package/out")]
        out: std::path::PathBuf,
    },
    /// Opens a shell or runs a command on a host of a lab that `demo --keep` keeps running.
    Shell {
        /// Name of the host: cp, worker-a, worker-b, router-a, router-b or internet.
        node: String,
        /// Command to run instead of a shell.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct DemoArguments {
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// Keep the lab running afterwards, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Megabytes to send in each direction, over each tunnel and address family.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    megabytes: u64,
}

#[derive(Debug, Args)]
struct NatArguments {
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// Test every pair of classes on each address family.
    #[arg(long)]
    full: bool,
    /// Round-trip time of the links, in milliseconds.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=2_000))]
    rtt: u32,
    /// Packet loss of the links, in percent.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
}

/// Parses the command line, runs the command, and returns the exit status.
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
        What::Coexist { json, netlink } => {
            let setting = prepare(rootless, Profile::Dev)?;
            let figures = coexist::run(&setting, netlink)?;
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

/// Output of `lab list`. A line mentions root if its scenario needs the real root.
const LIST: &str = "\
demo       join two workers behind NAT to a control plane, and send encrypted traffic
nat        connect nodes behind every class of NAT, and check the path that is chosen
many       measure what an agent costs in a mesh of 1,000 nodes
mtu        test paths with a small MTU, with and without ICMP messages about it
failover   break paths, and measure how long the traffic is interrupted
idle       measure what agents and the controller cost while the mesh is idle
bench      compare with other userspace WireGuards: speed, latency, processor time, memory
crash      kill -9 at 100 random moments while records change: no acknowledged write is lost
interop    wireguard-go, boringtun and gotatun as static peers (root: sockets in /var/run)
leak       kill agents, flush guards, spoof: nothing leaves in clear, nothing spoofed comes in
attack     attack a node as strangers, neighbours, local users, pods and members
nodes      send over every connection of a hybrid cluster, in both kinds of addressing
coexist    flush and delete Towline's state as other programs do: it is restored
plan       measure what a host's network configuration costs with 5,000 prefixes
bootstrap  turn a clean machine into a node with one command; reboot it offline
departure  down, up, leave and confirm, in every order, with every exit status
kubernetes a real API server: agents follow their own Nodes (needs etcd and Go)
vm         boot machines under QEMU: kernels, systemd, power cuts (needs QEMU and mmdebstrap)
package    build a Debian package and an OCI image, and check their contents (release build)
";

fn given_or_random(seed: Option<u64>) -> anyhow::Result<u64> {
    match seed {
        Some(seed) => Ok(seed),
        None => Ok(u32::from_be_bytes(random_bytes()?).into()),
    }
}

/// Acquires the right to create namespaces, then builds the daemons: a refusal must not come after
/// minutes of building.
fn prepare(rootless: bool, profile: Profile) -> anyhow::Result<Setting> {
    interrupt::install()?;
    let rank = acquire(rootless)?;
    let binaries = Binaries::build(profile)?;
    Ok(Setting { rank, binaries, output: ProgressOutput::new() })
}
