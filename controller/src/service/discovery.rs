//! RPCs for agents: hello, join, renew, publish, watch and leave.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use towline_proto::code::Coded as _;
use towline_proto::convert::{self, Invalid};
use towline_proto::id::{NodeId, NodeName, TokenId, WireguardKey};
use towline_proto::join_proof::{self, Claim};
use towline_proto::pb::discovery_server::Discovery;
use towline_proto::refusal::with_retry_after;
use towline_proto::token::TokenSecret;
use towline_proto::{limits, pb, signed};
use towline_service::grpc;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::authority::{Subject, csr_key};
use crate::clock;
use crate::counters::Limit;
use crate::entropy::{random, secret_hash};
use crate::events::MeshEvent;
use crate::ledger::Ledger;
use crate::map::AccessError;
use towline_registry::sessions::{Occupied, Session, Sessions};
use towline_registry::token::SecretHash;
use towline_registry::{Join, JoinError, PublishError, ReadmitError};

use super::auth::Caller;
use super::budgets::Work;
use super::refusal::{Refusal as _, absent, no_access};
use super::watch::{self, Watcher};
use super::{Shared, missing};

/// Timeout of the first message of a watch.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// Implementation of the service `towline.v1.Discovery`.
pub struct DiscoveryService {
    shared: Arc<Shared>,
}

impl DiscoveryService {
    /// Creates the service on the shared state.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Reads what other controllers wrote if this one does not know a token, which one of them may have created a moment
    /// ago. A source that had many failed joins cannot cause that.
    async fn catch_up(&self, token: TokenId, secret_hash: &SecretHash, source: SocketAddr) {
        let now = clock::now();
        let is_known = || match self.shared.view.check_secret(token, secret_hash, now.unix) {
            Err(JoinError::TokenUnknown(_)) => false,
            Err(_) | Ok(_) => true,
        };
        if !self.shared.writer.is_shared() || is_known() {
            return;
        }
        if self.shared.failed_joins.lock().wait(source.ip(), now.mono).is_zero() {
            // If it cannot be read, the token stays unknown.
            let _ = self.shared.writer.refresh().await;
        }
    }

    /// Refuses a join whose token or secret is wrong, before anything of it costs time. If the source had many
    /// failed joins, it has to wait, unless it has the secret of a token that admits another node: a machine is
    /// never refused for what its neighbours behind a NAT do.
    fn check_secret(
        &self,
        join: &WireJoin,
        secret_hash: &SecretHash,
        source: SocketAddr,
    ) -> Result<(), Status> {
        let now = clock::now();
        let checked = self.shared.view.check_secret(join.token, secret_hash, now.unix);
        if checked == Ok(true) {
            return Ok(());
        }
        let wait = self.shared.failed_joins.lock().wait(source.ip(), now.mono);
        if !wait.is_zero() {
            self.shared.counters.limit(Limit::FailedJoins);
            let seconds = wait.as_secs() + 1;
            let text = format!("too many failed joins from {}: wait {seconds} s", source.ip());
            return Err(with_retry_after(Status::resource_exhausted(text), wait));
        }
        checked.map(drop).map_err(|error| {
            self.note_failure(join.token, source, &error);
            error.status()
        })
    }

    /// Counts a failed join of a source, and logs it unless the source had many.
    fn note_failure(&self, token: TokenId, source: SocketAddr, reason: &dyn std::fmt::Display) {
        let now = clock::now().mono;
        let mut failed_joins = self.shared.failed_joins.lock();
        if failed_joins.wait(source.ip(), now).is_zero() {
            tracing::info!(%source, %token, %reason, "join refused");
        } else {
            tracing::debug!(%source, %token, %reason, "join refused");
        }
        failed_joins.charge(source.ip(), now);
    }

