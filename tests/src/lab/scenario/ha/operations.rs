//! What operators and machines do during a fault, all at the same time, and what they were answered.

use std::time::{Duration, Instant};

use super::history::{Action, Operation};
use super::linear::Answer;
use crate::lab::mesh::{Node, Operator, Token};

/// Validity of the tokens: longer than the scenario takes.
const VALIDITY: &str = "6h";
/// Words of a refusal that says that the token is spent.
const SPENT: [&str; 2] = ["has been used", "was revoked"];

/// Time since the start of the scenario.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts to count.
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    /// Returns the time since the start.
    pub(super) fn now(self) -> Duration {
        self.0.elapsed()
    }

    /// Does something and records when it was asked for, when it was answered, and what.
    fn record(self, action: Action, work: impl FnOnce() -> anyhow::Result<()>) -> Operation {
        let begun = self.now();
        let answer = answer(&work());
        Operation { action, answer, begun, ended: self.now() }
    }

    /// Creates a token. If it is not acknowledged, its id is not known and nothing is recorded.
    pub(super) fn create(self, operator: &Operator) -> Option<(Token, Operation)> {
        let begun = self.now();
        let token = operator.token_with(&["--site", "lab", "--ttl", VALIDITY]).ok()?;
        let action = Action::Create { token: token.id.clone() };
        Some((token, Operation { action, answer: Answer::Done, begun, ended: self.now() }))
    }

    fn join(self, machine: &Node, token: &Token) -> Operation {
        let (node, id) = (machine.name().to_owned(), token.id.clone());
        self.record(Action::Join { token: id, node }, || machine.join(token))
    }

    fn revoke(self, operator: &Operator, token: &Token) -> Operation {
        let action = Action::Revoke { token: token.id.clone() };
        self.record(action, || operator.command_ok(&["token", "revoke", &token.id]).map(drop))
    }

    fn remove(self, operator: &Operator, node: &str) -> Operation {
        let action = Action::Remove { node: node.to_owned() };
        self.record(action, || operator.command_ok(&["node", "remove", node]).map(drop))
    }
}

/// Operations to be done at the same time.
pub(super) struct Batch<'a> {
    /// Operators of the controllers that answer.
    pub(super) operators: Vec<Operator>,
    /// Number of tokens that each of them creates, one after the other.
    pub(super) tokens: usize,
    /// Token for one node, with which two machines join at once.
    pub(super) raced: &'a Token,
    /// Those machines.
    pub(super) racers: [&'a Node; 2],
    /// Token for one node that is revoked while a machine joins with it.
    pub(super) revoked: &'a Token,
    /// That machine.
    pub(super) unlucky: &'a Node,
    /// Name of a node that is removed.
    pub(super) removed: Option<String>,
}

impl Batch<'_> {
    /// Does everything at once, and returns all operations.
    pub(super) fn run(&self, watch: Stopwatch) -> Vec<Operation> {
        let (Some(first), Some(last)) = (self.operators.first(), self.operators.last()) else {
            return Vec::new();
        };
        std::thread::scope(|scope| {
            let mut running = Vec::new();
            for operator in &self.operators {
                let create = move |_: usize| watch.create(operator).map(|(_, operation)| operation);
                let count = self.tokens;
                running.push(scope.spawn(move || (0..count).filter_map(create).collect()));
            }
            for racer in self.racers {
                running.push(scope.spawn(move || vec![watch.join(racer, self.raced)]));
            }
            running.push(scope.spawn(move || vec![watch.join(self.unlucky, self.revoked)]));
            running.push(scope.spawn(move || vec![watch.revoke(last, self.revoked)]));
            if let Some(node) = &self.removed {
                running.push(scope.spawn(move || vec![watch.remove(first, node)]));
            }
            let done = |thread: std::thread::ScopedJoinHandle<'_, Vec<Operation>>| {
                // A thread that panicked has no operation. Its panic was printed.
                thread.join().unwrap_or_default()
            };
            running.into_iter().flat_map(done).collect()
        })
    }
}

/// Returns what the result of a command says about the token.
fn answer(result: &anyhow::Result<()>) -> Answer {
    match result {
        Ok(()) => Answer::Done,
        Err(error) => {
            let text = format!("{error:#}");
            if SPENT.iter().any(|words| text.contains(words)) {
                Answer::Refused
            } else {
                Answer::Unknown
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_spent_token_is_a_clear_refusal() {
        let failed = |text: &str| answer(&Err(anyhow::anyhow!("{text}")));
        assert_eq!(failed("token 01 has been used: create another"), Answer::Refused);
        assert_eq!(failed("token 01 was revoked: create another"), Answer::Refused);
        assert_eq!(failed("the controller cannot store changes: etcd is slow"), Answer::Unknown);
        assert_eq!(answer(&Ok(())), Answer::Done);
    }
}
