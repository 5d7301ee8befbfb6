//! What a change of our own addresses, uplinks or port means for a peer.

use super::{HEARD_FOR, PathChange, Peer, PeerContext, PeerState};
use crate::pings::Purpose;
use crate::timers::Timer;

impl Peer {
    /// Handles a change of our addresses or uplinks: a peer that is not up may be reached now, and one that
    /// is up may be lost. If it has traffic, all paths are tried now, and by a handshake, so that the
    /// peer learns at once where we are. A path whose uplink is gone is given up at once.
    pub(crate) fn handle_local_change(&mut self, cx: &mut PeerContext<'_>) {
        let lost = self.follow_uplinks(cx);
        self.try_everything(cx, lost);
    }

    /// Handles a change of addresses of ours that nothing is sent from but answers.
    pub(crate) fn handle_address_change(&mut self, cx: &mut PeerContext<'_>) {
        if self.follow_uplinks(cx) {
            self.try_everything(cx, true);
        }
    }

    /// Renames the paths after our uplinks changed. Returns whether the path in use was lost.
    fn follow_uplinks(&mut self, cx: &mut PeerContext<'_>) -> bool {
        self.paths.follow_uplinks(cx.local);
        let mut lost = false;
        if let Some(path) = self.endpoint {
            match cx.local.still(path) {
                Some(name) if name == path => {}
                Some(name) => self.rename_endpoint(cx, name),
                None => {
                    tracing::debug!(%path, "path given up: its uplink is gone");
                    lost = true;
                    let other = self.paths.best(cx.fx.now, HEARD_FOR, None);
                    let to = other.or(Some(cx.local.canonical(path)));
                    self.set_endpoint(cx, to, PathChange::AddressGone);
                }
            }
        }
        lost
    }

    fn try_everything(&mut self, cx: &mut PeerContext<'_>, lost: bool) {
        let wanted = cx.is_eager || self.liveness.is_recent(cx.fx.now);
        match self.state {
            PeerState::Connecting | PeerState::Down => self.try_again(cx),
            PeerState::Up if wanted && lost => {
                self.set_state(cx, PeerState::Connecting);
                self.try_again(cx);
                // The peer does not know yet that there is something to begin.
                self.schedule.force();
            }
            PeerState::Up if wanted => {
                self.schedule.restart(cx.fx.now);
                let targets = self.targets(cx);
                if self.schedule.may_answer(cx.fx.now, true) {
                    self.schedule.answered(cx.fx.now);
                    self.initiate(cx, targets.clone());
                }
                for to in targets {
                    self.ping(cx, to, Purpose::Check);
                }
                cx.fx.timers.set(Timer::Probe(self.id()), cx.fx.now);
            }
            PeerState::Idle | PeerState::Up => {}
        }
    }

    /// Handles that a public address of ours became known: a peer behind a NAT waits for it, and learns it
    /// by a call sooner than from our record.
    pub(crate) fn handle_outer_address(&mut self, cx: &mut PeerContext<'_>) {
        let is_trying = matches!(self.state, PeerState::Connecting | PeerState::Down);
        if is_trying && self.schedule.attempts() > 0 && self.are_both_behind_nat(cx) {
            self.try_again(cx);
        }
    }

    /// Handles a change of the port that datagrams to public addresses leave from: moves the path in use to
    /// it, and tries a peer that is not up again.
    pub(crate) fn handle_port_change(&mut self, cx: &mut PeerContext<'_>) {
        self.paths.follow_port(cx.local);
        self.opening_since = None;
        let moved = self.endpoint.map(|path| cx.local.on_port(path));
        if moved != self.endpoint {
            self.set_endpoint(cx, moved, PathChange::PortChanged);
            if self.state == PeerState::Up {
                cx.fx.timers.set(Timer::Probe(self.id()), cx.fx.now);
            }
        }
        match self.state {
            PeerState::Connecting | PeerState::Down => self.try_again(cx),
            PeerState::Idle | PeerState::Up => {}
        }
    }
}
