//! What `cargo lab NAME` runs.

pub mod crash;
pub mod demo;
pub mod hybrid;
pub mod idle;

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
