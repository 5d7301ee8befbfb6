//! Number of threads that help the worker to encrypt, in the words of the configuration.
//!
//! Only a single worker has helpers. Several workers share the session with a node that has many
//! addresses, such as those of its pods. With the batches that a ring of each holds back, packets of
//! that session would be out of order by more than the replay window of some peers, which is 1,024
//! with boringtun.

use std::fmt;
use std::num::NonZeroU8;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::ser::{Serialize, Serializer};

/// Largest number of helpers. A worker cannot keep more of them busy.
const MOST_HELPERS: u8 = 8;
/// Number of cores for each helper that `auto` starts. The worker and its helper need one each; the others
/// are for the programs that send and receive.
const CORES_PER_HELPER: usize = 4;
/// Largest number of helpers that `auto` starts.
const MOST_AUTO_HELPERS: usize = 2;

/// Number of threads that encrypt for the worker while it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SealAhead {
    /// As many as the cores of the machine allow: none below four. None with several workers.
    #[default]
    Auto,
    /// No thread.
    Off,
    /// This number of threads, 1 to 8.
    Helpers(NonZeroU8),
}

impl SealAhead {
    /// Returns the number of helpers with this number of workers, on a machine with `cores` that this
    /// process may use.
    pub fn helpers(self, cores: usize, workers: usize) -> usize {
        if workers > 1 {
            return 0;
        }
        match self {
            Self::Auto => (cores / CORES_PER_HELPER).min(MOST_AUTO_HELPERS),
            Self::Off => 0,
            Self::Helpers(helpers) => helpers.get().into(),
        }
    }
}

impl Serialize for SealAhead {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Off => serializer.serialize_str("off"),
            Self::Helpers(helpers) => serializer.serialize_u8(helpers.get()),
        }
    }
}

impl<'de> Deserialize<'de> for SealAhead {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Words)
    }
}

/// Parser of a value, which is a word or a number.
struct Words;

impl Visitor<'_> for Words {
    type Value = SealAhead;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"auto\", \"off\" or a number of 1 to {MOST_HELPERS}")
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<SealAhead, E> {
        match word {
            "auto" => Ok(SealAhead::Auto),
            "off" => Ok(SealAhead::Off),
            _ => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<SealAhead, E> {
        let helpers = u8::try_from(number).ok().filter(|helpers| *helpers <= MOST_HELPERS);
        let helpers = helpers.and_then(NonZeroU8::new).map(SealAhead::Helpers);
        helpers.ok_or_else(|| E::invalid_value(de::Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<SealAhead, E> {
        self.visit_i64(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_starts_no_helper_below_four_cores() {
        for (cores, helpers) in [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (64, 2)] {
            assert_eq!(SealAhead::Auto.helpers(cores, 1), helpers, "{cores} cores");
        }
    }

    #[test]
    fn a_number_holds_on_every_machine() {
        let three = SealAhead::Helpers(NonZeroU8::new(3).unwrap());
        assert_eq!((three.helpers(1, 1), three.helpers(64, 1)), (3, 3));
        assert_eq!(SealAhead::Off.helpers(64, 1), 0);
    }

    #[test]
    fn several_workers_have_no_helpers() {
        let three = SealAhead::Helpers(NonZeroU8::new(3).unwrap());
        for choice in [SealAhead::Auto, SealAhead::Off, three] {
            assert_eq!(choice.helpers(64, 2), 0);
        }
    }
}
