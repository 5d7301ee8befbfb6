//! Checks the threat model: each claim names a test or a case of the lab that exists, and the table of RPCs is
//! that of the controller.

use std::collections::BTreeSet;

use towline_controller::service::RPCS;
use towline_tests::checkout::{root, rust_files};
use towline_tests::lab::scenario::selection::Entry;
use towline_tests::lab::scenario::table::SCENARIOS;
use towline_tests::lab::scenario::{attack, flood};

const DOCUMENT: &str = "docs/threat-model.md";
const BEGIN: &str =
    "<!-- rpcs: written by UPDATE=1 cargo test -p towline-tests --test threat_model -->\n";
const END: &str = "<!-- end of rpcs -->";

fn document() -> String {
    std::fs::read_to_string(root().join(DOCUMENT)).expect("the document")
}

/// Returns the claims, each with the texts in backquotes of what holds it.
fn claims(document: &str) -> Vec<(&str, Vec<&str>)> {
    let mut claims = Vec::new();
    let mut is_inside = false;
    for line in document.lines() {
        match line {
            "| claim | held by |" => is_inside = true,
            "|---|---|" => {}
            line if is_inside && line.starts_with('|') => {
                let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
                let [claim, held_by] = cells[..] else { panic!("two cells: {line}") };
                claims.push((claim.trim(), held_by.split('`').skip(1).step_by(2).collect()));
            }
            _ => is_inside = false,
        }
    }
    claims
}

/// Returns the names of all tests of the project.
fn tests() -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for file in rust_files(&["agent", "controller", "proto", "tests"]) {
        let text = std::fs::read_to_string(file).expect("a source file");
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if ["#[test]", "#[tokio::test", "namespace_test! {"].iter().any(|m| line.starts_with(m))
            {
                is_test = true;
            } else if let Some((name, function)) = listed(line)
                && name == function
            {
                tests.insert(name.to_owned());
            } else if let Some(name) =
                line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ")
            {
                if is_test {
                    tests.extend(name.split('(').next().map(ToOwned::to_owned));
                }
                is_test = false;
            }
        }
    }
    tests
}

/// Returns both names in an entry of the list of tests that a test program without a harness has.
fn listed(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("(\"")?.strip_suffix("),")?.split_once("\", ")
}

/// Checks that a command names a scenario, and cases of it.
fn check_command(command: &str, claim: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    let (scenario, case) = match words[..] {
        [scenario] => (scenario, None),
        [scenario, "--case", case] => (scenario, Some(case)),
        _ => panic!("{claim}: `cargo lab SCENARIO [--case NAME]`, not {command}"),
    };
    assert!(SCENARIOS.iter().any(|known| known.name == scenario), "{claim}: {scenario}");
    let Some(case) = case else { return };
    let entries: Vec<Entry> = match scenario {
        "attack" => attack::entries(),
        "flood" => flood::entries(),
        _ => panic!("{claim}: {scenario} has no cases"),
    };
    assert!(entries.iter().any(|entry| entry.name.contains(case)), "{claim}: no case {case}");
}

#[test]
fn each_claim_is_held_by_tests_that_exist() {
    let (document, tests) = (document(), tests());
    let claims = claims(&document);
    assert!(claims.len() > 20, "{}", claims.len());
    for (claim, held_by) in claims {
        assert!(!held_by.is_empty(), "{claim}: nothing holds it");
        for name in held_by {
            match name.strip_prefix("cargo lab ") {
                Some(command) => check_command(command, claim),
                None => assert!(tests.contains(name), "{claim}: there is no test {name}"),
            }
        }
    }
}

#[test]
fn the_table_of_rpcs_is_that_of_the_controller() {
    let mut table = "\n| RPC | role | access | object |\n|---|---|---|---|\n".to_owned();
    for rpc in RPCS {
        let path = rpc.path.trim_start_matches('/');
        let name = path.strip_prefix("towline.v1.").unwrap_or(path).replace('/', ".");
        let (role, access, object) = (rpc.role.text(), rpc.access.text(), rpc.object.text());
        table += &format!("| `{name}` | {role} | {access} | {object} |\n");
    }
    table += "\n";
    let document = document();
    let (before, rest) = document.split_once(BEGIN).expect("the beginning of the table");
    let (found, after) = rest.split_once(END).expect("the end of the table");
    if std::env::var_os("UPDATE").is_some() {
        let text = format!("{before}{BEGIN}{table}{END}{after}");
        std::fs::write(root().join(DOCUMENT), text).expect("a writable document");
        return;
    }
    assert_eq!(found, table, "run UPDATE=1 cargo test -p towline-tests --test threat_model");
}
