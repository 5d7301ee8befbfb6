//! nftables over netlink: tables as values, loaded and read back whole.
//!
//! A [`Table`] is a comparable value: chains with their rules, named sets with their elements.
//! [`Nft::read`] turns what the kernel holds into one, [`Table::changes`] says what leads from
//! one to another, [`Nft::commit`] does it. No program is run.
//!
//! # Invariants
//!
//! - A change is one transaction of the kernel: all of it or nothing. Only sets too large for the
//!   socket's buffer are filled in further transactions, additions before deletions.
//! - Sets are updated element by element; rules that stay the same keep their place and counters
//!   as long as nothing of their chain changes.
//! - Nothing is acknowledged message by message: the kernel answers failures only, so that a
//!   large change fits small buffers. Answers lost are an error ([`NftError::Netlink`]), after
//!   which the table is to be read again.

mod changes;
mod client;
mod expression;
mod rule;
mod set;
mod table;
mod transaction;
mod wire;

pub use client::{Counter, Loaded, Nft, NftError};
pub use expression::{Expression, Verdict};
pub use rule::{CtState, IptablesStates, Rule};
pub use set::{Interval, KeyType, Set};
pub use table::{Base, Chain, ChainKind, Hook, Ownership, Policy, Table, TableFamily};
pub use transaction::Transaction;
