//! Ends the agent on SIGTERM and SIGINT, even if its main task hangs.
//!
//! A dedicated thread receives the signals, because the daemon's task may block without limit. The
//! first signal asks the task to end. A second signal, or a task that has not ended after some
//! seconds, ends the process immediately.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// Maximum time for the daemon's task to end by itself. It is longer than the wait for the data
/// plane, and shorter than the stop timeout of a service manager.
pub(super) const GRACE: Duration = Duration::from_secs(8);
/// Maximum time for the last log line. The reader of the log may hang too.
const LOG_TIMEOUT: Duration = Duration::from_millis(500);
/// Exit status of a process that did not end by itself.
const FORCED: i32 = 1;

/// Receiver that shows whether the agent was asked to end.
#[derive(Debug)]
pub(super) struct Termination(watch::Receiver<bool>);

impl Termination {
    /// Starts to receive the signals. The process ends at most `grace` after the first one.
    ///
    /// # Errors
    ///
    /// Fails if no thread or no descriptor can be created.
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
            // The thread only ends with the process.
            std::future::pending::<()>().await;
        }
    }
}

/// Waits for the first signal, then ends the process after `grace` or at the second signal.
async fn end(mut signals: [Signal; 2], requested: watch::Sender<bool>, grace: Duration) {
    next(&mut signals).await;
    requested.send_replace(true);
    let reason = match tokio::time::timeout(grace, next(&mut signals)).await {
        Ok(()) => "second signal",
        Err(_) => "timeout",
    };
    let (done, logged) = mpsc::channel();
    let log = move || {
        tracing::error!(reason, ?grace, "agent hangs: ending it now: link, routes and guards stay");
        let _ = done.send(());
    };
    if thread::Builder::new().spawn(log).is_ok() {
        let _ = logged.recv_timeout(LOG_TIMEOUT);
    }
    // SAFETY: `_exit` may be called at any time. It runs no destructor and no handler; one of them
    // might block on what hangs.
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

    /// Environment variable of the child process that the test ends: its grace in milliseconds.
    const INSIDE: &str = "TOWLINE_TEST_TERMINATION";
    /// Line that the child process prints when it is ready for the next signal.
    const READY: &str = "ready to be ended";

    /// Starts this program again for the test `name`, with a task that never ends by itself. Sends
    /// it the signals and expects it to end by `_exit`.
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
