//! Checks and explanations of hosts and meshes of different shapes.

use towline_proto::pb;

use super::explain::{Verdict, explain};
use super::host_facts::{Disk, HostFacts, LinkFacts};
use super::{Agent, Answers, Check, CheckState, Facts, Subject, examine, reference};
use crate::conntrack::Conntrack;

/// Time of the tests, in seconds since 1970.
const NOW: i64 = 1_800_000_000;
const DAY: i64 = 86_400;

fn link(name: &str, mtu: u32, is_uplink: bool) -> LinkFacts {
    LinkFacts {
        name: name.into(),
        mtu,
        is_up: true,
        is_uplink,
        reverse_path_filter: Some(if is_uplink { 1 } else { 2 }),
        is_ipv6_disabled: Some(false),
    }
}

fn host() -> HostFacts {
    HostFacts {
        now: NOW,
        is_clock_synchronized: Some(true),
        certificate: Some((NOW - DAY, NOW + 2 * DAY)),
        last_written: Some(NOW - 10),
        disk: Some(Disk { free_bytes: 1 << 30, is_out_of_files: false, is_read_only: false }),
        conntrack: Some(Conntrack { count: 100, max: 10_000 }),
        forwards_ipv4: Some(false),
        forwards_ipv6: Some(false),
        reverse_path_filter: Some(1),
        has_ipv6: true,
        links: vec![link("eth0", 1_500, true), link("towline0", 1_420, false)],
    }
}

fn peer(name: &str, state: &str, path_kind: &str, reason_code: &str) -> pb::PeerStatus {
    pb::PeerStatus {
        name: name.into(),
        state: state.into(),
        path_kind: path_kind.into(),
        path: if path_kind.is_empty() { "" } else { "192.0.2.7:51830" }.into(),
        relay: if path_kind == "relay" { "relay-1" } else { "" }.into(),
        reason: reason_code.replace('-', " "),
        reason_code: reason_code.into(),
        rtt_us: (state == "up").then_some(12_000),
        mtu: (state == "up").then_some(1_420),
        overlay_addresses: vec!["198.19.0.7".into()],
        ..Default::default()
    }
}

