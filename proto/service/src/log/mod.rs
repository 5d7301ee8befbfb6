//! Log output, as text or as one JSON object for each line. Where stderr leads to the journal of systemd, text becomes
//! entries with fields ([`journal`]). The journal stamps the time itself, and takes a priority before each line of
//! stderr (sd-daemon(3)); terminals and files get the time and the level as text.

mod journal;

use std::fmt;
use std::fs::File;
use std::io::IsTerminal as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;

use serde::{Deserialize, Serialize};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::format::{Format, Full, Json, JsonFields, Writer};
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

pub use journal::message_id;

use journal::{EntryFormat, JournalWriter};

/// Format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// A line of text for each event.
    #[default]
    Text,
    /// A JSON object on one line for each event.
    Json,
}

/// Settings of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Format of the log on standard error. A journal gets a priority before each line in both.
    pub format: LogFormat,
}

/// Flags of commands that log.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct LogArgs {
    /// Format of the log; overrides the configuration
    #[arg(long, env = "TOWLINE_LOG_FORMAT", value_enum, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// Events to log: a level (error, warn, info, debug or trace), or a list such as
    /// `info,towline_core=debug` [default: info]
    #[arg(long = "log", env = "TOWLINE_LOG", value_name = "FILTER", value_parser = checked_filter)]
    log_filter: Option<String>,
}

impl LogArgs {
    /// Sends the log of this process to stderr from now on, with `default` as filter if no other one
    /// is given. May be called once.
    ///
    /// # Errors
    ///
    /// If the filter cannot be parsed. Those of the command line were checked.
    pub fn init(&self, config: LogConfig, default: &str) -> Result<(), ParseError> {
        let filter = EnvFilter::try_new(self.log_filter.as_deref().unwrap_or(default))?;
        init(filter, self.format(config));
        Ok(())
    }

    fn format(&self, config: LogConfig) -> LogFormat {
        self.log_format.unwrap_or(config.format)
    }
}

fn checked_filter(text: &str) -> Result<String, ParseError> {
    EnvFilter::try_new(text)?;
    Ok(text.to_owned())
}

fn init(filter: EnvFilter, format: LogFormat) {
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match (format, is_journal()) {
        (LogFormat::Text, true) => {
            let builder = builder.with_ansi(false);
            match JournalWriter::open() {
                Ok(journal) => {
                    let builder = builder.event_format(EntryFormat::new(journal_text()));
                    builder.with_writer(journal).init();
                }
                // A sandbox may hide the socket of the journal.
                Err(_) => builder.event_format(JournalFormat(journal_text())).init(),
            }
        }
        (LogFormat::Text, false) => {
            builder.with_ansi(std::io::stderr().is_terminal()).init();
        }
        (LogFormat::Json, true) => {
            let builder = builder.with_ansi(false).fmt_fields(JsonFields::new());
            builder.event_format(JournalFormat(json())).init();
        }
        (LogFormat::Json, false) => {
            let builder = builder.with_ansi(false).fmt_fields(JsonFields::new());
            builder.event_format(json()).init();
        }
    }
}

/// Returns whether stderr leads to the journal: systemd names its device and inode then. A program that
/// redirects stderr leaves the variable as it is.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let stderr = std::io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let metadata = stderr.and_then(|stderr| stderr.metadata());
    metadata.is_ok_and(|metadata| stream == format!("{}:{}", metadata.dev(), metadata.ino()))
}

/// Returns the format of events as text without time and level, which the journal knows.
fn journal_text() -> Format<Full, ()> {
    Format::default().without_time().with_level(false)
}

/// Returns the format of events as JSON: `timestamp`, `level`, `fields` (with `message`), `target`, and
/// `spans` from the outermost to the innermost one.
fn json() -> Format<Json, SystemTime> {
    Format::default().json().with_current_span(false)
}

/// Format of events in the journal: the priority, then the event in the inner format.
struct JournalFormat<F>(F);

impl<S, N, F> FormatEvent<S, N> for JournalFormat<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

/// Returns the priority of a level, as syslog(3) numbers it.
fn priority(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Writer that keeps what is written.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_journal_gets_a_priority_and_no_time() {
        let kept = Kept::default();
        let writer = kept.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .event_format(JournalFormat(journal_text()))
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!(target: "t", port = 7, "failed");
            tracing::warn!(target: "t", "odd");
            tracing::info!(target: "t", "done");
        });
        let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "<3>t: failed port=7\n<4>t: odd\n<6>t: done\n");
    }

    fn logged<F>(format: F) -> String
    where
        F: FormatEvent<tracing_subscriber::Registry, JsonFields> + Send + Sync + 'static,
    {
        let kept = Kept::default();
        let writer = kept.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .fmt_fields(JsonFields::new())
            .event_format(format)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let _entered = tracing::info_span!(target: "t", "tunnel", peer = "cp").entered();
            tracing::warn!(target: "t", port = 7, text = "a \"b\"\nc", "odd");
        });
        String::from_utf8(kept.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn an_event_as_json_is_one_line_with_its_fields_and_spans() {
        let text = logged(json());
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        let event: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(event["level"], "WARN");
        assert_eq!(event["target"], "t");
        assert_eq!(event["fields"]["message"], "odd");
        assert_eq!(event["fields"]["port"], 7);
        assert_eq!(event["fields"]["text"], "a \"b\"\nc");
        assert_eq!(event["spans"][0]["peer"], "cp");
        assert!(event["timestamp"].is_string(), "{text}");
    }

    #[test]
    fn the_journal_gets_a_priority_before_json_too() {
        let text = logged(JournalFormat(json()));
        let event: serde_json::Value =
            serde_json::from_str(text.strip_prefix("<4>").unwrap()).unwrap();
        assert_eq!(event["fields"]["message"], "odd");
    }

    #[test]
    fn the_command_line_overrides_the_configuration() {
        let json = LogConfig { format: LogFormat::Json };
        assert_eq!(LogArgs::default().format(json), LogFormat::Json);
        assert_eq!(LogArgs::default().format(LogConfig::default()), LogFormat::Text);
        let text = LogArgs { log_format: Some(LogFormat::Text), log_filter: None };
        assert_eq!(text.format(json), LogFormat::Text);
    }

    #[test]
    fn a_filter_is_checked_before_anything_runs() {
        assert_eq!(checked_filter("info,towline_core=debug").unwrap(), "info,towline_core=debug");
        assert!(checked_filter("info,towline_core=loud").is_err());
    }
}