    async fn admit(
        &self,
        join: WireJoin,
        secret_hash: SecretHash,
        source: SocketAddr,
    ) -> Result<pb::JoinResponse, Status> {
        let shared = &self.shared;
        if join.proof_key != *shared.proof_public.as_bytes() {
            return Err(Status::unavailable(
                "the controller restarted during the join: call Hello again, then Join",
            ));
        }
        let (identity_key, public) = csr_key(&join.csr).map_err(|error| {
            self.note_failure(join.token, source, &error);
            error.status()
        })?;
        if !join.holds_wireguard_key(&shared.proof_key) {
            let reason =
                "the proof of the WireGuard key is invalid: use the private key of that public key";
            self.note_failure(join.token, source, &reason);
            return Err(Status::invalid_argument(reason));
        }
        let node_id = NodeId(random().map_err(|error| error.status())?);
        let WireJoin { token, name, wireguard_key, .. } = join;
        let request = Join { token, secret_hash, name, identity_key, wireguard_key, node_id };
        let change = move |ledger: &mut Ledger, sessions: &Sessions, now| {
            ledger.registry().join(&request, sessions, now)
        };
        let node = shared.apply(change).await?.map_err(|error| {
            self.note_failure(token, source, &error);
            error.status()
        })?;
        let grant = shared.map.grant(node).map_err(|error| absent(&error, &shared.map))?;
        let chain = self.certificates(node, &public)?;
        Ok(pb::JoinResponse {
            grant: Some(grant),
            mesh: Some(shared.map.mesh()),
            certificate_chain: chain,
        })
    }

    fn certificates(
        &self,
        node: NodeId,
        key: &impl rcgen::PublicKeyData,
    ) -> Result<Vec<Vec<u8>>, Status> {
        let authority = &self.shared.authority;
        let leaf = authority
            .issue(Subject::Node(node), key, clock::now().unix)
            .map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(vec![leaf.to_vec(), authority.certificate().to_vec()])
    }
}

#[tonic::async_trait]
impl Discovery for DiscoveryService {
    async fn hello(
        &self,
        _: Request<pb::HelloRequest>,
    ) -> Result<Response<pb::HelloResponse>, Status> {
        Ok(Response::new(pb::HelloResponse {
            mesh_id: self.shared.authority.mesh_id().0.to_vec(),
            server_time_ms: clock::unix_millis(),
            proof_key: self.shared.proof_public.as_bytes().to_vec(),
            version: towline_proto::VERSION.to_owned(),
        }))
    }

    async fn join(
        &self,
        request: Request<pb::JoinRequest>,
    ) -> Result<Response<pb::JoinResponse>, Status> {
        let source = Caller::of(&request)?.address()?;
        let join = WireJoin::parse(request.into_inner()).map_err(|error| error.status())?;
        let secret_hash = secret_hash(&join.secret);
        self.catch_up(join.token, &secret_hash, source).await;
        self.check_secret(&join, &secret_hash, source)?;
        Ok(Response::new(self.admit(join, secret_hash, source).await?))
    }

    async fn renew(
        &self,
        request: Request<pb::RenewRequest>,
    ) -> Result<Response<pb::RenewResponse>, Status> {
        let (node, _) = Caller::node(&request)?;
        self.shared.require_news()?;
        self.shared.spend(&node, Work::Renew)?;
        let (key, public) = csr_key(&request.get_ref().csr).map_err(|error| error.status())?;
        if key != node.identity {
            let error = AccessError::Key { node: node.id };
            return Err(no_access(&error, &self.shared.map));
        }
        let member = self.shared.map.member(node.id, &node.identity);
        let (_, grant) = member.map_err(|error| no_access(&error, &self.shared.map))?;
        Ok(Response::new(pb::RenewResponse {
            certificate_chain: self.certificates(node.id, &public)?,
            grant: Some(grant),
        }))
    }

    async fn readmit(
        &self,
        request: Request<pb::ReadmitRequest>,
    ) -> Result<Response<pb::ReadmitResponse>, Status> {
        let (id, identity) = Caller::certified(&request)?;
        self.shared.spend_of(id, &id, Work::Readmit)?;
        let pb::ReadmitRequest { grant, mesh, tombstones } = request.into_inner();
        let key = self.shared.authority.public_key();
        let untrusted = |error: signed::Untrusted| Status::invalid_argument(error.to_string());
        let grant = signed::grant(grant.as_ref(), key).map_err(untrusted)?;
        if (grant.node_id, grant.identity_key) != (id, identity) {
            return Err(Status::permission_denied(
                "the grant is of another node than the certificate",
            ));
        }
        let mesh = match mesh {
            Some(mesh) => Some(signed::mesh(Some(&mesh), key).map_err(untrusted)?),
            None => None,
        };
        watch::resync(&self.shared, tombstones, None).await?;
        let change = move |ledger: &mut Ledger, _: &Sessions, now| {
            if let Some(mesh) = mesh {
                ledger.registry().adopt_mesh(mesh);
            }
            ledger.registry().readmit(grant, now)
        };
        self.shared.apply(change).await?.map_err(|error| match error {
            ReadmitError::Absent(error) => absent(&error, &self.shared.map),
            other => other.status(),
        })?;
        Ok(Response::new(pb::ReadmitResponse {}))
    }

