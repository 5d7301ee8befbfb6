//! Command `towline-controller publish`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use jiff::{SignedDuration, Timestamp};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};
use towline_service::log::LogArgs;
use towline_service::notify::Notifier;
use towline_service::output;

use super::{Common, tunnels};
use crate::clock;
use crate::publish::Publisher;

/// Default interval between rounds.
const PERIOD: Duration = Duration::from_secs(30);
/// Smallest interval. Nodes report every 40 s.
const LEAST: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(super) struct Publish {
    /// Kubeconfig of the cluster [default: KUBECONFIG, the user's file, or the pod's service account]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Interval between rounds, at least 5s [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = period)]
    every: Option<Duration>,
    #[command(flatten)]
    log: LogArgs,
}

fn period(text: &str) -> Result<Duration, String> {
    let period = text.parse::<SignedDuration>().map_err(|error| error.to_string())?;
    match Duration::try_from(period) {
        Ok(period) if period >= LEAST => Ok(period),
        _ => Err("a duration of at least 5s".to_owned()),
    }
}

impl Publish {
    /// Publishes until a signal. A round that fails is logged, and the next one starts over.
    pub(super) async fn run(self, common: &Common) -> anyhow::Result<()> {
        self.log.init(common.settings()?.log.unwrap_or_default(), "info")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        // Wrong credentials and missing kinds are told at once.
        let mut publisher = Publisher::connect(self.kubeconfig.as_deref()).await?;
        let notifier = Notifier::from_environment();
        notifier.ready();
        let mut rounds = interval(self.every.unwrap_or(PERIOD));
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_failing = false;
        loop {
            tokio::select! {
                _ = rounds.tick() => {}
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
            match round(&mut publisher, common).await {
                Ok(0) => {
                    if std::mem::take(&mut is_failing) {
                        tracing::info!("publishing again");
                    }
                }
                Ok(left) => tracing::info!(left, "objects are left for the next round"),
                // Once, and not in each round while the API server is away.
                Err(_) if is_failing => {}
                Err(error) => {
                    is_failing = true;
                    tracing::warn!(error = output::error_line(error.as_ref()), "not published");
                }
            }
        }
        notifier.stopping();
        Ok(())
    }
}

async fn round(publisher: &mut Publisher, common: &Common) -> anyhow::Result<usize> {
    let nodes = tunnels::read(&mut common.connect().await?, None).await?;
    // Kubernetes has times in seconds.
    let now = Timestamp::from_second(clock::now().unix).context("the clock is out of range")?;
    publisher.publish(&nodes, now).await
}
