//! Output of the commands: tables for people, JSON and YAML for programs. Stdout is data.

use std::error::Error;
use std::io::{self, Write as _};
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

pub use towline_proto::status::time_text as time;

/// Format of a command's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
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

/// Error of writing a result.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// Standard output cannot be written.
    #[error("cannot write to standard output: {0}")]
    Write(#[source] io::Error),
    /// The value has no JSON form.
    #[error("cannot write the result as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The value has no YAML form.
    #[error("cannot write the result as YAML: {0}")]
    Yaml(#[from] serde_saphyr::ser::Error),
}

impl OutputError {
    /// Returns whether the reader of stdout, like `head`, closed the pipe, which is not a failure.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Write(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Writes to stdout, and a line feed if the text has none at its end.
///
/// # Errors
///
/// If stdout cannot be written.
pub fn print(text: &str) -> Result<(), OutputError> {
    let end = if text.ends_with('\n') { "" } else { "\n" };
    let mut out = io::stdout().lock();
    write!(out, "{text}{end}").and_then(|()| out.flush()).map_err(OutputError::Write)
}

/// Writes a value to stdout as JSON, YAML or text. The argument of `text` says whether a table has
/// all columns.
///
/// # Errors
///
/// If the value cannot be encoded, or stdout cannot be written.
pub fn write(
    format: Format,
    value: &impl Serialize,
    text: impl FnOnce(bool) -> String,
) -> Result<(), OutputError> {
    print(&self::text(format, value, text)?)
}

/// Returns what [`write()`] writes.
///
/// # Errors
///
/// If the value cannot be encoded.
pub fn text(
    format: Format,
    value: &impl Serialize,
    text: impl FnOnce(bool) -> String,
) -> Result<String, OutputError> {
    Ok(match document(format, value)? {
        Some(document) => document,
        None => text(format == Format::Wide),
    })
}

/// Returns a value as JSON or YAML, or `None` if the format is a table.
///
/// # Errors
///
/// If the value cannot be encoded.
pub fn document(format: Format, value: &impl Serialize) -> Result<Option<String>, OutputError> {
    Ok(match format {
        Format::Table | Format::Wide => None,
        Format::Json => Some(serde_json::to_string_pretty(value)?),
        Format::Yaml => Some(serde_saphyr::to_string(value)?),
    })
}

/// Returns a value as JSON in one line.
///
/// # Errors
///
/// If the value cannot be encoded.
pub fn json_line(value: &impl Serialize) -> Result<String, OutputError> {
    Ok(serde_json::to_string(value)?)
}

/// Returns a table without lines, like those of kubectl.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.iter().copied())
        .add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt() + "\n"
}

/// Returns the text of a cell with several values, or `-` if there are none.
pub fn list<T: ToString>(items: &[T]) -> String {
    or_dash(Some(items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")))
}

/// Returns the text, or `-` if there is none.
pub fn or_dash(text: Option<impl AsRef<str>>) -> String {
    match text.as_ref().map_or("", AsRef::as_ref) {
        "" => "-".to_owned(),
        text => text.to_owned(),
    }
}

/// Returns one line for each name and value. The values begin at column `width`.
pub fn sheet(width: usize, lines: &[(&str, String)]) -> String {
    lines.iter().map(|(name, value)| format!("{name:<width$}{value}\n")).collect()
}

/// Formats a number of bytes in binary units: `1.5 MiB`.
pub fn bytes(count: u64) -> String {
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

/// Formats a rate in binary units a second: `1.5 MiB/s`.
pub fn rate(bytes_per_s: u64) -> String {
    bytes(bytes_per_s) + "/s"
}

/// Formats a duration in its two largest units, the second one only if it is not zero: `1h 5m`,
/// `10m`, `12s`.
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (first, second) = match seconds {
        0..60 => ((seconds, "s"), (0, "")),
        60..3_600 => ((seconds / 60, "m"), (seconds % 60, "s")),
        3_600..86_400 => ((seconds / 3_600, "h"), (seconds / 60 % 60, "m")),
        _ => ((seconds / 86_400, "d"), (seconds / 3_600 % 24, "h")),
    };
    match second.0 {
        0 => format!("{}{}", first.0, first.1),
        _ => format!("{}{} {}{}", first.0, first.1, second.0, second.1),
    }
}

/// Formats a round-trip time in milliseconds: `0.42 ms`.
pub fn rtt(micros: u64) -> String {
    format!("{:.2} ms", micros as f64 / 1000.0)
}

/// Returns an error and its causes in one line, without repetitions.
pub fn error_line(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reader_that_went_away_is_excused() {
        let error = |kind| OutputError::Write(io::Error::from(kind));
        assert!(error(io::ErrorKind::BrokenPipe).is_broken_pipe());
        assert!(!error(io::ErrorKind::StorageFull).is_broken_pipe());
    }

    #[test]
    fn a_table_has_no_blanks_at_the_ends_of_its_lines() {
        let text = table(&["A", "LONG"], [vec!["aaaa".into(), "b".into()]]);
        assert_eq!(text, "A     LONG\naaaa  b\n");
        assert_eq!(list(&[1, 2]), "1,2");
        assert_eq!(list::<u8>(&[]), "-");
    }

    #[test]
    fn figures_are_written_in_the_largest_unit_that_fits() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(100 << 20), "100.0 MiB");
        let spans = [0, 59, 61, 600, 3_661, 90_000, 3 * 86_400].map(Duration::from_secs).map(span);
        assert_eq!(spans, ["0s", "59s", "1m 1s", "10m", "1h 1m", "1d 1h", "3d"]);
        assert_eq!(rtt(420), "0.42 ms");
        assert_eq!(time(0), None);
        assert_eq!(time(1_700_000_000).as_deref(), Some("2023-11-14T22:13:20Z"));
    }

    #[test]
    fn a_cause_that_the_error_names_is_not_repeated() {
        let source = io::Error::other("it is a\ndirectory");
        let error = crate::config_file::FileError::Read { path: "a.toml".into(), source };
        assert_eq!(error_line(&error), "cannot read a.toml: it is a directory");
    }
}
