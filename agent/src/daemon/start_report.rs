//! Notifications to the service manager while the agent starts.

use towline_service::notify::Notifier;

use super::problem::Blocked;

/// What the service manager was last notified of.
#[derive(Debug, Default)]
pub(super) struct StartReport {
    is_ready: bool,
    /// Reason for not being ready in the last notification.
    reason: Option<Blocked>,
}

impl StartReport {
    /// Notifies the service manager that the agent is ready, once link, routes and guards are in
    /// place. Units that are ordered after the agent start then. Until then notifies it of the
    /// missing part, whenever that changes. The start timeout is the service manager's.
    pub(super) fn report(&mut self, notifier: &Notifier, blocked: Option<&Blocked>) {
        match blocked {
            _ if self.is_ready => {}
            None => {
                self.is_ready = true;
                notifier.status("running");
                notifier.ready();
            }
            Some(reason) if self.reason.as_ref() != Some(reason) => {
                self.reason = Some(reason.clone());
                notifier.status(&format!("not ready: {reason}"));
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn it_is_ready_once_and_not_before_the_plan_is_applied() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        let notifier = Notifier::to(&path.display().to_string());
        let notified = || {
            let mut buffer = [0; 256];
            let length = manager.recv(&mut buffer).ok()?;
            Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
        };
        let mut start = StartReport::default();
        for _ in 0..2 {
            let missing = towline_host::Problem::LinkMissing("a\nb".to_owned());
            start.report(&notifier, Some(&Blocked::Host(missing)));
        }
        let status = notified().unwrap();
        assert!(status.starts_with("STATUS=not ready: the link a b is missing"), "{status}");
        assert_eq!(notified(), None, "the status is sent once");
        start.report(&notifier, Some(&Blocked::NoPlan));
        let status = notified().unwrap();
        assert!(status.starts_with("STATUS=not ready: the agent has not computed"), "{status}");
        start.report(&notifier, None);
        assert_eq!(notified().as_deref(), Some("STATUS=running"));
        assert_eq!(notified().as_deref(), Some("READY=1"));
        start.report(&notifier, Some(&Blocked::Open));
        start.report(&notifier, None);
        assert_eq!(notified(), None, "a service that is ready stays so");
    }
}
