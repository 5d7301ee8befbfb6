//! Number of threads that help a worker to encrypt, in the words of the configuration.

use std::fmt;
use std::num::NonZeroU8;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::ser::{Serialize, Serializer};

/// Largest number of helpers of one worker. A worker cannot keep more of them busy.
const MOST_HELPERS: u8 = 8;
/// Number of cores for each worker and helper that `auto` starts. The worker and its helper need one each;
/// the others are for the programs that send and receive.
const CORES_PER_HELPER: usize = 4;
/// Largest number of helpers of one worker that `auto` starts.
const MOST_AUTO_HELPERS: usize = 2;

/// Number of threads that encrypt for each worker while it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SealAhead {
    /// As many as the cores of the machine allow: none below four.
    #[default]
    Auto,
    /// No thread.
    Off,
    /// This number of threads, 1 to 8.
    Helpers(NonZeroU8),
}

impl SealAhead {
    /// Returns the number of helpers of each of `workers` on a machine with `cores` that this process may
    /// use.
    pub fn helpers(self, cores: usize, workers: usize) -> usize {
        match self {
            Self::Auto => (cores / (CORES_PER_HELPER * workers.max(1))).min(MOST_AUTO_HELPERS),
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
        for (cores, workers, helpers) in [
            (1, 1, 0),
            (3, 1, 0),
            (4, 1, 1),
            (7, 1, 1),
            (8, 1, 2),
            (64, 1, 2),
            (4, 2, 0),
            (8, 2, 1),
        ] {
            let started = SealAhead::Auto.helpers(cores, workers);
            assert_eq!(started, helpers, "{cores} cores, {workers} workers");
        }
    }

    #[test]
    fn a_number_holds_on_every_machine() {
        let three = SealAhead::Helpers(NonZeroU8::new(3).unwrap());
        assert_eq!((three.helpers(1, 1), three.helpers(64, 4)), (3, 3));
        assert_eq!(SealAhead::Off.helpers(64, 1), 0);
    }
}
