//! Plugin of kubectl: `kubectl towline`.
//!
//! `status` shows the objects that `towline-controller publish` writes. The other commands run `towline` in the
//! agent's pod on a node. Everything goes through the `kubectl` of the operator, with its credentials, context and
//! proxies, so the plugin itself needs no access to the cluster or to the mesh.

#![expect(clippy::print_stderr, reason = "diagnostics of the command line")]

mod complete;
mod kubectl;
mod nodes;

use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use towline_service::output::{self, Format, OutputError};

use kubectl::Kubectl;
use nodes::{Node, Path};

/// Shows the mesh of a cluster, and asks the agents on its nodes.
#[derive(Debug, Parser)]
#[command(
    name = "kubectl-towline",
    bin_name = "kubectl towline",
    version,
    max_term_width = 100,
    after_help = EXAMPLES
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// Examples of the help.
const EXAMPLES: &str = "\
Examples:
  kubectl towline status
  kubectl towline peers gpu-1
  kubectl towline trace gpu-1 10.244.2.7:8080";

const STATUS: &str = "\
Examples:
  kubectl towline status
  # for a script
  kubectl towline status -o json";

const PEERS: &str = "\
Examples:
  kubectl towline peers gpu-1
  # of another cluster
  kubectl towline peers gpu-1 --context staging";

const TRACE: &str = "\
Examples:
  # from the node gpu-1 to a port of a pod
  kubectl towline trace gpu-1 10.244.2.7:8080";

const EXPLAIN: &str = "\
Examples:
  # why does gpu-1 not reach the node cp?
  kubectl towline explain gpu-1 cp";

const DOCTOR: &str = "\
Examples:
  kubectl towline doctor gpu-1
  # the checks that do not apply, too
  kubectl towline doctor gpu-1 -o wide";

#[derive(Debug, Args)]
struct Common {
    /// Context of the kubeconfig
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// Kubeconfig of the cluster
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// Namespace of the agents' pods
    #[arg(short, long, global = true, value_name = "NAME", default_value = "towline")]
    namespace: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show every node of the mesh: connected or not, peers up and down
    #[command(after_help = STATUS)]
    Status {
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Show a node's peers; without an agent pod there, the paths of the node that are not direct
    #[command(after_help = PEERS)]
    Peers {
        #[command(flatten)]
        on: On,
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Show which rules, routes and path a packet from a node would take
    #[command(after_help = TRACE)]
    Trace {
        #[command(flatten)]
        on: On,
        /// Name of a peer, or an address
        #[arg(value_name = "NAME|IP[:PORT]")]
        destination: String,
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Explain why a node's peer is down or slow
    #[command(after_help = EXPLAIN)]
    Explain {
        #[command(flatten)]
        on: On,
        /// Name of the peer
        peer: String,
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Check a node and its host
    #[command(after_help = DOCTOR)]
    Doctor {
        #[command(flatten)]
        on: On,
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
}

#[derive(Debug, Args)]
struct On {
    /// Name of the Kubernetes node
    #[arg(value_parser = nodes::name)]
    node: String,
}

/// Returns the definition of the command line.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command line of this process and returns its exit status: 0 done, 1 failed, 2 wrong usage. The status of
/// a command that ran in a pod is passed on. Under the name `kubectl_complete-towline` it completes a command line.
pub fn main() -> ExitCode {
    let mut words = std::env::args_os();
    if words.next().is_some_and(|program| complete::is_asked_for(&program)) {
        let words: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
        return match output::print(&complete::answer(&command(), &words)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    match run(Cli::parse()) {
        Ok(status) => status,
        Err(error) if error.downcast_ref().is_some_and(OutputError::is_broken_pipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kubectl towline: {}", output::error_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let Common { context, kubeconfig, namespace } = cli.common;
    let kubectl = Kubectl::new(context, kubeconfig, namespace);
    match cli.command {
        Command::Status { output } => {
            let mut nodes: Vec<Node> = kubectl.list("towlinenodes")?;
            nodes.sort_by(|a, b| a.node.cmp(&b.node));
            output::write(output, &nodes, |wide| nodes::table(&nodes, wide))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Peers { on, output } => match kubectl.agent(&on.node)? {
            Some(pod) => kubectl.run(&pod, &["peers"], output),
            None => {
                let mut paths: Vec<Path> = kubectl.list("towlinepaths")?;
                paths.retain(|path| path.from == on.node);
                paths.sort_by(|a, b| a.to.cmp(&b.to));
                eprintln!(
                    "no agent pod is on node {}: these are the paths of it that are not direct, \
                     as the controller knows them",
                    on.node
                );
                output::write(output, &paths, |_| nodes::paths_table(&paths))?;
                Ok(ExitCode::SUCCESS)
            }
        },
        Command::Trace { on, destination, output } => {
            on_node(&kubectl, &on.node, &["trace", "--", &destination], output)
        }
        Command::Explain { on, peer, output } => {
            on_node(&kubectl, &on.node, &["explain", "--", &peer], output)
        }
        Command::Doctor { on, output } => on_node(&kubectl, &on.node, &["doctor"], output),
    }
}

/// Runs a command of `towline` in the agent's pod on a node.
fn on_node(
    kubectl: &Kubectl,
    node: &str,
    command: &[&str],
    output: Format,
) -> anyhow::Result<ExitCode> {
    let Some(pod) = kubectl.agent(node)? else {
        let words: Vec<&str> = command.iter().copied().filter(|word| *word != "--").collect();
        bail!(
            "no agent pod is on node {node}, so its agent runs outside of Kubernetes: run `towline {}` on it",
            words.join(" ")
        );
    };
    kubectl.run(&pod, command, output)
}

#[cfg(test)]
mod tests {
    use towline_service::manual;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_command_has_examples_and_they_parse() {
        let program = command();
        for one in std::iter::once(&program).chain(program.get_subcommands()) {
            let lines = manual::examples(one);
            let commands = lines.iter().filter(|line| !line.starts_with('#'));
            let mut has_example = false;
            for line in commands {
                has_example = true;
                let words = line.strip_prefix("kubectl towline ").expect(line);
                let words = std::iter::once("kubectl towline").chain(words.split(' '));
                command().try_get_matches_from(words).expect(line);
            }
            assert!(has_example, "{}", one.get_name());
        }
    }
}
