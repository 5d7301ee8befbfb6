//! Authorization: one table with the role of every RPC. It is checked before a request reaches a
//! service.
//!
//! The default is to deny: an RPC that is not in the table is refused. A test compares the table
//! with the schema, so that no RPC is forgotten.

use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready};
use http_body_util::Limited;
use tonic::body::Body;
use tonic::{Request, Status};
use tower::{Layer, Service};
use towline_proto::id::{IdentityKey, MeshId, NodeId, NodeName};

use crate::listen::ConnectionInfo;
use crate::map::Map;
use crate::peer::PeerName;

use super::refusal::no_access;

/// Longest request of a client that proved nothing, in bytes. A join has about 1 KiB.
const STRANGER_BYTES: usize = 16 * 1024;

/// Role that a client needs to call an RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Any client, also without a certificate.
    Anyone,
    /// A node of the mesh.
    Node,
    /// A node of the mesh, also with an expired certificate.
    ExpiredNode,
    /// An administrator of the mesh.
    Admin,
}

/// Every RPC and the role that it needs.
pub const ROLES: &[(&str, Role)] = &[
    ("/towline.v1.Discovery/Hello", Role::Anyone),
    ("/towline.v1.Discovery/Join", Role::Anyone),
    ("/towline.v1.Discovery/Renew", Role::ExpiredNode),
    ("/towline.v1.Discovery/Publish", Role::Node),
    ("/towline.v1.Discovery/Watch", Role::Node),
    ("/towline.v1.Discovery/Leave", Role::Node),
    ("/towline.v1.Admin/CreateToken", Role::Admin),
    ("/towline.v1.Admin/ListTokens", Role::Admin),
    ("/towline.v1.Admin/RevokeToken", Role::Admin),
    ("/towline.v1.Admin/ListNodes", Role::Admin),
    ("/towline.v1.Admin/RemoveNode", Role::Admin),
    ("/towline.v1.Admin/SetNode", Role::Admin),
    ("/towline.v1.Admin/GetMesh", Role::Admin),
    ("/towline.v1.Admin/ConfigureMesh", Role::Admin),
    ("/towline.v1.Admin/ListTunnels", Role::Admin),
    ("/towline.v1.Admin/ListEvents", Role::Admin),
    ("/towline.v1.Admin/Backup", Role::Admin),
];

/// Client that calls an RPC, an extension of each request that passed the [`Authorizer`].
#[derive(Debug, Clone)]
pub struct Caller {
    /// Source address of the connection.
    pub address: SocketAddr,
    /// Authenticated identity of the client.
    pub identity: CallerIdentity,
}

/// Authenticated identity of a client.
#[derive(Debug, Clone)]
pub enum CallerIdentity {
    /// The RPC needs no authentication.
    Anyone,
    /// The client is a node of the mesh.
    Node(CallingNode),
    /// The client is an administrator.
    Admin,
}

/// Node that calls an RPC.
#[derive(Debug, Clone)]
pub struct CallingNode {
    /// Id of the node.
    pub id: NodeId,
    /// Name of the node.
    pub name: NodeName,
    /// Identity key of the node.
    pub identity: IdentityKey,
}

impl Caller {
    /// Returns the client of a request that passed the authorizer.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("the request was not authorized"))
    }

    /// Returns the node that calls, and its source address.
    pub fn node<T>(request: &Request<T>) -> Result<(CallingNode, SocketAddr), Status> {
        let caller = Self::of(request)?;
        match caller.identity {
            CallerIdentity::Node(node) => Ok((node, caller.address)),
            _ => Err(Status::permission_denied("only a node may call this RPC")),
        }
    }
}

/// Authorization check that every request passes.
#[derive(Clone)]
pub struct Authorizer {
    map: Arc<Map>,
    mesh_id: MeshId,
}

impl Authorizer {
    /// Creates the check for the nodes in `map`.
    pub fn new(map: Arc<Map>, mesh_id: MeshId) -> Self {
        Self { map, mesh_id }
    }

    fn admit(&self, path: &str, connection: Option<&ConnectionInfo>) -> Result<Caller, Status> {
        let role = ROLES.iter().find(|(rpc, _)| *rpc == path).map(|(_, role)| *role);
        let role = role.ok_or_else(|| Status::unimplemented("unknown RPC"))?;
        let connection = connection.ok_or_else(|| Status::internal("unknown connection"))?;
        let identity = match role {
            Role::Anyone => CallerIdentity::Anyone,
            Role::Node => CallerIdentity::Node(self.node(connection, false)?),
            Role::ExpiredNode => CallerIdentity::Node(self.node(connection, true)?),
            Role::Admin => self.admin(connection)?,
        };
        Ok(Caller { address: connection.address, identity })
    }

