//! Builds the messages of changes that are committed together.

use towline_netlink::codec::Message;

use super::rule::Rule;
use super::set::{Interval, KeyType, Set};
use super::table::{Chain, Ownership, Table, TableFamily};
use super::wire;

/// List of changes that are committed together, see [`Nft::commit`].
///
/// [`Nft::commit`]: super::Nft::commit
#[derive(Debug, Default)]
pub struct Transaction {
    pub(super) steps: Vec<Step>,
}

/// One message of a transaction.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) message: Message,
    /// Description of the change; it completes "cannot ...".
    pub(super) what: String,
    /// Whether the step may be committed separately from the steps before it, if they do not fit one
    /// send.
    pub(super) separable: bool,
}

/// Greatest number of elements per message. The list is one attribute of at most 64 KiB, a message must
/// fit the socket's buffer, and an IPv6 interval takes 64 bytes.
const ELEMENTS: usize = 200;

/// Flags of a table that is owned by the socket and persists after it.
const OWNED: u32 = wire::table::FLAG_OWNER | wire::table::FLAG_PERSIST;

/// Request flags: create an object; for a rule, in front of the chain's other rules.
const CREATE: u16 = libc::NLM_F_CREATE as u16;
/// Request flags: create a rule at the end of its chain.
const APPEND: u16 = (libc::NLM_F_CREATE | libc::NLM_F_APPEND) as u16;

impl Transaction {
    /// Creates an empty transaction.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns true if the transaction has no changes.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Returns the number of messages.
    pub fn messages(&self) -> usize {
        self.steps.len()
    }

    /// Creates a table with its sets, chains, rules and elements. It must not exist yet.
    pub fn create(&mut self, table: &Table) {
        self.add_table(table);
        for (name, set) in &table.sets {
            self.add_set(table, name, set);
        }
        for (name, chain) in &table.chains {
            self.add_chain(table, name, chain);
        }
        // After the chains, because rules may jump to any of them.
        for (name, chain) in &table.chains {
            for rule in &chain.rules {
                self.add_rule(table.family, &table.name, name, rule);
            }
        }
        for (name, set) in &table.sets {
            self.add_elements(table, name, set.key, set.interval, set.elements.iter());
        }
    }

    /// Deletes a table with its contents.
    pub fn delete_table(&mut self, family: TableFamily, name: &str) {
        let mut message = message(family, wire::DELETE_TABLE, 0);
        message.string(wire::table::NAME, name);
        self.push(message, format!("delete table {family} {name}"));
    }

    /// Deletes the tables of all families, except those that another socket owns, like `nft flush
    /// ruleset`.
    pub fn delete_every_table(&mut self) {
        const ANY_FAMILY: u8 = libc::AF_UNSPEC as u8;
        let header = wire::header(ANY_FAMILY, 0);
        let message = Message::new(wire::message_kind(wire::DELETE_TABLE), 0, &header);
        self.push(message, "delete every table".to_owned());
    }

    /// Appends a rule to a chain, which another program may have created.
    pub fn add_rule(&mut self, family: TableFamily, table: &str, chain: &str, rule: &Rule) {
        let mut message = message(family, wire::NEW_RULE, APPEND);
        message.string(wire::rule::TABLE, table).string(wire::rule::CHAIN, chain);
        self.finish_rule(message, format!("add a rule to {family} {table} {chain}"), rule);
    }

    /// Inserts a rule in front of a chain's other rules. Another program may have created the chain.
    pub fn insert_rule(&mut self, family: TableFamily, table: &str, chain: &str, rule: &Rule) {
        let mut message = message(family, wire::NEW_RULE, CREATE);
        message.string(wire::rule::TABLE, table).string(wire::rule::CHAIN, chain);
        self.finish_rule(message, format!("insert a rule into {family} {table} {chain}"), rule);
    }

    fn finish_rule(&mut self, mut message: Message, what: String, rule: &Rule) {
        message.nest(wire::rule::EXPRESSIONS, |list| {
            for expression in &rule.expressions {
                expression.encode(list);
            }
        });
        if let Some(comment) = &rule.comment {
            message.bytes(wire::rule::USERDATA, &wire::comment_to_userdata(comment));
        }
        let names: Vec<_> = rule.expressions.iter().map(|e| e.name()).collect();
        self.push(message, format!("{what} ({})", names.join(", ")));
    }

    /// Deletes a rule of a chain by the handle with which it was read.
    pub fn delete_rule(&mut self, family: TableFamily, table: &str, chain: &str, handle: u64) {
        let mut message = message(family, wire::DELETE_RULE, 0);
        message.string(wire::rule::TABLE, table).string(wire::rule::CHAIN, chain);
        message.u64_be(wire::rule::HANDLE, handle);
        self.push(message, format!("delete a rule of {family} {table} {chain}"));
    }

    pub(super) fn add_table(&mut self, table: &Table) {
        let mut message = message(table.family, wire::NEW_TABLE, CREATE);
        message.string(wire::table::NAME, &table.name);
        if let Some(comment) = &table.comment {
            message.bytes(wire::table::USERDATA, &wire::comment_to_userdata(comment));
        }
        if table.ownership == Ownership::Owner {
            message.u32_be(wire::table::FLAGS, OWNED);
        }
        self.push(message, format!("create table {} {}", table.family, table.name));
    }

    /// Makes the socket the owner of an orphaned table.
    pub(super) fn adopt_table(&mut self, table: &Table) {
        let mut message = message(table.family, wire::NEW_TABLE, 0);
        message.string(wire::table::NAME, &table.name);
        message.u32_be(wire::table::FLAGS, OWNED);
        self.push(message, format!("adopt table {} {}", table.family, table.name));
    }

