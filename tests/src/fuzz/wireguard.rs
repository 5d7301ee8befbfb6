//! Fuzzes the batch engine: two ends, of which the second is boringtun or the batch engine, exchange
//! messages that the bytes select, change, lose, repeat and keep for later, while time passes.
//!
//! No message causes a panic, each gets one result, and a packet arrives only as it was sent, once.

use std::collections::BTreeSet;
use std::sync::LazyLock;
use std::time::Duration;

use towline_proto::id::PresharedKey;
use towline_wireguard::internals::{World, open, seal};
use towline_wireguard::{
    Aead, Answered, Engine, EngineChoice, HANDSHAKE_BYTES, MessageKind, Opened, Secrets, Session,
    Tick,
};
use x25519_dalek::StaticSecret;

use super::Input;

/// Number of steps for one input, which bounds its run time.
const STEPS: u32 = 96;
/// Largest number of messages that are kept.
const KEPT: usize = 64;

/// The batch engine with the fastest AEAD of this CPU, and with ring.
static BATCH: LazyLock<[Engine; 2]> = LazyLock::new(|| {
    [Aead::Auto, Aead::Ring].map(|aead| Engine::select(EngineChoice::Batch, aead))
});

struct Ends {
    world: World,
    ends: [Session; 2],
    /// Messages that were sent to each end.
    sent: [Vec<Vec<u8>>; 2],
    /// Numbers of the packets that arrived at each end.
    arrived: [BTreeSet<u32>; 2],
    number: u32,
    /// True if both ends take the time from the world.
    has_time: bool,
}

/// Runs two ends on one input; see the module's documentation.
pub fn wireguard(bytes: &[u8]) {
    let mut input = Input(bytes);
    let batch = BATCH[usize::from(input.below(2))];
    let other = if input.below(2) == 0 { batch } else { Engine::BORINGTUN };
    let psk = (input.below(2) == 0).then_some(PresharedKey([7; 32]));
    let secrets = [(1, batch), (2, other)]
        .map(|(byte, engine)| Secrets::with_engine(StaticSecret::from([byte; 32]), engine));
    let [a, b] = &secrets;
    let mut ends = Ends {
        world: World::new(1),
        ends: [
            Session::new(a, b.public_key(), psk.as_ref(), 1),
            Session::new(b, a.public_key(), psk.as_ref(), 2),
        ],
        sent: Default::default(),
        arrived: Default::default(),
        number: 0,
        has_time: other == batch,
    };
    for _ in 0..STEPS {
        let Some(what) = input.byte() else { break };
        let end = usize::from(what % 2);
        match what / 2 % 8 {
            0 => ends.initiate(end),
            1 => ends.data(end, &mut input),
            2 => ends.tick(end),
            3 if ends.has_time => {
                ends.world.advance(Duration::from_secs(input.below(200).into()));
            }
            4 => ends.junk(end, &mut input),
            5 => ends.changed(end, &mut input),
            _ => ends.deliver(end, &mut input),
        }
    }
}

impl Ends {
    fn keep(&mut self, to: usize, message: Vec<u8>) {
        let sent = &mut self.sent[to];
        if !message.is_empty() && sent.len() < KEPT {
            sent.push(message);
        }
    }

    fn initiate(&mut self, from: usize) {
        let (end, mut message) = (&mut self.ends[from], [0; HANDSHAKE_BYTES]);
        let len = self.world.with(|inputs| end.initiate(inputs, &mut message));
        self.keep(1 - from, message[..len].to_vec());
    }

    /// Sends a few packets as one batch.
    fn data(&mut self, from: usize, input: &mut Input<'_>) {
        if !self.ends[from].is_ready(self.world.now) {
            return;
        }
        let packets: Vec<Vec<u8>> = (0..=input.below(20))
            .map(|_| {
                let len = 24 + usize::from(input.byte().unwrap_or(0)) * 6;
                self.number += 1;
                packet(self.number, from, len)
            })
            .collect();
        for message in seal(&mut self.ends[from], self.world.now, &packets) {
            self.keep(1 - from, message);
        }
    }

    fn tick(&mut self, from: usize) {
        let (end, mut message) = (&mut self.ends[from], [0; HANDSHAKE_BYTES]);
        let tick = self.world.with(|inputs| end.tick(inputs, &mut message));
        if let Tick::Initiation(len) | Tick::Keepalive(len) = tick {
            self.keep(1 - from, message[..len].to_vec());
        }
    }

    /// Delivers a message of any bytes.
    fn junk(&mut self, to: usize, input: &mut Input<'_>) {
        let len = [32, 64, 92, 148, 16, 33, 200, 0][usize::from(input.below(8))];
        let mut message = vec![input.byte().unwrap_or(0); len];
        let head = [input.below(6), 0, 0, 0, input.byte().unwrap_or(0), 1, 0, 0];
        message.iter_mut().zip(head).for_each(|(to, from)| *to = from);
        self.take(to, vec![message]);
    }

