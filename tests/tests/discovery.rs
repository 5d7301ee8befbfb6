//! Tests the agent's discovery client against a scripted controller, and against the real one.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use rcgen::PublicKeyData as _;
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;
use towline_agent::discovery::{Announcement, Command, Discovery, Event, Setup};
use towline_agent::join::{self, JoinError, Joined};
use towline_agent::state::{Counters, Membership, StateDir};
use towline_controller::tunnels::matrix::Matrix;
use towline_core::mesh::MapChange;
use towline_fixtures::ca::Ca;
use towline_fixtures::controller::TestController;
use towline_fixtures::node::{candidate, mesh_config, node};
use towline_proto::id::{Fingerprint, NodeId, TokenId};
use towline_proto::node::{MeshConfig, Record, RelayRole};
use towline_proto::pb::change::Kind::{Mesh, Tombstone, Upsert};
use towline_proto::signed::Domain;
use towline_proto::summary::{MeshSummary, PeerSummary, Tunnel};
use towline_proto::token::{ControllerAddress, JoinToken, TokenSecret};
use towline_proto::{pb, refusal, signed};
use towline_tests::scripted::{Call, ScriptedController, Watch, changes, enroll, own_grant, ready};

const OWN: u8 = 1;

/// Returns the change that brings node `number`, as `ca` signs it.
fn upsert(ca: &Ca, number: u8) -> pb::change::Kind {
    Upsert(ca.entry(node(number)))
}

struct Node {
    state: Arc<StateDir>,
    _dir: tempfile::TempDir,
    membership: Membership,
}

/// The channels that the daemon would hold.
struct Daemon {
    events: mpsc::Receiver<Event>,
    announcements: watch::Sender<Option<Announcement>>,
    commands: mpsc::Sender<Command>,
    configured: watch::Sender<Vec<ControllerAddress>>,
}

impl Node {
    /// Creates a member with a certificate that is valid for `life`, beginning an hour ago.
    fn new(ca: &Ca, controller: &ScriptedController, life: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = Arc::new(StateDir::open(dir.path()).unwrap());
        let membership = enroll(&state, OWN, ca, controller.address, life).unwrap();
        Self { state, _dir: dir, membership }
    }

    /// Joins a controller as `name`.
    async fn join(controller: &TestController, name: &str) -> Self {
        let mut token = controller.token(pb::CreateTokenRequest::default()).await;
        token.controllers = vec![controller.address.to_string().parse().unwrap()];
        let dir = tempfile::tempdir().unwrap();
        let state = Arc::new(StateDir::open(dir.path()).unwrap());
        join::join(&state, &token, &name.parse().unwrap(), 0).await.unwrap();
        let membership = state.membership().unwrap().unwrap();
        Self { state, _dir: dir, membership }
    }

    fn start(&self) -> Daemon {
        let (sender, events) = mpsc::channel(64);
        let (announcements, announced) = watch::channel(None);
        let (commands, queue) = mpsc::channel(1);
        let (configured, seen) = watch::channel(Vec::new());
        let discovery = Discovery::new(
            Setup {
                state: self.state.clone(),
                keys: self.state.keys().unwrap(),
                membership: self.state.membership().unwrap().unwrap(),
                configured: seen,
                mark: 0,
                map: self.state.map(&self.membership).unwrap(),
                counters: self.state.counters().unwrap(),
            },
            sender,
        )
        .unwrap();
        tokio::spawn(discovery.run(announced, queue));
        Daemon { events, announcements, commands, configured }
    }
}

impl Daemon {
    async fn event<T>(&mut self, wanted: impl Fn(Event) -> Option<T>) -> T {
        loop {
            let event = self.events.recv().await.expect("the task runs");
            if let Some(found) = wanted(event) {
                return found;
            }
        }
    }

    async fn map(&mut self) -> Vec<MapChange> {
        self.event(|event| match event {
            Event::Map(changes) => Some(changes),
            _ => None,
        })
        .await
    }

