//! The daemon's hold on the host's network: the last plan, applied and kept.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ipnet::IpNet;
use towline_core::path::LocalEnd;
use towline_core::plan::Plan;
use towline_proto::limits;
use towline_proto::node::{Candidate, CandidateKind};

use crate::config::Config;
use crate::host::{CandidatePolicy, HostEvent, HostNetwork, Names, Watch, candidates};

/// How long after an incomplete apply the next one is tried, if nothing is heard before.
const RETRY: Duration = Duration::from_secs(1);

pub(super) struct Host {
    network: HostNetwork,
    watch: Watch,
    names: Names,
    plan: Option<Arc<Plan>>,
    /// What is not as planned, a line each.
    problems: Vec<String>,
    retry: Option<Instant>,
}

impl Host {
    pub(super) fn open(config: &Config) -> anyhow::Result<Self> {
        let names = names(config);
        let mut network = HostNetwork::open().context("cannot speak to the kernel's network")?;
        let watch = network.watch(&names).context("cannot watch the host's network")?;
        Ok(Self { network, watch, names, plan: None, problems: Vec::new(), retry: None })
    }

    /// The next thing that happened to the host, or the time to try again.
    pub(super) async fn next(&mut self) -> HostEvent {
        let Some(retry) = self.retry else { return self.watched().await };
        tokio::select! {
            event = self.watched() => event,
            () = tokio::time::sleep_until(retry.into()) => HostEvent::OursChanged,
        }
    }

    async fn watched(&mut self) -> HostEvent {
        match self.watch.next().await {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(%error, "host network not watched for now");
                tokio::time::sleep(RETRY).await;
                HostEvent::OursChanged
            }
        }
    }

    pub(super) fn apply(&mut self, plan: Arc<Plan>) {
        self.plan = Some(plan);
        self.reapply();
    }

    /// Somebody touched what is ours, or the last apply was not complete.
    pub(super) fn put_back(&mut self) {
        self.network.invalidate();
        self.reapply();
    }

    fn reapply(&mut self) {
        let Some(plan) = &self.plan else { return };
        let problems = match self.network.apply(plan) {
            Ok(changes) => {
                if changes.messages > 0 {
                    tracing::debug!(messages = changes.messages, "host network changed");
                }
                changes.problems.iter().map(ToString::to_string).collect()
            }
            Err(error) => vec![error.to_string()],
        };
        if problems != self.problems {
            for problem in &problems {
                tracing::error!(%problem, "host network not as planned");
            }
        }
        self.retry = (!problems.is_empty()).then(|| Instant::now() + RETRY);
        self.problems = problems;
    }

    pub(super) fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Takes away all that is ours.
    pub(super) fn remove(&mut self) -> Result<(), String> {
        self.plan = None;
        self.retry = None;
        let removed = self.network.remove(&self.names).map_err(|error| error.to_string())?;
        tracing::info!(removed, "host network opened");
        Ok(())
    }

    /// The machine's own addresses by which others could know it, see [`HostNetwork::node_ips`].
    pub(super) fn node_ips(&mut self, excluded: Vec<IpNet>) -> Vec<IpAddr> {
        let policy = CandidatePolicy { own_link: self.names.link.clone(), excluded };
        self.network.node_ips(&policy).unwrap_or_else(|error| {
            tracing::warn!(%error, "local addresses not read");
            Vec::new()
        })
    }

    /// The machine's own ways to the outside: addresses, each with its link.
    pub(super) fn uplinks(&mut self, excluded: Vec<IpNet>) -> Vec<LocalEnd> {
        let addresses = match self.network.local_addresses() {
            Ok(addresses) => addresses,
            Err(error) => {
                tracing::warn!(%error, "local addresses not read");
                return Vec::new();
            }
        };
        let policy = CandidatePolicy { own_link: self.names.link.clone(), excluded };
        candidates(&addresses, &policy)
            .into_iter()
            .filter_map(|address| {
                let local = addresses.iter().find(|local| local.prefix.addr() == address)?;
                Some(LocalEnd { address, interface: local.index })
            })
            .take(limits::CANDIDATES / 2)
            .collect()
    }
}

/// The uplinks as others may reach them.
pub(super) fn local_candidates(uplinks: &[LocalEnd], port: u16) -> impl Iterator<Item = Candidate> {
    uplinks.iter().filter_map(move |uplink| {
        Candidate::new(CandidateKind::Local, SocketAddr::new(uplink.address, port))
    })
}

/// The names and numbers of ours in this configuration.
fn names(config: &Config) -> Names {
    Names {
        link: config.link.name.clone(),
        table: config.routing.table,
        priority: config.routing.priority,
        firewall: config.routing.nftables_table.clone(),
    }
}

/// Takes away all that is ours, without a running agent.
pub(super) fn remove(config: &Config) -> anyhow::Result<()> {
    let mut network = HostNetwork::open().context("cannot speak to the kernel's network")?;
    network.remove(&names(config)).context("cannot open the host")?;
    Ok(())
}
