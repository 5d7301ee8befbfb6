//! Tests of `towline leave` with a whole agent and a scripted controller.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use towline_agent::config::Config;
use towline_agent::daemon::{self, Purpose};
use towline_agent::state::StateDir;
use towline_fixtures::ca::Ca;
use towline_netlink::Rtnetlink;
use towline_netns::namespace_test;
use towline_proto::pb;
use towline_proto::pb::local_client::LocalClient;
use towline_tests::scripted::{Call, Reply, ScriptedController, Watch, enroll, ready};

const OWN: u8 = 1;
const DAY: Duration = Duration::from_secs(86_400);
/// Longest wait for a condition. It only bounds a failing test.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Creates the state of a node, and returns its configuration.
fn member(directory: &Path, ca: &Ca, controller: &ScriptedController) -> Config {
    let state = StateDir::open(&directory.join("state")).unwrap();
    enroll(&state, OWN, ca, controller.address, DAY).unwrap();
    let text = format!(
        "state_dir = {:?}\nsocket = {:?}\n[kubernetes]\nkubeconfig = {:?}\n",
        directory.join("state"),
        directory.join("agent.sock"),
        directory.join("no-kubeconfig"),
    );
    Config::parse(&text, Path::new("agent.toml")).unwrap()
}

async fn agent(config: &Config) -> LocalClient<Channel> {
    let begun = Instant::now();
    let endpoint = Endpoint::from_shared(format!("unix://{}", config.socket.display())).unwrap();
    loop {
        match endpoint.connect().await {
            Ok(channel) => return LocalClient::new(channel),
            Err(error) => assert!(begun.elapsed() < TIMEOUT, "{error}"),
        }
        tokio::task::yield_now().await;
    }
}

/// Waits until the agent has a session with the controller.
async fn connected(agent: &mut LocalClient<Channel>, controller: &mut ScriptedController) -> Watch {
    let watch = controller.watch().await.unwrap();
    watch.send(ready(1)).await;
    let begun = Instant::now();
    loop {
        let status = agent.status(pb::StatusRequest {}).await.unwrap().into_inner();
        if status.controller.unwrap().connected {
            return watch;
        }
        assert!(begun.elapsed() < TIMEOUT, "no session");
    }
}

/// Waits for a call to `Leave`. Other calls stay unanswered.
async fn leave_call(controller: &mut ScriptedController) -> Reply<pb::LeaveResponse> {
    loop {
        if let Call::Leave(reply) = controller.call().await.unwrap() {
            return reply;
        }
    }
}

/// Thread of an agent.
type Daemon = thread::JoinHandle<anyhow::Result<()>>;

/// Runs `scene` with an agent that has a session with a scripted controller.
fn with_agent<F: Future<Output = ()>>(
    scene: impl FnOnce(Config, LocalClient<Channel>, ScriptedController, Daemon) -> F,
) {
    let mut rtnetlink = Rtnetlink::open().unwrap();
    let loopback = rtnetlink.link_index("lo").unwrap();
    rtnetlink.set_up(loopback, true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let ca = Ca::new(9);
        let mut controller = ScriptedController::start(&ca).await.unwrap();
        let config = member(directory.path(), &ca, &controller);
        let running = config.clone();
        // A relay alone needs no TUN device.
        let daemon = thread::spawn(move || daemon::run(running, None, Purpose::Relay));
        let mut client = agent(&config).await;
        let _watch = connected(&mut client, &mut controller).await;
        scene(config, client, controller, daemon).await;
    });
}

/// Runs `towline leave`.
fn leave(client: &LocalClient<Channel>) -> JoinHandle<Result<(), tonic::Status>> {
    let mut client = client.clone();
    let request = pb::LocalLeaveRequest { force: false };
    tokio::spawn(async move { client.leave(request).await.map(drop) })
}

namespace_test! {
    fn the_agent_answers_others_while_a_leave_waits_for_its_controller() {
        with_agent(async |config, mut client, mut controller, daemon| {
            let left = leave(&client);
            let call = leave_call(&mut controller).await;
            let status = client.status(pb::StatusRequest {}).await.unwrap().into_inner();
            assert_eq!((status.name.as_str(), status.state.as_str()), ("node-1", "running"));
            assert!(!left.is_finished(), "the controller has not answered");
            assert!(client.peers(pb::PeersRequest {}).await.is_ok());

            let _ = call.send(Ok(pb::LeaveResponse::default()));
            left.await.unwrap().unwrap();
            tokio::task::spawn_blocking(|| daemon.join().unwrap().unwrap()).await.unwrap();
            assert!(StateDir::peek(&config.state_dir).membership().unwrap().is_none());
        });
    }
}

namespace_test! {
    fn a_leave_that_waits_while_the_agent_goes_down_is_told_to_try_again() {
        with_agent(async |config, mut client, mut controller, _daemon| {
            let left = leave(&client);
            let _call = leave_call(&mut controller).await;
            client.down(pb::DownRequest {}).await.unwrap();
            let error = left.await.unwrap().unwrap_err();
            assert!(error.message().contains("run `towline leave` again"), "{error}");
            assert!(StateDir::peek(&config.state_dir).membership().unwrap().is_some());
        });
    }
}