    async fn disconnected(&mut self) -> String {
        self.event(|event| match event {
            Event::Disconnected { reason } => Some(reason.to_string()),
            _ => None,
        })
        .await
    }

    async fn controllers(&mut self) -> Vec<ControllerAddress> {
        self.event(|event| match event {
            Event::Controllers(controllers) => Some(controllers),
            _ => None,
        })
        .await
    }

    fn announce(&self, port: u16) {
        let candidates = vec![candidate(&format!("192.0.2.1:{port}"))];
        self.announcements.send_replace(Some(Announcement {
            candidates,
            prefixes: Vec::new(),
            lans: Vec::new(),
            relay: false,
            api_port: None,
        }));
    }
}

const DAY: Duration = Duration::from_secs(86_400);

/// A member of a mesh whose discovery client runs against a scripted controller.
struct Scene {
    ca: Ca,
    controller: ScriptedController,
    node: Node,
    daemon: Daemon,
}

impl Scene {
    async fn new() -> Self {
        Self::with_certificate(DAY).await
    }

    /// Creates a member with a certificate that is valid for `life`, beginning an hour ago.
    async fn with_certificate(life: Duration) -> Self {
        let ca = Ca::new(1);
        let controller = ScriptedController::start(&ca).await.unwrap();
        let node = Node::new(&ca, &controller, life);
        let daemon = node.start();
        Self { ca, controller, node, daemon }
    }

    /// Waits for the next watch, and opens a session of this epoch in it.
    async fn session(&mut self, epoch: u64) -> Watch {
        let watch = self.controller.watch().await.unwrap();
        watch.send(ready(epoch)).await;
        watch
    }

    /// Returns the change that brings node `number`.
    fn upsert(&self, number: u8) -> pb::change::Kind {
        upsert(&self.ca, number)
    }

    /// Waits for the next published record, and checks the signature of this node.
    async fn published(&mut self) -> (pb::Signed, Record) {
        let signed = self.controller.published().await.unwrap();
        let identity = self.node.membership.grant.identity_key;
        let record = signed::record(Some(&signed), &identity).unwrap();
        (signed, record)
    }
}

/// Returns the address of a controller.
fn address(controller: &ScriptedController) -> ControllerAddress {
    controller.address.to_string().parse().unwrap()
}

/// Returns the change to a mesh configuration with these controllers.
fn mesh_with(ca: &Ca, controllers: Vec<ControllerAddress>) -> pb::change::Kind {
    let mesh = MeshConfig { controllers, generation: 2, ..mesh_config() };
    Mesh(ca.sign(Domain::Mesh, &pb::MeshConfig::from(&mesh)))
}

/// Returns the names of the nodes that these changes bring, and fails for other changes.
fn names(changes: &[MapChange]) -> Vec<&str> {
    fn name(change: &MapChange) -> &str {
        match change {
            MapChange::Upsert(node) => node.name().as_str(),
            other => panic!("not a node: {other:?}"),
        }
    }
    changes.iter().map(name).collect()
}

#[tokio::test]
async fn the_map_comes_in_and_a_new_session_resumes_where_the_last_one_ended() {
    let mut scene = Scene::new().await;
    let watch = scene.controller.watch().await.unwrap();
    assert_eq!((watch.start.epoch, watch.start.revision), (0, 0));
    watch.send(ready(5)).await;
    watch.send(changes(3, vec![scene.upsert(2)])).await;
    assert_eq!(names(&scene.daemon.map().await), ["node-2"]);
    drop(watch);

    let watch = scene.controller.watch().await.unwrap();
    assert_eq!((watch.start.epoch, watch.start.revision), (5, 3));
}

