//! RPCs for operators: tokens, nodes, the mesh configuration, and the operators' own keys.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use tonic::{Request, Response, Status};
use towline_proto::convert::{self, Invalid};
use towline_proto::id::{IdentityKey, InvalidId, NodeName, TokenId};
use towline_proto::node::RelayRole;
use towline_proto::pb::admin_server::Admin;
use towline_proto::pod_range::PodRange;
use towline_proto::token::{JoinToken, TokenSecret};
use towline_proto::{limits, pb};
use towline_service::events::EventId;

use crate::authority::{Subject, csr_key};
use crate::clock;
use crate::entropy::{random, secret_hash};
use crate::ledger::Ledger;
use crate::peer;
use crate::stored::token_message;
use crate::view::NodeView;
use towline_registry::sessions::Sessions;
use towline_registry::token::{InvalidPattern, TokenTerms};
use towline_registry::{LOCAL_ADMIN, NoSuchNode, Now};

use super::refusal::Refusal as _;
use super::{Shared, missing};

/// Default lifetime of a token.
const TTL: Duration = Duration::from_secs(3600);

/// Largest number of items in a page.
const PAGE: usize = 512;

/// Implementation of the service `towline.v1.Admin`.
pub struct AdminService {
    shared: Arc<Shared>,
}