    async fn publish(
        &self,
        request: Request<pb::PublishRequest>,
    ) -> Result<Response<pb::PublishResponse>, Status> {
        let (node, _) = Caller::node(&request)?;
        self.shared.spend(&node, Work::Publish)?;
        let request = request.into_inner();
        let session = request.session_id.as_slice().try_into().map_err(|_| missing("session"))?;
        let length = request.record.as_ref().map_or(0, |record| record.body.len());
        convert::bounded("record", length, limits::RECORD_BYTES).map_err(|error| error.status())?;
        let record = signed::record(request.record.as_ref(), &node.identity)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let signed = request.record.ok_or_else(|| missing("record"))?;
        let change = move |ledger: &mut Ledger, sessions: &Sessions, now| {
            ledger.publish(node.id, &session, (record, signed), sessions, now)
        };
        let published = self.shared.apply(change).await?.map_err(|error| match error {
            PublishError::Absent(error) => absent(&error, &self.shared.map),
            other => other.status(),
        })?;
        let refused = published.withheld.into_iter().map(|withheld| pb::RefusedPrefix {
            prefix: Some((&withheld.prefix).into()),
            reason: withheld.reason.to_string(),
        });
        Ok(Response::new(pb::PublishResponse {
            revision: published.revision,
            refused: refused.collect(),
        }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (node, address) = Caller::node(&request)?;
        self.shared.send_away(node.id)?;
        self.shared.spend(&node, Work::Watch)?;
        let mut requests = request.into_inner();
        let first = tokio::time::timeout(FIRST_WORD, requests.message()).await;
        let first = first
            .map_err(|_| Status::deadline_exceeded("no start message: send WatchStart first"))??;
        let Some(pb::watch_request::Kind::Start(start)) = first.and_then(|first| first.kind) else {
            return Err(missing("start of the watch"));
        };
        if start.instance_id.is_empty() {
            return Err(missing("instance_id"));
        }
        convert::bounded("instance_id", start.instance_id.len(), 64)
            .map_err(|error| error.status())?;
        watch::prove(&self.shared, start.head.as_ref()).await?;
        let cursor = Watcher::cursor(&self.shared.map, (start.epoch, start.revision));
        let mut loading = None;
        if cursor.revision == 0 {
            // A node that waited in vain keeps its budget.
            let place = self.shared.admission.place().await;
            loading = Some(place.inspect_err(|_| self.shared.counters.limit(Limit::Loading))?);
            self.shared.spend(&node, Work::Snapshot)?;
        }
        watch::resync(&self.shared, start.tombstones, start.mesh).await?;

        let id = random().map_err(|error| error.status())?;
        let now = clock::now();
        let session = Session::new(id, start.instance_id, address, now);
        let opened = self.shared.sessions.lock().open(node.id, session, now);
        if let Err(Occupied { address: other, is_alive }) = opened {
            if !is_alive {
                // A machine that was restarted answers this with a reset of the old connection.
                self.shared.signals.probe(node.id);
                return Err(Status::already_exists(format!(
                    "node `{}` is still connected from {other}: wait until that connection has ended",
                    node.name
                )));
            }
            let code = watch::note_clone(&self.shared, node.id, address, other).await;
            let status = Status::already_exists(format!(
                "node `{}` is already connected from {other}: this machine may be a clone: stop one \
                 of them, remove its state directory and join it again",
                node.name
            ));
            return Err(grpc::with_code(status, code));
        }
        let connected = MeshEvent::NodeConnected { node: node.name.clone(), address };
        tracing::info!(event = connected.code(), node = %node.name, %address, "session opened");
        self.shared.events.add(&connected);
        let (responses, receiver) = tokio::sync::mpsc::channel(1);
        let watcher = Watcher::new(self.shared.clone(), node, id, cursor, loading, responses);
        tokio::spawn(watcher.run(requests));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn leave(
        &self,
        request: Request<pb::LeaveRequest>,
    ) -> Result<Response<pb::LeaveResponse>, Status> {
        let (node, _) = Caller::node(&request)?;
        let tombstone = self.shared.remove(node.id, "left the mesh").await?;
        Ok(Response::new(pb::LeaveResponse { tombstone: Some(tombstone) }))
    }
}

/// A parsed [`pb::JoinRequest`].
pub(crate) struct WireJoin {
    token: TokenId,
    secret: TokenSecret,
    name: NodeName,
    pub(crate) csr: Vec<u8>,
    wireguard_key: WireguardKey,
    proof: Vec<u8>,
    proof_key: [u8; 32],
}

impl WireJoin {
    pub(crate) fn parse(join: pb::JoinRequest) -> Result<Self, Invalid> {
        let secret: [u8; 32] =
            join.token_secret.try_into().map_err(|_| Invalid::Malformed("token"))?;
        convert::bounded("certificate signing request", join.csr.len(), limits::CSR_BYTES)?;
        Ok(Self {
            token: TokenId::try_from(join.token_id.as_slice())?,
            secret: TokenSecret(secret),
            name: NodeName::try_from(join.name)?,
            csr: join.csr,
            wireguard_key: WireguardKey::try_from(join.wireguard_key.as_slice())?,
            proof: join.wireguard_proof,
            proof_key: join.proof_key.try_into().map_err(|_| Invalid::Malformed("proof_key"))?,
        })
    }

    pub(crate) fn holds_wireguard_key(&self, proof_key: &StaticSecret) -> bool {
        let shared = proof_key.diffie_hellman(&PublicKey::from(self.wireguard_key.0));
        let claim = Claim { token: self.token, wireguard_key: &self.wireguard_key, csr: &self.csr };
        // With a key of small order the shared secret is known to everyone, so it proves nothing.
        shared.was_contributory() && join_proof::verify(shared.as_bytes(), claim, &self.proof)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;
    use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
    use tonic::Code;
    use towline_proto::id::IdentityKey;

    use super::watch::tests::{NODE, shared};
    use super::*;
    use crate::service::auth::{CallerIdentity, CallingNode};

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(join) = pb::JoinRequest::decode(bytes.as_slice())
                && let Ok(join) = WireJoin::parse(join)
            {
                let _ = csr_key(&join.csr);
                join.holds_wireguard_key(&StaticSecret::from([1; 32]));
            }
            let _ = csr_key(&bytes);
            let _ = pb::WatchRequest::decode(bytes.as_slice());
            if let Ok(summary) = pb::MeshSummary::decode(bytes.as_slice()) {
                let _ = towline_proto::summary::MeshSummary::try_from(summary);
            }
            if let Ok(readmit) = pb::ReadmitRequest::decode(bytes.as_slice()) {
                let _ = signed::grant(readmit.grant.as_ref(), &IdentityKey([1; 32]));
                let _ = signed::mesh(readmit.mesh.as_ref(), &IdentityKey([1; 32]));
            }
            if let Ok(publish) = pb::PublishRequest::decode(bytes.as_slice()) {
                let _ = signed::record(publish.record.as_ref(), &IdentityKey([1; 32]));
            }
        }
    }

    #[tokio::test]
    async fn a_controller_that_is_cut_off_renews_no_certificate() {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let csr = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        let (identity, _) = csr_key(&csr).unwrap();
        let (shared, _stop, isolate) = shared(identity);
        let service = DiscoveryService::new(Arc::new(shared));
        let renew = async || {
            let name = "a".parse().unwrap();
            let node = CallingNode { id: NODE, name, identity, expires_at: i64::MAX };
            let address = Some(SocketAddr::from(([192, 0, 2, 1], 1000)));
            let mut request = Request::new(pb::RenewRequest { csr: csr.clone() });
            request
                .extensions_mut()
                .insert(Caller { address, identity: CallerIdentity::Node(node) });
            service.renew(request).await
        };
        assert!(renew().await.is_ok());
        isolate.send(Some(Duration::from_secs(60))).unwrap();
        // Refusals spend nothing of the node's budget.
        for _ in 0..100 {
            let status = renew().await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            assert!(status.message().contains("use another one"), "{status}");
        }
        isolate.send(None).unwrap();
        assert!(renew().await.is_ok());
    }

    #[test]
    fn a_key_of_small_order_proves_nothing() {
        let claim =
            Claim { token: TokenId([1; 8]), wireguard_key: &WireguardKey([0; 32]), csr: b"" };
        let join = WireJoin {
            token: claim.token,
            secret: TokenSecret([0; 32]),
            name: "n".parse().unwrap(),
            csr: Vec::new(),
            wireguard_key: WireguardKey([0; 32]),
            proof: join_proof::prove(&[0; 32], claim),
            proof_key: [0; 32],
        };
        assert!(!join.holds_wireguard_key(&StaticSecret::from([1; 32])));
    }
}
