//! Rules of Towline in the chains that other programs reserve for that.
//!
//! Docker sets the policy of its `FORWARD` chain to drop, and an accept in Towline's own table cannot
//! override a drop in another table. Docker reserves the chain `DOCKER-USER` for other programs and
//! jumps to it first. There this module accepts:
//!
//! - packets from the tunnel to networks that are reached through this node;
//! - packets from the tunnel of connections with destination NAT (published ports), and replies;
//! - all packets into the tunnel.
//!
//! Other packets from the tunnel are left to Docker's rules. If the chain does not exist, or no rule
//! jumps to it, the module adds no rules: a program that flushes all chains deletes the empty ones
//! next, and could not delete a chain with our rules in it.
//!
//! firewalld lets no other program change its tables. This module only checks whether Towline's link
//! is in a zone, and reports a problem if it is not.
//!
//! The rules are encoded as iptables encodes them, so that iptables can list them. They carry [`TAG`],
//! which identifies them for removal.

use ipnet::IpNet;
use nix::errno::Errno;
use towline_core::own_networks::OwnNetworks;
use towline_core::plan::Plan;
use towline_netlink::Family;
use towline_nftables::{
    Expression, IptablesStates, Loaded, Nft, NftError, Rule, TableFamily, Transaction, Verdict,
};

use super::Changes;
use super::problem::{ApplyError, Problem};

/// Table and chain of Towline's rules, the same for IPv4 and IPv6.
pub(super) const PLACE: (&str, &str) = ("filter", "DOCKER-USER");
/// Chain of the same table that jumps to `DOCKER-USER`.
pub(super) const FORWARD: &str = "FORWARD";
const FAMILIES: [(TableFamily, Family); 2] =
    [(TableFamily::Ip, Family::V4), (TableFamily::Ip6, Family::V6)];
/// Name of firewalld's table.
pub(super) const FIREWALLD: &str = "firewalld";
/// Prefix of the comments of Towline's rules.
const TAG: &str = "towline: ";

/// Adds Towline's rules where the chain exists and lacks them, and checks firewalld's zones.
pub(super) fn put(nft: &mut Nft, plan: &Plan, changes: &mut Changes) -> Result<(), ApplyError> {
    let link = plan.link.name.as_str();
    for (table, family) in FAMILIES {
        let wanted = wanted(link, family, &plan.firewall.own);
        match put_family(nft, table, wanted) {
            Ok(messages) => changes.messages += messages,
            // A kernel without this family has no chains in it.
            Err(error) if error.errno() == Some(Errno::EAFNOSUPPORT) => {}
            Err(NftError::Netlink(error)) => return Err(error.into()),
            Err(NftError::Unsupported) => {}
            // Docker may be creating the chain right now; a notification follows then.
            Err(error) => changes.problems.push(Problem::Hook(error.to_string())),
        }
    }
    match is_without_zone(nft, link) {
        Ok(true) => changes.problems.push(Problem::NoZone(link.to_owned())),
        Err(NftError::Netlink(error)) => return Err(error.into()),
        Ok(false) | Err(_) => {}
    }
    Ok(())
}

/// Returns true if firewalld runs and the link is in none of its zones.
fn is_without_zone(nft: &mut Nft, link: &str) -> Result<bool, NftError> {
    let rules = nft.rules(TableFamily::Inet, FIREWALLD)?;
    Ok(rules.is_some_and(|rules| !has_zone(&rules, link)))
}

/// Returns true if one of firewalld's rules jumps to a zone for packets that arrive on the link.
pub(super) fn has_zone<'a>(rules: impl IntoIterator<Item = &'a Rule>, link: &str) -> bool {
    let ours = Rule::new().input(link).expressions;
    let leads = |rule: &Rule| match rule.expressions.strip_prefix(ours.as_slice()) {
        Some([.., Expression::Verdict(Verdict::Goto(zone) | Verdict::Jump(zone))]) => {
            zone.starts_with("filter_FWD_")
        }
        _ => false,
    };
    rules.into_iter().any(leads)
}

fn put_family(nft: &mut Nft, family: TableFamily, wanted: Vec<Rule>) -> Result<usize, NftError> {
    let (table, chain) = PLACE;
    let Some(have) = nft.read_chain(family, table, chain)? else { return Ok(0) };
    let wanted = if is_led_to(nft, family)? { wanted } else { Vec::new() };
    let rules = &have.table.chains[chain].rules;
    let ours = rules.iter().filter(|rule| is_ours(rule));
    if ours.eq(&wanted) {
        return Ok(0);
    }
    let mut transaction = Transaction::new();
    delete(&have, family, &mut transaction);
    for rule in wanted.iter().rev() {
        transaction.insert_rule(family, table, chain, rule);
    }
    let messages = transaction.messages();
    nft.commit(transaction)?;
    Ok(messages)
}

/// Returns true if a rule of [`FORWARD`] jumps to the chain of Towline's rules.
fn is_led_to(nft: &mut Nft, family: TableFamily) -> Result<bool, NftError> {
    let (table, chain) = PLACE;
    let Some(forward) = nft.read_chain(family, table, FORWARD)? else { return Ok(false) };
    let leads = |rule: &Rule| match rule.expressions.last() {
        Some(Expression::Verdict(Verdict::Jump(to) | Verdict::Goto(to))) => to == chain,
        _ => false,
    };
    Ok(forward.table.chains[FORWARD].rules.iter().any(leads))
}

/// Removes Towline's rules and returns their number.
pub(super) fn remove(nft: &mut Nft) -> Result<usize, NftError> {
    let (table, chain) = PLACE;
    let mut removed = 0;
    for (family, _) in FAMILIES {
        let have = match nft.read_chain(family, table, chain) {
            Ok(Some(have)) => have,
            Ok(None) | Err(NftError::Unsupported) => continue,
            Err(error) if error.errno() == Some(Errno::EAFNOSUPPORT) => continue,
            Err(error) => return Err(error),
        };
        let mut transaction = Transaction::new();
        delete(&have, family, &mut transaction);
        removed += transaction.messages();
        nft.commit(transaction)?;
    }
    Ok(removed)
}

fn delete(have: &Loaded, family: TableFamily, transaction: &mut Transaction) {
    let (table, chain) = PLACE;
    for (rule, handle) in have.handles(chain) {
        if is_ours(rule) {
            transaction.delete_rule(family, table, chain, handle);
        }
    }
}

fn wanted(link: &str, family: Family, own: &OwnNetworks) -> Vec<Rule> {
    let rule = |what: &str| Rule::new().comment(format!("{TAG}{what}"));
    let out = || rule("out of the tunnel").input(link);
    // Packets to this node's own addresses are never forwarded.
    let networks = own.announced().iter().chain(own.reachable());
    let networks: Vec<IpNet> =
        networks.filter(|net| Family::of(net.addr()) == family).copied().collect();
    let replies = IptablesStates::ESTABLISHED | IptablesStates::RELATED;
    let mut rules = vec![out().iptables_conntrack(replies | IptablesStates::DNAT)];
    rules.extend(networks.iter().map(|net| out().iptables_destination(*net)));
    // The sources that may enter are known only after source NAT: the data plane checks them.
    rules.push(rule("into the tunnel").output(link));
    rules.into_iter().map(|rule| rule.counter().accept()).collect()
}

fn is_ours(rule: &Rule) -> bool {
    rule.comment.as_deref().is_some_and(|comment| comment.starts_with(TAG))
}
