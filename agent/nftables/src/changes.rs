//! Computes the changes from one table to another.

use std::collections::BTreeMap;

use super::rule::Rule;
use super::set::Set;
use super::table::{Chain, Ownership, Table};
use super::transaction::Transaction;

impl Table {
    /// Returns the changes that turn `have` into this table. `have` is what
    /// [`Nft::read`](super::Nft::read) found, `None` if there was no table. The transaction is empty if
    /// both are equal.
    pub fn changes(&self, have: Option<&Table>) -> Transaction {
        let mut transaction = Transaction::new();
        let Some(have) = have else {
            transaction.create(self);
            return transaction;
        };
        if self.must_be_remade(have) {
            transaction.delete_table(have.family, &have.name);
            transaction.create(self);
            return transaction;
        }
        if self.ownership == Ownership::Owner && have.ownership == Ownership::Orphan {
            transaction.adopt_table(self);
        }
        self.change_structure(have, &mut transaction);
        // Additions first: if the changes do not fit one transaction, a set briefly has too many
        // elements rather than too few.
        for (name, set) in &self.sets {
            let missing = |old: &Set| set.elements.difference(&old.elements).copied().collect();
            let new: Vec<_> =
                have.sets.get(name).map_or_else(|| set.elements.iter().copied().collect(), missing);
            self.replace_overlapping(have, name, set, &new, &mut transaction);
        }
        transaction
    }

    /// Returns true if the table must be deleted and created again. The kernel cannot change a table's
    /// family or comment, or the shape of a set that rules use. Nor can a table get an owner if it was
    /// created without one.
    fn must_be_remade(&self, have: &Table) -> bool {
        let reshaped = self
            .sets
            .iter()
            .any(|(name, set)| have.sets.get(name).is_some_and(|old| !old.same_shape(set)));
        let unownable = self.ownership == Ownership::Owner && have.ownership == Ownership::Anybody;
        // Kernels before 5.10 do not store the comment; a missing comment is no reason.
        self.family != have.family
            || reshaped
            || unownable
            || (have.comment.is_some() && self.comment != have.comment)
    }

    /// Adds the changes of sets, chains and rules; those of elements follow separately.
    fn change_structure(&self, have: &Table, transaction: &mut Transaction) {
        for (name, set) in missing_in(&self.sets, &have.sets) {
            transaction.add_set(self, name, set);
        }
        // Rules are deleted before the chains and sets that they refer to.
        let changed =
            |name: &str, chain: &Chain| self.chains.get(name).is_none_or(|wanted| wanted != chain);
        let remade = |name: &str, chain: &Chain| {
            self.chains.get(name).is_none_or(|wanted| wanted.base != chain.base)
        };
        for (name, chain) in &have.chains {
            if changed(name, chain) && !chain.rules.is_empty() {
                transaction.flush_chain(self, name);
            }
        }
        for (name, chain) in &have.chains {
            if remade(name, chain) {
                transaction.delete_chain(self, name);
            }
        }
        for (name, _) in missing_in(&have.sets, &self.sets) {
            transaction.delete_set(self, name);
        }
        for (name, chain) in &self.chains {
            if have.chains.get(name).is_none_or(|old| remade(name, old)) {
                transaction.add_chain(self, name, chain);
            }
        }
        for (name, chain) in &self.chains {
            if have.chains.get(name).is_none_or(|old| changed(name, old)) {
                let add = |rule: &Rule| transaction.add_rule(self.family, &self.name, name, rule);
                chain.rules.iter().for_each(add);
            }
        }
    }

    /// Adds the changes of a set's elements. Intervals of a set must not overlap, so an old interval
    /// that overlaps a new one is deleted first, in the same transaction. The other old ones are deleted
    /// last.
    fn replace_overlapping(
        &self,
        have: &Table,
        name: &str,
        set: &Set,
        new: &[super::set::Interval],
        transaction: &mut Transaction,
    ) {
        let old = have.sets.get(name).map(|old| &old.elements);
        let gone: Vec<_> =
            old.into_iter().flat_map(|old| old.difference(&set.elements)).copied().collect();
        let (before, after): (Vec<_>, Vec<_>) = gone.into_iter().partition(|old| {
            let at = new.partition_point(|interval| interval.last() < old.first());
            new.get(at).is_some_and(|interval| interval.first() <= old.last())
        });
        transaction.delete_elements(self, name, set.key, set.interval, before.iter());
        transaction.add_elements(self, name, set.key, set.interval, new.iter());
        transaction.delete_elements(self, name, set.key, set.interval, after.iter());
    }
}

/// Returns the items of one map whose names the other map lacks.
fn missing_in<'a, T>(
    these: &'a BTreeMap<String, T>,
    those: &'a BTreeMap<String, T>,
) -> impl Iterator<Item = (&'a String, &'a T)> {
    these.iter().filter(|(name, _)| !those.contains_key(*name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ipnet::IpNet;

    use super::*;
    use crate::{ChainKind, Hook, KeyType, TableFamily};

    fn table(nets: &[&str]) -> Table {
        let nets: Vec<IpNet> = nets.iter().map(|net| net.parse().unwrap()).collect();
        Table::new(TableFamily::Inet, "t")
            .set("s", Set::networks(KeyType::Ipv4, &nets))
            .chain("c", Chain::base(ChainKind::Filter, Hook::Input, 0).rule(Rule::new().drop()))
    }

    #[test]
    fn the_same_table_needs_no_change() {
        let table = table(&["10.0.0.0/8"]);
        assert!(table.changes(Some(&table)).is_empty());
    }

    #[test]
    fn one_element_is_one_message_however_large_the_set() {
        let nets: Vec<String> = (0..5_000u32)
            .map(|n| format!("{}/32", std::net::Ipv4Addr::from(0x0a00_0000 + 2 * n)))
            .collect();
        let nets: Vec<&str> = nets.iter().map(String::as_str).collect();
        let all = table(&nets);
        let fewer = table(&nets[1..]);
        assert_eq!(all.changes(Some(&fewer)).messages(), 1);
        assert_eq!(fewer.changes(Some(&all)).messages(), 1);
    }

    #[test]
    fn an_interval_that_is_touched_goes_before_the_new_one_comes() {
        let old = table(&["10.0.0.0/24", "10.0.1.0/24", "192.168.0.0/16"]);
        let new = table(&["10.0.0.0/23", "172.16.0.0/12"]);
        let transaction = new.changes(Some(&old));
        let steps: Vec<_> = transaction.steps.iter().map(|step| step.what.as_str()).collect();
        let expected = ["delete elements of set", "add elements to set", "delete elements of set"];
        assert_eq!(steps.len(), expected.len());
        for (step, expected) in steps.iter().zip(expected) {
            assert!(step.starts_with(expected), "{steps:?}");
        }
    }

    #[test]
    fn another_shape_remakes_the_table() {
        let mut other = table(&[]);
        other.sets.insert("s".to_owned(), Set { elements: BTreeSet::new(), ..Set::ports([1]) });
        let transaction = table(&["10.0.0.0/8"]).changes(Some(&other));
        assert!(transaction.steps[0].what.starts_with("delete table"));
    }
}
