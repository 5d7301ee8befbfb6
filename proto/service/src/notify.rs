//! Notifications to the service manager: ready, stopping, alive (sd_notify(3)).
//!
//! They are datagrams to the socket in `NOTIFY_SOCKET`. Without that variable every call does
//! nothing.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Connection to the service manager.
#[derive(Debug, Default)]
pub struct Notifier {
    /// Connected socket. `None`: there is no service manager.
    socket: Option<UnixDatagram>,
    /// Timeout of the service manager's watchdog. `None`: it has none.
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Creates the notifier that the environment describes. The watchdog is ignored if
    /// `WATCHDOG_PID` names another process.
    pub fn from_environment() -> Self {
        let socket = std::env::var("NOTIFY_SOCKET").ok().and_then(|path| connect(&path));
        let ours =
            std::env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
        let watchdog = std::env::var("WATCHDOG_USEC").ok().filter(|_| ours && socket.is_some());
        let watchdog = watchdog.and_then(|text| text.parse().ok()).map(Duration::from_micros);
        Self { socket, watchdog }
    }

    /// Creates a notifier for the socket at `path`, without a watchdog.
    pub fn to(path: &str) -> Self {
        Self { socket: connect(path), watchdog: None }
    }

    /// Notifies that the service is up.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// Sets the status text that `systemctl status` shows, as one line.
    pub fn status(&self, text: &str) {
        // A line feed would start another assignment.
        self.send(&format!("STATUS={}", text.replace('\n', " ")));
    }

    /// Notifies that the service is about to end.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// Feeds the watchdog.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// Returns the interval at which [`Self::alive`] is to be called: half of the watchdog's
    /// timeout.
    pub fn period(&self) -> Option<Duration> {
        self.watchdog.map(|limit| limit / 2).filter(|period| !period.is_zero())
    }

    fn send(&self, what: &str) {
        if let Some(socket) = &self.socket {
            // Failures are ignored: the service must run without its manager too.
            let _ = socket.send(what.as_bytes());
        }
    }
}

/// Connects to a path, or to a name in the abstract namespace after `@`.
fn connect(path: &str) -> Option<UnixDatagram> {
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    };
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect_addr(&address.ok()?).ok()?;
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_arrive_by_path_and_by_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("towline-notify-{}", std::process::id());
        for (bound, given) in [
            (UnixDatagram::bind(&path), path.display().to_string()),
            (
                UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()),
                format!("@{name}"),
            ),
        ] {
            let listener = bound.unwrap();
            let notifier = Notifier { socket: connect(&given), watchdog: None };
            notifier.ready();
            let mut buffer = [0; 64];
            let length = listener.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"READY=1");
        }
    }

    #[test]
    fn without_a_service_manager_nothing_is_sent() {
        let notifier = Notifier::default();
        notifier.ready();
        assert_eq!(notifier.period(), None);
    }
}
