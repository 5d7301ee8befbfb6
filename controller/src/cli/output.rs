//! Output of results as tables, JSON or YAML.

use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use jiff::Timestamp;
use serde::Serialize;

/// Output format of a command that reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
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

/// Error of writing to standard output.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output: {0}")]
struct Unwritten(#[source] io::Error);

/// Writes one or more lines to standard output.
pub(super) fn line(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}").and_then(|()| stdout.flush()).map_err(Unwritten)?;
    Ok(())
}

/// Writes a value to standard output as JSON, YAML or a table. The argument of `table` says whether
/// it has all columns.
pub(super) fn write(
    format: Format,
    value: &impl Serialize,
    table: impl FnOnce(bool) -> String,
) -> anyhow::Result<()> {
    match format {
        Format::Table => line(&table(false)),
        Format::Wide => line(&table(true)),
        Format::Json => line(&serde_json::to_string_pretty(value)?),
        Format::Yaml => line(serde_saphyr::to_string(value)?.trim_end()),
    }
}

/// Returns a table without lines between rows and columns.
pub(super) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.iter().copied());
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// Returns the text of a cell with several values.
pub(super) fn list<T: ToString>(items: &[T]) -> String {
    if items.is_empty() {
        return "-".to_owned();
    }
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

/// Returns a time as RFC 3339 text. 0 stands for a time that never was: `None`.
pub(super) fn time(unix: i64) -> Option<String> {
    if unix == 0 {
        return None;
    }
    Timestamp::from_second(unix).ok().map(|time| time.to_string())
}

/// Returns a duration as text, in a unit that keeps the number short.
pub(super) fn span(seconds: i64) -> String {
    let seconds = seconds.max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Returns an error and its causes in one line, without repetitions.
pub(super) fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.replace('\n', " ")
}

/// Returns whether the reader of standard output has closed it, which is not a failure. A broken
/// connection to the controller does not count.
pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let unwritten = error.downcast_ref::<Unwritten>();
    unwritten.is_some_and(|Unwritten(error)| error.kind() == io::ErrorKind::BrokenPipe)
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
    fn a_table_has_no_trailing_blanks_and_spans_are_short() {
        let text = table(&["A", "LONG"], [vec!["aaaa".into(), "b".into()]]);
        assert_eq!(text, "A     LONG\naaaa  b");
        assert_eq!(span(59), "59s");
        assert_eq!(span(3600), "60m");
        assert_eq!(span(3 * 86_400), "3d");
        assert_eq!(time(0), None);
        assert_eq!(time(1_700_000_000).unwrap(), "2023-11-14T22:13:20Z");
    }
}
