//! What Towline and the other go through together.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use super::flood;
use super::pair::{NAT_TIMEOUT, Pair, Side, Terms, Wiring};
use crate::lab::interrupt::{pass, wait_for};
use crate::lab::namespace::join;
use crate::lab::peers::Installed;
use crate::lab::ping::Ticker;
use crate::lab::report::round;
use crate::lab::scenario::Setting;

/// How a case ended, if it did not fail.
pub(super) enum Outcome {
    /// All that it promises held; what it measured.
    Held(BTreeMap<&'static str, f64>),
    /// This machine does not let it be tried.
    Impossible(String),
}

/// Plays one case.
pub(super) type Judge = fn(&Setting, &Installed) -> anyhow::Result<Outcome>;

/// Every case, by name.
pub(super) const CASES: [(&str, Judge); 11] = [
    ("we_initiate", |setting, program| initiate(setting, program, Side::Ours)),
    ("they_initiate", |setting, program| initiate(setting, program, Side::Theirs)),
    ("preshared_key", preshared_key),
    ("roaming_ours", |setting, program| roam(setting, program, Side::Ours)),
    ("roaming_theirs", |setting, program| roam(setting, program, Side::Theirs)),
    ("cookie_ours", |setting, program| cookie(setting, program, Side::Ours)),
    ("cookie_theirs", |setting, program| cookie(setting, program, Side::Theirs)),
    ("nat_ours", |setting, program| nat(setting, program, Side::Ours)),
    ("nat_theirs", |setting, program| nat(setting, program, Side::Theirs)),
    ("rekey_we_initiated", |setting, program| rekey(setting, program, Side::Ours)),
    ("rekey_they_initiated", |setting, program| rekey(setting, program, Side::Theirs)),
];

/// A first handshake is through after this.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Under a flood: the first initiation only earns a cookie, the next comes after five seconds;
/// a flood may also swallow one.
const FLOODED_LIMIT: Duration = Duration::from_secs(40);
/// After a change of address packets flow again within this.
const ROAM_LIMIT: Duration = Duration::from_secs(5);
/// Over a re-key nothing is missing for longer than this.
const REKEY_GAP: Duration = Duration::from_secs(1);
/// Two minutes until the re-key, and some.
const REKEY_WATCH: Duration = Duration::from_secs(132);
const BYTES: u64 = 4_000_000;
const PACE: Duration = Duration::from_millis(20);

fn initiate(setting: &Setting, program: &Installed, caller: Side) -> anyhow::Result<Outcome> {
    let pair = Pair::start(setting, program, Wiring::Plain, Terms::called_by(caller))?;
    let first = pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
    pair.ping_ok(caller.other(), HANDSHAKE_LIMIT)?;
    pair.exchange(caller, BYTES)?;
    pair.exchange(caller.other(), BYTES)?;
    held([("first_reply_ms", millis(first))])
}

/// With the same key they meet, with two different ones they do not.
fn preshared_key(setting: &Setting, program: &Installed) -> anyhow::Result<Outcome> {
    for caller in [Side::Ours, Side::Theirs] {
        let right = Terms { preshared_keys: Some([[7; 32]; 2]), ..Terms::called_by(caller) };
        let pair = Pair::start(setting, program, Wiring::Plain, right)?;
        pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
        pair.exchange(caller, BYTES)?;
    }
    let wrong = Terms { preshared_keys: Some([[7; 32], [8; 32]]), ..Terms::called_by(Side::Ours) };
    let pair = Pair::start(setting, program, Wiring::Plain, wrong)?;
    let reply = pair.ping(Side::Ours, Duration::from_secs(2))?;
    ensure!(reply.is_none(), "a tunnel came up though the pre-shared keys differ");
    held([])
}

/// `side` loses the uplink that it used, under traffic.
fn roam(setting: &Setting, program: &Installed, side: Side) -> anyhow::Result<Outcome> {
    let caller = side;
    let pair = Pair::start(setting, program, Wiring::Roaming(side), Terms::called_by(caller))?;
    pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
    let gap = ticking(&pair, side, || {
        pass(Duration::from_millis(500))?;
        pair.unplug(side)?;
        let unplugged = Instant::now();
        Ok((unplugged, ROAM_LIMIT))
    })?;
    ensure!(gap < ROAM_LIMIT, "no replies for {:.1} s", gap.as_secs_f64());
    pair.exchange(side.other(), BYTES)?;
    held([("gap_ms", millis(gap))])
}

/// `side` is flooded, and the other wants in.
fn cookie(setting: &Setting, program: &Installed, side: Side) -> anyhow::Result<Outcome> {
    let caller = side.other();
    let pair = Pair::start(setting, program, Wiring::Plain, Terms::called_by(caller))?;
    let key = if side == Side::Ours { pair.our_key() } else { pair.their_key() };
    let target = pair.outer(side)?;
    // Some ask only those for a cookie from whose address too much comes. It must not keep the
    // owner of that address out.
    let also = match pair.outer(caller)?.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    };
    let (stop, cookies) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| flood::run(pair.stranger.namespace(), target, key, also, &stop));
        let counted = scope.spawn(|| flood::count_cookies(pair.host(caller), &cookies, &stop));
        let met = (|| {
            if side == Side::Ours {
                wait_for("cookie mode under a flood", HANDSHAKE_LIMIT, || {
                    Ok((pair.drops("under_load")? > 0).then_some(()))
                })?;
            } else {
                pass(Duration::from_secs(1))?;
            }
            pair.ping_ok(caller, FLOODED_LIMIT)
        })();
        stop.store(true, Ordering::Relaxed);
        let sent = join(flood)?;
        join(counted)?;
        let first = met.with_context(|| format!("under {sent} forged initiations"))?;
        let cookies = cookies.load(Ordering::Relaxed);
        ensure!(cookies > 0, "nobody was asked for a cookie");
        held([
            ("first_reply_ms", millis(first)),
            ("cookies", cookies as f64),
            ("forged_initiations", sent as f64),
        ])
    })
}

