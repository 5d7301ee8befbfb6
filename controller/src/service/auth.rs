//! Authorization: one table with the role of every RPC, and what it may do with which object. It is checked
//! before a request reaches a service. Validity and revocation are looked at for each request, because a
//! connection outlives both.
//!
//! The default is to deny: an RPC that is not in the table is refused. A test compares the table
//! with the schema, so that no RPC is forgotten.

use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready};
use http_body_util::Limited;
use tonic::body::Body;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};
use tower::{Layer, Service};
use towline_proto::id::{IdentityKey, MeshId, NodeId, NodeName};

use towline_service::local_socket;

use crate::clock;
use crate::listen::{ConnectionInfo, PresentedPeer, Standing};
use crate::map::{AccessError, Map};
use crate::peer::PeerName;
use crate::view::View;
use towline_registry::NodeAbsent;

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
    /// The holder of a node's certificate that was not removed, also if the certificate has expired or if the
    /// mesh does not know the node.
    Certified,
    /// An administrator of the mesh: by the local socket, or with a certificate if remote administrators are
    /// allowed.
    Admin,
}

impl Role {
    /// Returns the role in words, for the documentation.
    pub fn text(self) -> &'static str {
        match self {
            Self::Anyone => "anyone",
            Self::Node => "node",
            Self::ExpiredNode => "node, also with an expired certificate",
            Self::Certified => {
                "holder of a node's certificate who was not removed, also if the mesh does not know the node"
            }
            Self::Admin => "administrator",
        }
    }
}

/// What an RPC reads or changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    /// Public facts of the mesh and the controller.
    Public,
    /// A node that does not exist yet. The join token decides on it.
    NewNode,
    /// The calling node, and no other.
    OwnNode,
    /// The map of all nodes, and signals to them. The calling node's own session.
    Map,
    /// What the store lost, and the CA signed earlier.
    Lost,
    /// Any node.
    AnyNode,
    /// What nodes report, and what happened lately.
    Reports,
    /// The join tokens.
    Tokens,
    /// The configuration of the mesh.
    Mesh,
    /// All records of the store. They contain no private key and no token's secret.
    Store,
    /// The keys of administrators.
    Admins,
    /// State of health of the controller.
    Health,
    /// The schema of the services, which is no secret.
    Schema,
}

impl Object {
    /// Returns the object in words, for the documentation.
    pub fn text(self) -> &'static str {
        match self {
            Self::Public => "id of the mesh; clock, version and proof key of the controller",
            Self::NewNode => "a new node, as its token allows",
            Self::OwnNode => "the calling node",
            Self::Map => "the map of all nodes; signals to them",
            Self::Lost => {
                "what the store lost of: the calling node, removals and the mesh's configuration"
            }
            Self::AnyNode => "any node",
            Self::Reports => "what the nodes report of their tunnels; events",
            Self::Tokens => "join tokens, without their secrets",
            Self::Mesh => "configuration of the mesh",
            Self::Store => "records of the store",
            Self::Admins => "keys of administrators",
            Self::Health => "whether the controller serves",
            Self::Schema => "the schema of the services",
        }
    }
}

/// Whether an RPC changes its object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The RPC only reads.
    Read,
    /// The RPC changes the object.
    Change,
}

impl Access {
    /// Returns the access in words, for the documentation.
    pub fn text(self) -> &'static str {
        match self {
            Self::Read => "reads",
            Self::Change => "changes",
        }
    }
}

/// An RPC, as a row of [`RPCS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rpc {
    /// Path of the RPC in HTTP/2.
    pub path: &'static str,
    /// Role that it needs.
    pub role: Role,
    /// Whether it changes its object.
    pub access: Access,
    /// What it reads or changes.
    pub object: Object,
}

const fn rpc(path: &'static str, role: Role, access: Access, object: Object) -> Rpc {
    Rpc { path, role, access, object }
}

