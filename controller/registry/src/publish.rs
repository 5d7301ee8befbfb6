//! Publication of a node's record, and assignment of the prefixes that it claims.
//!
//! A record is signed as a whole, so a prefix that another node holds cannot be removed from it.
//! Instead, the map entry lists the prefix as withheld. So all nodes decide the same way, the
//! contested prefix stays with its holder, and the rest of the record takes effect.
//!
//! A block of a pod range that the node announces is pinned: its grant allows it from then on
//! ([`Grant::pin`](towline_types::node::Grant::pin)).
//!
//! A claim to a prefix that another node holds is refused, and noted as a problem of both nodes. A
//! holder that was offline for longer than the lease loses the prefix to a claimant that is
//! connected. Refused claims are checked again whenever a prefix is freed, and periodically.

use ipnet::IpNet;
use towline_types::id::{NodeId, NodeName};
use towline_types::limits;
use towline_types::node::{Node, Record};
use towline_types::ownership::{self, Claim};

use super::problems::{NodeProblem, WithheldReason};
use super::sessions::{SessionId, Sessions};
use super::{Event, Key, Now, PublishError, Registry, Unsigned};

/// Result of a publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Revision of the node's map entry.
    pub revision: u64,
    /// True if the record replaced the stored one; false if it is the stored one.
    pub is_stored: bool,
    /// Prefixes of the record that are withheld from the map.
    pub withheld: Vec<Withheld>,
}

/// Difference of a published record from the stored one. The caller compares the signed bytes, since
/// they may have fields that this version does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// Both are the same bytes.
    Nothing,
    /// Only the generation differs.
    Generation,
    /// Something else differs, or there is no stored record.
    Content,
}

/// A prefix that is withheld from the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Withheld {
    /// The withheld prefix.
    pub prefix: IpNet,
    /// Reason for the operator.
    pub reason: WithheldReason,
}

impl Registry {
    /// Stores a record from a node's live session. The caller has verified its signature.
    ///
    /// A record that differs from the stored one by its generation only is stored, but is not a
    /// change of the map: watchers would learn nothing from it.
    pub fn publish(
        &mut self,
        node: NodeId,
        session: &SessionId,
        record: Record,
        difference: Difference,
        sessions: &Sessions,
        now: Now,
    ) -> Result<Published, PublishError> {
        let member = self.member(node)?;
        if sessions.live(node, now).is_none_or(|live| live.id != *session) {
            return Err(PublishError::NoSession);
        }
        if let Some(stored) = &member.record {
            let (offered, stored) = (record.generation, stored.generation);
            if offered < stored {
                return Err(PublishError::GenerationBehind { offered, stored });
            }
            if offered - stored > limits::GENERATION_STEP {
                return Err(PublishError::GenerationAhead { offered, stored });
            }
            if offered == stored {
                if difference != Difference::Nothing {
                    return Err(PublishError::GenerationReused { generation: offered });
                }
                return Ok(self.settled(node, false, sessions, now));
            }
        }
        let pinned = member.grant.pin(&record.prefixes);
        let grant = pinned.as_ref().unwrap_or(&member.grant).clone();
        if let Err(error) = Node::new(grant, record.clone()) {
            self.note(node, error.clone().into());
            return Err(error.into());
        }
        let freed = self.claims.held_by(node).iter().any(|have| !record.prefixes.contains(have));
        self.members.set_record(node, record);
        self.dirty.insert(Key::Node(node));
        let is_pinned = pinned.is_some();
        if let Some(grant) = pinned {
            self.members.set_allowed(node, grant);
            self.unsigned.insert(Unsigned::Grant(node));
        }
        if is_pinned || difference == Difference::Content {
            self.touch(node);
        }
        let published = self.settled(node, true, sessions, now);
        if freed {
            self.reconsider(sessions, now);
        }
        Ok(published)
    }

    fn settled(
        &mut self,
        node: NodeId,
        is_stored: bool,
        sessions: &Sessions,
        now: Now,
    ) -> Published {
        let withheld = self.settle(node, sessions, now);
        let member = self.members.get(node);
        let revision = member.map_or(self.counters.revision, |member| member.revision);
        Published { revision, is_stored, withheld }
    }

    /// Checks every withheld claim again.
    pub(super) fn reconsider(&mut self, sessions: &Sessions, now: Now) {
        for node in self.members.with_withheld() {
            self.settle(node, sessions, now);
        }
    }

