//! Sends spans to the collector.

use std::time::{Duration, SystemTime};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use rand::Rng as _;
use tokio::sync::mpsc;
use tonic::transport::Endpoint;
use towline_proto::node::Grant;
use towline_service::{grpc, output};

use super::spans::{StartTrace, TraceIds, attribute};
use super::{OtlpEndpoint, TelemetryConfig};

/// Number of spans that can wait: more than a start has.
const QUEUE: usize = 8;
/// Longest time for one attempt to send.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Pause before the next attempt.
const RETRY: Duration = Duration::from_secs(5);
/// Number of attempts for one batch: a collector that starts after the agent has about five minutes.
const ATTEMPTS: usize = 60;

/// Error of sending spans.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    /// The collector cannot be reached.
    #[error("cannot reach the collector: {}", output::error_line(.0))]
    Connect(#[from] tonic::transport::Error),
    /// The collector refused the spans.
    #[error("the collector refused the spans: {}", grpc::message(.0))]
    Refused(#[from] tonic::Status),
}

/// Begins the trace of a start of the agent at `now`, and starts the task that sends it. `is_first` is true for the
/// first start after a join.
pub(crate) fn start_trace(
    config: &TelemetryConfig,
    grant: Option<&Grant>,
    is_first: bool,
    now: SystemTime,
) -> StartTrace {
    let mut rng = rand::rng();
    let ids = match grant {
        Some(grant) if is_first => TraceIds::after_join(grant.node_id, rng.random()),
        _ => TraceIds::of_start(rng.random(), rng.random()),
    };
    let queue = config.otlp_endpoint.map(|endpoint| {
        let (queue, spans) = mpsc::channel(QUEUE);
        tokio::spawn(send_all(endpoint, resource(grant), spans));
        queue
    });
    StartTrace::new(queue, ids, now)
}

/// Sends the span of a join that began at `started`. Tries once, since a command waits for it.
pub(crate) async fn report_join(config: &TelemetryConfig, grant: &Grant, started: SystemTime) {
    let Some(endpoint) = config.otlp_endpoint else { return };
    let ids = TraceIds::of_join(grant.node_id);
    let span = ids.span(0, "join", started, SystemTime::now());
    if let Err(error) = send(endpoint, &resource(Some(grant)), vec![span]).await {
        tracing::warn!(%error, "span of the join not sent");
    }
}

/// Sends the spans of the queue until it is closed and empty.
async fn send_all(endpoint: OtlpEndpoint, resource: Resource, mut spans: mpsc::Receiver<Span>) {
    while let Some(span) = spans.recv().await {
        let mut batch = vec![span];
        let mut failures = 0;
        loop {
            while let Ok(span) = spans.try_recv() {
                batch.push(span);
            }
            match send(endpoint, &resource, batch.clone()).await {
                Ok(()) => break,
                Err(error) if failures == 0 => {
                    tracing::warn!(%error, "spans not sent: trying again");
                }
                Err(error) if failures >= ATTEMPTS => {
                    tracing::warn!(%error, spans = batch.len(), "spans dropped");
                    break;
                }
                Err(_) => {}
            }
            failures += 1;
            tokio::time::sleep(RETRY).await;
        }
    }
}

async fn send(
    endpoint: OtlpEndpoint,
    resource: &Resource,
    spans: Vec<Span>,
) -> Result<(), ExportError> {
    let endpoint = Endpoint::from_shared(String::from(endpoint))?;
    let channel = endpoint.connect_timeout(ATTEMPT).timeout(ATTEMPT).connect().await?;
    let scope = InstrumentationScope {
        name: "towline".to_owned(),
        version: towline_proto::VERSION.to_owned(),
        ..Default::default()
    };
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, ..Default::default() }];
    let resource = Some(resource.clone());
    let resource_spans = vec![ResourceSpans { resource, scope_spans, ..Default::default() }];
    TraceServiceClient::new(channel).export(ExportTraceServiceRequest { resource_spans }).await?;
    Ok(())
}

/// Returns the attributes of this agent, in the words of OpenTelemetry's conventions.
fn resource(grant: Option<&Grant>) -> Resource {
    let mut attributes = vec![
        attribute("service.name", "towline-agent".to_owned()),
        attribute("service.version", towline_proto::VERSION.to_owned()),
    ];
    if let Some(grant) = grant {
        attributes.push(attribute("service.instance.id", grant.node_id.to_string()));
        attributes.push(attribute("service.namespace", grant.mesh_id.to_string()));
        attributes.push(attribute("host.name", grant.name.to_string()));
    }
    Resource { attributes, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
        TraceService, TraceServiceServer,
    };
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status};

    use super::super::spans::Step;
    use super::*;

    /// Collector that passes on what it receives.
    struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, Status> {
            let sent = self.0.send(request.into_inner()).await;
            sent.map_err(|_| Status::unavailable("the test ended"))?;
            Ok(Response::new(ExportTraceServiceResponse::default()))
        }
    }

    #[tokio::test]
    async fn a_collector_receives_the_spans_of_a_start() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (received, mut requests) = mpsc::channel(8);
        let service = TraceServiceServer::new(Collector(received));
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

        let endpoint = OtlpEndpoint::try_from(format!("http://{address}")).unwrap();
        let config = TelemetryConfig { otlp_endpoint: Some(endpoint) };
        let now = SystemTime::now();
        let mut trace = start_trace(&config, None, false, now);
        for step in [Step::Connected, Step::Map, Step::Handshake, Step::Packet] {
            trace.reached(step, Some("cp".to_owned()), now);
        }
        let mut names = Vec::new();
        while names.len() < 5 {
            let request = requests.recv().await.unwrap();
            for resource in request.resource_spans {
                let attributes = resource.resource.unwrap().attributes;
                assert!(attributes.iter().any(|one| one.key == "service.name"));
                let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
                names.extend(spans.map(|span| span.name));
            }
        }
        assert_eq!(names, ["connect", "map", "handshake", "first packet", "start"]);
    }
}
