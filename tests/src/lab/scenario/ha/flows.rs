//! Traffic that runs during a case: each node sends pings to the next one all the time.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::lab::ping::Ticker;
use crate::lab::topology::Host;

/// Pause between two pings of a flow.
const PACE: Duration = Duration::from_millis(100);

/// Pings of one node to another.
pub(super) struct Flow {
    host: Arc<Host>,
    target: IpAddr,
    ticker: Ticker,
}

impl Flow {
    /// Creates the pings from a host to an address in the mesh.
    pub(super) fn new(host: Arc<Host>, target: IpAddr) -> Self {
        Self { host, target, ticker: Ticker::default() }
    }
}

/// Does `work` while all flows run. Returns its result, and for each flow the longest time without an answer.
pub(super) fn during<T>(
    flows: &[Flow],
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Vec<Duration>)> {
    let stop = AtomicBool::new(false);
    let is_over = &stop;
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for flow in flows {
            running.push(
                scope.spawn(move || {
                    flow.ticker.run(flow.host.namespace(), flow.target, PACE, is_over)
                }),
            );
        }
        let begun = Instant::now();
        let result = {
            // The threads must end also if the work panics.
            let _guard = SetOnDrop(is_over);
            work()
        };
        let ended = Instant::now();
        for thread in running {
            match thread.join() {
                Ok(result) => result?,
                Err(_) => bail!("a thread of the traffic panicked"),
            }
        }
        let gap = |flow: &Flow| flow.ticker.longest_gap(begun, ended);
        Ok((result?, flows.iter().map(gap).collect()))
    })
}

/// Sets a flag when it is dropped.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
