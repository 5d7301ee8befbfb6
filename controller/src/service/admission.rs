//! Admission of watches: how many nodes load the whole map at the same time, which nodes a controller that is cut off
//! sends to others, and how watches end when the controller stops.
//!
//! Resuming a watch costs little. Loading the whole map costs up to some megabytes of traffic, so nodes that come
//! all at once take turns. One that waited too long is refused and told when to come back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tonic::Status;
use towline_proto::id::NodeId;
use towline_proto::refusal::with_retry_after;

use crate::entropy;

/// Largest number of nodes that load the whole map at the same time.
const PLACES: usize = 256;
/// Longest wait for a place. A client waits 10 s for the first message of its watch.
const WAIT: Duration = Duration::from_secs(5);
/// Range of the pause that a refused node is told, in seconds. Its width spreads the nodes.
const PAUSE_S: (f64, f64) = (2.0, 10.0);

/// Places of nodes that load the whole map.
pub struct Admission {
    places: Arc<Semaphore>,
}

/// Place of a node that loads the whole map. It is free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Admission {
    /// Creates places that are all free.
    pub fn new() -> Self {
        Self::with(PLACES)
    }

    fn with(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)) }
    }

    /// Waits for a place.
    pub(super) async fn place(&self) -> Result<Place, Status> {
        match timeout(WAIT, self.places.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Place { _permit: permit }),
            Ok(Err(_)) | Err(_) => {
                let (least, most) = PAUSE_S;
                let pause = Duration::from_secs_f64(least + (most - least) * entropy::fraction());
                let seconds = pause.as_secs() + 1;
                let text =
                    format!("too many nodes load the map at the same time: wait {seconds} s");
                Err(with_retry_after(Status::unavailable(text), pause))
            }
        }
    }

    /// Returns the number of nodes that load the whole map.
    pub fn loading(&self) -> usize {
        PLACES.saturating_sub(self.places.available_permits())
    }
}

impl Default for Admission {
    fn default() -> Self {
        Self::new()
    }
}

/// Nodes that were sent to another controller since this one was cut off from its store, and did not come back.
#[derive(Debug, Default)]
pub struct SentAway(Mutex<BTreeSet<NodeId>>);

impl SentAway {
    /// Returns whether a node may open a watch. While this controller is cut off, it refuses the first attempt of a node,
    /// the third one and so on: another controller may know what changed. A node that comes back found no other one, and
    /// gets the map as it is here.
    pub(super) fn is_admitted(&self, node: NodeId, is_cut_off: bool) -> bool {
        let mut sent_away = self.0.lock();
        if !is_cut_off {
            sent_away.clear();
            return true;
        }
        let has_returned = sent_away.remove(&node);
        if !has_returned {
            sent_away.insert(node);
        }
        has_returned
    }
}

/// Waits until the controller stops, and returns the time over which watches end then.
pub async fn drain_begins(stopping: &mut watch::Receiver<Option<Duration>>) -> Duration {
    // Without a sender the controller is gone.
    let over = stopping.wait_for(Option::is_some).await;
    over.ok().and_then(|over| *over).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use towline_proto::refusal::retry_after;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nodes_take_turns_and_one_that_waited_too_long_is_told_when_to_come_back() {
        let admission = Arc::new(Admission::with(1));
        let first = admission.place().await.unwrap();
        let refused = admission.place().await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        let pause = retry_after(&refused).unwrap();
        assert!((2..=10).contains(&pause.as_secs()), "{pause:?}");

        let waiting = tokio::spawn({
            let admission = admission.clone();
            async move { admission.place().await.is_ok() }
        });
        tokio::task::yield_now().await;
        drop(first);
        assert!(waiting.await.unwrap());
    }

    #[test]
    fn a_node_is_sent_away_before_it_is_admitted_while_the_controller_is_cut_off() {
        let (sent_away, nodes) = (SentAway::default(), [1, 2].map(|id| NodeId([id; 16])));
        let admitted = |node: usize, is_cut_off| sent_away.is_admitted(nodes[node], is_cut_off);
        assert!(admitted(0, false));
        assert_eq!([0, 0, 0, 0].map(|node| admitted(node, true)), [false, true, false, true]);
        assert_eq!([0, 1].map(|node| admitted(node, true)), [false, false], "each for itself");
        assert!(admitted(0, false));
        assert!(!admitted(1, true), "another time begins");
    }

    #[tokio::test]
    async fn watches_learn_over_which_time_they_end() {
        let (stop, mut stopping) = watch::channel(None);
        stop.send(Some(Duration::from_secs(3))).unwrap();
        assert_eq!(drain_begins(&mut stopping).await, Duration::from_secs(3));
        let (gone, mut stopping) = watch::channel(None);
        drop(gone);
        assert_eq!(drain_begins(&mut stopping).await, Duration::ZERO);
    }
}