fn status() -> pb::StatusResponse {
    pb::StatusResponse {
        state: "running".into(),
        name: "node-a".into(),
        overlay_addresses: vec!["198.19.0.1".into()],
        mtu: 1_420,
        applied: Some(true),
        controller: Some(pb::ControllerStatus {
            connected: true,
            address: "192.0.2.1:7443".into(),
            ..Default::default()
        }),
        features: vec![pb::Feature {
            name: "udp_segment".into(),
            active: true,
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn facts() -> Facts {
    let peers = vec![peer("node-b", "up", "direct", ""), peer("node-c", "up", "direct", "")];
    Facts {
        link: "towline0".into(),
        networks_behind: Vec::new(),
        controller: None,
        host: host(),
        agent: Agent::Answered(Box::new(Answers { status: status(), peers })),
    }
}

fn answers(facts: &mut Facts) -> &mut Answers {
    match &mut facts.agent {
        Agent::Answered(answers) => answers,
        Agent::Silent { .. } => panic!("the agent answered"),
    }
}

fn detail(code: &str) -> pb::Detail {
    pb::Detail { code: code.into(), message: format!("text of {code}") }
}

fn check(checks: &[Check], subject: Subject) -> &Check {
    checks.iter().find(|check| check.subject == subject).unwrap()
}

/// Change of the facts of a healthy host.
type Change = fn(&mut Facts);

#[test]
fn healthy_hosts_of_many_shapes_have_no_warning() {
    let shapes: [(&str, Change); 14] = [
        ("plain", |_| {}),
        ("no peers yet", |facts| answers(facts).peers.clear()),
        ("static peers only", |facts| {
            let answers = answers(facts);
            answers.status.controller = None;
            answers.peers = vec![peer("office", "up", "static", "")];
            facts.host.certificate = None;
        }),
        ("without IPv6", |facts| {
            facts.host.has_ipv6 = false;
            answers(facts).status.note_details = vec![detail("ipv6-absent")];
        }),
        ("a virtual machine with the clock of its host", |facts| {
            facts.host.is_clock_synchronized = Some(false);
        }),
        ("a kernel that does not tell much", |facts| {
            facts.host.is_clock_synchronized = None;
            facts.host.conntrack = None;
            facts.host.links[1].reverse_path_filter = None;
            facts.host.links[1].is_ipv6_disabled = None;
        }),
        ("a cloud with a small MTU", |facts| {
            facts.host.links[0].mtu = 1_460;
            answers(facts).peers.iter_mut().for_each(|peer| peer.mtu = Some(1_380));
        }),
        ("a router of pods", |facts| {
            facts.host.forwards_ipv4 = Some(true);
            answers(facts).status.kubernetes = Some(pb::KubernetesStatus {
                connected: true,
                node: "node-a".into(),
                pod_networks: vec!["10.244.1.0/24".into()],
                cni: "flannel (native routing)".into(),
                ..Default::default()
            });
        }),
        ("a machine that joins its cluster", |facts| {
            answers(facts).status.kubernetes = Some(pb::KubernetesStatus {
                reason_code: "node-not-registered".into(),
                cni_reason_code: "cni-not-configured".into(),
                ..Default::default()
            });
        }),
        ("an old kernel", |facts| {
            answers(facts).status.features[0] = pb::Feature {
                name: "udp_segment".into(),
                reason_code: "offload-unsupported".into(),
                ..Default::default()
            };
        }),
        ("a firewall that answers only who was asked", |facts| {
            answers(facts).status.note_details = vec![detail("firewall-closes-port")];
        }),
        ("a large mesh with idle peers", |facts| {
            answers(facts).peers.push(peer("node-d", "idle", "", "peer-idle"));
            answers(facts).peers.push(peer("node-e", "idle", "", "peer-unchecked"));
        }),
        ("a mesh that just started", |facts| {
            let answers = answers(facts);
            answers.peers = vec![peer("node-b", "connecting", "", "trying-candidates")];
            let reason_code = "controller-pending".into();
            let controller = pb::ControllerStatus { reason_code, ..Default::default() };
            answers.status.controller = Some(controller);
        }),
        ("Cilium", |facts| {
            answers(facts).status.note_details = vec![detail("redirects-by-cilium")];
        }),
    ];
    for (name, change) in shapes {
        let mut facts = facts();
        change(&mut facts);
        for check in examine(&facts) {
            assert!(check.state <= CheckState::Ok && check.remedy.is_none(), "{name}: {check:?}");
        }
    }
}

#[test]
fn each_broken_host_gets_the_code_of_its_fault() {
    use CheckState::{Failed, Warning};
    let broken: [(&str, Subject, CheckState, Change); 28] = [
        ("clock-wrong", Subject::Clock, Failed, |facts| facts.host.now = NOW - 2 * DAY),
        ("clock-set-back", Subject::Clock, Warning, |facts| {
            facts.host.last_written = Some(NOW + 3_600);
        }),
        ("clock-not-synchronized", Subject::Clock, Failed, |facts| {
            facts.host.is_clock_synchronized = Some(false);
            facts.host.last_written = Some(NOW + 3_600);
        }),
        ("controller-certificate-not-valid", Subject::Clock, Failed, |facts| {
            away(facts, "controller-certificate-not-valid");
        }),
        ("certificate-expired", Subject::Certificates, Failed, |facts| {
            facts.host.now = NOW + 3 * DAY;
        }),
        ("certificate-expires-soon", Subject::Certificates, Warning, |facts| {
            facts.host.now = NOW + 2 * DAY - 3_600;
        }),
        ("controller-unreachable", Subject::Controller, Failed, |facts| {
            away(facts, "controller-unreachable");
        }),
        ("node-removed", Subject::Agent, Failed, |facts| {
            answers(facts).status.problem_details = vec![detail("node-removed")];
        }),
        ("nftables-guard-reduced", Subject::Guards, Failed, |facts| {
            let status = &mut answers(facts).status;
            status.problem_details = vec![detail("nftables-guard-reduced")];
            status.applied = Some(false);
            status.applied_reason_code = "nftables-guard-reduced".into();
        }),
        ("link-missing", Subject::Guards, Failed, |facts| {
            let status = &mut answers(facts).status;
            status.applied = Some(false);
            status.applied_reason_code = "link-missing".into();
        }),
        ("nftables-table-in-use", Subject::Guards, Failed, |facts| {
            let status = &mut answers(facts).status;
            status.problem_details = vec![detail("nftables-table-in-use")];
            status.applied = Some(false);
            status.applied_reason_code = "nftables-table-in-use".into();
        }),
        ("forwarding-off", Subject::Forwarding, Failed, |facts| {
            facts.networks_behind = vec!["10.9.0.0/16".parse().unwrap()];
        }),
        ("rp-filter-strict", Subject::ReversePath, Failed, |facts| {
            facts.host.links[1].reverse_path_filter = Some(0);
        }),
        ("conntrack-full", Subject::Conntrack, Failed, |facts| {
            facts.host.conntrack = Some(Conntrack { count: 9_900, max: 10_000 });
        }),
        ("path-mtu-small", Subject::Mtu, Warning, |facts| {
            answers(facts).peers[0].mtu = Some(1_200);
        }),
        ("uplink-mtu-small", Subject::Mtu, Warning, |facts| facts.host.links[0].mtu = 1_300),
        ("cni-mtu-too-large", Subject::Mtu, Failed, |facts| {
            answers(facts).status.problem_details = vec![detail("cni-mtu-too-large")];
        }),
        ("local-network-covered", Subject::Overlaps, Failed, |facts| {
            answers(facts).status.problem_details = vec![detail("local-network-covered")];
        }),
        ("firewall-drops-input", Subject::Firewalls, Failed, |facts| {
            answers(facts).status.problem_details = vec![detail("firewall-drops-input")];
        }),
        ("firewall-closes-port", Subject::Firewalls, Warning, |facts| {
            answers(facts).status.note_details = vec![detail("firewall-closes-port")];
            answers(facts).peers[0] = peer("node-b", "up", "relay", "relayed-no-answer");
        }),
        ("mark-in-use", Subject::OtherPrograms, Warning, |facts| {
            answers(facts).status.problem_details = vec![detail("mark-in-use")];
        }),
        ("offload-damages-packets", Subject::Offloads, Warning, |facts| {
            let feature = &mut answers(facts).status.features[0];
            feature.active = false;
            feature.reason_code = "offload-damages-packets".into();
        }),
        ("disk-full", Subject::Disk, Failed, |facts| {
            facts.host.disk.as_mut().unwrap().free_bytes = 4_096;
        }),
        ("disk-read-only", Subject::Disk, Warning, |facts| {
            facts.host.disk.as_mut().unwrap().is_read_only = true;
        }),
        ("key-conflict", Subject::Peers, Failed, |facts| {
            answers(facts).peers[0] = peer("node-b", "down", "", "key-conflict");
        }),
        ("path-loss-high", Subject::Peers, Warning, |facts| {
            answers(facts).peers[0].loss_percent = Some(18.0);
        }),
        ("state-removed", Subject::OtherPrograms, Warning, |facts| {
            answers(facts).status.problem_details = vec![detail("state-removed")];
        }),
        ("no-peer-up", Subject::Peers, Failed, |facts| {
            answers(facts).peers = vec![peer("node-b", "down", "", "no-answer")];
        }),
    ];
    for (code, subject, state, change) in broken {
        let mut facts = facts();
        change(&mut facts);
        let checks = examine(&facts);
        let check = check(&checks, subject);
        assert!(check.causes.iter().any(|cause| cause == code), "{code}: {check:?}");
        assert_eq!(check.state, state, "{code}: {check:?}");
        assert!(check.remedy.is_some(), "{code}: {check:?}");
    }
}

#[test]
fn no_remedy_repeats_a_command_of_the_finding() {
    for code in crate::codes() {
        let command = reference::entry(code).unwrap().command;
        let message = format!("what failed: why: {command}");
        let mut facts = facts();
        answers(&mut facts).status.problem_details =
            vec![pb::Detail { code: code.into(), message }];
        let checks = examine(&facts);
        let is_named = |check: &&Check| check.causes.iter().any(|cause| cause == code);
        let check = checks.iter().find(is_named).unwrap_or_else(|| panic!("{code}"));
        assert_eq!(
            (check.finding.as_str(), check.remedy.as_deref()),
            ("what failed: why", Some(command))
        );
        // The peer is up: a cause of the whole node explains it, or one that drops packets.
        let explanation = explain("node-b", answers(&mut facts), &[], &checks);
        let remedy = explanation.remedy.unwrap_or_default();
        for command in reference::commands(&remedy) {
            let is_repeated = explanation.sentences.iter().any(|text| text.contains(command));
            assert!(!is_repeated, "{code}: {:?}: {remedy}", explanation.sentences);
        }
    }
}

#[test]
fn what_several_messages_say_to_do_is_kept() {
    let mut facts = facts();
    let detail = |code: &str, way: &str| pb::Detail {
        code: code.into(),
        message: format!("the firewall drops {way}: run `allow {way}`"),
    };
    answers(&mut facts).status.problem_details =
        vec![detail("firewall-drops-input", "in"), detail("firewall-drops-forwarded", "through")];
    let checks = examine(&facts);
    let check = check(&checks, Subject::Firewalls);
    assert_eq!(check.finding, "the firewall drops in; the firewall drops through");
    assert_eq!(check.remedy.as_deref(), Some("run `allow in`; run `allow through`"));
    // A note has no remedy beside it.
    let status = &mut answers(&mut facts).status;
    status.problem_details.clear();
    status.note_details = vec![detail("firewall-closes-port", "in")];
    let checks = examine(&facts);
    let check = self::check(&checks, Subject::Firewalls);
    assert_eq!(check.finding, "the firewall drops in: run `allow in`");
    assert_eq!((check.state, check.remedy.as_deref()), (CheckState::Ok, None));
}

fn away(facts: &mut Facts, code: &str) {
    let controller = pb::ControllerStatus {
        reason: format!("text of {code}"),
        reason_code: code.into(),
        ..Default::default()
    };
    answers(facts).status.controller = Some(controller);
}

#[test]
fn without_an_agent_the_host_is_still_checked() {
    let mut facts = facts();
    facts.agent = Agent::Silent { code: "agent-not-running", reason: "nothing listens".into() };
    facts.host.disk.as_mut().unwrap().is_read_only = true;
    let checks = examine(&facts);
    assert_eq!(checks[0].subject, Subject::Agent);
    assert_eq!(checks[0].state, CheckState::Failed);
    assert_eq!(checks[0].causes, ["agent-not-running"]);
    assert_eq!(check(&checks, Subject::Peers).state, CheckState::Skipped);
    assert_eq!(check(&checks, Subject::Disk).state, CheckState::Warning);
    assert_eq!(check(&checks, Subject::Clock).state, CheckState::Ok);
}

#[test]
fn remedies_name_the_controller_where_its_address_is_known() {
    let mut facts = facts();
    away(&mut facts, "controller-unreachable");
    facts.host.now = NOW + 3 * DAY;
    let remedy = |facts: &Facts, subject| check(&examine(facts), subject).remedy.clone().unwrap();
    assert!(remedy(&facts, Subject::Certificates).contains("`nc -vz CONTROLLER 7443`"));
    facts.controller = Some("203.0.113.10:8443".into());
    for subject in [Subject::Certificates, Subject::Controller] {
        let remedy = remedy(&facts, subject);
        assert!(remedy.contains("`nc -vz 203.0.113.10 8443`"), "{remedy}");
    }
}

#[test]
fn the_mtu_of_a_link_that_is_not_up_is_not_judged() {
    let mut facts = facts();
    facts.host.links[1].mtu = 1_500;
    let state = |facts: &Facts| check(&examine(facts), Subject::Mtu).state;
    let causes = |facts: &Facts| check(&examine(facts), Subject::Mtu).causes.clone();
    assert_eq!(causes(&facts), ["uplink-mtu-small"]);
    facts.host.links[1].is_up = false;
    assert_eq!((state(&facts), causes(&facts)), (CheckState::Skipped, Vec::new()));
}

#[test]
fn a_check_of_many_peers_stays_short() {
    let mut facts = facts();
    let down = |n| peer(&format!("node-{n}"), "down", "", "no-answer");
    answers(&mut facts).peers.extend((0..500).map(down));
    let checks = examine(&facts);
    let check = check(&checks, Subject::Peers);
    assert_eq!(check.causes, ["no-answer"]);
    assert!(check.finding.ends_with("; and 496 more"), "{}", check.finding);
}

#[test]
fn the_true_cause_of_a_peers_state_is_named() {
    let cases: [(&str, Option<&str>, Verdict, Change); 20] = [
        ("healthy", None, Verdict::Healthy, |_| {}),
        ("the peer is away", Some("no-answer"), Verdict::Down, |facts| {
            answers(facts).peers[0] = peer("node-b", "down", "", "no-answer");
        }),
        ("UDP is blocked on the way", Some("udp-blocked"), Verdict::Down, |facts| {
            answers(facts).peers = vec![peer("node-b", "down", "", "udp-blocked")];
        }),
        ("UDP is blocked on this node", Some("firewall-drops-tunnels"), Verdict::Down, |facts| {
            let answers = answers(facts);
            answers.peers = vec![peer("node-b", "down", "", "udp-blocked")];
            answers.status.problem_details = vec![detail("firewall-drops-tunnels")];
        }),
        ("full conntrack", Some("conntrack-full"), Verdict::Down, |facts| {
            answers(facts).peers[0] = peer("node-b", "down", "", "no-answer");
            facts.host.conntrack = Some(Conntrack { count: 100, max: 100 });
        }),
        ("clock set back", Some("clock-set-back"), Verdict::Down, |facts| {
            answers(facts).peers[0] = peer("node-b", "down", "", "no-handshake");
            facts.host.last_written = Some(NOW + 3_600);
        }),
        ("the peer's clock", Some("no-handshake"), Verdict::Down, |facts| {
            answers(facts).peers[0] = peer("node-b", "down", "", "no-handshake");
        }),
        ("cloned node", Some("key-conflict"), Verdict::Down, |facts| {
            answers(facts).peers[0] = peer("node-b", "down", "", "key-conflict");
            answers(facts).status.problem_details = vec![detail("conntrack-full")];
        }),
        ("removed", Some("node-removed"), Verdict::Down, |facts| {
            answers(facts).peers[0] = peer("node-b", "down", "", "no-answer");
            answers(facts).status.problem_details = vec![detail("node-removed")];
        }),
        ("an old map", Some("map-expired"), Verdict::Down, |facts| {
            answers(facts).peers[0] = peer("node-b", "down", "", "no-answer");
            answers(facts).status.problem_details = vec![detail("map-expired")];
            away(facts, "controller-unreachable");
        }),
        ("controller away", Some("controller-unreachable"), Verdict::Down, |facts| {
            answers(facts).peers = vec![peer("node-b", "down", "", "no-candidates")];
            away(facts, "controller-unreachable");
        }),
        ("relayed by NAT", Some("nat-mapping-dependent"), Verdict::Relayed, |facts| {
            answers(facts).peers[0] = peer("node-b", "up", "relay", "nat-mapping-dependent");
        }),
        ("relayed by a firewall", Some("firewall-closes-port"), Verdict::Relayed, |facts| {
            answers(facts).peers[0] = peer("node-b", "up", "relay", "relayed-no-answer");
            answers(facts).status.note_details = vec![detail("firewall-closes-port")];
        }),
        ("up, but dropped", Some("firewall-drops-input"), Verdict::Impaired, |facts| {
            answers(facts).status.problem_details = vec![detail("firewall-drops-input")];
        }),
        ("overlapping networks", Some("prefix-overlap"), Verdict::Impaired, |facts| {
            answers(facts).peers[0].conflict_details = vec![detail("prefix-overlap")];
        }),
        ("MTU hole", Some("path-mtu-small"), Verdict::Healthy, |facts| {
            answers(facts).peers[0].mtu = Some(1_320);
        }),
        ("lossy", Some("path-loss-high"), Verdict::Impaired, |facts| {
            answers(facts).peers[0].loss_percent = Some(18.0);
        }),
        ("UDP is blocked, also to the STUN servers", Some("udp-blocked"), Verdict::Down, |facts| {
            let answers = answers(facts);
            answers.peers = vec![peer("node-b", "down", "", "udp-blocked")];
            answers.status.problem_details = vec![detail("reflector-silent")];
        }),
        ("dead relay", Some("relay-silent"), Verdict::Down, |facts| {
            answers(facts).peers[0] = peer("node-b", "down", "", "relay-silent");
        }),
        ("slow", Some("path-rtt-high"), Verdict::Impaired, |facts| {
            answers(facts).peers[0].rtt_us = Some(800_000);
        }),
    ];
    for (name, cause, verdict, change) in cases {
        let mut facts = facts();
        change(&mut facts);
        let checks = examine(&facts);
        let explanation = explain("node-b", answers(&mut facts), &[], &checks);
        assert_eq!(explanation.cause.as_deref(), cause, "{name}: {explanation:?}");
        assert_eq!(explanation.state, verdict, "{name}: {explanation:?}");
        assert_eq!(explanation.remedy.is_some(), verdict.is_bad(), "{name}: {explanation:?}");
        assert!(!explanation.sentences.is_empty(), "{name}");
        let named = explanation.sentences.iter().filter(|text| text.starts_with("the cause: "));
        let named = named.count();
        assert!(named <= 1, "{name}: {explanation:?}");
        let needs_one = matches!(verdict, Verdict::Down | Verdict::Relayed);
        assert!(named == 1 || !needs_one, "{name}: {explanation:?}");
    }
}

#[test]
fn a_fault_of_this_node_is_named_beside_a_healthy_path() {
    let last = |facts: &mut Facts| {
        let checks = examine(facts);
        let explanation = explain("node-b", answers(facts), &[], &checks);
        assert_eq!((explanation.state, explanation.cause), (Verdict::Healthy, None));
        explanation.sentences.last().unwrap().clone()
    };
    let mut facts = facts();
    // The state of another peer is no fault of this node.
    answers(&mut facts).peers[1] = peer("node-c", "down", "", "key-conflict");
    assert_eq!(last(&mut facts), "no fault of its path or of this node is known");
    facts.host.now = NOW + 3 * DAY;
    let last = last(&mut facts);
    let wanted = "no fault of its path is known, but: the node's certificate expired at ";
    assert!(last.starts_with(wanted), "{last}");
}

#[test]
fn what_to_do_about_a_peer_names_it() {
    let changes: [fn(&mut pb::PeerStatus); 3] = [
        |found| *found = peer("node-b", "down", "", "no-answer"),
        |found| found.rtt_us = Some(800_000),
        |found| found.loss_percent = Some(18.0),
    ];
    for change in changes {
        let mut facts = facts();
        change(&mut answers(&mut facts).peers[0]);
        let checks = examine(&facts);
        let remedy = explain("node-b", answers(&mut facts), &[], &checks).remedy.unwrap();
        assert!(remedy.contains(" node-b`"), "{remedy}");
    }
}

#[test]
fn the_cause_is_not_named_while_paths_are_tried() {
    for (state, path_kind, code) in [
        ("connecting", "", "trying-candidates"),
        ("connecting", "", "static-peer-trying"),
        ("up", "relay", "relayed-trying-direct"),
    ] {
        let mut facts = facts();
        answers(&mut facts).peers[0] = peer("node-b", state, path_kind, code);
        let checks = examine(&facts);
        let explanation = explain("node-b", answers(&mut facts), &[], &checks);
        let last = explanation.sentences.last().unwrap();
        assert_eq!(last, "it is too early to name a cause: ask again in some seconds", "{code}");
        assert_eq!(explanation.cause.as_deref(), Some(code));
    }
}

#[test]
fn a_peer_that_is_heard_but_does_not_answer_is_blocked_one_way() {
    let mut facts = facts();
    answers(&mut facts).peers[0] = peer("node-b", "down", "", "no-answer");
    let checks = examine(&facts);
    let cause = |heard_ms, answered_ms| {
        let path_kind = "direct".to_owned();
        let path = pb::PathStatus { path_kind, heard_ms, answered_ms, ..Default::default() };
        let Agent::Answered(answers) = &facts.agent else { panic!("the agent answered") };
        explain("node-b", answers, &[path], &checks).cause
    };
    assert_eq!(cause(Some(900), None).as_deref(), Some("udp-one-way"));
    assert_eq!(cause(Some(900), Some(3_000_000)).as_deref(), Some("udp-one-way"));
    for (heard, answered) in [(None, None), (Some(3_000_000), None), (Some(900), Some(900))] {
        assert_eq!(cause(heard, answered).as_deref(), Some("no-answer"), "{heard:?} {answered:?}");
    }
}

#[test]
fn a_name_that_no_peer_has_is_explained() {
    let mut facts = facts();
    let checks = examine(&facts);
    let answers = answers(&mut facts);
    let unknown = explain("node-x", answers, &[], &checks);
    assert_eq!(unknown.state, Verdict::Unknown);
    assert_eq!(unknown.cause.as_deref(), Some("peer-unknown"));
    let own = explain("node-a", answers, &[], &checks);
    assert!(own.sentences[0].contains("this node itself"), "{own:?}");
    let by_address = explain("198.19.0.7", answers, &[], &checks);
    assert_eq!(by_address.peer, "node-b");
}

#[test]
fn roles_and_trust_have_checks_of_their_own() {
    for (code, subject, state) in [
        ("relay-denied", Subject::Relay, CheckState::Warning),
        ("identity-changed", Subject::Trust, CheckState::Failed),
        ("name-moved", Subject::Trust, CheckState::Warning),
        ("api-servers-unreached", Subject::ApiEndpoint, CheckState::Failed),
        ("api-port-without-role", Subject::ApiEndpoint, CheckState::Warning),
    ] {
        let mut facts = facts();
        answers(&mut facts).status.problem_details = vec![detail(code)];
        let checks = examine(&facts);
        let check = check(&checks, subject);
        assert_eq!((check.state, check.causes.as_slice()), (state, &[code.to_owned()][..]));
        assert!(check.remedy.is_some(), "{code}: {check:?}");
    }
}

#[test]
fn a_relayed_peer_names_relays_that_are_not_granted() {
    let mut facts = facts();
    answers(&mut facts).status.note_details = vec![detail("relay-not-granted")];
    answers(&mut facts).peers = vec![peer("node-b", "up", "relay", "relayed-trying-direct")];
    let checks = examine(&facts);
    let explanation = explain("node-b", answers(&mut facts), &[], &checks);
    let text = "text of relay-not-granted".to_owned();
    assert!(explanation.sentences.contains(&text), "{explanation:?}");
}
