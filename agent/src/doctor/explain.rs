//! Why a peer is down, relayed or slow: the true cause, not only what the peer's state says.
//!
//! The causes are tried in this order, and the first one that holds is named:
//!
//! 1. This node is not ready: no plan, removed from the mesh, `towline down`.
//! 2. The peer is not up, and something of this node explains it: a firewall, the clock, a full table.
//! 3. The peer's own reason.
//! 4. The peer is up, but something drops its packets, or makes the path lossy or slow.

use serde::Serialize;
use towline_proto::code::Coded as _;
use towline_proto::pb;
use towline_service::output;

use super::mesh_checks::lossy;
use super::reference::{self, Message};
use super::{Answers, Cause, Check, CheckState, Subject};

/// Round-trip time in microseconds from which a path counts as slow. Between continents it is less.
const SLOW_RTT_US: u64 = 350_000;
/// Age in milliseconds up to which something that came from a peer tells about the present.
const RECENT_MS: u64 = 60_000;

/// Explanation of the state of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Name of the peer.
    pub peer: String,
    /// What the peer can be used for.
    pub state: Verdict,
    /// Code of the cause; `None` for a healthy peer.
    pub cause: Option<String>,
    /// Explanation for people, one sentence each.
    pub sentences: Vec<String>,
    /// What to do, for people; `None` if nothing has to be repaired.
    pub remedy: Option<String>,
}

/// What a peer can be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// A direct path carries its traffic, and no fault is known.
    Healthy,
    /// A path carries its traffic, but some of it is dropped or slow.
    Impaired,
    /// A relay carries its traffic.
    Relayed,
    /// There is no traffic for it.
    Idle,
    /// Paths are being tried.
    Connecting,
    /// No path carries its traffic.
    Down,
    /// This node does not know it.
    Unknown,
}

impl Verdict {
    /// Returns true if the peer needs attention.
    pub fn is_bad(self) -> bool {
        !matches!(self, Self::Healthy | Self::Idle | Self::Connecting)
    }
}

/// Causes on this node that keep packets of the tunnel from leaving or arriving, the surest first.
const OF_UNDERLAY: [&str; 4] =
    ["firewall-drops-tunnels", "conntrack-full", "netlink-failed", "membership-unusable"];
/// Causes that make a direct path unlikely, while a peer that is contacted first may still connect.
const OF_DIRECT_PATH: [&str; 3] = ["firewall-closes-port", "reflector-silent", "second-port-used"];
/// Reasons of a peer whose paths are tried for less than 10 s. Their entries in the document name no cause.
const OF_BEGINNING: [&str; 3] =
    ["trying-candidates", "relayed-trying-direct", "static-peer-trying"];
/// Causes whose remedy in the document has the placeholder `NAME` for the peer.
const OF_PEER_NAME: [&str; 3] = ["no-answer", "path-rtt-high", "path-loss-high"];
/// Causes on this node that stop all of the mesh.
const OF_NODE: [&str; 13] = [
    "machine-down",
    "node-removed",
    "map-expired",
    "join-being-undone",
    "host-not-opened",
    "membership-unusable",
    "link-missing",
    "guard-refused",
    "link-refused",
    "nftables-failed",
    "routing-table-in-use",
    "rule-priority-in-use",
    "link-name-in-use",
];
/// Causes on this node that drop packets although the path is up, the surest first.
const OF_TRAFFIC: [&str; 22] = [
    "firewall-drops-input",
    "firewall-drops-output",
    "firewall-drops-forwarded",
    "firewalld-zone-missing",
    "docker-hook-failed",
    "conntrack-full",
    "rp-filter-strict",
    "marked-packets-dropped",
    "state-removed",
    "own-source-foreign",
    "source-not-announced",
    "local-network-covered",
    "gateway-covered",
    "node-ip-unreached",
    "prefix-withheld",
    "prefix-not-granted",
    "forwarding-off",
    "cni-mtu-too-large",
    "route-refused",
    "nftables-table-in-use",
    "record-refused",
    "offload-damages-packets",
];

