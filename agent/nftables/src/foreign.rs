//! Reads the tables of other programs, to find out what they do with a packet.
//!
//! Only tables with a base chain that may drop are read in full, because each costs several requests.

use std::collections::{BTreeMap, BTreeSet};

use towline_netlink::codec::{Attribute, Received};

use super::client::{Nft, NftError, parse_rule, payload, request_of};
use super::expression::{Expression, Verdict};
use super::set::{Interval, KeyType};
use super::table::{Chain, ChainKind, Hook, TableFamily};
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
    /// Elements of the set, sorted by their first value.
    pub(super) elements: Vec<Element>,
    /// False if the set contains more: an element for all other values, one that is not understood, or
    /// more than [`ELEMENTS`].
    pub(super) is_complete: bool,
}

impl ForeignSet {
    pub(super) fn new(length: usize, mut elements: Vec<Element>, is_complete: bool) -> Self {
        elements.sort_by_key(|element| element.values.first());
        Self { length, elements, is_complete }
    }

    /// Returns the element for a value. Elements do not overlap.
    pub(super) fn find(&self, value: u128) -> Option<&Element> {
        let after = self.elements.partition_point(|element| element.values.first() <= value);
        let element = self.elements.get(after.checked_sub(1)?)?;
        (value <= element.values.last()).then_some(element)
    }
}

/// Element of a set or of a verdict map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    /// Values that the element stands for.
    pub(super) values: Interval,
    /// Verdict of the element; `None` in a set.
    pub(super) verdict: Option<Verdict>,
}

/// Greatest number of elements of a set that are read. What a larger set contains is unknown.
const ELEMENTS: usize = 65_536;
/// Greatest number of messages about elements that are kept. Each has many elements.
const MESSAGES: usize = 4_096;
/// Greatest number of rules of a table that are read. What a larger table does is unknown.
const RULES: usize = 65_536;

