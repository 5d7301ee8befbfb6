//! Command `towline-controller mesh events`.

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use jiff::SignedDuration;
use tokio::time::sleep;
use towline_proto::pb;
use towline_service::output::{self, Format};

use super::Common;
use super::client::status_error;
use crate::clock;

/// Interval at which a follower asks for events.
const PERIOD: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Only events of this last time, such as 10m or 2h
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<Duration>,
    /// Only events after the one with this id
    #[arg(long, value_name = "ID")]
    after: Option<String>,
    /// Print events as they happen, until this is interrupted
    #[arg(short, long)]
    follow: bool,
    /// Output format; with --follow, JSON and YAML print one document for each event
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

fn time(text: &str) -> Result<Duration, String> {
    let time = text.parse::<SignedDuration>().map_err(|error| error.to_string())?;
    Duration::try_from(time).map_err(|_| "a time that is not negative".to_owned())
}

impl EventsArgs {
    pub(super) async fn run(self, common: &Common) -> anyhow::Result<()> {
        let Self { since, after, follow, output } = self;
        let since_ms = since.map(|since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX));
        let oldest = since_ms.map(|since| clock::unix_millis().saturating_sub(since));
        let mut client = common.connect().await?;
        let mut after = after.unwrap_or_default();
        loop {
            let request = pb::ListEventsRequest { after: after.clone() };
            let answer = client.admin.list_events(request).await.map_err(status_error)?;
            let mut events = answer.into_inner().events;
            if let Some(last) = events.last() {
                after.clone_from(&last.id);
            }
            events.retain(|event| oldest.is_none_or(|oldest| event.at >= oldest));
            if !follow {
                let wide = output == Format::Wide;
                return Ok(output::write(output, &events, |_| {
                    events.iter().map(|event| line(event, wide) + "\n").collect()
                })?);
            }
            for event in &events {
                output::print(&one(output, event)?)?;
            }
            sleep(PERIOD).await;
        }
    }
}

/// Returns one event in a format, for a reader that follows.
fn one(format: Format, event: &pb::Event) -> anyhow::Result<String> {
    Ok(match format {
        Format::Table | Format::Wide => line(event, format == Format::Wide),
        // One line, so that a reader need not find the end of each object.
        Format::Json => output::json_line(event).context("cannot write an event as JSON")?,
        Format::Yaml => {
            let document = output::document(format, event)?;
            format!("---\n{}", document.unwrap_or_default())
        }
    })
}

fn line(event: &pb::Event, wide: bool) -> String {
    let time = output::or_dash(output::time(event.at / 1000));
    if !wide {
        return format!("{time}  {}", event.text);
    }
    let reason = output::or_dash(Some(&event.reason_code));
    format!("{time}  {}  {}  {reason}  {}", event.id, event.code, event.text)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(time("1h 30m"), Ok(Duration::from_secs(5_400)));
        assert!(time("-5m").is_err());
    }
}
