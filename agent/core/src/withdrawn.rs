//! Networks that nodes announced last and that no node holds now. They stay guarded, so that traffic
//! for them does not leave in clear while their node changes what it announces.
//!
//! Invariants:
//!
//! - Of one node there are at most as many as [`Withdrawn::bound`] leaves, the newest ones.
//! - Those of a removed node are released [`RELEASE`] after its tombstone.
//! - None lies in a range that the mesh guards: that is never released.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towline_types::id::NodeId;
use towline_types::limits;
use towline_types::pod_range::PodRange;

/// Time from the tombstone of a node to the release of what it announced. Kubernetes removes the pods
/// of a node that is gone within 5 minutes, and connections to them end.
pub(crate) const RELEASE: Duration = Duration::from_secs(600);

/// Networks that were announced last and that no node holds now.
#[derive(Debug, Default)]
pub(crate) struct Withdrawn {
    nets: BTreeSet<IpNet>,
    /// Those of `nets` that the last holder called networks of machines rather than of pods.
    lans: BTreeSet<IpNet>,
    /// Last holder of each network, where it is known. An earlier version of the agent did not store it.
    owners: BTreeMap<IpNet, NodeId>,
    /// The networks of each owner, the oldest first.
    by_owner: BTreeMap<NodeId, VecDeque<IpNet>>,
    /// Times at which the networks of removed nodes are released.
    releases: BTreeMap<NodeId, Instant>,
}

impl Withdrawn {
    /// Adds a network as the newest one of its last holder.
    pub(crate) fn add(&mut self, net: IpNet, owner: Option<NodeId>, is_lan: bool) {
        let is_full = self.nets.len() - self.owners.len() >= limits::PREFIXES;
        if owner.is_none() && is_full && !self.nets.contains(&net) {
            return;
        }
        self.remove(&net);
        self.nets.insert(net);
        if is_lan {
            self.lans.insert(net);
        }
        if let Some(owner) = owner {
            self.owners.insert(net, owner);
            self.by_owner.entry(owner).or_default().push_back(net);
        }
    }

    /// Notes that a withdrawn network is one of machines.
    pub(crate) fn mark_lan(&mut self, net: IpNet) {
        if self.nets.contains(&net) {
            self.lans.insert(net);
        }
    }

    /// Removes a network. Returns false if there is none.
    pub(crate) fn remove(&mut self, net: &IpNet) -> bool {
        self.lans.remove(net);
        if let Some(owner) = self.owners.remove(net)
            && let Some(nets) = self.by_owner.get_mut(&owner)
        {
            nets.retain(|other| other != net);
            if nets.is_empty() {
                self.by_owner.remove(&owner);
                self.releases.remove(&owner);
            }
        }
        self.nets.remove(net)
    }

    /// Leaves at most `room` networks of a node. Blocks of one of its pod ranges become the whole range,
    /// in which there is nothing but pods; otherwise the oldest networks are released. Returns whether
    /// anything changed.
    pub(crate) fn bound(&mut self, owner: NodeId, room: usize, pod_ranges: &[PodRange]) -> bool {
        let mut is_changed = false;
        for range in pod_ranges {
            let of_owner = || self.by_owner.get(&owner).into_iter().flatten();
            if of_owner().count() <= room {
                return is_changed;
            }
            let is_inside = |net: &&IpNet| range.block_around(net).is_some();
            let blocks: Vec<IpNet> = of_owner().filter(is_inside).copied().collect();
            if blocks.len() > 1 {
                blocks.iter().for_each(|block| {
                    self.remove(block);
                });
                self.add(range.range(), Some(owner), false);
                is_changed = true;
            }
        }
        while let Some(nets) = self.by_owner.get(&owner).filter(|nets| nets.len() > room) {
            let Some(oldest) = nets.front().copied() else { break };
            is_changed |= self.remove(&oldest);
        }
        is_changed
    }

    /// Sets when the networks of a removed node are released. The first time stays.
    pub(crate) fn release_at(&mut self, owner: NodeId, at: Instant) {
        if self.by_owner.contains_key(&owner) {
            self.releases.entry(owner).or_insert(at);
        }
    }

    /// Returns the time of the next release.
    pub(crate) fn next_release(&self) -> Option<Instant> {
        self.releases.values().min().copied()
    }

