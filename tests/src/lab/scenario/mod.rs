//! The scenarios that `cargo lab NAME` runs.
//!
//! A scenario is a module with a function `run(&Setting, ...)`. It builds its hosts ([`hybrid`] is
//! the most common layout), checks its promises ([`Promises`](super::report::Promises)), and
//! returns its [`Figures`](super::report::Figures): one serialisable value whose JSON keys other
//! programs rely on. Once the hosts are built, every error is a promise that did not hold, so that
//! the figures up to then are still printed. Only [`Forbidden`](super::report::Forbidden) ends a
//! scenario without figures. Its arguments are an `Options` that derives [`clap::Args`]. A new
//! scenario also needs a row in the [`table`].

pub mod attack;
pub mod bench;
pub mod bootstrap;
pub mod cluster;
pub mod coexist;
pub mod crash;
pub mod demo;
pub mod departure;
pub mod explain;
pub mod failover;
pub mod flood;
mod foreign_firewalls;
pub mod ha;
pub mod hosts;
pub mod hybrid;
pub mod idle;
pub mod interop;
pub mod kubernetes;
pub mod leak;
pub mod many;
pub mod mixed;
pub mod mtu;
pub mod nat;
pub mod nodes;
pub mod outage;
pub mod page;
pub mod plan;
pub mod scale;
mod scene;
pub mod selection;
pub mod table;
pub mod vm;

use std::sync::Arc;

use super::binaries::Binaries;
use super::output::ProgressOutput;
use super::privilege::Rank;

/// Common input of all scenarios.
#[derive(Debug)]
pub struct Setting {
    /// Rights of the lab on this machine.
    pub rank: Rank,
    /// Paths of the programs under test, which are already built.
    pub binaries: Binaries,
    /// Output for progress lines.
    pub output: Arc<ProgressOutput>,
}
