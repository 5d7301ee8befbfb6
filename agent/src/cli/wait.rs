//! Implements `towline wait`, for scripts and units that must not start before the mesh can be used.
//!
//! What this machine does by itself (link, routes, guards, the map) must be done. Other nodes may be
//! off, so that a machine waits for any of them for a short time only: a control plane whose workers
//! are unreachable has to start.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use rand::seq::IteratorRandom as _;
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
/// Longest time to wait for a peer once everything is in place on this machine. The other side may be
/// off for days, and this machine's own services must not wait for it.
const PEER_LIMIT: Duration = Duration::from_secs(30);
/// Interval between probes of peers that nobody sends to, in a large mesh.
const PROBE_PERIOD: Duration = Duration::from_secs(1);
/// Number of such peers that are probed first. Later it is one at a time.
const FIRST_PROBES: usize = 3;

pub(super) fn run(config: &Config, args: &WaitArgs) -> anyhow::Result<()> {
    let limit = (args.timeout > 0).then(|| Duration::from_secs(args.timeout));
    match until_up(&config.socket, &args.peer, limit)? {
        Mesh::Up => eprintln!("the mesh is up"),
        Mesh::Unreached(reason) => eprintln!("{}", unreached(&reason)),
    }
    Ok(())
}

/// Returns the warning for a machine that is ready but reached no peer.
pub(super) fn unreached(reason: &str) -> String {
    format!("warning: this machine is ready, but it reached no other node: {reason}")
}

/// State of a mesh that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mesh {
    /// A peer is up, or there is none.
    Up,
    /// Link, routes and guards are in place, but no peer is up, for this reason.
    Unreached(String),
}

/// Progress of a machine towards a mesh that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Progress {
    /// Everything that has to be waited for is in place.
    Ready(Mesh),
    /// This part is missing on the machine itself, or this required peer is not up.
    Missing(String),
}

/// Waits until the mesh can be used: the agent runs, its link, routes and guards are in place, it
/// has the map, and each of `peers` is up. Then waits for any peer, but not for long.
pub(super) fn until_up(
    socket: &Path,
    peers: &[String],
    limit: Option<Duration>,
) -> anyhow::Result<Mesh> {
    let begun = Instant::now();
    let mut ready_since = None;
    let mut probes = Probes::default();
    loop {
        let progress = progress_now(socket, peers, &mut probes);
        let waited = begun.elapsed();
        let is_over = limit.is_some_and(|limit| waited >= limit);
        let missing = match progress {
            Ok(Progress::Ready(Mesh::Up)) => return Ok(Mesh::Up),
            Ok(Progress::Ready(unreached)) => {
                let since = ready_since.get_or_insert(waited);
                if is_over || waited.saturating_sub(*since) >= PEER_LIMIT {
                    return Ok(unreached);
                }
                String::new()
            }
            Ok(Progress::Missing(missing)) => missing,
            Err(error) => format!("{error:#}"),
        };
        if is_over {
            bail!("the mesh is not up after {} s: {missing}", waited.as_secs());
        }
        std::thread::sleep(PERIOD);
    }
}

/// Returns the progress, from the agent's status and its peers. Probes idle peers while no peer is up.
fn progress_now(socket: &Path, wanted: &[String], probes: &mut Probes) -> anyhow::Result<Progress> {
    with_agent(socket, async |mut agent| {
        let status =
            agent.status(pb::StatusRequest {}).await.map_err(|status| status_error(&status))?;
        let peers =
            agent.peers(pb::PeersRequest {}).await.map_err(|status| status_error(&status))?;
        let peers = peers.into_inner().peers;
        let progress = progress(&status.into_inner(), &peers, wanted);
        if matches!(progress, Progress::Ready(Mesh::Unreached(_))) {
            for node in probes.due(Instant::now(), &peers) {
                let request = pb::PingRequest {
                    node,
                    count: 1,
                    timeout_ms: 1000,
                    ..pb::PingRequest::default()
                };
                // The peers show whether it answered.
                let _ = agent.ping(request).await;
            }
        }
        Ok(progress)
    })
}

/// Probes of peers that are idle. In a large mesh a node connects to those that it sends to, and a
/// program that waits sends nothing.
#[derive(Debug, Default)]
struct Probes {
    /// Time of the last probe.
    last: Option<Instant>,
}

impl Probes {
    /// Returns the peers to probe now. They are chosen at random, so that the nodes of a mesh do not
    /// all probe the same ones.
    fn due(&mut self, now: Instant, peers: &[pb::PeerStatus]) -> Vec<String> {
        let count = match self.last {
            None => FIRST_PROBES,
            Some(last) if now.saturating_duration_since(last) >= PROBE_PERIOD => 1,
            Some(_) => 0,
        };
        let idle =
            peers.iter().filter(|peer| is_node(peer) && peer.state == PeerState::Idle.code());
        let chosen = idle.choose_multiple(&mut rand::rng(), count);
        if !chosen.is_empty() {
            self.last = Some(now);
        }
        chosen.into_iter().map(|peer| peer.name.clone()).collect()
    }
}

/// Returns whether a peer is a node of the mesh, and no static peer.
fn is_node(peer: &pb::PeerStatus) -> bool {
    !peer.node_id.is_empty()
}