/// Every RPC, with the role that it needs and what that role may do with which object. An RPC that is not in
/// this table is refused. `docs/threat-model.md` shows it.
pub const RPCS: &[Rpc] = &[
    rpc("/towline.v1.Discovery/Hello", Role::Anyone, Access::Read, Object::Public),
    rpc("/towline.v1.Discovery/Join", Role::Anyone, Access::Change, Object::NewNode),
    rpc("/towline.v1.Discovery/Renew", Role::ExpiredNode, Access::Change, Object::OwnNode),
    rpc("/towline.v1.Discovery/Readmit", Role::Certified, Access::Change, Object::Lost),
    rpc("/towline.v1.Discovery/Publish", Role::Node, Access::Change, Object::OwnNode),
    rpc("/towline.v1.Discovery/Watch", Role::Node, Access::Read, Object::Map),
    rpc("/towline.v1.Discovery/Leave", Role::Node, Access::Change, Object::OwnNode),
    rpc("/towline.v1.Admin/CreateToken", Role::Admin, Access::Change, Object::Tokens),
    rpc("/towline.v1.Admin/ListTokens", Role::Admin, Access::Read, Object::Tokens),
    rpc("/towline.v1.Admin/RevokeToken", Role::Admin, Access::Change, Object::Tokens),
    rpc("/towline.v1.Admin/ListNodes", Role::Admin, Access::Read, Object::AnyNode),
    rpc("/towline.v1.Admin/RemoveNode", Role::Admin, Access::Change, Object::AnyNode),
    rpc("/towline.v1.Admin/SetNode", Role::Admin, Access::Change, Object::AnyNode),
    rpc("/towline.v1.Admin/GetMesh", Role::Admin, Access::Read, Object::Mesh),
    rpc("/towline.v1.Admin/ConfigureMesh", Role::Admin, Access::Change, Object::Mesh),
    rpc("/towline.v1.Admin/ListTunnels", Role::Admin, Access::Read, Object::Reports),
    rpc("/towline.v1.Admin/ListEvents", Role::Admin, Access::Read, Object::Reports),
    rpc("/towline.v1.Admin/Backup", Role::Admin, Access::Read, Object::Store),
    rpc("/towline.v1.Admin/ListAdmins", Role::Admin, Access::Read, Object::Admins),
    rpc("/towline.v1.Admin/CreateAdmin", Role::Admin, Access::Change, Object::Admins),
    rpc("/towline.v1.Admin/RevokeAdmin", Role::Admin, Access::Change, Object::Admins),
    rpc("/grpc.health.v1.Health/Check", Role::Anyone, Access::Read, Object::Health),
    rpc("/grpc.health.v1.Health/Watch", Role::Anyone, Access::Read, Object::Health),
    rpc(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        Role::Admin,
        Access::Read,
        Object::Schema,
    ),
];

/// Client that calls an RPC, an extension of each request that passed the [`Authorizer`].
#[derive(Debug, Clone)]
pub struct Caller {
    /// Source address of the connection; `None` by the local socket.
    pub address: Option<SocketAddr>,
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
    /// The client holds a node's certificate. The mesh need not know the node.
    Certified(NodeId, IdentityKey),
    /// The client is an administrator with this name in its certificate.
    Admin(String),
    /// The client is an administrator on the controller's machine, with this user id.
    LocalAdmin(u32),
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
    /// End of the certificate's validity, in seconds since 1970.
    pub expires_at: i64,
}

impl CallingNode {
    /// Returns whether the certificate has expired at `now`, in seconds since 1970.
    pub fn is_expired(&self, now: i64) -> bool {
        self.expires_at < now
    }
}

/// Returns the status for a node whose certificate has expired.
pub(super) fn expired() -> Status {
    Status::unauthenticated("the node's certificate has expired: renew it")
}

impl Caller {
    /// Returns the client of a request that passed the authorizer.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("the request was not authorized"))
    }

    /// Returns the source address of the connection, which all but local ones have.
    pub fn address(&self) -> Result<SocketAddr, Status> {
        self.address.ok_or_else(|| Status::internal("the connection has no source address"))
    }

    /// Returns the node that calls, and its source address.
    pub fn node<T>(request: &Request<T>) -> Result<(CallingNode, SocketAddr), Status> {
        let caller = Self::of(request)?;
        let address = caller.address()?;
        match caller.identity {
            CallerIdentity::Node(node) => Ok((node, address)),
            CallerIdentity::Anyone
            | CallerIdentity::Certified(..)
            | CallerIdentity::Admin(_)
            | CallerIdentity::LocalAdmin(_) => {
                Err(Status::permission_denied("only a node may call this RPC"))
            }
        }
    }

    /// Returns the id and the key in the certificate of a client that the mesh need not know.
    pub fn certified<T>(request: &Request<T>) -> Result<(NodeId, IdentityKey), Status> {
        match Self::of(request)?.identity {
            CallerIdentity::Certified(id, key) => Ok((id, key)),
            _ => Err(Status::permission_denied(
                "only the holder of a node's certificate may call this RPC",
            )),
        }
    }
}

