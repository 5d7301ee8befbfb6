//! The recorded operations, and their check: against the model of a token, against what all controllers list in the
//! end, and against what the nodes show of one another's networks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use super::linear::{Answer, Call, State, Step, is_linearizable};

/// Number of nodes that each token admits.
const USES: u32 = 1;

/// Operations in the order in which they were recorded.
#[derive(Debug, Default)]
pub(super) struct History {
    operations: Vec<Operation>,
    /// State in which each token was listed, until the next operation on it.
    last_read: BTreeMap<String, State>,
    /// Networks that each observer showed, for each time at which it was asked.
    views: Vec<View>,
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Operation {
    /// What was asked for.
    pub(super) action: Action,
    /// What was answered.
    pub(super) answer: Answer,
    /// Time of the request, since the start of the scenario.
    pub(super) begun: Duration,
    /// Time of the answer.
    pub(super) ended: Duration,
}

/// What an operation asks for. All tokens are for one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Create a token. Only acknowledged ones are recorded, since the others have no id.
    Create {
        /// Id of the token.
        token: String,
    },
    /// Revoke a token.
    Revoke {
        /// Id of the token.
        token: String,
    },
    /// Let a node join with a token.
    Join {
        /// Id of the token.
        token: String,
        /// Name of the node.
        node: String,
    },
    /// Remove a node.
    Remove {
        /// Name of the node.
        node: String,
    },
    /// List the tokens at a controller.
    Read {
        /// Id of the token.
        token: String,
        /// State of the token.
        state: State,
    },
}

/// Networks that are reached through nodes, as one observer shows them at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct View {
    /// Names of the nodes with the networks of each.
    pub(super) holders: Vec<(String, IpNet)>,
}

/// What a controller lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Listed {
    /// States of the tokens by their ids. A token that only its age made void has none.
    pub(super) tokens: BTreeMap<String, Option<State>>,
    /// Addresses in the mesh of each node, by its name.
    pub(super) nodes: BTreeMap<String, Vec<IpAddr>>,
}

/// What the controllers list after a fault.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settled {
    /// What each controller that answers lists.
    pub(super) listed: Vec<Listed>,
    /// True if all controllers answer, and list the same.
    pub(super) agree: bool,
}

/// Violations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Violations {
    /// Acknowledged operations that a controller does not list, over all controllers.
    pub(super) lost_writes: usize,
    /// Tokens for one node that admitted more.
    pub(super) double_spent_tokens: usize,
    /// Pairs of nodes that have the same address, over all controllers, or overlapping networks, over all views.
    pub(super) overlapping_prefixes: usize,
    /// Tokens whose operations no order explains.
    pub(super) not_linearizable: usize,
    /// Nodes that were refused, and that a controller lists all the same.
    pub(super) admitted_refused: usize,
}

impl History {
    /// Records an operation.
    pub(super) fn add(&mut self, operation: Operation) {
        match operation.action.about_token() {
            Some((token, Call::Read(state))) => {
                self.last_read.insert(token.to_owned(), state);
            }
            Some((token, Call::Use | Call::Revoke)) => {
                self.last_read.remove(token);
            }
            None => {}
        }
        self.operations.push(operation);
    }

    /// Records what an observer shows.
    pub(super) fn observe(&mut self, view: View) {
        self.views.push(view);
    }

    /// Records that a controller lists these tokens. A token on which nothing was done since it was listed in the
    /// same state adds nothing to its history.
    pub(super) fn read(&mut self, listed: &Listed, at: Duration) {
        for (token, state) in &listed.tokens {
            if let Some(state) = *state
                && self.last_read.get(token) != Some(&state)
            {
                let action = Action::Read { token: token.clone(), state };
                self.add(Operation { action, answer: Answer::Done, begun: at, ended: at });
            }
        }
    }

    /// Returns the number of recorded operations.
    pub(super) fn len(&self) -> usize {
        self.operations.len()
    }