fn progress(status: &pb::StatusResponse, peers: &[pb::PeerStatus], wanted: &[String]) -> Progress {
    if status.state == MachineState::Down.code() {
        return Progress::Missing("this machine is down: run `towline up`".to_owned());
    }
    // An older agent does not send this field.
    if status.applied == Some(false) {
        return Progress::Missing(format!(
            "link, routes or guards are not in place: {}",
            status.applied_reason
        ));
    }
    let up = |peer: &pb::PeerStatus| peer.state == PeerState::Up.code();
    for name in wanted {
        match peers.iter().find(|peer| peer.name == *name) {
            Some(peer) if up(peer) => {}
            Some(peer) => {
                return Progress::Missing(format!("{name} is {}: {}", peer.state, peer.reason));
            }
            None => return Progress::Missing(format!("no node is named {name}")),
        }
    }
    // Static peers are not the mesh. They count only where there is no other.
    let is_counted = |peer: &&pb::PeerStatus| is_node(peer) || status.controller.is_none();
    let mut counted = peers.iter().filter(is_counted).peekable();
    match (counted.peek(), &status.controller) {
        (Some(first), _) => {
            let reason =
                format!("no peer is up; {} is {}: {}", first.name, first.state, first.reason);
            let is_up = counted.any(up);
            Progress::Ready(if is_up { Mesh::Up } else { Mesh::Unreached(reason) })
        }
        // The map is there, and this node is the only one.
        (None, Some(controller)) if controller.revision > 0 => Progress::Ready(Mesh::Up),
        (None, Some(controller)) if controller.connected => {
            Progress::Missing("the controller has not sent the list of nodes yet".to_owned())
        }
        (None, controller) => {
            let reason = controller.as_ref().map_or("none is configured", |c| c.reason.as_str());
            Progress::Missing(format!("no peer is known and no controller answers: {reason}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, state: &str) -> pb::PeerStatus {
        let node_id = format!("{name:0>32}");
        pb::PeerStatus { name: name.into(), node_id, state: state.into(), ..Default::default() }
    }

    fn static_peer(name: &str, state: &str) -> pb::PeerStatus {
        pb::PeerStatus { node_id: String::new(), ..peer(name, state) }
    }

    /// Returns the status of an agent that has the map of this revision.
    fn status(connected: bool, revision: u64) -> pb::StatusResponse {
        let controller = pb::ControllerStatus { connected, revision, ..Default::default() };
        pb::StatusResponse { controller: Some(controller), ..Default::default() }
    }

    fn missing(progress: Progress) -> String {
        match progress {
            Progress::Missing(missing) => missing,
            Progress::Ready(mesh) => panic!("{mesh:?}"),
        }
    }

    fn unreached(progress: Progress) -> String {
        match progress {
            Progress::Ready(Mesh::Unreached(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }

    const UP: Progress = Progress::Ready(Mesh::Up);

    #[test]
    fn a_machine_that_is_down_is_not_up() {
        let down = pb::StatusResponse { state: "down".into(), ..status(true, 1) };
        assert!(missing(progress(&down, &[], &[])).contains("towline up"));
    }

    #[test]
    fn the_only_node_of_a_mesh_is_up_once_it_has_the_map() {
        assert_eq!(progress(&status(true, 1), &[], &[]), UP);
        // The controller may run on a machine that waits for this one.
        assert_eq!(progress(&status(false, 1), &[], &[]), UP, "the map is cached");
        missing(progress(&status(true, 0), &[], &[]));
        missing(progress(&status(false, 0), &[], &[]));
        missing(progress(&pb::StatusResponse::default(), &[], &[]));
    }

    #[test]
    fn a_peer_that_is_off_is_told_and_no_reason_to_wait_for_long() {
        let peers = [peer("a", "down"), peer("b", "up")];
        assert_eq!(progress(&status(false, 1), &peers, &[]), UP);
        assert!(unreached(progress(&status(true, 1), &peers[..1], &[])).contains("a is down"));
        // Those that are named must be up.
        assert!(missing(progress(&status(true, 1), &peers, &["a".into()])).contains("a is down"));
        assert!(missing(progress(&status(true, 1), &peers, &["c".into()])).contains("named c"));
        assert_eq!(progress(&status(true, 1), &peers, &["b".into()]), UP);
    }

    #[test]
    fn a_static_peer_is_not_the_mesh() {
        let peers = [static_peer("office", "up"), peer("cp", "down")];
        assert!(unreached(progress(&status(true, 1), &peers, &[])).contains("cp is down"));
        missing(progress(&status(false, 0), &peers[..1], &[]));
        // Without a mesh, static peers are all there is.
        let alone = pb::StatusResponse::default();
        assert_eq!(progress(&alone, &peers[..1], &[]), UP);
        unreached(progress(&alone, &[static_peer("office", "down")], &[]));
    }

    #[test]
    fn peers_that_nobody_sends_to_are_probed_a_few_at_a_time() {
        let begun = Instant::now();
        let mut peers: Vec<_> = (0..70).map(|n| peer(&format!("n{n}"), "idle")).collect();
        peers.push(static_peer("office", "idle"));
        let mut probes = Probes::default();
        let first = probes.due(begun, &peers);
        assert_eq!(first.len(), FIRST_PROBES);
        assert!(!first.contains(&"office".to_owned()));
        assert!(probes.due(begun, &peers).is_empty());
        assert_eq!(probes.due(begun + PROBE_PERIOD, &peers).len(), 1);
        assert!(Probes::default().due(begun, &[peer("a", "down")]).is_empty());
    }

    #[test]
    fn up_means_that_the_plan_is_applied_too() {
        let peers = [peer("a", "up")];
        let applied = |applied, reason: &str| pb::StatusResponse {
            applied,
            applied_reason: reason.to_owned(),
            ..status(true, 1)
        };
        let progress = |status| progress(&status, &peers, &["a".into()]);
        assert_eq!(progress(applied(Some(true), "")), UP);
        assert_eq!(progress(applied(None, "")), UP, "an older agent");
        let reason = missing(progress(applied(Some(false), "the link towline0 is missing")));
        assert!(reason.contains("the link towline0 is missing"), "{reason}");
    }
}
