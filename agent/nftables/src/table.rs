//! Tables and chains as values.

use std::collections::BTreeMap;

use super::rule::Rule;
use super::set::Set;

/// Table with its sets and chains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Address family of the packets that the table's chains see.
    pub family: TableFamily,
    /// Name of the table, unique in its family.
    pub name: String,
    /// Comment, which can identify the program that created the table. Kernels before 5.10 do not
    /// store it.
    pub comment: Option<String>,
    /// Ownership: the sockets that may change the table.
    pub ownership: Ownership,
    /// Named sets, by name.
    pub sets: BTreeMap<String, Set>,
    /// Chains, by name.
    pub chains: BTreeMap<String, Chain>,
}

/// Ownership of a table.
///
/// Since Linux 6.9 a table can be owned by the socket that created it. Then an `nft flush ruleset` of
/// another socket does not delete it. The table persists after its owner closed; it is then an orphan,
/// which every socket may change, and which the next owner adopts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ownership {
    /// Every socket may change the table.
    #[default]
    Anybody,
    /// Only the socket that created or adopted the table may change it, while that socket is open. In a
    /// desired table, that is the socket that commits it.
    Owner,
    /// The owner closed. Every socket may change the table until one adopts it.
    Orphan,
}

/// Address family of the packets that a table's chains see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// IPv4 and IPv6.
    Inet,
    /// IPv4 only.
    Ip,
    /// IPv6 only.
    Ip6,
}

/// Chain of rules.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    /// Attachment of a base chain to a hook; `None` for a regular chain, which is only jumped to.
    pub base: Option<Base>,
    /// Rules in order of evaluation.
    pub rules: Vec<Rule>,
}

/// Attachment of a base chain to a hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    /// Type of the chain.
    pub kind: ChainKind,
    /// Hook that the chain is attached to.
    pub hook: Hook,
    /// Priority. Chains with lower priorities run first. Customary priorities: -300 raw (before
    /// conntrack), -150 mangle, -100 destination NAT, 0 filter, 100 source NAT.
    pub priority: i32,
    /// Verdict for packets without a verdict of a rule.
    pub policy: Policy,
}

/// Type of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    /// Accepts or drops packets.
    Filter,
    /// Translates addresses. Only the first packet of a connection traverses the chain.
    Nat,
    /// At [`Hook::Output`]: the kernel routes a packet again if the chain changes its mark.
    Route,
}

/// Hook of netfilter on a packet's way through the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Incoming packets before routing.
    Prerouting,
    /// Incoming packets to this host, after routing.
    Input,
    /// Packets that this host forwards.
    Forward,
    /// Local packets after routing.
    Output,
    /// All outgoing packets, local and forwarded.
    Postrouting,
}

/// Verdict of a base chain for packets without a verdict of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Accepts the packets.
    #[default]
    Accept,
    /// Drops the packets.
    Drop,
}

impl Table {
    /// Creates an empty table.
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

    /// Sets the comment.
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    /// Makes the socket that commits the table its owner, see [`Ownership`].
    pub fn owned(mut self) -> Self {
        self.ownership = Ownership::Owner;
        self
    }

    /// Adds a named set.
    pub fn set(mut self, name: impl Into<String>, set: Set) -> Self {
        self.sets.insert(name.into(), set);
        self
    }

    /// Adds a chain.
    pub fn chain(mut self, name: impl Into<String>, chain: Chain) -> Self {
        self.chains.insert(name.into(), chain);
        self
    }
}

impl Chain {
    /// Creates a base chain with the policy [`Policy::Accept`].
    pub fn base(kind: ChainKind, hook: Hook, priority: i32) -> Self {
        let base = Base { kind, hook, priority, policy: Policy::Accept };
        Self { base: Some(base), rules: Vec::new() }
    }

    /// Creates a regular chain, which is only jumped to.
    pub fn regular() -> Self {
        Self::default()
    }

    /// Sets the policy of a base chain. Has no effect on a regular chain.
    pub fn policy(mut self, policy: Policy) -> Self {
        if let Some(base) = &mut self.base {
            base.policy = policy;
        }
        self
    }

    /// Appends a rule.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Appends rules.
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
