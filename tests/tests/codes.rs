//! Checks the codes of problems, conflicts, notes, states and reasons: each is written as programs
//! expect it, and has a line in `docs/troubleshooting.md` with a symptom, a cause and a command. The
//! document names no code that does not exist.

use std::collections::BTreeSet;

use towline_proto::code::Coded as _;
use towline_registry::NodeProblem;
use towline_tests::checkout::{SHIPPED, root, rust_files};

/// Heading of the document after which every row of a table is about a code.
const HEADING: &str = "\n## By code\n";

fn document() -> String {
    std::fs::read_to_string(root().join("docs/troubleshooting.md")).expect("the document")
}

/// Returns the codes of all types that agent and controller report.
fn codes() -> BTreeSet<String> {
    let all = towline_agent::codes()
        .into_iter()
        .chain(NodeProblem::codes())
        .chain(towline_controller::events::MeshEvent::codes());
    all.map(ToOwned::to_owned).collect()
}

/// Returns the codes in every `codes!` of a source file.
fn written(source: &str) -> Vec<String> {
    let lines = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    let blocks = text.split("codes! {").skip(1).map(|rest| {
        let mut depth = 1;
        let end = rest.find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0
        });
        &rest[..end.expect("a closed macro")]
    });
    let literals = blocks.flat_map(|block| block.split("=> \"").skip(1));
    literals.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())).collect()
}

/// Returns the cells of each row of a table that begins with a code, and that code.
fn rows(text: &str) -> impl Iterator<Item = (&str, Vec<&str>)> {
    text.lines().filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
        let code = cells.first()?.strip_prefix('`')?.split_once('`')?.0;
        Some((code, cells[1..cells.len() - 1].to_vec()))
    })
}

#[test]
fn each_code_has_a_symptom_a_cause_and_a_command() {
    let document = document();
    let (_, by_code) = document.split_once(HEADING).expect("the heading");
    let mut explained = BTreeSet::new();
    for (code, cells) in rows(by_code) {
        assert_eq!(cells.len(), 3, "{code}: {cells:?}");
        assert!(cells.iter().all(|cell| !cell.is_empty()), "{code}: an empty cell");
        assert!(cells[2].matches('`').count() >= 2, "{code}: no command: {}", cells[2]);
        explained.insert(code.to_owned());
    }
    let codes = codes();
    let missing: Vec<_> = codes.difference(&explained).collect();
    assert!(missing.is_empty(), "not in docs/troubleshooting.md: {missing:?}");
    let unknown: Vec<_> = explained.difference(&codes).collect();
    assert!(unknown.is_empty(), "in docs/troubleshooting.md, but no code: {unknown:?}");
}

#[test]
fn tables_above_the_list_name_only_codes_that_exist() {
    let (document, codes) = (document(), codes());
    let (above, _) = document.split_once(HEADING).expect("the heading");
    let named: Vec<_> = rows(above).map(|(code, _)| code).collect();
    assert!(!named.is_empty(), "the table about firewalls");
    for code in named {
        assert!(codes.contains(code), "{code}");
    }
}

#[test]
fn codes_are_a_few_words_in_kebab_case() {
    for code in codes() {
        let is_word = |word: &str| {
            !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
        };
        assert!(code.split('-').all(is_word) && code.len() <= 40, "{code}");
    }
}

/// The enumeration starts at the types that are reported. A type that none of them contains is missing.
#[test]
fn every_type_with_codes_is_reported() {
    let mut found = BTreeSet::new();
    for path in rust_files(&SHIPPED) {
        found.extend(written(&std::fs::read_to_string(&path).expect("a readable file")));
    }
    let codes = codes();
    let unreported: Vec<_> = found.difference(&codes).collect();
    assert!(unreported.is_empty(), "add their types to `towline_agent::codes`: {unreported:?}");
    let unwritten: Vec<_> = codes.difference(&found).collect();
    assert!(unwritten.is_empty(), "not written with `codes!`: {unwritten:?}");
}
