//! Implements `towline guard` and `towline node-ip`.

use std::net::IpAddr;

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Serialize;

use super::output::{self, Format};
use crate::config::{Addressing, Config};
use crate::guard::{self, Guarded};
use crate::node_ip;

#[derive(Debug, Args)]
pub(super) struct GuardArgs {
    /// Keep running, and restore what other programs remove while no agent runs
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Args)]
pub(super) struct NodeIpArgs {
    /// Only the IPv4 address
    #[arg(short = '4', long)]
    ipv4: bool,
    /// Only the IPv6 address
    #[arg(short = '6', long, conflicts_with = "ipv4")]
    ipv6: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct NodeIp {
    addressing: Addressing,
    ipv4: Option<IpAddr>,
    ipv6: Option<IpAddr>,
}

pub(super) fn guard(config: &Config, args: &GuardArgs) -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).without_time().init();
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

/// Prints the node IPs in the format of the kubelet's `--node-ip`: one address, or one of each
/// family with a comma in between.
pub(super) fn node_ip(config: &Config, args: &NodeIpArgs) -> anyhow::Result<()> {
    let found = node_ip::in_force(config)?;
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
    match output::document(args.output, &wanted)? {
        Some(document) => output::print(&document),
        None => output::print(&(addresses.join(",") + "\n")),
    }
}