/// Explains the state of the peer with this name or overlay address. `paths` are the known ones of the
/// peer. `checks` are those of [`super::examine`], of the same answers.
pub fn explain(
    name: &str,
    answers: &Answers,
    paths: &[pb::PathStatus],
    checks: &[Check],
) -> Explanation {
    let local = Local { status: &answers.status, checks };
    let is_meant = |peer: &&pb::PeerStatus| {
        peer.name == name || peer.overlay_addresses.iter().any(|address| address == name)
    };
    let Some(peer) = answers.peers.iter().find(is_meant) else { return unknown(name, &local) };
    let draft = Draft { peer, paths, answers, local };
    match peer.state.as_str() {
        "up" if peer.path_kind == "relay" => draft.relayed(),
        "up" => draft.up(),
        "idle" => draft.plain(Verdict::Idle),
        "connecting" => draft.plain(Verdict::Connecting),
        _ => draft.down(),
    }
}

/// What is known about this node.
struct Local<'a> {
    status: &'a pb::StatusResponse,
    checks: &'a [Check],
}

impl Local<'_> {
    /// Returns the first of these codes that belongs to a check that is not ok.
    fn first_bad<'c>(&self, codes: &[&'c str]) -> Option<&'c str> {
        let bad = |check: &&Check| check.state > CheckState::Ok;
        let is_found =
            |code: &str| self.checks.iter().filter(bad).any(|check| is_named(check, code));
        codes.iter().copied().find(|code| is_found(code))
    }

    /// Returns the findings of the failed checks of this node. Those of other peers and of the session with a
    /// controller are left out: a path does not need them, and the latter is told apart.
    fn faults(&self) -> Vec<&str> {
        let is_fault = |check: &&Check| {
            check.state == CheckState::Failed
                && !matches!(check.subject, Subject::Peers | Subject::Controller)
        };
        self.checks.iter().filter(is_fault).map(|check| check.finding.as_str()).collect()
    }

    /// Returns what the agent or the check says about a code, without what to do.
    fn message(&self, code: &str) -> String {
        let reported = self.reported(code).map(|message| message.finding);
        let checked = || self.checks.iter().find(|check| is_named(check, code));
        reported
            .or_else(|| checked().map(|check| check.finding.as_str()))
            .unwrap_or(code)
            .to_owned()
    }

    /// Returns what to do about a code: what the agent says, or else the check or the document.
    fn remedy(&self, code: &str) -> Option<String> {
        if let Some(said) = self.reported(code).and_then(|message| message.remedy) {
            return Some(said.to_owned());
        }
        // A check with several causes may say what to do about another one.
        let is_alone = |check: &&Check| check.causes == [code];
        let checked = self.checks.iter().find(is_alone).and_then(|check| check.remedy.clone());
        checked.or_else(|| {
            let remedy = reference::remedy(code)?;
            let controller = self.status.controller.as_ref();
            let address = controller.map_or("", |controller| controller.address.as_str());
            Some(reference::with_controller(&remedy, address))
        })
    }

    /// Returns the message of the agent about a code.
    fn reported(&self, code: &str) -> Option<Message<'_>> {
        let mut details = self.status.problem_details.iter().chain(&self.status.note_details);
        let detail = details.find(|detail| detail.code == code)?;
        Some(Message::of(code, &detail.message))
    }
}

fn is_named(check: &Check, code: &str) -> bool {
    check.causes.iter().any(|cause| cause == code)
}

/// Returns the sentence that names the cause.
fn the_cause(text: &str) -> String {
    format!("the cause: {text}")
}