    /// Releases what is due. Returns whether that was any network.
    pub(crate) fn release_due(&mut self, now: Instant) -> bool {
        let due: Vec<NodeId> =
            self.releases.iter().filter(|(_, at)| **at <= now).map(|(owner, _)| *owner).collect();
        for owner in &due {
            self.releases.remove(owner);
            self.bound(*owner, 0, &[]);
        }
        !due.is_empty()
    }

    /// Removes the networks for which `is_released` holds. The second argument is true for a network of
    /// machines. Returns whether there were any.
    pub(crate) fn prune(&mut self, is_released: impl Fn(&IpNet, bool) -> bool) -> bool {
        let is_released = |net: &&IpNet| is_released(net, self.lans.contains(net));
        let released: Vec<IpNet> = self.nets.iter().filter(is_released).copied().collect();
        released.iter().for_each(|net| {
            self.remove(net);
        });
        !released.is_empty()
    }

    /// Returns all networks.
    pub(crate) fn nets(&self) -> &BTreeSet<IpNet> {
        &self.nets
    }

    /// Returns those that the last holder called networks of machines.
    pub(crate) fn lans(&self) -> &BTreeSet<IpNet> {
        &self.lans
    }

    /// Returns the last holder of a network, if it is known.
    pub(crate) fn owner(&self, net: &IpNet) -> Option<NodeId> {
        self.owners.get(net).copied()
    }

    /// Returns the nodes that held a withdrawn network last.
    pub(crate) fn owners(&self) -> impl Iterator<Item = NodeId> {
        self.by_owner.keys().copied()
    }

    /// Returns the networks of each owner, the oldest first.
    pub(crate) fn by_owner(&self) -> impl Iterator<Item = (NodeId, Vec<IpNet>)> {
        self.by_owner.iter().map(|(owner, nets)| (*owner, nets.iter().copied().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId([1; 16]);
    const B: NodeId = NodeId([2; 16]);

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_oldest_networks_of_a_node_are_released_first_and_those_of_others_stay() {
        let mut withdrawn = Withdrawn::default();
        withdrawn.add(net("10.9.0.0/16"), Some(B), false);
        for text in ["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16", "10.1.0.0/16"] {
            withdrawn.add(net(text), Some(A), text == "10.3.0.0/16");
        }
        withdrawn.bound(A, 2, &[]);
        let left: Vec<&IpNet> = withdrawn.nets().iter().collect();
        assert_eq!(left, [&net("10.1.0.0/16"), &net("10.3.0.0/16"), &net("10.9.0.0/16")]);
        assert_eq!(*withdrawn.lans(), [net("10.3.0.0/16")].into());
        withdrawn.add(net("10.3.0.0/16"), Some(B), false);
        assert_eq!(withdrawn.owner(&net("10.3.0.0/16")), Some(B), "the last holder");
    }

    #[test]
    fn many_blocks_of_a_pod_range_become_the_range() {
        let range = PodRange::new(net("10.244.0.0/16"), 24, 1, Vec::new()).unwrap();
        let mut withdrawn = Withdrawn::default();
        for text in ["10.244.1.0/24", "172.20.0.0/16", "10.244.2.0/24", "10.244.3.0/24"] {
            withdrawn.add(net(text), Some(A), false);
        }
        withdrawn.bound(A, 2, &[range]);
        assert_eq!(*withdrawn.nets(), ["10.244.0.0/16", "172.20.0.0/16"].map(net).into());
    }

    #[test]
    #[allow(clippy::disallowed_methods)] // some instant to count from
    fn a_removed_nodes_networks_are_released_in_time() {
        let start = Instant::now();
        let mut withdrawn = Withdrawn::default();
        withdrawn.add(net("10.1.0.0/16"), Some(A), false);
        withdrawn.add(net("10.2.0.0/16"), None, false);
        withdrawn.release_at(A, start + RELEASE);
        withdrawn.release_at(A, start + 2 * RELEASE);
        withdrawn.release_at(B, start);
        assert_eq!(withdrawn.next_release(), Some(start + RELEASE));
        assert!(!withdrawn.release_due(start));
        assert!(withdrawn.release_due(start + RELEASE));
        assert_eq!(*withdrawn.nets(), [net("10.2.0.0/16")].into());
        assert_eq!(withdrawn.next_release(), None);
    }
}
