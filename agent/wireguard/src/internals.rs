//! Sessions, time, randomness and buffers for tests, fuzzing and benchmarks. Not part of the public
//! API.

#![expect(clippy::indexing_slicing, reason = "positions come from the buffers themselves")]

use std::ops::Range;
use std::time::{Duration, Instant};

use x25519_dalek::StaticSecret;

use crate::{
    Answered, Buffers, Engine, HANDSHAKE_BYTES, Inputs, Message, Opened, Scratch, Secrets, Session,
    Single, Sink, Unsealed,
};

/// Time that only passes when it is told to, and randomness that a seed determines.
#[derive(Debug, Clone)]
pub struct World {
    /// Time on the monotonic clock.
    pub now: Instant,
    /// Time since the Unix epoch.
    pub unix_time: Duration,
    state: u64,
}

impl World {
    /// Creates a world that starts now.
    pub fn new(seed: u64) -> Self {
        Self { now: Instant::now(), unix_time: Duration::from_secs(1_700_000_000), state: seed }
    }

    /// Lets time pass.
    pub fn advance(&mut self, time: Duration) {
        self.now += time;
        self.unix_time += time;
    }

    /// Returns a random number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        next(&mut self.state) % bound
    }

    /// Calls `call` with this time and randomness.
    pub fn with<R>(&mut self, call: impl FnOnce(&mut Inputs<'_>) -> R) -> R {
        let Self { now, unix_time, state } = self;
        let mut random = || {
            let mut bytes = [0; 32];
            for word in bytes.chunks_exact_mut(8) {
                word.copy_from_slice(&next(state).to_le_bytes());
            }
            Some(bytes)
        };
        call(&mut Inputs { now: *now, unix_time: *unix_time, random: &mut random })
    }
}

/// Returns the next number of the generator SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Send buffer that grows up to a limit.
#[derive(Debug)]
pub struct Outbox {
    bytes: Vec<u8>,
    used: usize,
    messages: Vec<Range<usize>>,
    unsealed: Unsealed,
}

impl Outbox {
    /// Creates an empty buffer of `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        let (messages, unsealed) = (Vec::new(), Unsealed::default());
        Self { bytes: vec![0; capacity], used: 0, messages, unsealed }
    }

    /// Seals and removes all messages.
    pub fn take(&mut self) -> Vec<Vec<u8>> {
        assert!(self.unsealed.seal(&mut self.bytes), "the positions are inside");
        self.used = 0;
        self.messages.drain(..).map(|range| self.bytes[range].to_vec()).collect()
    }
}

impl Sink for Outbox {
    fn place(&mut self, len: usize) -> Option<&mut [u8]> {
        self.bytes.get_mut(self.used..).filter(|space| space.len() >= len)
    }

    fn unsealed(&mut self) -> (usize, &mut Unsealed) {
        (self.used, &mut self.unsealed)
    }

    fn commit(&mut self, len: usize) {
        self.messages.push(self.used..self.used + len);
        self.used += len;
    }
}

/// Seals packets as one batch.
pub fn seal(session: &mut Session, now: Instant, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let len = packets.iter().map(|packet| packet.len() + HANDSHAKE_BYTES).sum();
    let mut outbox = Outbox::new(len);
    for packet in packets {
        session.seal(now, &mut Single::new(packet), &mut outbox);
    }
    outbox.take()
}

/// Opens messages as one batch. Returns the result for each, and its packet, which is empty if there
/// is none.
pub fn open(session: &mut Session, now: Instant, messages: &[Vec<u8>]) -> Vec<(Opened, Vec<u8>)> {
    let mut sealed = messages.concat();
    let mut plain = vec![0; sealed.len()];
    let mut end = 0;
    let places: Vec<Message> = messages
        .iter()
        .map(|message| {
            end += message.len();
            Message { start: end - message.len(), len: message.len() }
        })
        .collect();
    let mut results = Vec::new();
    let buffers =
        Buffers { sealed: &mut sealed, plain: &mut plain, scratch: &mut Scratch::default() };
    session.open(now, places.iter().copied(), buffers, |message, opened| {
        assert_eq!(message, places[results.len()], "the results are in order");
        results.push(opened);
    });
    let in_place = session.opens_in_place();
    let packets = if in_place { &sealed } else { &plain };
    let packet = |opened: &Opened| match opened {
        Opened::Packet { start, len } => packets[*start..start + len].to_vec(),
        Opened::Keepalive | Opened::Refused(_) => Vec::new(),
    };
    results.iter().map(|opened| (*opened, packet(opened))).collect()
}

/// Returns two sessions of boringtun with each other. The first initiated.
pub fn pair() -> [Session; 2] {
    pair_of([Engine::BORINGTUN; 2], &mut World::new(1))
}

/// Returns two sessions of these engines with each other. The first initiated.
pub fn pair_of(engines: [Engine; 2], world: &mut World) -> [Session; 2] {
    let [ours, theirs] = [(1, engines[0]), (2, engines[1])]
        .map(|(byte, engine)| Secrets::with_engine(StaticSecret::from([byte; 32]), engine));
    let mut a = Session::new(&ours, theirs.public_key(), None, 1);
    let mut b = Session::new(&theirs, ours.public_key(), None, 2);
    assert!(establish(world, &mut a, &mut b), "the handshake completes");
    [a, b]
}

/// Returns the message by which a session initiates a handshake.
pub fn initiate(world: &mut World, session: &mut Session) -> Vec<u8> {
    let mut message = [0; HANDSHAKE_BYTES];
    let len = world.with(|inputs| session.initiate(inputs, &mut message));
    message[..len].to_vec()
}

/// Returns the answer to a message of a handshake, and the reply, which is empty if there is none.
pub fn answer(world: &mut World, session: &mut Session, message: &[u8]) -> (Answered, Vec<u8>) {
    let mut reply = [0; HANDSHAKE_BYTES];
    let answered = world.with(|inputs| session.handshake(inputs, message, &mut reply));
    let len = match answered {
        Answered::Response { len, .. } | Answered::Established { len } => len,
        Answered::Cookie | Answered::Refused(_) => 0,
    };
    (answered, reply[..len].to_vec())
}

/// Completes a handshake that `a` initiates. Returns whether both have a session that is confirmed.
pub fn establish(world: &mut World, a: &mut Session, b: &mut Session) -> bool {
    let initiation = initiate(world, a);
    let (answered, response) = answer(world, b, &initiation);
    let Answered::Response { .. } = answered else { return false };
    let (answered, keepalive) = answer(world, a, &response);
    let Answered::Established { .. } = answered else { return false };
    let opened = open(b, world.now, &[keepalive]);
    matches!(opened[..], [(Opened::Keepalive, _)]) && a.is_ready(world.now) && b.is_ready(world.now)
}
