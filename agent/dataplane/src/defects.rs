//! Tests of the workarounds for gaps and defects of boringtun 0.7.1 that the data plane owns, one
//! for each. Some tests are next to the workaround. Those of the engine are in
//! `agent/wireguard/src/defects.rs`.
//!
//! The batch engine was examined for each. What it does by itself, and for what it needs the same
//! code of the data plane:
//!
//! | defect | workaround in | batch engine | test |
//! |---|---|---|---|
//! | no jitter on repeated initiations | `tunnel` | the same: it repeats when it is asked to | here |
//! | two ends with keepalives compete to initiate | `tunnel` | the same: it has no persistent keepalive | here |
//! | keepalives on busy tunnels | `tunnel` | the same | `tunnel`, `tests/dataplane` |
//! | one counter limits handshakes | `pipeline` | the same: admission is boringtun's | `tests/dataplane` |
//! | a pre-shared key cannot change | `tunnel`, `table` | the same: a session has one key | `tests/dataplane` |
//! | an expired tunnel stays expired | `tunnel`, core | it starts again by command; the core decides when | here, `agent/core/tests` |
//! | indices reveal the number of peers | `table` | the same: the table chooses 24 bits | here |
//! | roaming on cookie replies | `tunnel` | the same: a reply moves nobody | here |
//! | a source is checked only against the prefixes of its own peer | `pipeline` | the same: it checks no source | `tests/dataplane` |
//! | a clock that was set back locks a peer out | `tunnel`, `table` | its timestamps increase while it runs; over a restart the same | `tests/dataplane` |
//!
//! Nodes with odd numbers have the batch engine here, the others boringtun.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use towline_core::path::Path;
use towline_core::peer_table::{PeerEntry, PeerTable};
use towline_types::id::WireguardKey;
use x25519_dalek::StaticSecret;

use super::table::Table;
use super::testing::Side;
use towline_wireguard::{Admission, Aead, Engine, EngineChoice, HANDSHAKE_BYTES, Secrets};

fn secrets(number: u8) -> Arc<Secrets> {
    let choice = if number % 2 == 1 { EngineChoice::Batch } else { EngineChoice::Boringtun };
    let engine = Engine::select(choice, Aead::Auto);
    Arc::new(Secrets::with_engine(StaticSecret::from([number; 32]), engine))
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51830))
}

fn side(own: &Arc<Secrets>, peer: WireguardKey, number: u8) -> Side {
    Side::new(own, peer, 7, Path::direct(address(number)))
}

fn sides() -> [Side; 2] {
    let [ours, theirs] = [1, 2].map(secrets);
    let keys = [ours.public_key(), theirs.public_key()];
    [side(&ours, keys[1], 1), side(&theirs, keys[0], 2)]
}

/// Delivers sent datagrams in both directions until neither side sends any. Returns the number of
/// initiations of each side.
fn deliver(now: Instant, sides: &mut [Side; 2]) -> [usize; 2] {
    let ways = [Path::direct(address(1)), Path::direct(address(2))];
    let mut initiations = [0; 2];
    loop {
        let sent = [sides[0].sent(), sides[1].sent()];
        if sent.iter().all(Vec::is_empty) {
            return initiations;
        }
        for (me, sent) in sent.iter().enumerate() {
            initiations[me] += sent.iter().filter(|datagram| datagram[0] == 1).count();
            for datagram in sent {
                sides[1 - me].take(now, ways[me], ways[me], datagram);
            }
        }
    }
}

#[test]
fn two_ends_with_keepalives_do_not_fight_to_initiate() {
    let mut sides = sides();
    let start = sides[0].started;
    sides[0].with(start, |tunnel, context| tunnel.initiate(vec![address(2).into()], context));
    assert_eq!(deliver(start, &mut sides), [1, 0]);
    let mut later = [0; 2];
    let keepalive = Some(Duration::from_secs(5));
    for quarter in 1..=4 * 130 {
        let now = start + Duration::from_millis(250) * quarter;
        for (me, side) in sides.iter_mut().enumerate() {
            let known = Some(address(2 - me as u8).into());
            side.with(now, |tunnel, context| tunnel.tick(known, keepalive, context));
        }
        let initiations = deliver(now, &mut sides);
        later = [later[0] + initiations[0], later[1] + initiations[1]];
    }
    assert_eq!(later, [1, 0], "only the initiator renews the session after two minutes");
}

