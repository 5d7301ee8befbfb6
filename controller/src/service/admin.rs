//! RPCs for operators: tokens, nodes and the mesh configuration.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};
use towline_proto::convert;
use towline_proto::id::{NodeName, TokenId};
use towline_proto::pb::admin_server::Admin;
use towline_proto::token::{JoinToken, TokenSecret};
use towline_proto::{limits, pb};

use crate::clock::Now;
use crate::entropy::random;
use crate::registry::sessions::Sessions;
use crate::registry::token::{InvalidPattern, SecretHash, TokenTerms};
use crate::registry::{NodeStatus, Registry};

use super::{Shared, invalid, no_entropy, refused, unavailable};

/// Default lifetime of a token.
const TTL: Duration = Duration::from_secs(3600);

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
        if self.shared.advertise.is_empty() {
            return Err(Status::failed_precondition(
                "cannot create a token: the controller has no address to advertise: start it with --advertise HOST:PORT",
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
        let id = TokenId(random().map_err(no_entropy)?);
        let secret = TokenSecret(random().map_err(no_entropy)?);
        let hash = SecretHash::of(&secret);
        let run = move |registry: &mut Registry, _: &_, now: Now| {
            let expires_at = now.plus(ttl).unix;
            registry.create_token(id, hash, terms, expires_at, now).map(pb::Token::from)
        };
        let info = self.shared.writer.run(run).await.map_err(unavailable)?.map_err(refused)?;
        let token = JoinToken {
            ca: self.shared.authority.fingerprint(),
            id,
            secret,
            controllers: self.shared.advertise.clone(),
        };
        Ok(Response::new(pb::CreateTokenResponse { token: token.encode(), info: Some(info) }))
    }

    async fn list_tokens(
        &self,
        request: Request<pb::ListTokensRequest>,
    ) -> Result<Response<pb::ListTokensResponse>, Status> {
        let after = request.into_inner().after;
        let after = if after.is_empty() { None } else { Some(token_id(&after)?) };
        let run = move |registry: &mut Registry, _: &_, _| {
            page(registry.tokens(after).map(|(token, nodes)| pb::Token {
                nodes: nodes.iter().map(NodeName::to_string).collect(),
                ..token.into()
            }))
        };
        let (tokens, more) = self.shared.writer.run(run).await.map_err(unavailable)?;
        Ok(Response::new(pb::ListTokensResponse { tokens, more }))
    }

    async fn revoke_token(
        &self,
        request: Request<pb::RevokeTokenRequest>,
    ) -> Result<Response<pb::RevokeTokenResponse>, Status> {
        let id = token_id(&request.get_ref().id)?;
        let run = move |registry: &mut Registry, _: &_, _| registry.revoke_token(id);
        self.shared.writer.run(run).await.map_err(unavailable)?.map_err(refused)?;
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
        let run = move |registry: &mut Registry, sessions: &Sessions, now| match name {
            Some(name) => {
                let status = registry.status(&name, sessions, now)?;
                Ok((vec![node_info(status)], false))
            }
            None => Ok(page(registry.statuses(after.as_ref(), sessions, now).map(node_info))),
        };
        let listed = self.shared.writer.run(run).await.map_err(unavailable)?;
        let (nodes, more) = listed.map_err(refused)?;
        Ok(Response::new(pb::ListNodesResponse { nodes, more }))
    }

    async fn remove_node(
        &self,
        request: Request<pb::RemoveNodeRequest>,
    ) -> Result<Response<pb::RemoveNodeResponse>, Status> {
        let name = node_name(request.into_inner().name)?;
        let run = move |registry: &mut Registry, sessions: &_, now| {
            let node = registry.by_name(&name)?;
            registry.remove(node, "removed by an operator", sessions, now)
        };
        let tombstone = self.shared.writer.run(run).await.map_err(unavailable)?.map_err(refused)?;
        Ok(Response::new(pb::RemoveNodeResponse { tombstone: Some(tombstone) }))
    }

    async fn get_mesh(
        &self,
        _: Request<pb::GetMeshRequest>,
    ) -> Result<Response<pb::GetMeshResponse>, Status> {
        let run = |registry: &mut Registry, _: &_, _| registry.signed_mesh().clone();
        let mesh = self.shared.writer.run(run).await.map_err(unavailable)?;
        Ok(Response::new(pb::GetMeshResponse { mesh: Some(mesh) }))
    }

    async fn configure_mesh(
        &self,
        request: Request<pb::ConfigureMeshRequest>,
    ) -> Result<Response<pb::ConfigureMeshResponse>, Status> {
        let request = request.into_inner();
        let ranges = |list: Option<pb::PrefixList>| match list {
            Some(list) => convert::prefixes(&list.prefixes).map(Some).map_err(invalid),
            None => Ok(None),
        };
        let protected = ranges(request.protected)?;
        let bypass_when_down = ranges(request.bypass_when_down)?;
        let trusted_sites = match request.trusted_sites {
            Some(list) => Some(convert::sites(list.sites).map_err(invalid)?),
            None => None,
        };
        let run = move |registry: &mut Registry, _: &_, _| {
            let changed = registry.configure(|mesh| {
                mesh.protected = protected.unwrap_or(std::mem::take(&mut mesh.protected));
                mesh.trusted_sites =
                    trusted_sites.unwrap_or(std::mem::take(&mut mesh.trusted_sites));
                mesh.bypass_when_down =
                    bypass_when_down.unwrap_or(std::mem::take(&mut mesh.bypass_when_down));
            });
            changed.map(|()| registry.signed_mesh().clone())
        };
        let mesh = self.shared.writer.run(run).await.map_err(unavailable)?;
        let mesh = mesh.map_err(|error| Status::failed_precondition(error.to_string()))?;
        Ok(Response::new(pb::ConfigureMeshResponse { mesh: Some(mesh) }))
    }
}

/// Returns the items that fit in one message, at least one, and whether there are more.
fn page<M: prost::Message>(items: impl Iterator<Item = M>) -> (Vec<M>, bool) {
    let (mut page, mut bytes) = (Vec::new(), 0);
    for item in items {
        bytes += item.encoded_len();
        if bytes > limits::CHANGES_BYTES && !page.is_empty() {
            return (page, true);
        }
        page.push(item);
    }
    (page, false)
}

fn token_id(text: &str) -> Result<TokenId, Status> {
    text.parse().map_err(|error: towline_proto::id::InvalidId| invalid(error.into()))
}

fn node_name(name: String) -> Result<NodeName, Status> {
    NodeName::try_from(name).map_err(|error| invalid(error.into()))
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
    Ok(TokenTerms {
        uses,
        name,
        site: convert::site(request.site).map_err(invalid)?,
        labels: convert::labels(request.labels).map_err(invalid)?,
        allowed_prefixes: convert::prefixes(&request.allowed_prefixes).map_err(invalid)?,
        replace,
        ephemeral: request.ephemeral,
    })
}

fn node_info(status: NodeStatus<'_>) -> pb::NodeInfo {
    let member = status.member;
    pb::NodeInfo {
        grant: Some(member.signed_grant.clone()),
        record: member.record.as_ref().map(|(_, signed)| signed.clone()),
        online: status.session.is_some(),
        last_seen: status.last_seen,
        joined_at: member.joined_at,
        session_address: status.session.map(|address| address.to_string()).unwrap_or_default(),
        problems: status.problems,
    }
}
