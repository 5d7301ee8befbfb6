//! What a refused call says to the program that called, in the metadata of its status. The status's message is for
//! the operator.

use std::time::Duration;

use tonic::Status;
use tonic::metadata::MetadataValue;

/// Key of the shortest time in milliseconds to wait before the call is repeated.
const RETRY_AFTER: &str = "towline-retry-after-ms";
/// Key of the reason that a client handles.
const REASON: &str = "towline-reason";
/// Reason of a node that the controller does not know.
const NODE_UNKNOWN: &str = "node-unknown";
/// Longest wait that a client takes from a controller.
const LONGEST: Duration = Duration::from_secs(120);

/// Returns the status with the shortest time to wait before the call is repeated.
#[must_use]
pub fn with_retry_after(mut status: Status, wait: Duration) -> Status {
    let milliseconds = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    status.metadata_mut().insert(RETRY_AFTER, MetadataValue::from(milliseconds));
    status
}

/// Returns the time in a status to wait before the call is repeated, at most two minutes; `None` if it says
/// nothing of it.
pub fn retry_after(status: &Status) -> Option<Duration> {
    let milliseconds = status.metadata().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_millis(milliseconds).min(LONGEST))
}

/// Returns the status with the reason that the controller does not know the node.
#[must_use]
pub fn of_unknown_node(mut status: Status) -> Status {
    status.metadata_mut().insert(REASON, MetadataValue::from_static(NODE_UNKNOWN));
    status
}

/// Returns whether a call was refused because the controller does not know the node.
pub fn is_of_unknown_node(status: &Status) -> bool {
    status.metadata().get(REASON).is_some_and(|reason| reason == NODE_UNKNOWN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_how_long_to_wait_and_a_client_waits_within_bounds() {
        let refused = || Status::unavailable("full");
        assert_eq!(retry_after(&refused()), None);
        let wait = Duration::from_millis(1_500);
        assert_eq!(retry_after(&with_retry_after(refused(), wait)), Some(wait));
        assert_eq!(retry_after(&with_retry_after(refused(), Duration::MAX)), Some(LONGEST));
        let mut nonsense = refused();
        nonsense.metadata_mut().insert(RETRY_AFTER, MetadataValue::from_static("soon"));
        assert_eq!(retry_after(&nonsense), None);
    }

    #[test]
    fn an_unknown_node_is_told_apart_from_other_refusals() {
        let refused = Status::permission_denied("who?");
        assert!(!is_of_unknown_node(&refused));
        assert!(is_of_unknown_node(&of_unknown_node(refused)));
    }
}
