//! Handles Ctrl-C, and provides waits that end at Ctrl-C.
//!
//! The first SIGINT or SIGTERM sets a flag that every wait of the lab checks, so that the lab tears
//! down in order. The second one ends the process at once (the kernel then kills its children).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Error of a wait that ended because SIGINT or SIGTERM arrived.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Interval at which a wait polls.
const POLL: Duration = Duration::from_millis(10);

static RAISED: AtomicBool = AtomicBool::new(false);

/// Installs the handler that sets the flag at the first SIGINT or SIGTERM.
pub fn install() -> anyhow::Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(raise),
        // A second signal gets the default action, which ends the process.
        SaFlags::SA_RESETHAND,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Returns whether SIGINT or SIGTERM arrived.
pub fn raised() -> bool {
    RAISED.load(Ordering::Relaxed)
}

/// Returns an error once SIGINT or SIGTERM arrived.
pub fn check() -> Result<(), Interrupted> {
    if raised() { Err(Interrupted) } else { Ok(()) }
}

/// Calls `poll` until it returns a value, for at most `limit`. `what` completes the error "no ...
/// after 5 s".
///
/// # Errors
/// The error of `poll`, [`Interrupted`], or a timeout.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    poll: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    wait_up_to(limit, poll)?
        .ok_or_else(|| anyhow::anyhow!("no {what} after {:.1} s", limit.as_secs_f64()))
}

/// Calls `poll` until it has returned the same value for `steady`, and returns that value.
///
/// # Errors
/// As for [`wait_for`].
pub fn wait_until_steady<T: Clone + PartialEq>(
    what: &str,
    limit: Duration,
    steady: Duration,
    mut poll: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let (mut last, mut since) = (None, Instant::now());
    wait_for(what, limit, || {
        let now = poll()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        Ok(last.clone().filter(|_| since.elapsed() >= steady))
    })
}

/// Calls `poll` until it returns a value, at least once. Returns `None` at the timeout.
///
/// # Errors
/// The error of `poll`, or [`Interrupted`].
pub fn wait_up_to<T>(
    limit: Duration,
    mut poll: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<Option<T>> {
    let deadline = Instant::now() + limit;
    loop {
        check()?;
        let found = poll()?;
        if found.is_some() || Instant::now() >= deadline {
            return Ok(found);
        }
        pause(POLL);
    }
}

/// Sleeps for `duration`, where the passage of time is itself the subject (a measuring window, a
/// random moment).
///
/// # Errors
/// [`Interrupted`], when SIGINT or SIGTERM arrives.
pub fn sleep(duration: Duration) -> Result<(), Interrupted> {
    let end = Instant::now() + duration;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        pause(left.min(Duration::from_millis(100)));
    }
}

fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

extern "C" fn raise(_signal: libc::c_int) {
    RAISED.store(true, Ordering::Relaxed);
}