impl AdminService {
    /// Creates the service on the shared state.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_token(
        &self,
        request: Request<pb::CreateTokenRequest>,
    ) -> Result<Response<pb::CreateTokenResponse>, Status> {
        let request = request.into_inner();
        let controllers = self.shared.controllers();
        if controllers.is_empty() {
            return Err(Status::failed_precondition(
                "cannot create a token: no address of a controller is known: start the controller with --advertise HOST:PORT, or run `towline-controller mesh set --controllers HOST:PORT`",
            ));
        }
        let ttl = match request.ttl_seconds {
            0 => TTL,
            seconds => Duration::from_secs(seconds.into()),
        };
        if ttl > limits::TOKEN_TTL {
            return Err(Status::invalid_argument(format!(
                "the lifetime is too long: a token is valid for at most {} days: give a shorter --ttl",
                limits::TOKEN_TTL.as_secs() / 86_400
            )));
        }
        let terms = terms(request)?;
        let id = TokenId(random().map_err(|error| error.status())?);
        let secret = TokenSecret(random().map_err(|error| error.status())?);
        let hash = secret_hash(&secret);
        let change = move |ledger: &mut Ledger, _: &Sessions, now: Now| {
            let expires_at = now.plus(ttl).unix;
            ledger.registry().create_token(id, hash, terms, expires_at, now).map(token_message)
        };
        let info = self.shared.apply(change).await?.map_err(|error| error.status())?;
        let token = JoinToken { ca: self.shared.authority.fingerprint(), id, secret, controllers };
        Ok(Response::new(pb::CreateTokenResponse { token: token.encode(), info: Some(info) }))
    }

    async fn list_tokens(
        &self,
        request: Request<pb::ListTokensRequest>,
    ) -> Result<Response<pb::ListTokensResponse>, Status> {
        let after = request.into_inner().after;
        let after = if after.is_empty() { None } else { Some(token_id(&after)?) };
        let (tokens, more) = page(self.shared.view.tokens(after, PAGE + 1).into_iter());
        Ok(Response::new(pb::ListTokensResponse { tokens, more }))
    }

    async fn revoke_token(
        &self,
        request: Request<pb::RevokeTokenRequest>,
    ) -> Result<Response<pb::RevokeTokenResponse>, Status> {
        let id = token_id(&request.get_ref().id)?;
        let change = move |ledger: &mut Ledger, _: &Sessions, _| ledger.registry().revoke_token(id);
        self.shared.apply(change).await?.map_err(|error| error.status())?;
        Ok(Response::new(pb::RevokeTokenResponse {}))
    }

    async fn list_nodes(
        &self,
        request: Request<pb::ListNodesRequest>,
    ) -> Result<Response<pb::ListNodesResponse>, Status> {
        let request = request.into_inner();
        let optional = |name: String| match name {
            name if name.is_empty() => Ok(None),
            name => node_name(name).map(Some),
        };
        let (name, after) = (optional(request.name)?, optional(request.after)?);
        let nodes = match name {
            Some(name) => {
                vec![self.shared.view.node(&name).map_err(|error| error.status())?]
            }
            None => self.shared.view.nodes(after.as_ref(), PAGE + 1),
        };
        let now = clock::now();
        let infos: Vec<pb::NodeInfo> = {
            let sessions = self.shared.sessions.lock();
            nodes.iter().map(|node| node_info(node, &sessions, now)).collect()
        };
        let (nodes, more) = page(infos.into_iter());
        Ok(Response::new(pb::ListNodesResponse { nodes, more }))
    }

    async fn remove_node(
        &self,
        request: Request<pb::RemoveNodeRequest>,
    ) -> Result<Response<pb::RemoveNodeResponse>, Status> {
        let name = node_name(request.into_inner().name)?;
        let tombstone = self.shared.remove_by_name(name, "removed by an operator").await?;
        Ok(Response::new(pb::RemoveNodeResponse { tombstone: Some(tombstone) }))
    }

    async fn set_node(
        &self,
        request: Request<pb::SetNodeRequest>,
    ) -> Result<Response<pb::SetNodeResponse>, Status> {
        let request = request.into_inner();
        let name = node_name(request.name)?;
        let wanted = name.clone();
        let change = move |ledger: &mut Ledger, _: &Sessions, now: Now| {
            let registry = ledger.registry();
            let node = registry.by_name(&wanted)?;
            if let Some(may_relay) = request.relay {
                // This cannot fail: the node was just found.
                let _ = registry.set_relay(node, may_relay, now);
            }
            Ok::<_, NoSuchNode>(())
        };
        self.shared.apply(change).await?.map_err(|error| error.status())?;
        let node = self.shared.view.node(&name).map_err(|error| error.status())?;
        Ok(Response::new(pb::SetNodeResponse { grant: Some(node.grant.clone()) }))
    }

    async fn get_mesh(
        &self,
        _: Request<pb::GetMeshRequest>,
    ) -> Result<Response<pb::GetMeshResponse>, Status> {
        Ok(Response::new(pb::GetMeshResponse { mesh: Some(self.shared.map.mesh()) }))
    }

    async fn configure_mesh(
        &self,
        request: Request<pb::ConfigureMeshRequest>,
    ) -> Result<Response<pb::ConfigureMeshResponse>, Status> {
        let request = request.into_inner();
        let ranges = |list: Option<pb::PrefixList>| match list {
            Some(list) => {
                convert::prefixes(&list.prefixes).map(Some).map_err(|error| error.status())
            }
            None => Ok(None),
        };
        let protected = ranges(request.protected)?;
        let bypass_when_down = ranges(request.bypass_when_down)?;
        let trusted_sites = match request.trusted_sites {
            Some(list) => Some(convert::sites(list.sites).map_err(|error| error.status())?),
            None => None,
        };
        let controllers = match request.controllers {
            Some(list) if list.addresses.is_empty() => return Err(missing("controller")),
            Some(list) => {
                Some(convert::controllers(&list.addresses).map_err(|error| error.status())?)
            }
            None => None,
        };
        let change = move |ledger: &mut Ledger, _: &Sessions, _| {
            ledger.registry().configure(|mesh| {
                mesh.controllers = controllers.unwrap_or(std::mem::take(&mut mesh.controllers));
                mesh.protected = protected.unwrap_or(std::mem::take(&mut mesh.protected));
                mesh.trusted_sites =
                    trusted_sites.unwrap_or(std::mem::take(&mut mesh.trusted_sites));
                mesh.bypass_when_down =
                    bypass_when_down.unwrap_or(std::mem::take(&mut mesh.bypass_when_down));
            })
        };
        self.shared.apply(change).await?.map_err(|error| error.status())?;
        let mesh = self.shared.map.mesh();
        Ok(Response::new(pb::ConfigureMeshResponse { mesh: Some(mesh) }))
    }

    async fn list_tunnels(
        &self,
        request: Request<pb::ListTunnelsRequest>,
    ) -> Result<Response<pb::ListTunnelsResponse>, Status> {
        let after = match request.into_inner().after {
            name if name.is_empty() => None,
            name => Some(node_name(name)?),
        };
        let nodes = self.shared.reported().nodes(after.as_ref(), PAGE + 1, clock::now());
        let (nodes, more) = page(nodes.into_iter());
        Ok(Response::new(pb::ListTunnelsResponse { nodes, more }))
    }

    async fn list_events(
        &self,
        request: Request<pb::ListEventsRequest>,
    ) -> Result<Response<pb::ListEventsResponse>, Status> {
        let after = match request.get_ref().after.as_str() {
            "" => None,
            id => {
                let id = id.parse::<EventId>();
                Some(id.map_err(|error| Status::invalid_argument(error.to_string()))?)
            }
        };
        Ok(Response::new(pb::ListEventsResponse { events: self.shared.events.after(after) }))
    }

    type BackupStream = Pin<Box<dyn Stream<Item = Result<pb::BackupResponse, Status>> + Send>>;

    async fn backup(
        &self,
        _: Request<pb::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let records = self.shared.backup().await?;
        let messages = backup_messages(records).into_iter().map(Ok);
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn list_admins(
        &self,
        _: Request<pb::ListAdminsRequest>,
    ) -> Result<Response<pb::ListAdminsResponse>, Status> {
        let admins = self.shared.view.admins();
        let admins = admins.iter().map(|admin| admin_info(admin)).collect();
        Ok(Response::new(pb::ListAdminsResponse { admins }))
    }

    async fn create_admin(
        &self,
        request: Request<pb::CreateAdminRequest>,
    ) -> Result<Response<pb::CreateAdminResponse>, Status> {
        let request = request.into_inner();
        let name: NodeName =
            request.name.parse().map_err(|error: InvalidId| Invalid::from(error).status())?;
        if name.as_str() == LOCAL_ADMIN {
            return Err(Status::invalid_argument(format!(
                "the name `{LOCAL_ADMIN}` is that of the credential in the controller's state directory: use another one"
            )));
        }
        // A certificate gives no access before its key is listed.
        let (key, certificate) = {
            let (key, public) = csr_key(&request.csr).map_err(|error| error.status())?;
            let (subject, now) = (Subject::Admin(name.as_str()), clock::now().unix);
            let issued = self.shared.authority.issue(subject, &public, now);
            (key, issued.map_err(|error| Status::unavailable(error.to_string()))?)
        };
        let change = move |ledger: &mut Ledger, _: &Sessions, now: Now| {
            ledger.registry().create_admin(key, name.as_str(), now)
        };
        self.shared.apply(change).await?.map_err(|error| error.status())?;
        let expires_at = peer::expires_at(&certificate).unwrap_or_default();
        let certificate = certificate.to_vec();
        Ok(Response::new(pb::CreateAdminResponse { certificate, expires_at }))
    }

    async fn revoke_admin(
        &self,
        request: Request<pb::RevokeAdminRequest>,
    ) -> Result<Response<pb::RevokeAdminResponse>, Status> {
        let key = IdentityKey::try_from(request.get_ref().key.as_slice())
            .map_err(|error| Invalid::from(error).status())?;
        let change = move |ledger: &mut Ledger, _: &Sessions, now: Now| {
            ledger.registry().revoke_admin(key, now)
        };
        self.shared.apply(change).await?.map_err(|error| error.status())?;
        self.shared.admin_revoked.notify_one();
        Ok(Response::new(pb::RevokeAdminResponse {}))
    }
}

