//! What this node announces: the networks that are reached through it, by who says so.
//!
//! Every source names its networks whole and again whenever they change; the daemon keeps the
//! latest word of each, filters it, and announces what the grant allows. Another task becomes a
//! source by holding a [`Feed`].

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use tokio::sync::mpsc;
use towline_core::prefixes::{covering, without};
use towline_proto::limits;
use towline_proto::node::Grant;

/// Who says that a network is reached through this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PrefixSource {
    /// `node.prefixes`.
    Configuration,
    /// The machine's own addresses (`node.addressing = "node-ip"`).
    NodeIp,
    /// The node's pod networks, as Kubernetes knows them.
    Kubernetes,
}

/// The networks of one source, whole: they replace what it said before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixUpdate {
    /// Who says so.
    pub source: PrefixSource,
    /// Host bits are ignored.
    pub prefixes: Vec<IpNet>,
}

/// Where a source says what it has.
pub type Feed = mpsc::Sender<PrefixUpdate>;

/// Which networks are announced, whoever named them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Filter<'a> {
    /// Only what lies inside one of these; empty: everything.
    pub include: &'a [IpNet],
    /// Never these, nor any part of them: they are cut out.
    pub exclude: &'a [IpNet],
}

/// The latest word of every source.
#[derive(Debug, Default)]
pub struct Prefixes {
    by_source: BTreeMap<PrefixSource, Vec<IpNet>>,
}

/// What of it is announced, and what is not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// Sorted; none lies inside another.
    pub announced: Vec<IpNet>,
    /// What is not, a line each, for the operator. What a filter leaves out is no problem.
    pub problems: Vec<String>,
}

impl Prefixes {
    /// Takes a source's word; says whether it differs from the one before.
    pub fn set(&mut self, update: PrefixUpdate) -> bool {
        let prefixes: Vec<IpNet> = update.prefixes.iter().map(IpNet::trunc).collect();
        let before = self.by_source.insert(update.source, prefixes.clone());
        before.unwrap_or_default() != prefixes
    }

    /// What is announced: filtered, and as far as the grant allows it. The record would be
    /// refused whole for one network that it does not.
    pub fn select(&self, filter: Filter<'_>, grant: &Grant) -> Selection {
        let named = self.by_source.values().flatten().copied();
        let included = |net: &IpNet| {
            filter.include.is_empty() || filter.include.iter().any(|wide| wide.contains(net))
        };
        let kept: BTreeSet<IpNet> = covering(named.filter(included));
        let mut selection = Selection::default();
        for prefix in without(kept, filter.exclude) {
            if !grant.allows(&prefix) {
                selection.problems.push(format!(
                    "prefix {prefix} is not granted to this node and not announced: join again \
                     with a token made with --prefix {prefix}, or a wider one"
                ));
            } else if selection.announced.len() == limits::PREFIXES {
                selection.problems.push(format!(
                    "prefix {prefix} is not announced: a node announces {} at most",
                    limits::PREFIXES
                ));
            } else {
                selection.announced.push(prefix);
            }
        }
        selection
    }
}

#[cfg(test)]
mod tests {
    use towline_proto::id::{IdentityKey, MeshId, NodeId, WireguardKey};
    use towline_proto::node::OverlayAddresses;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn grant(allowed: &[&str]) -> Grant {
        Grant {
            mesh_id: MeshId([1; 16]),
            node_id: NodeId([2; 16]),
            name: "worker-1".parse().unwrap(),
            identity_key: IdentityKey([3; 32]),
            wireguard_keys: vec![WireguardKey([4; 32])],
            overlay: OverlayAddresses {
                v6: "fd00::1".parse().unwrap(),
                v4: [198, 19, 0, 1].into(),
            },
            allowed_prefixes: allowed.iter().map(|text| net(text)).collect(),
            site: None,
            labels: BTreeMap::new(),
            issued_at: 0,
            ephemeral: false,
        }
    }

    fn prefixes(named: &[(PrefixSource, &[&str])]) -> Prefixes {
        let mut prefixes = Prefixes::default();
        for (source, nets) in named {
            let nets = nets.iter().map(|text| net(text)).collect();
            assert!(prefixes.set(PrefixUpdate { source: *source, prefixes: nets }));
        }
        prefixes
    }

    #[test]
    fn sources_add_up_and_the_latest_word_of_each_holds() {
        let mut prefixes = prefixes(&[
            (PrefixSource::Configuration, &["10.1.0.0/24"]),
            (PrefixSource::Kubernetes, &["10.244.3.7/24", "10.1.0.0/24", "10.1.0.0/25"]),
        ]);
        let grant = grant(&["0.0.0.0/0"]);
        let all = prefixes.select(Filter::default(), &grant);
        assert_eq!(all.announced, ["10.1.0.0/24", "10.244.3.0/24"].map(net));
        let update = PrefixUpdate { source: PrefixSource::Kubernetes, prefixes: Vec::new() };
        assert!(prefixes.set(update.clone()));
        assert!(!prefixes.set(update));
        assert_eq!(prefixes.select(Filter::default(), &grant).announced, [net("10.1.0.0/24")]);
    }

    #[test]
    fn filters_leave_out_and_cut_out() {
        let prefixes = prefixes(&[(
            PrefixSource::Kubernetes,
            &["10.244.0.0/23", "10.96.0.0/16", "fd00:10::/64"],
        )]);
        let filter = Filter {
            include: &[net("10.244.0.0/16"), net("fd00:10::/48")],
            exclude: &[net("10.244.1.0/24")],
        };
        let selection = prefixes.select(filter, &grant(&["10.244.0.0/16", "fd00:10::/64"]));
        assert_eq!(selection.announced, ["10.244.0.0/24", "fd00:10::/64"].map(net));
        assert_eq!(selection.problems, [""; 0]);
    }

    #[test]
    fn what_is_not_granted_is_said_and_not_announced() {
        let prefixes = prefixes(&[(PrefixSource::Configuration, &["10.1.0.0/24", "10.2.0.0/24"])]);
        let selection = prefixes.select(Filter::default(), &grant(&["10.1.0.0/16"]));
        assert_eq!(selection.announced, [net("10.1.0.0/24")]);
        assert_eq!(selection.problems.len(), 1);
        assert!(selection.problems[0].contains("--prefix 10.2.0.0/24"), "{selection:?}");
    }
}