#[test]
fn repeated_initiations_of_many_tunnels_are_spread() {
    let own = secrets(1);
    let late: BTreeSet<Duration> = (0..50)
        .map(|number| {
            let mut side = side(&own, secrets(100 + number).public_key(), 1);
            let now = side.started;
            side.with(now, |tunnel, context| tunnel.initiate(vec![address(2).into()], context));
            side.tunnel.repeats_after().unwrap()
        })
        .collect();
    assert!(late.len() > 25, "{late:?}");
    let (first, last) = (*late.first().unwrap(), *late.last().unwrap());
    assert!(first >= Duration::from_secs(5) && last < Duration::from_millis(5_333));
    assert!(last - first > Duration::from_millis(100), "{late:?}");
}

#[test]
fn a_cookie_reply_moves_nobody_and_its_cookie_is_used() {
    let theirs = secrets(2);
    let mut side = side(&secrets(1), theirs.public_key(), 1);
    let (now, home, away) = (side.started, Path::direct(address(2)), Path::direct(address(66)));
    side.with(now, |tunnel, context| tunnel.initiate(vec![home], context));
    let initiation = side.sent().remove(0);
    assert_eq!(initiation[132..], [0; 16], "no cookie yet");
    let mut cookie = [0; HANDSHAKE_BYTES];
    let Admission::Cookie(len) = theirs.admit(address(1), &initiation, true, &mut cookie) else {
        panic!("no cookie");
    };
    side.take(now, away, home, &cookie[..len]);
    assert!(side.observations().is_empty());
    let later = now + Duration::from_secs(1);
    side.with(later, |tunnel, context| tunnel.initiate(vec![home], context));
    let initiation = side.sent().remove(0);
    assert_ne!(initiation[132..], [0; 16]);
    let mut reply = [0; HANDSHAKE_BYTES];
    assert_eq!(theirs.admit(address(1), &initiation, true, &mut reply), Admission::Admitted);
}

#[test]
fn a_tunnel_that_was_given_up_comes_back_when_told_to() {
    let mut sides = sides();
    let start = sides[0].started;
    sides[0].with(start, |tunnel, context| tunnel.initiate(vec![address(9).into()], context));
    sides[0].sent();
    // After a long time nothing happens by itself, and a new handshake still works.
    let now = start + Duration::from_secs(1_000);
    let live =
        sides[0].with(now, |tunnel, context| tunnel.tick(Some(address(2).into()), None, context));
    assert!(!live && sides[0].sent().is_empty());
    sides[0].with(now, |tunnel, context| tunnel.initiate(vec![address(2).into()], context));
    deliver(now, &mut sides);
    assert!(sides.iter().all(|side| side.tunnel.is_ready(now)));
}

#[test]
fn indices_tell_nothing() {
    let entry = PeerEntry::default();
    let peers = (1..=64).map(|number| (WireguardKey([number; 32]), entry.clone())).collect();
    let wanted = PeerTable { peers, ..PeerTable::default() };
    let table = Table::default().next(Instant::now(), &wanted, &secrets(1));
    let mut sent = BTreeSet::new();
    let mut neighbours = 0;
    for peer in table.peers() {
        let mut side = side(&secrets(1), peer.key, 1);
        let now = side.started;
        let mut tunnel = peer.tunnel.lock();
        side.with(now, |_, context| tunnel.initiate(vec![address(2).into()], context));
        let initiation = side.sent().remove(0);
        let index = u32::from_le_bytes(initiation[4..8].try_into().unwrap()) >> 8;
        neighbours += usize::from(sent.contains(&(index.wrapping_sub(1))));
        assert!(sent.insert(index), "two peers share an index");
    }
    assert!(neighbours < 3, "{sent:?}");
}
