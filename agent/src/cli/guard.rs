//! Implements `towline guard` and `towline node-ip`.

use std::env::VarError;
use std::net::IpAddr;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use ipnet::IpNet;
use serde::Serialize;
use towline_proto::pb;
use towline_service::log::LogArgs;
use towline_service::output::{self, Format};

use super::examples;
use super::local::{status_error, with_agent};
use crate::config::{Addressing, Config};
use crate::guard::{self, Guarded};
use crate::node_ip;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct GuardArgs {
    #[command(subcommand)]
    command: Option<GuardCommand>,
    /// Keep running, and restore what other programs remove while no agent runs
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, Subcommand)]
enum GuardCommand {
    /// List the networks that are guarded, each with the reason
    #[command(after_help = examples::GUARD_LIST)]
    List {
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Stop guarding a network that a node announced last and nobody holds now
    #[command(after_help = examples::GUARD_RELEASE)]
    Release {
        /// Network that `towline guard list` shows as withdrawn
        #[arg(value_name = "CIDR")]
        network: IpNet,
    },
}

#[derive(Debug, Args)]
pub(super) struct NodeIpArgs {
    /// Only the IPv4 address
    #[arg(short = '4', long)]
    ipv4: bool,
    /// Only the IPv6 address
    #[arg(short = '6', long, conflicts_with = "ipv4")]
    ipv6: bool,
    /// Only addresses of the families that this node's cluster has ([kubernetes] node_ip_families)
    #[allow(rustdoc::broken_intra_doc_links, reason = "text of the command line, not a link")]
    #[arg(long, conflicts_with_all = ["ipv4", "ipv6"])]
    kubelet: bool,
    /// Print a line for an environment file: KUBELET_EXTRA_ARGS of this command's environment, with
    /// --node-ip added unless it is there
    #[arg(long, conflicts_with = "output")]
    kubelet_env: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct NodeIp {
    /// Kind of the addresses: `overlay` or `node-ip`.
    addressing: Addressing,
    /// IPv4 address by which other nodes reach this one.
    ipv4: Option<IpAddr>,
    /// IPv6 address by which other nodes reach this one.
    ipv6: Option<IpAddr>,
}

pub(super) fn guard(config: &Config, args: &GuardArgs) -> anyhow::Result<()> {
    match &args.command {
        None => {}
        Some(GuardCommand::List { output }) => return list(config, *output),
        Some(GuardCommand::Release { network }) => return release(config, *network),
    }
    args.log.init(config.log, "info")?;
    if args.watch {
        return guard::watch(config);
    }
    let guarded = guard::run(config)?;
    if matches!(guarded, Guarded::Installed { is_whole: false, .. }) {
        bail!("{guarded}");
    }
    eprintln!("{guarded}");
    Ok(())
}

/// Prints what a running agent guards.
fn list(config: &Config, output: Format) -> anyhow::Result<()> {
    let networks = with_agent(&config.socket, async |mut agent| {
        let answer = agent.guards(pb::GuardsRequest {}).await;
        Ok(answer.map_err(|status| status_error(&status))?.into_inner().networks)
    })?;
    let row = |guarded: &pb::GuardedNetwork| {
        let node = output::or_dash(Some(&guarded.node));
        vec![guarded.network.clone(), guarded.reason.clone(), node]
    };
    let header = ["NETWORK", "REASON", "NODE"];
    Ok(output::write(output, &networks, |_| output::table(&header, networks.iter().map(row)))?)
}

/// Has a running agent release a network.
fn release(config: &Config, network: IpNet) -> anyhow::Result<()> {
    let request = pb::ReleaseGuardRequest { network: network.to_string() };
    with_agent(&config.socket, async |mut agent| {
        agent.release_guard(request).await.map_err(|status| status_error(&status))?;
        Ok(())
    })?;
    eprintln!("{network} is no longer guarded");
    Ok(())
}

/// Prints the node IPs in the format of the kubelet's `--node-ip`: one address, or one of each
/// family with a comma in between.
pub(super) fn node_ip(config: &Config, args: &NodeIpArgs) -> anyhow::Result<()> {
    let found =
        if args.kubelet { node_ip::for_kubelet(config)? } else { node_ip::in_force(config)? };
    let wanted = NodeIp {
        addressing: config.node.addressing,
        ipv4: found.v4.filter(|_| !args.ipv6),
        ipv6: found.v6.filter(|_| !args.ipv4),
    };
    let addresses: Vec<_> =
        wanted.ipv4.iter().chain(&wanted.ipv6).map(ToString::to_string).collect();
    if addresses.is_empty() {
        let family = if args.ipv6 { "IPv6" } else { "IPv4" };
        return Err(anyhow::anyhow!("set node.node_ips"))
            .with_context(|| format!("this node has no {family} address"));
    }
    let addresses = addresses.join(",");
    if args.kubelet_env {
        let own = match std::env::var(KUBELET_EXTRA_ARGS) {
            Ok(own) => own,
            Err(VarError::NotPresent) => String::new(),
            Err(VarError::NotUnicode(_)) => bail!("{KUBELET_EXTRA_ARGS} is not UTF-8"),
        };
        return Ok(output::print(&kubelet_environment(&own, &addresses))?);
    }
    Ok(output::write(args.output, &wanted, |_| addresses)?)
}

/// Variable with which kubeadm's unit for the kubelet takes more arguments.
const KUBELET_EXTRA_ARGS: &str = "KUBELET_EXTRA_ARGS";

/// Returns a line of an environment file (systemd.exec(5), `EnvironmentFile=`) with the operator's
/// own arguments of the kubelet, and with `--node-ip` if they have none.
fn kubelet_environment(own: &str, addresses: &str) -> String {
    let mut arguments = own.split_whitespace().collect::<Vec<_>>().join(" ");
    let has_node_ip = own
        .split(|c: char| c.is_whitespace() || matches!(c, '"' | '\''))
        .any(|word| word == "--node-ip" || word.starts_with("--node-ip="));
    if !has_node_ip {
        let separator = if arguments.is_empty() { "" } else { " " };
        arguments.push_str(&format!("{separator}--node-ip={addresses}"));
    }
    // In double quotes, systemd takes a backslash before these for an escape.
    let mut quoted = String::with_capacity(arguments.len());
    for c in arguments.chars() {
        if matches!(c, '"' | '\\' | '`' | '$') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    format!("{KUBELET_EXTRA_ARGS}=\"{quoted}\"\n")
}

#[cfg(test)]
mod tests {
    use super::kubelet_environment;

    #[test]
    fn the_operators_arguments_of_the_kubelet_are_kept() {
        let cases = [
            ("", "--node-ip=198.19.0.2"),
            ("--max-pods=42  --v=3", "--max-pods=42 --v=3 --node-ip=198.19.0.2"),
            // The operator decides.
            ("--node-ip=10.0.0.9 --v=3", "--node-ip=10.0.0.9 --v=3"),
            ("--node-ip 10.0.0.9", "--node-ip 10.0.0.9"),
            ("--node-ips-are-fine", "--node-ips-are-fine --node-ip=198.19.0.2"),
            (
                r#"--node-labels="a=b" --x=\d$"#,
                r#"--node-labels=\"a=b\" --x=\\d\$ --node-ip=198.19.0.2"#,
            ),
        ];
        for (own, expected) in cases {
            assert_eq!(
                kubelet_environment(own, "198.19.0.2"),
                format!("KUBELET_EXTRA_ARGS=\"{expected}\"\n"),
                "{own}"
            );
        }
    }
}