    /// Returns how many acknowledged operations a controller does not list.
    pub(super) fn lost(&self, listed: &Listed) -> usize {
        // A node that somebody asked to remove may be absent, whatever was answered.
        let mut removed = BTreeSet::new();
        for operation in &self.operations {
            if let Action::Remove { node } = &operation.action {
                removed.insert(node.as_str());
            }
        }
        let is_lost = |operation: &&Operation| match &operation.action {
            Action::Create { token } => !listed.tokens.contains_key(token),
            Action::Revoke { token } => {
                listed.tokens.get(token).is_some_and(|state| *state == Some(State::Open))
            }
            Action::Join { node, .. } => {
                !removed.contains(node.as_str()) && !listed.nodes.contains_key(node)
            }
            Action::Remove { node } => listed.nodes.contains_key(node),
            Action::Read { .. } => false,
        };
        let acknowledged =
            self.operations.iter().filter(|operation| operation.answer == Answer::Done);
        acknowledged.filter(is_lost).count()
    }

    /// Checks the operations and the views, also against what each controller lists.
    pub(super) fn check(&self, controllers: &[Listed]) -> Violations {
        let is_listed = |node: &str| controllers.iter().any(|one| one.nodes.contains_key(node));
        let mut tokens = BTreeMap::<&str, Vec<Step>>::new();
        let mut admitted_refused = 0;
        for operation in &self.operations {
            let Some((token, call)) = operation.action.about_token() else { continue };
            let mut step = operation.step(call);
            if let Action::Join { node, .. } = &operation.action
                && is_listed(node)
            {
                match operation.answer {
                    Answer::Done => {}
                    Answer::Refused => admitted_refused += 1,
                    // It took effect, at some time after the request.
                    Answer::Unknown => step.answer = Answer::Done,
                }
            }
            tokens.entry(token).or_default().push(step);
        }
        let is_spent_twice = |steps: &&Vec<Step>| {
            let done = |step: &&Step| step.call == Call::Use && step.answer == Answer::Done;
            steps.iter().filter(done).count() > USES as usize
        };
        let is_explained = |steps: &&Vec<Step>| is_linearizable(USES, steps);
        let addresses: usize = controllers.iter().map(Listed::overlapping).sum();
        let networks: usize = self.views.iter().map(View::overlapping).sum();
        Violations {
            lost_writes: controllers.iter().map(|listed| self.lost(listed)).sum(),
            double_spent_tokens: tokens.values().filter(is_spent_twice).count(),
            overlapping_prefixes: addresses + networks,
            not_linearizable: tokens.values().filter(|steps| !is_explained(steps)).count(),
            admitted_refused,
        }
    }
}

impl Action {
    /// Returns the token that the model checks, with the call; `None` for what is no operation on a token.
    fn about_token(&self) -> Option<(&str, Call)> {
        match self {
            Self::Revoke { token } => Some((token.as_str(), Call::Revoke)),
            Self::Join { token, .. } => Some((token.as_str(), Call::Use)),
            Self::Read { token, state } => Some((token.as_str(), Call::Read(*state))),
            Self::Create { .. } | Self::Remove { .. } => None,
        }
    }
}

impl Operation {
    /// Returns the name of the node that joined by this operation, if it was acknowledged.
    pub(super) fn joined(&self) -> Option<String> {
        match &self.action {
            Action::Join { node, .. } if self.answer == Answer::Done => Some(node.clone()),
            _ => None,
        }
    }

    fn step(&self, call: Call) -> Step {
        let ended = match self.answer {
            Answer::Done | Answer::Refused => self.ended,
            Answer::Unknown => Duration::MAX,
        };
        Step { call, answer: self.answer, begun: self.begun, ended }
    }
}

impl View {
    /// Returns one view that has what all of these show.
    pub(super) fn of_all(views: &[Self]) -> Self {
        let all: BTreeSet<(String, IpNet)> =
            views.iter().flat_map(|view| view.holders.iter().cloned()).collect();
        Self { holders: all.into_iter().collect() }
    }

    /// Returns whether exactly one node has this network.
    pub(super) fn has_one_holder(&self, network: IpNet) -> bool {
        self.holders.iter().filter(|(_, held)| *held == network).count() == 1
    }

    /// Returns the number of pairs of networks of different nodes that overlap.
    fn overlapping(&self) -> usize {
        let overlap = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
        let pairs = self.holders.iter().enumerate().flat_map(|(number, first)| {
            self.holders.iter().skip(number + 1).map(move |second| (first, second))
        });
        pairs.filter(|(first, second)| first.0 != second.0 && overlap(&first.1, &second.1)).count()
    }
}

