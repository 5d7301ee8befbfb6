//! Implements `towline agent`, `towline relay` and `towline pubkey`.

use std::path::PathBuf;

use towline_service::{log, output};
use tracing_subscriber::EnvFilter;

use super::local;
use crate::config::Config;
use crate::daemon::{self, Purpose};
use crate::state::StateDir;

pub(super) fn run(
    config: Config,
    config_path: Option<PathBuf>,
    purpose: Purpose,
) -> anyhow::Result<()> {
    // boringtun logs unauthenticated datagrams, which strangers can send in any number.
    let filter = EnvFilter::try_from_env("TOWLINE_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,boringtun=off"));
    log::init(filter);
    daemon::run(config, config_path, purpose)
}

/// Prints the public key. Creates the key if there is none, so that the other end can be set up
/// first.
pub(super) fn pubkey(config: &Config) -> anyhow::Result<()> {
    let key = if daemon::is_running(&config.socket) {
        local::status(&config.socket)?.public_key
    } else {
        StateDir::open(&config.state_dir)?.keys_or_generate()?.wireguard.public().to_string()
    };
    Ok(output::print(&key)?)
}
