//! The table in `docs/troubleshooting.md` that says which command names which fault.

use std::fmt::Write as _;

use anyhow::Context as _;

use super::{Case, Explained};
use crate::checkout;

/// Line before the table.
const BEGIN: &str = "<!-- faults: written by cargo lab explain --update-docs -->\n";
/// Line after the table.
const END: &str = "<!-- end of faults -->\n";

/// Writes the table.
pub(super) fn write(cases: &[Case], results: &Explained) -> anyhow::Result<()> {
    let path = checkout::root().join("docs/troubleshooting.md");
    let text = std::fs::read_to_string(&path)?;
    let (before, table, after) = parts(&text).context("the document has no table of faults")?;
    let new = lines(cases, results, table);
    Ok(std::fs::write(&path, format!("{before}{BEGIN}{new}{END}{after}"))?)
}

/// Returns what is before the table, the table, and what is after it.
fn parts(document: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = document.split_once(BEGIN)?;
    let (table, after) = rest.split_once(END)?;
    Some((before, table, after))
}

/// Returns the table. A fault that this machine cannot show keeps what an earlier run wrote.
fn lines(cases: &[Case], results: &Explained, earlier: &str) -> String {
    let mut text = "| fault | code | named by |\n|---|---|---|\n".to_owned();
    for Case { name, fault, cause, .. } in cases {
        let tried = results.cases.iter().find(|tried| tried.name == *name);
        let begin = format!("| {fault} | `{cause}` | ");
        let kept =
            || earlier.lines().find_map(|line| line.strip_prefix(&begin)?.strip_suffix(" |"));
        let by = match tried {
            Some(tried) if tried.ok => {
                let commands = tried.named_by.iter().map(|command| format!("`{command}`"));
                commands.collect::<Vec<_>>().join(", ")
            }
            Some(_) => UNNAMED.to_owned(),
            None => kept().unwrap_or(UNNAMED).to_owned(),
        };
        let _ = writeln!(text, "{begin}{by} |");
    }
    text
}

/// Cell of a fault that no command named yet.
const UNNAMED: &str = "–";

#[cfg(test)]
mod tests {
    use super::super::{Tried, every_case};
    use super::*;

    #[test]
    fn the_document_has_the_fault_and_the_cause_of_every_case() {
        let path = checkout::root().join("docs/troubleshooting.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (_, table, _) = parts(&text).expect("the table of faults");
        let wanted = lines(&every_case(), &Explained::default(), table);
        assert_eq!(table, wanted, "run cargo lab explain --update-docs");
    }

    /// Faults that not every machine can show may lack a command. A document of which no run wrote the commands
    /// does not help anybody.
    #[test]
    fn the_document_says_which_command_names_most_faults() {
        /// Least number of faults with a command.
        const LEAST: usize = 30;
        let path = checkout::root().join("docs/troubleshooting.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (_, table, _) = parts(&text).expect("the table of faults");
        let rows = table.lines().skip(2);
        let unnamed = format!("| {UNNAMED} |");
        let (without, with): (Vec<&str>, Vec<&str>) = rows.partition(|row| row.ends_with(&unnamed));
        assert!(with.len() >= LEAST, "run cargo lab explain --update-docs: {without:#?}");
        for row in with {
            let mut commands = row.rsplit('|').nth(1).unwrap_or_default().trim().split(", ");
            let is_known = |command: &str| matches!(command, "`doctor`" | "`explain`" | "`peer`");
            assert!(commands.all(is_known), "{row}");
        }
    }

    #[test]
    fn a_fault_that_was_not_tried_keeps_its_commands() {
        let case = |name, fault| Case::new(name, fault, "no-answer", |_, _| unreachable!());
        let cases = [case("a", "one"), case("b", "two"), case("c", "three")];
        let tried = Tried {
            name: "a",
            ok: true,
            cause: "no-answer",
            named_by: vec!["doctor", "peer"],
            also: Vec::new(),
            took_ms: 1,
            why: None,
        };
        let results = Explained { cases: vec![tried], ..Explained::default() };
        let table = lines(&cases, &results, "| two | `no-answer` | `explain` |\n");
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| one | `no-answer` | `doctor`, `peer` |",
                "| two | `no-answer` | `explain` |",
                "| three | `no-answer` | – |",
            ]
        );
    }
}
