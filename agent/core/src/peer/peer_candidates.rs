//! Addresses at which a peer might be reached, and what is sent to them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng as _;
use towline_types::frame::Probe;
use towline_types::limits;
use towline_types::node::Candidate;

use super::paths::{HEARD_FOR, Tier};
use super::trains::TRAIN;
use super::{OPENING, OPENING_AGAIN, OPENING_FOR, Peer, PeerContext, source_credit};
use crate::local_node::{LocalNode, is_reachable, is_reachable_v4, preference};
use crate::output::{Output, Transmit};
use crate::path::Path;
use crate::pings::{Purpose, Sent};
use crate::prefixes::{is_behind_nat, is_private};
use crate::probing::CallOrder;
use crate::status::PathStatus;

/// Number of hops of a datagram that only opens our own NAT: the first router forwards it, and the
/// second one drops it.
const OPENING_HOPS: u8 = 2;
/// Time for which a call shows that the peer sent something to us.
const CALLED_FOR: Duration = Duration::from_secs(10);
/// Largest number of paths that one attempt tries.
const TARGETS: usize = 48;

impl Peer {
    /// Sends an initiation over those of the paths that may be sent something. Returns whether there are
    /// any.
    ///
    /// A path that is known only as a source is pinged instead: an answer does not say which copy of an
    /// initiation it answers, so who changes its source would name the path that carries the traffic.
    pub(super) fn initiate(&mut self, cx: &mut PeerContext<'_>, mut to: Vec<Path>) -> bool {
        to.truncate(limits::CANDIDATES);
        to.retain(|path| {
            let now = cx.fx.now;
            self.is_offered(now, path) && self.may_send(cx, path, source_credit::PING)
        });
        let is_sent = !to.is_empty();
        if is_sent {
            cx.fx.output(Output::Handshake { peer: self.key(), to });
        }
        is_sent
    }

    pub(super) fn ping(&mut self, cx: &mut PeerContext<'_>, to: Path, purpose: Purpose) {
        let size = match purpose {
            Purpose::Size(size) => Some(size),
            Purpose::Path | Purpose::Check | Purpose::Train | Purpose::Operator(_) => None,
        };
        if !self.may_send(cx, &to, size.map_or(source_credit::PING, usize::from)) {
            return;
        }
        self.paths.checked(cx.fx.now, to);
        let sent = Sent { peer: self.id(), to, at: cx.fx.now, purpose };
        let transaction = cx.probing.pings.sent(&mut cx.fx.rng, sent);
        cx.fx.output(Output::Transmit(Transmit {
            peer: self.key(),
            path: Some(to),
            message: Probe::Ping { transaction },
            size,
            hop_limit: None,
        }));
    }

    /// Sends pings of this size together, to the path in use.
    pub(super) fn ping_by_train(&self, cx: &mut PeerContext<'_>, path: Path, size: u16) {
        let (peer, at) = (self.id(), cx.fx.now);
        let transactions = (0..TRAIN).map(|_| {
            let sent = Sent { peer, to: path, at, purpose: Purpose::Train };
            cx.probing.pings.sent(&mut cx.fx.rng, sent)
        });
        let transactions = transactions.collect();
        cx.fx.output(Output::Train { peer: self.key(), path, transactions, size });
    }

    /// Has our own NAT expect the peer, by a ping that does not reach the peer's NAT.
    ///
    /// A router that translates without filtering takes the first datagram of a peer for its own: its
    /// table then has no room for the mapping that a host behind it needs towards that peer.
    pub(super) fn open_nat(&mut self, cx: &mut PeerContext<'_>, to: Path) {
        if !self.may_send(cx, &to, source_credit::PING) {
            return;
        }
        // Nobody waits for the pong.
        let transaction = cx.fx.rng.random();
        cx.fx.output(Output::Transmit(Transmit {
            peer: self.key(),
            path: Some(to),
            message: Probe::Ping { transaction },
            size: None,
            hop_limit: Some(OPENING_HOPS),
        }));
    }