/// Connection that a request came by.
#[derive(Debug, Clone, Copy)]
enum Origin<'a> {
    /// TLS over the network.
    Network(&'a ConnectionInfo),
    /// The local socket, with the user id of the client if the kernel has it.
    Local(Option<u32>),
}

/// Authorization check that every request passes.
#[derive(Clone)]
pub struct Authorizer {
    map: Arc<Map>,
    view: Arc<View>,
    mesh_id: MeshId,
    is_remote_admin: bool,
}

impl Authorizer {
    /// Creates the check for the nodes in `map` and the administrators in `view`. The latter may come over the
    /// network only with `is_remote_admin`.
    pub fn new(map: Arc<Map>, view: Arc<View>, mesh_id: MeshId, is_remote_admin: bool) -> Self {
        Self { map, view, mesh_id, is_remote_admin }
    }

    /// Returns the kind of the client that presented a certificate, at `now` in seconds since 1970.
    pub fn standing(&self, presented: &PresentedPeer, now: i64) -> Standing {
        let peer = &presented.peer;
        match peer.name {
            PeerName::Node(node) if self.map.member(node, &peer.key).is_err() => Standing::Stranger,
            PeerName::Node(node) if presented.is_expired(now) => Standing::Expired(node),
            PeerName::Node(node) => Standing::Node(node),
            PeerName::Admin(_) if self.check_admin(presented, now).is_err() => Standing::Stranger,
            PeerName::Admin(_) => Standing::Admin,
        }
    }

    /// Checks a request at `now`, in seconds since 1970.
    fn admit(
        &self,
        path: &str,
        origin: Option<Origin<'_>>,
        now: i64,
    ) -> Result<(Caller, &'static Rpc), Status> {
        let rpc = RPCS.iter().find(|rpc| rpc.path == path);
        let rpc = rpc.ok_or_else(|| Status::unimplemented("unknown RPC"))?;
        match origin.ok_or_else(|| Status::internal("unknown connection"))? {
            Origin::Network(connection) => {
                let identity = match rpc.role {
                    Role::Anyone => CallerIdentity::Anyone,
                    Role::Node => CallerIdentity::Node(self.node(connection, false, now)?),
                    Role::ExpiredNode => CallerIdentity::Node(self.node(connection, true, now)?),
                    Role::Certified => self.certified(connection)?,
                    Role::Admin => self.admin(connection, now)?,
                };
                Ok((Caller { address: Some(connection.address), identity }, rpc))
            }
            Origin::Local(uid) => {
                let uid = uid.filter(|uid| local_socket::is_allowed_user(*uid));
                let uid = uid.ok_or_else(|| {
                    Status::permission_denied("only root and the controller's user may do this")
                })?;
                if rpc.role != Role::Admin {
                    return Err(Status::permission_denied(
                        "the local socket is for administrators",
                    ));
                }
                Ok((Caller { address: None, identity: CallerIdentity::LocalAdmin(uid) }, rpc))
            }
        }
    }

    fn node(
        &self,
        connection: &ConnectionInfo,
        may_be_expired: bool,
        now: i64,
    ) -> Result<CallingNode, Status> {
        let (id, presented) = self.certificate(connection)?;
        if presented.is_expired(now) && !may_be_expired {
            return Err(expired());
        }
        let identity = presented.peer.key;
        let member = self.map.member(id, &identity);
        let (name, _) = member.map_err(|error| no_access(&error, &self.map))?;
        Ok(CallingNode { id, name, identity, expires_at: presented.expires_at })
    }

    fn certified(&self, connection: &ConnectionInfo) -> Result<CallerIdentity, Status> {
        let (id, presented) = self.certificate(connection)?;
        match self.map.member(id, &presented.peer.key) {
            Ok(_) | Err(AccessError::Absent(NodeAbsent::Unknown { .. })) => {
                Ok(CallerIdentity::Certified(id, presented.peer.key))
            }
            Err(error) => Err(no_access(&error, &self.map)),
        }
    }