#[tokio::test]
async fn a_controller_of_another_epoch_gets_what_the_node_knows_and_others_do_not() {
    let mut scene = Scene::new().await;
    let watch = scene.session(5).await;
    watch.send(changes(3, vec![Tombstone(scene.ca.tombstone(9)), scene.upsert(2)])).await;
    scene.daemon.map().await;
    drop(watch);

    let watch = scene.session(5).await;
    assert!(watch.start.tombstones.is_empty() && watch.start.mesh.is_none(), "the same epoch");
    drop(watch);

    let first = scene.session(6).await;
    assert!(first.start.tombstones.is_empty());
    let watch = scene.session(6).await;
    assert_eq!(watch.start.tombstones, [scene.ca.tombstone(9)]);
    assert_eq!(watch.start.mesh, Some(scene.ca.mesh()));
    watch.send(changes(1, vec![scene.upsert(3)])).await;
    assert_eq!(names(&scene.daemon.map().await), ["node-3"]);
    drop((first, watch));

    let watch = scene.session(6).await;
    assert_eq!((watch.start.epoch, watch.start.revision), (6, 1));
    assert!(watch.start.tombstones.is_empty());
}

#[tokio::test]
async fn a_controller_that_does_not_know_the_node_gets_its_grant_and_no_peer_is_removed() {
    let mut scene = Scene::new().await;
    let watch = scene.session(5).await;
    watch.send(changes(3, vec![scene.upsert(2)])).await;
    scene.daemon.map().await;
    drop(watch);

    let refused = refusal::of_unknown_node(Status::permission_denied("node is not known"));
    scene.controller.watch().await.unwrap().fail(refused).await;
    loop {
        if let Call::Readmit(request, reply) = scene.controller.call().await.unwrap() {
            let grant = &scene.node.membership.signed_grant;
            assert_eq!(request.grant.as_ref(), Some(grant));
            assert_eq!(request.mesh, Some(scene.ca.mesh()));
            let _ = reply.send(Ok(pb::ReadmitResponse {}));
            break;
        }
    }
    let first = scene.session(6).await;
    let watch = scene.session(6).await;
    watch.send(changes(1, vec![scene.upsert(3)])).await;
    assert_eq!(names(&scene.daemon.map().await), ["node-3"], "nothing is removed");
    drop(first);
}

#[tokio::test]
async fn controllers_of_the_mesh_are_stored_and_come_before_those_of_the_token() {
    let mut scene = Scene::new().await;
    let old = address(&scene.controller);
    let mut other = ScriptedController::start(&scene.ca).await.unwrap();
    let new = address(&other);
    let watch = scene.session(1).await;
    watch.send(changes(1, vec![mesh_with(&scene.ca, vec![new.clone()])])).await;
    assert_eq!(scene.daemon.controllers().await, [new, old]);
    drop(watch);
    other.watch().await.unwrap();

    // A start of the agent knows the new one too, also when it never saw a controller again.
    drop(scene.daemon);
    let _daemon = scene.node.start();
    let watch = other.watch().await.unwrap();
    assert_eq!(watch.start.revision, 1);
}

#[tokio::test]
async fn forged_controllers_are_not_taken() {
    let mut scene = Scene::new().await;
    let watch = scene.session(1).await;
    let forged = mesh_with(&Ca::new(2), vec!["192.0.2.1:7443".parse().unwrap()]);
    watch.send(changes(1, vec![forged, scene.upsert(2)])).await;
    scene.daemon.map().await;
    drop(watch);
    scene.controller.watch().await.unwrap();
    assert_eq!(scene.node.state.membership().unwrap().unwrap().mesh, mesh_config());
}

#[tokio::test]
async fn configured_controllers_override_all_others_at_once() {
    let mut scene = Scene::new().await;
    let _watch = scene.session(1).await;
    let mut other = ScriptedController::start(&scene.ca).await.unwrap();
    let wanted = vec![address(&other)];
    scene.daemon.configured.send_replace(wanted.clone());
    assert_eq!(scene.daemon.controllers().await, wanted);
    let reason = scene.daemon.disconnected().await;
    assert!(reason.contains("other controllers"), "{reason}");
    other.watch().await.unwrap();
}

