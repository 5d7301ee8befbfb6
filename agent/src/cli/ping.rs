//! Implements `towline ping NODE`, which probes the path outside of the WireGuard session.

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use towline_proto::pb;
use towline_service::output::{self, Format};

use super::local::{status_error, with_agent};
use crate::config::Config;

#[derive(Debug, Args)]
pub(super) struct PingArgs {
    /// Name of a node, or one of its overlay addresses
    node: String,
    /// Number of probes
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// Milliseconds between probes
    #[arg(short, long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    interval: u32,
    /// Milliseconds to wait for each answer
    #[arg(short, long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    timeout: u32,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct Report {
    node: String,
    sent: usize,
    received: usize,
    probes: Vec<pb::PingResponse>,
}

/// Probes the path. Succeeds if at least one probe was answered.
pub(super) fn run(config: &Config, args: PingArgs) -> anyhow::Result<()> {
    let request = pb::PingRequest {
        node: args.node.clone(),
        count: args.count,
        interval_ms: args.interval,
        timeout_ms: args.timeout,
    };
    let live = matches!(args.output, Format::Table | Format::Wide);
    let node = args.node;
    let probes = with_agent(&config.socket, async |mut agent| {
        let answer = agent.ping(request).await.map_err(|status| status_error(&status))?;
        let mut stream = answer.into_inner();
        let mut probes = Vec::new();
        while let Some(answer) = stream.message().await.map_err(|status| status_error(&status))? {
            if live {
                output::print(&line(&node, &answer))?;
            }
            probes.push(answer);
        }
        Ok(probes)
    })?;
    let received = probes.iter().filter(|probe| probe.rtt_us.is_some()).count();
    let report = Report { node, sent: probes.len(), received, probes };
    if let Some(document) = output::document(args.output, &report)? {
        output::print(&document)?;
    }
    if received == 0 {
        bail!("no answer from {}: run `towline peers` to see why", report.node);
    }
    Ok(())
}

fn line(node: &str, answer: &pb::PingResponse) -> String {
    match answer.rtt_us {
        Some(rtt) => format!(
            "answer from {node} by {} {}: {}",
            answer.path_kind,
            answer.path,
            output::rtt(rtt)
        ),
        None => format!("no answer from {node}: {}", answer.reason),
    }
}
