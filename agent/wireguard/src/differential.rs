//! One engine talks to another through a network that loses, reorders, duplicates and replays, while
//! both ends renew their sessions, and now and then get another pre-shared key.
//!
//! A seed determines everything but what boringtun takes from the system. Time passes only where
//! both ends are the batch engine, since boringtun reads the clock by itself.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use towline_types::id::PresharedKey;
use x25519_dalek::StaticSecret;

use crate::internals::{World, open, seal};
use crate::{
    Aead, Answered, Engine, EngineChoice, HANDSHAKE_BYTES, MessageKind, Opened, Refusal, Secrets,
    Session, Tick,
};

/// Largest number of datagrams that the network holds in one direction.
const QUEUE: usize = 400;
/// Largest number of datagrams that can be replayed.
const HISTORY: usize = 4_000;

/// One end: its session, and what it has sent and received.
struct End {
    secrets: Secrets,
    session: Session,
    /// Datagrams on their way to this end.
    arriving: Vec<Vec<u8>>,
    /// Datagrams that were sent to this end, to replay them.
    history: Vec<Vec<u8>>,
    /// Numbers of the packets that arrived.
    received: BTreeSet<u32>,
}

/// Both ends, and the network between them.
struct Net {
    world: World,
    ends: [End; 2],
    /// True if time may pass.
    has_time: bool,
    /// Number of the next packet.
    number: u32,
    /// Number of changes of the pre-shared key.
    psks: u8,
}

impl Net {
    fn new(engines: [Engine; 2], seed: u64) -> Self {
        let secrets = [(1, engines[0]), (2, engines[1])]
            .map(|(byte, engine)| Secrets::with_engine(StaticSecret::from([byte; 32]), engine));
        let keys = [secrets[1].public_key(), secrets[0].public_key()];
        let mut keys = keys.into_iter();
        let ends = secrets.map(|secrets| {
            let peer = keys.next().expect("two keys");
            let session = Session::new(&secrets, peer, None, 1);
            let (arriving, history, received) = (Vec::new(), Vec::new(), BTreeSet::new());
            End { secrets, session, arriving, history, received }
        });
        let has_time = engines.iter().all(|engine| engine.opens_in_place());
        Self { world: World::new(seed), ends, has_time, number: 0, psks: 0 }
    }

    fn send(&mut self, to: usize, datagrams: impl IntoIterator<Item = Vec<u8>>) {
        let end = &mut self.ends[to];
        for datagram in datagrams {
            if end.history.len() < HISTORY {
                end.history.push(datagram.clone());
            }
            if end.arriving.len() < QUEUE {
                end.arriving.push(datagram);
            }
        }
    }

    /// Sends numbered packets as one batch.
    fn data(&mut self, from: usize) {
        if !self.ends[from].session.is_ready(self.world.now) {
            return;
        }
        let count = 1 + self.world.below(40);
        let packets: Vec<Vec<u8>> = (0..count)
            .map(|_| {
                let len = 24 + self.world.below(200) as usize;
                self.number += 1;
                packet(self.number, from as u8, len)
            })
            .collect();
        let sealed = seal(&mut self.ends[from].session, self.world.now, &packets);
        self.send(1 - from, sealed);
    }

    fn initiate(&mut self, from: usize) {
        let mut message = [0; HANDSHAKE_BYTES];
        let session = &mut self.ends[from].session;
        let len = self.world.with(|inputs| session.initiate(inputs, &mut message));
        self.send(1 - from, [message[..len].to_vec()]);
    }

    /// Delivers some datagrams as one batch, in any order. Some are lost, some arrive twice.
    fn deliver(&mut self, to: usize, is_faithful: bool) {
        let mut batch = Vec::new();
        let arriving = &mut self.ends[to].arriving;
        let count = if is_faithful { arriving.len() as u64 } else { self.world.below(60) };
        for _ in 0..count {
            if arriving.is_empty() {
                break;
            }
            let far = (arriving.len() as u64).min(30);
            let at = if is_faithful { 0 } else { self.world.below(far) as usize };
            let datagram = arriving.remove(at);
            match if is_faithful { 2 } else { self.world.below(10) } {
                0 => {}
                1 => batch.extend([datagram.clone(), datagram]),
                _ => batch.push(datagram),
            }
        }
        self.take(to, &batch);
    }

    /// Delivers datagrams of the past again.
    fn replay(&mut self, to: usize) {
        let history = self.ends[to].history.len() as u64;
        if history == 0 {
            return;
        }
        let batch: Vec<Vec<u8>> = (0..20)
            .map(|_| self.ends[to].history[self.world.below(history) as usize].clone())
            .collect();
        self.take(to, &batch);
    }

