//! Implements `towline down`, `towline leave` and the undoing of a join, with and without a running
//! daemon.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;

use super::{Daemon, Exit, host_controller};
use crate::config::Config;
use crate::control::DownAnswer;
use crate::down::DownMarker;
use crate::join;
use crate::state::{Keys, Membership, StateDir};

/// Maximum time to inform a controller that a join is undone.
const UNDO_LIMIT: Duration = Duration::from_secs(10);

/// A `towline leave` that waits for a controller. The daemon keeps running meanwhile.
pub(super) struct Leaving {
    /// Informs a controller that this node leaves.
    informing: Pin<Box<dyn Future<Output = Result<(), String>> + Send>>,
    /// True if the node leaves even if no controller can be informed.
    is_forced: bool,
    /// Receivers of the result: each `towline leave` that was run meanwhile.
    replies: Vec<oneshot::Sender<Result<(), String>>>,
}

/// Waits until a controller was informed, or forever if this node is not leaving.
pub(super) async fn informed(leaving: &mut Option<Leaving>) -> Result<(), String> {
    match leaving {
        Some(leaving) => leaving.informing.as_mut().await,
        None => std::future::pending().await,
    }
}

impl Daemon {
    /// Stops the data plane and removes everything that Towline created on the host.
    pub(super) fn open_host(&mut self) -> Result<(), String> {
        self.close_wireguard_socket();
        if let Err(error) = self.tunnels.data_plane().stop() {
            tracing::error!(%error, "data plane hangs: opening the host anyway");
        }
        self.host.remove()
    }

    pub(super) fn down(&mut self) -> Result<DownAnswer, String> {
        // The marker is set first: if the agent ends halfway, its next start opens the host.
        let marker = DownMarker::of(&self.config).set(SystemTime::now());
        self.open_host()?;
        Ok(DownAnswer::new(false, marker))
    }

    /// Begins to leave the mesh: informs a controller. [`Self::finish_leave`] does the rest.
    pub(super) fn leave(&mut self, force: bool, reply: oneshot::Sender<Result<(), String>>) {
        if self.mesh.grant().is_none() {
            let why = "this machine has not joined a mesh: run `towline down` to open it";
            let _ = reply.send(Err(why.into()));
            return;
        }
        let leaving = self.leaving.get_or_insert_with(|| Leaving {
            informing: Box::pin(self.controller.leave()),
            is_forced: false,
            replies: Vec::new(),
        });
        leaving.is_forced |= force;
        leaving.replies.retain(|reply| !reply.is_closed());
        leaving.replies.push(reply);
    }

    /// Leaves the mesh once a controller was informed, or could not be. Returns why the daemon has
    /// to end, if it left.
    pub(super) fn finish_leave(&mut self, informed: Result<(), String>) -> Option<Exit> {
        let leaving = self.leaving.take()?;
        let result = self.leave_now(informed, leaving.is_forced);
        for reply in leaving.replies {
            let _ = reply.send(result.clone());
        }
        result.is_ok().then_some(Exit::Left)
    }

    /// Answers a leave that still waits while the daemon ends.
    pub(super) fn abandon_leave(&mut self) {
        let why = "the agent was stopped or brought down before a controller answered: run \
                   `towline leave` again";
        for reply in self.leaving.take().into_iter().flat_map(|leaving| leaving.replies) {
            let _ = reply.send(Err(why.into()));
        }
    }

    fn leave_now(&mut self, informed: Result<(), String>, force: bool) -> Result<(), String> {
        match informed {
            Ok(()) => {}
            Err(_) if self.mesh.is_removed() => {}
            Err(error) if force => {
                tracing::warn!(%error, "no controller informed: leaving anyway");
            }
            Err(error) => return Err(error),
        }
        self.open_host()?;
        self.state.forget().map_err(|error| error.to_string())
    }
}

/// Opens the host without a running agent.
pub fn open_host(config: &Config) -> anyhow::Result<()> {
    host_controller::remove(config)
}

/// Leaves the mesh without a running agent: informs a controller, opens the host, and removes the
/// membership.
///
/// With `force`, the machine leaves even if no controller can be informed.
pub async fn leave(config: &Config, state: &StateDir, force: bool) -> anyhow::Result<()> {
    let membership = state.require_membership()?;
    let keys = state.keys()?;
    if let Err(error) = inform_controller(config, state, &membership, &keys).await {
        if !force {
            return Err(
                error.context("still a member (--force forgets the mesh on this machine anyway)")
            );
        }
        tracing::warn!(error = %format!("{error:#}"), "no controller informed: leaving anyway");
    }
    open_host(config)?;
    state.forget()?;
    Ok(())
}

/// Undoes a join that was not confirmed in time, even if no controller can be informed. The host is
/// already open.
pub(super) async fn undo_join(config: &Config, state: &StateDir) -> anyhow::Result<()> {
    let informed = async {
        let (membership, keys) = (state.require_membership()?, state.keys()?);
        inform_controller(config, state, &membership, &keys).await
    };
    let informed = tokio::time::timeout(UNDO_LIMIT, informed).await;
    let informed =
        informed.unwrap_or_else(|_| Err(anyhow::anyhow!("no controller answered in time")));
    if let Err(error) = informed {
        tracing::warn!(error = %format!("{error:#}"), "no controller informed: undoing the join");
    }
    // Files can be removed on a full disk, but the reason may not fit.
    if let Err(error) = state.store_undone("undone: not confirmed in time with `towline confirm`") {
        tracing::warn!(%error, "reason for undoing the join not stored");
    }
    state.forget()?;
    Ok(())
}

/// Informs the first reachable controller that this node leaves.
async fn inform_controller(
    config: &Config,
    state: &StateDir,
    membership: &Membership,
    keys: &Keys,
) -> anyhow::Result<()> {
    let chain = state.certificate()?.unwrap_or_default();
    let tls = crate::tls::member(&membership.ca, Some((&chain, &keys.identity)))?;
    let tls = Arc::new(tls);
    let mut last = anyhow::anyhow!("no controller is known");
    for address in join::controllers(&config.controller.addresses, membership) {
        let informed = async {
            let connection = crate::dial::dial(&address, tls.clone(), config.routing.mark).await?;
            let request = towline_proto::pb::LeaveRequest {};
            let answer = join::client(connection.channel).leave(request).await;
            answer.map_err(|status| anyhow::anyhow!(join::status_message(&status)))?;
            anyhow::Ok(())
        };
        match informed.await {
            Ok(()) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}
