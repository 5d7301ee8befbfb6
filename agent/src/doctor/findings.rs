//! Collects findings, and makes one check of those of a subject.

use std::collections::BTreeMap;

use towline_proto::code::Coded as _;

use super::reference::{self, Message};
use super::{Cause, Check, CheckState, Subject};

/// Greatest number of findings whose texts a check shows. A mesh may have hundreds of peers that are down.
const TEXTS: usize = 4;

/// Findings of all subjects.
#[derive(Debug, Default)]
pub(super) struct Findings {
    drafts: BTreeMap<Subject, Draft>,
}

/// Check that is being made.
#[derive(Debug, Default)]
struct Draft {
    findings: Vec<Finding>,
    /// Description of the healthy state.
    summary: Option<String>,
    /// Reason why the check does not apply.
    skipped: Option<String>,
}

#[derive(Debug)]
struct Finding {
    state: CheckState,
    code: String,
    text: String,
}

impl Findings {
    /// Adds a finding with the code of a cause that the agent reported.
    pub(super) fn add(
        &mut self,
        subject: Subject,
        state: CheckState,
        code: &str,
        text: impl Into<String>,
    ) {
        let finding = Finding { state, code: code.to_owned(), text: text.into() };
        let draft = self.drafts.entry(subject).or_default();
        // The host and the agent may both have seen it.
        if draft.findings.iter().all(|known| known.code != code || known.text != finding.text) {
            draft.findings.push(finding);
        }
    }

    /// Adds a finding of this command.
    pub(super) fn cause(
        &mut self,
        subject: Subject,
        state: CheckState,
        cause: Cause,
        text: impl Into<String>,
    ) {
        self.add(subject, state, cause.code(), text);
    }

    /// Returns true if there is a finding with this code.
    pub(super) fn has(&self, subject: Subject, code: &str) -> bool {
        let draft = self.drafts.get(&subject);
        draft.is_some_and(|draft| draft.findings.iter().any(|finding| finding.code == code))
    }

    /// Returns the worst state of a subject so far.
    pub(super) fn worst(&self, subject: Subject) -> Option<CheckState> {
        self.drafts.get(&subject)?.findings.iter().map(|finding| finding.state).max()
    }

    /// Describes the healthy state of a subject.
    pub(super) fn summary(&mut self, subject: Subject, text: impl Into<String>) {
        self.drafts.entry(subject).or_default().summary = Some(text.into());
    }

    /// Says why a check does not apply. Counts only if there is neither a finding nor a summary.
    pub(super) fn skip(&mut self, subject: Subject, why: impl Into<String>) {
        self.drafts.entry(subject).or_default().skipped = Some(why.into());
    }

    /// Returns one check of each subject.
    pub(super) fn finish(mut self) -> Vec<Check> {
        let check = |subject| self.drafts.remove(&subject).unwrap_or_default().finish(subject);
        Subject::ALL.into_iter().map(check).collect()
    }
}

impl Finding {
    /// Returns the text in its parts. A note has no remedy beside it, so its text stays whole.
    fn message(&self) -> Message<'_> {
        if self.state > CheckState::Ok {
            Message::of(&self.code, &self.text)
        } else {
            Message { finding: &self.text, remedy: None }
        }
    }
}

impl Draft {
    fn finish(mut self, subject: Subject) -> Check {
        // Stable: findings of one state keep their order.
        self.findings.sort_by_key(|finding| std::cmp::Reverse(finding.state));
        let worst = self.findings.first().map(|finding| finding.state);
        let shown = || self.findings.iter().filter(|finding| Some(finding.state) == worst);
        let (state, finding) = match (worst, &self.summary, &self.skipped) {
            (Some(state), summary, _) => {
                let texts = shown().map(|finding| finding.message().finding).take(TEXTS);
                let more = shown().count().saturating_sub(TEXTS);
                let more = (more > 0).then(|| format!("and {more} more"));
                let summary = summary.as_deref().filter(|_| state <= CheckState::Ok);
                let parts = summary.into_iter().chain(texts).chain(more.as_deref());
                (state, parts.collect::<Vec<_>>().join("; "))
            }
            (None, Some(summary), _) => (CheckState::Ok, summary.clone()),
            (None, None, Some(why)) => (CheckState::Skipped, why.clone()),
            (None, None, None) => (CheckState::Ok, "nothing found".to_owned()),
        };
        let remedy = (state > CheckState::Ok).then(|| remedy(shown().take(TEXTS))).flatten();
        let mut causes: Vec<String> = Vec::new();
        for finding in self.findings {
            if !causes.contains(&finding.code) {
                causes.push(finding.code);
            }
        }
        Check { subject, name: subject.name(), state, finding, remedy, causes }
    }
}

/// Returns what to do about the first finding, and what the messages of the others say to do.
fn remedy<'a>(findings: impl Iterator<Item = &'a Finding>) -> Option<String> {
    let mut remedies: Vec<String> = Vec::new();
    for (index, finding) in findings.enumerate() {
        let said = finding.message().remedy.map(ToOwned::to_owned);
        let documented = || (index == 0).then(|| reference::remedy(&finding.code)).flatten();
        let remedy = said.or_else(documented);
        remedies.extend(remedy.filter(|remedy| !remedies.contains(remedy)));
    }
    (!remedies.is_empty()).then(|| remedies.join("; "))
}