    pub(super) fn add_chain(&mut self, table: &Table, name: &str, chain: &Chain) {
        let mut message = message(table.family, wire::NEW_CHAIN, CREATE);
        message.string(wire::chain::TABLE, &table.name).string(wire::chain::NAME, name);
        if let Some(base) = &chain.base {
            message.string(wire::chain::TYPE, base.kind.name());
            message.nest(wire::chain::HOOK, |hook| {
                hook.u32_be(wire::chain::HOOK_NUMBER, base.hook.number());
                // The priority is signed, although the attribute is not.
                hook.u32_be(wire::chain::HOOK_PRIORITY, base.priority as u32);
            });
            message.u32_be(wire::chain::POLICY, base.policy.number());
        }
        self.push(message, format!("create chain {} {} {name}", table.family, table.name));
    }

    pub(super) fn delete_chain(&mut self, table: &Table, name: &str) {
        let mut message = message(table.family, wire::DELETE_CHAIN, 0);
        message.string(wire::chain::TABLE, &table.name).string(wire::chain::NAME, name);
        self.push(message, format!("delete chain {} {} {name}", table.family, table.name));
    }

    /// Deletes all rules of a chain.
    pub(super) fn flush_chain(&mut self, table: &Table, name: &str) {
        let mut message = message(table.family, wire::DELETE_RULE, 0);
        message.string(wire::rule::TABLE, &table.name).string(wire::rule::CHAIN, name);
        self.push(message, format!("flush chain {} {} {name}", table.family, table.name));
    }

    pub(super) fn add_set(&mut self, table: &Table, name: &str, set: &Set) {
        let mut message = message(table.family, wire::NEW_SET, CREATE);
        message.string(wire::set::TABLE, &table.name).string(wire::set::NAME, name);
        let mut flags = if set.interval { wire::set::FLAG_INTERVAL } else { 0 };
        if set.dynamic {
            flags |= wire::set::FLAG_EVALUATE;
        }
        if let Some(size) = set.expiring {
            flags |= wire::set::FLAG_TIMEOUT;
            message.nest(wire::set::DESCRIPTION, |description| {
                description.u32_be(wire::set::DESCRIPTION_SIZE, size);
            });
        }
        message.u32_be(wire::set::FLAGS, flags);
        message.u32_be(wire::set::KEY_TYPE, set.key.number());
        message.u32_be(wire::set::KEY_LENGTH, set.key.length() as u32);
        // Mandatory, although it serves only to refer to an anonymous set.
        message.u32_be(wire::set::ID, self.steps.len() as u32);
        self.push(message, format!("create set {} {} {name}", table.family, table.name));
    }

    pub(super) fn delete_set(&mut self, table: &Table, name: &str) {
        let mut message = message(table.family, wire::DELETE_SET, 0);
        message.string(wire::set::TABLE, &table.name).string(wire::set::NAME, name);
        self.push(message, format!("delete set {} {} {name}", table.family, table.name));
    }

    pub(super) fn add_elements<'a>(
        &mut self,
        table: &Table,
        set: &str,
        key: KeyType,
        interval: bool,
        elements: impl Iterator<Item = &'a Interval>,
    ) {
        self.elements(wire::NEW_ELEMENT, CREATE, table, set, key, interval, elements);
    }

    pub(super) fn delete_elements<'a>(
        &mut self,
        table: &Table,
        set: &str,
        key: KeyType,
        interval: bool,
        elements: impl Iterator<Item = &'a Interval>,
    ) {
        self.elements(wire::DELETE_ELEMENT, 0, table, set, key, interval, elements);
    }

    /// Adds the messages that add or delete elements, at most [`ELEMENTS`] per message.
    #[expect(clippy::too_many_arguments, reason = "the two callers name what they are")]
    fn elements<'a>(
        &mut self,
        kind: u16,
        flags: u16,
        table: &Table,
        set: &str,
        key: KeyType,
        interval: bool,
        elements: impl Iterator<Item = &'a Interval>,
    ) {
        let verb = if kind == wire::NEW_ELEMENT { "add elements to" } else { "delete elements of" };
        let mut elements = elements.peekable();
        while elements.peek().is_some() {
            let mut message = message(table.family, kind, flags);
            message.string(wire::element::LIST_TABLE, &table.name);
            message.string(wire::element::LIST_SET, set);
            message.nest(wire::element::LIST_ELEMENTS, |list| {
                for element in elements.by_ref().take(ELEMENTS) {
                    put_element(list, &key.encode(element.first()), false);
                    // No value follows an interval that ends at the type's greatest value.
                    if interval && element.last() < key.max() {
                        put_element(list, &key.encode(element.last() + 1), true);
                    }
                }
            });
            let what = format!("{verb} set {} {} {set}", table.family, table.name);
            self.steps.push(Step { message, what, separable: true });
        }
    }

    fn push(&mut self, message: Message, what: String) {
        self.steps.push(Step { message, what, separable: false });
    }
}

fn message(family: TableFamily, kind: u16, flags: u16) -> Message {
    Message::new(wire::message_kind(kind), flags, &wire::header(family.number(), 0))
}

fn put_element(list: &mut Message, key: &[u8], end: bool) {
    list.nest(wire::LIST_ITEM, |item| {
        item.nest(wire::element::KEY, |data| {
            data.bytes(wire::DATA_VALUE, key);
        });
        if end {
            item.u32_be(wire::element::FLAGS, wire::element::FLAG_INTERVAL_END);
        }
    });
}
