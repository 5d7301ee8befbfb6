//! Compares what we read from the kernel with what `nft -j` reads: a table of ours, and one that `nft`
//! loaded. Skipped where there is no program `nft`.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // in a test a panic is the report

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;

use serde_json::Value;
use towline_netlink::Family;
use towline_netns::namespace_test;
use towline_nftables::{
    Chain, ChainKind, Expression, Hook, Interval, KeyType, Loaded, Nft, Policy, Rule, Set, Table,
    TableFamily, Verdict,
};

/// Table as `nft -f` reads it, with expressions that every kernel with nftables has.
const RULES: &str = r#"
table inet other {
  comment "of another program"
  set nets { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.168.1.1-192.168.1.9, 198.51.100.7 } }
  set nets6 { type ipv6_addr; flags interval; elements = { fd00::/8, 2001:db8::1 } }
  set ports { type inet_service; elements = { 22, 80, 443 } }
  chain sub { ip saddr @nets accept comment "from nets"
    return
  }
  chain inp { type filter hook input priority 10; policy drop;
    iifname "lo" accept
    ip6 saddr @nets6 counter jump sub
    tcp dport @ports accept comment "ports"
    meta mark 0x10 drop
    udp dport 53 goto sub
  }
  chain out { type filter hook output priority -150; policy accept; meta mark set 0x10; }
}
"#;