#[tokio::test]
async fn what_was_learned_is_on_disk_for_a_start_without_a_controller() {
    let mut scene = Scene::new().await;
    let watch = scene.session(5).await;
    let tombstone = Tombstone(scene.ca.tombstone(3));
    watch.send(changes(3, vec![scene.upsert(2), tombstone])).await;
    scene.daemon.map().await;
    drop(watch);
    scene.daemon.disconnected().await;

    let map = scene.node.state.map(&scene.node.membership).unwrap();
    assert_eq!(map.position(), (5, 3));
    assert_eq!(map.changes().len(), 2);
    assert_eq!(map.tombstones().len(), 1);
}

#[tokio::test]
async fn another_epoch_is_watched_from_its_beginning_and_removes_nobody() {
    let mut scene = Scene::new().await;
    let watch = scene.session(5).await;
    watch.send(changes(9, vec![scene.upsert(2)])).await;
    scene.daemon.map().await;
    drop(watch);

    // The first watch tells the node that the epoch is another one; the second one brings what it knows.
    drop(scene.session(6).await);
    let watch = scene.session(6).await;
    watch.send(changes(1, vec![scene.upsert(3)])).await;
    assert_eq!(names(&scene.daemon.map().await), ["node-3"]);
    drop(watch);
    let watch = scene.controller.watch().await.unwrap();
    assert_eq!((watch.start.epoch, watch.start.revision), (6, 1));
}

#[tokio::test]
async fn a_forged_entry_is_refused_and_the_rest_is_taken() {
    let mut scene = Scene::new().await;
    let liar = Ca::new(2);
    let watch = scene.session(1).await;
    watch.send(changes(1, vec![upsert(&liar, 2), scene.upsert(3)])).await;
    assert_eq!(names(&scene.daemon.map().await), ["node-3"]);
}

#[tokio::test]
async fn a_record_is_published_and_offered_again_unchanged_in_the_next_session() {
    let mut scene = Scene::new().await;
    scene.daemon.announce(1000);
    let watch = scene.session(1).await;
    let (first, record) = scene.published().await;
    assert_eq!(record.generation, 1);
    drop(watch);

    let _watch = scene.session(1).await;
    assert_eq!(scene.published().await.0, first);

    scene.daemon.announce(2000);
    assert_eq!(scene.published().await.1.generation, 2);
    let counters = scene.node.state.counters().unwrap();
    assert_eq!(counters, Counters { boot_epoch: 0, generation: 2 });
}

#[tokio::test]
async fn a_node_whose_state_was_set_back_numbers_its_records_after_those_the_mesh_has() {
    let mut scene = Scene::new().await;
    let watch = scene.session(1).await;
    // The node's own record, as the mesh has it.
    let keys = scene.node.state.keys().unwrap();
    let record = pb::Record {
        node_id: vec![OWN; 16],
        generation: 41,
        wireguard_keys: vec![keys.wireguard.public().0.to_vec()],
        ..Default::default()
    };
    let own = pb::Entry {
        grant: Some(scene.node.membership.signed_grant.clone()),
        record: Some(keys.identity.sign_record(&record)),
        withheld: Vec::new(),
    };
    watch.send(changes(1, vec![Upsert(own), scene.upsert(2)])).await;
    scene.daemon.map().await;
    scene.daemon.announce(1000);
    assert_eq!(scene.published().await.1.generation, 42);
}

