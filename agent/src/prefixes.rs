//! Prefixes that this node announces: the networks that are reached through it, by source.
//!
//! Each source names all its networks whenever they change. The daemon keeps the latest list of
//! each source, filters it, and announces what the grant allows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use towline_core::prefixes::{covering, without};
use towline_proto::convert::network_bytes;
use towline_proto::node::Grant;
use towline_proto::ownership::overlap;
use towline_proto::{codes, limits};

/// Source of announced networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PrefixSource {
    /// `node.prefixes` of the configuration.
    Configuration,
    /// The machine's own addresses (`node.addressing = "node-ip"`).
    NodeIp,
    /// The node's pod networks, from Kubernetes.
    Kubernetes,
}

/// All networks of one source. They replace its previous networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixUpdate {
    /// Source of the networks.
    pub source: PrefixSource,
    /// Networks of the source. Host bits are ignored.
    pub prefixes: Vec<IpNet>,
}

/// Filter for the networks of all sources.
#[derive(Debug, Clone, Copy, Default)]
pub struct Filter<'a> {
    /// Only networks inside one of these are announced. Empty: no restriction.
    pub include: &'a [IpNet],
    /// Networks that are never announced. They are cut out of larger networks.
    pub exclude: &'a [IpNet],
    /// Networks that the operator refuses on this node (`[trust]`). They are cut out, too.
    pub refused: &'a [IpNet],
}

/// Latest networks of every source.
#[derive(Debug, Default)]
pub struct Prefixes {
    by_source: BTreeMap<PrefixSource, Vec<IpNet>>,
}

/// Announced networks, and problems with the others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// Announced networks, sorted and disjoint.
    pub announced: Vec<IpNet>,
    /// Announced networks that the operator configured and that hold no pods: networks of machines.
    pub lans: Vec<IpNet>,
    /// Networks that cannot be announced. Filtered networks are no problem.
    pub problems: Vec<NotAnnounced>,
}

/// Network that cannot be announced, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAnnounced {
    /// The grant does not allow it.
    #[error(
        "prefix {prefix} is not announced: the grant does not include it: join again with a token \
         made with --prefix {prefix}, or a wider one"
    )]
    NotGranted {
        /// Network of the node.
        prefix: IpNet,
    },
    /// It is a block of a pod range, and other networks take all blocks that the grant allows.
    #[error(
        "prefix {prefix} is not announced: this node has all blocks that it may have of {range}: join \
         again with a token made with a larger --blocks"
    )]
    BlocksUsed {
        /// Network of the node.
        prefix: IpNet,
        /// Pod range in which it lies.
        range: IpNet,
    },
    /// The node announces the largest number of networks already, or its record has no room for another one.
    #[error(
        "prefix {prefix} is not announced: a record has room for at most {} networks, of IPv6 for fewer: \
         announce wider ones",
        limits::PREFIXES
    )]
    TooMany {
        /// Network of the node.
        prefix: IpNet,
    },
}

codes! {
    NotAnnounced {
        NotGranted => "prefix-not-granted",
        BlocksUsed => "pod-blocks-used",
        TooMany => "too-many-prefixes",
    }
}

impl Selection {
    /// Returns whether other nodes reach an address through this node: it is announced, or in an announced
    /// network, such as the LAN of the address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.announced.iter().any(|net| net.contains(&ip))
    }
}

impl Prefixes {
    /// Replaces the networks of a source. Returns whether they changed.
    pub fn set(&mut self, update: PrefixUpdate) -> bool {
        let prefixes: Vec<IpNet> = update.prefixes.iter().map(IpNet::trunc).collect();
        let before = self.by_source.insert(update.source, prefixes.clone());
        before.unwrap_or_default() != prefixes
    }

    /// Returns the networks that Kubernetes names as this node's pods, limited to what is
    /// announced.
    pub fn pods(&self, selection: &Selection) -> Vec<IpNet> {
        let named = self.by_source.get(&PrefixSource::Kubernetes).into_iter().flatten();
        let of = |pods: &IpNet| -> Vec<IpNet> {
            let announced = &selection.announced;
            if announced.iter().any(|wider| wider.contains(pods)) {
                return vec![*pods];
            }
            announced.iter().filter(|part| pods.contains(*part)).copied().collect()
        };
        covering(named.flat_map(of)).into_iter().collect()
    }

