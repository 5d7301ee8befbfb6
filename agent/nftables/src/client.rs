//! nftables connection: reads tables and commits transactions.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use towline_netlink::codec::{Attribute, Message, Received, attributes};
use towline_netlink::{Connection, NetlinkError, Protocol, Refusal};

use super::expression::Expression;
use super::rule::Rule;
use super::set::{Interval, KeyType, Set, join};
use super::table::{Base, Chain, ChainKind, Hook, Ownership, Policy, Table, TableFamily};
use super::transaction::{Step, Transaction};
use super::wire;

/// Connection to the nftables of one network namespace.
#[derive(Debug)]
pub struct Nft {
    connection: Connection,
}

/// Error of an nftables operation.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The kernel has no nftables.
    #[error("this kernel has no nftables")]
    Unsupported,
    /// The kernel refused a change, and changed nothing.
    #[error("cannot {what}: {refusal}")]
    Refused {
        /// Change that was refused; it completes "cannot ...".
        what: String,
        /// Answer of the kernel.
        refusal: Refusal,
    },
    /// The netlink transport failed. The caller must read the table again to know what was changed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

impl NftError {
    /// Returns the error number of a refusal or of a failed system call.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Unsupported => None,
            Self::Refused { refusal, .. } => Some(refusal.errno),
            Self::Netlink(error) => error.errno(),
        }
    }
}

/// Table as read from the kernel, with the handles and counters of its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Table without handles and counters, to compare with a desired table.
    pub table: Table,
    /// States of the rules, by chain and in the order of its rules.
    pub(super) rules: BTreeMap<String, Vec<RuleState>>,
}

/// Properties of a rule that only the kernel determines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RuleState {
    handle: u64,
    counter: Option<Counter>,
}

/// Values of a rule's counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counter {
    /// Number of packets.
    pub packets: u64,
    /// Number of bytes, network layer headers included.
    pub bytes: u64,
}

impl Loaded {
    /// Returns the counter of the rule with this comment.
    pub fn counter(&self, chain: &str, comment: &str) -> Option<Counter> {
        let place = self.place(chain, comment)?;
        self.rules.get(chain)?.get(place)?.counter
    }

    /// Returns the handle of the rule with this comment, by which it can be deleted.
    pub fn handle(&self, chain: &str, comment: &str) -> Option<u64> {
        let place = self.place(chain, comment)?;
        Some(self.rules.get(chain)?.get(place)?.handle)
    }

    /// Returns the rules of a chain, each with its handle.
    pub fn handles(&self, chain: &str) -> impl Iterator<Item = (&Rule, u64)> {
        let rules = self.table.chains.get(chain).into_iter().flat_map(|chain| &chain.rules);
        let states = self.rules.get(chain).into_iter().flatten();
        rules.zip(states.map(|state| state.handle))
    }

    fn place(&self, chain: &str, comment: &str) -> Option<usize> {
        let rules = &self.table.chains.get(chain)?.rules;
        rules.iter().position(|rule| rule.comment.as_deref() == Some(comment))
    }
}