fn admin_info(admin: &towline_registry::Admin) -> pb::AdminInfo {
    let towline_registry::Admin { key, name, created_at, revoked_at } = admin.clone();
    pb::AdminInfo { name, key: key.0.to_vec(), created_at, revoked_at }
}

/// Divides records into messages, the last of which is marked.
fn backup_messages(records: Vec<(String, Vec<u8>)>) -> Vec<pb::BackupResponse> {
    let mut messages = vec![pb::BackupResponse::default()];
    let mut bytes = 0;
    for (key, value) in records {
        bytes += key.len() + value.len();
        if bytes > limits::CHANGES_BYTES {
            bytes = key.len() + value.len();
            messages.push(pb::BackupResponse::default());
        }
        if let Some(message) = messages.last_mut() {
            message.records.push(pb::StoredRecord { key, value });
        }
    }
    if let Some(last) = messages.last_mut() {
        last.complete = true;
    }
    messages
}

/// Returns the items that fit in one message, at least one, and whether there are more.
fn page<M: prost::Message>(items: impl Iterator<Item = M>) -> (Vec<M>, bool) {
    let (mut page, mut bytes) = (Vec::new(), 0);
    for item in items {
        bytes += item.encoded_len();
        if page.len() == PAGE || (bytes > limits::CHANGES_BYTES && !page.is_empty()) {
            return (page, true);
        }
        page.push(item);
    }
    (page, false)
}

