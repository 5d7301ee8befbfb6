//! The seam to the caller's buffers: plaintext comes from [`Segments`], sealed messages go into a
//! [`Sink`]. Both are called for every packet, so they are type parameters, never trait objects.

/// Plaintext to seal, one segment after another.
pub trait Segments {
    /// Returns the bytes of the next segment with its padding. `None` if there is none.
    fn next_len(&self) -> Option<usize>;
    /// Returns the next segment with its padding. Empty if there is none.
    fn take(&mut self) -> &[u8];
}

/// Single segment, which is padded already.
#[derive(Debug)]
pub struct Single<'a>(Option<&'a [u8]>);

impl<'a> Single<'a> {
    /// Returns the source whose only segment is `payload`.
    #[inline]
    pub fn new(payload: &'a [u8]) -> Self {
        Self(Some(payload))
    }
}

impl Segments for Single<'_> {
    #[inline]
    fn next_len(&self) -> Option<usize> {
        self.0.map(<[u8]>::len)
    }

    #[inline]
    fn take(&mut self) -> &[u8] {
        self.0.take().unwrap_or_default()
    }
}

/// Space for sealed messages, one after another.
pub trait Sink {
    /// Returns the space for the next message, which has at least `len` bytes. `None` if there is
    /// no room.
    fn place(&mut self, len: usize) -> Option<&mut [u8]>;
    /// Appends the first `len` bytes of the space as a message.
    fn commit(&mut self, len: usize);
}
