//! Attacks of an evil relay on two nodes whose traffic it carries: it drops, repeats, reorders, changes
//! and misdirects what it should forward, and repeats its own messages.
//!
//! From the first of these cases on, `evil` relays: an operator granted it the role. Its agent answers
//! requests as every relay does; a hook on its uplink ([`crate::lab::interference`]) does the rest.
//! Except in the first case it is the only relay.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use super::stage::{ARRIVAL, PORT, Place, Stage};
use super::{Attacker, Case, Outcome};
use crate::lab::interference::Misdeed;
use crate::lab::interrupt::{self, wait_up_to};
use crate::lab::mesh::START_LIMIT;

/// Number of datagrams that `a` sends to `b` in a case, and the pause between two of them.
const DATAGRAMS: usize = 100;
const PACE: Duration = Duration::from_millis(10);
/// Number of datagrams that must arrive where the relay loses none.
const ENOUGH: usize = 95;
/// Time in which the last replay arrives.
const REPLAYED: Duration = Duration::from_millis(2_500);

pub(super) fn cases() -> Vec<Case> {
    let case = |name: &str, attempt: fn(&mut Stage<'_>) -> _| {
        Case::new(format!("relay/{name}"), Attacker::Relay, Outcome::Works, attempt)
    };
    vec![
        case("drops", drops),
        case("replays", |stage| carries(stage, Misdeed::Replay, ENOUGH)),
        case("sends-to-the-wrong-node", misdirects),
        case("repeats-and-damages-its-answers", |stage| {
            carries(stage, Misdeed::RepeatAnswers, ENOUGH)
        })
        .long(),
        case("duplicates", |stage| carries(stage, Misdeed::Duplicate, ENOUGH)).long(),
        case("reorders", |stage| carries(stage, Misdeed::Reorder, ENOUGH)).long(),
        case("damages", |stage| carries(stage, Misdeed::Damage, 0)).long(),
        case("floods", |stage| carries(stage, Misdeed::Flood, ENOUGH)).long(),
    ]
}

/// Drops all that it should forward. The traffic moves to the other relay.
fn drops(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    stage.relay_by_evil()?;
    stage.restart_cp()?;
    stage.interference().set(Some(Misdeed::Drop));
    let moved = wait_up_to(START_LIMIT, || Ok(stage.relay_works()?.then_some(())));
    stage.interference().set(None);
    Ok(if moved?.is_some() { Outcome::Works } else { Outcome::Hangs })
}

/// Sends what is for `b` to `a`, and the other way around: to a node that cannot open it.
fn misdirects(stage: &mut Stage<'_>) -> anyhow::Result<Outcome> {
    let [v4, v6, ..] = *stage.hosts.a.addresses() else {
        anyhow::bail!("a has no address of each family")
    };
    carries(stage, Misdeed::Misdirect([v4, v6]), 0)
}

/// Has the relay carry datagrams of `a` to `b` and commit a misdeed. At least `enough` of them arrive,
/// none arrives twice, and the tunnel works afterwards.
fn carries(stage: &mut Stage<'_>, misdeed: Misdeed, enough: usize) -> anyhow::Result<Outcome> {
    stage.relay_by_evil()?;
    let repeated = stage.listener(Place::B)?.repeated()?;
    stage.interference().set(Some(misdeed));
    let arrived = send(stage);
    stage.interference().set(None);
    let arrived = arrived?;
    interrupt::sleep(REPLAYED)?;
    let again = stage.listener(Place::B)?.repeated()? - repeated;
    let works = wait_up_to(START_LIMIT, || Ok(stage.reaches_b()?.then_some(())))?.is_some();
    let holds = arrived >= enough && again == 0 && works;
    Ok(if holds { Outcome::Works } else { Outcome::Hangs })
}

/// Sends datagrams from `a` to `b` through the tunnel. Returns how many arrive.
fn send(stage: &mut Stage<'_>) -> anyhow::Result<usize> {
    let to = SocketAddr::new(stage.overlay()?.b[0], PORT);
    let numbers: Vec<u64> = (0..DATAGRAMS).map(|_| stage.number()).collect();
    let payloads: Vec<_> = numbers.iter().map(|number| stage.tag.payload(*number)).collect();
    stage.hosts.a.namespace().run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        for payload in &payloads {
            socket.send_to(payload, to)?;
            std::thread::sleep(PACE);
        }
        Ok(())
    })?;
    let listener = stage.listener(Place::B)?;
    if let Some(last) = numbers.last() {
        listener.receives(*last, ARRIVAL)?;
    }
    let mut arrived = 0;
    for number in &numbers {
        arrived += usize::from(listener.receives(*number, Duration::ZERO)?);
    }
    Ok(arrived)
}