/// `side` is behind a NAT that soon forgets; its keepalive alone keeps the way in open.
fn nat(setting: &Setting, program: &Installed, side: Side) -> anyhow::Result<Outcome> {
    let terms = Terms { keepalive: Some(1), ..Terms::called_by(side) };
    let mut pair = match Pair::start(setting, program, Wiring::Behind(side), terms) {
        Ok(pair) => pair,
        Err(error) if format!("{error:#}").contains("nf_conntrack_udp_timeout") => {
            return Ok(Outcome::Impossible(format!("{error:#}")));
        }
        Err(error) => return Err(error),
    };
    if side == Side::Theirs {
        // Not all of the others begin by themselves.
        pair.ping_ok(side, HANDSHAKE_LIMIT)?;
    }
    wait_for("tunnel held up by its keepalive", HANDSHAKE_LIMIT, || {
        Ok(pair.handshake_age().is_ok().then_some(()))
    })?;
    let silence = Duration::from_secs(3 * NAT_TIMEOUT);
    pass(silence)?;
    let first = pair
        .ping_ok(side.other(), Duration::from_secs(2))
        .context("from outside, after a silence, with a keepalive")?;
    pair.stop_keepalive()?;
    // Whatever answers the last ping is over after ten seconds, WireGuard's Keepalive-Timeout.
    pass(Duration::from_secs(10) + silence)?;
    if pair.ping(side.other(), Duration::from_secs(1))?.is_some() {
        bail!("the NAT did not forget: this shows nothing");
    }
    pair.ping_ok(side, HANDSHAKE_LIMIT).context("from inside, after a silence")?;
    held([("first_reply_ms", millis(first))])
}

/// Both ways under traffic until the session that `caller` began is renewed.
fn rekey(setting: &Setting, program: &Installed, caller: Side) -> anyhow::Result<Outcome> {
    let pair = Pair::start(setting, program, Wiring::Plain, Terms::called_by(caller))?;
    pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
    let gap = ticking(&pair, caller, || {
        let begun = Instant::now();
        pass(REKEY_WATCH)?;
        Ok((begun, Duration::ZERO))
    })?;
    let age = pair.handshake_age()?;
    ensure!(age < Duration::from_secs(60), "no re-key in {} s", REKEY_WATCH.as_secs());
    ensure!(gap < REKEY_GAP, "no replies for {:.1} s", gap.as_secs_f64());
    pair.exchange(caller, BYTES)?;
    held([("gap_ms", millis(gap))])
}

/// Pings from `side` while `act` is played; the longest gap from the moment that it gives until
/// now, or until as long after as it says.
fn ticking(
    pair: &Pair,
    side: Side,
    act: impl FnOnce() -> anyhow::Result<(Instant, Duration)>,
) -> anyhow::Result<Duration> {
    let [target, _] = pair.inner(side.other())?;
    let (ticker, stop) = (Ticker::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let ticks = scope.spawn(|| ticker.run(pair.host(side), target, PACE, &stop));
        let acted = act().and_then(|(from, more)| {
            pass(more)?;
            Ok(from)
        });
        stop.store(true, Ordering::Relaxed);
        join(ticks)?;
        Ok(ticker.longest_gap(acted?, Instant::now()))
    })
}

fn held<const N: usize>(figures: [(&'static str, f64); N]) -> anyhow::Result<Outcome> {
    Ok(Outcome::Held(figures.into()))
}

fn millis(duration: Duration) -> f64 {
    round(duration.as_secs_f64() * 1e3)
}
