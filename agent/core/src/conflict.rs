//! Claims of peers that were refused, for the operator.

use std::fmt;

use ipnet::IpNet;
use towline_types::codes;
use towline_types::id::{NodeId, NodeName};
use towline_types::limits;
use towline_types::ownership::Unusable;

use crate::local_limits::Covered;

/// Claim of a peer that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conflict {
    /// Another node has the same name. This is only reported.
    Name {
        /// Id of that node.
        holder: NodeId,
    },
    /// Its WireGuard key is another's, so it cannot be a peer.
    Key {
        /// Holder of the key.
        holder: Holder,
    },
    /// Another holds the same prefix.
    Prefix {
        /// Claimed prefix.
        prefix: IpNet,
        /// Holder of the prefix.
        holder: Holder,
    },
    /// Another holds a prefix around the claimed one, or inside it.
    Overlap {
        /// Claimed prefix.
        prefix: IpNet,
        /// Prefix that is held.
        held: IpNet,
        /// Holder of that prefix.
        holder: Holder,
    },
    /// The node holds the largest number of prefixes already.
    TooMany {
        /// Claimed prefix.
        prefix: IpNet,
    },
    /// No node may hold the prefix.
    Unusable(Unusable),
    /// The prefix covers something that this host needs. It is refused here only.
    Covers {
        /// Claimed prefix.
        prefix: IpNet,
        /// What it covers.
        covered: Covered,
    },
}

codes! {
    Conflict {
        Name => "name-conflict",
        Key => "key-conflict",
        Prefix => "prefix-conflict",
        Overlap => "prefix-overlap",
        TooMany => "too-many-prefixes",
        Unusable(Unusable),
        Covers { covered: Covered },
    }
}

impl Conflict {
    /// Returns whether the claims of other nodes caused it, so that it may end when they change.
    pub(crate) fn is_with_others(&self) -> bool {
        match self {
            Self::Name { .. } | Self::Key { .. } | Self::Prefix { .. } | Self::Overlap { .. } => {
                true
            }
            Self::Unusable(_) | Self::Covers { .. } | Self::TooMany { .. } => false,
        }
    }

    /// Returns the conflict of a claim to `prefix` with `held`, which overlaps it.
    pub(crate) fn over(prefix: IpNet, held: IpNet, holder: Holder) -> Self {
        if prefix == held {
            Self::Prefix { prefix, holder }
        } else {
            Self::Overlap { prefix, held, holder }
        }
    }
}

/// Holder of a key or a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// This node.
    ThisNode,
    /// The mesh itself: an overlay range.
    Mesh,
    /// Another node.
    Node(NodeName),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ThisNode => f.write_str("this node"),
            Self::Mesh => f.write_str("the mesh"),
            Self::Node(name) => name.fmt(f),
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name { holder } => write!(f, "its name is also that of node {holder}"),
            Self::Key { holder } => write!(f, "its WireGuard key is held by {holder}"),
            Self::Prefix { prefix, holder } => write!(f, "prefix {prefix} is held by {holder}"),
            Self::Overlap { prefix, held, holder } => {
                write!(f, "prefix {prefix} overlaps {held} of {holder}")
            }
            Self::TooMany { prefix } => write!(
                f,
                "prefix {prefix} is refused: the node announces more than {} outside protected ranges",
                limits::GUARDED_PREFIXES
            ),
            Self::Unusable(reason) => reason.fmt(f),
            Self::Covers { prefix, covered } => {
                write!(f, "prefix {prefix} is refused here: it covers {covered}")
            }
        }
    }
}
