//! Who may call what: one table for every RPC, looked at before any service sees the request.
//!
//! Default deny: an RPC that is not in the table is refused, and a test walks the schema so that
//! none is forgotten.

use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready};
use tonic::body::Body;
use tonic::{Request, Status};
use tower::{Layer, Service};
use towline_proto::id::{IdentityKey, MeshId, NodeId, NodeName};

use crate::listen::ConnectionInfo;
use crate::map::Map;
use crate::peer::PeerName;

use super::refused;

/// Who may call an RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Whoever reaches the port.
    Anyone,
    /// A node of the mesh.
    Node,
    /// A node of the mesh, also with a certificate that has expired.
    ExpiredNode,
    /// An administrator.
    Admin,
}

/// Every RPC there is.
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
    ("/towline.v1.Admin/GetMesh", Role::Admin),
    ("/towline.v1.Admin/ConfigureMesh", Role::Admin),
];

/// Who calls; an extension of each request that was let through.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Where from.
    pub address: SocketAddr,
    /// As whom.
    pub identity: CallerIdentity,
}

/// As whom somebody calls.
#[derive(Debug, Clone)]
pub enum CallerIdentity {
    /// Nobody that is known.
    Anyone,
    /// A node.
    Node(CallingNode),
    /// An administrator.
    Admin,
}

/// A node that calls.
#[derive(Debug, Clone)]
pub struct CallingNode {
    /// Which.
    pub id: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Its identity key.
    pub identity: IdentityKey,
}

impl Caller {
    /// Of a request that went through the gate.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("the request did not pass the gate"))
    }

    /// The node that calls.
    pub fn node<T>(request: &Request<T>) -> Result<(CallingNode, SocketAddr), Status> {
        let caller = Self::of(request)?;
        match caller.identity {
            CallerIdentity::Node(node) => Ok((node, caller.address)),
            _ => Err(Status::permission_denied("only a node may do this")),
        }
    }
}

/// The gate that every request passes.
#[derive(Clone)]
pub struct Gate {
    map: Arc<Map>,
    mesh_id: MeshId,
}

impl Gate {
    /// For the nodes in `map`.
    pub fn new(map: Arc<Map>, mesh_id: MeshId) -> Self {
        Self { map, mesh_id }
    }

    fn admit(&self, path: &str, connection: Option<&ConnectionInfo>) -> Result<Caller, Status> {
        let role = ROLES.iter().find(|(rpc, _)| *rpc == path).map(|(_, role)| *role);
        let role = role.ok_or_else(|| Status::unimplemented("there is no such call"))?;
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
            Status::unauthenticated("this needs a node's certificate: join the mesh first")
        })?;
        let peer = &presented.peer;
        let PeerName::Node(id) = peer.name else {
            return Err(Status::permission_denied("this needs a node's certificate"));
        };
        self.check_mesh(peer.mesh_id)?;
        if presented.expired && !expired {
            return Err(Status::unauthenticated("the node's certificate has expired: renew it"));
        }
        let (name, _) = self.map.member(id, &peer.key).map_err(refused)?;
        Ok(CallingNode { id, name, identity: peer.key })
    }

    fn admin(&self, connection: &ConnectionInfo) -> Result<CallerIdentity, Status> {
        let presented = connection.peer.as_ref().ok_or_else(|| {
            Status::unauthenticated(
                "this needs the administrator's credential, from the controller's state directory",
            )
        })?;
        let PeerName::Admin(_) = &presented.peer.name else {
            return Err(Status::permission_denied("only an administrator may do this"));
        };
        self.check_mesh(presented.peer.mesh_id)?;
        if presented.expired {
            return Err(Status::unauthenticated(
                "the administrator's certificate has expired: the running controller renews it in its state directory",
            ));
        }
        Ok(CallerIdentity::Admin)
    }

    fn check_mesh(&self, mesh_id: MeshId) -> Result<(), Status> {
        if mesh_id == self.mesh_id {
            Ok(())
        } else {
            Err(Status::permission_denied("the certificate is of another mesh"))
        }
    }
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { inner, gate: self.clone() }
    }
}

/// A service behind the gate.
#[derive(Clone)]
pub struct Gated<S> {
    inner: S,
    gate: Gate,
}

impl<S, B> Service<http::Request<B>> for Gated<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let connection = request.extensions().get::<ConnectionInfo>();
        match self.gate.admit(request.uri().path(), connection) {
            Ok(caller) => {
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
                // The agent's own socket is not served here.
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
    fn whoever_shows_no_certificate_may_only_say_hello_and_join() {
        let gate = Gate::new(Arc::new(Map::new()), MeshId([1; 16]));
        let address = SocketAddr::from(([192, 0, 2, 1], 1));
        let stranger = ConnectionInfo { address, peer: None };
        for (path, role) in ROLES {
            let admitted = gate.admit(path, Some(&stranger)).is_ok();
            assert_eq!(admitted, *role == Role::Anyone, "{path}");
        }
        for path in ["", "/", "/towline.v1.Admin/DropAll", "/towline.v1.discovery/hello"] {
            assert!(gate.admit(path, Some(&stranger)).is_err(), "{path}");
        }
    }
}
