//! Fuzzes the session of one peer's probes: any messages with any stamps from any paths, at any time.
//!
//! No stamp is delivered twice, unless a proof with a token that was handed out for its path came in
//! between. Requests are delivered from paths of such proofs alone, and nothing is answered more than
//! once.

use std::collections::BTreeSet;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::net::SocketAddr;
use std::time::Duration;

use towline_core::path::{ChannelId, Path};
use towline_core::probe_session::{Arrival, Decision, ProbeSession, TokenSecret};
use towline_proto::frame::{Probe, Stamp};
use towline_proto::id::WireguardKey;

use super::{EPOCH, Input};

/// Runs a session on one input; see the module's documentation.
pub fn probe_session(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut now = *EPOCH;
    let secret = TokenSecret::new(BuildHasherDefault::<DefaultHasher>::default(), now);
    let mut session = ProbeSession::new(WireguardKey([7; 32]));
    let (mut handed, mut proven) = (Vec::new(), BTreeSet::new());
    let mut delivered = BTreeSet::new();
    while let Some(what) = input.byte() {
        let (epoch, counter) = (u64::from(input.below(3)), u64::from(input.below(200)));
        // Now and then a counter jumps over the whole window.
        let stamp =
            Stamp { epoch, counter: if counter % 16 == 15 { counter << 9 } else { counter } };
        let from = Path::direct(SocketAddr::from(([192, 0, 2, input.below(3)], 51_830)));
        let from = if what & 0x80 == 0 { from } else { from.on_channel(ChannelId(1)) };
        let place = usize::from(input.below(8));
        let token = handed.get(place).map_or(u64::from(what), |(token, _)| *token);
        let message = match what % 8 {
            0 | 1 => Probe::Ping { transaction: token },
            2 => Probe::Register { transaction: token },
            3 => Probe::Challenge { token },
            4 | 5 => Probe::Proof { token },
            6 => Probe::Refused { transaction: token },
            _ => {
                now += Duration::from_millis(u64::from(what) * 40);
                continue;
            }
        };
        let is_in_use = what & 0x40 == 0;
        let arrival = Arrival { now, from, is_in_use, stamp: Some(stamp) };
        let answer = match session.receive(&arrival, &secret, &message) {
            Decision::Deliver { answer, is_validated } => {
                let is_known = handed.contains(&(token, from));
                match message {
                    Probe::Challenge { .. } => {}
                    Probe::Proof { .. } if is_known => {
                        proven.insert(from);
                        delivered.clear();
                        delivered.insert((stamp.epoch, stamp.counter));
                    }
                    Probe::Register { .. } => {
                        assert!(
                            is_validated && proven.contains(&from),
                            "{from} never proved its address"
                        );
                        assert!(delivered.insert((stamp.epoch, stamp.counter)), "{stamp:?}");
                    }
                    _ => assert!(delivered.insert((stamp.epoch, stamp.counter)), "{stamp:?}"),
                }
                answer
            }
            Decision::Drop { answer, .. } => answer,
        };
        match (answer, message) {
            (Some(Probe::Challenge { token }), _) => {
                handed.truncate(7);
                handed.insert(0, (token, from));
            }
            (Some(Probe::Pong { .. }), Probe::Ping { .. })
            | (Some(Probe::Proof { .. }), Probe::Challenge { .. })
            | (None, _) => {}
            (answer, message) => panic!("{answer:?} answers {message:?}"),
        }
    }
}

/// Returns inputs that hold a ping, its challenge and a proof.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    // Each message: kind, epoch, counter, source, token.
    let ping = |counter| [0, 1, counter, 0, 0];
    let proof = |counter| [4, 1, counter, 0, 0];
    let request = [2, 1, 4, 0, 0];
    let later = [7, 0, 0, 0, 0];
    vec![
        [ping(1), proof(2), ping(3), ping(3), request].concat(),
        [ping(1), later, proof(2), proof(2), [0, 0, 1, 1, 0]].concat(),
    ]
}
