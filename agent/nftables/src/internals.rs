//! Tables from the bytes of the kernel's answers and into those of requests, for fuzzing and tests. Not
//! part of the public API.

use std::collections::BTreeMap;

use towline_netlink::codec::{Received, attributes, messages};
use towline_netlink::internals;

use crate::client::{elements, parse_chain, parse_elements, parse_head, parse_rule, parse_set};
use crate::{ForeignTable, Loaded, Table, TableFamily, Transaction, foreign, wire};

/// Reads a table from the answers in one datagram, as [`Nft::read`](crate::Nft::read) does.
pub fn table(datagram: &[u8], family: TableFamily, name: &str) -> Loaded {
    let mut loaded = Loaded { table: Table::new(family, name), rules: BTreeMap::new() };
    let mut listed: BTreeMap<String, Vec<(u128, bool)>> = BTreeMap::new();
    for received in messages(datagram) {
        if let Some(head) = parse_head(&received, family, name) {
            loaded.table.comment = head.comment;
            loaded.table.ownership = head.ownership;
        } else if let Some((chain, parsed)) = parse_chain(&received, name) {
            loaded.table.chains.insert(chain, parsed);
        } else if let Some((chain, rule, state)) = parse_rule(&received, name) {
            loaded.table.chains.entry(chain.clone()).or_default().rules.push(rule);
            loaded.rules.entry(chain).or_default().push(state);
        } else if let Some((set, parsed)) = parse_set(&received, name) {
            loaded.table.sets.insert(set, parsed);
        } else if let Some(list) = parse_elements(&received) {
            listed.entry(set_of(&received)).or_default().extend(list);
        }
    }
    for (name, list) in listed {
        if let Some(set) = loaded.table.sets.get_mut(&name).filter(|set| set.expiring.is_none()) {
            set.elements = elements(set, list);
        }
    }
    loaded
}

/// Reads another program's table from the answers in one datagram, as
/// [`Nft::tables_with_filters`](crate::Nft::tables_with_filters) does.
pub fn foreign_table(datagram: &[u8], family: TableFamily, name: &str) -> ForeignTable {
    let Loaded { table, .. } = self::table(datagram, family, name);
    let mut heads = Vec::new();
    let mut listed: BTreeMap<String, Vec<Option<foreign::Listed>>> = BTreeMap::new();
    for received in messages(datagram) {
        if let Some(head) = foreign::parse_head(&received, name) {
            heads.push(head);
        } else if let Some(list) = foreign::parse_elements(&received) {
            listed.entry(set_of(&received)).or_default().extend(list);
        }
    }
    let mut sets = BTreeMap::new();
    for head in heads {
        let set = head.with(Some(listed.remove(&head.name).unwrap_or_default().into_iter()));
        sets.insert(head.name, set);
    }
    ForeignTable { family, name: name.to_owned(), chains: table.chains, sets }
}

/// Returns the name of the set that a list of elements belongs to.
fn set_of(received: &Received<'_>) -> String {
    let mut attributes = attributes(received.payload, wire::HEADER);
    let name = attributes.find(|attribute| attribute.kind == wire::element::LIST_SET);
    name.map(|name| name.string()).unwrap_or_default()
}

/// Returns the bytes of the requests of a transaction, without the messages around them.
pub fn requests(transaction: Transaction) -> Vec<u8> {
    transaction.steps.into_iter().flat_map(|step| internals::bytes(step.message)).collect()
}
