//! Publication of a node's record, and assignment of the prefixes that it claims.
//!
//! A record is signed as a whole, so a prefix that another node holds cannot be removed from it.
//! Instead, the map entry lists the prefix as withheld. So all nodes decide the same way, the
//! contested prefix stays with its holder, and the rest of the record takes effect.
//!
//! A claim to a prefix that another node holds is refused, and noted as a problem of both nodes. A
//! holder that was offline for longer than the lease loses the prefix to a claimant that is
//! connected. Refused claims are checked again whenever a prefix is freed, and periodically.

use ipnet::IpNet;
use towline_proto::id::{NodeId, NodeName};
use towline_proto::node::{Node, Record};
use towline_proto::ownership::{self, Claim};
use towline_proto::pb;

use super::sessions::{SessionId, Sessions};
use super::{Event, Refusal, Registry};
use crate::clock::Now;

/// Result of a publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Revision of the node's map entry.
    pub revision: u64,
    /// Prefixes of the record that are withheld from the map.
    pub withheld: Vec<Withheld>,
}

/// A prefix that is withheld from the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Withheld {
    /// The withheld prefix.
    pub prefix: IpNet,
    /// Reason, in one line for the operator.
    pub reason: String,
}

impl Registry {
    /// Stores a record from a node's live session. The caller has verified its signature.
    pub fn publish(
        &mut self,
        node: NodeId,
        session: &SessionId,
        record: Record,
        signed: pb::Signed,
        sessions: &Sessions,
        now: Now,
    ) -> Result<Published, Refusal> {
        let member = self.member(node)?;
        if sessions.live(node, now).is_none_or(|live| live.id != *session) {
            return Err(Refusal::NoSession);
        }
        if let Some((stored, have)) = &member.record {
            if record.generation < stored.generation {
                let (offered, stored) = (record.generation, stored.generation);
                return Err(Refusal::GenerationBehind { offered, stored });
            }
            if record.generation == stored.generation {
                if have.body != signed.body {
                    return Err(Refusal::GenerationReused { generation: record.generation });
                }
                return Ok(self.settled(node, sessions, now));
            }
        }
        if let Err(error) = Node::new(member.grant.clone(), record.clone()) {
            self.note(node, None, error.to_string());
            return Err(error.into());
        }
        let freed = self.claims.held_by(node).iter().any(|have| !record.prefixes.contains(have));
        if let Some(member) = self.nodes.get_mut(&node) {
            member.record = Some((record, signed));
            member.last_seen = now.unix;
        }
        self.touch(node);
        let published = self.settled(node, sessions, now);
        if freed {
            self.reconsider(sessions, now);
        }
        Ok(published)
    }

    fn settled(&mut self, node: NodeId, sessions: &Sessions, now: Now) -> Published {
        let withheld = self.settle(node, sessions, now);
        let revision = self.nodes.get(&node).map_or(self.revision, |member| member.revision);
        Published { revision, withheld }
    }

    /// Checks every withheld claim again.
    pub(super) fn reconsider(&mut self, sessions: &Sessions, now: Now) {
        let waiting = self.nodes.iter().filter(|(_, member)| !member.withheld.is_empty());
        let waiting: Vec<NodeId> = waiting.map(|(id, _)| *id).collect();
        for node in waiting {
            self.settle(node, sessions, now);
        }
    }

    /// Assigns the prefixes that a node's record claims, and releases those that it no longer
    /// claims. Claims that are refused are withheld, and returned.
    fn settle(&mut self, node: NodeId, sessions: &Sessions, now: Now) -> Vec<Withheld> {
        let Some(member) = self.nodes.get(&node) else { return Vec::new() };
        let Some((record, _)) = &member.record else { return Vec::new() };
        let wanted = record.prefixes.clone();
        for prefix in self.claims.held_by(node) {
            if !wanted.contains(&prefix) {
                self.claims.release(&prefix);
            }
        }
        let mut withheld = Vec::new();
        for prefix in wanted {
            if let Err(reason) = self.claim(node, prefix, sessions, now) {
                withheld.push(Withheld { prefix, reason });
            }
        }
        let list: Vec<IpNet> = withheld.iter().map(|withheld| withheld.prefix).collect();
        let settled: Vec<IpNet> = self.withheld(node).filter(|was| !list.contains(was)).collect();
        for prefix in settled {
            self.forget_problems(node, &prefix);
        }
        if let Some(member) = self.nodes.get_mut(&node)
            && member.withheld != list
        {
            member.withheld = list;
            self.touch(node);
        }
        withheld
    }

    fn withheld(&self, node: NodeId) -> impl Iterator<Item = IpNet> {
        self.nodes.get(&node).into_iter().flat_map(|member| member.withheld.iter().copied())
    }

    /// Makes the node the holder of the prefix.
    ///
    /// # Errors
    ///
    /// If the claim is refused: the reason, in one line for the operator.
    fn claim(
        &mut self,
        node: NodeId,
        prefix: IpNet,
        sessions: &Sessions,
        now: Now,
    ) -> Result<(), String> {
        if self.claims.holder(&prefix) == Some(node) {
            return Ok(());
        }
        if let Err(unusable) = ownership::usable(prefix, &self.mesh.config) {
            let reason = unusable.to_string();
            self.note(node, Some((node, prefix)), reason.clone());
            return Err(reason);
        }
        let claim_of = |node: NodeId, prefix: IpNet| {
            self.nodes.get(&node).map(|member| Claim { grant: &member.grant, prefix })
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
        if let Some((other, holder)) = in_the_way.copied() {
            let reason = format!(
                "prefix {prefix} of node `{}` overlaps {other}, which node `{}` holds: \
                 remove it from one of the two, or grant exactly the nested prefix to its node",
                self.name_of(node),
                self.name_of(holder),
            );
            self.note(node, Some((node, prefix)), reason.clone());
            self.note(holder, Some((node, prefix)), reason.clone());
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
        self.claims.release(&held);
        if let Some(member) = self.nodes.get_mut(&holder) {
            member.withheld.push(held);
        }
        self.touch(holder);
        let (from, to) = (self.name_of(holder), self.name_of(node));
        let text = format!(
            "prefix {held} of node `{from}` moved to node `{to}` ({prefix}): \
             `{from}` had been offline for longer than the lease"
        );
        self.note(holder, Some((holder, held)), text.clone());
        self.note(node, Some((holder, held)), text);
        self.events.push(Event::PrefixMoved { prefix, from, to });
    }

    fn name_of(&self, node: NodeId) -> NodeName {
        // Callers only pass nodes of the registry.
        let Some(member) = self.nodes.get(&node) else { unreachable!("no node {node}") };
        member.grant.name.clone()
    }
}
