//! Words that no tracked document, configuration file, schema or source file of the project may
//! contain: in sources neither comments, nor string literals, nor identifiers.
//!
//! A reader whose first language is not English stumbles over them, and each has a plain replacement.

use std::path::{Path, PathBuf};
use std::process::Command;

use towline_tests::checkout::root;

/// Words and phrases that are never allowed, in lower case, with what to write instead.
const FORBIDDEN: &[(&str, &str)] = &[
    ("anew", "again"),
    ("for ever", "forever, permanently"),
    ("whoever", "anyone who, the one that"),
    ("so many", "the number"),
    ("thereof", "of it"),
];

/// Extensions of the files that are read. Extend this list to check more kinds of files.
const EXTENSIONS: &[&str] = &["md", "toml", "proto", "rs"];

/// Path of this file, which names the words and is exempt.
const EXEMPT: &str = "tests/tests/words.rs";

/// Returns the files to read, relative to the root: those that git tracks, or where there is no git
/// (a source archive) all files outside of hidden and build directories.
fn files() -> Vec<PathBuf> {
    let tracked = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let mut files = match tracked {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout)
            .expect("tracked paths are UTF-8")
            .split_terminator('\0')
            .map(PathBuf::from)
            .collect(),
        _ => walk(),
    };
    files.retain(|file| {
        let extension = file.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| EXTENSIONS.contains(&extension))
            && file != Path::new(EXEMPT)
            // A tracked file may be deleted in the working tree.
            && root().join(file).is_file()
    });
    files
}

/// Returns every file below the root, relative to it, without hidden and build directories.
fn walk() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(root().join(&directory)).expect("a readable directory") {
            let entry = entry.expect("a readable directory entry");
            let name = entry.file_name();
            let path = directory.join(&name);
            let kind = entry.file_type().expect("the kind of a directory entry");
            if kind.is_file() {
                files.push(path);
            } else if kind.is_dir()
                && name != "target"
                && !name.as_encoded_bytes().starts_with(b".")
            {
                directories.push(path);
            }
        }
    }
    files
}

/// Returns the words of a text in lower case, each with its line, counted from 1. Characters that begin
/// a comment or a quotation separate words as spaces do, so that a phrase is found across lines. So
/// do underscores and a capital after a small letter, so that identifiers are read too.
fn words(text: &str) -> Vec<(usize, String)> {
    let mut words = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        let mut word = String::new();
        let mut after_small_letter = false;
        for c in line.chars().chain([' ']) {
            let is_part = c.is_alphanumeric() || c == '\'' || c == '’';
            if !word.is_empty() && (!is_part || (after_small_letter && c.is_uppercase())) {
                words.push((number, std::mem::take(&mut word)));
            }
            if is_part {
                word.extend(c.to_lowercase());
            }
            after_small_letter = c.is_lowercase();
        }
    }
    words
}

/// Returns each forbidden phrase in a text: its line, the phrase, and what to write instead.
fn hits(text: &str) -> Vec<(usize, &'static str, &'static str)> {
    let words = words(text);
    let mut hits = Vec::new();
    for &(phrase, instead) in FORBIDDEN {
        let parts: Vec<&str> = phrase.split(' ').collect();
        for window in words.windows(parts.len()) {
            if window.iter().map(|(_, word)| word.as_str()).eq(parts.iter().copied()) {
                hits.push((window[0].0, phrase, instead));
            }
        }
    }
    hits.sort_unstable();
    hits
}

#[test]
fn no_file_contains_a_forbidden_word() {
    let files = files();
    for wanted in ["README.md", "tests/src/lib.rs"] {
        assert!(
            files.iter().any(|file| file == Path::new(wanted)),
            "{wanted} is not read: {files:?}"
        );
    }
    let mut found = String::new();
    for file in files {
        let text = std::fs::read_to_string(root().join(&file)).expect("a readable text file");
        for (line, phrase, instead) in hits(&text) {
            found += &format!("{}:{line}: `{phrase}`; write: {instead}\n", file.display());
        }
    }
    assert!(found.is_empty(), "forbidden words:\n{found}");
}

#[test]
fn a_phrase_is_found_as_whole_words_and_across_lines() {
    let lines = |text| hits(text).into_iter().map(|(line, ..)| line).collect::<Vec<_>>();
    assert_eq!(lines("It begins Anew."), [1]);
    assert_eq!(lines("one\nlasts for\never after"), [2]);
    assert_eq!(lines("# lasts for\n# ever"), [1]);
    assert_eq!(lines("// lasts *for*\n/// ever"), [1]);
    assert_eq!(lines("there were so\n\n> many of them, and so many more"), [1, 3]);
    assert_eq!(lines("fn begins_anew() {}\nlet built = BuildAnew;"), [1, 2]);
    assert_eq!(lines("fn it_lasts_for_ever() {}"), [1]);
    assert!(lines("a new rule, forever, for every peer, so manyfold, who ever").is_empty());
    assert_eq!(walk().iter().filter(|file| file.as_path() == Path::new(EXEMPT)).count(), 1);
}
