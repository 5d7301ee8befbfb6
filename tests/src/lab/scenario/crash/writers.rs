//! Operators and machines that write to the controller all the time, and the record of all
//! acknowledged writes.
//!
//! A write without an acknowledgement may or may not have been applied. Nothing is expected of it
//! or of the object that it would have changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;

use crate::lab::binaries::Binaries;
use crate::lab::interrupt;
use crate::lab::mesh::{Node, Operator, Token};
use crate::lab::scenario::Setting;
use crate::lab::scenario::hybrid::Hybrid;

/// Numbers of acknowledged writes of each kind.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Acknowledged {
    /// Number of created tokens.
    pub tokens: usize,
    /// Number of revoked tokens.
    pub revocations: usize,
    /// Number of nodes that joined.
    pub joins: usize,
    /// Number of removed nodes.
    pub removals: usize,
    /// Number of published records, as seen by growing generations in the node list.
    pub publishes: usize,
}

impl Acknowledged {
    /// Returns the number of all acknowledged writes.
    pub fn all(&self) -> usize {
        self.tokens + self.revocations + self.joins + self.removals + self.publishes
    }
}

/// Writers to the controller. Each method that takes `stop` is the loop of one writer.
pub(super) struct Writers<'a> {
    operator: Operator,
    hybrid: &'a Hybrid,
    binaries: &'a Binaries,
    expected: Mutex<Expected>,
}

/// Objects that must exist at the end, and changes that must have lasted.
#[derive(Debug, Default)]
struct Expected {
    done: Acknowledged,
    tokens: BTreeSet<String>,
    revoked: BTreeSet<String>,
    joined: BTreeSet<String>,
    removed: BTreeSet<String>,
    /// Highest generation of each node's record that the node list showed.
    generations: BTreeMap<String, u64>,
}

/// Largest number of guest nodes at a time. The oldest is removed first.
const GUESTS: usize = 20;
/// Pause after a failed request.
const REST: Duration = Duration::from_millis(50);

impl<'a> Writers<'a> {
    pub(super) fn new(operator: Operator, hybrid: &'a Hybrid, setting: &'a Setting) -> Self {
        let binaries = &setting.binaries;
        Self { operator, hybrid, binaries, expected: Mutex::default() }
    }

    /// Creates tokens and revokes every third one, as an operator does.
    pub(super) fn manage_tokens(&self, stop: &AtomicBool) -> anyhow::Result<()> {
        let mut count = 0_u64;
        while !stop.load(Ordering::Relaxed) && !interrupt::raised() {
            let Some(token) = self.token() else { continue };
            count += 1;
            if count.is_multiple_of(3) && self.operate(&["token", "revoke", &token.id]) {
                let mut expected = self.expected.lock();
                expected.done.revocations += 1;
                expected.revoked.insert(token.id);
            }
            self.note_generations();
        }
        Ok(())
    }

    /// Joins new nodes and removes the oldest of them.
    pub(super) fn manage_nodes(&self, stop: &AtomicBool) -> anyhow::Result<()> {
        let mut guests = std::collections::VecDeque::new();
        let mut number = 0;
        while !stop.load(Ordering::Relaxed) && !interrupt::raised() {
            let Some(token) = self.token() else { continue };
            number += 1;
            let name = format!("guest-{number}");
            let host = &self.hybrid.workers[number % 2];
            let node = Node::new(&self.hybrid.lab, host, &name, self.binaries, "")?;
            if node.join(&token).is_err() {
                continue;
            }
            {
                let mut expected = self.expected.lock();
                expected.done.joins += 1;
                expected.joined.insert(name.clone());
            }
            guests.push_back(name);
            if guests.len() > GUESTS
                && let Some(oldest) = guests.pop_front()
            {
                // Until the removal is acknowledged, the node may or may not exist.
                self.expected.lock().joined.remove(&oldest);
                if self.operate(&["node", "remove", &oldest]) {
                    let mut expected = self.expected.lock();
                    expected.done.removals += 1;
                    expected.removed.insert(oldest);
                }
            }
        }
        Ok(())
    }

    /// Returns the numbers of acknowledged writes.
    pub(super) fn acknowledged(&self) -> Acknowledged {
        self.expected.lock().done
    }

    /// Returns a description of each acknowledged write that is missing.
    pub(super) fn lost(&self) -> anyhow::Result<Vec<String>> {
        let tokens: BTreeMap<String, String> =
            self.operator.tokens()?.into_iter().map(|token| (token.id, token.state)).collect();
        let nodes: BTreeMap<String, u64> = self
            .operator
            .nodes()?
            .into_iter()
            .map(|node| (node.name, node.generation.unwrap_or(0)))
            .collect();
        let expected = self.expected.lock();
        let mut lost = Vec::new();
        let mut expect = |there: bool, what: String| {
            if !there {
                lost.push(what);
            }
        };
        for id in &expected.tokens {
            expect(tokens.contains_key(id), format!("token {id}"));
        }
        for id in &expected.revoked {
            let revoked = tokens.get(id).is_some_and(|state| state == "revoked");
            expect(revoked, format!("revocation of token {id}"));
        }
        for name in &expected.joined {
            expect(nodes.contains_key(name), format!("join of {name}"));
        }
        for name in &expected.removed {
            expect(!nodes.contains_key(name), format!("removal of {name}"));
        }
        for (name, generation) in &expected.generations {
            if !expected.removed.contains(name) {
                let found = nodes.get(name).is_some_and(|found| found >= generation);
                expect(found, format!("record {generation} of {name}"));
            }
        }
        Ok(lost)
    }

    /// Creates a token. Waits for a moment and returns `None` if the controller did not acknowledge
    /// it.
    fn token(&self) -> Option<Token> {
        let token = self.operator.token("guests");
        match token {
            Ok(token) => {
                let mut expected = self.expected.lock();
                expected.done.tokens += 1;
                expected.tokens.insert(token.id.clone());
                Some(token)
            }
            Err(_) => {
                std::thread::sleep(REST);
                None
            }
        }
    }

    /// Runs an operator's command. Returns whether the controller acknowledged it.
    fn operate(&self, arguments: &[&str]) -> bool {
        let output = self.operator.command(arguments);
        output.is_ok_and(|output| output.status.success())
    }

    /// Records the generations in the node list. A generation that the controller shows was
    /// acknowledged.
    fn note_generations(&self) {
        let Ok(nodes) = self.operator.nodes() else { return };
        let mut expected = self.expected.lock();
        for node in nodes {
            let Some(generation) = node.generation else { continue };
            let before = expected.generations.insert(node.name, generation);
            if before.is_some_and(|before| before < generation) {
                expected.done.publishes += 1;
            }
        }
    }
}
