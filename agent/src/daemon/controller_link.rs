//! The daemon's end of the discovery client: commands to it, and what it last reported.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use towline_core::mesh::Mesh;
use towline_proto::id::NodeId;
use towline_proto::pb;
use towline_proto::summary::MeshSummary;
use towline_proto::token::ControllerAddress;

use super::problem::Problem;
use super::report;
use crate::discovery::{Command, Event};
use crate::map_cache::IdentityAlert;
use crate::not_connected::NotConnected;

/// Maximum time to inform a controller that this node leaves. The discovery client may be opening a
/// session, which takes up to 45 s with the renewal of a certificate.
const LEAVE_LIMIT: Duration = Duration::from_secs(60);

/// Greatest number of alerts that are kept.
const ALERTS: usize = 16;
/// Time for which an alert is shown: an operator should see it the next day.
const ALERT_SHOWN: Duration = Duration::from_secs(24 * 3600);

/// Connection of the daemon with the discovery client, and its last reports for status output.
#[derive(Debug)]
pub(super) struct ControllerLink {
    /// `None`: there is no mesh, and no discovery client.
    commands: Option<mpsc::Sender<Command>>,
    /// Controllers of the configuration, which override those of the mesh.
    configured: watch::Sender<Vec<ControllerAddress>>,
    /// Effective list of controllers.
    controllers: Vec<ControllerAddress>,
    /// Last known addresses of those controllers that have a name.
    resolved: Vec<(ControllerAddress, Vec<SocketAddr>)>,
    events: mpsc::Receiver<Event>,
    session: Session,
    /// True while there is a session with a controller.
    connected: watch::Sender<bool>,
    /// Result of the last publication of the record: remarks about prefixes that other nodes hold,
    /// or why the controller refused the record.
    published: Result<Vec<String>, String>,
    /// End of the client certificate that is in use, in seconds since 1970.
    certificate_expires_at: i64,
    /// What a controller did with the identity of nodes, and when: at most [`ALERTS`], the oldest first.
    alerts: Vec<(Instant, IdentityAlert)>,
}

/// Last known state of the session with a controller.
#[derive(Debug)]
struct Session {
    address: String,
    revision: u64,
    /// When the controller last sent something.
    last_heard: Option<Instant>,
    /// Why there is no connection. `None` while connected.
    reason: Option<NotConnected>,
}

/// What other parts of the daemon have to handle.
#[derive(Debug)]
pub(super) enum Received {
    /// Another node sent a sealed signal to this node.
    Signal(Vec<u8>),
    /// The mesh has another grant of this node.
    Grant,
    /// Controllers have other addresses.
    Controllers,
}

impl ControllerLink {
    /// Creates the link. `commands` is `None` if there is no mesh. `controllers` is the effective list, and
    /// `revision` that of the cached map; 0 if there is none.
    pub(super) fn new(
        commands: Option<mpsc::Sender<Command>>,
        configured: watch::Sender<Vec<ControllerAddress>>,
        controllers: Vec<ControllerAddress>,
        events: mpsc::Receiver<Event>,
        revision: u64,
        certificate_expires_at: i64,
    ) -> Self {
        let session = Session {
            address: String::new(),
            revision,
            last_heard: None,
            reason: Some(NotConnected::NotYet),
        };
        let published = Ok(Vec::new());
        Self {
            commands,
            configured,
            controllers,
            resolved: Vec::new(),
            events,
            session,
            connected: watch::Sender::new(false),
            published,
            certificate_expires_at,
            alerts: Vec::new(),
        }
    }

