//! Doc comments that say nothing: fragments without a noun, and short ones without a word of the
//! code.
//!
//! A fragment is a whole line such as `To whom.` or `Of the link.`. A doc comment of fewer than four
//! words must contain a word of the code's vocabulary: the words that the identifiers of all source
//! files are made of, without function words. `UDP port.` passes, `Where.` does not.

use std::collections::BTreeSet;
use std::path::PathBuf;

use towline_tests::checkout::{root, rust_files};

/// First words of a fragment.
const OPENINGS: [&str; 7] = ["Of", "To", "From", "Where", "Which", "Ours", "How it"];

/// Words that identifiers contain, and that alone name nothing.
const FUNCTION_WORDS: &str = "a all and any are as at be been before after by do does each for from \
    had has have here how if in into is it its no none not of off on one or other out over own so \
    some that the them then there they this to under up us was we were what when where which who \
    whom whose with you again";

/// Returns the source files of the checkout with their texts.
fn sources() -> Vec<(PathBuf, String)> {
    let files = rust_files(&["agent", "controller", "proto", "tests"]).into_iter();
    files
        .map(|path| {
            let text = std::fs::read_to_string(&path).expect("a readable file");
            (path.strip_prefix(root()).expect("below the root").to_owned(), text)
        })
        .collect()
}

/// Returns the text of a line of a doc comment.
fn doc(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let text = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"))?;
    Some(text.trim())
}

/// Returns the words of a text in lower case; identifiers are split at capitals and underscores.
fn words(text: &str) -> impl Iterator<Item = String> {
    let mut split = String::new();
    let mut after_small_letter = false;
    for c in text.chars() {
        if after_small_letter && c.is_uppercase() {
            split.push(' ');
        }
        split.push(if c.is_alphabetic() { c } else { ' ' });
        after_small_letter = c.is_lowercase();
    }
    split.split_whitespace().map(str::to_lowercase).collect::<Vec<_>>().into_iter()
}

fn is_fragment(doc: &str) -> bool {
    let Some(text) = doc.strip_suffix('.') else { return false };
    let rest = OPENINGS.iter().find_map(|opening| text.strip_prefix(opening));
    rest.is_some_and(|rest| {
        let is_word = rest.is_empty() || rest.starts_with(' ');
        is_word && rest.chars().all(|c| c == ' ' || c.is_ascii_lowercase())
    })
}

/// Returns the doc comments of a file, each with its first line.
fn comments(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut is_open = false;
    for (line, number) in text.lines().zip(1..) {
        match (doc(line), found.last_mut().filter(|_| is_open)) {
            (Some(text), Some((_, comment))) => {
                comment.push(' ');
                comment.push_str(text);
            }
            (Some(text), None) => found.push((number, text.to_owned())),
            (None, _) => {}
        }
        is_open = doc(line).is_some();
    }
    found
}

#[test]
fn no_doc_comment_is_a_fragment() {
    let mut found = String::new();
    for (path, text) in sources() {
        for (line, number) in text.lines().zip(1..) {
            if doc(line).is_some_and(is_fragment) {
                found += &format!("{}:{number}:{line}\n", path.display());
            }
        }
    }
    assert!(found.is_empty(), "write a sentence or a noun phrase:\n{found}");
}

#[test]
fn short_doc_comments_name_something_of_the_code() {
    let sources = sources();
    let function_words: BTreeSet<&str> = FUNCTION_WORDS.split_whitespace().collect();
    let code = sources.iter().flat_map(|(_, text)| text.lines());
    let code = code.map(|line| line.split("//").next().unwrap_or_default());
    let vocabulary: BTreeSet<String> =
        code.flat_map(words).filter(|word| !function_words.contains(word.as_str())).collect();
    let names = |word: String| {
        let singular = word.strip_suffix('s').unwrap_or(&word);
        vocabulary.contains(&word) || vocabulary.contains(singular)
    };
    let mut found = String::new();
    for (path, text) in &sources {
        for (line, comment) in comments(text) {
            if comment.split_whitespace().count() < 4 && !words(&comment).any(names) {
                found += &format!("{}:{line}: {comment}\n", path.display());
            }
        }
    }
    assert!(found.is_empty(), "name the thing:\n{found}");
}

#[test]
fn fragments_are_told_from_sentences() {
    for fragment in ["To whom.", "Of the link.", "Ours.", "Where it goes.", "How it stands."] {
        assert!(is_fragment(fragment), "{fragment}");
    }
    for sentence in ["Offset in bytes.", "Where X is set.", "To the peer: one probe.", "Ours"] {
        assert!(!is_fragment(sentence), "{sentence}");
    }
    let text = "/// One\n/// comment.\nfn a() {}\n/// Another.\nfn b() {}\n";
    assert_eq!(comments(text), [(1, "One comment.".to_owned()), (4, "Another.".to_owned())]);
}
