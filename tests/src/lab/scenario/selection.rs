//! Selection of cases on the command line, for scenarios that have many.

use std::fmt::Write as _;

use crate::lab::report::WrongUsage;

/// Command line options that select cases.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Selection {
    /// Run every case; otherwise a selection that takes less time.
    #[arg(long)]
    pub full: bool,
    /// Run only the cases whose name contains NAME.
    #[arg(long = "case", value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub cases: Vec<String>,
    /// List the cases, one per line, and run none.
    #[arg(long)]
    pub list: bool,
}

/// A case that can be selected.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Name of the case.
    pub name: String,
    /// True if the case also runs without `--full`.
    pub is_short: bool,
}

impl Selection {
    /// Returns whether the options select a case.
    pub fn has(&self, name: &str, is_short: bool) -> bool {
        if self.cases.is_empty() {
            return is_short || self.full;
        }
        self.cases.iter().any(|part| name.contains(part.as_str()))
    }

    /// Fails if a part of a name is in the name of no case.
    pub fn check(&self, entries: &[Entry]) -> Result<(), WrongUsage> {
        let is_known = |part: &&String| entries.iter().any(|entry| entry.name.contains(*part));
        match self.cases.iter().find(|part| !is_known(part)) {
            Some(part) => {
                Err(WrongUsage(format!("no case matches `{part}`: `--list` shows the names")))
            }
            None => Ok(()),
        }
    }
}

/// Returns the names of the cases, one per line. Cases that need `--full` are marked.
pub fn list(entries: &[Entry]) -> String {
    entries.iter().fold(String::new(), |mut text, entry| {
        let _ = writeln!(text, "{}{}", entry.name, if entry.is_short { "" } else { "  (--full)" });
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Selection {
        Selection { cases: vec![name.to_owned()], ..Selection::default() }
    }

    #[test]
    fn a_part_of_a_name_selects_cases_that_need_the_full_run_too() {
        assert!(named("/b").has("a/b", false) && !named("c").has("a/b", true));
        assert!(!Selection::default().has("a/b", false));
        assert!(Selection::default().has("a/b", true));
        assert!(Selection { full: true, ..Selection::default() }.has("a/b", false));
    }

    #[test]
    fn a_part_of_no_name_is_refused() {
        let entries = [Entry { name: "a/b".to_owned(), is_short: false }];
        assert!(
            named("/b").check(&entries).is_ok() && Selection::default().check(&entries).is_ok()
        );
        let line = named("c").check(&entries).unwrap_err().to_string();
        assert!(line.contains("`c`") && line.contains("--list"), "{line}");
        assert_eq!(list(&entries), "a/b  (--full)\n");
    }
}
