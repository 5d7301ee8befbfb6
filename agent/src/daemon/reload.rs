//! Applies a changed configuration while the agent runs.

use std::time::Instant;

use super::Daemon;
use super::start::configure;
use crate::config::Config;
use crate::static_peers;

impl Daemon {
    /// Reads the configuration again on SIGHUP and applies what can change while the agent runs. A
    /// file that does not parse changes nothing.
    pub(super) fn reload(&mut self) {
        let fresh = match Config::load(self.config_path.as_deref()) {
            Ok(fresh) => fresh,
            Err(error) => {
                tracing::error!(%error, "configuration not reloaded: keeping the current one");
                return;
            }
        };
        let static_peers = match static_peers::load(&fresh.peers) {
            Ok(static_peers) => static_peers,
            Err(error) => {
                tracing::error!(%error, "configuration not reloaded: keeping the current one");
                return;
            }
        };
        let mut kept = fresh.clone();
        kept.node = self.config.node.clone();
        kept.peers.clone_from(&self.config.peers);
        kept.controller.clone_from(&self.config.controller);
        kept.trust.clone_from(&self.config.trust);
        kept.state_dir.clone_from(&self.config.state_dir);
        kept.socket.clone_from(&self.config.socket);
        if kept != self.config {
            tracing::warn!(
                "only [node], [controller], [trust] and [[peer]] were reloaded: restart the agent to \
                 apply the rest"
            );
        }
        self.config.node = fresh.node;
        self.config.peers = fresh.peers;
        self.config.controller = fresh.controller;
        self.config.trust = fresh.trust;
        self.controller.set_configured(self.config.controller.addresses.clone());
        let now = Instant::now();
        configure(&mut self.mesh, now, &self.config, self.at_join.networks.clone());
        self.update_limits();
        self.map_age.set_limit(self.config.max_map_age());
        self.begin_map_age();
        self.host.set_requires_inverse_guard(self.config.trust.require_inverse_guard);
        self.mesh.set_static_peers(now, static_peers);
        self.configuration_changed();
        tracing::info!("configuration reloaded");
    }
}
