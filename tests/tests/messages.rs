//! Checks the error messages of all packages against `tests/messages.txt`, so that a change of what
//! operators read is seen in review, and against the rules for messages: lower case, one line, no
//! full stop at the end.
//!
//! `UPDATE=1 cargo test -p towline-tests --test messages` writes the file again.

use std::fmt::Write as _;

use towline_tests::checkout::{SHIPPED, root, rust_files};

/// First words that keep their capital letter.
const PROPER_NOUNS: [&str; 13] = [
    "API",
    "CIDR",
    "Docker",
    "IPv4",
    "IPv6",
    "Kubernetes",
    "Linux",
    "MTU",
    "TLS",
    "TUN",
    "UDP",
    "URL",
    "WireGuard",
];

/// Returns the string literal at the start of `text`. Resolves the escapes that messages use.
fn literal(text: &str) -> Option<String> {
    let mut rest = text.trim_start().strip_prefix('"')?.chars();
    let mut message = String::new();
    loop {
        match rest.next()? {
            '"' => return Some(message),
            '\\' => match rest.next()? {
                // A line continuation: the break and the indentation are not part of the text.
                '\n' => rest = rest.as_str().trim_start().chars(),
                'n' => message.push('\n'),
                other => message.push(other),
            },
            other => message.push(other),
        }
    }
}

/// Returns the messages of the error types in a source file, in their order.
fn messages(source: &str) -> Vec<String> {
    source.split("#[error(").skip(1).filter_map(literal).collect()
}

fn all() -> Vec<(String, Vec<String>)> {
    let files = rust_files(&SHIPPED).into_iter().map(|path| {
        let source = std::fs::read_to_string(&path).expect("a readable file");
        let name = path.strip_prefix(root()).expect("a file of the workspace");
        (name.display().to_string(), messages(&source))
    });
    files.filter(|(_, messages)| !messages.is_empty()).collect()
}

#[test]
fn messages_are_those_of_the_snapshot() {
    let mut text = String::new();
    for (file, messages) in all() {
        writeln!(text, "{file}").expect("a string takes it");
        for message in messages {
            writeln!(text, "    {message}").expect("a string takes it");
        }
    }
    let path = root().join("tests/messages.txt");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &text).expect("a writable file");
    }
    let snapshot = std::fs::read_to_string(&path).unwrap_or_default();
    let differing = text.lines().zip(snapshot.lines()).find(|(now, then)| now != then);
    assert!(
        text == snapshot,
        "the messages differ from tests/messages.txt, first here: {differing:?}: if the change is \
         meant, run the test with UPDATE=1"
    );
}

#[test]
fn messages_are_one_line_in_lower_case_without_a_full_stop() {
    for (file, messages) in all() {
        for message in messages {
            let first = message.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
            let is_low = !first.starts_with(char::is_uppercase) || PROPER_NOUNS.contains(&first);
            assert!(is_low, "{file}: begins with a capital letter: {message}");
            assert!(!message.ends_with('.'), "{file}: ends with a full stop: {message}");
            assert!(!message.contains('\n'), "{file}: has several lines: {message}");
            assert!(!message.contains("  "), "{file}: has two spaces: {message}");
        }
    }
}
