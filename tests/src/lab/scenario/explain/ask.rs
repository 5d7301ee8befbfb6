//! Asks the commands of a node for the cause of a fault, and for complaints about a healthy mesh.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Case, Outcome};
use crate::lab::interrupt::{self, sleep, wait_for};
use crate::lab::mesh::Node;
use crate::lab::ping::echoes;
use crate::lab::topology::Host;
use crate::lab::traffic::Pattern;

/// Limit for a command to name a cause. The slowest is a second UDP port, which takes up to 80 s of silence, and
/// twice as long on a machine that does much else.
const LIMIT: Duration = Duration::from_secs(180);
/// Time for the other commands to name it too.
const GRACE: Duration = Duration::from_secs(4);
/// Number of rounds for the same. On a busy machine one takes seconds.
const GRACE_ROUNDS: u32 = 4;
/// Pause between two rounds of questions.
const PAUSE: Duration = Duration::from_millis(400);
/// Number of commands that may name a cause.
const COMMANDS: usize = 3;
/// Limit for the peers of a healthy mesh to have direct paths.
const HEALTHY_LIMIT: Duration = Duration::from_secs(90);
/// Codes of paths that are bad while they are measured. Where all processors are busy, a path of the lab may be.
const OF_LOAD: [&str; 2] = ["path-loss-high", "path-rtt-high"];
/// Limit for complaints about nothing but [`OF_LOAD`] to end. Losses are counted over up to 64 pings.
const LOAD_LIMIT: Duration = Duration::from_secs(90);
/// Pause before a healthy mesh is asked about again.
const LOAD_PAUSE: Duration = Duration::from_secs(2);

/// Node whose commands are asked, and the peer that they are asked about.
pub(super) struct View<'a> {
    pub(super) node: &'a Node,
    pub(super) peer: &'a str,
}

impl<'a> View<'a> {
    pub(super) fn new(node: &'a Node, peer: &'a str) -> Self {
        Self { node, peer }
    }
}

/// What the commands named.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// Commands that named the true cause.
    pub(super) by: BTreeSet<&'static str>,
    /// Other codes that they complained about in the last round.
    pub(super) also: BTreeSet<String>,
}

