//! Implements `--watch`: repeats a command's output in place.

use std::io::IsTerminal as _;
use std::time::Duration;

use clap::Args;
use towline_service::output::{self, Format};

/// Sequence of control characters that moves to the top left corner and erases the screen (ECMA-48).
const ERASE: &str = "\x1b[H\x1b[2J";

#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Format,
    /// Print again every few seconds, until this is interrupted
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3_600))]
    watch: Option<u64>,
}

/// Prints the text, once or again and again. On a terminal, each text replaces the one before.
pub(super) fn repeat(
    args: &WatchArgs,
    mut text: impl FnMut() -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let Some(seconds) = args.watch else { return Ok(output::print(&text()?)?) };
    let replaces = std::io::stdout().is_terminal();
    loop {
        // An agent that restarts comes back: the reason is shown meanwhile.
        let shown = text().unwrap_or_else(|error| output::error_line(error.as_ref()));
        let before = if replaces { ERASE } else { "" };
        output::print(&format!("{before}{shown}"))?;
        std::thread::sleep(Duration::from_secs(seconds));
    }
}