    /// Waits for the next event. No event is lost when the future is dropped. `None` if the client
    /// ended.
    pub(super) async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Handles an event of the discovery client.
    pub(super) fn handle(
        &mut self,
        now: Instant,
        mesh: &mut Mesh,
        event: Event,
    ) -> Option<Received> {
        match event {
            Event::Connected { address, reflectors } => {
                mesh.set_reflectors(now, reflectors);
                mesh.set_controller_connected(now, true);
                self.connected.send_replace(true);
                self.session.address = address.to_string();
                self.session.reason = None;
                self.session.last_heard = Some(now);
            }
            Event::Disconnected { reason } => {
                mesh.set_controller_connected(now, false);
                self.connected.send_replace(false);
                self.session.reason = Some(reason);
            }
            Event::Heard { revision, .. } => {
                self.session.revision = revision;
                self.session.last_heard = Some(now);
            }
            Event::Map(changes) => {
                let was_removed = mesh.is_removed();
                for change in changes {
                    mesh.handle_map_change(now, change);
                }
                if mesh.is_removed() && !was_removed {
                    tracing::error!("this node was removed from the mesh: run `towline leave`");
                }
            }
            Event::Identity(alerts) => {
                for alert in alerts {
                    self.take_alert(now, alert);
                }
            }
            Event::BootEpoch(boot_epoch) => mesh.set_boot_epoch(now, boot_epoch),
            Event::Published(result) => self.published = result,
            Event::Certificate { expires_at } => self.certificate_expires_at = expires_at,
            Event::Signal(datagram) => return Some(Received::Signal(datagram)),
            Event::Controllers(controllers) => {
                self.resolved.retain(|(name, _)| controllers.contains(name));
                self.controllers = controllers;
                return Some(Received::Controllers);
            }
            Event::Resolved { address, remotes } => {
                self.resolved.retain(|(name, _)| *name != address);
                self.resolved.push((address, remotes));
                return Some(Received::Controllers);
            }
            Event::Grant(grant) => {
                mesh.set_grant(now, *grant);
                return Some(Received::Grant);
            }
        }
        None
    }

    /// Keeps an alert, as the newest one.
    fn take_alert(&mut self, now: Instant, alert: IdentityAlert) {
        self.alerts.retain(|(_, other)| *other != alert);
        if self.alerts.len() == ALERTS {
            self.alerts.remove(0);
        }
        self.alerts.push((now, alert));
    }

    /// Returns the effective list of controllers.
    pub(super) fn controllers(&self) -> &[ControllerAddress] {
        &self.controllers
    }

    /// Returns the last known addresses of those controllers that have a name.
    pub(super) fn resolved(&self) -> impl Iterator<Item = SocketAddr> {
        self.resolved.iter().flat_map(|(_, remotes)| remotes).copied()
    }

    /// Replaces the controllers of the configuration. A session with one that is no longer listed
    /// ends.
    pub(super) fn set_configured(&self, controllers: Vec<ControllerAddress>) {
        self.configured.send_if_modified(|configured| {
            let is_new = *configured != controllers;
            *configured = controllers;
            is_new
        });
    }

    /// Sends a sealed signal to another node, by way of a controller.
    pub(super) fn signal(&self, to: NodeId, datagram: Vec<u8>) {
        // A full queue means that the controller is too slow. The core repeats the message.
        if let Some(commands) = &self.commands {
            let _ = commands.try_send(Command::Signal(to, datagram));
        }
    }

    /// Sends a summary of the tunnels to the controller.
    pub(super) fn report(&self, summary: MeshSummary) {
        // A full queue means that the controller is too slow. The next summary replaces this one.
        if let Some(commands) = &self.commands {
            let _ = commands.try_send(Command::Summary(Box::new(summary)));
        }
    }

    /// Informs a controller that this node leaves the mesh. The daemon keeps running meanwhile.
    pub(super) fn leave(&self) -> impl Future<Output = Result<(), String>> + Send + use<> {
        let commands = self.commands.clone();
        let informing = async move {
            let stopped = || "cannot contact a controller: the discovery task has stopped";
            let (reply, answer) = oneshot::channel();
            let commands = commands.ok_or_else(stopped)?;
            commands.send(Command::Leave(reply)).await.map_err(|_| stopped())?;
            answer.await.map_err(|_| stopped().to_owned())?
        };
        async {
            tokio::time::timeout(LEAVE_LIMIT, informing).await.unwrap_or_else(|_| {
                Err(format!("no controller answered within {} s", LEAVE_LIMIT.as_secs()))
            })
        }
    }

