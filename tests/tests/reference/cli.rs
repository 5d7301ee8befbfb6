//! Writes `docs/cli.md` from the definitions of both command lines, and tries their examples.

use std::collections::BTreeSet;

use clap::{Arg, Command};
use towline_service::manual::{self, Shell};

use super::{NOTE, compare, header, root, row};

fn programs() -> [Command; 2] {
    [towline_agent::cli::command(), towline_controller::cli::command()]
}

/// Returns the programs as clap completes them: with global options and full names.
pub(crate) fn built() -> Vec<Command> {
    let build = |program: Command| {
        let mut program = program.disable_help_subcommand(true);
        program.build();
        program
    };
    programs().into_iter().map(build).collect()
}

/// Returns a command and every command below it that the help shows.
pub(crate) fn shown(command: &Command) -> Vec<&Command> {
    let below = command.get_subcommands().filter(|below| !below.is_hide_set());
    std::iter::once(command).chain(below.flat_map(shown)).collect()
}

/// Returns the full name of a command, for example `towline config check`.
pub(crate) fn name(command: &Command) -> &str {
    command.get_bin_name().unwrap_or_else(|| command.get_name())
}

fn document() -> String {
    let mut text = format!(
        "# Command line\n{NOTE}\n\nEvery command of both programs. Data goes to standard output, \
         diagnostics to standard error. Exit status: 0 done, 1 failed, 2 wrong usage. A flag overrides its \
         environment variable, and that overrides the [configuration](configuration.md). The documents \
         of `-o json` are in [json.md](json.md). The package installs man pages (`man towline-status`) and \
         completions for Bash, Zsh and fish.\n"
    );
    for program in built() {
        for command in shown(&program) {
            text += &section(command, command.get_name() == program.get_name());
        }
    }
    text
}

fn section(command: &Command, is_program: bool) -> String {
    let level = if is_program { "##" } else { "###" };
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let full_stop = if about.ends_with('.') { "" } else { "." };
    let mut text = format!("\n{level} {}\n\n{about}{full_stop}\n", name(command));
    let usage = command.clone().render_usage().to_string();
    text += &format!("\n```text\n{}\n```\n", usage.trim_start_matches("Usage: ").trim());
    let arguments: Vec<&Arg> = command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set() && !is_of_clap(argument))
        .filter(|argument| is_program || !argument.is_global_set())
        .collect();
    if !arguments.is_empty() {
        text += "\n";
        text += &header(&["argument", "environment", "default", "meaning"]);
        text.extend(arguments.into_iter().map(argument));
    }
    let examples = manual::examples(command);
    if !examples.is_empty() {
        text += &format!("\n```sh\n{}\n```\n", examples.join("\n"));
    }
    text
}

/// Returns whether clap itself adds an argument to every command.
fn is_of_clap(argument: &Arg) -> bool {
    matches!(argument.get_id().as_str(), "help" | "version")
}

fn argument(argument: &Arg) -> String {
    let takes_value = argument.get_action().takes_values();
    let values = argument.get_value_names().unwrap_or_default();
    let value = values.iter().map(|name| format!("<{name}>")).collect::<Vec<_>>().join(" ");
    let mut names = Vec::new();
    names.extend(argument.get_short().map(|short| format!("-{short}")));
    names.extend(argument.get_long().map(|long| format!("--{long}")));
    let shown = match (names.is_empty(), takes_value) {
        (true, _) if argument.is_required_set() => value,
        (true, _) => format!("[{}]", value.trim_matches(['<', '>'])),
        (false, true) => format!("{} {value}", names.join(", ")),
        (false, false) => names.join(", "),
    };
    let environment = argument.get_env().map(|name| format!("`{}`", name.to_string_lossy()));
    let defaults = argument.get_default_values().iter().map(|value| value.to_string_lossy());
    let defaults = defaults.collect::<Vec<_>>().join(", ");
    let defaults =
        if takes_value && !defaults.is_empty() { format!("`{defaults}`") } else { String::new() };
    let mut help = argument.get_help().map(ToString::to_string).unwrap_or_default();
    let possible = argument.get_possible_values();
    let possible = possible.iter().filter(|value| takes_value && !value.is_hide_set());
    let possible: Vec<String> = possible.map(|value| format!("`{}`", value.get_name())).collect();
    if !possible.is_empty() {
        help += &format!(": {}", possible.join(", "));
    }
    row(&[&format!("`{shown}`"), &environment.unwrap_or_default(), &defaults, &help])
}

