//! Implements `towline events`: what happened on this node lately.

use towline_proto::pb;
use towline_service::event_output::{self, EventsArgs};
use towline_service::output::{self, Format};

use super::local::{status_error, with_agent};
use crate::config::Config;

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
                output::print(&event_output::one(output, &event)?)?;
            } else {
                events.push(event);
            }
        }
        Ok(events)
    })?;
    if !follow {
        let wide = output == Format::Wide;
        output::write(output, &events, |_| event_output::lines(&events, wide))?;
    }
    Ok(())
}