    /// Returns a sender of commands to the discovery client. `None` without a mesh.
    pub(super) fn commands(&self) -> Option<mpsc::Sender<Command>> {
        self.commands.clone()
    }

    /// Returns whether there is a session with a controller.
    pub(super) fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }

    /// Returns a receiver that tells whether there is a session with a controller.
    pub(super) fn connection(&self) -> watch::Receiver<bool> {
        self.connected.subscribe()
    }

    /// Returns the controller part of the status. `None` without a mesh.
    pub(super) fn status(&self) -> Option<pb::ControllerStatus> {
        let session = &self.session;
        self.commands.as_ref().map(|_| pb::ControllerStatus {
            connected: self.is_connected(),
            address: session.address.clone(),
            revision: session.revision,
            last_heard_ms: session.last_heard.map(|at| report::millis(at.elapsed())),
            reason: report::text(session.reason.as_ref()),
            reason_code: report::code(session.reason.as_ref()),
        })
    }

    /// Returns the problems of the record, and what controllers did with the identity of nodes.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let withheld = |reason: &String| Problem::PrefixWithheld { reason: reason.clone() };
        let mut problems: Vec<Problem> = match &self.published {
            Ok(remarks) => remarks.iter().map(withheld).collect(),
            Err(reason) => vec![Problem::RecordRefused { reason: reason.clone() }],
        };
        let recent = self.alerts.iter().filter(|(at, _)| at.elapsed() < ALERT_SHOWN);
        problems.extend(recent.map(|(_, alert)| Problem::from(alert.clone())));
        problems
    }

    pub(super) fn certificate_expires_at(&self) -> i64 {
        self.certificate_expires_at
    }
}

#[cfg(test)]
mod tests {
    use towline_fixtures::agent;

    use super::*;

    #[test]
    fn a_controllers_name_has_the_addresses_of_the_last_attempt() {
        let now = Instant::now();
        let mut mesh = Mesh::new(agent::config(Some(agent::membership(1))), [0; 32], now);
        let (_sender, events) = mpsc::channel(1);
        let (configured, _seen) = watch::channel(Vec::new());
        let named: ControllerAddress = "controller.example.org:7443".parse().unwrap();
        let other: ControllerAddress = "192.0.2.1:7443".parse().unwrap();
        let controllers = vec![named.clone(), other.clone()];
        let mut link = ControllerLink::new(None, configured, controllers, events, 0, 0);
        let mut resolved = |to: &[&str]| -> Vec<SocketAddr> {
            let remotes = to.iter().map(|remote| remote.parse().unwrap()).collect();
            let event = Event::Resolved { address: named.clone(), remotes };
            let received = link.handle(now, &mut mesh, event);
            assert!(matches!(received, Some(Received::Controllers)), "{received:?}");
            link.resolved().collect()
        };
        assert_eq!(resolved(&["10.0.0.5:7443"]), ["10.0.0.5:7443".parse().unwrap()]);
        assert_eq!(resolved(&["10.0.0.6:7443"]), ["10.0.0.6:7443".parse().unwrap()]);
        link.handle(now, &mut mesh, Event::Controllers(vec![other.clone()]));
        assert_eq!(link.resolved().next(), None, "it is no controller any more");
        assert_eq!(link.controllers(), [other]);
    }

    #[test]
    fn others_are_told_whether_there_is_a_session() {
        let now = Instant::now();
        let mut mesh = Mesh::new(agent::config(Some(agent::membership(1))), [0; 32], now);
        let (_sender, events) = mpsc::channel(1);
        let (configured, _seen) = watch::channel(Vec::new());
        let mut link = ControllerLink::new(None, configured, Vec::new(), events, 0, 0);
        let connection = link.connection();
        assert!(!*connection.borrow());
        let address = "192.0.2.1:7443".parse().unwrap();
        link.handle(now, &mut mesh, Event::Connected { address, reflectors: Vec::new() });
        assert!(*connection.borrow() && link.is_connected());
        link.handle(now, &mut mesh, Event::Disconnected { reason: NotConnected::NoAnswer });
        assert!(!*connection.borrow() && !link.is_connected());
    }
}