    /// Returns whether the operator configured a network, and Kubernetes names no pods in it.
    fn is_lan(&self, net: &IpNet) -> bool {
        let of = |source| self.by_source.get(&source).into_iter().flatten();
        of(PrefixSource::Configuration).any(|configured| configured.contains(net))
            && !of(PrefixSource::Kubernetes).any(|pods| overlap(pods, net))
    }

    /// Selects the networks to announce: those that pass the filter and that the grant allows, or will
    /// allow once the controller pinned their blocks. One network outside the grant would make the
    /// controller refuse the whole record.
    pub fn select(&self, filter: Filter<'_>, grant: &Grant) -> Selection {
        let named = self.by_source.values().flatten().copied();
        let included = |net: &IpNet| {
            filter.include.is_empty() || filter.include.iter().any(|wide| wide.contains(net))
        };
        let kept: BTreeSet<IpNet> = covering(named.filter(included));
        let mut selection = Selection::default();
        let kept = without(without(kept, filter.exclude), filter.refused);
        let wanted: Vec<IpNet> = kept.into_iter().collect();
        let pinned = grant.pin(&wanted);
        let grant = pinned.as_ref().unwrap_or(grant);
        let mut room = limits::RECORD_NETWORK_BYTES;
        for prefix in wanted {
            if !grant.allows(&prefix) {
                selection.problems.push(match grant.pod_range(&prefix) {
                    Some(range) => NotAnnounced::BlocksUsed { prefix, range: range.range() },
                    None => NotAnnounced::NotGranted { prefix },
                });
                continue;
            }
            let is_lan = self.is_lan(&prefix);
            // The record names a LAN twice.
            let bytes = network_bytes(&prefix) * if is_lan { 2 } else { 1 };
            if selection.announced.len() == limits::PREFIXES || bytes > room {
                selection.problems.push(NotAnnounced::TooMany { prefix });
                continue;
            }
            room -= bytes;
            selection.announced.push(prefix);
            if is_lan {
                selection.lans.push(prefix);
            }
        }
        selection
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use prost::Message as _;
    use towline_fixtures::node::{self, net, nets};
    use towline_proto::node::{Candidate, CandidateKind, Record};
    use towline_proto::pb;
    use towline_proto::pod_range::PodRange;

    use super::*;

    fn grant(allowed: &[&str]) -> Grant {
        Grant { allowed_prefixes: nets(allowed), ..node::grant(2) }
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
            refused: &[],
        };
        let selection = prefixes.select(filter, &grant(&["10.244.0.0/16", "fd00:10::/64"]));
        assert_eq!(selection.announced, ["10.244.0.0/24", "fd00:10::/64"].map(net));
        assert_eq!(selection.problems, []);
    }

    #[test]
    fn pods_are_what_kubernetes_names_and_what_is_announced() {
        let prefixes = prefixes(&[
            (PrefixSource::Configuration, &["10.1.0.0/24", "10.244.3.0/25"]),
            (PrefixSource::Kubernetes, &["10.244.3.0/24", "10.245.0.0/23", "10.9.0.0/24"]),
        ]);
        let filter = Filter { refused: &[net("10.245.1.0/24")], ..Filter::default() };
        let selection = prefixes.select(filter, &grant(&["10.1.0.0/24", "10.244.0.0/15"]));
        let pods = prefixes.pods(&selection);
        assert_eq!(pods, ["10.244.3.0/24", "10.245.0.0/24"].map(net));
        assert_eq!(selection.lans, [net("10.1.0.0/24")], "the others are pods");
    }

    #[test]
    fn a_node_ip_in_an_announced_lan_is_announced_with_it() {
        let prefixes = prefixes(&[
            (PrefixSource::Configuration, &["192.168.1.0/24"]),
            (PrefixSource::NodeIp, &["192.168.1.10/32", "192.0.2.5/32"]),
        ]);
        let selection = prefixes.select(Filter::default(), &grant(&["192.168.0.0/16"]));
        assert_eq!(selection.announced, [net("192.168.1.0/24")]);
        assert!(selection.contains("192.168.1.10".parse().unwrap()));
        assert!(!selection.contains("192.0.2.5".parse().unwrap()), "it is not granted");
    }