    fn node(&self, connection: &ConnectionInfo, expired: bool) -> Result<CallingNode, Status> {
        let presented = connection.peer.as_ref().ok_or_else(|| {
            Status::unauthenticated("a node's certificate is required: join the mesh first")
        })?;
        let peer = &presented.peer;
        let PeerName::Node(id) = peer.name else {
            return Err(Status::permission_denied("a node's certificate is required"));
        };
        self.check_mesh(peer.mesh_id)?;
        if presented.expired && !expired {
            return Err(Status::unauthenticated("the node's certificate has expired: renew it"));
        }
        let member = self.map.member(id, &peer.key);
        let (name, _) = member.map_err(|error| no_access(&error, &self.map))?;
        Ok(CallingNode { id, name, identity: peer.key })
    }

    fn admin(&self, connection: &ConnectionInfo) -> Result<CallerIdentity, Status> {
        let presented = connection.peer.as_ref().ok_or_else(|| {
            Status::unauthenticated(
                "the administrator's credential is required: use the one in the controller's state directory",
            )
        })?;
        let PeerName::Admin(_) = &presented.peer.name else {
            return Err(Status::permission_denied("only an administrator may call this RPC"));
        };
        self.check_mesh(presented.peer.mesh_id)?;
        if presented.expired {
            return Err(Status::unauthenticated(
                "the administrator's certificate has expired: use the one that the controller renewed in its state directory",
            ));
        }
        Ok(CallerIdentity::Admin)
    }

    fn check_mesh(&self, mesh_id: MeshId) -> Result<(), Status> {
        if mesh_id == self.mesh_id {
            Ok(())
        } else {
            Err(Status::permission_denied("the certificate belongs to another mesh"))
        }
    }
}

impl<S> Layer<S> for Authorizer {
    type Service = Authorized<S>;

    fn layer(&self, inner: S) -> Authorized<S> {
        Authorized { inner, authorizer: self.clone() }
    }
}

/// A service behind the authorization check.
#[derive(Clone)]
pub struct Authorized<S> {
    inner: S,
    authorizer: Authorizer,
}

impl<S> Service<http::Request<Body>> for Authorized<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let connection = request.extensions().get::<ConnectionInfo>();
        match self.authorizer.admit(request.uri().path(), connection) {
            Ok(caller) => {
                if matches!(caller.identity, CallerIdentity::Anyone) {
                    request = request.map(|body| Body::new(Limited::new(body, STRANGER_BYTES)));
                }
                request.extensions_mut().insert(caller);
                Either::Left(self.inner.call(request))
            }
            Err(status) => {
                tracing::debug!(path = request.uri().path(), reason = status.message(), "refused");
                Either::Right(ready(Ok(status.into_http())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;
    use towline_proto::pb;

    use super::*;

    #[test]
    fn every_rpc_of_the_schema_has_exactly_one_role() {
        let schema = prost_types::FileDescriptorSet::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
        let mut rpcs = BTreeSet::new();
        for file in &schema.file {
            for service in &file.service {
                // The agent serves this on its own socket.
                if service.name() == "Local" {
                    continue;
                }
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    rpcs.insert(path);
                }
            }
        }
        let roles: BTreeSet<String> = ROLES.iter().map(|(path, _)| (*path).to_owned()).collect();
        assert_eq!(rpcs, roles);
        assert_eq!(roles.len(), ROLES.len());
    }

    #[test]
    fn a_client_without_a_certificate_may_only_say_hello_and_join() {
        let authorizer = Authorizer::new(Arc::new(Map::new()), MeshId([1; 16]));
        let address = SocketAddr::from(([192, 0, 2, 1], 1));
        let stranger = ConnectionInfo { address, peer: None };
        for (path, role) in ROLES {
            let admitted = authorizer.admit(path, Some(&stranger)).is_ok();
            assert_eq!(admitted, *role == Role::Anyone, "{path}");
        }
        for path in ["", "/", "/towline.v1.Admin/DropAll", "/towline.v1.discovery/hello"] {
            assert!(authorizer.admit(path, Some(&stranger)).is_err(), "{path}");
        }
    }
}
