//! Implements `towline top`: a live screen of the peers, by traffic.

use std::io::{self, IsTerminal as _, Stdin, Write as _};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use towline_proto::pb;
use towline_service::color::Palette;
use towline_service::output;

use super::{local, peers};
use crate::config::Config;
use crate::doctor::Answers;
use crate::top::{History, SAMPLES};

/// Time between two samples.
const INTERVAL: Duration = Duration::from_secs(1);
/// Switches to the alternate screen and hides the cursor (as xterm does).
const BEGIN: &str = "\x1b[?1049h\x1b[?25l";
/// Reverts [`BEGIN`].
const END: &str = "\x1b[?25h\x1b[?1049l";
/// Moves to the top left corner (ECMA-48).
const HOME: &str = "\x1b[H";
/// Erases the rest of the line.
const ERASE_LINE: &str = "\x1b[K";
/// Erases everything below.
const ERASE_BELOW: &str = "\x1b[J";
/// Keys that end the screen: `q`, and Ctrl-C, which is no signal while it is shown.
const QUIT: [u8; 3] = [b'q', b'Q', 3];
/// Size that is assumed where the terminal does not tell it.
const DEFAULT_SIZE: Size = Size { width: 80, height: 24 };

/// Size of the terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    width: usize,
    height: usize,
}

/// Shows the screen until a key or a signal ends it.
pub(super) fn run(config: &Config) -> anyhow::Result<()> {
    if !io::stdout().is_terminal() {
        bail!("standard output is not a terminal: run `towline peers --watch` instead");
    }
    // An agent that is not there is an error of the command line, not of the screen.
    let mut answers: Result<Answers, String> = Ok(local::ask(&config.socket)?);
    let screen = Screen::open()?;
    let (palette, is_utf8) = (Palette::of_stdout(), is_utf8());
    let mut history = History::default();
    loop {
        let sampled = Instant::now();
        if let Ok(answers) = &answers {
            history.add(&answers.peers, sampled);
        }
        let size = size();
        let lines = match &answers {
            Ok(answers) => lines(answers, &history, size, palette, is_utf8),
            // It may be starting again.
            Err(reason) => vec![cut(reason, size.width)],
        };
        write(&frame(&lines)).context("cannot write to the terminal")?;
        if screen.is_ended_within(INTERVAL.saturating_sub(sampled.elapsed()))? {
            return Ok(());
        }
        answers = local::ask(&config.socket).map_err(|error| output::error_line(error.as_ref()));
    }
}

/// The terminal while the screen is shown. Dropped, it is as it was before.
struct Screen {
    /// Standard input and its settings before, if it is a terminal.
    keys: Option<(Stdin, Termios)>,
    /// Signals that end the program, so that the terminal is restored first.
    signals: SignalFd,
}

impl Screen {
    fn open() -> anyhow::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block().context("cannot block signals")?;
        let signals = SignalFd::new(&mask).context("cannot wait for signals")?;
        let stdin = io::stdin();
        let keys = match tcgetattr(&stdin) {
            Ok(before) => {
                let mut settings = before.clone();
                let line = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
                settings.local_flags.remove(line);
                tcsetattr(&stdin, SetArg::TCSADRAIN, &settings)
                    .context("cannot read single keys of the terminal")?;
                Some((stdin, before))
            }
            // It is no terminal: a signal ends the screen.
            Err(_) => None,
        };
        let screen = Self { keys, signals };
        write(BEGIN).context("cannot write to the terminal")?;
        Ok(screen)
    }

    /// Waits for a time, and returns true as soon as a key or a signal ends the screen.
    fn is_ended_within(&self, time: Duration) -> anyhow::Result<bool> {
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut waiting = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            let keys = self.keys.as_ref().map(|(stdin, _)| stdin.as_fd());
            waiting.extend(keys.map(|keys| PollFd::new(keys, PollFlags::POLLIN)));
            match poll(&mut waiting, timeout) {
                Ok(0) => return Ok(false),
                // A stop and its continuation.
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(error).context("cannot wait for keys"),
                Ok(_) => {}
            }
            let is_ready = |place: usize| waiting.get(place).and_then(PollFd::any) == Some(true);
            if is_ready(0) {
                return Ok(true);
            }
            if let Some((stdin, _)) = self.keys.as_ref().filter(|_| is_ready(1)) {
                let mut pressed = [0; 32];
                let count = nix::unistd::read(stdin, &mut pressed).unwrap_or(0);
                // The end of the input: the terminal is gone.
                if count == 0 || pressed.iter().take(count).any(|key| QUIT.contains(key)) {
                    return Ok(true);
                }
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Where this fails, the terminal is gone.
        let _ = write(END);
        if let Some((stdin, before)) = &self.keys {
            let _ = tcsetattr(stdin, SetArg::TCSADRAIN, before);
        }
    }
}