/// Explains a name that is no peer's.
fn unknown(name: &str, local: &Local<'_>) -> Explanation {
    let mut sentences = vec![format!("this node knows no peer {name}")];
    if local.status.name == name || local.status.overlay_addresses.iter().any(|own| own == name) {
        sentences = vec![format!("{name} is this node itself")];
    } else {
        sentences.push("it never joined this mesh, or it was removed from it".to_owned());
    }
    let mut cause = Cause::PeerUnknown.code().to_owned();
    if let Some(own) = local.first_bad(&OF_NODE) {
        sentences.push(the_cause(&local.message(own)));
        cause = own.to_owned();
    } else if let Some(controller) = away(local.status) {
        sentences.push(format!(
            "no controller is connected, so that this node may not know newer nodes: {}",
            controller.reason
        ));
    }
    let remedy = local.remedy(&cause);
    Explanation {
        peer: name.into(),
        state: Verdict::Unknown,
        cause: Some(cause),
        sentences,
        remedy,
    }
}

/// Returns the controller's status if none is connected, and one is needed.
fn away(status: &pb::StatusResponse) -> Option<&pb::ControllerStatus> {
    let controller = status.controller.as_ref()?;
    let is_away = !controller.connected && controller.reason_code != "controller-pending";
    is_away.then_some(controller)
}

/// A peer that is explained.
struct Draft<'a> {
    peer: &'a pb::PeerStatus,
    paths: &'a [pb::PathStatus],
    answers: &'a Answers,
    local: Local<'a>,
}

