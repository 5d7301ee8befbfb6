//! Parts about the host, as the kernel and the journal have them. Nothing is changed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::process::{Command, Stdio};

use towline_netlink::{
    Address, Family, Link, NetlinkError, Route, RouteKind, Rtnetlink, Rule, RuleAction,
};

use super::{Keep, Part};
use crate::config::Config;

/// Number of lines of the journal that are read.
const JOURNAL_LINES: &str = "--lines=2000";
/// Units whose lines are read.
const UNITS: [&str; 4] = [
    "--unit=towline.service",
    "--unit=towline-guard.service",
    "--unit=towline-helper@*.service",
    "--unit=towline-join.service",
];
/// Files that say which system this is.
const VERSION_FILES: [&str; 2] = ["/proc/version", "/etc/os-release"];
/// Settings of the kernel below `/proc/sys/net` that change what the mesh can do.
const SETTINGS: [&str; 8] = [
    "core/rmem_max",
    "core/wmem_max",
    "ipv4/conf/all/rp_filter",
    "ipv4/conf/all/src_valid_mark",
    "ipv4/ip_forward",
    "ipv4/ip_local_reserved_ports",
    "ipv6/conf/all/disable_ipv6",
    "ipv6/conf/all/forwarding",
];

/// Returns the parts about the host. `config` is the effective configuration.
pub fn parts(config: &Config) -> Vec<Part> {
    let mut parts = vec![
        Part::new("config.toml", toml::to_string(config).map_err(|error| error.to_string())),
        Part::new("versions.txt", Ok(versions())),
        Part::new("host/settings.txt", Ok(settings())),
    ];
    let mut listed = |name: &str, list: fn(&mut Rtnetlink) -> Result<String, NetlinkError>| {
        let text = Rtnetlink::open().and_then(|mut rtnetlink| list(&mut rtnetlink));
        parts.push(Part::new(name, text.map_err(|error| error.to_string())));
    };
    listed("host/links.txt", links);
    listed("host/addresses.txt", addresses);
    listed("host/rules.txt", rules);
    listed("host/routes.txt", routes);
    let table = towline_host::list_table(&config.routing.nftables_table);
    parts.push(Part::new(
        "host/nftables.txt",
        match table {
            Ok(Some(text)) => Ok(text),
            Ok(None) => Err("there is no such table".to_owned()),
            Err(error) => Err(error.to_string()),
        },
    ));
    parts.push(Part { keep: Keep::End, ..Part::new("journal.txt", journal()) });
    parts
}

fn versions() -> String {
    let mut text = format!("towline {}\n", towline_proto::VERSION);
    for file in VERSION_FILES {
        let content = std::fs::read_to_string(file);
        let content = content.unwrap_or_else(|error| format!("cannot read it: {error}\n"));
        text += &format!("\n{file}\n{content}");
    }
    text
}

fn settings() -> String {
    let value = |name: &str| match std::fs::read_to_string(format!("/proc/sys/net/{name}")) {
        Ok(value) => value.trim().to_owned(),
        Err(error) => format!("cannot read it: {error}"),
    };
    SETTINGS.iter().map(|name| format!("net/{name} = {}\n", value(name))).collect()
}

