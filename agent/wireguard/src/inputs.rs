//! Time and randomness of a call.

use std::time::{Duration, Instant, SystemTime};

use ring::rand::{SecureRandom, SystemRandom};

/// Time and randomness of a call that may start or answer a handshake. boringtun uses those of the
/// system instead.
pub struct Inputs<'a> {
    /// Time on the monotonic clock.
    pub now: Instant,
    /// Time since the Unix epoch, for timestamps of initiations.
    pub unix_time: Duration,
    /// Source of secret random bytes. Without any no handshake is started or answered.
    pub random: &'a mut dyn FnMut() -> Option<[u8; 32]>,
}

impl std::fmt::Debug for Inputs<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inputs").field("now", &self.now).finish_non_exhaustive()
    }
}

impl Inputs<'_> {
    /// Calls `call` with the system's wall clock and randomness.
    pub fn system<R>(now: Instant, call: impl FnOnce(&mut Inputs<'_>) -> R) -> R {
        // A clock before 1970 gives the epoch itself. Timestamps increase nevertheless.
        let unix_time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let unix_time = unix_time.unwrap_or_default();
        call(&mut Inputs { now, unix_time, random: &mut system_random })
    }
}

fn system_random() -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).ok()?;
    Some(bytes)
}