impl Nft {
    /// Reads the tables of IPv4 and IPv6 that have a base chain of the type filter on one of these hooks,
    /// except those of the name `except`. A table with too many rules is left out.
    pub fn tables_with_filters(
        &mut self,
        hooks: &[Hook],
        except: &str,
    ) -> Result<Vec<ForeignTable>, NftError> {
        let mut found = Vec::new();
        for family in [TableFamily::Inet, TableFamily::Ip, TableFamily::Ip6] {
            for name in self.table_names(family)? {
                if name == except {
                    continue;
                }
                let chains = self.read_chains(family, &name)?;
                let filters = |chain: &Chain| {
                    let base = chain.base.as_ref();
                    base.is_some_and(|base| {
                        base.kind == ChainKind::Filter && hooks.contains(&base.hook)
                    })
                };
                let entries: Vec<String> = chains
                    .iter()
                    .filter(|(_, chain)| filters(chain))
                    .map(|(name, _)| name.clone())
                    .collect();
                if !entries.is_empty() {
                    found.extend(self.foreign_table(family, name, chains, entries)?);
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

    /// Reads the rules of a table, and the sets that packets can reach from the chains `entries`. Returns
    /// `None` if there are too many rules.
    fn foreign_table(
        &mut self,
        family: TableFamily,
        name: String,
        mut chains: BTreeMap<String, Chain>,
        entries: Vec<String>,
    ) -> Result<Option<ForeignTable>, NftError> {
        let mut request = request_of(family, wire::GET_RULE);
        request.string(wire::rule::TABLE, &name);
        let parse = |received: Received<'_>| parse_rule(&received, &name);
        let rules = self.connection().dump_at_most("list rules", &request, RULES, parse)?;
        let Some(rules) = rules else { return Ok(None) };
        for (chain, rule, _) in rules {
            chains.entry(chain).or_default().rules.push(rule);
        }
        let heads = self.set_heads(family, &name)?;
        let mut sets: BTreeMap<String, ForeignSet> = BTreeMap::new();
        let (mut ahead, mut reached) = (entries, BTreeSet::new());
        while let Some(chain) = ahead.pop() {
            let Some(rules) = chains.get(&chain).map(|chain| &chain.rules) else { continue };
            if !reached.insert(chain) {
                continue;
            }
            for expression in rules.iter().flat_map(|rule| &rule.expressions) {
                match expression {
                    Expression::Verdict(verdict) => ahead.extend(target(verdict)),
                    Expression::Lookup { set, .. } | Expression::VerdictMap { set, .. } => {
                        let Some(head) = heads.get(set).filter(|_| !sets.contains_key(set)) else {
                            continue;
                        };
                        let read = self.foreign_set(family, &name, head)?;
                        let verdicts = read.elements.iter().filter_map(|one| one.verdict.as_ref());
                        ahead.extend(verdicts.filter_map(target));
                        sets.insert(set.clone(), read);
                    }
                    _ => {}
                }
            }
        }
        Ok(Some(ForeignTable { family, name, chains, sets }))
    }

    fn set_heads(
        &mut self,
        family: TableFamily,
        table: &str,
    ) -> Result<BTreeMap<String, Head>, NftError> {
        let mut request = request_of(family, wire::GET_SET);
        request.string(wire::set::TABLE, table);
        let parse = |received: Received<'_>| parse_head(&received, table);
        let heads = self.connection().dump("list sets", &request, parse)?;
        Ok(heads.into_iter().map(|head| (head.name.clone(), head)).collect())
    }

    fn foreign_set(
        &mut self,
        family: TableFamily,
        table: &str,
        head: &Head,
    ) -> Result<ForeignSet, NftError> {
        let mut request = request_of(family, wire::GET_ELEMENT);
        request.string(wire::element::LIST_TABLE, table);
        request.string(wire::element::LIST_SET, &head.name);
        let parse = |received: Received<'_>| parse_elements(&received);
        let what = "list set elements";
        let lists = self.connection().dump_at_most(what, &request, MESSAGES, parse)?;
        Ok(head.with(lists.map(|lists| lists.into_iter().flatten())))
    }
}

/// Returns the chain in which a verdict continues, if it does.
fn target(verdict: &Verdict) -> Option<String> {
    match verdict {
        Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain.clone()),
        Verdict::Accept | Verdict::Drop | Verdict::Return => None,
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
    /// Returns the set with the elements that the kernel listed. An element that is `None` is not
    /// understood. Without a list, nothing is known of them.
    pub(super) fn with(&self, listed: Option<impl Iterator<Item = Option<Listed>>>) -> ForeignSet {
        let is_known = listed.is_some();
        let listed: Vec<_> = listed.into_iter().flatten().take(ELEMENTS + 1).collect();
        let is_bounded = is_known && listed.len() <= ELEMENTS;
        let is_complete = is_bounded && listed.iter().all(Option::is_some);
        // The boundaries of intervals mean nothing unless all are there.
        let is_usable = is_complete || is_bounded && !self.is_interval;
        let elements = listed.into_iter().flatten().filter(|_| is_usable);
        ForeignSet::new(self.length, joined(elements, self.is_interval), is_complete)
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

pub(super) fn parse_elements(received: &Received<'_>) -> Option<Vec<Option<Listed>>> {
    let list = payload(received, wire::NEW_ELEMENT)?
        .find(|attribute| attribute.kind == wire::element::LIST_ELEMENTS)?;
    Some(list.nested().map(parse).collect())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn set_of(is_interval: bool, listed: Option<Vec<Option<Listed>>>) -> ForeignSet {
        let head = Head { name: "ports".to_owned(), is_interval, length: 2 };
        head.with(listed.map(Vec::into_iter))
    }

    fn listed(value: u128, ends: bool) -> Option<Listed> {
        Some(Listed { value, last: None, ends, verdict: None })
    }

    fn found(set: &ForeignSet, value: u128) -> bool {
        set.find(value).is_some()
    }

    #[test]
    fn the_boundaries_of_an_interval_set_are_joined() {
        // The end of one interval is the beginning of the next, and the last one has no end.
        let boundaries =
            [(0, true), (20, false), (30, true), (30, false), (40, true), (100, false)];
        let all = boundaries.map(|(value, ends)| listed(value, ends));
        let set = set_of(true, Some(all.into()));
        assert!(set.is_complete);
        for (value, expected) in
            [(19, false), (20, true), (29, true), (30, true), (39, true), (40, false), (99, false)]
        {
            assert_eq!(found(&set, value), expected, "{value}");
        }
        assert!(found(&set, 100) && found(&set, u128::MAX));
    }

    #[test]
    fn a_set_that_is_not_understood_whole_is_not_complete() {
        for is_interval in [false, true] {
            // An element for all other values has no value of its own.
            let set = set_of(is_interval, Some(vec![listed(20, false), None]));
            assert!(!set.is_complete);
            assert_eq!(found(&set, 20), !is_interval);
            let many = (0..=ELEMENTS as u128).map(|value| listed(value, false)).collect();
            let set = set_of(is_interval, Some(many));
            assert!(!set.is_complete && !found(&set, 20));
            let set = set_of(is_interval, None);
            assert!(!set.is_complete && set.elements.is_empty());
        }
    }
}
