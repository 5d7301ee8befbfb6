//! Table of the agent's metrics, from which `docs/metrics.md` is written.

towline_service::metrics! {
    /// Version of the agent.
    BUILD_INFO: Gauge "towline_build_info" ["version"]
        "1, with the version of the agent as a label.";
    /// Time since the start.
    UPTIME: Gauge "towline_uptime_seconds" []
        "Time since the agent started, or since `towline up`.";
    /// Machine that was brought down.
    DOWN: Gauge "towline_machine_down" []
        "1 while `towline down` is in effect: no link, no guards.";
    /// Link, routes and guards.
    APPLIED: Gauge "towline_host_applied" []
        "1 while link, routes and guards are installed, so that the mesh may be used.";
    /// Expiry of the certificate.
    CERTIFICATE_EXPIRY: Gauge "towline_certificate_expiry_timestamp_seconds" []
        "End of the node's certificate, in seconds since 1970; the agent renews it in time.";
    /// Problems of `towline status`.
    PROBLEMS: Gauge "towline_problems" ["code"]
        "Problems that an operator should repair, by code (docs/troubleshooting.md).";
    /// Notes of `towline status`.
    NOTES: Gauge "towline_notes" ["code"]
        "Peculiarities of the machine that need no repair, by code.";
    /// Connection to Kubernetes.
    KUBERNETES_CONNECTED: Gauge "towline_kubernetes_connected" []
        "1 while the agent watches its Node object; absent on machines without Kubernetes.";
    /// Endpoint of the Kubernetes API.
    API_ENDPOINT_LISTENING: Gauge "towline_api_endpoint_listening" []
        "1 while the node-local endpoint of the Kubernetes API is served; absent without one.";
    /// Clients of the endpoint.
    API_ENDPOINT_CONNECTIONS: Gauge "towline_api_endpoint_connections" []
        "Clients of the endpoint of the Kubernetes API.";
    /// Clients that the endpoint closed.
    API_ENDPOINT_REFUSED: Counter "towline_api_endpoint_refused_clients_total" []
        "Clients that were closed: too many, or no API server took the connection.";
    /// API server of the next client.
    API_SERVER_CHOSEN: Gauge "towline_api_server_chosen" ["node"]
        "1 for the control-plane node whose API server the next client gets, else 0.";
    /// API server that fails.
    API_SERVER_FAILING: Gauge "towline_api_server_failing" ["node"]
        "1 while the last TLS handshake with the API server failed; checked while clients are connected.";
    /// Connection to a controller.
    CONTROLLER_CONNECTED: Gauge "towline_session_connected" []
        "1 while a session with a controller is open; tunnels keep working without one.";
    /// Silence of the controller.
    CONTROLLER_SILENCE: Gauge "towline_session_silence_seconds" []
        "Time since the last message of a controller; absent before the first.";
    /// Revision of the map.
    MAP_REVISION: Gauge "towline_map_revision" []
        "Revision of the map that this node has; the controller has towline_controller_map_revision.";
    /// Peers by state.
    PEERS: Gauge "towline_peers" ["state"]
        "Peers by state: up, connecting, down, idle (no traffic, so no path is tried).";
    /// Peers by kind of path.
    PEER_PATHS: Gauge "towline_peer_paths" ["kind"]
        "Peers by the kind of their path: direct, relay, static, none.";
    /// Received bytes of all peers.
    RECEIVED_BYTES: Counter "towline_received_bytes_total" []
        "Bytes of authentic UDP payload from all peers, counted at each scrape.";
    /// Sent bytes of all peers.
    SENT_BYTES: Counter "towline_sent_bytes_total" []
        "Bytes of UDP payload to all peers, counted at each scrape.";
    /// Peers without metrics of their own.
    PEERS_WITHOUT_SERIES: Gauge "towline_peers_without_series" []
        "Peers without metrics of their own: all of them if there are more than 256, else 0.";
    /// State of a peer.
    PEER_UP: Gauge "towline_peer_up" ["peer", "origin"]
        "1 while the peer is up; origin is mesh or configuration (a static peer).";
    /// Peer behind a relay.
    PEER_RELAYED: Gauge "towline_peer_relayed" ["peer", "origin"]
        "1 while the path to the peer leads through a relay.";
    /// Round-trip time to a peer.
    PEER_RTT: Gauge "towline_peer_rtt_seconds" ["peer", "origin"]
        "Smoothed round-trip time of the path; absent until it is measured.";
    /// MTU of a path.
    PEER_MTU: Gauge "towline_peer_mtu_bytes" ["peer", "origin"]
        "Largest inner packet that the path carries whole; absent until it is measured.";
    /// Age of the last handshake.
    PEER_HANDSHAKE_AGE: Gauge "towline_peer_handshake_age_seconds" ["peer", "origin"]
        "Time since the last handshake, about 2 minutes at most while there is traffic.";
    /// Received bytes of a peer.
    PEER_RECEIVED_BYTES: Counter "towline_peer_received_bytes_total" ["peer", "origin"]
        "Bytes of authentic UDP payload from the peer.";
    /// Sent bytes of a peer.
    PEER_SENT_BYTES: Counter "towline_peer_sent_bytes_total" ["peer", "origin"]
        "Bytes of UDP payload to the peer.";
    /// Dropped packets.
    DROPS: Counter "towline_dropped_packets_total" ["reason"]
        "Packets and messages that were dropped or refused, by reason.";
    /// Features of the data plane.
    FEATURE_ACTIVE: Gauge "towline_feature_active" ["feature"]
        "1 while an optional feature of the data plane is in use, such as an offload.";
    /// Nodes of the relay.
    RELAY_NODES: Gauge "towline_relay_nodes" []
        "Nodes that are registered at this relay; absent unless this node is one.";
    /// Channels of the relay.
    RELAY_CHANNELS: Gauge "towline_relay_channels" []
        "Pairs of nodes that have a channel through this relay.";
    /// Bytes of the relay.
    RELAY_BYTES: Counter "towline_relay_forwarded_bytes_total" []
        "Bytes that this relay forwarded between other nodes.";
}
