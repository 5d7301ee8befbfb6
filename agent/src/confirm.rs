//! A join that undoes itself unless `towline confirm` follows in time.
//!
//! `confirm-by` in the state directory exists from the join until it is confirmed. The agent keeps
//! the deadline: once it passed, the host is opened and the mesh is left. The guard installs
//! nothing while an expired one exists. Neither the command that joined nor its session has to
//! live on. A reboot before the confirmation counts as a passed deadline: it may be the only way
//! in for an operator who was locked out.
//!
//! The deadline is one of the boot's clock (`CLOCK_BOOTTIME`): setting the time of day neither
//! shortens nor lengthens it.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Name of the file in the state directory.
pub const NAME: &str = "confirm-by";
/// Name of the file that says that a join was undone, until the units are disabled.
pub const UNDONE: &str = "undone";
/// The longest time that may be given for a confirmation.
pub const MAX_SECONDS: u64 = 7 * 24 * 3600;

/// A moment of one boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// The kernel's id of the boot; `None` where it cannot be read.
    boot: Option<String>,
    /// Time since the boot, suspension included.
    uptime: Duration,
    /// Time of day, since 1970.
    wall: Duration,
}

/// A join that has not been confirmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unconfirmed {
    /// The boot in which the machine joined; absent if it could not be read.
    boot_id: Option<String>,
    /// Uptime at the join, in milliseconds.
    joined_ms: u64,
    /// How long the confirmation may take, in seconds.
    seconds: u64,
    /// Time of day at the join, in seconds since 1970. Counts only where boots cannot be told
    /// apart.
    joined_at: u64,
}

/// Whether a join still has to be confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirmation {
    /// It was confirmed, or needed no confirmation.
    Settled,
    /// It has to be confirmed within this time.
    Due(Duration),
    /// It was not confirmed in time, and is to be undone.
    Missed,
}

impl Moment {
    /// Returns the present one.
    pub fn now() -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from);
        Self {
            boot: boot.map(|id| id.trim().to_owned()),
            uptime: uptime.unwrap_or_default(),
            wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        }
    }
}

impl Unconfirmed {
    /// Returns a join at `now` that has to be confirmed within so many seconds.
    pub fn new(now: &Moment, seconds: u64) -> Self {
        Self {
            boot_id: now.boot.clone(),
            joined_ms: u64::try_from(now.uptime.as_millis()).unwrap_or(u64::MAX),
            seconds,
            joined_at: now.wall.as_secs(),
        }
    }

    /// Returns how much time is left; `None`: the deadline has passed.
    pub fn left(&self, now: &Moment) -> Option<Duration> {
        let limit = Duration::from_secs(self.seconds);
        let joined = Duration::from_millis(self.joined_ms);
        // A clock that went back is another boot's.
        let passed = now.uptime.checked_sub(joined)?;
        match (&self.boot_id, &now.boot) {
            (Some(then), Some(now)) if then != now => return None,
            (Some(_), Some(_)) => {}
            _ => {
                let deadline = Duration::from_secs(self.joined_at).checked_add(limit)?;
                deadline.checked_sub(now.wall).filter(|left| !left.is_zero())?;
            }
        }
        limit.checked_sub(passed).filter(|left| !left.is_zero())
    }

    /// Encodes it for the file.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// Returns whether the join of this state directory still has to be confirmed. A file that cannot
/// be read or understood counts as missed: only what is certain keeps an operator out.
pub fn look(state_dir: &Path, now: &Moment) -> Confirmation {
    let bytes = match std::fs::read(state_dir.join(NAME)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Confirmation::Settled;
        }
        Err(_) => return Confirmation::Missed,
    };
    let unconfirmed: Option<Unconfirmed> = serde_json::from_slice(&bytes).ok();
    match unconfirmed.and_then(|unconfirmed| unconfirmed.left(now)) {
        Some(left) => Confirmation::Due(left),
        None => Confirmation::Missed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(boot: Option<&str>, uptime: u64, wall: u64) -> Moment {
        Moment {
            boot: boot.map(ToOwned::to_owned),
            uptime: Duration::from_secs(uptime),
            wall: Duration::from_secs(wall),
        }
    }

    #[test]
    fn the_boots_clock_counts_and_another_boot_has_missed_it() {
        let join = Unconfirmed::new(&moment(Some("a"), 1000, 50_000), 60);
        let left = |boot, uptime, wall| join.left(&moment(boot, uptime, wall));
        assert_eq!(left(Some("a"), 1000, 50_000), Some(Duration::from_secs(60)));
        assert_eq!(left(Some("a"), 1017, 50_017), Some(Duration::from_secs(43)));
        assert_eq!(left(Some("a"), 1060, 50_060), None);
        // Somebody set the time of day.
        assert_eq!(left(Some("a"), 1001, 90_000), Some(Duration::from_secs(59)));
        assert_eq!(left(Some("a"), 1061, 1), None);
        // A reboot, also one whose clock is ahead of the join's.
        assert_eq!(left(Some("b"), 5, 50_010), None);
        assert_eq!(left(Some("b"), 1001, 50_010), None);
        // Where boots have no id: the clock that went back, and the time of day.
        assert_eq!(left(None, 5, 50_010), None);
        assert_eq!(left(None, 1001, 50_061), None);
        assert_eq!(left(None, 1001, 50_001), Some(Duration::from_secs(59)));
    }

    #[test]
    fn a_damaged_file_counts_as_missed() {
        let directory = tempfile::tempdir().unwrap();
        let now = Moment::now();
        assert_eq!(look(directory.path(), &now), Confirmation::Settled);
        let file = directory.path().join(NAME);
        std::fs::write(&file, Unconfirmed::new(&now, 60).encode()).unwrap();
        let Confirmation::Due(left) = look(directory.path(), &now) else { panic!("it is due") };
        assert!(left <= Duration::from_secs(60) && left > Duration::from_secs(59));
        for content in ["", "{", "{\"seconds\":60}"] {
            std::fs::write(&file, content).unwrap();
            assert_eq!(look(directory.path(), &now), Confirmation::Missed, "{content}");
        }
    }

    #[test]
    fn the_longest_times_do_not_overflow() {
        let far = moment(None, u64::MAX / 2000, u64::MAX / 2);
        let join = Unconfirmed::new(&far, u64::MAX);
        assert_eq!(join.left(&far), None);
        assert!(Unconfirmed::new(&moment(Some("a"), 1, 1), u64::MAX).left(&far).is_none());
    }
}
