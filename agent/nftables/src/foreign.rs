//! Reads the tables of other programs, to find out what they do with a packet.
//!
//! Only tables with a base chain that may drop are read in full, because each costs several requests.

use std::collections::BTreeMap;

use towline_netlink::codec::{Attribute, Received};

use super::client::{Nft, NftError, parse_rule, payload, request_of};
use super::expression::Verdict;
use super::set::{Interval, KeyType};
use super::table::{Base, Chain, Hook, TableFamily};
use super::wire;

/// Table of another program, with what decides about packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignTable {
    /// Address family.
    pub family: TableFamily,
    /// Name of the table.
    pub name: String,
    /// Chains by name, with their rules.
    pub chains: BTreeMap<String, Chain>,
    /// Sets and verdict maps by name, anonymous ones included.
    pub(super) sets: BTreeMap<String, ForeignSet>,
}

/// Set or verdict map of another program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ForeignSet {
    /// Length of a value in bytes.
    pub(super) length: usize,
    /// Elements of the set.
    pub(super) elements: Vec<Element>,
}

/// Element of a set or of a verdict map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    /// Values that the element stands for.
    pub(super) values: Interval,
    /// Verdict of the element; `None` in a set.
    pub(super) verdict: Option<Verdict>,
}

/// Greatest number of elements of a set that are read. The others are left out.
const ELEMENTS: usize = 65_536;

impl Nft {
    /// Reads the tables of IPv4 and IPv6 that have a base chain of the type filter on one of these hooks.
    pub fn tables_with_filters(&mut self, hooks: &[Hook]) -> Result<Vec<ForeignTable>, NftError> {
        let mut found = Vec::new();
        for family in [TableFamily::Inet, TableFamily::Ip, TableFamily::Ip6] {
            for name in self.table_names(family)? {
                let chains = self.read_chains(family, &name)?;
                let filters = |base: &Base| {
                    base.kind == super::table::ChainKind::Filter && hooks.contains(&base.hook)
                };
                if chains.values().filter_map(|chain| chain.base.as_ref()).any(filters) {
                    found.push(self.foreign_table(family, name, chains)?);
                }
            }
        }
        Ok(found)
    }