/// Runs `journalctl`, if the machine has it.
fn journal() -> Result<String, String> {
    let output = Command::new("journalctl")
        .args(["--no-pager", "--output=short-iso", "--quiet", JOURNAL_LINES])
        .args(UNITS)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run journalctl: {error}"))?;
    if !output.status.success() {
        return Err(format!("journalctl failed: {}", output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn links(rtnetlink: &mut Rtnetlink) -> Result<String, NetlinkError> {
    let links = rtnetlink.links()?;
    Ok(links.iter().map(link_line).collect())
}

fn link_line(link: &Link) -> String {
    let Link { index, name, mtu, .. } = link;
    let kind = link.kind.as_deref().unwrap_or("device");
    let mut line = format!("{index}: {name} {kind} mtu {mtu}");
    for (is_set, word) in [(link.up, "up"), (link.running, "running"), (link.loopback, "loopback")]
    {
        if is_set {
            add(&mut line, word);
        }
    }
    if let Some(master) = link.master {
        add(&mut line, &format!("master {master}"));
    }
    if let Some(filter) = link.reverse_path_filter {
        add(&mut line, &format!("rp_filter {filter}"));
    }
    line + "\n"
}

fn addresses(rtnetlink: &mut Rtnetlink) -> Result<String, NetlinkError> {
    let names = names(rtnetlink)?;
    let addresses = rtnetlink.addresses(None)?;
    let line = |address: &Address| {
        let Address { index, prefix, flags, scope } = address;
        format!("{prefix} dev {} scope {scope} flags {:#x}\n", name_of(&names, *index), flags.0)
    };
    Ok(addresses.iter().map(line).collect())
}

fn rules(rtnetlink: &mut Rtnetlink) -> Result<String, NetlinkError> {
    let mut text = String::new();
    for family in Family::ALL {
        for rule in rtnetlink.rules(family)? {
            text += &rule_line(&rule);
        }
    }
    Ok(text)
}

fn rule_line(rule: &Rule) -> String {
    let mut line = format!("{} {}:", family_word(rule.family), rule.priority);
    if rule.invert {
        add(&mut line, "not");
    }
    let range = |range: &RangeInclusive<u16>| format!("{}-{}", range.start(), range.end());
    let matches = [
        rule.source.map(|net| format!("from {net}")),
        rule.destination.map(|net| format!("to {net}")),
        rule.mark.map(|(mark, mask)| format!("fwmark {mark:#x}/{mask:#x}")),
        rule.input.as_ref().map(|name| format!("iif {name}")),
        rule.output.as_ref().map(|name| format!("oif {name}")),
        rule.protocol.map(|number| format!("ipproto {number}")),
        rule.source_ports.as_ref().map(|ports| format!("sport {}", range(ports))),
        rule.destination_ports.as_ref().map(|ports| format!("dport {}", range(ports))),
        rule.users.as_ref().map(|users| format!("uidrange {}-{}", users.start(), users.end())),
        rule.suppress_prefix_length.map(|length| format!("suppress_prefixlength {length}")),
    ];
    for matched in matches.into_iter().flatten() {
        add(&mut line, &matched);
    }
    let action = match rule.action {
        RuleAction::Table(table) => format!("lookup {table}"),
        RuleAction::Goto(priority) => format!("goto {priority}"),
        RuleAction::Nop => "nop".to_owned(),
        RuleAction::Unreachable => "unreachable".to_owned(),
        RuleAction::Other(number) => format!("action {number}"),
    };
    add(&mut line, &action);
    add(&mut line, &format!("proto {}\n", rule.made_by));
    line
}

fn routes(rtnetlink: &mut Rtnetlink) -> Result<String, NetlinkError> {
    let names = names(rtnetlink)?;
    let mut text = String::new();
    for family in Family::ALL {
        for route in rtnetlink.routes(family, None)? {
            text += &route_line(&route, &names);
        }
    }
    Ok(text)
}

fn route_line(route: &Route, names: &BTreeMap<u32, String>) -> String {
    let mut line = match route.kind {
        RouteKind::Unicast => String::new(),
        RouteKind::Unreachable => "unreachable ".to_owned(),
        RouteKind::Blackhole => "blackhole ".to_owned(),
        RouteKind::Throw => "throw ".to_owned(),
        RouteKind::Other(number) => format!("type {number} "),
    };
    line += &route.destination.to_string();
    let hop = |link: u32, gateway: Option<std::net::IpAddr>| {
        let via = gateway.map(|gateway| format!("via {gateway} ")).unwrap_or_default();
        format!("{via}dev {}", name_of(names, link))
    };
    if let Some(link) = route.link {
        add(&mut line, &hop(link, route.gateway));
    }
    for next in &route.next_hops {
        add(&mut line, &format!("nexthop {}", hop(next.link, next.gateway)));
    }
    add(&mut line, &format!("table {} metric {}", route.table, route.metric));
    if let Some(source) = route.source {
        add(&mut line, &format!("src {source}"));
    }
    if let Some(mtu) = route.mtu {
        add(&mut line, &format!("mtu {mtu}"));
    }
    add(&mut line, &format!("proto {}\n", route.protocol));
    line
}

fn names(rtnetlink: &mut Rtnetlink) -> Result<BTreeMap<u32, String>, NetlinkError> {
    Ok(rtnetlink.links()?.into_iter().map(|link| (link.index, link.name)).collect())
}

fn name_of(names: &BTreeMap<u32, String>, index: u32) -> String {
    names.get(&index).cloned().unwrap_or_else(|| index.to_string())
}

fn family_word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}

/// Appends words after a blank.
fn add(line: &mut String, words: &str) {
    // Writing to a string never fails.
    let _ = write!(line, " {words}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_reads_as_ip_rule_writes_it() {
        let rule = Rule {
            invert: true,
            mark: Some((0x10, 0x30)),
            source: Some("10.0.0.0/8".parse().unwrap()),
            destination_ports: Some(80..=81),
            ..Rule::new(Family::V4, 21_580, RuleAction::Table(254))
        };
        assert_eq!(
            rule_line(&rule),
            "ipv4 21580: not from 10.0.0.0/8 fwmark 0x10/0x30 dport 80-81 lookup 254 proto 4\n"
        );
    }

    #[test]
    fn a_route_reads_as_ip_route_writes_it() {
        let names = BTreeMap::from([(2, "eth0".to_owned())]);
        let route = Route::new("10.0.0.0/8".parse().unwrap());
        let via = route.clone().via("192.0.2.1".parse().unwrap()).dev(2).mtu(1_420);
        assert_eq!(
            route_line(&via, &names),
            "10.0.0.0/8 via 192.0.2.1 dev eth0 table 254 metric 0 mtu 1420 proto 4\n"
        );
        let guard = route.kind(RouteKind::Unreachable).metric(20);
        assert_eq!(
            route_line(&guard, &names),
            "unreachable 10.0.0.0/8 table 254 metric 20 proto 4\n"
        );
    }
}
