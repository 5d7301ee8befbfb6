//! Cases that each pair of Towline and another implementation runs.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use super::flood;
use super::pair::{NAT_TIMEOUT, Opponent, Pair, Side, Terms, Wiring};
use crate::lab::capture::{Tap, udp_payload};
use crate::lab::interrupt::{sleep, wait_for};
use crate::lab::namespace::join;
use crate::lab::ping::Ticker;
use crate::lab::report::round;
use crate::lab::scenario::Setting;

/// Outcome of a case that did not fail.
pub(super) enum Outcome {
    /// All promises held. Contains the figures that were measured.
    Held(BTreeMap<&'static str, f64>),
    /// The case cannot run on this machine. Contains the reason.
    Impossible(String),
}

/// Function that runs one case.
pub(super) type Judge = fn(&Setting, &Opponent<'_>) -> anyhow::Result<Outcome>;

/// All cases, by name.
pub(super) const CASES: [(&str, Judge); 14] = [
    ("we_initiate", |setting, opponent| initiate(setting, opponent, Side::Ours)),
    ("they_initiate", |setting, opponent| initiate(setting, opponent, Side::Theirs)),
    ("preshared_key", preshared_key),
    ("roaming_ours", |setting, opponent| roam(setting, opponent, Side::Ours)),
    ("roaming_theirs", |setting, opponent| roam(setting, opponent, Side::Theirs)),
    ("cookie_ours", |setting, opponent| cookie(setting, opponent, Side::Ours)),
    ("cookie_theirs", |setting, opponent| cookie(setting, opponent, Side::Theirs)),
    ("nat_ours", |setting, opponent| nat(setting, opponent, Side::Ours)),
    ("nat_theirs", |setting, opponent| nat(setting, opponent, Side::Theirs)),
    ("wg_show", wg_show),
    ("rekey_we_initiated", |setting, opponent| rekey(setting, opponent, Side::Ours)),
    ("rekey_they_initiated", |setting, opponent| rekey(setting, opponent, Side::Theirs)),
    ("rekey_old_keys_ours", |setting, opponent| old_keys(setting, opponent, Side::Ours)),
    ("rekey_old_keys_theirs", |setting, opponent| old_keys(setting, opponent, Side::Theirs)),
];

/// Limit for the first handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Limit for the first handshake during a flood. The first initiation is only answered with a
/// cookie, and the next one follows after five seconds. The flood may also cause the loss of one.
const FLOODED_LIMIT: Duration = Duration::from_secs(40);
/// Limit for packets to flow again after a change of address.
const ROAM_LIMIT: Duration = Duration::from_secs(5);
/// Limit for the time without an echo reply during a re-key.
const REKEY_GAP: Duration = Duration::from_secs(1);
/// Duration of a re-key case: WireGuard re-keys after 120 s.
const REKEY_WATCH: Duration = Duration::from_secs(132);
/// Size of a transfer in each direction, in bytes.
const BYTES: u64 = 4_000_000;
/// Number of datagrams that are recorded to be repeated later.
const RECORDED: usize = 10;
/// First byte of a WireGuard data message.
const DATA: u8 = 4;
/// Interval between two echo requests.
const PACE: Duration = Duration::from_millis(20);

/// Checks that `caller` can initiate the handshake, and that data flows in both directions.
fn initiate(setting: &Setting, opponent: &Opponent<'_>, caller: Side) -> anyhow::Result<Outcome> {
    let pair = Pair::start(setting, opponent, Wiring::Plain, Terms::called_by(caller))?;
    let first = pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
    pair.ping_ok(caller.other(), HANDSHAKE_LIMIT)?;
    pair.exchange(caller, BYTES)?;
    pair.exchange(caller.other(), BYTES)?;
    held([("first_reply_ms", millis(first))])
}

/// Checks that a tunnel comes up with the same pre-shared key, and not with two different ones.
fn preshared_key(setting: &Setting, opponent: &Opponent<'_>) -> anyhow::Result<Outcome> {
    for caller in [Side::Ours, Side::Theirs] {
        let right = Terms { preshared_keys: Some([[7; 32]; 2]), ..Terms::called_by(caller) };
        let pair = Pair::start(setting, opponent, Wiring::Plain, right)?;
        pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
        pair.exchange(caller, BYTES)?;
    }
    let wrong = Terms { preshared_keys: Some([[7; 32], [8; 32]]), ..Terms::called_by(Side::Ours) };
    let pair = Pair::start(setting, opponent, Wiring::Plain, wrong)?;
    let reply = pair.ping(Side::Ours, Duration::from_secs(2))?;
    ensure!(reply.is_none(), "a tunnel came up although the pre-shared keys differ");
    held([])
}

/// Checks that the tunnel survives when `side` loses the uplink it uses.
fn roam(setting: &Setting, opponent: &Opponent<'_>, side: Side) -> anyhow::Result<Outcome> {
    let caller = side;
    let pair = Pair::start(setting, opponent, Wiring::Roaming(side), Terms::called_by(caller))?;
    pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
    let gap = ticking(&pair, side, || {
        sleep(Duration::from_millis(500))?;
        pair.unplug(side)?;
        let unplugged = Instant::now();
        Ok((unplugged, ROAM_LIMIT))
    })?;
    ensure!(gap < ROAM_LIMIT, "no echo replies for {:.1} s", gap.as_secs_f64());
    pair.exchange(side.other(), BYTES)?;
    held([("gap_ms", millis(gap))])
}

/// Checks that the other side can connect while `side` is flooded with initiations.
fn cookie(setting: &Setting, opponent: &Opponent<'_>, side: Side) -> anyhow::Result<Outcome> {
    let caller = side.other();
    let pair = Pair::start(setting, opponent, Wiring::Plain, Terms::called_by(caller))?;
    let key = if side == Side::Ours { pair.our_key() } else { pair.their_key() };
    let target = pair.outer(side)?;
    // Some implementations demand a cookie only from addresses that send too much. Part of the
    // flood has the forged address of the caller, which must still be able to connect.
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
                sleep(Duration::from_secs(1))?;
            }
            pair.ping_ok(caller, FLOODED_LIMIT)
        })();
        stop.store(true, Ordering::Relaxed);
        let sent = join(flood)?;
        join(counted)?;
        let first = met.with_context(|| format!("under {sent} forged initiations"))?;
        let cookies = cookies.load(Ordering::Relaxed);
        ensure!(cookies > 0, "the flooded side sent no cookie reply");
        held([
            ("first_reply_ms", millis(first)),
            ("cookies", cookies as f64),
            ("forged_initiations", sent as f64),
        ])
    })
}