/// Asks until the cause of a case is named, or the limit is reached.
pub(super) fn ask(case: &Case, views: &[View<'_>]) -> anyhow::Result<Outcome> {
    ask_while(case, views, || Ok(()))
}

/// Asks as [`ask`] does, and calls `between` before each round. With `--keep` it asks nothing, and keeps the mesh
/// running until Ctrl-C.
pub(super) fn ask_while(
    case: &Case,
    views: &[View<'_>],
    mut between: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    if let Some(exercise) = &case.exercise {
        exercise.stay(views, &mut between)?;
        return Ok(Outcome::Asked(Named::default()));
    }
    let begun = Instant::now();
    let mut first = None;
    let mut rounds = 0;
    let mut named = Named::default();
    loop {
        interrupt::check()?;
        between()?;
        named.also.clear();
        let mut failed = None;
        for view in views {
            // A command that was too slow is asked again.
            failed = view.look(case, &mut named).err().or(failed);
        }
        if !named.by.is_empty() {
            first.get_or_insert_with(Instant::now);
            rounds += 1;
        }
        let is_settled = first.is_some_and(|at| at.elapsed() >= GRACE) && rounds >= GRACE_ROUNDS;
        let is_over = begun.elapsed() >= LIMIT;
        match failed {
            Some(error) if is_over && named.by.is_empty() => return Err(error),
            _ if named.by.len() == COMMANDS || is_settled || is_over => {
                return Ok(Outcome::Asked(named));
            }
            _ => sleep(PAUSE)?,
        }
    }
}

impl View<'_> {
    /// Asks each command once.
    fn look(&self, case: &Case, named: &mut Named) -> anyhow::Result<()> {
        let doctor = answer(self.node, &["doctor", "-o", "json"])?;
        named.take_doctor(case, &doctor);
        named.take_explain(case, &answer(self.node, &["explain", self.peer, "-o", "json"])?);
        named.take_peer(case, &answer(self.node, &["peer", self.peer, "-o", "json"])?);
        Ok(())
    }
}

impl Named {
    fn take(&mut self, case: &Case, command: &'static str, code: &str, is_complaint: bool) {
        if code == case.cause {
            if is_complaint || case.is_note {
                self.by.insert(command);
            }
        } else if is_complaint {
            self.also.insert(code.to_owned());
        }
    }

    fn take_doctor(&mut self, case: &Case, answer: &Value) {
        for check in list(&answer["checks"]) {
            for code in list(&check["causes"]).filter_map(Value::as_str) {
                self.take(case, "doctor", code, is_bad(check));
            }
        }
    }

    fn take_explain(&mut self, case: &Case, answer: &Value) {
        if let Some(cause) = answer["cause"].as_str() {
            self.take(case, "explain", cause, true);
        }
    }

    fn take_peer(&mut self, case: &Case, answer: &Value) {
        let peer = &answer["peer"];
        let conflicts = list(&peer["conflict_details"]).map(|conflict| &conflict["code"]);
        for code in conflicts.chain([&peer["reason_code"]]).filter_map(Value::as_str) {
            if !code.is_empty() {
                self.take(case, "peer", code, true);
            }
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn is_bad(check: &Value) -> bool {
    matches!(check["state"].as_str(), Some("warning" | "failed"))
}

/// Runs a command of a node and returns what it prints, `null` if that is no JSON. It may fail: `doctor` does
/// if a check failed.
fn answer(node: &Node, arguments: &[&str]) -> anyhow::Result<Value> {
    let output = node.command(arguments)?;
    Ok(serde_json::from_str(&output.stdout).unwrap_or_default())
}

/// Something that a command says against a healthy mesh.
struct Complaint {
    text: String,
    /// True if it is about nothing but [`OF_LOAD`].
    is_of_load: bool,
}

/// Waits until every peer of the nodes has a direct path. Returns what `doctor` and `explain` then complain about.
/// If that may be the load of this machine alone, they are asked again.
pub(super) fn complaints(nodes: &[&Node]) -> anyhow::Result<Vec<String>> {
    let begun = Instant::now();
    loop {
        let found = complaints_now(nodes)?;
        let may_end = found.iter().all(|complaint| complaint.is_of_load);
        if found.is_empty() || !may_end || begun.elapsed() >= LOAD_LIMIT {
            return Ok(found.into_iter().map(|complaint| complaint.text).collect());
        }
        // Paths are measured while they have traffic.
        for (from, to) in nodes.iter().flat_map(|from| nodes.iter().map(move |to| (from, to))) {
            if from.name() != to.name() {
                poke(from.host(), to.overlay_v4()?)?;
            }
        }
        sleep(LOAD_PAUSE)?;
    }
}

fn complaints_now(nodes: &[&Node]) -> anyhow::Result<Vec<Complaint>> {
    let mut found = Vec::new();
    for node in nodes {
        let name = node.name();
        let mut peers = Vec::new();
        wait_for(&format!("direct paths of {name}"), HEALTHY_LIMIT, || {
            peers = node.peers()?;
            let is_direct = |kind: &Option<String>| kind.as_deref() == Some("direct");
            let are_up = peers.iter().all(|peer| peer.is_up() && is_direct(&peer.path_kind));
            Ok((peers.len() + 1 == nodes.len() && are_up).then_some(()))
        })?;
        let doctor = answer(node, &["doctor", "-o", "json"])?;
        let is_healthy = doctor["healthy"].as_bool();
        let bad: Vec<&Value> = list(&doctor["checks"]).filter(|check| is_bad(check)).collect();
        for check in &bad {
            let text = format!("doctor of {name}: {}: {}", check["code"], check["finding"]);
            found.push(Complaint { text, is_of_load: are_of_load(list(&check["causes"])) });
        }
        if is_healthy != Some(true) && bad.is_empty() {
            let text = format!("doctor of {name} is not healthy: {doctor}");
            found.push(Complaint { text, is_of_load: false });
        }
        for peer in &peers {
            let explained = answer(node, &["explain", &peer.name, "-o", "json"])?;
            if explained["state"].as_str() != Some("healthy") {
                let text = format!("explain {} of {name}: {explained}", peer.name);
                let is_of_load = are_of_load([&explained["cause"]]);
                found.push(Complaint { text, is_of_load });
            }
        }
    }
    Ok(found)
}

/// Returns whether there are causes, and the load of this machine may be behind each of them.
fn are_of_load<'a>(causes: impl IntoIterator<Item = &'a Value>) -> bool {
    let mut causes = causes.into_iter().peekable();
    let is_of_load = |cause: &Value| cause.as_str().is_some_and(|code| OF_LOAD.contains(&code));
    causes.peek().is_some() && causes.all(is_of_load)
}

/// Sends one echo request through the tunnel, so that the peer has traffic. It need not be answered.
pub(super) fn poke(from: &Host, target: IpAddr) -> anyhow::Result<()> {
    const TIMEOUT: Duration = Duration::from_millis(100);
    // A guard may refuse the request.
    let _ = echoes(from.namespace(), target, 1, TIMEOUT, Pattern::random()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn case(cause: &'static str) -> Case {
        Case::new("a/b", "a fault", cause, |_, _| unreachable!("not run"))
    }

    #[test]
    fn a_check_that_is_ok_names_only_what_needs_no_repair() {
        let answer = json!({"checks": [
            {"state": "ok", "causes": ["ipv6-disabled"]},
            {"state": "failed", "causes": ["no-peer-up"]},
        ]});
        let mut named = Named::default();
        named.take_doctor(&case("ipv6-disabled"), &answer);
        assert!(named.by.is_empty());
        named.take_doctor(&case("ipv6-disabled").note(), &answer);
        assert_eq!(named.by, BTreeSet::from(["doctor"]));
        assert_eq!(named.also, BTreeSet::from(["no-peer-up".to_owned()]));
    }

    #[test]
    fn only_paths_that_are_measured_as_bad_may_be_the_load_of_this_machine() {
        let are = |causes: &Value| are_of_load(list(causes));
        assert!(
            are(&json!(["path-loss-high"])) && are(&json!(["path-rtt-high", "path-loss-high"]))
        );
        for other in [json!([]), json!(["path-loss-high", "clock-wrong"]), json!([null])] {
            assert!(!are(&other), "{other}");
        }
        assert!(!are_of_load([&Value::Null]));
    }

    #[test]
    fn each_command_is_read_where_it_names_a_cause() {
        let mut named = Named::default();
        let (no_answer, overlap) = (case("no-answer"), case("prefix-overlap"));
        let peer = json!({"peer": {
            "reason_code": "no-answer",
            "conflict_details": [{"code": "prefix-overlap", "message": "text"}],
        }});
        named.take_peer(&no_answer, &peer);
        assert_eq!(named.by, BTreeSet::from(["peer"]));
        named.take_explain(&no_answer, &json!({"cause": "no-answer"}));
        named.take_explain(&no_answer, &json!({"cause": null}));
        named.take_explain(&no_answer, &Value::Null);
        assert_eq!(named.by, BTreeSet::from(["explain", "peer"]));
        let mut named = Named::default();
        named.take_peer(&overlap, &peer);
        assert_eq!(named.by, BTreeSet::from(["peer"]));
    }
}
