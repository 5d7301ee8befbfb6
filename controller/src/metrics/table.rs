//! Table of the controller's metrics, from which `docs/metrics.md` is written.

towline_service::metrics! {
    /// Version of the controller.
    BUILD_INFO: Gauge "towline_controller_build_info" ["version"]
        "1, with the version of the controller as a label.";
    /// Time since the start.
    UPTIME: Gauge "towline_controller_uptime_seconds" []
        "Time since the controller started.";
    /// Nodes by state.
    NODES: Gauge "towline_controller_nodes" ["state"]
        "Nodes of the mesh by state: online (a session is live), offline.";
    /// Problems of nodes.
    NODE_PROBLEMS: Gauge "towline_controller_node_problems" ["code"]
        "Problems of all nodes by code, as `towline-controller node show` prints them.";
    /// Running watches.
    WATCHES: Gauge "towline_controller_watches" []
        "Watches of the map that are open.";
    /// Sessions that were opened or closed.
    SESSIONS: Counter "towline_controller_session_changes_total" []
        "Sessions of nodes that were opened, and those that were closed.";
    /// Revision of the map.
    REVISION: Gauge "towline_controller_map_revision" []
        "Newest revision of the map.";
    /// Epoch of the map.
    EPOCH: Gauge "towline_controller_map_epoch" []
        "Epoch of the map, which grows when the store is restored from a backup.";
    /// Join tokens by state.
    TOKENS: Gauge "towline_controller_tokens" ["state"]
        "Join tokens by state: usable, used, expired, revoked.";
    /// Connections by kind.
    CONNECTIONS: Gauge "towline_controller_connections" ["kind"]
        "Connections by kind: handshake, node, expired (renews its certificate), admin, stranger.";
    /// Refused calls by code.
    REFUSED_CALLS: Counter "towline_controller_refused_calls_total" ["code"]
        "Calls that were refused, by the gRPC code of the answer.";
    /// Calls that a limit refused.
    LIMITED_CALLS: Counter "towline_controller_limited_calls_total" ["limit"]
        "Calls that a limit refused, by the limit: what a node did too often (publish, watch, snapshot, renew, signal, summary, readmit), failed_joins, loading (too many nodes load the map), stopping.";
    /// Revisions by which the slowest watch is behind.
    WATCH_LAG: Gauge "towline_controller_watch_lag_revisions" []
        "Revisions by which the slowest watch is behind the newest one.";
    /// Watches that load the whole map.
    LOADING: Gauge "towline_controller_loading_watches" []
        "Watches that load the whole map now. Further ones wait once there are 256.";
    /// Messages of changes.
    FAN_OUTS: Counter "towline_controller_fan_outs_total" []
        "Messages of changes that were sent to watches that have the whole map.";
    /// Time until messages of changes were sent.
    FAN_OUT_TIME: Counter "towline_controller_fan_out_seconds_total" []
        "Time from the newest change in each message until it was sent, over all messages.";
    /// Bytes of changes that were encoded.
    ENCODED_BYTES: Counter "towline_controller_encoded_bytes_total" []
        "Bytes of changes of the map that were encoded. All watches share them, so they grow with changes, not with nodes.";
    /// Requests in the writer's queue.
    QUEUE: Gauge "towline_controller_queued_requests" []
        "Requests that wait for the thread that changes the mesh.";
    /// Limit of the writer's queue.
    QUEUE_LIMIT: Gauge "towline_controller_queued_requests_limit" []
        "Largest number of requests that can wait; further ones wait in their connections.";
    /// Commits of the store.
    COMMITS: Counter "towline_controller_commits_total" []
        "Transactions of the store that succeeded; several requests share one.";
    /// Failed commits of the store.
    FAILED_COMMITS: Counter "towline_controller_failed_commits_total" []
        "Transactions of the store that failed, for example because the disk is full.";
    /// Time of all commits.
    COMMIT_TIME: Counter "towline_controller_commit_seconds_total" []
        "Time that all transactions took, with the wait for the disk.";
    /// Age of what the controller has of a shared store.
    STORE_AGE: Gauge "towline_controller_store_age_seconds" []
        "Time since this controller last had all that is in a store that other controllers write, too; 0 if none does.";
}
