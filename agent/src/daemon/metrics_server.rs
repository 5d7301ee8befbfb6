//! The server of the agent's metrics. It lives as long as the process, also while the machine is down, and asks
//! the daemon for one snapshot at each scrape.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::sleep;
use towline_service::metrics;

use crate::config::{MetricsAddress, MetricsConfig};
use crate::control::{Request, Requests};
use crate::metrics::Collector;

/// Interval at which the daemon is asked for the addresses of the link, until there are any.
const ADDRESSES_PERIOD: Duration = Duration::from_secs(5);

/// Starts the server, if the configuration has an address for it.
pub(super) fn start(config: &MetricsConfig, requests: &Requests) {
    let collector = Arc::<Mutex<Collector>>::default();
    match config.listen {
        None => {}
        Some(MetricsAddress::Fixed(address)) => {
            tokio::spawn(serve(address, requests.clone(), collector));
        }
        Some(MetricsAddress::Overlay(port)) => {
            let requests = requests.clone();
            tokio::spawn(async move {
                for ip in link_addresses(&requests).await {
                    let address = SocketAddr::new(ip, port);
                    tokio::spawn(serve(address, requests.clone(), collector.clone()));
                }
            });
        }
    }
}

async fn serve(address: SocketAddr, requests: Requests, collector: Arc<Mutex<Collector>>) {
    let collect = move || {
        let (requests, collector) = (requests.clone(), collector.clone());
        async move {
            let (status, peers) = requests.ask(Request::Metrics).await?;
            Some(collector.lock().collect(&status, &peers.peers))
        }
    };
    metrics::serve(address, collect).await;
}

/// Waits until the link has addresses, and returns them. Returns none if the agent stops before.
async fn link_addresses(requests: &Requests) -> Vec<IpAddr> {
    loop {
        let Some((status, _)) = requests.ask(Request::Metrics).await else { return Vec::new() };
        let addresses: Vec<IpAddr> =
            status.overlay_addresses.iter().filter_map(|text| text.parse().ok()).collect();
        if !addresses.is_empty() {
            return addresses;
        }
        sleep(ADDRESSES_PERIOD).await;
    }
}