impl Settled {
    /// Returns what the controllers list. One that does not answer does not agree.
    pub(super) fn of(answers: Vec<anyhow::Result<Listed>>) -> Self {
        let asked = answers.len();
        let listed: Vec<Listed> = answers.into_iter().filter_map(Result::ok).collect();
        let agree = listed.len() == asked && listed.windows(2).all(|pair| pair[0] == pair[1]);
        Self { listed, agree }
    }
}

impl Listed {
    fn overlapping(&self) -> usize {
        let mut holders = BTreeMap::<IpAddr, usize>::new();
        for address in self.nodes.values().flatten() {
            *holders.entry(*address).or_default() += 1;
        }
        holders.values().map(|holders| holders * (holders - 1) / 2).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(tokens: &[(&str, State)], nodes: &[(&str, &str)]) -> Listed {
        let node =
            |(name, address): &(&str, &str)| ((*name).to_owned(), vec![address.parse().unwrap()]);
        let token = |(id, state): &(&str, State)| ((*id).to_owned(), Some(*state));
        Listed {
            tokens: tokens.iter().map(token).collect(),
            nodes: nodes.iter().map(node).collect(),
        }
    }

    fn done(action: Action, begun: u64) -> Operation {
        let (begun, ended) = (Duration::from_secs(begun), Duration::from_secs(begun + 1));
        Operation { action, answer: Answer::Done, begun, ended }
    }

    fn create(token: &str) -> Action {
        Action::Create { token: token.to_owned() }
    }

    fn join(token: &str, node: &str) -> Action {
        Action::Join { token: token.to_owned(), node: node.to_owned() }
    }

    #[test]
    fn what_is_lost_spent_twice_or_given_twice_is_counted() {
        use State::{Open, Used};
        let mut history = History::default();
        for token in ["t", "u"] {
            history.add(done(create(token), 1));
        }
        history.add(done(join("t", "a"), 3));
        let tokens = [("t", Used), ("u", Open)];
        let good = listed(&tokens, &[("a", "10.0.0.1"), ("b", "10.0.0.2")]);
        history.read(&good, Duration::from_secs(9));
        assert_eq!(history.check(&[good.clone(), good.clone()]), Violations::default());

        let behind = listed(&tokens[..1], &[]);
        assert_eq!(history.check(&[good.clone(), behind]).lost_writes, 2);
        let twice = listed(&tokens, &[("a", "10.0.0.1"), ("b", "10.0.0.1")]);
        assert_eq!(history.check(&[twice]).overlapping_prefixes, 1);
        history.add(done(join("t", "b"), 3));
        let violations = history.check(&[good]);
        assert_eq!((violations.double_spent_tokens, violations.not_linearizable), (1, 1));
    }

    #[test]
    fn a_token_that_admitted_a_node_without_an_answer_admits_no_other() {
        let without_answer = |history: &mut History, node: &str| {
            history.add(Operation { answer: Answer::Unknown, ..done(join("t", node), 3) });
        };
        let tokens = [("t", State::Used)];
        let first = listed(&tokens, &[("a", "10.0.0.1")]);
        let both = listed(&tokens, &[("a", "10.0.0.1"), ("b", "10.0.0.2")]);

        let mut history = History::default();
        history.add(done(create("t"), 1));
        history.add(done(join("t", "a"), 3));
        without_answer(&mut history, "b");
        assert_eq!(history.check(&[first.clone(), first.clone()]), Violations::default());
        // Also if only one controller lists the other node.
        let violations = history.check(&[first.clone(), both.clone()]);
        assert_eq!((violations.double_spent_tokens, violations.not_linearizable), (1, 1));

        let mut history = History::default();
        without_answer(&mut history, "a");
        assert_eq!(history.check(&[first.clone(), first]), Violations::default());

        let mut history = History::default();
        without_answer(&mut history, "a");
        without_answer(&mut history, "b");
        assert_eq!(history.check(&[both]).double_spent_tokens, 1);
    }

    #[test]
    fn a_node_that_was_refused_is_listed_nowhere() {
        let mut history = History::default();
        history.add(done(join("t", "a"), 3));
        history.add(Operation { answer: Answer::Refused, ..done(join("t", "b"), 3) });
        let first = listed(&[], &[("a", "10.0.0.1")]);
        let both = listed(&[], &[("a", "10.0.0.1"), ("b", "10.0.0.2")]);
        assert_eq!(history.check(&[first.clone(), first.clone()]), Violations::default());
        assert_eq!(history.check(&[first, both]).admitted_refused, 1);
    }

    #[test]
    fn controllers_agree_if_all_answer_and_list_the_same() {
        let open = listed(&[("t", State::Open)], &[]);
        let used = listed(&[("t", State::Used)], &[]);
        let of = Settled::of;
        assert!(of(vec![Ok(open.clone()), Ok(open.clone())]).agree);
        let settled = of(vec![Ok(open.clone()), Ok(used.clone())]);
        assert_eq!(settled, Settled { listed: vec![open.clone(), used.clone()], agree: false });
        let settled = of(vec![Ok(open.clone()), Err(anyhow::anyhow!("no answer"))]);
        assert_eq!(settled, Settled { listed: vec![open.clone()], agree: false });

        // What each of them lists is checked: here the use was acknowledged.
        let mut history = History::default();
        history.add(done(join("t", "a"), 3));
        for one in [&used, &open] {
            history.read(one, Duration::from_secs(9));
        }
        assert_eq!(history.check(&[used, open]).not_linearizable, 1);
    }

    #[test]
    fn a_use_or_a_removal_that_comes_back_is_found() {
        let mut history = History::default();
        history.add(done(create("t"), 1));
        history.add(done(join("t", "a"), 3));
        let open = listed(&[("t", State::Open)], &[("a", "10.0.0.1")]);
        history.read(&open, Duration::from_secs(9));
        assert_eq!(history.check(&[open]).not_linearizable, 1);

        let mut history = History::default();
        history.add(done(join("t", "a"), 3));
        history.add(done(Action::Remove { node: "a".to_owned() }, 5));
        let absent = listed(&[], &[]);
        let present = listed(&[], &[("a", "10.0.0.1")]);
        assert_eq!(history.check(&[absent, present]).lost_writes, 1);

        let mut history = History::default();
        history.add(done(Action::Revoke { token: "t".to_owned() }, 5));
        assert_eq!(history.lost(&listed(&[("t", State::Open)], &[])), 1);
        assert_eq!(history.lost(&listed(&[("t", State::Revoked)], &[])), 0);
    }

    #[test]
    fn a_token_is_read_again_after_each_operation_on_it() {
        let mut history = History::default();
        let open = listed(&[("t", State::Open)], &[("a", "10.0.0.1")]);
        history.read(&open, Duration::from_secs(1));
        history.read(&open, Duration::from_secs(2));
        assert_eq!(history.len(), 1);
        history.add(done(join("t", "a"), 3));
        history.read(&open, Duration::from_secs(9));
        assert_eq!(history.len(), 3);
        assert_eq!(history.check(&[open]).not_linearizable, 1, "the use is lost");
    }

    #[test]
    fn a_removal_without_an_answer_allows_both() {
        let mut history = History::default();
        history.add(done(join("t", "a"), 3));
        let removal = done(Action::Remove { node: "a".to_owned() }, 5);
        history.add(Operation { answer: Answer::Unknown, ..removal });
        let absent = listed(&[], &[]);
        let present = listed(&[], &[("a", "10.0.0.1")]);
        assert_eq!(history.check(&[absent, present]).lost_writes, 0);
    }

    #[test]
    fn networks_of_different_nodes_must_not_overlap_in_any_view() {
        let view = |holders: &[(&str, &str)]| View {
            holders: holders
                .iter()
                .map(|(node, net)| ((*node).to_owned(), net.parse().unwrap()))
                .collect(),
        };
        let mut history = History::default();
        history.observe(view(&[("a", "10.1.0.0/16"), ("a", "10.1.2.0/24"), ("b", "10.2.0.0/24")]));
        // The network moved between the two times.
        history.observe(view(&[("b", "10.1.0.0/16")]));
        assert_eq!(history.check(&[]), Violations::default());
        history.observe(view(&[("a", "10.1.2.0/24"), ("b", "10.1.0.0/16")]));
        assert_eq!(history.check(&[]).overlapping_prefixes, 1);

        let network = "10.1.0.0/16".parse().unwrap();
        let views = [view(&[("a", "10.1.0.0/16")]), view(&[("b", "10.1.0.0/16")])];
        assert!(views.iter().all(|view| view.has_one_holder(network)));
        let all = View::of_all(&views);
        assert!(!all.has_one_holder(network) && all.overlapping() == 1);
    }
}
