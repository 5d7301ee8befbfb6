//! Implements `towline trace`: what happens to a packet from this node to an address, and to its answer.

use anyhow::bail;
use clap::Args;
use ipnet::IpNet;
use towline_proto::pb;
use towline_service::color::Palette;
use towline_service::output::{self, Format};

use super::{Versioned, doctor, local};
use crate::config::{Addressing, Config};
use crate::doctor::{Agent, examine};
use crate::trace::destination::Destination;
use crate::trace::{Input, Outcome, OwnAddresses, Step, Trace, kernel, trace};

#[derive(Debug, Args)]
pub(super) struct TraceArgs {
    /// Name of a node or an IP address, with or without a TCP port. An IPv6 address that has a port is
    /// in brackets
    #[arg(value_name = "NAME|IP[:PORT]")]
    destination: Destination,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Prints the steps. Succeeds unless the packet or its answer is dropped, or leaves in clear.
pub(super) fn run(config: &Config, args: &TraceArgs) -> anyhow::Result<()> {
    let answers = local::ask(&config.socket)?;
    let target = args.destination.resolve(&answers)?;
    let kernel = kernel::read(config, &target)?;
    let facts = doctor::facts(config, Agent::Answered(Box::new(answers.clone())));
    let checks = examine(&facts);
    let own = own_addresses(config, answers.status.kubernetes.as_ref());
    let input =
        Input { target: &target, answers: &answers, checks: &checks, own: &own, kernel: &kernel };
    let traced = trace(input);
    let report = Versioned::new(&traced);
    output::write(args.output, &report, |wide| text(&traced, wide, Palette::of_stdout()))?;
    match traced.outcome {
        Outcome::Dropped => {
            bail!(
                "a packet to {} is dropped, or its answer is: see the steps above",
                traced.address
            )
        }
        Outcome::InClear => {
            bail!("a packet to {} leaves in clear: see the steps above", traced.address)
        }
        Outcome::Tunnel | Outcome::Outside | Outcome::Local => Ok(()),
    }
}

/// Returns the networks of this node in the mesh that are known without the agent's help.
fn own_addresses(config: &Config, kubernetes: Option<&pb::KubernetesStatus>) -> OwnAddresses {
    let node = &config.node;
    let addresses = node.addresses.iter().chain(&node.node_ips).copied().map(IpNet::from);
    let pods = kubernetes.into_iter().flat_map(|kubernetes| &kubernetes.pod_networks);
    let pods = pods.filter_map(|net| net.parse().ok());
    OwnAddresses {
        networks: addresses.chain(node.prefixes.iter().copied()).chain(pods).collect(),
        is_incomplete: node.addressing == Addressing::NodeIp && node.node_ips.is_empty(),
        is_masquerading: node.masquerade_local,
    }
}

fn text(trace: &Trace, wide: bool, palette: Palette) -> String {
    let port = trace.port.map(|port| format!(", TCP port {port}")).unwrap_or_default();
    let peer = output::or_dash(trace.peer.as_ref());
    let mut text = format!("to {} ({}{port}), peer {peer}\n", trace.destination, trace.address);
    steps(&mut text, &trace.outgoing, wide, palette);
    if !trace.incoming.is_empty() {
        text.push_str(&format!("\nfrom {}: what this node knows of it\n", trace.address));
        steps(&mut text, &trace.incoming, wide, palette);
    }
    let outcome = match trace.outcome {
        Outcome::Tunnel => "it travels through the tunnel",
        Outcome::Outside => "it leaves outside the tunnel: it does not belong to the mesh",
        Outcome::InClear => {
            "it leaves in clear, outside the tunnel, although it belongs to the mesh"
        }
        Outcome::Local => "it stays on this host",
        Outcome::Dropped => "it is dropped",
    };
    text.push_str(&format!("\nresult: {outcome}\n"));
    if let Some(remedy) = &trace.remedy {
        text.push_str(&format!("what to do: {remedy}\n"));
    }
    text
}

fn steps(text: &mut String, steps: &[Step], wide: bool, palette: Palette) {
    for step in steps {
        let word = palette.word(&format!("{:9}", step.fate.word()));
        let code = step.cause.as_ref().filter(|_| wide);
        let code = code.map(|code| format!(" [{code}]")).unwrap_or_default();
        text.push_str(&format!("  {word}{:11}{}{code}\n", step.name, step.finding));
    }
}
