use super::*;
use crate::foreign::ForeignSet;
use crate::set::Interval;
use crate::{Chain, ChainKind, CtState, IptablesStates};

fn packet() -> Packet {
    Packet {
        hook: Hook::Input,
        input: Some(PacketLink { index: 7, name: "towline0".to_owned() }),
        output: None,
        source: "198.19.0.1".parse().unwrap(),
        destination: "198.19.0.2".parse().unwrap(),
        protocol: libc::IPPROTO_TCP as u8,
        source_port: 40_000,
        destination_port: 10_250,
    }
}

fn table(chains: impl IntoIterator<Item = (&'static str, Chain)>) -> ForeignTable {
    ForeignTable {
        family: TableFamily::Ip,
        name: "filter".to_owned(),
        chains: chains.into_iter().map(|(name, chain)| (name.to_owned(), chain)).collect(),
        sets: BTreeMap::new(),
    }
}

fn input(rules: impl IntoIterator<Item = Rule>) -> Chain {
    Chain::base(ChainKind::Filter, Hook::Input, 0).policy(Policy::Drop).rules(rules)
}

fn is_dropped(rules: impl IntoIterator<Item = Rule>) -> bool {
    table([("INPUT", input(rules))]).evaluate("INPUT", &packet()).is_dropped()
}

#[test]
fn a_policy_drops_what_no_rule_accepts() {
    let tcp = libc::IPPROTO_TCP as u8;
    let answers = || Rule::new().ct_state(CtState::ESTABLISHED | CtState::RELATED).accept();
    assert!(is_dropped([]));
    assert!(is_dropped([
        answers(),
        Rule::new()
            .iptables_conntrack(IptablesStates::ESTABLISHED | IptablesStates::RELATED)
            .accept(),
        Rule::new().input("lo").accept(),
        Rule::new().protocol(libc::IPPROTO_UDP as u8).destination_port(51_830).accept(),
        Rule::new().protocol(tcp).destination_port(22).accept(),
        Rule::new().source("10.0.0.0/8".parse().unwrap()).accept(),
    ]));
    for accepts in [
        Rule::new().input("towline0").accept(),
        Rule::new().not_input("eth0").accept(),
        Rule::new().source("198.19.0.0/16".parse().unwrap()).accept(),
        Rule::new().protocol(tcp).destination_ports(10_000..=11_000).accept(),
        Rule::new().ct_state(CtState::NEW).accept(),
        Rule::new().tcp_syn().accept(),
        Rule::new().destination_is_local().accept(),
    ] {
        assert!(!is_dropped([answers(), accepts.clone()]), "{accepts:?}");
    }
}

#[test]
fn what_is_unknown_may_pass() {
    let limit = Rule::new().step(Expression::Other("limit".to_owned()));
    assert!(!is_dropped([limit.clone().accept()]));
    assert!(is_dropped([limit.drop()]));
    assert!(!is_dropped([Rule::new().socket_owner(0).accept()]));
}

#[test]
fn jumps_return_and_a_goto_ends_the_chain() {
    let jump = |inner: Chain| {
        let table = table([
            ("INPUT", input([Rule::new().jump("ufw-user-input")])),
            ("ufw-user-input", inner),
        ]);
        table.evaluate("INPUT", &packet())
    };
    let fate = jump(Chain::regular().rule(Rule::new().input("eth0").accept()));
    assert_eq!(fate, Fate { can_pass: false, can_drop: true });
    assert!(!jump(Chain::regular().rule(Rule::new().accept())).is_dropped());
    assert!(jump(Chain::regular().rule(Rule::new().drop())).is_dropped());
    let looped = table([("INPUT", input([Rule::new().goto("INPUT")]))]);
    assert!(looped.evaluate("INPUT", &packet()).is_dropped(), "evaluation ends");
}

#[test]
fn sets_and_verdict_maps_are_looked_up() {
    let mut ours = table([]);
    let map = Rule::new()
        .step(Expression::Ct { key: key::CT_STATE, register: key::REGISTER_1 })
        .step(Expression::VerdictMap { set: "__map0".to_owned(), register: key::REGISTER_1 });
    let ports = Rule::new().protocol(libc::IPPROTO_TCP as u8).destination_port_in("ports");
    ours.chains.insert("INPUT".to_owned(), input([map, ports.accept()]));
    let state = |state: u32| KeyType::decode(&state.to_ne_bytes()).unwrap();
    let element = |first, last, verdict| Element { values: Interval::new(first, last), verdict };
    let established = element(state(2), state(2), Some(Verdict::Accept));
    let states = ForeignSet::new(4, vec![established], true);
    ours.sets.insert("__map0".to_owned(), states);
    let numbers = ForeignSet::new(2, vec![element(22, 22, None)], true);
    ours.sets.insert("ports".to_owned(), numbers);
    assert!(ours.evaluate("INPUT", &packet()).is_dropped());
    ours.sets.get_mut("ports").unwrap().elements.push(element(10_000, 11_000, None));
    assert!(!ours.evaluate("INPUT", &packet()).is_dropped());
    let new = element(state(NEW), state(NEW), Some(Verdict::Drop));
    ours.sets.get_mut("__map0").unwrap().elements.push(new);
    assert!(ours.evaluate("INPUT", &packet()).is_dropped());
    ours.sets.get_mut("__map0").unwrap().length = 6;
    assert!(!ours.evaluate("INPUT", &packet()).is_dropped(), "of another kind");
}

#[test]
fn what_is_not_in_a_set_that_is_not_known_whole_is_unknown() {
    for (is_complete, expected) in [(true, true), (false, false)] {
        let ports = Rule::new().protocol(libc::IPPROTO_TCP as u8).destination_port_in("ports");
        let mut ours = table([("INPUT", input([ports.accept()]))]);
        let element = Element { values: Interval::new(22, 22), verdict: None };
        let set = ForeignSet::new(2, vec![element], is_complete);
        ours.sets.insert("ports".to_owned(), set);
        assert_eq!(ours.evaluate("INPUT", &packet()).is_dropped(), expected);
    }
}

#[test]
fn marks_are_unknown_since_other_chains_set_them() {
    // As kube-router and Calico do: accepted packets are marked, all others are rejected.
    let is_marked = |operator| {
        Rule::new()
            .step(Expression::Meta { key: key::META_MARK, register: key::REGISTER_1 })
            .step(Expression::Bitwise {
                source: key::REGISTER_1,
                target: key::REGISTER_1,
                mask: 0x10000u32.to_ne_bytes().to_vec(),
                xor: vec![0; 4],
            })
            .step(Expression::Compare {
                register: key::REGISTER_1,
                operator,
                value: 0x10000u32.to_ne_bytes().to_vec(),
            })
    };
    let by_iptables = |inverted: u8| {
        let mut info = 0x10000u32.to_ne_bytes().repeat(2);
        info.extend([inverted, 0, 0, 0]);
        let name = "mark".to_owned();
        Rule::new().step(Expression::Match { name, revision: 1, info })
    };
    let status = Rule::new()
        .step(Expression::Ct { key: key::CT_STATUS, register: key::REGISTER_1 })
        .step(Expression::Compare {
            register: key::REGISTER_1,
            operator: key::NOT_EQUAL,
            value: vec![0; 4],
        });
    // The policy of the pod network: a drop of what is not marked.
    assert!(!is_dropped([is_marked(key::NOT_EQUAL).drop(), Rule::new().accept()]));
    assert!(!is_dropped([by_iptables(1).drop(), Rule::new().accept()]));
    // The remedy for Docker's own tables: an accept of what is marked.
    assert!(!is_dropped([is_marked(key::EQUAL).accept()]));
    assert!(!is_dropped([by_iptables(0).accept()]));
    assert!(!is_dropped([status.accept()]));
    // A rule that only sets a mark decides nothing.
    let sets =
        Rule::new().step(Expression::Target { name: "MARK".to_owned(), revision: 2, info: vec![] });
    assert!(is_dropped([sets]));
    assert!(is_dropped([by_iptables(0).drop()]), "the policy drops it otherwise");
}

#[test]
fn an_unknown_statement_may_accept_and_an_unknown_match_may_hold() {
    let other = |name: &str| Rule::new().step(Expression::Other(name.to_owned()));
    for statement in ["queue", "synproxy", "fwd", "tproxy", "immediate", "of the future"] {
        assert!(!is_dropped([other(statement)]), "{statement}");
    }
    for decides_nothing in ["log", "limit", "flow_offload"] {
        assert!(is_dropped([other(decides_nothing)]), "{decides_nothing}");
    }
}

#[test]
fn lists_of_ports_are_decoded() {
    let multiport = |flags: u8, ports: &[u16], ranges: &[u8], inverted: u8| {
        let mut info = vec![flags, ports.len() as u8];
        let mut all = ports.to_vec();
        all.resize(15, 0);
        info.extend(all.iter().flat_map(|port| port.to_ne_bytes()));
        let mut flags = ranges.to_vec();
        flags.resize(15, 0);
        info.extend(flags);
        info.push(inverted);
        let name = "multiport".to_owned();
        let tcp = Rule::new().protocol(libc::IPPROTO_TCP as u8);
        tcp.step(Expression::Match { name, revision: 1, info }).accept()
    };
    const SOURCE: u8 = 0;
    const DESTINATION: u8 = 1;
    const EITHER: u8 = 2;
    for (rule, expected) in [
        (multiport(DESTINATION, &[80, 443], &[], 0), true),
        (multiport(DESTINATION, &[80, 443], &[], 1), false),
        (multiport(DESTINATION, &[80, 10_250], &[], 0), false),
        (multiport(DESTINATION, &[80, 10_000, 11_000], &[0, 1], 0), false),
        (multiport(DESTINATION, &[9_000, 10_000, 11_000], &[1], 0), true),
        (multiport(SOURCE, &[10_250], &[], 0), true),
        (multiport(SOURCE, &[40_000], &[], 0), false),
        (multiport(EITHER, &[10_250], &[], 0), false),
    ] {
        assert_eq!(is_dropped([rule.clone()]), expected, "{rule:?}");
    }
}

#[test]
fn forwarded_packets_and_iptables_targets_are_evaluated_too() {
    let forwarded = Packet {
        hook: Hook::Forward,
        output: Some(PacketLink { index: 9, name: "cni0".to_owned() }),
        destination: "10.244.1.2".parse().unwrap(),
        ..packet()
    };
    let chain = |rule: Rule| {
        table([("FORWARD", Chain::base(ChainKind::Filter, Hook::Forward, 0).rule(rule))])
    };
    let target = |name: &str| {
        Rule::new().step(Expression::Target { name: name.to_owned(), revision: 0, info: vec![] })
    };
    assert!(chain(target("REJECT")).evaluate("FORWARD", &forwarded).is_dropped());
    assert!(!chain(target("LOG")).evaluate("FORWARD", &forwarded).is_dropped());
    let out = Rule::new().output("cni0").drop();
    assert!(chain(out).evaluate("FORWARD", &forwarded).is_dropped());
    let other = Rule::new().output("docker0").drop();
    assert!(!chain(other).evaluate("FORWARD", &forwarded).is_dropped());
}
