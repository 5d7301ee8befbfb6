//! Lists Towline's nftables table as text, and looks up addresses in it, for people who look into a problem.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use towline_nftables::{Chain, Interval, KeyType, Loaded, Nft, NftError, Rule, Set, TableFamily};

use super::firewall;

/// Returns the table of family inet with this name as text: sets with their elements, chains with their
/// rules and counters. `None` if there is no such table.
///
/// # Errors
///
/// If the table cannot be read: this needs root.
pub fn list_table(name: &str) -> Result<Option<String>, NftError> {
    let loaded = Nft::open()?.read(TableFamily::Inet, name)?;
    Ok(loaded.map(|loaded| text(&loaded)))
}

/// Returns true if Towline's nftables table with this name drops packets to an address that leave outside the
/// tunnel. A table of another program drops none.
///
/// # Errors
///
/// If the table cannot be read: this needs root.
pub fn has_firewall_guard(name: &str, address: IpAddr) -> Result<bool, NftError> {
    let mut nft = match Nft::open() {
        Err(NftError::Unsupported) => return Ok(false),
        opened => opened?,
    };
    for family in [TableFamily::Inet, TableFamily::Ip] {
        match nft.read(family, name) {
            Ok(Some(loaded)) if firewall::is_ours(&loaded.table) => {
                return Ok(firewall::guards(&loaded.table, address));
            }
            Ok(_) | Err(NftError::Unsupported) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

fn text(loaded: &Loaded) -> String {
    let table = &loaded.table;
    let mut text = format!("table {} {} ({:?})\n", table.family, table.name, table.ownership);
    for (name, set) in &table.sets {
        // Writing to a string never fails.
        let _ = writeln!(text, "\nset {name}: {:?}, {} elements", set.key, set.elements.len());
        for element in &set.elements {
            let _ = writeln!(text, "  {}", element_text(set, element));
        }
    }
    for (name, chain) in &table.chains {
        let _ = writeln!(text, "\nchain {name}{}", base_text(chain));
        for rule in &chain.rules {
            let _ = writeln!(text, "  {}", rule_text(loaded, name, rule));
        }
    }
    text
}

fn base_text(chain: &Chain) -> String {
    chain.base.map_or_else(String::new, |base| {
        format!(
            ": {:?} at {:?}, priority {}, {:?}",
            base.kind, base.hook, base.priority, base.policy
        )
    })
}

fn rule_text(loaded: &Loaded, chain: &str, rule: &Rule) -> String {
    let comment = rule.comment.as_deref().unwrap_or("without comment");
    let counter = loaded
        .counter(chain, comment)
        .map(|counter| format!("; {} packets, {} bytes", counter.packets, counter.bytes));
    format!("{comment}{}: {:?}", counter.unwrap_or_default(), rule.expressions)
}

fn element_text(set: &Set, element: &Interval) -> String {
    let one = |value: u128| match set.key {
        KeyType::Ipv4 => u32::try_from(value)
            .map_or_else(|_| value.to_string(), |address| Ipv4Addr::from(address).to_string()),
        KeyType::Ipv6 => Ipv6Addr::from(value).to_string(),
        KeyType::Port | KeyType::Connection | KeyType::Other { .. } => value.to_string(),
    };
    let (first, last) = (one(element.first()), one(element.last()));
    if first == last { first } else { format!("{first} to {last}") }
}

#[cfg(test)]
mod tests {
    use towline_netlink::Family;
    use towline_netns::namespace_test;
    use towline_nftables::{ChainKind, Hook, Table};

    use super::*;

    namespace_test! {
        fn a_table_is_listed_with_sets_rules_and_counters() {
            let nets = ["10.0.0.0/8".parse().unwrap()];
            let rule = Rule::new().comment("private").source_in(Family::V4, "nets").counter().drop();
            let table = Table::new(TableFamily::Inet, "towline")
                .set("nets", Set::networks(KeyType::Ipv4, &nets))
                .chain("input", Chain::base(ChainKind::Filter, Hook::Input, 0).rule(rule));
            assert_eq!(list_table("towline").unwrap(), None);
            Nft::open().unwrap().load(&table).unwrap();
            let text = list_table("towline").unwrap().unwrap();
            for line in [
                "table inet towline (Anybody)",
                "set nets: Ipv4, 1 elements",
                "  10.0.0.0 to 10.255.255.255",
                "chain input: Filter at Input, priority 0, Accept",
            ] {
                assert!(text.lines().any(|found| found == line), "{line}\n{text}");
            }
            assert!(text.contains("  private; 0 packets, 0 bytes: ["), "{text}");
        }
    }
}