/// Checks that the keepalive of `side`, which is behind a NAT with a short timeout, keeps the NAT
/// mapping open.
fn nat(setting: &Setting, opponent: &Opponent<'_>, side: Side) -> anyhow::Result<Outcome> {
    let terms = Terms { keepalive: Some(1), ..Terms::called_by(side) };
    let mut pair = match Pair::start(setting, opponent, Wiring::Behind(side), terms) {
        Ok(pair) => pair,
        Err(error) if format!("{error:#}").contains("nf_conntrack_udp_timeout") => {
            return Ok(Outcome::Impossible(format!("{error:#}")));
        }
        Err(error) => return Err(error),
    };
    if side == Side::Theirs {
        // Some implementations only initiate a handshake when they have data to send.
        pair.ping_ok(side, HANDSHAKE_LIMIT)?;
    }
    wait_for("handshake with a keepalive", HANDSHAKE_LIMIT, || {
        Ok(pair.handshake_age().is_ok().then_some(()))
    })?;
    let silence = Duration::from_secs(3 * NAT_TIMEOUT);
    sleep(silence)?;
    let first = pair
        .ping_ok(side.other(), Duration::from_secs(2))
        .context("echo from outside, after a pause, with a keepalive")?;
    pair.stop_keepalive()?;
    // The last packet may be answered with a keepalive after ten seconds (WireGuard's
    // Keepalive-Timeout).
    sleep(Duration::from_secs(10) + silence)?;
    if pair.ping(side.other(), Duration::from_secs(1))?.is_some() {
        bail!("the NAT mapping did not expire: the test is not valid");
    }
    pair.ping_ok(side, HANDSHAKE_LIMIT).context("echo from inside, after a pause")?;
    held([("first_reply_ms", millis(first))])
}

/// Checks that traffic flows without a gap while the session that `caller` initiated is renewed.
fn rekey(setting: &Setting, opponent: &Opponent<'_>, caller: Side) -> anyhow::Result<Outcome> {
    let pair = Pair::start(setting, opponent, Wiring::Plain, Terms::called_by(caller))?;
    pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
    let gap = ticking(&pair, caller, || {
        let begun = Instant::now();
        sleep(REKEY_WATCH)?;
        Ok((begun, Duration::ZERO))
    })?;
    let age = pair.handshake_age()?;
    ensure!(age < Duration::from_secs(60), "no re-key in {} s", REKEY_WATCH.as_secs());
    ensure!(gap < REKEY_GAP, "no echo replies for {:.1} s", gap.as_secs_f64());
    pair.exchange(caller, BYTES)?;
    held([("gap_ms", millis(gap))])
}

