//! Messages of status output as JSON. They are serialized as they are, so that a field of the schema is
//! one of the JSON: `build.rs` names the fields that need one of these functions.

use jiff::Timestamp;
use serde::{Serialize, Serializer};

use crate::code::Coded;
use crate::node;
use crate::pb::{Candidate, Counter, Detail};

/// Version of the JSON and YAML documents of all commands of both programs. It grows when a field is
/// removed or changes its type or meaning, not when one is added. `docs/json.md` describes them.
pub const SCHEMA_VERSION: u32 = 1;

/// Document of the commands `version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Version {
    /// Version of the program.
    pub version: &'static str,
    /// Version of the JSON and YAML documents.
    pub schema_version: u32,
}

impl Version {
    /// Returns the version of the program that runs this.
    pub const fn of_this_program() -> Self {
        Self { version: crate::VERSION, schema_version: SCHEMA_VERSION }
    }
}

impl Detail {
    /// Returns the code and the text of a problem, conflict or note.
    pub fn of(what: &(impl Coded + ToString)) -> Self {
        Self { code: what.code().into(), message: what.to_string() }
    }
}

/// Serializes an empty text as `null`.
pub(crate) fn text<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    (!text.is_empty()).then_some(text).serialize(serializer)
}

/// Serializes seconds since 1970 as text. 0 is `null`.
pub(crate) fn time<S: Serializer>(seconds: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    time_text(*seconds).serialize(serializer)
}

/// Serializes milliseconds since 1970 as text.
pub(crate) fn millis<S: Serializer>(millis: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    let time = Timestamp::from_millisecond(*millis).ok();
    time.map(|time| time.to_string()).serialize(serializer)
}

/// Serializes seconds since 1970 as text. 0 and an absent time are `null`.
pub(crate) fn optional_time<S: Serializer>(
    seconds: &Option<i64>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    seconds.and_then(time_text).serialize(serializer)
}

/// Serializes candidates in the form of [`node::Candidate`]. Those of an unknown kind are left out.
pub(crate) fn candidates<S: Serializer>(
    candidates: &[Candidate],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(candidates.iter().filter_map(|one| node::Candidate::try_from(one).ok()))
}

/// Serializes counters as an object, sorted by name.
pub(crate) fn counters<S: Serializer>(
    counters: &[Counter],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut sorted: Vec<&Counter> = counters.iter().collect();
    sorted.sort_by_key(|counter| &counter.name);
    serializer.collect_map(sorted.into_iter().map(|counter| (&counter.name, counter.count)))
}

/// Returns a time in seconds since 1970 as RFC 3339 text. 0 stands for a time that never was: `None`.
pub fn time_text(seconds: i64) -> Option<String> {
    let time = Timestamp::from_second(seconds).ok().filter(|_| seconds != 0);
    time.map(|time| time.to_string())
}