impl Draft<'_> {
    fn finish(&self, state: Verdict, cause: Option<&str>, sentences: Vec<String>) -> Explanation {
        let remedy = cause.filter(|_| state.is_bad()).and_then(|code| self.remedy(code));
        let cause = cause.map(ToOwned::to_owned);
        Explanation { peer: self.peer.name.clone(), state, cause, sentences, remedy }
    }

    /// Returns what to do about a code, with the name of the peer where that is what is asked for.
    fn remedy(&self, code: &str) -> Option<String> {
        let remedy = self.local.remedy(code)?;
        let is_named = OF_PEER_NAME.contains(&code);
        Some(if is_named { remedy.replace("NAME", &self.peer.name) } else { remedy })
    }

    /// Returns the sentence about the peer's state and its own reason.
    fn reason(&self) -> String {
        let Self { peer, .. } = self;
        let since = output::span(std::time::Duration::from_millis(peer.since_ms));
        let state = format!("{} has been {} for {since}", peer.name, peer.state);
        if peer.reason.is_empty() { state } else { format!("{state}: {}", peer.reason) }
    }

    /// Returns the sentence about the cause that belongs to the peer's own reason, from the document. It is said
    /// only where this node knows no other cause: an operator should read of one cause alone.
    fn cause_of_reason(&self) -> Option<String> {
        if OF_BEGINNING.contains(&self.peer.reason_code.as_str()) {
            return Some("it is too early to name a cause: ask again in some seconds".to_owned());
        }
        reference::entry(&self.peer.reason_code).map(|entry| the_cause(entry.cause))
    }

    /// Explains a peer whose reason says everything.
    fn plain(&self, state: Verdict) -> Explanation {
        if let Some(own) = self.local.first_bad(&OF_NODE) {
            return self.of_node(own);
        }
        let code = Some(self.peer.reason_code.as_str()).filter(|code| !code.is_empty());
        let sentences = std::iter::once(self.reason()).chain(self.cause_of_reason());
        self.finish(state, code, sentences.collect())
    }

    fn of_node(&self, code: &str) -> Explanation {
        let sentences = vec![
            format!("{} cannot be reached, because this node is not ready", self.peer.name),
            the_cause(&self.local.message(code)),
        ];
        self.finish(Verdict::Down, Some(code), sentences)
    }

    fn down(&self) -> Explanation {
        let (peer, local) = (self.peer, &self.local);
        if let Some(own) = local.first_bad(&OF_NODE) {
            return self.of_node(own);
        }
        let mut sentences = vec![self.reason()];
        let reason = peer.reason_code.as_str();
        // Both are about the pair, and surer than anything else.
        if matches!(reason, "key-conflict" | "static-peer-without-endpoint") {
            sentences.extend(self.cause_of_reason());
            return self.finish(Verdict::Down, Some(reason), sentences);
        }
        if let Some(cause) = local.first_bad(&OF_UNDERLAY) {
            sentences.push(the_cause(&local.message(cause)));
            return self.finish(Verdict::Down, Some(cause), sentences);
        }
        let clock = [Cause::ClockWrong.code(), Cause::ClockSetBack.code()];
        let clock = local
            .first_bad(&clock)
            .or_else(|| local.first_bad(&["controller-certificate-not-valid"]));
        if let ("no-handshake", Some(clock)) = (reason, clock) {
            sentences.push(the_cause(&local.message(clock)));
            return self.finish(Verdict::Down, Some(clock), sentences);
        }
        let up = self.answers.peers.iter().filter(|other| other.state == "up").count();
        // Between two NATs it is no surprise that one direction works.
        if matches!(reason, "no-answer" | "no-candidates" | "udp-blocked") && self.is_heard_alone()
        {
            sentences.push(the_cause(
                "its datagrams arrive here, but it answers none of ours: something on the way drops UDP \
                 towards it",
            ));
            return self.finish(Verdict::Down, Some(Cause::UdpOneWay.code()), sentences);
        }
        // Where nothing answers at all, neither a port nor a STUN server is the cause.
        if !matches!(reason, "no-handshake" | "udp-blocked") && up == 0 {
            // Peers that answer nobody: what this node knows about itself is the better guess.
            if let Some(cause) = local.first_bad(&OF_DIRECT_PATH) {
                sentences.push(the_cause(&local.message(cause)));
                return self.finish(Verdict::Down, Some(cause), sentences);
            }
        }
        let mut remarks = Vec::new();
        if let Some(controller) = away(&self.answers.status) {
            let remark = format!(
                "no controller is connected, so that a new address of the peer would not be known: {}",
                controller.reason
            );
            // A peer that never had an address, and one whose known addresses are old.
            if matches!(reason, "no-candidates" | "waiting-for-peer" | "no-answer") && up == 0 {
                let code = controller.reason_code.as_str();
                sentences.push(the_cause(&remark));
                return self.finish(Verdict::Down, Some(code), sentences);
            }
            remarks.push(remark);
        }
        if reason == "no-answer" && up > 0 {
            remarks.push(format!(
                "{up} other peer{} up, so that this node's own UDP traffic works: the peer is off, or \
                 something on the way to it drops UDP",
                if up == 1 { " is" } else { "s are" }
            ));
        }
        sentences.extend(self.cause_of_reason());
        sentences.extend(remarks);
        self.finish(Verdict::Down, Some(reason).filter(|code| !code.is_empty()), sentences)
    }

    /// Returns true if something authentic came from the peer lately, and it answered nothing since.
    fn is_heard_alone(&self) -> bool {
        let is_recent = |age: Option<u64>| age.is_some_and(|ms| ms <= RECENT_MS);
        let mut direct = self.paths.iter().filter(|path| path.path_kind == "direct");
        direct.clone().any(|path| is_recent(path.heard_ms))
            && direct.all(|path| !is_recent(path.answered_ms))
    }

    fn relayed(&self) -> Explanation {
        let (peer, local) = (self.peer, &self.local);
        let mut sentences = vec![format!("{} is up through the relay {}", peer.name, peer.relay)];
        sentences.push(format!("there is no direct path: {}", peer.reason));
        // The next version would not use such a relay.
        let notes = self.answers.status.note_details.iter();
        let undecided = notes.filter(|note| note.code == "relay-not-granted");
        sentences.extend(undecided.map(|note| note.message.clone()));
        if let Some(cause) = local.first_bad(&OF_TRAFFIC) {
            sentences.push(format!("some of its traffic is dropped: {}", local.message(cause)));
            return self.finish(Verdict::Impaired, Some(cause), sentences);
        }
        let blocked = [OF_UNDERLAY[0], OF_DIRECT_PATH[0], OF_DIRECT_PATH[1]];
        // Our NAT is the cause by itself.
        if peer.reason_code != "nat-mapping-dependent"
            && let Some(cause) = local.first_bad(&blocked)
        {
            sentences.push(the_cause(&local.message(cause)));
            return self.finish(Verdict::Relayed, Some(cause), sentences);
        }
        sentences.extend(self.cause_of_reason());
        let code = Some(peer.reason_code.as_str()).filter(|code| !code.is_empty());
        self.finish(Verdict::Relayed, code, sentences)
    }

    fn up(&self) -> Explanation {
        let (peer, local) = (self.peer, &self.local);
        if let Some(own) = local.first_bad(&OF_NODE) {
            return self.of_node(own);
        }
        let rtt = peer.rtt_us.map(|rtt| format!(", {}", output::rtt(rtt))).unwrap_or_default();
        let mut sentences =
            vec![format!("{} is up by the {} path {}{rtt}", peer.name, peer.path_kind, peer.path)];
        if let Some(conflict) = peer.conflict_details.first() {
            sentences
                .push(format!("one of its networks is not routed to it: {}", conflict.message));
            return self.finish(Verdict::Impaired, Some(conflict.code.as_str()), sentences);
        }
        if !peer.standby_prefixes.is_empty() {
            sentences.push(format!(
                "it shares {} with other nodes, and another one is used for them now",
                output::list(&peer.standby_prefixes)
            ));
        }
        if let Some(cause) = local.first_bad(&OF_TRAFFIC) {
            sentences.push(format!("some of its traffic is dropped: {}", local.message(cause)));
            return self.finish(Verdict::Impaired, Some(cause), sentences);
        }
        let link = self.answers.status.mtu;
        let small = peer.mtu.filter(|mtu| *mtu < link);
        if let Some(mtu) = small {
            sentences.push(format!("the path carries packets of {mtu} instead of {link} bytes"));
        }
        if let Some(percent) = lossy(peer) {
            sentences.push(format!("{percent:.0} % of the last probes on the path were lost"));
            return self.finish(Verdict::Impaired, Some(Cause::PathLossHigh.code()), sentences);
        }
        if peer.rtt_us.is_some_and(|rtt| rtt >= SLOW_RTT_US) {
            sentences
                .push("the path is slow: the network between the nodes takes this time".into());
            return self.finish(Verdict::Impaired, Some(Cause::PathRttHigh.code()), sentences);
        }
        if small.is_some() {
            // Towline has measured the path, and its routes have the smaller MTU.
            sentences
                .push("packets are made to fit: nothing has to be repaired on this node".into());
            let code = Cause::PathMtuSmall.code();
            let is_fragmented =
                small.is_some_and(|mtu| mtu < u32::from(towline_proto::mtu::Mtu::MIN));
            let state = if is_fragmented { Verdict::Impaired } else { Verdict::Healthy };
            return self.finish(state, Some(code), sentences);
        }
        if let Some(controller) = away(&self.answers.status) {
            sentences.push(format!(
                "no controller is connected, which established paths do not need (peers are asked for \
                 removed nodes): {}",
                controller.reason
            ));
        }
        let faults = local.faults();
        sentences.push(if faults.is_empty() {
            "no fault of its path or of this node is known".to_owned()
        } else {
            format!("no fault of its path is known, but: {}", faults.join("; "))
        });
        self.finish(Verdict::Healthy, None, sentences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_that_is_looked_for_is_a_code() {
        let codes = crate::codes();
        let lists: [&[&str]; 6] =
            [&OF_UNDERLAY, &OF_DIRECT_PATH, &OF_BEGINNING, &OF_PEER_NAME, &OF_NODE, &OF_TRAFFIC];
        for code in lists.concat() {
            assert!(codes.contains(&code), "{code}");
        }
    }
}