impl Nft {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NftError> {
        match Connection::open(Protocol::Netfilter) {
            Ok(connection) => Ok(Self { connection }),
            Err(error) if error.errno() == Some(Errno::EPROTONOSUPPORT) => {
                Err(NftError::Unsupported)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// See [`Connection::shrink_buffers`].
    #[doc(hidden)]
    pub fn shrink_buffers(&mut self, bytes: usize) {
        self.connection.shrink_buffers(bytes);
    }

    /// See [`Connection::port`].
    pub fn port(&self) -> u32 {
        self.connection.port()
    }

    /// Reads a table with its contents. Returns `None` if it does not exist.
    pub fn read(&mut self, family: TableFamily, name: &str) -> Result<Option<Loaded>, NftError> {
        let Some(mut table) = self.read_head(family, name)? else { return Ok(None) };
        table.sets = self.read_sets(family, name)?;
        let mut chains = self.read_chains(family, name)?;
        let mut states: BTreeMap<String, Vec<RuleState>> = BTreeMap::new();
        for (chain, rule, state) in self.read_rules(family, name)? {
            chains.entry(chain.clone()).or_default().rules.push(rule);
            states.entry(chain).or_default().push(state);
        }
        table.chains = chains;
        Ok(Some(Loaded { table, rules: states }))
    }

    /// Reads all rules of a table, which another program may have created. Returns `None` if the table
    /// does not exist.
    pub fn rules(
        &mut self,
        family: TableFamily,
        table: &str,
    ) -> Result<Option<Vec<Rule>>, NftError> {
        if self.read_head(family, table)?.is_none() {
            return Ok(None);
        }
        let rules = self.read_rules(family, table)?;
        Ok(Some(rules.into_iter().map(|(_, rule, _)| rule).collect()))
    }

    /// Reads the rules of one chain, which another program may have created. Returns `None` if the
    /// chain does not exist.
    pub fn read_chain(
        &mut self,
        family: TableFamily,
        table: &str,
        chain: &str,
    ) -> Result<Option<Loaded>, NftError> {
        let Some(mut head) = self.read_head(family, table)? else { return Ok(None) };
        let Some(mut found) = self.read_chains(family, table)?.remove(chain) else {
            return Ok(None);
        };
        let mut states = Vec::new();
        for (name, rule, state) in self.read_rules(family, table)? {
            if name == chain {
                found.rules.push(rule);
                states.push(state);
            }
        }
        head.chains.insert(chain.to_owned(), found);
        Ok(Some(Loaded { table: head, rules: [(chain.to_owned(), states)].into() }))
    }

    /// Makes the kernel's table equal to this one. Returns true if that took a change.
    pub fn load(&mut self, table: &Table) -> Result<bool, NftError> {
        let have = self.read(table.family, &table.name)?;
        let transaction = table.changes(have.as_ref().map(|loaded| &loaded.table));
        let changed = !transaction.is_empty();
        self.commit(transaction)?;
        Ok(changed)
    }

    /// Deletes a table with its contents. Returns false if it did not exist.
    pub fn delete(&mut self, family: TableFamily, name: &str) -> Result<bool, NftError> {
        let mut transaction = Transaction::new();
        transaction.delete_table(family, name);
        match self.commit(transaction) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Commits a transaction. If it fits a single send, the kernel applies all of it or nothing. A
    /// larger one is split before messages with set elements, and parts may have been committed before
    /// a failure.
    pub fn commit(&mut self, transaction: Transaction) -> Result<(), NftError> {
        let mut part: Vec<Step> = Vec::new();
        let mut bytes = 0;
        let limit = self.connection.send_limit() - BATCH_MARGIN;
        for step in transaction.steps {
            if step.separable && bytes + step.message.len() > limit {
                self.commit_part(std::mem::take(&mut part))?;
                bytes = 0;
            }
            bytes += step.message.len();
            part.push(step);
        }
        self.commit_part(part)
    }

    fn commit_part(&mut self, steps: Vec<Step>) -> Result<(), NftError> {
        if steps.is_empty() {
            return Ok(());
        }
        let (messages, names): (Vec<_>, Vec<_>) =
            steps.into_iter().map(|step| (step.message, step.what)).unzip();
        let mut batch = Vec::with_capacity(messages.len() + 2);
        batch.push(boundary(wire::BATCH_BEGIN));
        batch.extend(messages);
        batch.push(boundary(wire::BATCH_END));
        let failures = self.connection.transact(&mut batch)?;
        let Some((place, refusal)) = failures.into_iter().next() else { return Ok(()) };
        if refusal.errno == Errno::EOPNOTSUPP && place == 0 {
            return Err(NftError::Unsupported);
        }
        // A refusal of the whole batch refers to its first message.
        let what = place.checked_sub(1).and_then(|at| names.get(at)).or(names.first());
        Err(NftError::Refused { what: what.cloned().unwrap_or_default(), refusal })
    }

    fn read_head(&mut self, family: TableFamily, name: &str) -> Result<Option<Table>, NftError> {
        let mut request = request_of(family, wire::GET_TABLE);
        request.string(wire::table::NAME, name);
        let what = || format!("read table {family} {name}");
        let found =
            self.connection.get(what, request, |received| parse_head(&received, family, name));
        match found {
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(None),
            Err(error) if error.errno() == Some(Errno::EINVAL) => Err(NftError::Unsupported),
            other => Ok(other?),
        }
    }

    pub(super) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    pub(super) fn read_chains(
        &mut self,
        family: TableFamily,
        table: &str,
    ) -> Result<BTreeMap<String, Chain>, NftError> {
        let mut request = request_of(family, wire::GET_CHAIN);
        request.string(wire::chain::TABLE, table);
        let chains = self
            .connection
            .dump("list chains", &request, |received| parse_chain(&received, table))?;
        Ok(chains.into_iter().collect())
    }

    fn read_rules(
        &mut self,
        family: TableFamily,
        table: &str,
    ) -> Result<Vec<(String, Rule, RuleState)>, NftError> {
        let mut request = request_of(family, wire::GET_RULE);
        request.string(wire::rule::TABLE, table);
        let rules = self
            .connection
            .dump("list rules", &request, |received| parse_rule(&received, table))?;
        Ok(rules)
    }

    fn read_sets(
        &mut self,
        family: TableFamily,
        table: &str,
    ) -> Result<BTreeMap<String, Set>, NftError> {
        let mut request = request_of(family, wire::GET_SET);
        request.string(wire::set::TABLE, table);
        let heads =
            self.connection.dump("list sets", &request, |received| parse_set(&received, table))?;
        let mut sets = BTreeMap::new();
        for (name, mut set) in heads {
            if set.expiring.is_none() {
                let boundaries = self.read_elements(family, table, &name)?;
                set.elements = elements(&set, boundaries);
            }
            sets.insert(name, set);
        }
        Ok(sets)
    }

    /// Reads the elements of a set. For an interval set, returns the boundaries of the intervals, with
    /// true for those that end one.
    fn read_elements(
        &mut self,
        family: TableFamily,
        table: &str,
        set: &str,
    ) -> Result<Vec<(u128, bool)>, NftError> {
        let mut request = request_of(family, wire::GET_ELEMENT);
        request.string(wire::element::LIST_TABLE, table).string(wire::element::LIST_SET, set);
        let lists = self
            .connection
            .dump("list set elements", &request, |received| parse_elements(&received))?;
        Ok(lists.into_iter().flatten().collect())
    }
}

/// Bytes reserved in a send for the two messages around a transaction.
const BATCH_MARGIN: usize = 64;

fn boundary(kind: u16) -> Message {
    Message::new(kind, 0, &wire::header(0, libc::NFNL_SUBSYS_NFTABLES as u16))
}

pub(super) fn request_of(family: TableFamily, kind: u16) -> Message {
    Message::new(wire::message_kind(kind), 0, &wire::header(family.number(), 0))
}

/// Returns the attributes of a message if it is of this kind.
pub(super) fn payload<'a>(
    received: &Received<'a>,
    kind: u16,
) -> Option<impl Iterator<Item = Attribute<'a>> + use<'a>> {
    let wanted = received.kind == wire::message_kind(kind);
    wanted.then(|| attributes(received.payload, wire::HEADER))
}

fn ownership(flags: u32) -> Ownership {
    if flags & wire::table::FLAG_OWNER != 0 {
        Ownership::Owner
    } else if flags & wire::table::FLAG_PERSIST != 0 {
        Ownership::Orphan
    } else {
        Ownership::Anybody
    }
}

pub(super) fn parse_head(
    received: &Received<'_>,
    family: TableFamily,
    name: &str,
) -> Option<Table> {
    let mut table = Table::new(family, name);
    for attribute in payload(received, wire::NEW_TABLE)? {
        match attribute.kind {
            wire::table::USERDATA => table.comment = wire::comment_from_userdata(attribute.value),
            wire::table::FLAGS => table.ownership = ownership(attribute.u32_be()?),
            _ => {}
        }
    }
    Some(table)
}

pub(super) fn parse_chain(received: &Received<'_>, table: &str) -> Option<(String, Chain)> {
    let mut name = None;
    let mut kind = None;
    let mut hook = None;
    let mut policy = Policy::Accept;
    for attribute in payload(received, wire::NEW_CHAIN)? {
        match attribute.kind {
            wire::chain::TABLE if attribute.string() != table => return None,
            wire::chain::NAME => name = Some(attribute.string()),
            wire::chain::TYPE => kind = ChainKind::from_name(&attribute.string()),
            wire::chain::POLICY => policy = Policy::from_number(attribute.u32_be()?),
            wire::chain::HOOK => {
                let number =
                    |kind| attribute.nested().find(|a| a.kind == kind).and_then(|a| a.u32_be());
                hook = Some((
                    number(wire::chain::HOOK_NUMBER)?,
                    number(wire::chain::HOOK_PRIORITY)? as i32,
                ));
            }
            _ => {}
        }
    }
    let base = match (kind, hook) {
        (Some(kind), Some((number, priority))) => {
            Hook::from_number(number).map(|hook| Base { kind, hook, priority, policy })
        }
        _ => None,
    };
    Some((name?, Chain { base, rules: Vec::new() }))
}

pub(super) fn parse_rule(
    received: &Received<'_>,
    table: &str,
) -> Option<(String, Rule, RuleState)> {
    let mut chain = None;
    let mut rule = Rule::new();
    let mut state = RuleState { handle: 0, counter: None };
    for attribute in payload(received, wire::NEW_RULE)? {
        match attribute.kind {
            wire::rule::TABLE if attribute.string() != table => return None,
            wire::rule::CHAIN => chain = Some(attribute.string()),
            wire::rule::HANDLE => state.handle = attribute.u64_be()?,
            wire::rule::USERDATA => rule.comment = wire::comment_from_userdata(attribute.value),
            wire::rule::EXPRESSIONS => {
                for item in attribute.nested() {
                    let (expression, counted) = Expression::decode(item);
                    rule.expressions.push(expression);
                    if let Some((packets, bytes)) = counted {
                        state.counter = Some(Counter { packets, bytes });
                    }
                }
            }
            _ => {}
        }
    }
    Some((chain?, rule, state))
}

pub(super) fn parse_set(received: &Received<'_>, table: &str) -> Option<(String, Set)> {
    let mut name = None;
    let (mut flags, mut number, mut length, mut size) = (0, 0, 0, 0);
    for attribute in payload(received, wire::NEW_SET)? {
        match attribute.kind {
            wire::set::TABLE if attribute.string() != table => return None,
            wire::set::NAME => name = Some(attribute.string()),
            wire::set::FLAGS => flags = attribute.u32_be()?,
            wire::set::KEY_TYPE => number = attribute.u32_be()?,
            wire::set::KEY_LENGTH => length = attribute.u32_be()?,
            wire::set::DESCRIPTION => {
                let mut inner = attribute.nested();
                let found = inner.find(|inner| inner.kind == wire::set::DESCRIPTION_SIZE);
                size = found.and_then(|inner| inner.u32_be()).unwrap_or(0);
            }
            _ => {}
        }
    }
    // An anonymous set belongs to its rule.
    if flags & wire::set::FLAG_ANONYMOUS != 0 {
        return None;
    }
    let interval = flags & wire::set::FLAG_INTERVAL != 0;
    let key = KeyType::from_number(number, length);
    let dynamic = flags & wire::set::FLAG_EVALUATE != 0;
    let expiring = (flags & wire::set::FLAG_TIMEOUT != 0).then_some(size);
    Some((name?, Set { key, interval, dynamic, expiring, elements: Default::default() }))
}

/// Parses a list of elements. For an interval set, these are boundaries, with true for those that end an
/// interval.
pub(super) fn parse_elements(received: &Received<'_>) -> Option<Vec<(u128, bool)>> {
    let list = payload(received, wire::NEW_ELEMENT)?
        .find(|attribute| attribute.kind == wire::element::LIST_ELEMENTS)?;
    Some(list.nested().filter_map(parse_element).collect())
}

/// Returns the elements of a set that the kernel listed so. Values that exceed the set's type are left
/// out.
pub(super) fn elements(set: &Set, mut listed: Vec<(u128, bool)>) -> BTreeSet<Interval> {
    listed.retain(|(value, _)| *value <= set.key.max());
    if set.interval {
        join(listed, set.key.max())
    } else {
        listed.into_iter().map(|(value, _)| Interval::new(value, value)).collect()
    }
}

fn parse_element(item: Attribute<'_>) -> Option<(u128, bool)> {
    let mut value = None;
    let mut flags = 0;
    for attribute in item.nested() {
        match attribute.kind {
            wire::element::KEY => {
                let data = attribute.nested().find(|inner| inner.kind == wire::DATA_VALUE)?;
                value = KeyType::decode(data.value);
            }
            wire::element::FLAGS => flags = attribute.u32_be()?,
            _ => {}
        }
    }
    Some((value?, flags & wire::element::FLAG_INTERVAL_END != 0))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use ipnet::IpNet;

    use super::*;
    use crate::{CtState, Verdict};
    use towline_netlink::Family;
    use towline_netns::namespace_test;

    fn nets(nets: &[&str]) -> Vec<IpNet> {
        nets.iter().map(|net| net.parse().unwrap()).collect()
    }

    /// Returns one rule for each statement that the crate can encode.
    fn all_rules() -> Vec<Rule> {
        let udp = libc::IPPROTO_UDP as u8;
        let tcp = libc::IPPROTO_TCP as u8;
        vec![
            Rule::new().input("eth0").not_input("lo").accept(),
            Rule::new().comment("counted").protocol(udp).source_port(53).counter(),
            Rule::new().protocol(tcp).destination_ports(6_443..=6_444).reject_tcp(),
            Rule::new().protocol(tcp).destination_port_in("ports").reject(),
            Rule::new().source("10.0.0.0/8".parse().unwrap()).drop(),
            Rule::new().not_source("10.0.0.1/32".parse().unwrap()).drop(),
            Rule::new().destination("fd00::/8".parse().unwrap()).return_(),
            Rule::new().not_destination("fd00::1/128".parse().unwrap()).return_(),
            Rule::new().source_in(Family::V4, "v4").destination_in(Family::V4, "v4").drop(),
            Rule::new().destination_in(Family::V6, "v6").drop(),
            Rule::new().mark(0x10, 0x30).set_mark(0x20, 0x30),
            Rule::new().not_mark(0x10, 0x30).set_ct_mark(0x20, 0x30),
            Rule::new().ct_mark(0x10, 0x30).ct_reply().accept(),
            Rule::new().ct_state(CtState::ESTABLISHED | CtState::RELATED).accept(),
            Rule::new().destination_is_local().accept(),
            Rule::new().source_is_local().accept(),
            Rule::new().made_here().socket_owner(65_534).accept(),
            Rule::new().ct_original().connection_in("connections").goto("regular"),
            Rule::new().remember_connection("connections", Duration::from_secs(60)),
            Rule::new().forget_connection("connections"),
            Rule::new().tcp_ends(),
            Rule::new().chance(10, 100).drop(),
            Rule::new().clamp_mss(1_300),
            Rule::new().clamp_mss_to_route(),
            Rule::new().jump("regular"),
            Rule::new().step(Expression::Verdict(Verdict::Goto("regular".to_owned()))),
        ]
    }

    fn everything() -> Table {
        let address = "192.0.2.7".parse().unwrap();
        let udp = libc::IPPROTO_UDP as u8;
        Table::new(TableFamily::Inet, "test")
            .comment("made by a test")
            .set("v4", Set::networks(KeyType::Ipv4, &nets(&["10.0.0.0/24", "10.0.1.0/24"])))
            .set("v6", Set::networks(KeyType::Ipv6, &nets(&["fd00::/8", "ff00::/8"])))
            .set("empty", Set::networks(KeyType::Ipv4, &[]))
            .set("all", Set::networks(KeyType::Ipv4, &nets(&["0.0.0.0/0"])))
            .set("ports", Set::ports([22, 6_443]))
            .set("connections", Set::expiring(KeyType::Connection, 1_000))
            .chain("regular", Chain::regular().rule(Rule::new().counter()))
            .chain("filter", Chain::base(ChainKind::Filter, Hook::Forward, -5).rules(all_rules()))
            .chain(
                "early",
                Chain::base(ChainKind::Filter, Hook::Prerouting, -300)
                    .rule(Rule::new().protocol(udp).notrack()),
            )
            .chain("reroute", Chain::base(ChainKind::Route, Hook::Output, -150))
            .chain("closed", Chain::base(ChainKind::Filter, Hook::Input, 0).policy(Policy::Drop))
            .chain(
                "dnat",
                Chain::base(ChainKind::Nat, Hook::Prerouting, -100)
                    .rule(Rule::new().protocol(udp).destination_port(80).dnat(address, Some(8_080)))
                    .rule(Rule::new().dnat(address, None)),
            )
            .chain(
                "snat",
                Chain::base(ChainKind::Nat, Hook::Postrouting, 100)
                    .rule(Rule::new().snat("2001:db8::1".parse().unwrap(), None))
                    .rule(Rule::new().output("wan").masquerade())
                    .rule(Rule::new().output("wan").masquerade_random()),
            )
    }

    namespace_test! {
        fn a_table_is_read_back_as_it_was_loaded() {
            let mut nft = Nft::open().unwrap();
            let table = everything();
            assert!(nft.load(&table).unwrap());
            let loaded = nft.read(TableFamily::Inet, "test").unwrap().unwrap();
            for (name, chain) in &table.chains {
                for (place, rule) in chain.rules.iter().enumerate() {
                    assert_eq!(&loaded.table.chains[name].rules[place], rule, "{name} {place}");
                }
            }
            assert_eq!(loaded.table, table);
            assert!(!nft.load(&table).unwrap());
            assert_eq!(loaded.counter("filter", "counted"), Some(Counter::default()));
            assert_eq!(nft.read(TableFamily::Ip, "test").unwrap(), None);
            assert!(nft.delete(TableFamily::Inet, "test").unwrap());
            assert!(!nft.delete(TableFamily::Inet, "test").unwrap());
        }
    }

    namespace_test! {
        fn another_program_reads_the_same() {
            let mut nft = Nft::open().unwrap();
            nft.load(&everything()).unwrap();
            let listed = std::process::Command::new("nft").args(["list", "table", "inet", "test"]).output();
            let Ok(listed) = listed else { return println!("skipped: there is no program nft") };
            let text = String::from_utf8(listed.stdout).unwrap();
            for line in [
                "comment \"made by a test\"",
                "elements = { 10.0.0.0/24, 10.0.1.0/24 }",
                "tcp option maxseg size set rt mtu",
                "meta mark & 0x00000030 == 0x00000010",
                "masquerade fully-random",
                "dnat ip to 192.0.2.7:8080",
            ] {
                assert!(text.contains(line), "no {line:?} in {text}");
            }
        }
    }

    namespace_test! {
        fn changes_lead_from_any_table_to_any_other() {
            let mut nft = Nft::open().unwrap();
            let full = everything();
            let bare = Table::new(TableFamily::Inet, "test");
            let mut other = full.clone();
            other.sets.remove("ports");
            other.sets.insert("v4".into(), Set::networks(KeyType::Ipv4, &nets(&["10.0.0.0/23"])));
            other.sets.insert("new".into(), Set::networks(KeyType::Ipv6, &nets(&["::/0"])));
            other.chains.remove("dnat");
            let filter = other.chains.get_mut("filter").unwrap();
            filter.base.as_mut().unwrap().priority = 7;
            filter.rules.retain(|rule| {
                !rule.expressions.iter().any(|e| matches!(e, Expression::Lookup { set, .. } if set == "ports"))
            });
            let mut reshaped = full.clone();
            reshaped.sets.insert("v4".into(), Set { interval: false, ..Set::networks(KeyType::Ipv4, &[]) });
            let tables = [&bare, &full, &other, &reshaped, &bare, &other, &full];
            for table in tables {
                assert!(nft.load(table).unwrap());
                let read = nft.read(TableFamily::Inet, "test").unwrap().unwrap().table;
                assert_eq!(read.chains, table.chains);
                assert_eq!(read.sets, table.sets);
            }
        }
    }

    namespace_test! {
        fn thousands_of_elements_fit_whatever_buffer_there_is() {
            let mut nft = Nft::open().unwrap();
            let many = |step: u32| -> Vec<IpNet> {
                (0..20_000u32)
                    .map(|n| IpNet::new(Ipv4Addr::from(0x0a00_0000 + n * step).into(), 32).unwrap())
                    .collect()
            };
            for step in [2, 3, 1] {
                let nets = many(step);
                let table = Table::new(TableFamily::Inet, "test")
                    .set("v4", Set::networks(KeyType::Ipv4, &nets));
                nft.load(&table).unwrap();
                let read = nft.read(TableFamily::Inet, "test").unwrap().unwrap().table;
                assert_eq!(read, table);
            }
        }
    }

    namespace_test! {
        fn a_refused_transaction_changes_nothing_and_names_the_step() {
            let mut nft = Nft::open().unwrap();
            let table = Table::new(TableFamily::Inet, "test")
                .chain("input", Chain::base(ChainKind::Filter, Hook::Input, 0).rule(
                    Rule::new().destination_in(Family::V4, "nowhere").drop(),
                ));
            let error = nft.load(&table).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::ENOENT));
            let text = error.to_string();
            assert!(text.starts_with("cannot add a rule to inet test input (meta, cmp, payload, lookup"), "{text}");
            assert_eq!(nft.read(TableFamily::Inet, "test").unwrap(), None);
        }
    }

