//! A session with one controller: the streams of the watch, and what ends it.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Streaming;
use tonic::transport::Channel;
use towline_proto::id::NodeId;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::token::ControllerAddress;
use towline_proto::{limits, pb};

use super::PUBLISH_INTERVAL;
use crate::dial;
use crate::not_connected::NotConnected;

/// Reason why a session ended. After all but `Stop`, another session is tried.
pub(super) enum Ended {
    /// The daemon dropped its channels, or this node has left.
    Stop,
    /// An error, or the controller refused a request.
    Because(NotConnected),
}

impl<T: Into<NotConnected>> From<T> for Ended {
    fn from(reason: T) -> Self {
        Self::Because(reason.into())
    }
}

/// One session with one controller.
pub(super) struct Session {
    pub(super) address: ControllerAddress,
    pub(super) client: DiscoveryClient<Channel>,
    pub(super) channel: Channel,
    pub(super) requests: mpsc::Sender<pb::WatchRequest>,
    pub(super) incoming: Streaming<pb::WatchResponse>,
    pub(super) id: Vec<u8>,
    pub(super) reflectors: Vec<SocketAddr>,
    /// Address of this machine that the connection is bound to.
    pub(super) local: SocketAddr,
    pub(super) heartbeat: Duration,
    pub(super) published: bool,
    /// Time at which this session's last record was accepted.
    pub(super) published_at: Option<Instant>,
    pub(super) retry_publish: Option<Instant>,
    pub(super) map_dirty: bool,
    pub(super) map_saved: Instant,
}

impl Session {
    /// Fails if this machine lost the address that the connection is bound to. The controller would
    /// notice before this machine does, which matters to the peers that it signals for.
    pub(super) fn has_address(&self) -> Result<(), Ended> {
        let address = self.local.ip().to_canonical();
        if dial::is_gone(address) {
            return Err(NotConnected::AddressGone(address).into());
        }
        Ok(())
    }

    /// Returns when the next record may be published; `None` if that is now.
    pub(super) fn publishable_at(&self) -> Option<Instant> {
        self.published_at.map(|at| at + PUBLISH_INTERVAL).filter(|at| *at > Instant::now())
    }

    pub(super) fn beat(&self, revision: u64) -> Result<(), Ended> {
        self.send(pb::watch_request::Kind::Heartbeat(pb::Heartbeat { revision, head: None }))
    }

    pub(super) fn signal(&self, to: NodeId, body: Vec<u8>) -> Result<(), Ended> {
        self.send(pb::watch_request::Kind::Signal(pb::Signal { node_id: to.0.to_vec(), body }))
    }

    /// Queues a message of the watch without waiting.
    pub(super) fn send(&self, kind: pb::watch_request::Kind) -> Result<(), Ended> {
        match self.requests.try_send(pb::WatchRequest { kind: Some(kind) }) {
            // A full channel means that the connection does not drain. The heartbeat deadline then
            // ends the session.
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(NotConnected::Broken.into()),
        }
    }
}

/// Returns the addresses of the STUN reflectors: the one at the controller's address, and a bounded
/// number of those that the controller lists.
pub(super) fn reflectors(remote: SocketAddr, ready: &pb::WatchReady) -> Vec<SocketAddr> {
    let port = u16::try_from(ready.reflector_port).unwrap_or(0);
    let here = (port != 0).then(|| SocketAddr::new(remote.ip().to_canonical(), port));
    let others = ready.reflectors.iter().filter_map(|address| address.parse().ok());
    let mut reflectors: Vec<SocketAddr> =
        here.into_iter().chain(others.take(limits::CONTROLLERS)).collect();
    reflectors.sort_unstable();
    reflectors.dedup();
    reflectors
}