#[tokio::test]
async fn a_node_whose_state_was_set_back_is_not_refused_again_and_again() {
    const LIMIT: Duration = Duration::from_secs(20);
    let mut scene = Scene::new().await;
    scene.daemon.announce(1000);
    let keys = scene.node.state.keys().unwrap();
    // A later start than this one published it.
    let later = pb::Record {
        node_id: vec![OWN; 16],
        generation: 41,
        boot_epoch: 7,
        wireguard_keys: vec![keys.wireguard.public().0.to_vec()],
        ..Default::default()
    };
    let own = pb::Entry {
        grant: Some(scene.node.membership.signed_grant.clone()),
        record: Some(keys.identity.sign_record(&later)),
        withheld: Vec::new(),
    };
    let identity = scene.node.membership.grant.identity_key;
    let mut watches = Vec::new();
    let accepted = async {
        loop {
            match scene.controller.call().await.unwrap() {
                Call::Watch(watch) => {
                    watch.send(ready(1)).await;
                    watch.send(changes(1, vec![Upsert(own.clone())])).await;
                    watches.push(watch);
                }
                Call::Publish(request, reply) => {
                    let record: Record =
                        signed::record(request.record.as_ref(), &identity).unwrap();
                    if record.generation > later.generation {
                        let _ = reply.send(Ok(pb::PublishResponse::default()));
                        return record;
                    }
                    let _ = reply.send(Err(Status::failed_precondition("behind")));
                }
                _ => {}
            }
        }
    };
    let record = tokio::time::timeout(LIMIT, accepted).await.unwrap();
    assert_eq!((record.generation, record.boot_epoch), (42, 8));
    let boot_epoch = scene.daemon.event(|event| match event {
        Event::BootEpoch(boot_epoch) => Some(boot_epoch),
        _ => None,
    });
    assert_eq!(boot_epoch.await, 8);
    let counters = scene.node.state.counters().unwrap();
    assert_eq!(counters, Counters { boot_epoch: 8, generation: 42 });
}

#[tokio::test]
async fn a_silent_controller_is_left() {
    let mut scene = Scene::new().await;
    let watch = scene.controller.watch().await.unwrap();
    let pb::watch_response::Kind::Ready(mut soon) = ready(1) else { unreachable!() };
    soon.heartbeat_ms = 100;
    watch.send(pb::watch_response::Kind::Ready(soon)).await;
    assert!(scene.daemon.disconnected().await.contains("missed its heartbeats"));
    scene.controller.watch().await.unwrap();
}

#[tokio::test]
async fn a_refused_record_is_a_reason_and_not_the_end_of_the_session() {
    let mut scene = Scene::new().await;
    scene.daemon.announce(1000);
    let watch = scene.session(1).await;
    loop {
        if let Call::Publish(_, reply) = scene.controller.call().await.unwrap() {
            let _ = reply.send(Err(Status::invalid_argument("no such prefix")));
            break;
        }
    }
    let refused = scene
        .daemon
        .event(|event| match event {
            Event::Published(Err(reason)) => Some(reason),
            Event::Disconnected { reason } => panic!("disconnected: {reason}"),
            _ => None,
        })
        .await;
    assert!(refused.contains("no such prefix"), "{refused}");
    watch.send(changes(1, vec![scene.upsert(2)])).await;
    scene.daemon.map().await;
}

#[tokio::test]
async fn a_removed_node_learns_it_from_the_tombstone_it_is_refused_with() {
    let mut scene = Scene::new().await;
    let watch = scene.controller.watch().await.unwrap();
    let tombstone = scene.ca.tombstone(OWN).encode_to_vec();
    let code = tonic::Code::PermissionDenied;
    watch.fail(Status::with_details(code, "this node was removed", tombstone.into())).await;
    let own = scene.node.membership.grant.node_id;
    let is_own = |changes: &[MapChange]| matches!(changes, [MapChange::Remove(removed)] if removed.node_id == own);
    assert!(is_own(&scene.daemon.map().await));
    // It is on the disk before the session ends, so that a restart knows it too.
    scene.daemon.disconnected().await;
    let map = scene.node.state.map(&scene.node.membership).unwrap();
    assert!(is_own(&map.changes()));
}

