//! Prefixes that this node announces, and the cache of them for the next boot.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use tokio::sync::watch;

use super::Daemon;
use crate::config::Addressing;
use crate::node_ip::NodeIps;
use crate::prefixes::{PrefixSource, PrefixUpdate};
use crate::state::{CachedPrefixes, StateDir};

impl Daemon {
    /// Updates the node IPs. With `node.addressing = "overlay"` there are none to announce.
    pub(super) fn node_ips_changed(&mut self, excluded: &[IpNet]) {
        let node = &self.config.node;
        let found = match node.addressing {
            Addressing::Overlay => NodeIps::default(),
            Addressing::NodeIp if !node.node_ips.is_empty() => {
                NodeIps::first(node.node_ips.iter().copied())
            }
            Addressing::NodeIp => NodeIps::first(self.host.node_ips(excluded.to_vec())),
        };
        self.node_ips = found.iter().collect();
        let prefixes = self.node_ips.iter().copied().map(IpNet::from).collect();
        let update = PrefixUpdate { source: PrefixSource::NodeIp, prefixes };
        if self.prefixes.set(update) {
            self.prefixes_changed();
        }
    }

    /// Stores what the guards are derived from, for the next boot.
    pub(super) fn remember(&self) {
        let now = CachedPrefixes {
            announced: self.announced.announced.clone(),
            pods: self.prefixes.pods(&self.announced),
            node_ips: self.own_node_ips(),
            withdrawn: self.mesh.withdrawn().iter().copied().collect(),
        };
        self.remembered.send_if_modified(|before| {
            let changed = *before != now;
            *before = now;
            changed
        });
    }

    /// Returns the node IPs that are announced.
    fn own_node_ips(&self) -> Vec<IpAddr> {
        let announced = |ip: &&IpAddr| self.announced.announced.contains(&IpNet::from(**ip));
        self.node_ips.iter().filter(announced).copied().collect()
    }

    pub(super) fn configured_prefixes(&mut self) {
        let prefixes = self.config.node.prefixes.clone();
        self.prefixes.set(PrefixUpdate { source: PrefixSource::Configuration, prefixes });
    }

    pub(super) fn prefix_update(&mut self, update: PrefixUpdate) {
        if self.prefixes.set(update) {
            self.prefixes_changed();
        }
    }

    /// Selects the announced prefixes again, after a source, the filter or the grant changed.
    pub(super) fn prefixes_changed(&mut self) {
        let filter = self.config.prefix_filter();
        // Without a mesh there are no nodes to announce prefixes to.
        let Some(membership) = &self.membership else { return };
        self.announced = self.prefixes.select(filter, &membership.grant);
        let prefixes = self.announced.announced.clone();
        let now = Instant::now();
        self.mesh.set_prefixes(now, prefixes.clone());
        self.mesh.set_pod_networks(now, self.prefixes.pods(&self.announced));
        self.mesh.set_node_ips(now, self.own_node_ips());
        self.remember();
        self.announcements.send_if_modified(|announcement| match announcement {
            Some(announcement) if announcement.prefixes != prefixes => {
                announcement.prefixes = prefixes;
                true
            }
            _ => false,
        });
    }
}

/// Starts a task that stores the latest prefixes, one write at a time.
pub(super) fn remember(
    state: Arc<StateDir>,
    first: CachedPrefixes,
) -> watch::Sender<CachedPrefixes> {
    let (sender, mut receiver) = watch::channel(first);
    tokio::spawn(async move {
        while receiver.changed().await.is_ok() {
            let (state, prefixes) = (state.clone(), receiver.borrow_and_update().clone());
            let write = move || state.store_prefixes(&prefixes);
            if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
                tracing::warn!(%error, "prefixes not stored for the next boot");
            }
        }
    });
    sender
}
