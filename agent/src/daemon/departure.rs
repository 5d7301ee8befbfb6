//! `towline down`, `towline leave` and the undoing of a join, with a running daemon and without.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;

use super::{Daemon, host};
use crate::config::Config;
use crate::control::DownAnswer;
use crate::discovery;
use crate::down::DownMarker;
use crate::join;
use crate::state::{Keys, Membership, StateDir};

/// How long a controller may take to be told that a join is undone.
const UNDO_LIMIT: Duration = Duration::from_secs(10);

impl Daemon {
    /// Takes away all that is ours. From here on nothing enters the tunnel.
    pub(super) fn open_host(&mut self) -> Result<(), String> {
        if let Err(error) = self.data_plane.stop() {
            tracing::error!(%error, "data plane hangs: the host is opened all the same");
        }
        self.host.remove()
    }

    pub(super) fn down(&mut self) -> Result<DownAnswer, String> {
        // The marker first: an agent that ends half-way opens the host at its next start.
        let marker = DownMarker::of(&self.config).set(SystemTime::now());
        self.open_host()?;
        Ok(DownAnswer::new(false, marker))
    }

    pub(super) async fn leave(&mut self, force: bool) -> Result<(), String> {
        if self.membership.is_none() {
            return Err("this machine is in no mesh: `towline down` opens it".into());
        }
        let told = self.tell_controller().await;
        match told {
            Ok(()) => {}
            Err(_) if self.removed => {}
            Err(error) if force => tracing::warn!(%error, "no controller was told"),
            Err(error) => return Err(error),
        }
        self.open_host()?;
        self.state.forget().map_err(|error| error.to_string())
    }

    async fn tell_controller(&mut self) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let stopped = || "the discovery task has stopped".to_owned();
        let Some(commands) = &self.commands else { return Err(stopped()) };
        commands.send(discovery::Command::Leave(reply)).await.map_err(|_| stopped())?;
        // Events that the task is about to send must not block its answer.
        let mut answer = answer;
        loop {
            tokio::select! {
                result = &mut answer => return result.map_err(|_| stopped())?,
                Some(event) = self.inputs.discovery.recv() => self.discovery_event(event),
            }
        }
    }
}

/// Opens the host without a running agent.
pub fn open_host(config: &Config) -> anyhow::Result<()> {
    host::remove(config)
}

/// Leaves the mesh without a running agent: tells a controller, opens the host, forgets.
///
/// With `force`, a controller that cannot be told is no obstacle.
pub async fn leave(config: &Config, state: &StateDir, force: bool) -> anyhow::Result<()> {
    let membership = state.require_membership()?;
    let keys = state.keys()?;
    if let Err(error) = tell_controller(config, state, &membership, &keys).await {
        if !force {
            return Err(error.context("still a member (--force forgets the mesh here anyway)"));
        }
        tracing::warn!(error = %format!("{error:#}"), "no controller was told");
    }
    open_host(config)?;
    state.forget()?;
    Ok(())
}

/// Undoes a join that was not confirmed. The host is open; a controller that cannot be told is no
/// obstacle.
pub(super) async fn undo_join(config: &Config, state: &StateDir) -> anyhow::Result<()> {
    let told = async {
        let (membership, keys) = (state.require_membership()?, state.keys()?);
        tell_controller(config, state, &membership, &keys).await
    };
    let told = tokio::time::timeout(UNDO_LIMIT, told).await;
    let told = told.unwrap_or_else(|_| Err(anyhow::anyhow!("it did not answer in time")));
    if let Err(error) = told {
        tracing::warn!(error = %format!("{error:#}"), "no controller was told that the join is undone");
    }
    // A full disk can forget, but not remember why.
    if let Err(error) = state.store_undone("undone: not confirmed in time with `towline confirm`") {
        tracing::warn!(%error, "the reason of the undoing is not kept");
    }
    state.forget()?;
    Ok(())
}

async fn tell_controller(
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
        let told = async {
            let connection = crate::dial::dial(&address, tls.clone(), config.routing.mark).await?;
            let request = towline_proto::pb::LeaveRequest {};
            let answer = join::client(connection.channel).leave(request).await;
            answer.map_err(|status| anyhow::anyhow!(join::refusal(&status)))?;
            anyhow::Ok(())
        };
        match told.await {
            Ok(()) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}