    /// Returns whether an attempt only opens our NAT, because nothing may reach the peer's yet: both nodes
    /// are behind a NAT, and the peer has not yet sent something to us. Not for long: a NAT that filters
    /// nothing lets us in although the peer never learns where we are.
    pub(super) fn opens_first(&mut self, cx: &PeerContext<'_>) -> bool {
        if !cx.local.is_connected() || !self.are_both_behind_nat(cx) || self.has_opened(cx) {
            return false;
        }
        let now = cx.fx.now;
        let began = self.opening_since.filter(|at| now < *at + OPENING_AGAIN).unwrap_or(now);
        self.opening_since = Some(began);
        now < began + OPENING_FOR
    }

    /// Returns whether neither node can be reached over IPv4 without its having sent something first.
    pub(super) fn are_both_behind_nat(&self, cx: &PeerContext<'_>) -> bool {
        !cx.local.is_reachable_v4() && !is_reachable_v4(&self.node.record().candidates)
    }

    /// Returns whether the peer sent something to a public address of ours: it does so before it calls,
    /// once it knows one. It does if it called later than we told it, by a call or by our record.
    fn has_opened(&self, cx: &PeerContext<'_>) -> bool {
        let Some(since) = cx.local.outer_since() else { return false };
        let by_call = self.told.filter(|told| *told >= since);
        let told = by_call.into_iter().chain(cx.local.published_since()).min();
        told.zip(self.called)
            .is_some_and(|(told, called)| called > told && cx.fx.now < called + CALLED_FOR)
    }

    /// Returns whether the peer's NAT may drop what comes over a path.
    pub(super) fn may_be_closed(&self, now: Instant, to: &Path) -> bool {
        let heard = self.paths.get(to).and_then(|known| known.heard);
        let is_open = heard.is_some_and(|at| now < at + HEARD_FOR);
        !is_open && !to.is_relayed() && is_behind_nat(to.remote)
    }

    /// Returns whether one more datagram may be sent to an address, which gets a bounded number
    /// until it answers, and few bytes if it is known only as the source of a datagram. The path in use
    /// has answered.
    fn may_send(&mut self, cx: &mut PeerContext<'_>, to: &Path, bytes: usize) -> bool {
        let (id, ip) = (self.id(), to.remote.ip());
        let has_answered = self.paths.has_answered_from(to.remote);
        let free = self.path() == Some(*to)
            || (self.is_offered(cx.fx.now, to) || self.sources.spend(to.remote, bytes))
                && cx.probing.unanswered.take(cx.fx.now, id, ip, has_answered);
        cx.fx.counters.probes_withheld += u64::from(!free);
        free
    }

    /// Returns whether a path is more than the source of a datagram: the peer signed its address, or
    /// named it in a call; a relay opened it; or something sent over it was answered.
    fn is_offered(&self, now: Instant, to: &Path) -> bool {
        let is_signed = || self.node.record().candidates.iter().any(|c| c.address() == to.remote);
        let is_called = || self.signalled.get(&to.remote).is_some_and(|until| now < *until);
        to.is_relayed()
            || self.endpoint.is_some_and(|endpoint| endpoint.remote == to.remote)
            || is_signed()
            || is_called()
            || self.paths.has_answered_from(to.remote)
    }

    /// Returns those candidates that we may send to, the likeliest first. Among equals that is the order in
    /// which the peer published them.
    pub(super) fn candidates(&self, now: Instant, local: &LocalNode) -> Vec<SocketAddr> {
        let same_site =
            self.node.grant().site.is_some() && self.node.grant().site.as_ref() == local.site();
        let rank = |c: &Candidate| {
            let private = is_private(c.address().ip());
            (if private { u8::from(!same_site) * 2 } else { 1 }, preference(c.kind()), c.address())
        };
        let published = self.node.record().candidates.iter();
        let mut usable: Vec<_> =
            published.filter(|c| local.can_send_to_node(c.address())).map(rank).collect();
        let signalled = self.signalled.iter().filter(|(_, until)| now < **until);
        usable.extend(signalled.map(|(address, _)| (3, 0, *address)));
        usable.sort_by_key(|(tier, kind, _)| (*tier, *kind));
        let mut addresses: Vec<SocketAddr> = Vec::with_capacity(usable.len());
        for (_, _, address) in usable {
            if !addresses.contains(&address) && local.can_send_to_node(address) {
                addresses.push(address);
            }
        }
        addresses
    }

