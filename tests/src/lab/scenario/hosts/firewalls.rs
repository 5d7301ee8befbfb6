//! Hosts with a firewall of another program that drops the mesh's traffic: the status names the chain
//! and the command.

use ipnet::{Ipv4Net, Ipv6Net};
use towline_nftables::{Hook, Policy, Rule, Table, TableFamily};

use super::Case;
use crate::lab::scenario::Setting;
use crate::lab::scenario::foreign_firewalls::{filter, ufw};
use crate::lab::scenario::scene::{Pair, Scene, has_no_problem, load, names_note, names_problem};
use crate::lab::topology::Host;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("firewalls/ufw", |setting| {
            named(setting, &[ufw()], "`ufw allow in on towline0`")
        }),
        Case::new("firewalls/iptables-input", |setting| {
            named(setting, &[iptables()], "`iptables -I INPUT -i towline0 -j ACCEPT`")
        }),
        Case::new("firewalls/ip6tables-input", |setting| {
            let table = Table { family: TableFamily::Ip6, ..iptables() };
            named(setting, &[table], "`ip6tables -I INPUT -i towline0 -j ACCEPT`")
        }),
        Case::new("firewalls/nftables-input", |setting| {
            let chain = filter(Hook::Input).policy(Policy::Drop);
            let table = Table::new(TableFamily::Inet, "filter").chain("input", chain);
            let command = "`nft insert rule inet filter input iifname \"towline0\" accept`";
            named(setting, &[table], command)
        }),
        Case::new("firewalls/last-rule-rejects", |setting| {
            let chain = filter(Hook::Input).rule(Rule::new().reject());
            let table = Table::new(TableFamily::Inet, "site").chain("in", chain);
            named(setting, &[table], "chain in of table inet site")
        })
        .long(),
        Case::new("firewalls/nftables-output", |setting| {
            let chain = filter(Hook::Output).rule(Rule::new().output("towline0").drop());
            let table = Table::new(TableFamily::Inet, "egress").chain("out", chain);
            named(setting, &[table], "`nft insert rule inet egress out oifname")
        }),
        Case::new("firewalls/nftables-forward", |setting| {
            let chain = filter(Hook::Forward).policy(Policy::Drop);
            let table = Table::new(TableFamily::Inet, "router").chain("forward", chain);
            named_with_pods(setting, &table, "chain forward of table inet router")
        }),
        Case::new("firewalls/iptables-forward", |setting| {
            let chain = filter(Hook::Forward).policy(Policy::Drop);
            let table = Table::new(TableFamily::Ip, "filter").chain("FORWARD", chain);
            named_with_pods(setting, &table, "`iptables -I FORWARD -i towline0 -j ACCEPT`")
        }),
        Case::new("firewalls/closed-port", closed_port),
        Case::new("firewalls/dropped-tunnels", |setting| {
            let udp = Rule::new().protocol(libc::IPPROTO_UDP as u8).source_port(51_830).drop();
            let chain = filter(Hook::Output).rule(udp);
            let table = Table::new(TableFamily::Inet, "egress").chain("out", chain);
            named(setting, &[table], "what leaves from UDP port 51830")
        }),
        Case::new("firewalls/that-accept-the-mesh", accepting),
    ]
}

/// The rules of an administrator who accepts only SSH and the tunnels.
fn iptables() -> Table {
    let chain = filter(Hook::Input)
        .policy(Policy::Drop)
        .rule(Rule::new().protocol(libc::IPPROTO_UDP as u8).destination_port(51_830).accept())
        .rule(Rule::new().protocol(libc::IPPROTO_TCP as u8).destination_port(22).accept());
    Table::new(TableFamily::Ip, "filter").chain("INPUT", chain)
}

/// Joins the hosts, loads the tables on the worker, and checks that its status names the problem.
fn named(setting: &Setting, tables: &[Table], words: &str) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    has_no_problem(&pair.worker)?;
    for table in tables {
        load(&scene.worker, table)?;
    }
    names_problem(&pair.worker, &[words])
}

/// Joins the hosts; the worker announces a network of pods.
fn with_pods(setting: &Setting, scene: &Scene) -> anyhow::Result<(Pair, Host)> {
    let v4: Ipv4Net = "10.244.1.0/24".parse()?;
    let v6: Ipv6Net = "2001:db8:244:1::/64".parse()?;
    let pod = scene.worker.pod("pod", v4, v6)?;
    let announce = "[node]\nprefixes = [\"10.244.1.0/24\"]\n";
    let flags = ["--prefix", "10.244.1.0/24"];
    let pair = scene.join_with(setting, ("", &[]), (announce, &flags))?;
    pair.is_connected()?;
    Ok((pair, pod))
}

/// As [`named`], with pods behind the worker.
fn named_with_pods(setting: &Setting, table: &Table, words: &str) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let (pair, _pod) = with_pods(setting, &scene)?;
    has_no_problem(&pair.worker)?;
    load(&scene.worker, table)?;
    names_problem(&pair.worker, &[words])
}

/// A firewall that drops what arrives first at the tunnels' port, which is told in a note.
fn closed_port(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let chain =
        filter(Hook::Input).policy(Policy::Drop).rule(Rule::new().input("towline0").accept());
    let table = Table::new(TableFamily::Inet, "filter").chain("input", chain);
    load(&scene.worker, &table)?;
    let pair = scene.join(setting)?;
    pair.is_connected()?;
    has_no_problem(&pair.worker)?;
    names_note(&pair.worker, "`nft insert rule inet filter input udp dport 51830 accept`")
}

/// Firewalls that drop by default and accept what the mesh needs.
fn accepting(setting: &Setting) -> anyhow::Result<()> {
    let scene = Scene::build(setting)?;
    let (pair, _pod) = with_pods(setting, &scene)?;
    let udp = || Rule::new().protocol(libc::IPPROTO_UDP as u8).destination_port(51_830).accept();
    let input = filter(Hook::Input)
        .policy(Policy::Drop)
        .rule(udp())
        .rule(Rule::new().source("198.19.0.0/16".parse()?).accept())
        .rule(Rule::new().source("fc00::/7".parse()?).accept());
    let forward = filter(Hook::Forward)
        .policy(Policy::Drop)
        .rule(Rule::new().input("towline0").accept())
        .rule(Rule::new().output("towline0").accept());
    let table =
        Table::new(TableFamily::Inet, "filter").chain("input", input).chain("forward", forward);
    load(&scene.worker, &table)?;
    has_no_problem(&pair.worker)?;
    pair.is_connected()
}
