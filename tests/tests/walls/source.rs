//! Reads the Rust sources of a package: its modules, and the paths that they name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use towline_tests::checkout::rust_files;

/// Path of a module inside its crate, for example `["peer", "inbound"]`; empty for the crate's root.
pub(crate) type Module = Vec<String>;

/// Returns the text of each module below `src` that the product contains, without comments, strings
/// and test modules.
pub(crate) fn product_modules(src: &Path) -> BTreeMap<Module, String> {
    let mut all: BTreeMap<Module, String> = BTreeMap::new();
    let mut tests = BTreeSet::new();
    for (path, text) in files(src) {
        let code = without_comments_and_strings(&text);
        let module = module(path.strip_prefix(src).expect("a file below it"));
        let names = test_modules(&code);
        tests.extend(names.into_iter().map(|name| [module.clone(), vec![name]].concat()));
        // A package may have a root for its library and one for its program.
        all.entry(module).or_default().push_str(without_inline_tests(&code));
    }
    all.retain(|module, _| !(1..=module.len()).any(|end| tests.contains(&module[..end])));
    all
}

/// Returns the text of every Rust file below `directory`, or of that file, without comments and
/// strings.
pub(crate) fn all_code(directory: &Path) -> String {
    let code = files(directory).into_iter().map(|(_, text)| without_comments_and_strings(&text));
    code.collect::<Vec<_>>().join("\n")
}

/// Returns the Rust files below a directory, or the file itself, each with its text.
fn files(place: &Path) -> Vec<(PathBuf, String)> {
    let with_text = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).expect("a readable file");
        (path, text)
    };
    rust_files(&[place]).into_iter().map(with_text).collect()
}

fn module(file: &Path) -> Module {
    let path = file.with_extension("");
    let mut module: Module = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        module.pop();
    }
    module
}

/// Replaces comments and the content of strings with nothing.
fn without_comments_and_strings(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let skipped = match next {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
            'r' if rest.starts_with("r#\"") && !code.ends_with(is_word) => {
                rest[3..].find("\"#").map_or(rest.len(), |end| end + 5)
            }
            '"' => string_length(rest),
            // Not a lifetime.
            '\'' if rest.starts_with("'\"'") || rest.starts_with("'\\\"'") => {
                rest[1..].find('\'').map_or(rest.len(), |end| end + 2)
            }
            _ => {
                code.push(next);
                rest = &rest[next.len_utf8()..];
                continue;
            }
        };
        rest = &rest[skipped..];
    }
    code
}

/// Returns the length of the string literal at the beginning, in bytes.
fn string_length(text: &str) -> usize {
    let mut is_escaped = false;
    for (at, next) in text.char_indices().skip(1) {
        match next {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Returns the code up to its test module: tests come last in a file.
fn without_inline_tests(code: &str) -> &str {
    let mut from = 0;
    while let Some(found) = code[from..].find("#[cfg(test)]") {
        let at = from + found;
        let item = code[at..].trim_start_matches("#[cfg(test)]").trim_start();
        if declared_module(item).is_some_and(|(_, is_inline)| is_inline) {
            return &code[..at];
        }
        from = at + 1;
    }
    code
}

/// Returns the names of the test modules that have files of their own.
fn test_modules(code: &str) -> Vec<String> {
    code.split("#[cfg(test)]")
        .skip(1)
        .filter_map(|item| declared_module(item.trim_start()))
        .filter_map(|(name, is_inline)| (!is_inline).then_some(name))
        .collect()
}

/// Returns the name of the module that `item` declares, and whether its code follows.
fn declared_module(item: &str) -> Option<(String, bool)> {
    let end = item.find([';', '{'])?;
    let (_, name) = item[..end].rsplit_once("mod ")?;
    let name = name.trim();
    name.chars().all(is_word).then(|| (name.to_owned(), item[end..].starts_with('{')))
}

/// Returns the paths in `code` that begin with `crate`, `super` or, in a `use`, with `self`, each as
/// a list of its parts.
pub(crate) fn paths(code: &str) -> Vec<Vec<&str>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < code.len() {
        let rest = &code[at..];
        let word = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        if word == 0 {
            at += rest.chars().next().map_or(1, char::len_utf8);
            continue;
        }
        let is_use = code[..at].trim_end().ends_with("use");
        let begins = match &rest[..word] {
            // `pub(crate)` and `pub(in crate::a)` name no import.
            "crate" | "super" => rest[word..].starts_with("::") && !code[..at].ends_with("(in "),
            "self" => is_use && rest[word..].starts_with("::"),
            _ => false,
        };
        if begins {
            at += tree(rest, &mut Vec::new(), &mut found);
        } else {
            at += word;
        }
    }
    found
}

/// Reads one use tree, such as `crate::{a, b::{self, c as d}}`, and returns its length in bytes.
fn tree<'a>(code: &'a str, prefix: &mut Vec<&'a str>, found: &mut Vec<Vec<&'a str>>) -> usize {
    let depth = prefix.len();
    let mut at = 0;
    loop {
        at += code[at..].len() - code[at..].trim_start().len();
        if code[at..].starts_with('{') {
            at += 1;
            loop {
                at += code[at..].find(|c: char| !c.is_whitespace() && c != ',').unwrap_or(0);
                if code[at..].starts_with('}') || at >= code.len() {
                    break;
                }
                let length = tree(&code[at..], prefix, found);
                // What is no tree, such as the `*` of a glob, or `as name`, is passed over.
                at += length;
                at += code[at..].find([',', '}']).unwrap_or(code.len() - at);
            }
            at += 1;
            break;
        }
        let word = code[at..].find(|c| !is_word(c)).unwrap_or(code.len() - at);
        if word > 0 {
            prefix.push(&code[at..at + word]);
            at += word;
        }
        if word > 0 && code[at..].starts_with("::") {
            at += 2;
        } else {
            found.push(prefix.clone());
            break;
        }
    }
    prefix.truncate(depth);
    at
}

#[test]
fn modules_and_the_paths_that_they_name_are_found() {
    assert_eq!(module(Path::new("lib.rs")), [""; 0]);
    assert_eq!(module(Path::new("peer/mod.rs")), ["peer"]);
    assert_eq!(module(Path::new("peer/inbound.rs")), ["peer", "inbound"]);

    let text = "use crate::{a, b::{self, c as d, e::*}}; // crate::comment\n\
                fn f() { super::g::h(\"crate::string \\\" crate::more\"); x::crate_name() }\n\
                pub(crate) use self::i::J;\npub(in crate::k) fn l() {}\n\
                #[cfg(test)]\nmod outside;\n\
                #[cfg(test)]\nmod inside {\n use crate::test;\n}\n";
    let code = without_comments_and_strings(text);
    assert_eq!(test_modules(&code), ["outside"]);
    let found: Vec<String> =
        paths(without_inline_tests(&code)).iter().map(|path| path.join("::")).collect();
    let wanted =
        ["crate::a", "crate::b::self", "crate::b::c", "crate::b::e", "super::g::h", "self::i::J"];
    assert_eq!(found, wanted);
}
