//! Output of events, as the commands `events` of both programs print them.

use std::time::Duration;

use clap::Args;
use jiff::SignedDuration;
use towline_proto::pb;

use crate::output::{self, Format, OutputError};

/// Arguments of the commands `events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Only events that are not older than this, such as 10m or 2h
    #[arg(long, value_name = "TIME", value_parser = since)]
    pub since: Option<Duration>,
    /// Only events after the one with this id
    #[arg(long, value_name = "ID")]
    pub after: Option<String>,
    /// Print events as they happen, until this is interrupted
    #[arg(short, long)]
    pub follow: bool,
    /// Output format; with --follow, JSON and YAML print one document for each event
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
}

/// Parses the time of `--since`, such as `10m` or `2h`.
///
/// # Errors
///
/// If the text has no unit, or is negative: a line for the command line.
pub fn since(text: &str) -> Result<Duration, String> {
    let time = text.parse::<SignedDuration>().map_err(|error| error.to_string())?;
    Duration::try_from(time).map_err(|_| "a time that is not negative".to_owned())
}

/// Returns one event in a format, for a reader that follows: JSON in one line, so that the reader need not find the
/// end of each object, and YAML as a document of a stream.
///
/// # Errors
///
/// If the event cannot be encoded.
pub fn one(format: Format, event: &pb::Event) -> Result<String, OutputError> {
    Ok(match format {
        Format::Table | Format::Wide => line(event, format == Format::Wide),
        Format::Json => output::json_line(event)?,
        Format::Yaml => {
            let document = output::document(format, event)?;
            format!("---\n{}", document.unwrap_or_default())
        }
    })
}

/// Returns an event as a line for people. A wide one has the id, the code and the reason's code too.
pub fn line(event: &pb::Event, wide: bool) -> String {
    let time = output::or_dash(output::time(event.at / 1000));
    if !wide {
        return format!("{time}  {}", event.text);
    }
    let reason = output::or_dash(Some(&event.reason_code));
    format!("{time}  {}  {}  {reason}  {}", event.id, event.code, event.text)
}

/// Returns events as lines for people.
pub fn lines(events: &[pb::Event], wide: bool) -> String {
    events.iter().map(|event| line(event, wide) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_unit() {
        assert_eq!(since("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(since("1h 30m"), Ok(Duration::from_secs(5_400)));
        assert!(since("10").is_err());
        assert!(since("-5m").is_err());
    }

    #[test]
    fn an_event_is_one_line_for_people_and_for_programs() {
        let event = pb::Event {
            id: "7-1".into(),
            at: 1_700_000_000_999,
            code: "node-joined".into(),
            peer: "w1".into(),
            text: "w1 joined".into(),
            ..Default::default()
        };
        assert_eq!(line(&event, false), "2023-11-14T22:13:20Z  w1 joined");
        assert_eq!(line(&event, true), "2023-11-14T22:13:20Z  7-1  node-joined  -  w1 joined");
        let json = one(Format::Json, &event).unwrap();
        assert!(json.starts_with("{\"id\":\"7-1\"") && !json.contains('\n'), "{json}");
        assert!(one(Format::Yaml, &event).unwrap().starts_with("---\n"));
        assert_eq!(lines(&[event.clone(), event], false).lines().count(), 2);
    }
}
