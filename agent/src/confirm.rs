//! A join that is undone unless `towline confirm` follows in time.
//!
//! `confirm-by` in the state directory exists from the join until it is confirmed. The agent keeps
//! the deadline: after it, the host is opened and the node leaves the mesh. The guard installs
//! nothing while an expired file exists. The command that joined and its session need not exist any
//! more. A reboot before the confirmation counts as a missed deadline: for an operator who was
//! locked out it may be the only way in.
//!
//! The deadline uses the boot clock (`CLOCK_BOOTTIME`), so that setting the time of day does not
//! change it.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Name of the file with the deadline, in the state directory.
pub const NAME: &str = "confirm-by";
/// Name of the file that marks an undone join, until the units are disabled.
pub const UNDONE: &str = "undone";
/// Upper limit for the time until a confirmation, in seconds: one week.
pub const MAX_SECONDS: u64 = 7 * 24 * 3600;

/// Point in time within one boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// Boot id of the kernel. `None` if it cannot be read.
    boot: Option<String>,
    /// Time since the boot, including suspends.
    uptime: Duration,
    /// Time of day, as a duration since 1970.
    wall: Duration,
}

/// Join that has not been confirmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unconfirmed {
    /// Boot id at the join. Absent if it could not be read.
    boot_id: Option<String>,
    /// Uptime at the join, in milliseconds.
    joined_ms: u64,
    /// Time until the deadline, in seconds after the join.
    seconds: u64,
    /// Time of day at the join, in seconds since 1970. Only used if a boot id is missing.
    joined_at: u64,
}

/// State of the confirmation of a join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirmation {
    /// The join was confirmed, or needed no confirmation.
    Settled,
    /// The join has to be confirmed within this time.
    Due(Duration),
    /// The join was not confirmed in time and must be undone.
    Missed,
}

impl Moment {
    /// Returns the current moment.
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
    /// Creates a join at `now` that has to be confirmed within `seconds`.
    pub fn new(now: &Moment, seconds: u64) -> Self {
        Self {
            boot_id: now.boot.clone(),
            joined_ms: u64::try_from(now.uptime.as_millis()).unwrap_or(u64::MAX),
            seconds,
            joined_at: now.wall.as_secs(),
        }
    }

    /// Returns the time left, or `None` if the deadline has passed.
    pub fn left(&self, now: &Moment) -> Option<Duration> {
        let limit = Duration::from_secs(self.seconds);
        let joined = Duration::from_millis(self.joined_ms);
        // An uptime before that of the join is from another boot.
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

    /// Encodes the join for the file.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// Returns whether the join of this state directory still has to be confirmed. A file that cannot
/// be read or parsed counts as missed, because an error must not lock an operator out.
pub fn status(state_dir: &Path, now: &Moment) -> Confirmation {
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
        // The time of day was changed.
        assert_eq!(left(Some("a"), 1001, 90_000), Some(Duration::from_secs(59)));
        assert_eq!(left(Some("a"), 1061, 1), None);
        // The machine rebooted; in the second case its uptime is past that of the join.
        assert_eq!(left(Some("b"), 5, 50_010), None);
        assert_eq!(left(Some("b"), 1001, 50_010), None);
        // Without boot ids, a lower uptime or the time of day decides.
        assert_eq!(left(None, 5, 50_010), None);
        assert_eq!(left(None, 1001, 50_061), None);
        assert_eq!(left(None, 1001, 50_001), Some(Duration::from_secs(59)));
    }

    #[test]
    fn a_damaged_file_counts_as_missed() {
        let directory = tempfile::tempdir().unwrap();
        let now = Moment::now();
        assert_eq!(status(directory.path(), &now), Confirmation::Settled);
        let file = directory.path().join(NAME);
        std::fs::write(&file, Unconfirmed::new(&now, 60).encode()).unwrap();
        let Confirmation::Due(left) = status(directory.path(), &now) else { panic!("it is due") };
        assert!(left <= Duration::from_secs(60) && left > Duration::from_secs(59));
        for content in ["", "{", "{\"seconds\":60}"] {
            std::fs::write(&file, content).unwrap();
            assert_eq!(status(directory.path(), &now), Confirmation::Missed, "{content}");
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
