//! What this node announces to the mesh: its candidates, the networks that are reached through it,
//! and whether it relays or has an API server. Keeps what the guards need of it for the next boot.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use tokio::sync::watch;
use towline_core::mesh::Mesh;
use towline_proto::node::Candidate;

use crate::config::Config;
use crate::discovery::Announcement;
use crate::node_ip::NodeIps;
use crate::prefixes::{Filter, NotAnnounced, PrefixSource, PrefixUpdate, Prefixes, Selection};
use crate::state::{CachedPrefixes, StateDir};

/// Prefixes of all sources, and what of them is announced.
#[derive(Debug)]
pub(super) struct Announcer {
    prefixes: Prefixes,
    /// Node IPs of this host, by which other nodes reach it.
    node_ips: Vec<IpAddr>,
    /// Announced prefixes, as of the last [`Self::select`].
    selection: Selection,
    is_relay: bool,
    /// TCP port of this machine's Kubernetes API server, if it has one.
    api_port: Option<NonZeroU16>,
    /// What is stored for the next boot.
    remembered: watch::Sender<CachedPrefixes>,
    /// What the discovery client publishes. `None` before the core named the first candidates.
    announcements: watch::Sender<Option<Announcement>>,
}

impl Announcer {
    /// Creates an announcer, and starts the task that stores its prefixes in `state`. The receiver
    /// gets what is to be published.
    pub(super) fn new(
        state: Arc<StateDir>,
        cached: CachedPrefixes,
        config: &Config,
        is_relay: bool,
    ) -> (Self, watch::Receiver<Option<Announcement>>) {
        let (announcements, announced) = watch::channel(None);
        let announcer = Self {
            prefixes: Prefixes::default(),
            node_ips: Vec::new(),
            selection: Selection::default(),
            is_relay,
            api_port: config.kubernetes.api_port,
            remembered: store_changes(state, cached),
            announcements,
        };
        (announcer, announced)
    }

    /// Sets whether this node is a relay.
    pub(super) fn set_relay(&mut self, is_relay: bool) {
        self.is_relay = is_relay;
        self.announcements.send_if_modified(|announcement| match announcement {
            Some(announcement) if announcement.relay != is_relay => {
                announcement.relay = is_relay;
                true
            }
            _ => false,
        });
    }

    /// Handles the networks of one source.
    pub(super) fn handle(&mut self, mesh: &mut Mesh, filter: Filter<'_>, update: PrefixUpdate) {
        if self.prefixes.set(update) {
            self.select(mesh, filter);
        }
    }

    /// Sets the prefixes of the configuration, whose filter may have changed too.
    pub(super) fn set_configured(
        &mut self,
        mesh: &mut Mesh,
        filter: Filter<'_>,
        prefixes: Vec<IpNet>,
    ) {
        self.prefixes.set(PrefixUpdate { source: PrefixSource::Configuration, prefixes });
        self.select(mesh, filter);
    }

    /// Sets the node IPs, which are a source of prefixes too.
    pub(super) fn set_node_ips(&mut self, mesh: &mut Mesh, filter: Filter<'_>, found: &NodeIps) {
        self.node_ips = found.iter().collect();
        let prefixes = self.node_ips.iter().copied().map(IpNet::from).collect();
        self.handle(mesh, filter, PrefixUpdate { source: PrefixSource::NodeIp, prefixes });
    }

    /// Sets the candidates that the core announces.
    pub(super) fn set_candidates(&self, candidates: Vec<Candidate>) {
        let prefixes = self.selection.announced.clone();
        let lans = self.selection.lans.clone();
        let (relay, api_port) = (self.is_relay, self.api_port);
        let announcement = Announcement { candidates, prefixes, lans, relay, api_port };
        self.announcements.send_replace(Some(announcement));
    }

    /// Selects the announced prefixes again, after a source, the filter or the grant changed.
    pub(super) fn select(&mut self, mesh: &mut Mesh, filter: Filter<'_>) {
        // Without a mesh there are no nodes to announce prefixes to.
        let Some(grant) = mesh.grant() else { return };
        self.selection = self.prefixes.select(filter, grant);
        let Selection { announced: prefixes, lans, .. } = self.selection.clone();
        let now = Instant::now();
        mesh.set_prefixes(now, prefixes.clone());
        mesh.set_pod_networks(now, self.pods());
        mesh.set_node_ips(now, self.announced_node_ips());
        self.remember(mesh);
        self.announcements.send_if_modified(|announcement| match announcement {
            Some(announcement)
                if (&announcement.prefixes, &announcement.lans) != (&prefixes, &lans) =>
            {
                (announcement.prefixes, announcement.lans) = (prefixes, lans);
                true
            }
            _ => false,
        });
    }

    /// Stores what the guards are derived from, for the next boot.
    pub(super) fn remember(&self, mesh: &Mesh) {
        let now = CachedPrefixes {
            announced: self.selection.announced.clone(),
            pods: self.pods(),
            node_ips: self.announced_node_ips(),
            withdrawn: mesh.withdrawn().iter().copied().collect(),
            withdrawn_lans: mesh.withdrawn_lans().iter().copied().collect(),
            withdrawn_by_node: mesh.withdrawn_by_owner().collect(),
        };
        self.remembered.send_if_modified(|before| {
            let changed = *before != now;
            *before = now;
            changed
        });
    }

    /// Returns the announced networks of this node's pods.
    pub(super) fn pods(&self) -> Vec<IpNet> {
        self.prefixes.pods(&self.selection)
    }

    /// Returns the announced candidates.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let announcement = self.announcements.borrow();
        announcement.iter().flat_map(|announcement| &announcement.candidates).copied().collect()
    }

    /// Returns the prefixes that are not announced, and why.
    pub(super) fn problems(&self) -> &[NotAnnounced] {
        &self.selection.problems
    }

    /// Returns the node IPs that are announced.
    fn announced_node_ips(&self) -> Vec<IpAddr> {
        self.node_ips.iter().copied().filter(|ip| self.selection.contains(*ip)).collect()
    }
}

/// Starts a task that stores the latest prefixes, one write at a time.
fn store_changes(state: Arc<StateDir>, first: CachedPrefixes) -> watch::Sender<CachedPrefixes> {
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
