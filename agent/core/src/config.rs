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
    /// Limits of this node's relay. Set if it relays for others, unless its grant denies it: then it
    /// registers with no relay itself.
    pub relay: Option<RelayLimits>,
    /// Number that grows with every start of the agent, as in our record.
    pub boot_epoch: u64,
}

/// Limits of this node's relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelayLimits {
    /// Largest number of registered nodes.
    pub nodes: usize,
    /// Largest number of channels of one node.
    pub channels_per_node: usize,
    /// Largest number of bits that one node may send per second, on all of its channels together.
    pub bits_per_second: u64,
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
