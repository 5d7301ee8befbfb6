//! Implements `towline wait`, for scripts and units that must not start before the mesh is up.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use towline_core::status::PeerState;
use towline_proto::code::Coded as _;
use towline_proto::pb;

use super::local::{status_error, with_agent};
use crate::config::Config;
use crate::down::MachineState;

#[derive(Debug, Args)]
pub(super) struct WaitArgs {
    /// Give up after this many seconds; 0: never give up
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    timeout: u64,
    /// Wait until this node is up too (can be repeated)
    #[arg(long, value_name = "NODE")]
    peer: Vec<String>,
}

/// Interval between status requests. It is short, because the agent is local.
const PERIOD: Duration = Duration::from_millis(100);

pub(super) fn run(config: &Config, args: &WaitArgs) -> anyhow::Result<()> {
    let limit = (args.timeout > 0).then(|| Duration::from_secs(args.timeout));
    until_up(&config.socket, &args.peer, limit)?;
    eprintln!("the mesh is up");
    Ok(())
}

/// Waits until the mesh is up. That is the case when the agent runs, its link, routes and guards
/// are in place, each of `peers` is up, and one more condition holds: any peer is up, or a
/// controller is connected and reports no other node.
pub(super) fn until_up(
    socket: &Path,
    peers: &[String],
    limit: Option<Duration>,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let missing = match missing_now(socket, peers) {
            Ok(None) => return Ok(()),
            Ok(Some(missing)) => missing,
            Err(error) => format!("{error:#}"),
        };
        if limit.is_some_and(|limit| begun.elapsed() >= limit) {
            bail!("the mesh is not up after {} s: {missing}", begun.elapsed().as_secs());
        }
        std::thread::sleep(PERIOD);
    }
}

/// Returns what is missing, or `None` if the mesh is up.
fn missing_now(socket: &Path, wanted: &[String]) -> anyhow::Result<Option<String>> {
    with_agent(socket, async |mut agent| {
        let status =
            agent.status(pb::StatusRequest {}).await.map_err(|status| status_error(&status))?;
        let peers =
            agent.peers(pb::PeersRequest {}).await.map_err(|status| status_error(&status))?;
        Ok(missing(&status.into_inner(), &peers.into_inner().peers, wanted))
    })
}

fn missing(
    status: &pb::StatusResponse,
    peers: &[pb::PeerStatus],
    wanted: &[String],
) -> Option<String> {
    if status.state == MachineState::Down.code() {
        return Some("this machine is down: run `towline up`".to_owned());
    }
    // An older agent does not send this field.
    if status.applied == Some(false) {
        return Some(format!(
            "the host's network differs from the plan: {}",
            status.applied_reason
        ));
    }
    let up = |peer: &pb::PeerStatus| peer.state == PeerState::Up.code();
    for name in wanted {
        match peers.iter().find(|peer| peer.name == *name) {
            Some(peer) if up(peer) => {}
            Some(peer) => return Some(format!("{name} is {}: {}", peer.state, peer.reason)),
            None => return Some(format!("no node is named {name}")),
        }
    }
    let controller = status.controller.as_ref();
    match peers.first() {
        _ if peers.iter().any(up) => None,
        Some(peer) => {
            Some(format!("no peer is up; {} is {}: {}", peer.name, peer.state, peer.reason))
        }
        None if controller.is_some_and(|controller| controller.connected) => None,
        None => Some(format!(
            "no peer is known and no controller answers: {}",
            controller.map_or("none is configured", |controller| controller.reason.as_str())
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, state: &str) -> pb::PeerStatus {
        pb::PeerStatus { name: name.into(), state: state.into(), ..Default::default() }
    }

    fn status(connected: bool) -> pb::StatusResponse {
        let controller = pb::ControllerStatus { connected, ..Default::default() };
        pb::StatusResponse { controller: Some(controller), ..Default::default() }
    }

    #[test]
    fn a_machine_that_is_down_is_not_up() {
        let down = pb::StatusResponse { state: "down".into(), ..status(true) };
        assert!(missing(&down, &[], &[]).unwrap().contains("towline up"));
    }

    #[test]
    fn up_means_a_peer_or_being_the_first() {
        assert_eq!(missing(&status(true), &[], &[]), None);
        assert!(missing(&status(false), &[], &[]).is_some());
        let peers = [peer("a", "down"), peer("b", "up")];
        assert_eq!(missing(&status(false), &peers, &[]), None);
        assert!(missing(&status(true), &peers[..1], &[]).unwrap().contains("a is down"));
        assert!(missing(&status(true), &peers, &["a".into()]).is_some());
        assert!(missing(&status(true), &peers, &["c".into()]).unwrap().contains("named c"));
        assert_eq!(missing(&status(true), &peers, &["b".into()]), None);
    }

    #[test]
    fn up_means_that_the_plan_is_applied_too() {
        let peers = [peer("a", "up")];
        let applied = |applied, reason: &str| pb::StatusResponse {
            applied,
            applied_reason: reason.to_owned(),
            ..status(true)
        };
        let missing = |status| missing(&status, &peers, &["a".into()]);
        assert_eq!(missing(applied(Some(true), "")), None);
        assert_eq!(missing(applied(None, "")), None, "an older agent");
        let reason = missing(applied(Some(false), "the link towline0 is missing")).unwrap();
        assert!(reason.contains("the link towline0 is missing"), "{reason}");
    }
}
