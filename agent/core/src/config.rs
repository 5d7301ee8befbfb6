//! What the core is told: its configuration, its membership, changes of the network map.

use towline_types::node::{Grant, MeshConfig, Node, Tombstone};

use crate::plan::RulePlan;

/// What makes us a node of a mesh.
#[derive(Debug, Clone)]
pub struct Membership {
    /// Our own grant.
    pub grant: Grant,
    /// What holds for the whole mesh.
    pub mesh: MeshConfig,
}

/// What the core is told once.
#[derive(Debug, Clone)]
pub struct Config {
    /// The mesh that we are in; `None`: static peers are all there is.
    pub membership: Option<Membership>,
    /// Name of the TUN link.
    pub link: String,
    /// MTU of the TUN link, in bytes.
    pub mtu: u32,
    /// Routing table of ours.
    pub table: u32,
    /// Policy rules of ours.
    pub rules: RulePlan,
    /// Name of our nftables table.
    pub firewall_table: String,
    /// Whether we relay for others.
    pub relay: bool,
    /// Grows with every start of the agent, as in our record.
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
