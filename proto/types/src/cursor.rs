//! Bytes that a parser reads from front to back.

use std::num::NonZeroUsize;

/// Bytes that are left to a parser: at least one.
///
/// Every step consumes at least one byte and returns what is left, or `None` at the end. So a loop over
/// a cursor ends, by its type. A step that needs more bytes than there are returns `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    /// Returns the cursor at the start of these bytes. `None` if there are none.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        (!bytes.is_empty()).then_some(Self(bytes))
    }

    /// Returns the bytes that are left.
    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    /// Takes one byte.
    pub fn byte(self) -> Option<(u8, Option<Self>)> {
        let (byte, rest) = self.0.split_first()?;
        Some((*byte, Self::new(rest)))
    }

    /// Takes `N` bytes, at least one.
    pub fn chunk<const N: usize>(self) -> Option<(&'a [u8; N], Option<Self>)> {
        const { assert!(N > 0) };
        let (chunk, rest) = self.0.split_first_chunk()?;
        Some((chunk, Self::new(rest)))
    }

    /// Takes `len` bytes.
    pub fn take(self, len: NonZeroUsize) -> Option<(&'a [u8], Option<Self>)> {
        let (taken, rest) = self.0.split_at_checked(len.get())?;
        Some((taken, Self::new(rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn steps_end_and_cover_every_byte_once(
            bytes: Vec<u8>,
            steps in proptest::collection::vec(1usize..9, 1..9),
        ) {
            let (mut cursor, mut read) = (Cursor::new(&bytes), Vec::new());
            for step in steps.iter().cycle() {
                let Some(now) = cursor else { break };
                let len = NonZeroUsize::new(*step).unwrap();
                let (taken, rest) = now.take(len).unwrap_or((now.bytes(), None));
                read.extend_from_slice(taken);
                prop_assert!(rest.is_none_or(|rest| !rest.bytes().is_empty()));
                cursor = rest;
            }
            prop_assert_eq!(read, bytes);
        }
    }

    #[test]
    fn a_step_beyond_the_end_is_refused() {
        let cursor = Cursor::new(&[1, 2, 3]).unwrap();
        assert_eq!(cursor.chunk::<4>(), None);
        assert_eq!(cursor.chunk::<3>(), Some((&[1, 2, 3], None)));
        let (first, rest) = cursor.byte().unwrap();
        assert_eq!((first, rest.unwrap().bytes()), (1, &[2, 3][..]));
        assert_eq!(Cursor::new(&[]), None);
    }
}