    /// Returns the id in a node's certificate, and the certificate's identity.
    fn certificate<'a>(
        &self,
        connection: &'a ConnectionInfo,
    ) -> Result<(NodeId, &'a PresentedPeer), Status> {
        let presented = connection.peer.as_deref().ok_or_else(|| {
            Status::unauthenticated("a node's certificate is required: join the mesh first")
        })?;
        let PeerName::Node(id) = presented.peer.name else {
            return Err(Status::permission_denied("a node's certificate is required"));
        };
        self.check_mesh(presented.peer.mesh_id)?;
        Ok((id, presented))
    }

    fn admin(&self, connection: &ConnectionInfo, now: i64) -> Result<CallerIdentity, Status> {
        let presented = connection.peer.as_ref().ok_or_else(|| {
            Status::unauthenticated(
                "the administrator's credential is required: use the one in the controller's state directory",
            )
        })?;
        let PeerName::Admin(name) = &presented.peer.name else {
            return Err(Status::permission_denied("only an administrator may call this RPC"));
        };
        self.check_admin(presented, now)?;
        Ok(CallerIdentity::Admin(name.clone()))
    }

    /// Checks the certificate of an administrator.
    fn check_admin(&self, presented: &PresentedPeer, now: i64) -> Result<(), Status> {
        self.check_mesh(presented.peer.mesh_id)?;
        if !self.is_remote_admin {
            return Err(Status::permission_denied(
                "the controller allows no remote administrators: run the command on its machine, or set `remote_admin = true` there",
            ));
        }
        if presented.is_expired(now) {
            return Err(Status::unauthenticated(
                "the administrator's certificate has expired: use the one that the controller renewed in its state directory",
            ));
        }
        if !self.view.is_admin(&presented.peer.key) {
            return Err(Status::permission_denied(
                "the administrator's key was revoked: use the one in the controller's state directory",
            ));
        }
        Ok(())
    }

    fn check_mesh(&self, mesh_id: MeshId) -> Result<(), Status> {
        if mesh_id == self.mesh_id {
            Ok(())
        } else {
            Err(Status::permission_denied("the certificate belongs to another mesh"))
        }
    }
}

/// Returns the connection that a request came by.
fn origin(request: &http::Request<Body>) -> Option<Origin<'_>> {
    let extensions = request.extensions();
    let network = extensions.get::<ConnectionInfo>().map(Origin::Network);
    network.or_else(|| {
        let local = extensions.get::<UdsConnectInfo>()?;
        Some(Origin::Local(local.peer_cred.map(|peer| peer.uid())))
    })
}

