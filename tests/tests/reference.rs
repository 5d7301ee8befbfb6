//! Checks the reference documents against the code that they describe: the command line ([`cli`]), the
//! configuration ([`configuration`]), and the JSON documents ([`json`]). Each is written from the code,
//! so that none can be out of date. The ids of the journal are compared ([`logs`]).
//!
//! `UPDATE=1 cargo test -p towline-tests --test reference` writes the documents again.

#[path = "reference/cli.rs"]
mod cli;
#[path = "reference/configuration.rs"]
mod configuration;
#[path = "reference/json.rs"]
mod json;
#[path = "reference/logs.rs"]
mod logs;
#[path = "reference/rust.rs"]
mod rust;

use std::path::Path;

/// Second line of each document.
const NOTE: &str =
    "<!-- written by UPDATE=1 cargo test -p towline-tests --test reference: do not edit -->";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Asserts that a document has this text, or writes it.
fn compare(document: &str, wanted: &str) {
    let path = root().join(document);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, wanted).expect("a writable document");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let differing = found.lines().zip(wanted.lines()).find(|(found, wanted)| found != wanted);
    assert!(
        found == wanted,
        "{document} is not what the code says, first here (document, code): {differing:?}: run \
         UPDATE=1 cargo test -p towline-tests --test reference"
    );
}

/// Returns a text as the cell of a table, which a vertical bar would end.
fn cell(text: &str) -> String {
    if text.is_empty() {
        return "–".to_owned();
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").replace('|', "\\|")
}

/// Returns a row of a table.
fn row(cells: &[&str]) -> String {
    let cells: Vec<String> = cells.iter().map(|text| cell(text)).collect();
    format!("| {} |\n", cells.join(" | "))
}

/// Returns the header of a table, with the line below it.
fn header(cells: &[&str]) -> String {
    row(cells) + "|" + &"---|".repeat(cells.len()) + "\n"
}

#[test]
fn a_cell_of_a_table_is_one_line() {
    assert_eq!(row(&["a|b", "one\n two", ""]), "| a\\|b | one two | – |\n");
    assert_eq!(header(&["a", "b"]), "| a | b |\n|---|---|\n");
}
