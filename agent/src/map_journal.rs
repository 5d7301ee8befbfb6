//! Journal of the cached map: what changed since the whole map was written, appended to a file of its own.
//!
//! A mesh in which addresses change all the time would otherwise have each agent write its whole map, up to some
//! megabytes, each second. The journal belongs to the map at one epoch and revision; with any other map it is
//! ignored. A crash may cut its last entry, which is then ignored too: the controller sends those changes again.
//!
//! ```text
//! 0  8  "TLJRNL" and version
//! 8  8  epoch of the map, big-endian
//! 16 8  revision of the map
//! 24    entries: length 4, first 8 bytes of the entry's SHA-256, entry (an encoded `Changes`)
//! ```

use ring::digest::{SHA256, digest};

const MAGIC: &[u8; 8] = b"TLJRNL\x01\n";
/// Bytes of the digest of an entry.
const DIGEST: usize = 8;

/// Epoch and revision of a map.
pub(crate) type Position = (u64, u64);

/// Returns the beginning of a journal that belongs to the map at this position.
pub(crate) fn begin((epoch, revision): Position) -> Vec<u8> {
    [MAGIC.as_slice(), &epoch.to_be_bytes(), &revision.to_be_bytes()].concat()
}

/// Returns an entry with its length and digest.
pub(crate) fn entry(body: &[u8]) -> Vec<u8> {
    // A map is much smaller than 4 GiB.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    [length.to_be_bytes().as_slice(), &sum(body), body].concat()
}

/// Returns the complete entries of a journal that belongs to the map at this position, in order.
pub(crate) fn entries(journal: &[u8], position: Position) -> Vec<&[u8]> {
    let mut entries = Vec::new();
    let Some(mut rest) = journal.strip_prefix(begin(position).as_slice()) else { return entries };
    while let Some((entry, after)) = next(rest) {
        entries.push(entry);
        rest = after;
    }
    entries
}

/// Returns the first entry and what follows it.
fn next(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (expected, rest) = rest.split_first_chunk::<DIGEST>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let (body, after) = rest.split_at_checked(length)?;
    (sum(body) == *expected).then_some((body, after))
}

fn sum(body: &[u8]) -> [u8; DIGEST] {
    // A SHA-256 has 32 bytes.
    digest(&SHA256, body).as_ref().first_chunk().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_reads_back_its_complete_entries_for_its_own_map_alone() {
        let bodies: [&[u8]; 3] = [b"one", b"", b"three"];
        let mut journal = begin((2, 9));
        journal.extend(bodies.iter().flat_map(|body| entry(body)));
        assert_eq!(entries(&journal, (2, 9)), bodies);
        assert!(entries(&journal, (2, 8)).is_empty());
        for end in 0..journal.len() {
            let read = entries(&journal[..end], (2, 9));
            assert!(read.len() < bodies.len() && bodies.starts_with(&read), "{end}");
        }
        let last = journal.len() - 1;
        journal[last] ^= 1;
        assert_eq!(entries(&journal, (2, 9)), bodies[..2]);
    }
}
