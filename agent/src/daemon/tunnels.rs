//! The running data plane, and how it is started again after a fault.

use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};
use towline_core::peer_table::PeerTable;
use towline_dataplane::{self as dataplane, DataPlane, Engine, HostTunnels, Probes};

use super::{Purpose, queueing};
use crate::config::Config;
use crate::keys::Wireguard;
use crate::{reserved_port, tun_owner};

/// Data plane, with the channels on which it reports.
#[derive(Debug)]
pub(super) struct Tunnels {
    data_plane: DataPlane,
    events: mpsc::Receiver<dataplane::Event>,
    /// Latest fault of the data plane. `None` while it works.
    faults: watch::Receiver<Option<dataplane::Fault>>,
    /// UDP ports of the host's own tunnels, whose packets are segmented.
    host_tunnels: HostTunnels,
}

/// What the data plane reported.
#[derive(Debug)]
pub(super) enum Report {
    /// It observed something, or received a datagram that is not for it.
    Event(dataplane::Event),
    /// It failed, and has to be started again.
    Fault(dataplane::Fault),
}

impl Tunnels {
    /// Opens the TUN and UDP devices for `purpose`, and starts the data plane with them.
    pub(super) fn start(
        config: &Config,
        key: &Wireguard,
        probes: Probes,
        purpose: Purpose,
    ) -> anyhow::Result<Self> {
        let host_tunnels = HostTunnels::default();
        let (data_plane, events) = start_data_plane(config, key, probes, &host_tunnels, purpose)?;
        let faults = data_plane.faults();
        Ok(Self { data_plane, events, faults, host_tunnels })
    }

    /// Waits for the next report. No report is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Report {
        loop {
            tokio::select! {
                Ok(()) = self.faults.changed() => {
                    if let Some(fault) = self.faults.borrow_and_update().clone() {
                        return Report::Fault(fault);
                    }
                }
                Some(event) = self.events.recv() => return Report::Event(event),
                else => return std::future::pending().await,
            }
        }
    }

    /// Starts a new data plane, without sessions, after its link was deleted or a worker failed.
    pub(super) fn restart(
        &mut self,
        config: &Config,
        key: &Wireguard,
        probes: Probes,
        purpose: Purpose,
    ) -> anyhow::Result<()> {
        // A hanging worker keeps the link and the port open. Only the end of the process releases
        // them.
        self.data_plane.stop()?;
        (self.data_plane, self.events) =
            start_data_plane(config, key, probes, &self.host_tunnels, purpose)?;
        self.faults = self.data_plane.faults();
        Ok(())
    }

    /// Applies a peer table.
    pub(super) fn apply(&self, table: &PeerTable) {
        self.data_plane.apply(table);
    }

    /// Sets the UDP ports of the host's VXLAN and Geneve links.
    pub(super) fn set_host_tunnels(&self, ports: Vec<u16>) {
        self.host_tunnels.set(ports);
    }

    /// Returns the running data plane, for commands and counters.
    pub(super) fn data_plane(&self) -> &DataPlane {
        &self.data_plane
    }
}

fn start_data_plane(
    config: &Config,
    key: &Wireguard,
    probes: Probes,
    host_tunnels: &HostTunnels,
    purpose: Purpose,
) -> anyhow::Result<(DataPlane, mpsc::Receiver<dataplane::Event>)> {
    let (port, mark, offloads) = (config.wireguard.port, config.routing.mark, config.offloads);
    let (events, receiver) = mpsc::channel(1024);
    let settings = dataplane::Config {
        private_key: key.secret().clone(),
        probes,
        link: None,
        copy_dscp: config.wireguard.copy_dscp,
        engine: Engine::select(config.wireguard.engine.into(), config.wireguard.aead.into()),
        spin: Duration::from_micros(config.wireguard.spin_us.into()),
        seal_helpers: 0,
    };
    let data_plane = match purpose {
        Purpose::Node => {
            let queues = tun_owner::open(&config.link.name, offloads, config.wireguard.workers)?;
            queueing::apply(&config.link.name, config.link.queueing);
            let sockets = dataplane::open_udp_group(port, mark, offloads, queues.len())
                .map_err(reserved_port::not_opened)?;
            let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
            let seal_helpers = config.wireguard.seal_ahead.helpers(cores, queues.len());
            let queues = queues.into_iter().map(|tun| tun.with_host_tunnels(host_tunnels.clone()));
            let link = nix::net::if_::if_nametoindex(config.link.name.as_str()).ok();
            let settings = dataplane::Config { link, seal_helpers, ..settings };
            DataPlane::start(settings, queues.zip(sockets), events)
        }
        Purpose::Relay => {
            let udp = dataplane::open_udp_with(port, mark, offloads)
                .map_err(reserved_port::not_opened)?;
            DataPlane::start(settings, [(dataplane::NoTun::new()?, udp)], events)
        }
    };
    Ok((data_plane.context("cannot start the data plane")?, receiver))
}