    #[test]
    fn of_a_pod_range_as_many_blocks_are_announced_as_the_grant_allows() {
        let range = PodRange::new(net("10.244.0.0/16"), 24, 1, vec![net("10.244.9.0/24")]).unwrap();
        let grant = Grant { pod_ranges: vec![range], ..grant(&["10.244.9.0/24"]) };
        let select = |pods: &[&str]| {
            prefixes(&[(PrefixSource::Kubernetes, pods)]).select(Filter::default(), &grant)
        };
        // The pinned block that is not announced any more makes room.
        assert_eq!(select(&["10.244.3.0/24"]).announced, [net("10.244.3.0/24")]);
        let both = select(&["10.244.3.0/24", "10.244.9.0/24"]);
        assert_eq!(both.announced, [net("10.244.9.0/24")], "the pinned one stays");
        let (prefix, range) = (net("10.244.3.0/24"), net("10.244.0.0/16"));
        assert_eq!(both.problems, [NotAnnounced::BlocksUsed { prefix, range }]);
        let wide = select(&["10.244.2.0/23"]).problems;
        assert_eq!(wide, [NotAnnounced::NotGranted { prefix: net("10.244.2.0/23") }]);
    }

    /// Returns the length of the longest record of a node that announces a selection.
    fn longest_record(selection: &Selection) -> usize {
        let grant = node::grant(2);
        let ip: IpAddr = "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap();
        let candidate = Candidate::new(CandidateKind::Relayed, (ip, u16::MAX).into()).unwrap();
        let record = Record {
            generation: limits::GENERATION,
            boot_epoch: u64::MAX,
            candidates: vec![candidate; limits::CANDIDATES],
            prefixes: selection.announced.clone(),
            lans: selection.lans.clone(),
            version: "v".repeat(limits::VERSION_BYTES),
            relay: true,
            api_port: NonZeroU16::new(u16::MAX),
            ..node::record(&grant)
        };
        pb::Record::from(&record).encoded_len()
    }

    #[test]
    fn the_longest_record_of_a_node_is_within_the_bound() {
        let configured = |nets: Vec<String>| {
            let prefixes = nets.iter().map(|text| net(text)).collect();
            let mut all = Prefixes::default();
            all.set(PrefixUpdate { source: PrefixSource::Configuration, prefixes });
            all.select(Filter::default(), &grant(&["0.0.0.0/0", "2001:db8::/32"]))
        };
        // As many as the configuration may have, all of them networks of machines.
        let v4 = configured((0..256).map(|number| format!("10.1.{number}.0/24")).collect());
        assert_eq!((v4.announced.len(), v4.lans.len(), v4.problems.len()), (256, 256, 0));
        assert!(longest_record(&v4) <= limits::RECORD_BYTES);
        let v6 = configured((0..256).map(|number| format!("2001:db8:{number:x}::/48")).collect());
        assert_eq!(v6.lans, v6.announced);
        assert!(v6.announced.len() >= 160, "{}", v6.announced.len());
        assert_eq!(v6.announced.len() + v6.problems.len(), 256, "the others are reported");
        assert!(v6.problems.iter().all(|one| matches!(one, NotAnnounced::TooMany { .. })));
        let hosts =
            configured((0..256).map(|number| format!("2001:db8::{number:x}/128")).collect());
        for selection in [&v6, &hosts] {
            let length = longest_record(selection);
            assert!(length <= limits::RECORD_BYTES, "{length}");
            let networks = selection.announced.iter().chain(&selection.lans);
            let networks: usize = networks.map(network_bytes).sum();
            assert!(networks <= limits::RECORD_NETWORK_BYTES, "{networks}");
            assert_eq!(length, longest_record(&Selection::default()) + networks);
        }
        // Networks of pods are named once.
        let mut pods = Prefixes::default();
        let prefixes = (0..256).map(|number| net(&format!("2001:db8:{number:x}::/48"))).collect();
        pods.set(PrefixUpdate { source: PrefixSource::Kubernetes, prefixes });
        let pods = pods.select(Filter::default(), &grant(&["2001:db8::/32"]));
        assert_eq!((pods.announced.len(), pods.lans.len()), (256, 0));
        assert!(longest_record(&pods) <= limits::RECORD_BYTES);
    }

    #[test]
    fn what_is_not_granted_is_said_and_not_announced() {
        let prefixes = prefixes(&[(PrefixSource::Configuration, &["10.1.0.0/24", "10.2.0.0/24"])]);
        let selection = prefixes.select(Filter::default(), &grant(&["10.1.0.0/16"]));
        assert_eq!(selection.announced, [net("10.1.0.0/24")]);
        assert_eq!(selection.problems.len(), 1);
        let problem = selection.problems[0].to_string();
        assert!(problem.contains("--prefix 10.2.0.0/24"), "{problem}");
    }
}
