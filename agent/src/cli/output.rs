//! Output formats: tables for people, JSON and YAML for programs.

use std::io::{self, Write as _};
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// Format of a command's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(super) enum Format {
    /// Table for people
    #[default]
    Table,
    /// Table with all columns, for wide terminals
    Wide,
    /// One JSON document
    Json,
    /// One YAML document
    Yaml,
}

/// Returns `value` as JSON or YAML, or `None` if a table is wanted.
pub(super) fn document<T: Serialize>(format: Format, value: &T) -> anyhow::Result<Option<String>> {
    Ok(match format {
        Format::Table | Format::Wide => None,
        Format::Json => Some(serde_json::to_string_pretty(value)? + "\n"),
        Format::Yaml => Some(serde_saphyr::to_string(value)?),
    })
}

/// Failure to write to standard output.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output: {0}")]
struct Unwritten(#[source] io::Error);

/// Writes to stdout. [`is_broken_pipe`] recognizes the error if the reader closed the pipe.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Unwritten)?;
    Ok(())
}

/// Returns whether the reader of stdout, like `head`, closed the pipe. Broken connections do not
/// count.
pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let unwritten = error.downcast_ref::<Unwritten>();
    unwritten.is_some_and(|Unwritten(error)| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Returns a table without lines, like those of kubectl.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.iter().copied());
    table
}

/// Returns the table's text, without the padding of its last column.
pub(super) fn render(table: &Table) -> String {
    let mut text = String::new();
    for line in table.to_string().lines() {
        text.push_str(line.strip_prefix(' ').unwrap_or(line).trim_end());
        text.push('\n');
    }
    text
}

/// Formats a number of bytes in binary units: `1.5 MiB`.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Formats an age in its two largest units: `1h 5m`, `12s`.
pub(super) fn age(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86400, seconds / 3600 % 24),
    }
}

/// Formats a round-trip time in milliseconds: `0.42 ms`.
pub(super) fn rtt(micros: u64) -> String {
    format!("{:.2} ms", micros as f64 / 1000.0)
}

/// Returns the text, or `-` if there is none.
pub(super) fn or_dash(text: Option<String>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reader_that_went_away_is_excused() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(&Unwritten(broken()).into()));
        assert!(!is_broken_pipe(&anyhow::Error::from(broken()).context("the connection broke")));
    }

    #[test]
    fn figures_are_written_in_the_largest_unit_that_fits() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(100 << 20), "100.0 MiB");
        assert_eq!(age(Duration::from_secs(59)), "59s");
        assert_eq!(age(Duration::from_secs(3661)), "1h 1m");
        assert_eq!(age(Duration::from_secs(90_000)), "1d 1h");
        assert_eq!(rtt(420), "0.42 ms");
    }
}
