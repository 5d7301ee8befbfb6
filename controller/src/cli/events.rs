//! Command `towline-controller mesh events`.

use std::time::Duration;

use tokio::time::sleep;
use towline_proto::pb;
use towline_service::event_output::{self, EventsArgs};
use towline_service::output::{self, Format};

use super::Common;
use super::client::status_error;
use crate::clock;

/// Interval at which a follower asks for events.
const PERIOD: Duration = Duration::from_secs(2);

pub(super) async fn run(args: EventsArgs, common: &Common) -> anyhow::Result<()> {
    let EventsArgs { since, after, follow, output } = args;
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
            return Ok(output::write(output, &events, |_| event_output::lines(&events, wide))?);
        }
        for event in &events {
            output::print(&event_output::one(output, event)?)?;
        }
        sleep(PERIOD).await;
    }
}
