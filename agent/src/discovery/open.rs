//! Opening of a session: the connection, the renewal of the certificate, the start of the watch, and what a
//! controller is told that lost a part of its store.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::pb::watch_response::Kind;
use towline_proto::token::ControllerAddress;
use towline_proto::{pb, refusal};
use towline_service::certificate;

use super::session::{Ended, Session, reflectors};
use super::{Discovery, Event, renewal_due};
use crate::not_connected::NotConnected;
use crate::{dial, join, tls};

/// Maximum time for the controller's first message of a watch, and for its answer to `readmit`.
const READY: Duration = Duration::from_secs(10);

/// Requests and responses of a watch, and its first response.
type WatchStreams = (mpsc::Sender<pb::WatchRequest>, Streaming<pb::WatchResponse>, pb::WatchReady);

impl Discovery {
    /// Opens a session. A controller that does not know this node lost its store or restored an older backup: it
    /// first gets back the statements of the CA that this node has.
    pub(super) async fn open(&mut self, address: &ControllerAddress) -> Result<Session, Ended> {
        match self.try_open(address).await {
            Err(Ended::Because(NotConnected::Refused(status)))
                if refusal::is_of_unknown_node(&status) =>
            {
                self.readmit(address).await?;
                self.try_open(address).await
            }
            opened => opened,
        }
    }

    /// Returns this node's grant, the mesh's configuration and all tombstones to a controller that does not know this
    /// node.
    async fn readmit(&self, address: &ControllerAddress) -> Result<(), Ended> {
        let connection = self.dial(address).await?;
        let request = pb::ReadmitRequest {
            grant: Some(self.membership.signed_grant.clone()),
            mesh: Some(self.membership.signed_mesh.clone()),
            tombstones: self.map.tombstones(),
        };
        let mut client = join::client(connection.channel);
        timeout(READY, client.readmit(request)).await.map_err(|_| NotConnected::NoAnswer)??;
        tracing::warn!(controller = %address, "the controller did not know this node, and took it back");
        Ok(())
    }

    /// Renews the certificate. A controller that is cut off from its store refuses that: as long as the certificate is
    /// valid, the session goes on without.
    pub(super) async fn try_renew(&mut self, channel: Channel) -> Result<(), Ended> {
        match self.renew(channel).await {
            Err(Ended::Because(reason))
                if may_wait(&reason, &self.certificate, SystemTime::now()) =>
            {
                tracing::info!(%reason, "certificate not renewed yet");
                Ok(())
            }
            renewed => renewed,
        }
    }

    /// Dials, renews the certificate if that is due, and starts the watch.
    async fn try_open(&mut self, address: &ControllerAddress) -> Result<Session, Ended> {
        if renewal_due(&self.certificate, SystemTime::now()) {
            // The renewal has its own connection: an expired certificate is valid for the renewal
            // only.
            let connection = self.dial(address).await?;
            self.try_renew(connection.channel).await?;
        }
        let connection = self.dial(address).await?;
        let mut client = join::client(connection.channel.clone());
        // A controller has the tombstones of its own epoch. A client that has no map sends those that it got
        // otherwise.
        let mut tells = self.map.position().0 == 0;
        let (requests, incoming, ready) = loop {
            let opening = self.start_watch(&mut client, tells);
            let opened = timeout(READY, opening)
                .await
                .unwrap_or_else(|_| Err(NotConnected::NoAnswer.into()))?;
            if tells || opened.2.epoch == self.map.position().0 {
                break opened;
            }
            // Another epoch: the controller may lack what this node knows. The next watch replaces this one.
            tells = true;
        };
        self.take_ready(&ready).await?;
        self.certificate_event().await?;
        let reflectors = reflectors(connection.remote, &ready);
        Ok(Session {
            address: address.clone(),
            client,
            channel: connection.channel,
            requests,
            incoming,
            id: ready.session_id,
            reflectors,
            local: connection.local,
            heartbeat: Duration::from_millis(ready.heartbeat_ms.clamp(100, 60_000).into()),
            published: false,
            published_at: None,
            retry_publish: None,
            is_synced: false,
            map_dirty: false,
            map_saved: Instant::now(),
        })
    }

    /// Starts a watch, and returns its streams with the controller's first message. If `tells` is set, the
    /// controller gets the tombstones and the mesh's configuration that this node has.
    async fn start_watch(
        &self,
        client: &mut DiscoveryClient<Channel>,
        tells: bool,
    ) -> Result<WatchStreams, Ended> {
        let (requests, outgoing) = mpsc::channel(4);
        let (epoch, revision) = self.map.position();
        let start = pb::watch_request::Kind::Start(pb::WatchStart {
            epoch,
            revision,
            instance_id: self.instance.to_vec(),
            tombstones: if tells { self.map.tombstones() } else { Vec::new() },
            mesh: tells.then(|| self.membership.signed_mesh.clone()),
            head: self.map.head().cloned(),
        });
        // The channel is empty, so this does not block.
        let _ = requests.send(pb::WatchRequest { kind: Some(start) }).await;
        let mut incoming = client.watch(ReceiverStream::new(outgoing)).await?.into_inner();
        match incoming.message().await? {
            Some(pb::WatchResponse { kind: Some(Kind::Ready(ready)) }) => {
                Ok((requests, incoming, ready))
            }
            _ => Err(Ended::from(NotConnected::InvalidResponse("the watch did not start"))),
        }
    }

    async fn dial(&self, address: &ControllerAddress) -> Result<dial::Connection, Ended> {
        let client = Some((self.certificate.as_slice(), &self.keys.identity));
        let config = Arc::new(tls::member(&self.membership.ca, client)?);
        let mut configured = self.configured.clone();
        let connection = async {
            let remotes = dial::resolve(address).await?;
            // The guards have exceptions for addresses. If the name leads into the mesh and to another address
            // than before, the next attempt passes.
            if address.as_str().parse::<SocketAddr>().is_err() {
                let resolved =
                    Event::Resolved { address: address.clone(), remotes: remotes.clone() };
                self.events.send(resolved).await.map_err(|_| Ended::Stop)?;
            }
            Ok::<_, Ended>(dial::dial_any(remotes, address, config, self.mark).await?)
        };
        tokio::select! {
            connection = connection => connection,
            _ = configured.changed() => Err(NotConnected::OtherControllers.into()),
        }
    }
}

/// Returns whether a certificate that was not renewed for this reason is good enough for now.
fn may_wait(reason: &NotConnected, chain: &[CertificateDer<'_>], now: SystemTime) -> bool {
    let NotConnected::Refused(status) = reason else { return false };
    let Some((_, until)) = chain.first().and_then(|leaf| certificate::validity(leaf)) else {
        return false;
    };
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    status.code() == tonic::Code::Unavailable && u64::try_from(until).is_ok_and(|end| now < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_that_cannot_renew_is_used_while_the_certificate_is_valid() {
        let now = SystemTime::now();
        // Valid until the year 4096.
        let chain = [towline_fixtures::ca::Ca::new(1).certificate()];
        let cut_off = NotConnected::Refused(tonic::Status::unavailable("cut off"));
        assert!(may_wait(&cut_off, &chain, now));
        assert!(!may_wait(&cut_off, &chain, UNIX_EPOCH + Duration::from_secs(100_000_000_000)));
        assert!(!may_wait(&cut_off, &[], now));
        let removed = NotConnected::Refused(tonic::Status::permission_denied("removed"));
        assert!(!may_wait(&removed, &chain, now) && !may_wait(&NotConnected::Ended, &chain, now));
    }
}
