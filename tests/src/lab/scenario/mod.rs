//! What `cargo lab NAME` runs.
//!
//! A scenario is a module with a `run(&Setting, ...)` that builds its picture ([`hybrid`] is the
//! common one), notes its promises ([`Promises`](super::report::Promises)), and gives back
//! [`Figures`](super::report::Figures): one serialisable value, whose JSON keys others rely on.
//! Whatever goes wrong after the picture stands is a promise that did not hold, so that the figures
//! so far are still told; only [`Forbidden`](super::report::Forbidden) ends without any. A new one
//! also gets a subcommand and a line of the list in [`cli`](super::cli).

pub mod attack;
pub mod bench;
pub mod bootstrap;
pub mod cohabit;
pub mod crash;
pub mod demo;
pub mod departure;
pub mod failover;
pub mod hybrid;
pub mod idle;
pub mod interop;
pub mod kubernetes;
pub mod leak;
pub mod many;
pub mod mtu;
pub mod nat;
pub mod nodes;
pub mod plan;
pub mod vm;

use super::binaries::Binaries;
use super::privilege::Rank;
use super::talk::Talk;

/// What every scenario starts from.
#[derive(Debug)]
pub struct Setting {
    /// Who we are towards the kernel.
    pub rank: Rank,
    /// The daemons, built.
    pub binaries: Binaries,
    /// Progress.
    pub talk: Talk,
}