#[tokio::test]
async fn a_removal_that_a_peer_tells_is_taken_if_the_authority_signed_it_and_told_to_others() {
    let mut scene = Scene::new().await;
    let _watch = scene.session(1).await;
    scene.daemon.event(|event| matches!(event, Event::Connected { .. }).then_some(())).await;
    let commands = scene.daemon.commands.clone();
    let forged = Ca::new(99).tombstone(3);
    commands.send(Command::Removed(forged)).await.unwrap();
    let tombstone = scene.ca.tombstone(4);
    commands.send(Command::Removed(tombstone.clone())).await.unwrap();
    let changes = scene.daemon.map().await;
    let [MapChange::Remove(removed)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(removed.node_id, NodeId([4; 16]), "and nothing of the forged one");
    let (reply, known) = oneshot::channel();
    commands.send(Command::Removals { since: 0, reply }).await.unwrap();
    assert_eq!(known.await.unwrap().tombstones, [tombstone]);
    // It is on the disk, so that a restart knows it too.
    let map = scene.node.state.map(&scene.node.membership).unwrap();
    assert!(map.is_removed(NodeId([4; 16])));
}

#[tokio::test]
async fn a_leave_that_nobody_waits_for_any_more_is_not_sent() {
    let mut scene = Scene::new().await;
    let mut watch = scene.session(1).await;
    scene.daemon.event(|event| matches!(event, Event::Connected { .. }).then_some(())).await;
    let (reply, given_up) = oneshot::channel();
    drop(given_up);
    let commands = scene.daemon.commands.clone();
    commands.send(Command::Leave(reply)).await.unwrap();
    commands.send(Command::Signal(NodeId([2; 16]), b"after it".to_vec())).await.unwrap();
    // Commands are handled in order, so the leave was handled when the signal comes.
    loop {
        let message = watch.requests.message().await.unwrap().unwrap();
        if matches!(message.kind, Some(pb::watch_request::Kind::Signal(_))) {
            break;
        }
    }
    let (reply, answer) = oneshot::channel();
    commands.send(Command::Leave(reply)).await.unwrap();
    let Call::Leave(call) = scene.controller.call().await.unwrap() else { panic!("not a leave") };
    let _ = call.send(Ok(pb::LeaveResponse::default()));
    answer.await.unwrap().unwrap();
    // Then the task ends.
    commands.closed().await;
}

#[tokio::test]
async fn a_certificate_near_its_end_is_renewed_before_the_watch() {
    // The certificate has expired: it was valid for half an hour, beginning an hour ago.
    let mut scene = Scene::with_certificate(Duration::from_secs(1800)).await;
    let Call::Renew(request, reply) = scene.controller.call().await.unwrap() else {
        panic!("something came before the renewal")
    };
    let csr = rcgen::CertificateSigningRequestParams::from_der(&request.csr.into()).unwrap();
    let identity = scene.node.membership.grant.identity_key;
    assert_eq!(csr.public_key.der_bytes(), identity.as_bytes());
    let fresh = scene.ca.issue("node", &csr.public_key, DAY);
    let certificate_chain = vec![fresh.to_vec()];
    let _ = reply.send(Ok(pb::RenewResponse { certificate_chain, grant: None }));
    scene.controller.watch().await.unwrap();
    assert_eq!(scene.node.state.certificate().unwrap().unwrap(), vec![fresh]);
}

#[tokio::test]
async fn another_meshs_controller_is_not_spoken_to() {
    let ca = Ca::new(1);
    let controller = ScriptedController::start(&Ca::new(2)).await.unwrap();
    let node = Node::new(&ca, &controller, DAY);
    let reason = node.start().disconnected().await;
    assert!(reason.contains("not this mesh's controller"), "{reason}");
}

#[tokio::test]
async fn leaving_is_told_to_the_controller_and_ends_the_task() {
    let mut scene = Scene::new().await;
    let _watch = scene.session(1).await;
    let (reply, left) = oneshot::channel();
    scene.daemon.commands.send(Command::Leave(reply)).await.unwrap();
    let Call::Leave(answer) = scene.controller.call().await.unwrap() else { panic!("not a leave") };
    let _ = answer.send(Ok(pb::LeaveResponse::default()));
    assert_eq!(left.await.unwrap(), Ok(()));
    while scene.daemon.events.recv().await.is_some() {}
}

/// A machine that is about to join a scripted controller.
struct Joining {
    ca: Ca,
    controller: ScriptedController,
    state: StateDir,
    _dir: tempfile::TempDir,
}

impl Joining {
    async fn new() -> Self {
        let ca = Ca::new(1);
        let controller = ScriptedController::start(&ca).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        Self { ca, controller, state, _dir: dir }
    }

    fn token(&self) -> JoinToken {
        JoinToken {
            ca: towline_service::certificate::fingerprint(&self.ca.certificate()),
            id: TokenId([1; 8]),
            secret: TokenSecret([2; 32]),
            controllers: vec![self.controller.address.to_string().parse().unwrap()],
        }
    }
}

fn hello(now_ms: i64) -> pb::HelloResponse {
    let proof_key = towline_agent::keys::Wireguard::generate().unwrap().public();
    pb::HelloResponse {
        server_time_ms: now_ms,
        proof_key: proof_key.0.to_vec(),
        ..Default::default()
    }
}

fn now_ms() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_millis()).unwrap()
}

