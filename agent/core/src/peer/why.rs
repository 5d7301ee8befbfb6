//! Why a peer is not up, or up through a relay alone.

use std::time::Instant;

use super::{DOWN_AFTER, NetworkConditions, Peer, PeerState};
use crate::local_node::{LocalNode, is_reachable};
use crate::path::Path;
use crate::reason::{Direct, PeerReason, RelayedPath};
use crate::stun_client::Mapping;

impl Peer {
    /// Returns why the peer is not up, or up through a relay alone; else `None`.
    pub(crate) fn reason(
        &self,
        now: Instant,
        local: &LocalNode,
        conditions: NetworkConditions,
    ) -> Option<PeerReason> {
        if self.state == PeerState::Up {
            return self.reason_for_relay(now, local, conditions);
        }
        if self.state == PeerState::Idle {
            return Some(PeerReason::Idle);
        }
        let tried = self.candidates(now, local).len();
        if self.state == PeerState::Connecting {
            return Some(match tried {
                0 => PeerReason::Waiting,
                candidates => PeerReason::Trying { candidates },
            });
        }
        let seconds = now.saturating_duration_since(self.trying_since).as_secs();
        let direct = match tried {
            0 => Direct::NoCandidates,
            candidates => Direct::NoAnswer { candidates, seconds },
        };
        let is_behind_nat = || !is_reachable(&self.node.record().candidates);
        Some(if self.paths.has_answered(now, self.trying_since) {
            PeerReason::NoHandshake
        } else if conditions.is_silent {
            PeerReason::UdpBlocked(direct)
        } else if !conditions.has_relays && !local.is_reachable() && is_behind_nat() {
            PeerReason::NoRelay(direct)
        } else if conditions.are_relays_silent && !local.is_reachable() && is_behind_nat() {
            PeerReason::RelaySilent(direct)
        } else {
            PeerReason::Unreached(direct)
        })
    }

    fn reason_for_relay(
        &self,
        now: Instant,
        local: &LocalNode,
        conditions: NetworkConditions,
    ) -> Option<PeerReason> {
        self.path().filter(Path::is_relayed)?;
        let direct = match self.candidates(now, local).len() {
            0 => RelayedPath::NoCandidates,
            candidates if now < self.since + DOWN_AFTER => RelayedPath::Trying { candidates },
            candidates => RelayedPath::NoAnswer { candidates },
        };
        Some(match conditions.mapping {
            Some(Mapping::Dependent) => PeerReason::RelayedByMapping { direct },
            Some(Mapping::None | Mapping::Independent) | None => PeerReason::Relayed { direct },
        })
    }
}
