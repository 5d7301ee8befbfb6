//! `towline down` and `towline leave`, with a running agent and without one.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Daemon, host};
use crate::config::Config;
use crate::discovery;
use crate::join;
use crate::state::{Keys, Membership, StateDir};

impl Daemon {
    pub(super) fn open_host(&mut self) -> Result<(), String> {
        self.data_plane.stop();
        self.host.remove()
    }

    pub(super) async fn leave(&mut self) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let stopped = "the discovery task has stopped";
        let Some(commands) = &self.commands else {
            return Err("this machine is in no mesh: `towline down` opens it".into());
        };
        commands.send(discovery::Command::Leave(reply)).await.map_err(|_| stopped.to_owned())?;
        // Events that the task is about to send must not block its answer.
        let mut answer = answer;
        let result = loop {
            tokio::select! {
                result = &mut answer => break result.map_err(|_| stopped.to_owned())?,
                Some(event) = self.inputs.discovery.recv() => self.discovery_event(event),
            }
        };
        if !self.removed {
            result?;
        }
        self.open_host()?;
        self.state.forget().map_err(|error| error.to_string())
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
