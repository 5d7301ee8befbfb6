//! Ctrl-C, and waiting that ends at it.
//!
//! The first SIGINT or SIGTERM raises a flag which every wait of the lab looks at, so the lab tears
//! down in order. The second one ends the process at once (the kernel then ends its children).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The lab was asked to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// How often a wait looks.
const POLL: Duration = Duration::from_millis(10);

static RAISED: AtomicBool = AtomicBool::new(false);

/// Makes the first SIGINT or SIGTERM raise the flag.
pub fn install() -> anyhow::Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(raise),
        // A second signal meets the default action.
        SaFlags::SA_RESETHAND,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Whether the lab was asked to end.
pub fn raised() -> bool {
    RAISED.load(Ordering::Relaxed)
}

/// An error once the lab was asked to end.
pub fn check() -> Result<(), Interrupted> {
    if raised() { Err(Interrupted) } else { Ok(()) }
}

/// Calls `poll` until it has something, for at most `limit`; `what` completes "no ... after 5 s".
///
/// # Errors
/// What `poll` says, [`Interrupted`], or that the time is up.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    poll: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    wait_up_to(limit, poll)?
        .ok_or_else(|| anyhow::anyhow!("no {what} after {:.1} s", limit.as_secs_f64()))
}

/// Calls `poll` until it has something, at least once; `None` when the time is up.
///
/// # Errors
/// What `poll` says, or [`Interrupted`].
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

/// Lets `duration` pass, where the passing of time is itself the subject (a measuring window, a
/// random moment).
///
/// # Errors
/// [`Interrupted`].
pub fn pass(duration: Duration) -> Result<(), Interrupted> {
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
