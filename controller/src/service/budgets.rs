//! Budgets of each node: how often it may make the controller, and by it all other nodes, work.
//!
//! They are kept across connections and watches, so that connecting again earns nothing. A budget
//! belongs to an identity that has proved itself, so no stranger can spend it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use towline_proto::id::NodeId;
use towline_proto::limits;
use towline_proto::rate::{Rate, TokenBucket};

use crate::counters::Limit;

/// Work that a node asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    /// Storing a record and sending it to every node.
    Publish,
    /// Opening a watch.
    Watch,
    /// Sending the whole map, up to some megabytes.
    Snapshot,
    /// Issuing a certificate.
    Renew,
    /// Carrying a signal to another node.
    Signal,
    /// Keeping a summary for operators.
    Summary,
    /// Adding a node that the store does not have.
    Readmit,
}

impl Work {
    /// Returns the limit that refuses it, for the metrics.
    pub(super) const fn limit(self) -> Limit {
        match self {
            Self::Publish => Limit::Publish,
            Self::Watch => Limit::Watch,
            Self::Snapshot => Limit::Snapshot,
            Self::Renew => Limit::Renew,
            Self::Signal => Limit::Signal,
            Self::Summary => Limit::Summary,
            Self::Readmit => Limit::Readmit,
        }
    }

    /// Returns the rate at which a node may ask for it.
    const fn rate(self) -> Rate {
        match self {
            // A node with changing addresses publishes every two seconds.
            Self::Publish => Rate::per_second(1, 20),
            // An agent waits up to 15 s between attempts, after quick first ones.
            Self::Watch => Rate::one_per(Duration::from_secs(5), 12),
            Self::Snapshot => Rate::one_per(Duration::from_secs(20), 6),
            // A certificate lasts a day.
            Self::Renew => Rate::one_per(Duration::from_secs(60), 10),
            // Enough to reach thousands of nodes within a minute of the node's start.
            Self::Signal => Rate::per_second(50, 256),
            // An agent reports every 30 s at most, and soon after each connection.
            Self::Summary => Rate::one_per(Duration::from_secs(15), 6),
            // Once after the loss of the store. A refused node repeats it with each attempt to connect.
            Self::Readmit => Rate::one_per(Duration::from_secs(30), 6),
        }
    }
}

/// Budgets of the nodes.
#[derive(Debug, Default)]
pub struct Budgets(Mutex<BTreeMap<(NodeId, Work), TokenBucket>>);

/// Number of budgets at which unused ones are forgotten.
const KEPT: usize = 7 * limits::NODES;

impl Budgets {
    /// Spends one unit of work of a node.
    ///
    /// # Errors
    ///
    /// If the budget is used up: the time until it has a unit again.
    pub(super) fn spend(&self, node: NodeId, work: Work, now: Instant) -> Result<(), Duration> {
        let rate = work.rate();
        let mut budgets = self.0.lock();
        if budgets.len() >= KEPT {
            // A full bucket is as good as none. Nodes that were removed leave only full ones.
            budgets.retain(|_, bucket| !bucket.is_full(now));
        }
        let bucket = budgets.entry((node, work)).or_default();
        if bucket.take(&rate, now, 1) { Ok(()) } else { Err(bucket.wait(&rate, now, 1)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: [Work; 7] = [
        Work::Publish,
        Work::Watch,
        Work::Snapshot,
        Work::Renew,
        Work::Signal,
        Work::Summary,
        Work::Readmit,
    ];

    #[test]
    fn each_node_has_its_own_budget_of_each_work() {
        let (budgets, now) = (Budgets::default(), crate::clock::now().mono);
        for work in WORK {
            let spent = |node, at| budgets.spend(NodeId([node; 16]), work, at);
            let mut burst = 0;
            let wait = loop {
                match spent(1, now) {
                    Ok(()) => burst += 1,
                    Err(wait) => break wait,
                }
            };
            assert!((6..=256).contains(&burst), "{work:?}: {burst}");
            assert!(spent(1, now + wait).is_ok(), "{work:?}: the wait is the true one");
            assert!(spent(2, now).is_ok(), "{work:?}: another node is not affected");
        }
    }
}
