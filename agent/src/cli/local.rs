//! Connection of the command line to the agent of this machine.

use std::path::Path;

use anyhow::Context as _;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use towline_proto::code::Coded as _;
use towline_proto::pb::local_client::LocalClient;
use towline_proto::{limits, pb};
use towline_service::grpc;

use crate::doctor::Answers;
use crate::down::MachineState;

/// Runs `work` on a new runtime, with a client for the agent's socket.
pub(crate) fn with_agent<T>(
    socket: &Path,
    work: impl AsyncFnOnce(LocalClient<Channel>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    runtime()?.block_on(async { work(connect(socket).await?).await })
}

/// Asks the agent for its status.
pub(super) fn status(socket: &Path) -> anyhow::Result<pb::StatusResponse> {
    with_agent(socket, async |mut agent| {
        let answer = agent.status(pb::StatusRequest {}).await;
        Ok(answer.map_err(|status| status_error(&status))?.into_inner())
    })
}

/// Asks the agent for its status and its peers.
pub(super) fn ask(socket: &Path) -> anyhow::Result<Answers> {
    with_agent(socket, async |mut agent| {
        let status = agent.status(pb::StatusRequest {}).await;
        let status = status.map_err(|status| status_error(&status))?.into_inner();
        // A machine that is down has no peers.
        if status.state == MachineState::Down.code() {
            return Ok(Answers { status, peers: Vec::new() });
        }
        let peers = agent.peers(pb::PeersRequest {}).await;
        let peers = peers.map_err(|status| status_error(&status))?.into_inner().peers;
        Ok(Answers { status, peers })
    })
}

/// Asks the agent for the paths of a peer. There are none for a name that it does not know, and from an agent
/// of an older version.
pub(super) fn paths(socket: &Path, peer: &str) -> Vec<pb::PathStatus> {
    let request = pb::PeerRequest { node: peer.to_owned() };
    let answer = with_agent(socket, async |mut agent| {
        let answer = agent.peer(request).await;
        Ok(answer.map_err(|status| status_error(&status))?.into_inner())
    });
    answer.map(|answer| answer.paths).unwrap_or_default()
}

/// Returns a runtime for one command.
pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

async fn connect(socket: &Path) -> anyhow::Result<LocalClient<Channel>> {
    let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            anyhow::anyhow!(
                "cannot connect to the agent at {}: permission denied: run this as root",
                socket.display()
            )
        }
        _ => anyhow::anyhow!(
            "no agent is running: nothing listens at {}: start `towline agent`, or set --socket",
            socket.display()
        ),
    })?;
    let channel = grpc::channel(Endpoint::from_static("http://agent"), stream)
        .await
        .context("cannot open a gRPC connection to the agent")?;
    Ok(LocalClient::new(channel).max_decoding_message_size(16 * limits::MESSAGE_BYTES))
}

/// Converts the status with which the agent refused a request to an error.
pub(super) fn status_error(status: &tonic::Status) -> anyhow::Error {
    let words = grpc::message(status);
    anyhow::anyhow!(if words.is_empty() { status.code().to_string() } else { words })
}