/// What both readers say of a table.
#[derive(Debug, Default, PartialEq, Eq)]
struct Summary {
    chains: BTreeMap<String, ChainSummary>,
    /// Elements of the sets by their first and last value.
    sets: BTreeMap<String, Vec<(String, String)>>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct ChainSummary {
    /// Type, hook, priority and policy of a base chain.
    base: Option<(String, String, i64, String)>,
    rules: Vec<RuleSummary>,
}

#[derive(Debug, PartialEq, Eq)]
struct RuleSummary {
    handle: u64,
    comment: Option<String>,
    /// Last statement of the rule, if it ends the evaluation of the chain.
    verdict: Option<String>,
    is_counted: bool,
}

namespace_test! {
    fn both_read_the_same_of_a_table_of_ours() {
        let mut nft = Nft::open().unwrap();
        let nets = ["10.0.0.0/8", "192.168.0.0/24", "fd00::/8"].map(|net| net.parse().unwrap());
        let filter = Chain::base(ChainKind::Filter, Hook::Forward, -7)
            .policy(Policy::Drop)
            .rule(Rule::new().input("eth0").source_in(Family::V4, "v4").accept())
            .rule(Rule::new().comment("dns").protocol(17).destination_port(53).counter().drop())
            .rule(Rule::new().protocol(6).destination_port_in("ports").jump("regular"))
            .rule(Rule::new().not_mark(0x10, 0x30).set_mark(0x20, 0x30));
        let table = Table::new(TableFamily::Inet, "ours")
            .set("v4", Set::networks(KeyType::Ipv4, &nets))
            .set("v6", Set::networks(KeyType::Ipv6, &nets))
            .set("ports", Set::ports([22, 53]))
            .chain("regular", Chain::default().rule(Rule::new().source(nets[2]).return_()))
            .chain("filter", filter);
        nft.load(&table).unwrap();
        compare(&mut nft, "ours");
    }
}

namespace_test! {
    fn both_read_the_same_of_a_table_of_nft() {
        let file = std::env::temp_dir().join(format!("towline-nft-{}", std::process::id()));
        std::fs::write(&file, RULES).unwrap();
        let loaded = Command::new("nft").arg("-f").arg(&file).output();
        std::fs::remove_file(&file).unwrap();
        let Ok(loaded) = loaded else { return println!("skipped: there is no program nft") };
        let errors = String::from_utf8_lossy(&loaded.stderr);
        assert!(loaded.status.success(), "{errors}");
        let mut nft = Nft::open().unwrap();
        compare(&mut nft, "other");
        let read = nft.read(TableFamily::Inet, "other").unwrap().unwrap();
        assert_eq!(read.table.comment.as_deref(), Some("of another program"));
    }
}

fn compare(nft: &mut Nft, name: &str) {
    let listed = Command::new("nft").args(["-j", "list", "table", "inet", name]).output();
    let Ok(listed) = listed else { return println!("skipped: there is no program nft") };
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let theirs = theirs(&serde_json::from_slice(&listed.stdout).unwrap());
    let ours = ours(&nft.read(TableFamily::Inet, name).unwrap().unwrap());
    assert_eq!(ours, theirs);
    assert!(ours.chains.len() > 1 && ours.sets.len() > 2);
}

fn ours(loaded: &Loaded) -> Summary {
    let mut summary = Summary::default();
    for (name, chain) in &loaded.table.chains {
        let base = chain.base.as_ref().map(|base| {
            let kind = format!("{:?}", base.kind).to_lowercase();
            let hook = format!("{:?}", base.hook).to_lowercase();
            let policy = format!("{:?}", base.policy).to_lowercase();
            (kind, hook, base.priority.into(), policy)
        });
        let rules = loaded.handles(name).map(|(rule, handle)| RuleSummary {
            handle,
            comment: rule.comment.clone(),
            verdict: rule.expressions.last().and_then(verdict),
            is_counted: rule.expressions.contains(&Expression::Counter),
        });
        summary.chains.insert(name.clone(), ChainSummary { base, rules: rules.collect() });
    }
    for (name, set) in &loaded.table.sets {
        let text = |value: u128| match set.key {
            KeyType::Ipv4 => IpAddr::from((value as u32).to_be_bytes()).to_string(),
            KeyType::Ipv6 => IpAddr::from(value.to_be_bytes()).to_string(),
            _ => value.to_string(),
        };
        let elements = set.elements.iter().map(|one| (text(one.first()), text(one.last())));
        summary.sets.insert(name.clone(), elements.collect());
    }
    summary
}

fn verdict(expression: &Expression) -> Option<String> {
    let Expression::Verdict(verdict) = expression else { return None };
    Some(match verdict {
        Verdict::Accept => "accept".into(),
        Verdict::Drop => "drop".into(),
        Verdict::Return => "return".into(),
        Verdict::Jump(chain) => format!("jump {chain}"),
        Verdict::Goto(chain) => format!("goto {chain}"),
    })
}

fn theirs(listed: &Value) -> Summary {
    let mut summary = Summary::default();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    for object in listed["nftables"].as_array().unwrap() {
        if let Some(chain) = object.get("chain") {
            let base = text(&chain["hook"]).map(|hook| {
                let (kind, policy) = (text(&chain["type"]).unwrap(), text(&chain["policy"]));
                (kind, hook, chain["prio"].as_i64().unwrap(), policy.unwrap_or("accept".into()))
            });
            let summary = summary.chains.entry(text(&chain["name"]).unwrap()).or_default();
            summary.base = base;
        } else if let Some(rule) = object.get("rule") {
            let statements = rule["expr"].as_array().unwrap();
            let last = statements.last().and_then(|last| last.as_object()?.iter().next());
            let verdict = last.and_then(|(name, value)| match name.as_str() {
                "accept" | "drop" | "return" => Some(name.clone()),
                "jump" | "goto" => Some(format!("{name} {}", value["target"].as_str()?)),
                _ => None,
            });
            let chain = summary.chains.entry(text(&rule["chain"]).unwrap()).or_default();
            chain.rules.push(RuleSummary {
                handle: rule["handle"].as_u64().unwrap(),
                comment: text(&rule["comment"]),
                verdict,
                is_counted: statements.iter().any(|statement| statement.get("counter").is_some()),
            });
        } else if let Some(set) = object.get("set") {
            let elements = set["elem"].as_array().into_iter().flatten().map(interval);
            let mut elements: Vec<_> = elements.collect();
            elements.sort_by_key(|(first, _)| order(first));
            summary.sets.insert(text(&set["name"]).unwrap(), elements);
        }
    }
    summary
}

/// Returns the first and the last value of an element.
fn interval(element: &Value) -> (String, String) {
    if let Some(prefix) = element.get("prefix") {
        let net = format!("{}/{}", prefix["addr"].as_str().unwrap(), prefix["len"]);
        let net: ipnet::IpNet = net.parse().unwrap();
        return (net.network().to_string(), net.broadcast().to_string());
    }
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        number => number.to_string(),
    };
    match element.get("range") {
        Some(range) => (text(&range[0]), text(&range[1])),
        None => (text(element), text(element)),
    }
}

/// Returns the number by which our sets sort an address or a port.
fn order(value: &str) -> u128 {
    match value.parse::<IpAddr>() {
        Ok(address) => Interval::from(address).first(),
        Err(_) => value.parse().unwrap(),
    }
}
