//! Inputs of the core: its configuration, its membership, changes of the network map.

use towline_types::mtu::Mtu;
use towline_types::node::{Grant, MeshConfig, Node, Tombstone};

use crate::plan::RulePlan;

/// Membership of this node in a mesh.
#[derive(Debug, Clone)]
pub struct Membership {
    /// Our own grant.
    pub grant: Grant,
    /// Configuration of the whole mesh.
    pub mesh: MeshConfig,
}

/// Configuration of the core, given once at construction.
#[derive(Debug, Clone)]
pub struct Config {
    /// The mesh that we are in; `None`: static peers are all there is.
    pub membership: Option<Membership>,
    /// Name of the TUN link.
    pub link: String,
    /// MTU of the TUN link.
    pub mtu: Mtu,
    /// Number of our routing table, e.g. 21580.
    pub table: u32,
    /// Our policy rules.
    pub rules: RulePlan,
    /// Name of our nftables table.
    pub firewall_table: String,
    /// True if this node relays for others: then it registers with no relay itself.
    pub relay: bool,
    /// Number that grows with every start of the agent, as in our record.
    pub boot_epoch: u64,
}

/// A change of the network map. Signatures and grants were verified before.
#[derive(Debug, Clone)]
pub enum MapChange {
    /// A node is new, or published a newer record.
    Upsert(Box<Node>),
    /// A node was removed for good.
    Remove(Tombstone),
    /// The mesh's configuration changed.
    Mesh(MeshConfig),
}
