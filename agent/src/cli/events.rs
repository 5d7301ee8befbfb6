//! Implements `towline events`: what happened on this node lately.

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use jiff::SignedDuration;
use towline_proto::pb;
use towline_service::output::{self, Format};

use super::local::{status_error, with_agent};
use crate::config::Config;

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

pub(super) fn run(config: &Config, args: EventsArgs) -> anyhow::Result<()> {
    let EventsArgs { since, after, follow, output } = args;
    let since_ms = since.map(|since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX).max(1));
    let request = pb::EventsRequest {
        after: after.unwrap_or_default(),
        since_ms: since_ms.unwrap_or(0),
        follow,
    };
    let events = with_agent(&config.socket, async |mut agent| {
        let answer = agent.events(request).await.map_err(|status| status_error(&status))?;
        let mut stream = answer.into_inner();
        let mut events = Vec::new();
        while let Some(event) = stream.message().await.map_err(|status| status_error(&status))? {
            if follow {
                output::print(&one(output, &event)?)?;
            } else {
                events.push(event);
            }
        }
        Ok(events)
    })?;
    if !follow {
        let wide = output == Format::Wide;
        output::write(output, &events, |_| {
            events.iter().map(|event| line(event, wide) + "\n").collect()
        })?;
    }
    Ok(())
}

/// Returns one event in a format, for a reader that follows.
fn one(format: Format, event: &pb::Event) -> anyhow::Result<String> {
    Ok(match format {
        Format::Table | Format::Wide => line(event, format == Format::Wide),
        Format::Json => serde_json::to_string(event).context("cannot write an event as JSON")?,
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
    fn a_time_has_a_unit() {
        assert_eq!(time("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(time("1h 30m"), Ok(Duration::from_secs(5_400)));
        assert!(time("10").is_err());
        assert!(time("-5m").is_err());
    }

    #[test]
    fn a_line_has_time_and_words_and_the_wide_one_codes() {
        let event = pb::Event {
            id: "7-1".into(),
            at: 1_700_000_000_999,
            code: "agent-started".into(),
            text: "agent 1 started".into(),
            ..Default::default()
        };
        assert_eq!(line(&event, false), "2023-11-14T22:13:20Z  agent 1 started");
        assert_eq!(
            line(&event, true),
            "2023-11-14T22:13:20Z  7-1  agent-started  -  agent 1 started"
        );
    }
}
