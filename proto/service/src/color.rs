//! Colors of the output: green for what is up, yellow for what is on its way or relayed, red for what
//! is down.
//!
//! Only a terminal gets them, and none that `NO_COLOR` or `TERM=dumb` forbids (<https://no-color.org>).

use std::io::{self, IsTerminal as _};

/// Sequence that ends a color (ECMA-48, SGR 0).
const RESET: &str = "\x1b[0m";

/// A color with a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Color {
    /// It works.
    Green,
    /// It works in part, or is on its way.
    Yellow,
    /// It does not work.
    Red,
}

impl Color {
    /// Returns the color of a peer's state or kind of path, of a check's result, or of the verdict of
    /// `towline explain`; `None` for other words.
    pub fn of(word: &str) -> Option<Self> {
        match word {
            "up" | "ok" | "healthy" | "pass" => Some(Self::Green),
            "connecting" | "relay" | "relayed" | "warning" | "impaired" => Some(Self::Yellow),
            "down" | "failed" | "drop" => Some(Self::Red),
            _ => None,
        }
    }

    fn begin(self) -> &'static str {
        match self {
            Self::Green => "\x1b[32m",
            Self::Yellow => "\x1b[33m",
            Self::Red => "\x1b[31m",
        }
    }
}

/// Colors of one output, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Palette {
    is_colored: bool,
}

impl Palette {
    /// Palette without colors.
    pub const PLAIN: Self = Self { is_colored: false };
    /// Palette with colors.
    pub const COLORED: Self = Self { is_colored: true };

    /// Returns the palette of standard output.
    pub fn of_stdout() -> Self {
        let variable = |name| std::env::var_os(name).unwrap_or_default();
        let is_forbidden = !variable("NO_COLOR").is_empty() || variable("TERM") == "dumb";
        Self { is_colored: io::stdout().is_terminal() && !is_forbidden }
    }

    /// Returns the text in a color.
    pub fn paint(self, color: Option<Color>, text: &str) -> String {
        match color.filter(|_| self.is_colored && !text.is_empty()) {
            Some(color) => format!("{}{text}{RESET}", color.begin()),
            None => text.to_owned(),
        }
    }

    /// Returns the text in the color of its first word.
    pub fn word(self, text: &str) -> String {
        self.paint(Color::of(text.split_whitespace().next().unwrap_or_default()), text)
    }

    /// Returns a table of [`crate::output::table`] with the first word of each cell below one of the
    /// headings in its color.
    pub fn columns(self, table: &str, headings: &[&str]) -> String {
        if !self.is_colored {
            return table.to_owned();
        }
        let header = table.lines().next().unwrap_or_default();
        let mut places: Vec<usize> =
            headings.iter().filter_map(|heading| place(header, heading)).collect();
        // From the right, so that what is inserted moves no other column.
        places.sort_unstable_by_key(|place| std::cmp::Reverse(*place));
        let lines = table.lines().enumerate().map(|(number, line)| {
            let mut line = line.to_owned();
            for place in places.iter().filter(|_| number > 0) {
                line = self.cell(&line, *place);
            }
            line + "\n"
        });
        lines.collect()
    }

    /// Returns a line with the word at a place, counted in characters, in its color.
    fn cell(self, line: &str, place: usize) -> String {
        let Some((at, _)) = line.char_indices().nth(place) else { return line.to_owned() };
        let (before, rest) = line.split_at(at);
        let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        format!("{before}{}{after}", self.paint(Color::of(word), word))
    }
}

/// Returns where a heading begins, counted in characters. Headings are separated by two blanks.
fn place(header: &str, heading: &str) -> Option<usize> {
    let is_whole = |at: usize| {
        let (before, after) = (&header[..at], &header[at + heading.len()..]);
        (before.is_empty() || before.ends_with(' ')) && (after.is_empty() || after.starts_with(' '))
    };
    let at = header.match_indices(heading).map(|(at, _)| at).find(|at| is_whole(*at))?;
    Some(header[..at].chars().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_named_columns_are_colored() {
        let table = "PEER  STATE  PATH\na     up     relay 192.0.2.1:1\ndown  idle   -\n";
        let colored = Palette::COLORED.columns(table, &["STATE", "PATH"]);
        assert_eq!(
            colored,
            "PEER  STATE  PATH\na     \x1b[32mup\x1b[0m     \x1b[33mrelay\x1b[0m 192.0.2.1:1\n\
             down  idle   -\n"
        );
        assert_eq!(Palette::PLAIN.columns(table, &["STATE"]), table);
        assert_eq!(Palette::COLORED.columns(table, &["RTT"]), table);
    }

    #[test]
    fn without_colors_a_text_stays_as_it_is() {
        assert_eq!(Palette::PLAIN.word("failed: why"), "failed: why");
        assert_eq!(Palette::COLORED.word("failed  x"), "\x1b[31mfailed  x\x1b[0m");
        assert_eq!(Palette::COLORED.word("skipped"), "skipped");
    }

    #[test]
    fn a_heading_is_a_whole_word() {
        assert_eq!(place("RX  RX/S  STATE", "RX/S"), Some(4));
        assert_eq!(place("SUBSTATE  STATE", "STATE"), Some(10));
    }
}