#[tokio::test]
async fn a_join_stores_what_it_was_given_and_a_second_one_changes_nothing() {
    let mut joining = Joining::new().await;
    let (token, name) = (joining.token(), "node-1".parse().unwrap());
    let Joining { ca, controller, state, .. } = &mut joining;
    let serve = async {
        let Call::Hello(reply) = controller.call().await.unwrap() else { panic!("not a hello") };
        let _ = reply.send(Ok(hello(now_ms())));
        let Call::Join(request, reply) = controller.call().await.unwrap() else {
            panic!("not a join")
        };
        assert_eq!(request.name, "node-1");
        assert_eq!(request.token_secret, [2; 32]);
        let keys = state.keys().unwrap();
        let csr = rcgen::CertificateSigningRequestParams::from_der(&request.csr.into()).unwrap();
        let answer = pb::JoinResponse {
            grant: Some(ca.grant(&own_grant(OWN, &keys))),
            mesh: Some(ca.mesh()),
            certificate_chain: vec![ca.issue("node", &csr.public_key, DAY).to_vec()],
        };
        let _ = reply.send(Ok(answer));
    };
    let (joined, ()) = tokio::join!(join::join(state, &token, &name, 0), serve);
    assert!(matches!(joined.unwrap(), Joined::New(_)));
    let again = join::join(state, &token, &name, 0).await.unwrap();
    assert!(matches!(again, Joined::Already(_)));
    let other = join::join(state, &token, &"other".parse().unwrap(), 0).await;
    assert!(matches!(other, Err(JoinError::OtherName { .. })));
}

#[tokio::test]
async fn a_join_with_another_meshs_token_says_nothing_to_the_controller() {
    let joining = Joining::new().await;
    let foreign = JoinToken { ca: Fingerprint([9; 32]), ..joining.token() };
    let error = join::join(&joining.state, &foreign, &"a".parse().unwrap(), 0).await.unwrap_err();
    assert!(error.to_string().contains("not this mesh's controller"), "{error}");
    assert!(joining.state.membership().unwrap().is_none());
}