    /// Handles a batch as the data plane does: first runs of data for one receiver, then handshakes.
    fn take(&mut self, to: usize, batch: &[Vec<u8>]) {
        let receiver = |datagram: &Vec<u8>| match MessageKind::of(datagram) {
            Some(MessageKind::Data { receiver }) => Some(receiver),
            _ => None,
        };
        for run in batch.chunk_by(|a, b| receiver(a) == receiver(b)) {
            if run.first().and_then(receiver).is_some() {
                let end = &mut self.ends[to];
                for (opened, plain) in open(&mut end.session, self.world.now, run) {
                    match opened {
                        Opened::Packet { .. } => end.accept(&plain, (1 - to) as u8),
                        Opened::Keepalive => {}
                        Opened::Refused(refusal) => assert!(
                            matches!(
                                refusal,
                                Refusal::Replayed | Refusal::NoSession | Refusal::NotAuthentic
                            ),
                            "{refusal:?}"
                        ),
                    }
                }
            }
        }
        for message in batch.iter().filter(|datagram| receiver(datagram).is_none()) {
            let mut reply = [0; HANDSHAKE_BYTES];
            let session = &mut self.ends[to].session;
            let answered = self.world.with(|inputs| session.handshake(inputs, message, &mut reply));
            if let Answered::Response { len, .. } | Answered::Established { len } = answered {
                self.send(1 - to, [reply[..len].to_vec()]);
            }
        }
    }

    fn tick(&mut self, from: usize) {
        let mut message = [0; HANDSHAKE_BYTES];
        let session = &mut self.ends[from].session;
        let tick = self.world.with(|inputs| session.tick(inputs, &mut message));
        if let Tick::Initiation(len) | Tick::Keepalive(len) = tick {
            self.send(1 - from, [message[..len].to_vec()]);
        }
    }

    /// Gives both ends another pre-shared key, and so new sessions.
    fn change_psk(&mut self) {
        self.psks += 1;
        // A replayed initiation of before must not be later than those of the new sessions.
        self.world.unix_time += Duration::from_secs(1);
        let psk = PresharedKey([self.psks; 32]);
        let keys = [1, 0].map(|other| self.ends[other].secrets.public_key());
        for (end, peer) in self.ends.iter_mut().zip(keys) {
            end.session = Session::new(&end.secrets, peer, Some(&psk), u32::from(self.psks) + 1);
        }
    }

    fn step(&mut self) {
        let end = self.world.below(2) as usize;
        match self.world.below(40) {
            0 | 1 => self.initiate(end),
            2 if self.psks < 3 => self.change_psk(),
            3..=5 => self.replay(end),
            6..=9 => self.tick(end),
            10..=12 if self.has_time => {
                let time = self.world.below(20_000);
                self.world.advance(Duration::from_millis(time));
            }
            13..=24 => self.data(end),
            _ => self.deliver(end, false),
        }
    }

    /// Lets the network be faithful, and asserts that both ends understand each other.
    fn settle(&mut self) {
        for end in &mut self.ends {
            end.arriving.clear();
        }
        self.initiate(0);
        for to in [1, 0, 1] {
            self.deliver(to, true);
        }
        assert!(self.ends.iter().all(|end| end.session.is_ready(self.world.now)));
        for from in [0, 1] {
            let before = self.number;
            self.data(from);
            self.deliver(1 - from, true);
            let expected: BTreeSet<u32> = (before + 1..=self.number).collect();
            let received = &self.ends[1 - from].received;
            assert!(!expected.is_empty() && expected.is_subset(received));
        }
    }
}

impl End {
    /// Checks a packet that arrived.
    fn accept(&mut self, plain: &[u8], sender: u8) {
        let number = u32::from_be_bytes(plain[20..24].try_into().expect("four bytes"));
        assert_eq!(plain, packet(number, sender, plain.len()), "what was sent arrived");
        assert!(self.received.insert(number), "{number} arrived twice");
    }
}

/// Returns a packet with this number and length from this end, without padding.
fn packet(number: u32, sender: u8, len: usize) -> Vec<u8> {
    let mut packet = vec![(number % 251) as u8; len];
    packet[0] = 0x45;
    packet[1] = sender;
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet[20..24].copy_from_slice(&number.to_be_bytes());
    packet
}

fn run(engines: [Engine; 2], seed: u64) {
    let mut net = Net::new(engines, seed);
    for _ in 0..3 {
        for _ in 0..120 {
            net.step();
        }
        net.settle();
    }
}

fn boringtun() -> Engine {
    Engine::select(EngineChoice::Boringtun, Aead::Auto)
}

fn batch(aead: Aead) -> Engine {
    Engine::select(EngineChoice::Batch, aead)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_batch_engine_and_boringtun_understand_each_other(seed: u64) {
        run([batch(Aead::Auto), boringtun()], seed);
        run([boringtun(), batch(Aead::Auto)], seed);
    }

    #[test]
    fn two_batch_engines_understand_each_other_while_time_passes(seed: u64) {
        run([batch(Aead::Auto), batch(Aead::Ring)], seed);
    }

    #[test]
    fn what_the_batch_engine_does_depends_on_time_and_randomness_alone(seed: u64) {
        let transcript = || {
            let mut net = Net::new([batch(Aead::Auto), batch(Aead::Ring)], seed);
            (0..200).for_each(|_| net.step());
            net.ends.map(|end| (end.history, end.received))
        };
        prop_assert!(transcript() == transcript());
    }
}