/// Checks that data of an earlier session changes nothing when a stranger repeats it to `side`, which has
/// a newer session by then: it is not opened again, and it does not move the peer's endpoint.
fn old_keys(setting: &Setting, opponent: &Opponent<'_>, side: Side) -> anyhow::Result<Outcome> {
    let caller = side.other();
    let pair = Pair::start(setting, opponent, Wiring::Plain, Terms::called_by(caller))?;
    let target = pair.outer(side)?;
    pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
    let mut tap = Tap::open(pair.host(side), "eth0")?;
    for _ in 0..RECORDED {
        pair.ping_ok(caller, HANDSHAKE_LIMIT)?;
    }
    let mut recorded = Vec::new();
    tap.find(HANDSHAKE_LIMIT, |frame| {
        let (to, datagram) = udp_payload(frame)?;
        if to == target.ip() && datagram.first() == Some(&DATA) {
            recorded.push(datagram.to_vec());
        }
        (recorded.len() >= RECORDED).then_some(())
    })?
    .context("too few datagrams with data were recorded")?;

    ticking(&pair, caller, || {
        let begun = Instant::now();
        sleep(REKEY_WATCH)?;
        Ok((begun, Duration::ZERO))
    })?;
    let age = pair.handshake_age()?;
    ensure!(age < Duration::from_secs(60), "no re-key in {} s", REKEY_WATCH.as_secs());

    let refused = |pair: &Pair| -> anyhow::Result<u64> {
        // The session before is kept for a while. Of one that is gone, nothing is known.
        ["replayed", "no_session", "unknown_index"].iter().map(|reason| pair.drops(reason)).sum()
    };
    let before = refused(&pair)?;
    let stranger = pair.stranger.namespace().run(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    for datagram in &recorded {
        stranger.send_to(datagram, target)?;
    }
    if side == Side::Ours {
        wait_for("refusal of data of an earlier session", HANDSHAKE_LIMIT, || {
            let refused = refused(&pair)? - before;
            Ok((refused >= recorded.len() as u64).then_some(()))
        })?;
    }
    // A side that had followed the stranger would send its request there.
    pair.ping_ok(side, ROAM_LIMIT).context("echo to the caller after the repeated data")?;
    pair.exchange(caller, BYTES)?;
    held([("repeated", recorded.len() as f64)])
}

/// Sends echo requests from `side` while `act` runs. `act` returns the start of the measurement,
/// and how long it goes on after `act`. Returns the longest time without a reply since that start.
fn ticking(
    pair: &Pair,
    side: Side,
    action: impl FnOnce() -> anyhow::Result<(Instant, Duration)>,
) -> anyhow::Result<Duration> {
    let [target, _] = pair.inner(side.other())?;
    let (ticker, stop) = (Ticker::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let ticks = scope.spawn(|| ticker.run(pair.host(side), target, PACE, &stop));
        let acted = action().and_then(|(from, more)| {
            sleep(more)?;
            Ok(from)
        });
        stop.store(true, Ordering::Relaxed);
        join(ticks)?;
        Ok(ticker.longest_gap(acted?, Instant::now()))
    })
}

/// Checks that the real `wg` prints every peer of Towline and no secret key, and changes nothing.
fn wg_show(setting: &Setting, opponent: &Opponent<'_>) -> anyhow::Result<Outcome> {
    if let Err(error) = std::process::Command::new("wg").arg("--version").output() {
        return Ok(Outcome::Impossible(format!("cannot run wg: {error}: install wireguard-tools")));
    }
    let keys = Some([[7; 32]; 2]);
    let terms = Terms { preshared_keys: keys, ..Terms::called_by(Side::Ours) };
    let mut pair = Pair::start(setting, opponent, Wiring::Plain, terms)?;
    pair.ping_ok(Side::Ours, HANDSHAKE_LIMIT)?;
    let (answering, silent) = (pair.their_key().to_string(), pair.add_silent_peer()?.to_string());
    let dump = wait_for("every peer in wg show", HANDSHAKE_LIMIT, || {
        let shown = pair.wg("show", &["dump"])?.stdout;
        Ok((shown.contains(&answering) && shown.contains(&silent)).then_some(shown))
    })?;
    let rows: Vec<Vec<&str>> = dump.lines().map(|line| line.split('\t').collect()).collect();
    ensure!(rows.len() == 3, "not one interface and two peers: {dump}");
    let cell = |row: usize, column: usize| {
        rows.get(row).and_then(|row| row.get(column)).copied().unwrap_or_default()
    };
    ensure!(cell(0, 0) == "(none)", "the private key is shown");
    ensure!([1, 2].iter().all(|row| cell(*row, 1) == "(none)"), "a preshared key is shown");
    let row = if cell(1, 0) == answering { 1 } else { 2 };
    let endpoint = pair.outer(Side::Theirs)?.to_string();
    ensure!(cell(row, 2) == endpoint, "the endpoint is {} instead of {endpoint}", cell(row, 2));
    ensure!(cell(row, 4) != "0" && cell(row, 5) != "0", "no handshake or no traffic: {dump}");

    let shown = pair.wg("show", &[])?.stdout;
    ensure!(shown.contains("latest handshake: "), "wg show has no handshake: {shown}");
    ensure!(!shown.contains("private key"), "wg show knows of a private key");
    let saved = pair.wg("showconf", &[])?.stdout;
    ensure!(saved.matches("[Peer]").count() == 2, "wg showconf does not have both peers: {saved}");
    let secret = saved.contains("PrivateKey") || saved.contains("PresharedKey");
    ensure!(!secret, "wg showconf has a secret key");
    let changed = pair.wg("set", &["listen-port", "1"])?;
    ensure!(!changed.status.success(), "wg set succeeded");
    held([("peers", 2.0)])
}

/// Returns the outcome of a case whose promises held.
fn held<const N: usize>(figures: [(&'static str, f64); N]) -> anyhow::Result<Outcome> {
    Ok(Outcome::Held(figures.into()))
}

fn millis(duration: Duration) -> f64 {
    round(duration.as_secs_f64() * 1e3)
}
