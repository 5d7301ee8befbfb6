//! Our rules in the chains that others document for it.
//!
//! Docker sets the policy of its `FORWARD` chain to drop, and no accept of our own table overrides
//! another table's drop. It leaves `DOCKER-USER` to others, which comes first: there the networks that
//! are reached through this node, connections whose destination was translated (published ports), and
//! replies are let pass out of our link, and everything into it. What Docker keeps from strangers it
//! keeps from the mesh too. Where there is no such chain, or nothing leads to it any
//! more (whoever flushes everything deletes the empty chains next, and could not), nothing is done.
//!
//! firewalld lets nobody add to its tables: there is only looked whether it knows our link, and said
//! what to do where it does not.
//!
//! The rules are written as iptables would write them, so that it lists them too, and carry
//! [`TAG`], by which they are found and removed.

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

/// Table and chain, in both families.
pub(super) const PLACE: (&str, &str) = ("filter", "DOCKER-USER");
/// The chain of the same table that leads there.
pub(super) const FORWARD: &str = "FORWARD";
const FAMILIES: [(TableFamily, Family); 2] =
    [(TableFamily::Ip, Family::V4), (TableFamily::Ip6, Family::V6)];
/// firewalld's table.
pub(super) const FIREWALLD: &str = "firewalld";
/// How the comments of our rules begin.
const TAG: &str = "towline: ";

/// Puts our rules in, where they are missing and there is a place for them.
pub(super) fn put(nft: &mut Nft, plan: &Plan, changes: &mut Changes) -> Result<(), ApplyError> {
    let link = plan.link.name.as_str();
    for (table, family) in FAMILIES {
        let wanted = wanted(link, family, &plan.firewall.own);
        match put_family(nft, table, wanted) {
            Ok(messages) => changes.messages += messages,
            // A kernel without this family has nobody's chains in it.
            Err(error) if error.errno() == Some(Errno::EAFNOSUPPORT) => {}
            Err(NftError::Netlink(error)) => return Err(error.into()),
            Err(NftError::Unsupported) => {}
            // Docker may be making it just now: then a notification comes.
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

/// Whether firewalld runs and treats our link as it does any unknown one. Of a link that was put
/// into a zone, whichever it is, it has a rule that leads to that zone's chain.
fn is_without_zone(nft: &mut Nft, link: &str) -> Result<bool, NftError> {
    let Some(rules) = nft.rules(TableFamily::Inet, FIREWALLD)? else { return Ok(false) };
    let ours = Rule::new().input(link).expressions;
    let leads = |rule: &Rule| match rule.expressions.strip_prefix(ours.as_slice()) {
        Some([.., Expression::Verdict(Verdict::Goto(zone) | Verdict::Jump(zone))]) => {
            zone.starts_with("filter_FWD_")
        }
        _ => false,
    };
    Ok(!rules.iter().any(leads))
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

fn is_led_to(nft: &mut Nft, family: TableFamily) -> Result<bool, NftError> {
    let (table, chain) = PLACE;
    let Some(forward) = nft.read_chain(family, table, FORWARD)? else { return Ok(false) };
    let leads = |rule: &Rule| match rule.expressions.last() {
        Some(Expression::Verdict(Verdict::Jump(to) | Verdict::Goto(to))) => to == chain,
        _ => false,
    };
    Ok(forward.table.chains[FORWARD].rules.iter().any(leads))
}

/// Takes our rules out; says how many there were.
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
    // Our own addresses are never forwarded to.
    let networks = own.announced().iter().chain(own.reachable());
    let networks: Vec<IpNet> =
        networks.filter(|net| Family::of(net.addr()) == family).copied().collect();
    let replies = IptablesStates::ESTABLISHED | IptablesStates::RELATED;
    let mut rules = vec![out().iptables_conntrack(replies | IptablesStates::DNAT)];
    rules.extend(networks.iter().map(|net| out().iptables_destination(*net)));
    // Whose packets may enter is known after their sources are translated: the data plane looks.
    rules.push(rule("into the tunnel").output(link));
    rules.into_iter().map(|rule| rule.counter().accept()).collect()
}

fn is_ours(rule: &Rule) -> bool {
    rule.comment.as_deref().is_some_and(|comment| comment.starts_with(TAG))
}