    namespace_test! {
        fn rules_in_the_chains_of_others_come_and_go_by_handle() {
            let mut nft = Nft::open().unwrap();
            let foreign = Table::new(TableFamily::Ip, "filter")
                .chain("DOCKER-USER", Chain::regular().rule(Rule::new().counter().return_()));
            nft.load(&foreign).unwrap();
            let ours = Rule::new().comment("towline").output("towline0").accept();
            let mut transaction = Transaction::new();
            transaction.insert_rule(TableFamily::Ip, "filter", "DOCKER-USER", &ours);
            nft.commit(transaction).unwrap();
            let loaded = nft.read_chain(TableFamily::Ip, "filter", "DOCKER-USER").unwrap().unwrap();
            let rules = &loaded.table.chains["DOCKER-USER"].rules;
            assert_eq!((rules.len(), &rules[0]), (2, &ours));
            let mut transaction = Transaction::new();
            let handle = loaded.handle("DOCKER-USER", "towline").unwrap();
            transaction.delete_rule(TableFamily::Ip, "filter", "DOCKER-USER", handle);
            nft.commit(transaction).unwrap();
            assert_eq!(nft.read(TableFamily::Ip, "filter").unwrap().unwrap().table, foreign);
            assert_eq!(nft.read_chain(TableFamily::Ip, "filter", "NONE").unwrap(), None);
        }
    }
}