    /// Assigns the prefixes that a node's record claims, and releases those that it no longer
    /// claims. Claims that are refused are withheld, and returned.
    fn settle(&mut self, node: NodeId, sessions: &Sessions, now: Now) -> Vec<Withheld> {
        let Some(member) = self.members.get(node) else { return Vec::new() };
        let Some(record) = &member.record else { return Vec::new() };
        let (wanted, was_withheld) = (record.prefixes.clone(), member.withheld.clone());
        for prefix in self.claims.held_by(node) {
            if !wanted.contains(&prefix) {
                self.claims.release(&prefix, node);
            }
        }
        let mut withheld = Vec::new();
        let mut room = limits::GUARDED_PREFIXES;
        for prefix in wanted {
            let is_alone = ownership::is_guarded_alone(prefix, &self.mesh.config);
            let claimed = if is_alone && room == 0 {
                Err(self.refuse_more(node, prefix))
            } else {
                self.claim(node, prefix, sessions, now)
            };
            match claimed {
                Ok(()) => room -= usize::from(is_alone),
                Err(reason) => withheld.push(Withheld { prefix, reason }),
            }
        }
        let list: Vec<IpNet> = withheld.iter().map(|withheld| withheld.prefix).collect();
        for settled in was_withheld.iter().filter(|was| !list.contains(was)) {
            self.problems.settle((node, *settled));
        }
        if list != was_withheld && self.members.set_withheld(node, list) {
            self.touch(node);
        }
        withheld
    }

    /// Refuses a prefix of a node that holds as many as it may.
    fn refuse_more(&mut self, node: NodeId, prefix: IpNet) -> WithheldReason {
        self.claims.release(&prefix, node);
        let reason = WithheldReason::TooMany { prefix, claimant: self.name_of(node) };
        self.note_about(node, Some((node, prefix)), reason.clone().into());
        reason
    }

    /// Makes the node a holder of the prefix: the only one, unless the grants of several share it.
    ///
    /// # Errors
    ///
    /// If the claim is refused: the reason for the operator.
    fn claim(
        &mut self,
        node: NodeId,
        prefix: IpNet,
        sessions: &Sessions,
        now: Now,
    ) -> Result<(), WithheldReason> {
        let is_held = self.claims.holds(&prefix, node);
        if let Err(unusable) = ownership::usable(prefix, &self.mesh.config) {
            // An earlier version may have accepted it.
            if is_held {
                self.claims.release(&prefix, node);
            }
            let reason = WithheldReason::from(unusable);
            self.note_about(node, Some((node, prefix)), reason.clone().into());
            return Err(reason);
        }
        if is_held {
            return Ok(());
        }
        let claim_of = |node: NodeId, prefix: IpNet| {
            self.members.get(node).map(|member| Claim { grant: &member.grant, prefix })
        };
        let rivals: Vec<(IpNet, NodeId)> = self
            .claims
            .overlapping(&prefix)
            .into_iter()
            .filter(|(other, holder)| {
                let claims = claim_of(node, prefix).zip(claim_of(*holder, *other));
                claims.is_some_and(|(ours, theirs)| ours.conflicts_with(theirs))
            })
            .collect();
        let connected = sessions.live(node, now).is_some();
        let in_the_way =
            rivals.iter().find(|(_, holder)| !connected || !self.is_away(*holder, sessions, now));
        if let Some((held, holder)) = in_the_way.copied() {
            let (claimant, name) = (self.name_of(node), self.name_of(holder));
            let reason = WithheldReason::Held { prefix, claimant, held, holder: name };
            self.note_about(node, Some((node, prefix)), reason.clone().into());
            self.note_about(holder, Some((node, prefix)), reason.clone().into());
            return Err(reason);
        }
        for (other, holder) in rivals {
            self.take_from(holder, other, node, prefix);
        }
        self.claims.hold(prefix, node);
        Ok(())
    }

    /// Takes a prefix from a holder that is offline for longer than the lease.
    fn take_from(&mut self, holder: NodeId, held: IpNet, node: NodeId, prefix: IpNet) {
        self.claims.release(&held, holder);
        let mut withheld =
            self.members.get(holder).map_or_else(Vec::new, |member| member.withheld.clone());
        withheld.push(held);
        self.members.set_withheld(holder, withheld);
        self.touch(holder);
        let (from, to) = (self.name_of(holder), self.name_of(node));
        let moved = NodeProblem::Moved { held, from: from.clone(), to: to.clone(), prefix };
        self.note_about(holder, Some((holder, held)), moved.clone());
        self.note_about(node, Some((holder, held)), moved);
        self.events.push(Event::PrefixMoved { prefix, from, to });
    }

    fn name_of(&self, node: NodeId) -> NodeName {
        // Callers only pass nodes of the registry.
        let Some(member) = self.members.get(node) else { unreachable!("no node {node}") };
        member.grant.name.clone()
    }
}
