//! Check of one token's history: is there an order of all operations that the model of a token allows, and in which no
//! operation comes before one that had ended when it began (linearizability, after Wing and Gong)?

use std::collections::HashSet;
use std::time::Duration;

/// An operation on a token, from the time of its request to that of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// What was asked for.
    pub(super) call: Call,
    /// What was answered.
    pub(super) answer: Answer,
    /// Time of the request, since the start of the scenario.
    pub(super) begun: Duration,
    /// Time of the answer. An operation without a clear answer may take effect at any later time.
    pub(super) ended: Duration,
}

/// Request about a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// A machine joins with it.
    Use,
    /// An operator revokes it.
    Revoke,
    /// A controller lists it in this state.
    Read(State),
}

/// State of a token, as a controller lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It admits further nodes.
    Open,
    /// All its uses are used up.
    Used,
    /// It was revoked.
    Revoked,
}

/// Answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It was acknowledged.
    Done,
    /// It was refused, because the token has no use left or was revoked.
    Refused,
    /// No answer arrived, or one that does not tell whether the request took effect.
    Unknown,
}

/// Model of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Token {
    /// Number of nodes that it still admits.
    left: u32,
    /// True once it was revoked.
    is_revoked: bool,
}

/// Returns whether the history of a token for this number of nodes has an order that the model allows.
pub(super) fn is_linearizable(uses: u32, steps: &[Step]) -> bool {
    let token = Token { left: uses, is_revoked: false };
    let mut search = Search { steps, is_placed: vec![false; steps.len()], seen: HashSet::new() };
    search.completes(token)
}

/// Search for an order. Every state is visited once.
struct Search<'a> {
    steps: &'a [Step],
    /// For each step whether it has its place in the order already.
    is_placed: Vec<bool>,
    /// Sets of placed steps with the state of the token after them that lead to no order.
    seen: HashSet<(Vec<bool>, Token)>,
}

impl Search<'_> {
    /// Returns whether the steps that have no place yet can follow in some order.
    fn completes(&mut self, token: Token) -> bool {
        let open: Vec<usize> =
            (0..self.steps.len()).filter(|number| !self.is_placed[*number]).collect();
        // A request without a clear answer need not have taken effect.
        if open.iter().all(|number| self.steps[*number].answer == Answer::Unknown) {
            return true;
        }
        if !self.seen.insert((self.is_placed.clone(), token)) {
            return false;
        }
        let first_end = open.iter().map(|number| self.steps[*number].ended).min();
        for number in open {
            let step = self.steps[number];
            // What began after another one had ended comes after it.
            let can_be_next = first_end.is_none_or(|end| step.begun <= end);
            let Some(after) = token.after(step).filter(|_| can_be_next) else { continue };
            self.is_placed[number] = true;
            if self.completes(after) {
                return true;
            }
            self.is_placed[number] = false;
        }
        false
    }
}

impl Token {
    /// Returns the token after a step; `None` if the answer is none that this token gives.
    fn after(self, step: Step) -> Option<Self> {
        let admits = self.left > 0 && !self.is_revoked;
        match (step.call, step.answer) {
            (Call::Use, Answer::Done | Answer::Unknown) => {
                admits.then(|| Self { left: self.left - 1, ..self })
            }
            (Call::Use, Answer::Refused) => (!admits).then_some(self),
            (Call::Revoke, Answer::Done | Answer::Unknown) => {
                Some(Self { is_revoked: true, ..self })
            }
            (Call::Revoke, Answer::Refused) => Some(self),
            (Call::Read(state), _) => (state == self.state()).then_some(self),
        }
    }

    fn state(self) -> State {
        if self.is_revoked {
            State::Revoked
        } else if self.left == 0 {
            State::Used
        } else {
            State::Open
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(call: Call, answer: Answer, begun: u64, ended: u64) -> Step {
        let (begun, ended) = (Duration::from_secs(begun), Duration::from_secs(ended));
        let ended = if answer == Answer::Unknown { Duration::MAX } else { ended };
        Step { call, answer, begun, ended }
    }

    fn used(answer: Answer, begun: u64, ended: u64) -> Step {
        step(Call::Use, answer, begun, ended)
    }

    fn read(state: State, at: u64) -> Step {
        step(Call::Read(state), Answer::Done, at, at)
    }

    #[test]
    fn histories_that_some_order_explains_are_accepted() {
        use Answer::{Done, Refused, Unknown};
        let good: [(&str, Vec<Step>); 7] = [
            ("nothing happened", vec![read(State::Open, 1)]),
            ("one of two wins", vec![used(Done, 1, 4), used(Refused, 1, 3), read(State::Used, 9)]),
            ("the one that answered later won", vec![used(Refused, 2, 3), used(Done, 1, 4)]),
            ("no answer, but an effect", vec![used(Unknown, 1, 2), used(Refused, 3, 4)]),
            ("no answer, and no effect", vec![used(Unknown, 1, 2), used(Done, 3, 4)]),
            (
                "an effect long after the request",
                vec![used(Unknown, 1, 2), read(State::Open, 5), read(State::Used, 9)],
            ),
            (
                "revoked, or used first",
                vec![step(Call::Revoke, Done, 1, 5), used(Done, 2, 3), read(State::Revoked, 9)],
            ),
        ];
        for (what, steps) in good {
            assert!(is_linearizable(1, &steps), "{what}");
        }
    }

    #[test]
    fn histories_that_no_order_explains_are_found() {
        use Answer::{Done, Refused, Unknown};
        let bad: [(&str, Vec<Step>); 7] = [
            ("spent twice", vec![used(Done, 1, 4), used(Done, 2, 3)]),
            ("refused although nobody had used it", vec![used(Refused, 1, 2), used(Done, 3, 4)]),
            ("a use that was acknowledged is lost", vec![used(Done, 1, 2), read(State::Open, 9)]),
            ("used by nobody", vec![read(State::Used, 9)]),
            (
                "a use comes back",
                vec![used(Unknown, 1, 2), read(State::Used, 5), read(State::Open, 9)],
            ),
            ("used after it was revoked", vec![step(Call::Revoke, Done, 1, 2), used(Done, 3, 4)]),
            ("a revocation is lost", vec![step(Call::Revoke, Done, 1, 2), read(State::Open, 9)]),
        ];
        for (what, steps) in bad {
            assert!(!is_linearizable(1, &steps), "{what}");
        }
    }

    #[test]
    fn a_token_for_several_nodes_has_as_many_uses() {
        let uses = |count: usize| vec![used(Answer::Done, 1, 9); count];
        assert!(is_linearizable(3, &uses(3)));
        assert!(!is_linearizable(3, &uses(4)));
        // Many requests at once without an answer do not make the search long.
        let mut many = vec![used(Answer::Unknown, 1, 9); 12];
        many.extend([used(Answer::Done, 20, 21), read(State::Used, 30), read(State::Open, 31)]);
        assert!(!is_linearizable(4, &many));
    }
}