fn token_id(text: &str) -> Result<TokenId, Status> {
    text.parse().map_err(|error: InvalidId| Invalid::from(error).status())
}

fn node_name(name: String) -> Result<NodeName, Status> {
    NodeName::try_from(name).map_err(|error| Invalid::from(error).status())
}

fn terms(request: pb::CreateTokenRequest) -> Result<TokenTerms, Status> {
    let uses = request.uses.max(1);
    if uses > limits::TOKEN_USES {
        return Err(Status::invalid_argument(format!(
            "too many uses: a token admits at most {} nodes: give fewer --uses",
            limits::TOKEN_USES
        )));
    }
    let replace = match request.replace {
        name if name.is_empty() => None,
        name => Some(node_name(name)?),
    };
    // By default a machine gets the name of the node that it replaces.
    let pattern = match (request.name_pattern, &replace) {
        (pattern, Some(name)) if pattern.is_empty() => name.to_string(),
        (pattern, _) => pattern,
    };
    let name = match pattern {
        pattern if pattern.is_empty() => None,
        pattern => Some(
            pattern
                .parse()
                .map_err(|error: InvalidPattern| Status::invalid_argument(error.to_string()))?,
        ),
    };
    let allowed_prefixes =
        convert::prefixes(&request.allowed_prefixes).map_err(|error| error.status())?;
    let shared = convert::shared_prefixes(&request.shared, &allowed_prefixes)
        .map_err(|error| error.status())?;
    Ok(TokenTerms {
        uses,
        name,
        site: convert::site(request.site).map_err(|error| error.status())?,
        labels: convert::labels(request.labels).map_err(|error| error.status())?,
        allowed_prefixes,
        shared,
        pod_ranges: pod_ranges(&request.pod_ranges)?,
        replace,
        ephemeral: request.ephemeral,
        ephemeral_after: convert::seconds(request.ephemeral_after_seconds),
        relay: RelayRole::of(request.relay),
        control_plane: request.control_plane,
    })
}

/// Parses the pod ranges of a token. The controller alone pins blocks.
fn pod_ranges(list: &[pb::PodRange]) -> Result<Vec<PodRange>, Status> {
    let unpinned = |range: &pb::PodRange| pb::PodRange { pinned: Vec::new(), ..range.clone() };
    let list: Vec<pb::PodRange> = list.iter().map(unpinned).collect();
    convert::pod_ranges(&list).map_err(|error| error.status())
}

fn node_info(node: &NodeView, sessions: &Sessions, now: Now) -> pb::NodeInfo {
    let session = sessions.live(node.id, now).map(|session| session.address);
    pb::NodeInfo {
        grant: Some(node.grant.clone()),
        record: node.record.clone(),
        online: sessions.is_online(node.id, now),
        last_seen: sessions.last_seen(node.id, now),
        joined_at: node.joined_at,
        session_address: session.map(|address| address.to_string()).unwrap_or_default(),
        problems: node.problems.iter().map(ToString::to_string).collect(),
        problem_details: node.problems.iter().map(pb::Detail::of).collect(),
    }
}