/// Logs a change by an administrator: who made it, and from where.
fn log(caller: &Caller, rpc: &Rpc) {
    if rpc.access == Access::Read {
        return;
    }
    match (&caller.identity, caller.address) {
        (CallerIdentity::LocalAdmin(uid), _) => {
            tracing::info!(rpc = rpc.path, uid, "change by a local administrator");
        }
        (CallerIdentity::Admin(name), Some(address)) => {
            tracing::info!(rpc = rpc.path, name, %address, "change by an administrator");
        }
        (
            CallerIdentity::Admin(_)
            | CallerIdentity::Anyone
            | CallerIdentity::Certified(..)
            | CallerIdentity::Node(_),
            _,
        ) => {}
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
        let admitted =
            self.authorizer.admit(request.uri().path(), origin(&request), clock::now().unix);
        match admitted {
            Ok((caller, rpc)) => {
                log(&caller, rpc);
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
    use towline_registry::Admin;

    use super::*;
    use crate::listen::PresentedPeer;
    use crate::peer::Peer;
    use crate::view::ViewChange;

    const MESH: MeshId = MeshId([1; 16]);
    const NOW: i64 = 1_700_000_000;

    /// Returns a check that knows one administrator, with the key 1, and one that was revoked, with the key 2.
    fn authorizer(is_remote_admin: bool) -> Authorizer {
        let view = Arc::new(View::default());
        let admin = |key: u8, revoked_at| {
            let (key, name) = (IdentityKey([key; 32]), "local".to_owned());
            ViewChange::Admin(Arc::new(Admin { key, name, created_at: 0, revoked_at }))
        };
        view.apply(vec![admin(1, None), admin(2, Some(1))]);
        Authorizer::new(Arc::new(Map::new()), view, MESH, is_remote_admin)
    }

    fn connection(peer: Option<PresentedPeer>) -> ConnectionInfo {
        ConnectionInfo { address: SocketAddr::from(([192, 0, 2, 1], 1)), peer: peer.map(Arc::new) }
    }

    fn admin(mesh_id: MeshId, key: u8, expires_at: i64) -> ConnectionInfo {
        let (name, key) = (PeerName::Admin("local".into()), IdentityKey([key; 32]));
        connection(Some(PresentedPeer { peer: Peer { mesh_id, name, key }, expires_at }))
    }

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
        let paths: BTreeSet<String> = RPCS.iter().map(|rpc| rpc.path.to_owned()).collect();
        assert_eq!(rpcs, paths);
        assert_eq!(paths.len(), RPCS.len());
    }

    #[test]
    fn a_client_without_a_certificate_may_only_say_hello_join_and_ask_for_health() {
        let authorizer = authorizer(true);
        let stranger = connection(None);
        let admit = |path: &str| authorizer.admit(path, Some(Origin::Network(&stranger)), NOW);
        for rpc in RPCS {
            assert_eq!(admit(rpc.path).is_ok(), rpc.role == Role::Anyone, "{}", rpc.path);
        }
        for path in ["", "/", "/towline.v1.Admin/DropAll", "/towline.v1.discovery/hello"] {
            assert!(admit(path).is_err(), "{path}");
        }
        assert!(authorizer.admit("/towline.v1.Discovery/Hello", None, NOW).is_err());
    }

    #[test]
    fn every_rpc_refuses_every_certificate_that_does_not_have_its_role() {
        let good = || admin(MESH, 1, NOW);
        for (what, authorizer, caller) in [
            ("remote administrators are not allowed", authorizer(false), good()),
            ("the key was revoked", authorizer(true), admin(MESH, 2, NOW)),
            ("the key is not listed", authorizer(true), admin(MESH, 3, NOW)),
            ("it expired since the handshake", authorizer(true), admin(MESH, 1, NOW - 1)),
            ("it is of another mesh", authorizer(true), admin(MeshId([9; 16]), 1, NOW)),
        ] {
            for rpc in RPCS {
                let admitted = authorizer.admit(rpc.path, Some(Origin::Network(&caller)), NOW);
                assert_eq!(admitted.is_ok(), rpc.role == Role::Anyone, "{}: {what}", rpc.path);
            }
        }
        let (authorizer, caller) = (authorizer(true), good());
        for rpc in RPCS {
            let admitted = authorizer.admit(rpc.path, Some(Origin::Network(&caller)), NOW);
            let may = matches!(rpc.role, Role::Anyone | Role::Admin);
            assert_eq!(admitted.is_ok(), may, "{}", rpc.path);
        }
    }

    #[test]
    fn a_connection_has_the_place_of_an_administrator_if_its_certificate_is_accepted() {
        let rpc = RPCS.iter().find(|rpc| rpc.role == Role::Admin).unwrap();
        for (authorizer, caller, standing) in [
            (authorizer(true), admin(MESH, 1, NOW), Standing::Admin),
            (authorizer(false), admin(MESH, 1, NOW), Standing::Stranger),
            (authorizer(true), admin(MESH, 2, NOW), Standing::Stranger),
            (authorizer(true), admin(MESH, 3, NOW), Standing::Stranger),
            (authorizer(true), admin(MESH, 1, NOW - 1), Standing::Stranger),
            (authorizer(true), admin(MeshId([9; 16]), 1, NOW), Standing::Stranger),
        ] {
            let presented = caller.peer.as_deref().unwrap();
            assert_eq!(authorizer.standing(presented, NOW), standing, "{presented:?}");
            let admitted = authorizer.admit(rpc.path, Some(Origin::Network(&caller)), NOW);
            assert_eq!(admitted.is_ok(), standing == Standing::Admin, "{presented:?}");
        }
    }

    #[test]
    fn the_local_socket_is_for_administration_by_its_owner_alone() {
        let authorizer = authorizer(false);
        let own = nix::unistd::geteuid().as_raw();
        let other = own.wrapping_add(1).max(1);
        for rpc in RPCS {
            let admit = |uid| authorizer.admit(rpc.path, Some(Origin::Local(uid)), NOW).is_ok();
            let is_admin = rpc.role == Role::Admin;
            assert_eq!((admit(Some(own)), admit(Some(0))), (is_admin, is_admin), "{}", rpc.path);
            assert!(!admit(Some(other)) && !admit(None), "{}", rpc.path);
        }
    }
}