#[tokio::test]
async fn a_join_with_a_wrong_clock_spends_no_token() {
    for (skew_ms, direction) in [(3_600_000, "behind"), (-3_600_000, "ahead")] {
        let mut joining = Joining::new().await;
        let (token, name) = (joining.token(), "node-1".parse().unwrap());
        let Joining { controller, state, .. } = &mut joining;
        let serve = async {
            let Call::Hello(reply) = controller.call().await.unwrap() else {
                panic!("not a hello")
            };
            let _ = reply.send(Ok(hello(now_ms() + skew_ms)));
        };
        let (joined, ()) = tokio::join!(join::join(state, &token, &name, 0), serve);
        let error = joined.unwrap_err().to_string();
        assert!(error.contains(direction) && error.contains("clock"), "{error}");
    }
}

#[tokio::test]
async fn agents_that_joined_a_controller_see_each_other_until_one_leaves() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let (a, b) = tokio::join!(Node::join(&controller, "a"), Node::join(&controller, "b"));
    let (daemon_a, mut daemon_b) = (a.start(), b.start());

    daemon_a.announce(1000);
    let record = loop {
        let seen = daemon_b.map().await.into_iter().find_map(|change| match change {
            MapChange::Upsert(node) => Some(node),
            _ => None,
        });
        if let Some(node) = seen {
            assert_eq!(*node.grant(), a.membership.grant);
            break node.record().clone();
        }
    };
    assert_eq!(record.candidates, [candidate("192.0.2.1:1000")]);

    let (reply, left) = oneshot::channel();
    daemon_a.commands.send(Command::Leave(reply)).await.unwrap();
    assert_eq!(left.await.unwrap(), Ok(()));
    let removed = loop {
        let changes = daemon_b.map().await;
        if let Some(MapChange::Remove(tombstone)) = changes.into_iter().next() {
            break tombstone.node_id;
        }
    };
    assert_eq!(removed, a.membership.grant.node_id);
    controller.stop().await;
}

#[tokio::test]
async fn a_connected_node_gets_the_role_that_an_operator_gives_it() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let node = Node::join(&controller, "a").await;
    assert_eq!(node.membership.grant.relay, RelayRole::Denied);
    let mut daemon = node.start();
    daemon.announce(1000);
    daemon.event(|event| matches!(event, Event::Published(Ok(_))).then_some(())).await;
    let request = pb::SetNodeRequest { name: "a".into(), relay: Some(true) };
    controller.admin().await.set_node(request).await.unwrap();
    let grant = daemon
        .event(|event| match event {
            Event::Grant(grant) => Some(grant),
            _ => None,
        })
        .await;
    assert_eq!(grant.relay, RelayRole::Granted);
    assert_eq!(node.state.membership().unwrap().unwrap().grant, *grant, "the next start knows it");
    controller.stop().await;
}

#[tokio::test]
async fn a_summary_of_an_agent_is_in_the_matrix_of_its_mesh() {
    let root = tempfile::tempdir().unwrap();
    let controller = TestController::start(root.path());
    let (a, b) = tokio::join!(Node::join(&controller, "a"), Node::join(&controller, "b"));
    let mut daemon = a.start();
    daemon.event(|event| matches!(event, Event::Connected { .. }).then_some(())).await;
    let mut summary = MeshSummary::default();
    summary.counts.add(&Tunnel::Direct);
    summary.peers.push(PeerSummary {
        node: b.membership.grant.node_id,
        tunnel: Tunnel::Direct,
        rtt_us: Some(420),
        loss_permille: Some(0),
        mtu: Some(1420),
        reason_code: None,
    });
    daemon.commands.send(Command::Summary(Box::new(summary))).await.unwrap();

    let mut admin = controller.admin().await;
    let nodes = loop {
        let request = pb::ListTunnelsRequest::default();
        let nodes = admin.list_tunnels(request).await.unwrap().into_inner().nodes;
        if nodes[0].reported_seconds.is_some() {
            break nodes;
        }
    };
    let matrix = Matrix::of(&nodes);
    assert_eq!(matrix.names, ["a", "b"]);
    assert_eq!(matrix.cells, [["", "0.42 ms"], ["?", ""]]);
    controller.stop().await;
}
