//! nftables over netlink: tables as values that are loaded and read as a whole.
//!
//! A [`Table`] is a comparable value: chains with their rules, named sets with their elements.
//! [`Nft::read`] reads a table from the kernel, [`Table::changes`] computes the changes from one table
//! to another, and [`Nft::commit`] applies them. This package knows nothing of Towline, and runs no
//! program.
//!
//! ```
//! use towline_netlink::Family;
//! use towline_nftables::{Chain, ChainKind, Hook, KeyType, Rule, Set, Table, TableFamily};
//!
//! // A table is a value: here a set of networks, and a chain that drops what comes from them.
//! let nets = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"].map(|net| net.parse().unwrap());
//! let rule = Rule::new().comment("private").source_in(Family::V4, "nets").counter().drop();
//! let table = Table::new(TableFamily::Inet, "example")
//!     .set("nets", Set::networks(KeyType::Ipv4, &nets[..2]))
//!     .chain("input", Chain::base(ChainKind::Filter, Hook::Input, 0).rule(rule));
//!
//! // A kernel without the table needs five messages: table, set, chain, rule, elements.
//! assert_eq!(table.changes(None).messages(), 5);
//! // A kernel with the table needs none, and one for another element: the rule's counter stays.
//! assert!(table.changes(Some(&table)).is_empty());
//! let grown = table.clone().set("nets", Set::networks(KeyType::Ipv4, &nets));
//! assert_eq!(grown.changes(Some(&table)).messages(), 1);
//! ```
//!
//! With `CAP_NET_ADMIN`, `Nft::open()?.load(&table)?` sends the messages to the kernel, and
//! [`Nft::read`] returns the same value with the counters.
//!
//! # Invariants
//!
//! - A change is one transaction of the kernel: all of it is applied, or nothing. Only the elements of
//!   sets that exceed the socket's buffer are sent in further transactions, additions before
//!   deletions.
//! - Sets are updated element by element. A chain keeps its rules and their counters as long as
//!   nothing in the chain changes.
//! - The kernel does not acknowledge single messages. It answers failures only, so that a large change
//!   fits small buffers. Lost answers are an error ([`NftError::Netlink`]); then the caller must read
//!   the table again.

#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing)]

mod changes;
mod client;
mod evaluate;
mod expression;
mod foreign;
#[doc(hidden)]
pub mod internals;
mod rule;
mod set;
mod table;
mod transaction;
mod wire;

pub use client::{Counter, Loaded, Nft, NftError};
pub use evaluate::{Fate, Packet, PacketLink};
pub use expression::{Expression, Verdict};
pub use foreign::ForeignTable;
pub use rule::{CtState, IptablesStates, Rule};
pub use set::{Interval, KeyType, Set};
pub use table::{Base, Chain, ChainKind, Hook, Ownership, Policy, Table, TableFamily};
pub use transaction::Transaction;
