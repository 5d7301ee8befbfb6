//! The seam to the caller's buffers: plaintext comes from [`Segments`], sealed messages go into a
//! [`Sink`]. Both are called for every packet, so they are type parameters, never trait objects.
//! Received messages are [`Message`]s in [`Buffers`].

use crate::Unsealed;

/// Plaintext to seal, one segment after another.
pub trait Segments {
    /// Returns the bytes of the next segment with its padding. `None` if there is none.
    fn next_len(&self) -> Option<usize>;
    /// Returns the next segment with its padding. Empty if there is none.
    fn take(&mut self) -> &[u8];

    /// Writes the next segment with its padding to the start of `to`. Returns its length: 0 if there is
    /// none, or if `to` is shorter, which loses the segment.
    fn write(&mut self, to: &mut [u8]) -> usize {
        let segment = self.take();
        let Some(space) = to.get_mut(..segment.len()) else { return 0 };
        space.copy_from_slice(segment);
        segment.len()
    }
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

/// Space for data messages, one after another, in one buffer.
pub trait Sink {
    /// Returns the space for the next message, which has at least `len` bytes. `None` if there is
    /// no room.
    fn place(&mut self, len: usize) -> Option<&mut [u8]>;
    /// Returns the position of the space for the next message in the buffer, and the list of the
    /// messages in it that are not sealed yet. The owner of the buffer seals them before it sends
    /// the buffer ([`Unsealed::seal`]).
    fn unsealed(&mut self) -> (usize, &mut Unsealed);
    /// Appends the first `len` bytes of the space as a message.
    fn commit(&mut self, len: usize);
}

/// Position of a received message in its buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Position of the first byte.
    pub start: usize,
    /// Length in bytes.
    pub len: usize,
}

/// Buffers that data messages are opened in.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// Buffer with the received messages. An engine that opens in place
    /// ([`crate::Engine::opens_in_place`]) leaves the packets in it.
    pub sealed: &'a mut [u8],
    /// Buffer for the packets of the other engines, which is as long.
    pub plain: &'a mut [u8],
    /// Working memory, kept between calls for its capacity.
    pub scratch: &'a mut Scratch,
}

/// Working memory of [`crate::Session::open`].
#[derive(Debug, Default)]
pub struct Scratch {
    /// Messages whose authenticity decides.
    pub(crate) packets: Vec<towline_aead::Packet>,
    /// One entry for each of `packets`.
    pub(crate) authentic: Vec<bool>,
    /// One entry for each message: why it is refused without decryption, if it is.
    pub(crate) refusals: Vec<Option<crate::Refusal>>,
}

impl Scratch {
    /// Creates the memory for calls with up to `messages` messages. It allocates only beyond that.
    pub fn with_capacity(messages: usize) -> Self {
        Self {
            packets: Vec::with_capacity(messages),
            authentic: Vec::with_capacity(messages),
            refusals: Vec::with_capacity(messages),
        }
    }
}
