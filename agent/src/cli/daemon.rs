//! Implements `towline agent`, `towline relay` and `towline pubkey`.

use std::path::PathBuf;

use towline_service::log::LogArgs;
use towline_service::output;

use super::local;
use crate::config::Config;
use crate::daemon::{self, Purpose};
use crate::state::StateDir;

pub(super) fn run(
    config: Config,
    config_path: Option<PathBuf>,
    purpose: Purpose,
    log: &LogArgs,
) -> anyhow::Result<()> {
    // boringtun logs unauthenticated datagrams, which strangers can send in any number.
    log.init(config.log, "info,boringtun=off")?;
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
