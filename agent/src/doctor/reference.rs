//! Cause and command of each code, as `docs/troubleshooting.md` has them. The document is part of the
//! binary, so that the commands and the documentation never say different things.

/// Text of the document.
const DOCUMENT: &str = include_str!("../../../docs/troubleshooting.md");
/// Heading of the document after which every row of a table is about a code.
const HEADING: &str = "\n## By code\n";

/// Row of the document about one code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What the operator sees.
    pub symptom: &'static str,
    /// Why that is so.
    pub cause: &'static str,
    /// What to run, with commands in backticks.
    pub command: &'static str,
}

/// Returns the row about a code.
pub fn entry(code: &str) -> Option<Entry> {
    let (_, by_code) = DOCUMENT.split_once(HEADING)?;
    by_code.lines().find_map(|line| {
        let (found, rest) = line.strip_prefix("| `")?.split_once('`')?;
        // A note has words in the first cell.
        let (_, cells) = rest.split_once('|').filter(|_| found == code)?;
        let mut cells = cells.split('|').map(str::trim);
        Some(Entry { symptom: cells.next()?, cause: cells.next()?, command: cells.next()? })
    })
}

/// Returns what to do about a code, for the operator.
pub fn remedy(code: &str) -> Option<String> {
    let command = entry(code)?.command;
    Some(if command.starts_with('`') { format!("run {command}") } else { command.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_agent_has_an_entry() {
        for code in crate::codes() {
            let entry = entry(code).unwrap_or_else(|| panic!("{code} is not in the document"));
            assert!(!entry.cause.is_empty() && entry.command.contains('`'), "{code}: {entry:?}");
        }
        assert_eq!(entry("no-such-code"), None);
        assert_eq!(remedy("peer-idle").as_deref(), Some("run `towline ping NAME`"));
    }
}
