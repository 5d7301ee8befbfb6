//! Established sessions for tests, fuzzing and benchmarks. Not part of the public API.

#![expect(clippy::indexing_slicing, reason = "lengths come from the session itself")]

use x25519_dalek::StaticSecret;

use crate::{Answered, HANDSHAKE_BYTES, Opened, Secrets, Session};

/// Returns two sessions with each other. The first initiated.
pub fn pair() -> [Session; 2] {
    let [ours, theirs] = [1, 2].map(|byte| Secrets::new(StaticSecret::from([byte; 32])));
    let mut a = Session::new(&ours, theirs.public_key(), None, 1);
    let mut b = Session::new(&theirs, ours.public_key(), None, 2);
    assert!(establish(&mut a, &mut b), "the handshake completes");
    [a, b]
}

/// Completes a handshake that `a` initiates. Returns whether both have a session that is confirmed.
pub fn establish(a: &mut Session, b: &mut Session) -> bool {
    let (mut message, mut answer) = ([0; HANDSHAKE_BYTES], [0; HANDSHAKE_BYTES]);
    let len = a.initiate(&mut message);
    let Answered::Response { len, .. } = b.handshake(&message[..len], &mut answer) else {
        return false;
    };
    let Answered::Established { len } = a.handshake(&answer[..len], &mut message) else {
        return false;
    };
    let mut confirmed = false;
    b.open(std::iter::once((&message[..len], &mut answer[..len])), |_, opened| {
        confirmed = opened == Opened::Keepalive;
    });
    confirmed && a.is_ready() && b.is_ready()
}
