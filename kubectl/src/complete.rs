//! Completion of `kubectl towline` in a shell: kubectl runs a program `kubectl_complete-towline`, which is a link to the
//! plugin, with the words of the command line. It expects a line for each completion, and a number that says whether
//! the shell may add names of files.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::Path;

use clap::{Arg, Command};

/// Name under which kubectl looks for the completions of the plugin.
pub(crate) const PROGRAM: &str = "kubectl_complete-towline";

/// Last line of the answer: names of files are no completions (`ShellCompDirectiveNoFileComp` of cobra).
const NO_FILES: &str = ":4";

/// Returns whether the program was started under the name [`PROGRAM`].
pub(crate) fn is_asked_for(program: &OsStr) -> bool {
    Path::new(program).file_name() == Some(OsStr::new(PROGRAM))
}

/// Returns the answer to kubectl. The last word is the one that is completed, and may be empty.
pub(crate) fn answer(program: &Command, words: &[String]) -> String {
    let (begun, before) = match words.split_last() {
        Some((last, before)) => (last.as_str(), before),
        None => ("", words),
    };
    let mut text = String::new();
    for (completion, help) in completions(program, before, begun) {
        if completion.starts_with(begun) {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{completion}\t{help}");
        }
    }
    text + NO_FILES + "\n"
}

/// Returns what may follow the words `before`, each with its help.
fn completions(program: &Command, before: &[String], begun: &str) -> Vec<(String, String)> {
    let command = before.iter().find_map(|word| program.find_subcommand(word));
    let arguments: Vec<&Arg> = program
        .get_arguments()
        .chain(command.into_iter().flat_map(Command::get_arguments))
        .filter(|argument| !argument.is_hide_set())
        .collect();
    let flag = before.last().and_then(|word| arguments.iter().find(|one| is_named(one, word)));
    if let Some(flag) = flag
        && flag.get_action().takes_values()
    {
        let values = flag.get_possible_values();
        let values = values.iter().filter(|value| !value.is_hide_set());
        let help = |value: &clap::builder::PossibleValue| {
            value.get_help().map(ToString::to_string).unwrap_or_default()
        };
        return values.map(|value| (value.get_name().to_owned(), help(value))).collect();
    }
    if begun.starts_with('-') {
        let named = arguments.iter().filter_map(|one| Some((one.get_long()?, one.get_help())));
        let text = |help: Option<&clap::builder::StyledStr>| {
            help.map(ToString::to_string).unwrap_or_default()
        };
        return named.map(|(long, help)| (format!("--{long}"), text(help))).collect();
    }
    if command.is_some() {
        // Nodes and peers are names of the cluster.
        return Vec::new();
    }
    let about = |command: &Command| command.get_about().map(ToString::to_string);
    let commands = program.get_subcommands().filter(|command| !command.is_hide_set());
    commands
        .map(|command| (command.get_name().to_owned(), about(command).unwrap_or_default()))
        .collect()
}

/// Returns whether a word is the long or the short form of an argument.
fn is_named(argument: &Arg, word: &str) -> bool {
    let long = argument.get_long().is_some_and(|long| word.strip_prefix("--") == Some(long));
    let short = argument.get_short();
    long || short.is_some_and(|short| word.strip_prefix('-') == Some(short.to_string().as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the completions of a line, whose last word is the one that is completed.
    fn completed(line: &str) -> Vec<String> {
        let words: Vec<String> = line.split(' ').map(ToOwned::to_owned).collect();
        let text = answer(&crate::command(), &words);
        let mut lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.pop(), Some(NO_FILES), "{text}");
        let word = |line: &str| line.split('\t').next().unwrap_or_default().to_owned();
        lines.into_iter().map(word).collect()
    }

    #[test]
    fn commands_flags_and_values_are_completed() {
        let commands = ["status", "peers", "trace", "explain", "doctor"];
        assert_eq!(completed(""), commands);
        assert_eq!(completed("--context prod "), commands);
        assert_eq!(completed("p"), ["peers"]);
        assert_eq!(completed("peers gpu-1 --o"), ["--output"]);
        assert_eq!(completed("peers gpu-1 --n"), ["--namespace"]);
        assert_eq!(completed("peers gpu-1 -o j"), ["json"]);
        assert_eq!(completed("peers gpu-1 --output "), ["table", "wide", "json", "yaml"]);
        assert_eq!(completed("explain g"), [""; 0], "names of nodes are not known");
        assert_eq!(answer(&crate::command(), &[]).lines().count(), commands.len() + 1);
    }

    #[test]
    fn the_name_of_the_program_decides() {
        assert!(is_asked_for(OsStr::new("/usr/local/bin/kubectl_complete-towline")));
        assert!(is_asked_for(OsStr::new("kubectl_complete-towline")));
        assert!(!is_asked_for(OsStr::new("/usr/local/bin/kubectl-towline")));
    }
}
