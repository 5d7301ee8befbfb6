//! Messages by which a node that reaches no controller asks its peers which nodes were removed.
//!
//! They travel inside the tunnels, as UDP datagrams between overlay addresses, so their source is the peer's. What
//! they contain is signed by the CA: a peer can withhold a removal, but not make one up.
//!
//! ```text
//! 0  4  "TLRM"
//! 4  1  version, 1
//! 5  1  kind: 1 question, 2 answer
//! 6     question: time 8 (seconds since 1970), then padding to the length of the longest answer
//!       answer: an encoded `Changes` with tombstones, the oldest removals first
//! ```

use prost::Message as _;
use towline_proto::pb;

const MAGIC: [u8; 4] = *b"TLRM";
const VERSION: u8 = 1;
const QUESTION: u8 = 1;
const ANSWER: u8 = 2;
/// Bytes of a question, and of the longest answer: no answer is longer than its question. With the headers of
/// IPv6 and UDP it fits into the smallest MTU of IPv6.
pub(crate) const BYTES: usize = 1_200;
/// Bytes of an answer that tombstones may have, each with the few bytes around it.
const TOMBSTONES_BYTES: usize = BYTES - 64;
/// Bytes around a tombstone in an answer, at most.
const OVERHEAD: usize = 16;

/// Removals of nodes that this node knows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Removals {
    /// Time of the newest removal, in seconds since 1970; 0 if there is none.
    pub newest: i64,
    /// Tombstones of the removals since the time that was asked for, the oldest first.
    pub tombstones: Vec<pb::Signed>,
}

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum RemovalMessage {
    /// Which nodes were removed at this time or later?
    Question {
        /// Time in seconds since 1970.
        since: i64,
    },
    /// Tombstones, which are not verified yet.
    Answer(Vec<pb::Signed>),
}

/// Returns the bytes of a question.
pub(crate) fn question(since: i64) -> Vec<u8> {
    let mut bytes = header(QUESTION);
    bytes.extend(since.to_be_bytes());
    bytes.resize(BYTES, 0);
    bytes
}

/// Returns the bytes of an answer with the first of these tombstones, as many as fit.
pub(crate) fn answer(tombstones: impl IntoIterator<Item = pb::Signed>) -> Vec<u8> {
    let mut used = 0;
    let fitting = tombstones.into_iter().take_while(|tombstone| {
        used += tombstone.encoded_len() + OVERHEAD;
        used <= TOMBSTONES_BYTES
    });
    let changes = pb::Changes::of(fitting.map(pb::change::Kind::Tombstone), 0);
    let mut bytes = header(ANSWER);
    bytes.extend(changes.encode_to_vec());
    bytes
}

/// Parses a message; `None` if it is none. A question that is shorter than an answer may be is none.
pub(crate) fn parse(bytes: &[u8]) -> Option<RemovalMessage> {
    let rest = bytes.strip_prefix(&MAGIC)?.strip_prefix(&[VERSION])?;
    match rest.split_first()? {
        (&QUESTION, body) if bytes.len() >= BYTES => {
            let since = i64::from_be_bytes(*body.first_chunk()?);
            Some(RemovalMessage::Question { since })
        }
        (&ANSWER, body) if bytes.len() <= BYTES => {
            let changes = pb::Changes::decode(body).ok()?;
            let tombstones = changes.kinds().filter_map(|kind| match kind {
                Ok(pb::change::Kind::Tombstone(tombstone)) => Some(tombstone),
                Ok(pb::change::Kind::Upsert(_) | pb::change::Kind::Mesh(_)) | Err(_) => None,
            });
            Some(RemovalMessage::Answer(tombstones.collect()))
        }
        _ => None,
    }
}

/// Returns the time of a removal, in seconds since 1970. The signature is not verified.
pub(crate) fn removed_at(tombstone: &pb::Signed) -> Option<i64> {
    Some(pb::Tombstone::decode(tombstone.body.clone()).ok()?.removed_at)
}

fn header(kind: u8) -> Vec<u8> {
    [MAGIC.as_slice(), &[VERSION, kind]].concat()
}

#[cfg(test)]
mod tests {
    use towline_fixtures::ca::Ca;

    use super::*;

    #[test]
    fn messages_read_back_what_they_say_and_an_answer_is_no_longer_than_its_question() {
        let ca = Ca::new(9);
        let tombstones: Vec<pb::Signed> = (1..=200).map(|number| ca.tombstone(number)).collect();
        let question = question(-5);
        assert_eq!(parse(&question), Some(RemovalMessage::Question { since: -5 }));
        assert_eq!(parse(&question[..BYTES - 1]), None);
        let answer = answer(tombstones.clone());
        assert!(answer.len() <= question.len(), "{}", answer.len());
        let Some(RemovalMessage::Answer(read)) = parse(&answer) else { panic!("an answer") };
        assert!(read.len() >= 3 && tombstones.starts_with(&read), "{}", read.len());
        assert!(removed_at(&read[0]).is_some());
        for end in 0..answer.len() {
            // Every result but a panic is fine.
            let _ = parse(&answer[..end]);
        }
    }
}
