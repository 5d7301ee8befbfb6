//! API servers of the control-plane nodes, as the mesh knows them, for the endpoint on this machine.

use std::net::SocketAddr;
use std::time::Duration;

use towline_core::mesh::{PeerState, PeerStatus};
use towline_proto::node::Grant;

use super::problem::Problem;
use super::{Daemon, Purpose};
use crate::api_endpoint::{ApiEndpoint, ApiServer};

impl Daemon {
    /// Starts the endpoint, if the configuration has an address for it. A relay has no link that leads to the
    /// servers.
    pub(super) fn start_api_endpoint(&mut self) -> Result<(), rustls::Error> {
        let address = self.config.kubernetes.api_endpoint;
        let Some(address) = address.filter(|_| self.purpose == Purpose::Node) else {
            return Ok(());
        };
        self.api_endpoint = Some(ApiEndpoint::start(address)?);
        self.api_servers_changed();
        Ok(())
    }

    /// Passes the API servers of the mesh on to the endpoint. They come from the map, so that those of the last
    /// run are there at the start.
    pub(super) fn api_servers_changed(&self) {
        let Some(endpoint) = &self.api_endpoint else { return };
        let mut servers: Vec<ApiServer> = self.mesh.api_servers().filter_map(of_peer).collect();
        servers.extend(self.own_api_server());
        endpoint.set_servers(servers);
    }

    /// Returns a problem if this machine announces an API server that no other node may use.
    pub(super) fn api_port_without_role(&self) -> Option<Problem> {
        let port = self.config.kubernetes.api_port?;
        let grant = self.mesh.grant()?;
        (!grant.control_plane).then_some(Problem::ApiPortWithoutRole { port })
    }

    /// Returns the API server of this machine, which is the nearest one.
    fn own_api_server(&self) -> Option<ApiServer> {
        let port = self.config.kubernetes.api_port?.get();
        let grant = self.mesh.grant().filter(|grant| grant.control_plane)?;
        let address = SocketAddr::new(grant.overlay.v4.into(), port);
        let rtt = Some(Duration::ZERO);
        Some(ApiServer { node: grant.name.clone(), address, rtt, is_up: true })
    }
}

/// Returns the API server of a peer, if the peer has one that others may use.
fn of_peer(peer: PeerStatus) -> Option<ApiServer> {
    let port = peer.node.api_port()?.get();
    let grant: &Grant = peer.node.grant();
    Some(ApiServer {
        node: grant.name.clone(),
        // Every node has both overlay addresses, and API servers listen on all of their addresses.
        address: SocketAddr::new(grant.overlay.v4.into(), port),
        rtt: peer.rtt,
        // Nothing is known of the path to an idle peer; the first packet opens it.
        is_up: matches!(peer.state, PeerState::Up | PeerState::Idle),
    })
}
