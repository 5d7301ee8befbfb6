//! The command line of `cargo lab`.
//!
//! Exit status: 0 if every promise held, 1 if one did not, 2 for wrong usage, 3 if this machine
//! forbids the lab.

use std::fmt::Write as _;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::keep_running::Kept;
use super::output::line;
use super::report::{Forbidden, WrongUsage, print};
use super::scenario::bench::limit::Limit;
use super::scenario::table::{Flags, SCENARIOS};

/// Arguments of `shell`.
#[derive(Debug, Args)]
struct Shell {
    /// Name of the host, such as cp, worker-a, router-a or internet. A wrong one lists all.
    node: String,
    /// Command to run instead of a shell.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Returns the command line: a subcommand for each scenario, and those that are no scenarios.
fn command() -> Command {
    let flag = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).help(help).action(ArgAction::SetTrue).global(true)
    };
    let scenarios = SCENARIOS.iter().map(|scenario| {
        let command = Command::new(scenario.name).aliases(scenario.aliases);
        (scenario.arguments)(command).about(scenario.help).long_about(None)
    });
    let limit = Command::new("limit").hide(true);
    Command::new("cargo lab")
        .bin_name("cargo lab")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Run the real binaries on hosts that are network namespaces, and remove everything afterwards")
        .disable_help_subcommand(true)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .arg(flag("json", "Print one JSON object instead of text"))
        .arg(flag("rootless", "Use a user namespace even as root"))
        .subcommand(Command::new("list").about("List the scenarios, one per line"))
        .subcommands(scenarios)
        .subcommand(
            Shell::augment_args(Command::new("shell"))
                .about("Open a shell or run a command on a host of a lab that `demo --keep` or `explain --keep` keeps running"),
        )
        .subcommand(
            Limit::augment_args(limit)
                .about("Run one end of the minimal tunnel that `bench` compares with"),
        )
}

/// Parses the command line, runs the command, and returns the exit status.
pub fn main() -> ExitCode {
    run(&command().get_matches()).unwrap_or_else(|error| {
        line(&format!("{error:#}"));
        ExitCode::from(match () {
            () if error.downcast_ref::<WrongUsage>().is_some() => 2,
            () if error.downcast_ref::<Forbidden>().is_some() => 3,
            () => 1,
        })
    })
}

fn run(matches: &ArgMatches) -> anyhow::Result<ExitCode> {
    let Some((name, matches)) = matches.subcommand() else {
        unreachable!("clap requires a subcommand")
    };
    let flags = Flags { json: matches.get_flag("json"), rootless: matches.get_flag("rootless") };
    if let Some(scenario) = SCENARIOS.iter().find(|scenario| scenario.name == name) {
        return (scenario.run)(matches, flags);
    }
    match name {
        "list" => print(&list(flags)?)?,
        "limit" => Limit::from_arg_matches(matches)?.run()?,
        _ => {
            let Shell { node, command } = Shell::from_arg_matches(matches)?;
            match Kept::find()?.enter(&node, &command)? {}
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the names and descriptions of all scenarios: a line for each, or a JSON object.
fn list(flags: Flags) -> anyhow::Result<String> {
    if flags.json {
        let scenarios = SCENARIOS
            .iter()
            .map(|scenario| serde_json::json!({ "name": scenario.name, "help": scenario.help }));
        let list = serde_json::json!({ "scenarios": scenarios.collect::<Vec<_>>() });
        return Ok(serde_json::to_string_pretty(&list)? + "\n");
    }
    Ok(SCENARIOS.iter().fold(String::new(), |mut text, scenario| {
        let _ = writeln!(text, "{:<10} {}", scenario.name, scenario.help);
        text
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn flags_stand_before_and_after_every_scenario() {
        for scenario in SCENARIOS {
            for line in [
                ["lab", "--json", "--rootless", scenario.name],
                ["lab", scenario.name, "--rootless", "--json"],
                ["lab", "--json", scenario.name, "--rootless"],
            ] {
                let matches = command().try_get_matches_from(line).expect(scenario.name);
                let (name, matches) = matches.subcommand().expect("a subcommand");
                assert_eq!(name, scenario.name);
                assert!(matches.get_flag("json") && matches.get_flag("rootless"), "{line:?}");
            }
        }
    }

    #[test]
    fn every_former_spelling_is_accepted() {
        for line in [
            "demo --json --keep --megabytes 4",
            "nat --full --rtt 40 --loss 0.5 --json",
            "crash --kills 5 --seed 7",
            "interop gotatun roaming_ours --json",
            "interop --engine batch",
            "interop rekey_old_keys_ours --engine both",
            "bench --peer-binary tailscale=/opt/wireguard-go --history figures.jsonl --json",
            "leak --json --seconds 8 --seed 7 --rootless",
            "attack --case inward,sources --json --full",
            "explain --case paths --update-docs --json",
            "explain --keep",
            "explain --keep --case paths/loss --rootless",
            "nodes --addressing node-ip --rp-filter 1 --json",
            "cohabit --netlink",
            "plan --here --json",
            "page --nodes 1000 --rounds 3 --json",
            "vm --case smoke --kernel 6.1 --json",
            "cluster --cni host-gw --proxy nftables --dual-stack --json",
            "cluster --cni flannel",
            "cluster --daemon-set",
            "package --out somewhere",
            "scale --agents 10000 --json",
            "scale --agents 1000,3000,10000 --store redb,etcd --full --plot scale.svg --update-docs",
            "ha --full --agents 30 --case pause,upgrade --json",
            "shell cp towline-controller node list -o json",
            "limit --link l0 --port 1 --to 192.0.2.1:1",
        ] {
            let words = ["lab"].into_iter().chain(line.split(' '));
            command().try_get_matches_from(words).expect(line);
        }
        let nonsense = command().try_get_matches_from(["lab", "demo", "--megabytes", "0"]);
        assert_eq!(nonsense.expect_err("out of range").exit_code(), 2);
    }

    #[test]
    fn the_list_has_a_line_for_each_scenario() {
        let list = list(Flags { json: false, rootless: false }).expect("text");
        assert_eq!(list.lines().count(), SCENARIOS.len());
        assert!(list.lines().all(|line| line.len() <= 100), "{list}");
    }
}
