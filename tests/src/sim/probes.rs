//! A model of how the data plane seals probes and judges them, without cryptography: the real
//! decisions of [`ProbeSession`], and stamps that nobody else can make.

use std::collections::BTreeMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::time::Instant;

use towline_core::probe_session::{Arrival, Decision, ProbeSession, TokenSecret};
use towline_proto::frame::{Probe, Stamp};
use towline_proto::id::WireguardKey;

use super::payload::Payload;

/// Probes of one start of an agent.
#[derive(Debug)]
pub struct Probes {
    epoch: u64,
    /// Secret of the tokens. Only the seed may decide, so its key is fixed.
    tokens: TokenSecret<BuildHasherDefault<DefaultHasher>>,
    pairs: BTreeMap<WireguardKey, Pair>,
}

#[derive(Debug)]
struct Pair {
    session: ProbeSession,
    /// Counter of the last probe that was sent.
    sent: u64,
}

impl Probes {
    /// Creates the state of a start with this boot epoch.
    pub fn new(epoch: u64, now: Instant) -> Self {
        let tokens = TokenSecret::new(BuildHasherDefault::default(), now);
        Self { epoch, tokens, pairs: BTreeMap::new() }
    }

    /// Puts the next stamp for a peer before a payload.
    pub fn stamp(&mut self, peer: WireguardKey, payload: Payload) -> Payload {
        let epoch = self.epoch;
        let pair = self.pair(peer);
        pair.sent += 1;
        Payload::Stamped(Stamp { epoch, counter: pair.sent }, Box::new(payload))
    }

    /// Decides about a probe of a peer.
    pub fn receive(&mut self, peer: WireguardKey, arrival: &Arrival, message: &Probe) -> Decision {
        self.pair(peer);
        let Self { tokens, pairs, .. } = self;
        let pair = pairs.get_mut(&peer).expect("it was created");
        pair.session.receive(arrival, tokens, message)
    }

    /// Takes everything back to the state at the start, as a restored snapshot of the machine does.
    pub fn restore_snapshot(&mut self) {
        self.pairs.clear();
    }

    fn pair(&mut self, peer: WireguardKey) -> &mut Pair {
        let new = || Pair { session: ProbeSession::new(peer), sent: 0 };
        self.pairs.entry(peer).or_insert_with(new)
    }
}
