//! SIGTERM and SIGINT always end the agent.
//!
//! They are received by a thread of their own: the daemon's task may be waiting for something that
//! never comes. The first signal asks the task to end; a second one, or a task that has not ended
//! some seconds later, ends the process at once.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// How long the daemon's task has to end by itself. Longer than the data plane is waited for,
/// shorter than a service manager waits.
pub(super) const GRACE: Duration = Duration::from_secs(8);
/// How long the last log line may take: who reads the log may hang too.
const LOG_PATIENCE: Duration = Duration::from_millis(500);
/// Exit code of a process that did not end by itself.
const FORCED: i32 = 1;

/// Shows whether the agent was asked to end.
#[derive(Debug)]
pub(super) struct Termination(watch::Receiver<bool>);

impl Termination {
    /// Receives the signals from now on. The process ends at most `grace` after the first one.
    ///
    /// # Errors
    ///
    /// When the system gives no thread or no descriptors.
    pub(super) fn watch(grace: Duration) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let signals = {
            let _context = runtime.enter();
            [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?]
        };
        let (sender, requested) = watch::channel(false);
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            runtime.block_on(end(signals, sender, grace));
        })?;
        Ok(Self(requested))
    }

    /// Waits until the agent is asked to end.
    pub(super) async fn requested(&mut self) {
        if self.0.wait_for(|requested| *requested).await.is_err() {
            // The thread ends with the process alone.
            std::future::pending::<()>().await;
        }
    }
}

async fn end(mut signals: [Signal; 2], requested: watch::Sender<bool>, grace: Duration) {
    next(&mut signals).await;
    requested.send_replace(true);
    let reason = match tokio::time::timeout(grace, next(&mut signals)).await {
        Ok(()) => "second signal",
        Err(_) => "it did not end in time",
    };
    let (done, logged) = mpsc::channel();
    let log = move || {
        tracing::error!(reason, ?grace, "agent is ended at once: link, routes and guards stay");
        let _ = done.send(());
    };
    if thread::Builder::new().spawn(log).is_ok() {
        let _ = logged.recv_timeout(LOG_PATIENCE);
    }
    // SAFETY: `_exit` may be called at any time. No destructor and no handler runs: one of them
    // might wait for what hangs.
    unsafe { libc::_exit(FORCED) }
}

/// Waits for the next signal of either kind.
async fn next([terminate, interrupt]: &mut [Signal; 2]) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, Stdio};

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::*;

    /// Set in the process that is to be ended: its grace in milliseconds.
    const INSIDE: &str = "TOWLINE_TEST_TERMINATION";
    const READY: &str = "ready to be ended";

    /// Starts this program again for the test `name`, with a task that never ends by itself; sends
    /// it the signals, and expects it to end by `_exit`.
    fn ends(name: &str, grace: Duration, signals: &[Signal]) {
        if let Ok(grace) = std::env::var(INSIDE) {
            let grace = Duration::from_millis(grace.parse().unwrap());
            let mut termination = Termination::watch(grace).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            println!("{READY}");
            runtime.block_on(termination.requested());
            println!("{READY}");
            loop {
                thread::park();
            }
        }
        let test = format!("daemon::termination::tests::{name}");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([&test, "--exact", "--nocapture"])
            .env(INSIDE, grace.as_millis().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for signal in signals {
            assert!(lines.any(|line| line.unwrap().contains(READY)), "it waits for {signal}");
            kill(pid, *signal).unwrap();
        }
        let status = child.wait().unwrap();
        assert_eq!((status.code(), status.signal()), (Some(FORCED), None));
    }

    #[test]
    fn a_signal_ends_a_process_whose_task_hangs() {
        let name = "a_signal_ends_a_process_whose_task_hangs";
        ends(name, Duration::from_millis(50), &[Signal::SIGTERM]);
    }

    #[test]
    fn a_second_signal_ends_it_at_once() {
        let name = "a_second_signal_ends_it_at_once";
        ends(name, Duration::from_secs(1_000_000), &[Signal::SIGTERM, Signal::SIGINT]);
    }
}