/// Returns the text that replaces the screen's content without flicker.
fn frame(lines: &[String]) -> String {
    let lines: Vec<String> = lines.iter().map(|line| format!("{line}{ERASE_LINE}")).collect();
    format!("{HOME}{}{ERASE_BELOW}", lines.join("\r\n"))
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn size() -> Size {
    match terminal_size::terminal_size() {
        Some((width, height)) if width.0 > 0 && height.0 > 0 => {
            Size { width: width.0.into(), height: height.0.into() }
        }
        _ => DEFAULT_SIZE,
    }
}

/// Returns whether the locale's encoding is UTF-8, as the first of these variables that is set says.
fn is_utf8() -> bool {
    let variables = ["LC_ALL", "LC_CTYPE", "LANG"];
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = variables.into_iter().find_map(set).unwrap_or_default().to_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// Function that returns the text of a peer in a column.
type Value = fn(&pb::PeerStatus, &History) -> String;

/// A column of the screen.
struct Column {
    heading: &'static str,
    width: usize,
    /// True for numbers, which are aligned at the right.
    is_number: bool,
    /// True for words that have a color.
    is_colored: bool,
    value: Value,
}

impl Column {
    const fn text(heading: &'static str, width: usize, value: Value) -> Self {
        Self { heading, width, is_number: false, is_colored: false, value }
    }

    const fn number(heading: &'static str, width: usize, value: Value) -> Self {
        Self { is_number: true, ..Self::text(heading, width, value) }
    }

    const fn word(heading: &'static str, width: usize, value: Value) -> Self {
        Self { is_colored: true, ..Self::text(heading, width, value) }
    }
}

/// Columns in the order in which they are shown. A narrow terminal leaves out the last ones, and the
/// sparkline takes what is left.
const COLUMNS: [Column; 7] = [
    Column::text("PEER", 16, |peer, _| peer.name.clone()),
    Column::word("STATE", 10, |peer, _| peer.state.clone()),
    Column::number("RX/S", 11, |peer, history| {
        output::or_dash(history.rates(&peer.name).map(|rates| output::rate(rates.received)))
    }),
    Column::number("TX/S", 11, |peer, history| {
        output::or_dash(history.rates(&peer.name).map(|rates| output::rate(rates.sent)))
    }),
    Column::number("RTT", 10, |peer, _| peers::rtt_cell(peer)),
    Column::number("LOSS", 5, |peer, _| peers::loss_cell(peer)),
    Column::word("PATH", 26, |peer, _| peers::path_cell(peer)),
];
/// Blanks between two columns.
const GAP: usize = 2;
/// Smallest sparkline that is shown, in characters.
const SPARKLINE: usize = 10;

/// Returns the lines of the screen, none wider than the terminal, and as many as it has room for below
/// the two of the head.
fn lines(
    answers: &Answers,
    history: &History,
    size: Size,
    palette: Palette,
    is_utf8: bool,
) -> Vec<String> {
    let Answers { status, peers } = answers;
    let up = peers.iter().filter(|peer| peer.state == "up").count();
    let rates = peers.iter().filter_map(|peer| history.rates(&peer.name));
    let (mut received, mut sent) = (0_u64, 0_u64);
    for rates in rates {
        received = received.saturating_add(rates.received);
        sent = sent.saturating_add(rates.sent);
    }
    let head = format!(
        "{}  {up} of {} up  rx {}  tx {}  q: quit",
        output::or_dash(Some(&status.name)),
        peers.len(),
        output::rate(received),
        output::rate(sent),
    );
    let (shown, sparkline) = columns(size.width);
    let mut header: String = shown.iter().map(|column| cell(column, column.heading)).collect();
    if sparkline > 0 {
        header.push_str("RTT, LAST MINUTE");
    }
    let mut lines = vec![cut(&head, size.width), cut(header.trim_end(), size.width)];
    for peer in history.sorted(peers).into_iter().take(size.height.saturating_sub(lines.len())) {
        let mut line = String::new();
        for column in shown {
            let text = cell(column, &(column.value)(peer, history));
            line += &if column.is_colored { palette.word(&text) } else { text };
        }
        line += &history.sparkline(&peer.name, sparkline, is_utf8);
        lines.push(line.trim_end().to_owned());
    }
    lines
}

/// Returns the columns that fit, and the width of the sparkline; 0 if it has no room.
fn columns(width: usize) -> (&'static [Column], usize) {
    const ALL: &[Column] = &COLUMNS;
    let mut used = 0;
    let mut count = 0;
    for column in ALL {
        let next = used + column.width + GAP;
        // The first column is always shown.
        if count > 0 && next > width {
            break;
        }
        used = next;
        count += 1;
    }
    let left = width.saturating_sub(used);
    (&ALL[..count], if left >= SPARKLINE { left.min(SAMPLES) } else { 0 })
}

/// Returns a text in the width of its column, with the gap behind it.
fn cell(column: &Column, text: &str) -> String {
    let (text, width) = (cut(text, column.width), column.width);
    let gap = " ".repeat(GAP);
    if column.is_number { format!("{text:>width$}{gap}") } else { format!("{text:width$}{gap}") }
}

/// Returns the first `width` characters.
fn cut(text: &str, width: usize) -> String {
    text.chars().take(width).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers() -> Answers {
        let peer = |name: &str, state: &str, kind: &str| pb::PeerStatus {
            name: name.into(),
            state: state.into(),
            path_kind: kind.into(),
            path: if kind.is_empty() { String::new() } else { "192.0.2.1:51830".into() },
            rtt_us: Some(420),
            loss_percent: Some(1.0),
            ..Default::default()
        };
        Answers {
            status: pb::StatusResponse { name: "w0".into(), ..Default::default() },
            peers: vec![peer("a-peer-with-a-long-name", "down", ""), peer("cp", "up", "relay")],
        }
    }

    fn shown(width: usize, height: usize, palette: Palette) -> Vec<String> {
        let (answers, mut history) = (answers(), History::default());
        let begin = Instant::now();
        history.add(&answers.peers, begin);
        history.add(&answers.peers, begin + INTERVAL);
        lines(&answers, &history, Size { width, height }, palette, true)
    }

    #[test]
    fn a_screen_shows_every_column_and_what_is_up_first() {
        let lines = shown(120, 24, Palette::PLAIN);
        assert_eq!(lines[0], "w0  1 of 2 up  rx 0 B/s  tx 0 B/s  q: quit");
        let words: Vec<&str> = lines[2].split_whitespace().collect();
        let path = ["relay", "192.0.2.1:51830", "▁▁"];
        assert_eq!(words[..2], ["cp", "up"]);
        assert_eq!(words[words.len() - 3..], path);
        assert!(lines[3].starts_with("a-peer-with-a-lo  down "), "{lines:?}");
    }

    #[test]
    fn no_screen_is_wider_or_higher_than_its_terminal() {
        for (width, height) in [(1, 1), (20, 3), (40, 10), (79, 24), (80, 24), (300, 24)] {
            let lines = shown(width, height, Palette::PLAIN);
            // The first column is never cut.
            let limit = width.max(16);
            let widest = lines.iter().map(|line| line.chars().count()).max();
            assert!(widest <= Some(limit), "{width}: {lines:?}");
            assert!(lines.len() <= height.max(2), "{height}: {lines:?}");
        }
    }

    #[test]
    fn colors_do_not_move_columns() {
        let plain = shown(120, 24, Palette::PLAIN);
        let colored = shown(120, 24, Palette::COLORED);
        let codes = ["\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"];
        let stripped = codes.iter().fold(colored.join("\n"), |text, code| text.replace(code, ""));
        assert_eq!(stripped, plain.join("\n"));
        assert!(colored[2].contains("\x1b[32mup"), "{colored:?}");
    }

    #[test]
    fn a_frame_erases_what_it_does_not_write() {
        let lines = ["a".to_owned(), "b".to_owned()];
        assert_eq!(frame(&lines), "\x1b[Ha\x1b[K\r\nb\x1b[K\x1b[J");
    }
}