    /// Delivers a message with one bit changed.
    fn changed(&mut self, to: usize, input: &mut Input<'_>) {
        let at = usize::from(input.byte().unwrap_or(0));
        let Some(mut message) = pick(&self.sent[to], input) else { return };
        let at = at % message.len();
        message[at] ^= 1 << input.below(8);
        self.take(to, vec![message]);
    }

    /// Delivers messages as one batch: the oldest, or any that was sent before.
    fn deliver(&mut self, to: usize, input: &mut Input<'_>) {
        let mut batch = Vec::new();
        for _ in 0..=input.below(12) {
            if input.below(3) == 0 {
                batch.extend(pick(&self.sent[to], input));
            } else if !self.sent[to].is_empty() {
                batch.push(self.sent[to].remove(0));
            }
        }
        self.take(to, batch);
    }

    fn take(&mut self, to: usize, batch: Vec<Vec<u8>>) {
        let receiver = |message: &[u8]| match MessageKind::of(message) {
            Some(MessageKind::Data { receiver }) => Some(receiver),
            _ => None,
        };
        for run in batch.chunk_by(|a, b| receiver(a).is_some() && receiver(a) == receiver(b)) {
            if run.iter().all(|message| receiver(message).is_some()) {
                let results = open(&mut self.ends[to], self.world.now, run);
                assert_eq!(results.len(), run.len(), "one result for each message");
                for (opened, plain) in results {
                    if matches!(opened, Opened::Packet { .. }) {
                        let number = plain[20..24].try_into().expect("four bytes");
                        let number = u32::from_be_bytes(number);
                        assert_eq!(plain, packet(number, 1 - to, plain.len()));
                        assert!(self.arrived[to].insert(number), "{number} arrived twice");
                    }
                }
            } else {
                for message in run {
                    self.handshake(to, message);
                }
            }
        }
    }

    fn handshake(&mut self, to: usize, message: &[u8]) {
        let (end, mut reply) = (&mut self.ends[to], [0; HANDSHAKE_BYTES]);
        let answered = self.world.with(|inputs| end.handshake(inputs, message, &mut reply));
        if let Answered::Response { len, .. } | Answered::Established { len } = answered {
            self.keep(1 - to, reply[..len].to_vec());
        }
    }
}

/// Returns a copy of a message, without removing it.
fn pick(sent: &[Vec<u8>], input: &mut Input<'_>) -> Option<Vec<u8>> {
    let at = usize::from(input.byte().unwrap_or(0));
    sent.get(at.checked_rem(sent.len())?).cloned()
}

fn packet(number: u32, sender: usize, len: usize) -> Vec<u8> {
    let mut packet = vec![number as u8; len];
    packet[0] = 0x45;
    packet[1] = sender as u8;
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet[20..24].copy_from_slice(&number.to_be_bytes());
    packet
}

/// Returns inputs in the order in which the functions above read them.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    // Even numbers are steps of the first end, odd ones of the second. A delivery of one message.
    const DELIVER_A: [u8; 3] = [12, 0, 1];
    const DELIVER_B: [u8; 3] = [13, 0, 1];
    let connect = [&[0][..], &DELIVER_B, &DELIVER_A, &DELIVER_B].concat();
    let data = [2, 3, 9, 1, 200, 30, 13, 11, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1].to_vec();
    let back = [3, 1, 9, 1, 12, 1, 1, 1].to_vec();
    let heads: [&[u8]; 3] = [&[0, 0, 0], &[0, 1, 1], &[1, 0, 0]];
    let story = |head: &[u8]| [head, &connect, &data, &back, &connect, &data].concat();
    let mut seeds: Vec<Vec<u8>> = heads.iter().map(|head| story(head)).collect();
    // Time passes, a session is renewed, and messages are changed and replayed.
    let late = [6, 121, 4, 13, 0, 1, 10, 40, 0, 3, 8, 3, 9, 4, 12, 5, 0, 2, 6, 190, 4, 5];
    seeds.push([heads[0], &connect, &data, &late, &connect, &data].concat());
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_reach_a_session() {
        for engine in [Engine::BORINGTUN, BATCH[0], BATCH[1]] {
            let mut world = World::new(1);
            let [a, b] = towline_wireguard::internals::pair_of([engine; 2], &mut world);
            let mut ends = Ends {
                world,
                ends: [a, b],
                sent: Default::default(),
                arrived: Default::default(),
                number: 0,
                has_time: false,
            };
            ends.data(0, &mut Input(&[3, 9, 1, 200, 30]));
            ends.deliver(1, &mut Input(&[11, 1, 1, 1, 1]));
            assert_eq!(ends.arrived[1].len(), 4);
        }
    }
}
