//! Implements `towline ping NODE`, which probes the path outside of the WireGuard session.

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use towline_proto::code::Coded as _;
use towline_proto::pb;
use towline_service::output::{self, Format};

use super::local::{status_error, with_agent};
use crate::config::Config;
use crate::control::PathKind;

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
    /// Stop at the first answer by a direct path, and fail if there is none
    #[arg(long)]
    until_direct: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct Report {
    /// Name or address as it was given.
    node: String,
    /// Number of probes that were sent.
    sent: usize,
    /// Number of probes that were answered.
    received: usize,
    /// Shortest round-trip time in microseconds; null if nothing was received.
    rtt_min_us: Option<u64>,
    /// Mean round-trip time in microseconds; null if nothing was received.
    rtt_mean_us: Option<u64>,
    /// Longest round-trip time in microseconds; null if nothing was received.
    rtt_max_us: Option<u64>,
    /// Result of each probe, in order.
    probes: Vec<pb::PingResponse>,
}

impl Report {
    fn new(node: String, probes: Vec<pb::PingResponse>) -> Self {
        let times: Vec<u64> = probes.iter().filter_map(|probe| probe.rtt_us).collect();
        Self {
            node,
            sent: probes.len(),
            received: times.len(),
            rtt_min_us: times.iter().min().copied(),
            rtt_mean_us: times.iter().sum::<u64>().checked_div(times.len() as u64),
            rtt_max_us: times.iter().max().copied(),
            probes,
        }
    }
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
    let (node, until_direct) = (args.node, args.until_direct);
    let direct = PathKind::Direct.code();
    let probes = with_agent(&config.socket, async |mut agent| {
        let answer = agent.ping(request).await.map_err(|status| status_error(&status))?;
        let mut stream = answer.into_inner();
        let mut probes = Vec::new();
        while let Some(answer) = stream.message().await.map_err(|status| status_error(&status))? {
            if live {
                output::print(&line(&node, &answer))?;
            }
            let is_direct = answer.path_kind == direct;
            probes.push(answer);
            if until_direct && is_direct {
                break;
            }
        }
        Ok(probes)
    })?;
    let report = Report::new(node, probes);
    output::write(args.output, &report, |_| summary(&report))?;
    match failure(&report, until_direct) {
        Some(failure) => bail!(failure),
        None => Ok(()),
    }
}

/// Returns what failed, and which command explains it.
fn failure(report: &Report, until_direct: bool) -> Option<String> {
    let Report { node, received, probes, .. } = report;
    if *received == 0 {
        return Some(format!("no answer from {node}: run `towline explain {node}` to see why"));
    }
    let is_direct = |probe: &pb::PingResponse| probe.path_kind == PathKind::Direct.code();
    let is_missed = until_direct && !probes.iter().any(is_direct);
    is_missed.then(|| format!("no direct path to {node}: run `towline peer {node}` to see why"))
}

fn summary(report: &Report) -> String {
    let Report { sent, received, .. } = report;
    let lost = (sent - received) * 100 / (*sent).max(1);
    let [min, mean, max] = [report.rtt_min_us, report.rtt_mean_us, report.rtt_max_us]
        .map(|time| output::or_dash(time.map(output::rtt)));
    format!(
        "{received} of {sent} answered, {lost} % lost; round-trip time {min} to {max}, mean {mean}"
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_does_not_answer_is_explained_by_the_command_that_is_named() {
        let silent = Report::new("w1".into(), vec![pb::PingResponse::default()]);
        let wanted = "no answer from w1: run `towline explain w1` to see why";
        assert_eq!(failure(&silent, false).as_deref(), Some(wanted));
        let answer = |path_kind: &str| pb::PingResponse {
            path_kind: path_kind.into(),
            rtt_us: Some(400),
            ..Default::default()
        };
        let relayed = Report::new("w1".into(), vec![answer("relay")]);
        assert_eq!(failure(&relayed, false), None);
        assert!(failure(&relayed, true).is_some_and(|text| text.contains("`towline peer w1`")));
        let direct = Report::new("w1".into(), vec![answer("relay"), answer("direct")]);
        assert_eq!(failure(&direct, true), None);
    }

    #[test]
    fn a_summary_counts_what_was_lost() {
        let answers = [Some(400), None, Some(200), None];
        let probes: Vec<_> = answers
            .into_iter()
            .map(|rtt_us| pb::PingResponse { rtt_us, ..Default::default() })
            .collect();
        let report = Report::new("w1".into(), probes);
        assert_eq!(
            summary(&report),
            "2 of 4 answered, 50 % lost; round-trip time 0.20 ms to 0.40 ms, mean 0.30 ms"
        );
        let silent = Report::new("w1".into(), vec![pb::PingResponse::default()]);
        assert_eq!(summary(&silent), "0 of 1 answered, 100 % lost; round-trip time - to -, mean -");
    }
}