    fn table_names(&mut self, family: TableFamily) -> Result<Vec<String>, NftError> {
        let request = request_of(family, wire::GET_TABLE);
        let names = self.connection().dump("list tables", &request, |received| {
            let mut attributes = payload(&received, wire::NEW_TABLE)?;
            let name = attributes.find(|attribute| attribute.kind == wire::table::NAME)?;
            Some((received.payload.first().copied()?, name.string()))
        });
        match names {
            Ok(names) => Ok(names
                .into_iter()
                .filter(|(number, _)| *number == family.number())
                .map(|(_, name)| name)
                .collect()),
            // A kernel without this family has no tables of it.
            Err(error) if error.errno().is_some() => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    fn foreign_table(
        &mut self,
        family: TableFamily,
        name: String,
        mut chains: BTreeMap<String, Chain>,
    ) -> Result<ForeignTable, NftError> {
        let mut request = request_of(family, wire::GET_RULE);
        request.string(wire::rule::TABLE, &name);
        let rules = self
            .connection()
            .dump("list rules", &request, |received| parse_rule(&received, &name))?;
        for (chain, rule, _) in rules {
            chains.entry(chain).or_default().rules.push(rule);
        }
        let mut request = request_of(family, wire::GET_SET);
        request.string(wire::set::TABLE, &name);
        let heads = self
            .connection()
            .dump("list sets", &request, |received| parse_head(&received, &name))?;
        let mut sets = BTreeMap::new();
        for head in heads {
            let mut request = request_of(family, wire::GET_ELEMENT);
            request.string(wire::element::LIST_TABLE, &name);
            request.string(wire::element::LIST_SET, &head.name);
            let lists = self
                .connection()
                .dump("list set elements", &request, |received| parse_elements(&received))?;
            let set = head.with(lists.into_iter().flatten());
            sets.insert(head.name, set);
        }
        Ok(ForeignTable { family, name, chains, sets })
    }
}

/// Set as the kernel lists it, without its elements.
pub(super) struct Head {
    pub(super) name: String,
    is_interval: bool,
    /// Length of a value in bytes.
    length: usize,
}

impl Head {
    /// Returns the set with the elements that the kernel listed.
    pub(super) fn with(&self, listed: impl Iterator<Item = Listed>) -> ForeignSet {
        let elements = joined(listed.take(ELEMENTS), self.is_interval);
        ForeignSet { length: self.length, elements }
    }
}

/// Element as the kernel lists it: in an interval set, a boundary.
pub(super) struct Listed {
    value: u128,
    /// Last value of an element that is a range by itself (a concatenation in an interval set).
    last: Option<u128>,
    ends: bool,
    verdict: Option<Verdict>,
}

pub(super) fn parse_head(received: &Received<'_>, table: &str) -> Option<Head> {
    let mut head = Head { name: String::new(), is_interval: false, length: 0 };
    for attribute in payload(received, wire::NEW_SET)? {
        match attribute.kind {
            wire::set::TABLE if attribute.string() != table => return None,
            wire::set::NAME => head.name = attribute.string(),
            wire::set::FLAGS => {
                head.is_interval = attribute.u32_be()? & wire::set::FLAG_INTERVAL != 0;
            }
            wire::set::KEY_LENGTH => head.length = attribute.u32_be()? as usize,
            _ => {}
        }
    }
    Some(head)
}

pub(super) fn parse_elements(received: &Received<'_>) -> Option<Vec<Listed>> {
    let list = payload(received, wire::NEW_ELEMENT)?
        .find(|attribute| attribute.kind == wire::element::LIST_ELEMENTS)?;
    Some(list.nested().filter_map(parse).collect())
}

fn parse(item: Attribute<'_>) -> Option<Listed> {
    let mut listed = Listed { value: 0, last: None, ends: false, verdict: None };
    let value = |attribute: Attribute<'_>| {
        let data = attribute.nested().find(|inner| inner.kind == wire::DATA_VALUE)?;
        KeyType::decode(data.value)
    };
    let mut has_value = false;
    for attribute in item.nested() {
        match attribute.kind {
            wire::element::KEY => {
                listed.value = value(attribute)?;
                has_value = true;
            }
            wire::element::KEY_END => listed.last = value(attribute),
            wire::element::FLAGS => {
                listed.ends = attribute.u32_be()? & wire::element::FLAG_INTERVAL_END != 0;
            }
            wire::element::DATA => {
                let verdict = attribute.nested().find(|inner| inner.kind == wire::DATA_VERDICT);
                listed.verdict = verdict.and_then(Verdict::decode);
            }
            _ => {}
        }
    }
    has_value.then_some(listed)
}

/// Joins the boundaries of an interval set to ranges. Single elements stay as they are.
fn joined(listed: impl Iterator<Item = Listed>, is_interval: bool) -> Vec<Element> {
    if !is_interval {
        return listed
            .map(|one| Element {
                values: Interval::new(one.value, one.last.unwrap_or(one.value)),
                verdict: one.verdict,
            })
            .collect();
    }
    let mut boundaries: Vec<Listed> = listed.collect();
    // The end of one interval may be the beginning of the next.
    boundaries.sort_by_key(|boundary| (boundary.value, !boundary.ends));
    let mut elements = Vec::new();
    for (at, boundary) in boundaries.iter().enumerate() {
        if boundary.ends {
            continue;
        }
        let next = boundaries.get(at + 1).map_or(u128::MAX, |next| next.value.saturating_sub(1));
        let last = boundary.last.unwrap_or(next);
        elements.push(Element {
            values: Interval::new(boundary.value, last),
            verdict: boundary.verdict.clone(),
        });
    }
    elements
}
