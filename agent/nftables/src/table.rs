//! A table as a value.

use std::collections::BTreeMap;

use super::rule::Rule;
use super::set::Set;

/// A table with all that is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Which packets it sees.
    pub family: TableFamily,
    /// Its name; unique in its family.
    pub name: String,
    /// Says whose it is. Kernels before 5.10 forget it.
    pub comment: Option<String>,
    /// Who may change it.
    pub ownership: Ownership,
    /// Named sets, by name.
    pub sets: BTreeMap<String, Set>,
    /// Chains, by name.
    pub chains: BTreeMap<String, Chain>,
}

/// Who may change a table. From Linux 6.9 on a table can belong to the socket that made it, so that
/// nobody else's `nft flush ruleset` takes it, and still outlive that socket; then it is an orphan,
/// which anybody may change and the next owner adopts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ownership {
    /// Everybody.
    #[default]
    Anybody,
    /// The socket that made or adopted it, as long as that is open; wanted, it means ours.
    Owner,
    /// Everybody, until somebody adopts it.
    Orphan,
}

/// Which packets a table sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// IPv4 and IPv6.
    Inet,
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    /// Where it hangs in the packets' way; `None`: it is only jumped to.
    pub base: Option<Base>,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// Where a base chain hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    /// What it may do.
    pub kind: ChainKind,
    /// At which point of a packet's way.
    pub hook: Hook,
    /// Lower comes first. -300 is before connection tracking, -150 mangles, -100 translates
    /// destinations, 0 filters, 100 translates sources.
    pub priority: i32,
    /// What becomes of packets that no rule decided on.
    pub policy: Policy,
}

/// What a base chain may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    /// Let pass or drop.
    Filter,
    /// Translate addresses; sees the first packet of a connection only.
    Nat,
    /// At [`Hook::Output`]: has the packet routed again if it changes its mark.
    Route,
}

/// A point of a packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Came in, not yet routed.
    Prerouting,
    /// For this host.
    Input,
    /// For somebody else.
    Forward,
    /// Made here, routed.
    Output,
    /// About to leave.
    Postrouting,
}

/// What becomes of packets that no rule decided on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// They pass.
    #[default]
    Accept,
    /// They are dropped.
    Drop,
}

impl Table {
    /// An empty table.
    pub fn new(family: TableFamily, name: impl Into<String>) -> Self {
        Self {
            family,
            name: name.into(),
            comment: None,
            ownership: Ownership::Anybody,
            sets: BTreeMap::new(),
            chains: BTreeMap::new(),
        }
    }

    /// With a comment.
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    /// Which belongs to us while we live; see [`Ownership`].
    pub fn owned(mut self) -> Self {
        self.ownership = Ownership::Owner;
        self
    }

    /// With a named set.
    pub fn set(mut self, name: impl Into<String>, set: Set) -> Self {
        self.sets.insert(name.into(), set);
        self
    }

    /// With a chain.
    pub fn chain(mut self, name: impl Into<String>, chain: Chain) -> Self {
        self.chains.insert(name.into(), chain);
        self
    }
}

impl Chain {
    /// A chain that hangs in the packets' way and lets pass what no rule decides on.
    pub fn base(kind: ChainKind, hook: Hook, priority: i32) -> Self {
        let base = Base { kind, hook, priority, policy: Policy::Accept };
        Self { base: Some(base), rules: Vec::new() }
    }

    /// A chain that is only jumped to.
    pub fn regular() -> Self {
        Self::default()
    }

    /// With another policy; only base chains have one.
    pub fn policy(mut self, policy: Policy) -> Self {
        if let Some(base) = &mut self.base {
            base.policy = policy;
        }
        self
    }

    /// With a rule at the end.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// With rules at the end.
    pub fn rules(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.rules.extend(rules);
        self
    }
}

impl TableFamily {
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Inet => libc::NFPROTO_INET as u8,
            Self::Ip => libc::NFPROTO_IPV4 as u8,
            Self::Ip6 => libc::NFPROTO_IPV6 as u8,
        }
    }
}

impl std::fmt::Display for TableFamily {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        })
    }
}

impl ChainKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        [Self::Filter, Self::Nat, Self::Route].into_iter().find(|kind| kind.name() == name)
    }
}

impl Hook {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Prerouting => 0,
            Self::Input => 1,
            Self::Forward => 2,
            Self::Output => 3,
            Self::Postrouting => 4,
        }
    }

    pub(super) fn from_number(number: u32) -> Option<Self> {
        [Self::Prerouting, Self::Input, Self::Forward, Self::Output, Self::Postrouting]
            .into_iter()
            .find(|hook| hook.number() == number)
    }
}

impl Policy {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Drop => libc::NF_DROP as u32,
            Self::Accept => libc::NF_ACCEPT as u32,
        }
    }

    pub(super) fn from_number(number: u32) -> Self {
        if number == Self::Drop.number() { Self::Drop } else { Self::Accept }
    }
}
