//! Shell completions and man pages of a program, from the definition of its command line.
//!
//! A command's examples are its text after the help: a line [`EXAMPLES`], then lines that are indented
//! by two spaces, each a command or a comment that begins with `#`.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::aot::{self, Generator};
use clap_mangen::Man;

/// First line of the examples of a command.
pub const EXAMPLES: &str = "Examples:";

/// Shell for which completions are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shell {
    /// Completions for Bash
    Bash,
    /// Completions for Zsh
    Zsh,
    /// Completions for fish
    Fish,
}

impl Shell {
    /// Every shell for which there are completions.
    pub const ALL: [Self; 3] = [Self::Bash, Self::Zsh, Self::Fish];

    /// Returns where a package installs the completions of a program, relative to the root.
    pub fn path(self, program: &str) -> String {
        match self {
            Self::Bash => format!("usr/share/bash-completion/completions/{program}"),
            Self::Zsh => format!("usr/share/zsh/vendor-completions/_{program}"),
            Self::Fish => format!("usr/share/fish/vendor_completions.d/{program}.fish"),
        }
    }
}

/// Returns the script that completes the command line of a program in a shell.
pub fn completions(command: Command, shell: Shell) -> String {
    match shell {
        Shell::Bash => script(command, aot::Bash),
        Shell::Zsh => script(command, aot::Zsh),
        Shell::Fish => script(command, aot::Fish),
    }
}

fn script(mut command: Command, shell: impl Generator) -> String {
    let program = command.get_name().to_owned();
    let mut script = Vec::new();
    aot::generate(shell, &mut command, program, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// A man page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Name of the file, for example `towline-status.1`.
    pub file: String,
    /// Text in the language of roff.
    pub text: String,
}

/// Error of writing man pages.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// A page cannot be rendered.
    #[error("cannot render a man page: {0}")]
    Render(#[source] io::Error),
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
}

/// Returns the man pages of a program: its own and one of each command that its help shows.
///
/// # Errors
///
/// If a page cannot be rendered.
pub fn pages(command: Command) -> Result<Vec<Page>, PagesError> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    add_pages(&command, &mut pages)?;
    Ok(pages)
}

/// Writes the man pages of a program into a directory that exists.
///
/// # Errors
///
/// If a page cannot be rendered or written.
pub fn write_pages(command: Command, directory: &Path) -> Result<(), PagesError> {
    for page in pages(command)? {
        let path = directory.join(&page.file);
        std::fs::write(&path, page.text).map_err(|source| PagesError::Write { path, source })?;
    }
    Ok(())
}

fn add_pages(command: &Command, pages: &mut Vec<Page>) -> Result<(), PagesError> {
    // The examples get a section with their own name.
    let man = Man::new(command.clone().after_help(None::<&'static str>))
        .source(format!("Towline {}", towline_proto::VERSION))
        .manual("Towline Manual");
    let mut text = Vec::new();
    man.render(&mut text).map_err(PagesError::Render)?;
    let mut text = String::from_utf8_lossy(&text).into_owned();
    let examples = examples(command);
    if !examples.is_empty() {
        text += ".SH EXAMPLES\n.nf\n";
        for line in examples {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}", literal(&line));
        }
        text += ".fi\n";
    }
    pages.push(Page { file: man.get_filename(), text });
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        add_pages(below, pages)?;
    }
    Ok(())
}

/// Returns the lines of a command's examples without their indentation.
pub fn examples(command: &Command) -> Vec<String> {
    let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let mut lines = text.lines();
    if lines.next() != Some(EXAMPLES) {
        return Vec::new();
    }
    lines.map(|line| line.trim().to_owned()).collect()
}

/// Escapes a line for roff, so that it is shown as it is.
fn literal(line: &str) -> String {
    let escaped = line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    if escaped.starts_with('.') { format!("\\&{escaped}") } else { escaped }
}

#[cfg(test)]
mod tests {
    use clap::{Arg, ArgAction};

    use super::*;

    fn program() -> Command {
        Command::new("demo")
            .version("1.2.3")
            .about("Shows something")
            .subcommand(
                Command::new("show")
                    .about("Show the state")
                    .arg(Arg::new("wide").long("wide").action(ArgAction::SetTrue))
                    .after_help("Examples:\n  # all columns\n  demo show --wide '.x'"),
            )
            .subcommand(Command::new("inner").hide(true))
    }

    #[test]
    fn every_command_that_the_help_shows_has_a_page() {
        let pages = pages(program()).unwrap();
        let files: Vec<&str> = pages.iter().map(|page| page.file.as_str()).collect();
        assert_eq!(files, ["demo.1", "demo-show.1"]);
        let show = &pages[1].text;
        let (_, examples) = show.split_once(".SH EXAMPLES\n").unwrap();
        assert_eq!(examples, ".nf\n# all columns\ndemo show \\-\\-wide \\(aq.x\\(aq\n.fi\n");
        assert!(!show.contains("EXTRA"), "{show}");
        assert!(!pages[0].text.contains("EXAMPLES"), "{}", pages[0].text);
    }

    #[test]
    fn pages_are_written_and_a_missing_directory_is_named() {
        let directory = tempfile::tempdir().unwrap();
        write_pages(program(), directory.path()).unwrap();
        let page = std::fs::read_to_string(directory.path().join("demo-show.1")).unwrap();
        assert!(page.contains("Show the state"), "{page}");
        let error = write_pages(program(), &directory.path().join("absent")).unwrap_err();
        assert!(error.to_string().contains("absent/demo.1"), "{error}");
    }

    #[test]
    fn completions_know_the_commands_of_the_program() {
        for shell in Shell::ALL {
            let script = completions(program(), shell);
            assert!(script.contains("demo") && script.contains("show"), "{shell:?}: {script}");
        }
    }

    #[test]
    fn other_text_after_the_help_is_no_example() {
        assert!(examples(&Command::new("demo").after_help("See also: other")).is_empty());
    }
}