    /// Returns the paths that something came over, then the candidates that never answered.
    pub(crate) fn paths(&self, now: Instant, local: &LocalNode) -> Vec<PathStatus> {
        let in_use = self.path();
        let mut paths: Vec<PathStatus> = self.paths.statuses(in_use).collect();
        for address in self.candidates(now, local) {
            if paths.iter().all(|known| known.path.is_relayed() || known.path.remote != address) {
                paths.push(PathStatus {
                    path: Path::direct(address),
                    relay: None,
                    in_use: false,
                    rtt: None,
                    heard: None,
                    answered: None,
                });
            }
        }
        paths
    }

    /// Returns the paths that an attempt tries: the last one, those over which something came
    /// lately, every candidate from every uplink.
    pub(super) fn targets(&self, cx: &PeerContext<'_>) -> Vec<Path> {
        let mut targets: Vec<Path> = self.endpoint.into_iter().collect();
        let candidates = self.candidates(cx.fx.now, cx.local);
        let direct = candidates.iter().flat_map(|to| cx.local.paths_to(*to));
        for to in self.paths.recent(cx.fx.now).into_iter().chain(direct) {
            if !targets.contains(&to) && cx.local.can_send_to_node(to.remote) {
                targets.push(to);
            }
        }
        targets.truncate(TARGETS);
        targets
    }

    pub(super) fn paths_beside(&self, cx: &PeerContext<'_>, path: Path) -> bool {
        let tier = Tier::of(&path);
        self.targets(cx).iter().any(|to| *to != path && Tier::of(to) <= tier)
    }

    /// Asks the peer for a call, and relays for channels to it.
    pub(super) fn seek_help(&mut self, cx: &mut PeerContext<'_>, turn: u32) {
        let callable = !cx.local.candidates().is_empty() || !cx.relays.is_empty();
        let relayed =
            self.path().filter(Path::is_relayed).filter(|_| self.liveness.doubtful().is_none());
        let far = !is_reachable(&self.node.record().candidates) || !cx.local.is_reachable();
        let can_call = callable && (relayed.is_some() || cx.local.is_connected());
        if can_call && (far || turn > 0) && !self.waits_with_call(cx, turn) {
            let CallOrder { boot_epoch, number } = cx.probing.next_call();
            let candidates = cx.local.candidates().to_vec();
            let since = cx.local.outer_since();
            if self.told < since {
                self.told = Some(cx.fx.now);
            }
            cx.fx.output(Output::Transmit(Transmit {
                peer: self.key(),
                path: relayed,
                message: Probe::CallMe { boot_epoch, number, candidates },
                size: None,
                hop_limit: None,
            }));
        }
        let needs_relay = far || turn > 0;
        if needs_relay && !self.node.is_relay() && relayed.is_none() {
            cx.relays.open(cx.fx, cx.local, (self.id(), self.key()), turn / 2);
        }
    }

    /// Returns whether a call has to wait: to the peer it shows that we sent something to it, and we do not
    /// know yet where to. The peer calls as soon as it knows itself.
    fn waits_with_call(&self, cx: &PeerContext<'_>, turn: u32) -> bool {
        let is_open = |to: &SocketAddr| !is_private(to.ip());
        turn < OPENING
            && cx.local.outer_since().is_some()
            && self.are_both_behind_nat(cx)
            && !self.candidates(cx.fx.now, cx.local).iter().any(is_open)
    }
}
