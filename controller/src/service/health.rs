//! State of health for load balancers and probes: `grpc.health.v1`. Everybody may ask, over TLS.
//!
//! A controller that cannot store changes serves the mesh all the same, so it counts as serving. One that stops does
//! not, so that a load balancer sends nodes to another one.

use std::pin::Pin;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};
use towline_proto::health::health_check_response::ServingStatus;
use towline_proto::health::health_server::Health;
use towline_proto::health::{HealthCheckRequest, HealthCheckResponse};

/// Services that can be asked for. The empty name means the whole controller.
const SERVICES: [&str; 3] = ["", "towline.v1.Discovery", "towline.v1.Admin"];

/// Implementation of the service `grpc.health.v1.Health`.
pub struct HealthService {
    stopping: watch::Receiver<Option<Duration>>,
}

impl HealthService {
    /// Creates the service of a controller that serves until `stopping` is set.
    pub fn new(stopping: watch::Receiver<Option<Duration>>) -> Self {
        Self { stopping }
    }
}

fn state(stopping: Option<Duration>) -> HealthCheckResponse {
    let status = match stopping {
        None => ServingStatus::Serving,
        Some(_) => ServingStatus::NotServing,
    };
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if !SERVICES.contains(&request.get_ref().service.as_str()) {
            return Err(Status::not_found("unknown service"));
        }
        let stopping = *self.stopping.borrow();
        Ok(Response::new(state(stopping)))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        // The protocol answers an unknown service with a state.
        let is_known = SERVICES.contains(&request.get_ref().service.as_str());
        let states = WatchStream::new(self.stopping.clone()).map(move |stopping| {
            let unknown = HealthCheckResponse { status: ServingStatus::ServiceUnknown.into() };
            Ok::<_, Status>(if is_known { state(stopping) } else { unknown })
        });
        Ok(Response::new(Box::pin(states)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_controller_that_stops_does_not_serve() {
        let (stop, stopping) = watch::channel(None);
        let service = HealthService::new(stopping);
        let request = |name: &str| Request::new(HealthCheckRequest { service: name.to_owned() });
        let mut states = service.watch(request("")).await.unwrap().into_inner();
        let serving = async |name: &str| {
            service.check(request(name)).await.map(|state| state.into_inner().status())
        };
        assert_eq!(serving("").await.unwrap(), ServingStatus::Serving);
        assert_eq!(serving("towline.v1.Discovery").await.unwrap(), ServingStatus::Serving);
        assert_eq!(serving("other").await.unwrap_err().code(), tonic::Code::NotFound);
        assert_eq!(states.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
        stop.send(Some(Duration::ZERO)).unwrap();
        assert_eq!(states.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
        assert_eq!(serving("").await.unwrap(), ServingStatus::NotServing);
    }
}