#[test]
fn the_document_shows_every_command() {
    compare("docs/cli.md", &document());
}

#[test]
fn every_command_has_examples_and_they_parse() {
    for program in built() {
        for command in shown(&program) {
            let has_commands = command.get_subcommands().any(|below| !below.is_hide_set());
            let examples = manual::examples(command);
            let commands: Vec<&String> =
                examples.iter().filter(|line| !line.starts_with('#')).collect();
            if has_commands && commands.is_empty() {
                continue;
            }
            let name = name(command);
            let full_name: Vec<&str> = name.split(' ').collect();
            let uses =
                |line: &&String| full_name.iter().all(|word| line.split(' ').any(|w| w == *word));
            assert!(commands.iter().any(uses), "{name}: no example: {examples:?}");
            for line in commands {
                let words: Vec<&str> =
                    line.split(' ').take_while(|word| !matches!(*word, ">" | "|")).collect();
                let parser = programs().into_iter().find(|program| program.get_name() == words[0]);
                let parser =
                    parser.unwrap_or_else(|| panic!("{name}: not a command of ours: {line}"));
                if let Err(error) = parser.try_get_matches_from(words) {
                    panic!("{name}: {line}: {error}");
                }
            }
        }
    }
}

#[test]
fn every_command_has_a_man_page_with_its_examples() {
    for program in programs() {
        let name = program.get_name().to_owned();
        let pages = manual::pages(program).expect("pages");
        assert!(pages.iter().any(|page| page.file == format!("{name}.1")));
        let shown: usize =
            built().iter().filter(|built| built.get_name() == name).map(|it| shown(it).len()).sum();
        assert_eq!(pages.len(), shown, "{name}");
        for page in
            pages.iter().filter(|page| page.file.matches('-').count() > name.matches('-').count())
        {
            let is_group = pages.iter().any(|below| {
                let prefix = page.file.trim_end_matches(".1");
                below.file.starts_with(&format!("{prefix}-"))
            });
            assert!(
                is_group || page.text.contains(".SH EXAMPLES\n"),
                "{}: {}",
                page.file,
                page.text
            );
        }
    }
}

#[test]
fn the_completions_know_every_command_flag_and_value() {
    for (program, built) in programs().into_iter().zip(built()) {
        for shell in Shell::ALL {
            let script = manual::completions(program.clone(), shell);
            let words: BTreeSet<&str> = script
                .split(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_')
                .collect();
            let mut missing = Vec::new();
            for command in shown(&built) {
                let arguments = command.get_arguments().filter(|argument| !argument.is_hide_set());
                let mut wanted = vec![command.get_name().to_owned()];
                for argument in arguments {
                    let flag = argument.get_long().map(|long| match shell {
                        Shell::Bash | Shell::Zsh => format!("--{long}"),
                        Shell::Fish => long.to_owned(),
                    });
                    wanted.extend(flag);
                    // The scripts for fish do not complete values without a flag.
                    let is_completed = argument.get_long().is_some() || shell != Shell::Fish;
                    if argument.get_action().takes_values() && is_completed {
                        let values = argument.get_possible_values();
                        let values = values.iter().filter(|value| !value.is_hide_set());
                        wanted.extend(values.map(|value| value.get_name().to_owned()));
                    }
                }
                wanted.retain(|word| !words.contains(word.as_str()));
                missing.extend(wanted.into_iter().map(|word| format!("{}: {word}", name(command))));
            }
            assert!(missing.is_empty(), "not in the completions of {shell:?}: {missing:?}");
        }
    }
}

#[test]
fn every_environment_variable_is_in_the_document() {
    let document = document();
    let mut named = BTreeSet::new();
    let mut waiting =
        ["agent/src", "controller/src", "proto/service/src"].map(|top| root().join(top)).to_vec();
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(&directory).expect("a readable directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                waiting.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a readable file");
            for rest in text.split("\"TOWLINE_").skip(1) {
                let end =
                    rest.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(rest.len());
                named.insert(format!("TOWLINE_{}", &rest[..end]));
            }
        }
    }
    assert!(named.contains("TOWLINE_CONFIG"), "{named:?}");
    for name in named.iter().filter(|name| !name.starts_with("TOWLINE_TEST_")) {
        assert!(document.contains(name.as_str()), "{name} is not in docs/cli.md");
    }
}
