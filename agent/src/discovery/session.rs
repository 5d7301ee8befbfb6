//! A session with one controller: the streams of the watch, and what ends it.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Streaming;
use tonic::transport::Channel;
use towline_proto::id::NodeId;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::summary::MeshSummary;
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
    /// True once this session delivered everything that the controller had when it began.
    pub(super) is_synced: bool,
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

    pub(super) fn summary(&self, summary: &MeshSummary) -> Result<(), Ended> {
        self.send(pb::watch_request::Kind::Summary(summary.into()))
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;

    use bytes::{BufMut as _, Bytes, BytesMut};
    use http_body::Frame;
    use http_body_util::StreamBody;
    use prost::Message as _;
    use rcgen::CertificateSigningRequestParams;
    use tokio::sync::watch;
    use tokio::time::sleep;
    use tokio_stream::wrappers::ReceiverStream;
    use tonic::codec::Codec as _;
    use tonic::transport::Endpoint;
    use towline_fixtures::ca::Ca;
    use towline_fixtures::node::{grant, node_id};
    use towline_proto::node::Grant;

    use super::*;
    use crate::discovery::{Discovery, Setup};
    use crate::join;
    use crate::map_cache::MapCache;
    use crate::state::{Membership, StateDir};

    const HEARTBEAT: Duration = Duration::from_secs(15);
    const DAY: Duration = Duration::from_secs(86_400);

    /// A client in an open session, and the controller's end of its watch.
    struct Scene {
        discovery: Discovery,
        session: Session,
        controller: mpsc::Sender<Result<Frame<Bytes>, Infallible>>,
        /// What the client sends in its watch.
        requests: mpsc::Receiver<pb::WatchRequest>,
        events: mpsc::Receiver<crate::discovery::Event>,
        _configured: watch::Sender<Vec<ControllerAddress>>,
        _directory: tempfile::TempDir,
    }

    impl Scene {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let state = Arc::new(StateDir::open(directory.path()).unwrap());
            let keys = state.keys_or_generate().unwrap();
            let ca = Ca::new(1);
            let csr = keys.identity.signing_request().unwrap();
            let csr = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
            state.store_certificate(&[ca.issue("node", &csr.public_key, DAY)]).unwrap();
            let own = Grant {
                identity_key: keys.identity.public(),
                wireguard_keys: vec![keys.wireguard.public()],
                ..grant(1)
            };
            let address: ControllerAddress = "127.0.0.1:1".parse().unwrap();
            let membership =
                Membership::new(ca.certificate(), vec![address.clone()], ca.grant(&own), ca.mesh());
            let (sender, events) = mpsc::channel(64);
            let (configured, seen) = watch::channel(Vec::new());
            let setup = Setup {
                counters: state.counters().unwrap(),
                state,
                keys,
                membership: membership.unwrap(),
                configured: seen,
                mark: 0,
                map: MapCache::new(ca.public(), own.node_id),
            };
            let discovery = Discovery::new(setup, sender).unwrap();

            let (controller, responses) = mpsc::channel(8);
            let mut codec =
                tonic_prost::ProstCodec::<pb::WatchRequest, pb::WatchResponse>::default();
            let incoming = Streaming::new_request(
                codec.decoder(),
                StreamBody::new(ReceiverStream::new(responses)),
                None,
                None,
            );
            // No call is made in these tests.
            let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
            let (outgoing, requests) = mpsc::channel(64);
            let session = Session {
                address,
                client: join::client(channel.clone()),
                channel,
                requests: outgoing,
                incoming,
                id: vec![1; 16],
                reflectors: Vec::new(),
                local: SocketAddr::from(([127, 0, 0, 1], 1)),
                heartbeat: HEARTBEAT,
                published: false,
                published_at: None,
                retry_publish: None,
                is_synced: false,
                map_dirty: false,
                map_saved: Instant::now(),
            };
            Self {
                discovery,
                session,
                controller,
                requests,
                events,
                _configured: configured,
                _directory: directory,
            }
        }

        /// Follows the session until it ends. Returns the reason, and when it ended, in seconds.
        async fn end(&mut self) -> (String, u64) {
            let opened = Instant::now();
            let (_announced, mut announcements) = watch::channel(None);
            let (_commanding, mut commands) = mpsc::channel(1);
            let followed =
                self.discovery.follow(&mut self.session, &mut announcements, &mut commands).await;
            let reason = match followed {
                Ok(never) => match never {},
                Err(Ended::Stop) => "stopped".to_owned(),
                Err(Ended::Because(reason)) => reason.to_string(),
            };
            (reason, opened.elapsed().as_secs())
        }
    }

    fn heartbeat() -> Frame<Bytes> {
        frame(pb::watch_response::Kind::Heartbeat(pb::Heartbeat { revision: 1, head: None }))
    }

    /// Returns a message of the controller with the head of gRPC.
    fn frame(kind: pb::watch_response::Kind) -> Frame<Bytes> {
        let message = pb::WatchResponse { kind: Some(kind) }.encode_to_vec();
        let mut framed = BytesMut::new();
        framed.put_u8(0);
        framed.put_u32(u32::try_from(message.len()).unwrap());
        framed.put_slice(&message);
        Frame::data(framed.freeze())
    }

    #[tokio::test(start_paused = true)]
    async fn a_controller_that_sends_nothing_is_left_after_45_s_and_hears_the_client_until_then() {
        let mut scene = Scene::new();
        let (reason, seconds) = scene.end().await;
        assert!(reason.contains("missed its heartbeats"), "{reason}");
        assert_eq!(seconds, 45);
        let mut sent = 0;
        while scene.requests.try_recv().is_ok() {
            sent += 1;
        }
        assert!((3..=4).contains(&sent), "one in 15 s: {sent}");
    }

    #[tokio::test]
    async fn a_removal_is_added_to_the_journal_of_a_map_that_is_stored() {
        let discovery = &mut Scene::new().discovery;
        let ca = Ca::new(1);
        let stored =
            |discovery: &Discovery| std::fs::read(discovery.state.path().join("map.bin")).unwrap();
        assert!(discovery.learn_removal(ca.tombstone(3)).await.is_ok());
        let whole = stored(discovery);
        for number in [4, 5] {
            assert!(discovery.learn_removal(ca.tombstone(number)).await.is_ok());
            assert_eq!(stored(discovery), whole, "the whole map is not written again");
            let map = discovery.state.map(&discovery.membership).unwrap();
            assert!(map.is_removed(node_id(number)) && map.is_removed(node_id(3)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_heartbeat_of_the_controller_starts_the_time_again() {
        let mut scene = Scene::new();
        let controller = scene.controller.clone();
        tokio::spawn(async move {
            for _ in 0..4 {
                sleep(HEARTBEAT).await;
                controller.send(Ok(heartbeat())).await.unwrap();
            }
        });
        let (reason, seconds) = scene.end().await;
        assert!(reason.contains("missed its heartbeats"), "{reason}");
        assert_eq!(seconds, 60 + 45);
    }

    #[tokio::test(start_paused = true)]
    async fn a_map_is_synced_once_all_of_its_parts_arrived() {
        let mut scene = Scene::new();
        let changes = |synced| {
            let changes = pb::Changes { synced, ..pb::Changes::of([], 1) };
            frame(pb::watch_response::Kind::Changes(changes))
        };
        let messages = [changes(false), heartbeat(), changes(true), heartbeat(), changes(false)];
        for message in messages {
            scene.controller.send(Ok(message)).await.unwrap();
        }
        scene.end().await;
        let mut synced = Vec::new();
        while let Ok(event) = scene.events.try_recv() {
            if let crate::discovery::Event::Heard { is_synced, .. } = event {
                synced.push(is_synced);
            }
        }
        assert_eq!(synced, [false, false, true, true, true]);
    }
}
